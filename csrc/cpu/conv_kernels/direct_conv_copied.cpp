// The direct convolution by weights that do not stay in the second cache level: pixels are copied, all terms of each together,
// and more of them at a time multiplied by weights that stay in the first. See conv_kernels.h for what is read and written.
#include <array>
#include <cstring>
#include <utility>

#include "direct_parts.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

using namespace direct;

constexpr int64_t kBlock = kDirectCopied;  // pixels
constexpr int64_t kChunk = kDirectChunk;   // terms
constexpr int kTiles = kBlock / kRows;     // that use a chunk's weights
constexpr int kTermsALine = 8;             // between two fetches of lines of the next block
static_assert(kBlock % kRows == 0 && kLine % kTiles == 0);

// kRows pixels of a block by kStep outputs, over the terms of one chunk.
struct Tile {
  const float *x, *weight;            // [pixel][kChunk], [term][kStep]
  const float *next_x, *next_weight;  // lines to fetch on the way: of pixels, and those of weights that fall to this tile
  int64_t terms;
  float* sums;  // [pixel][kStep], of the chunks so far
  bool is_first, is_last;
  int64_t pixel, output;
};

template <int rows>
void multiply(const DirectConv& conv, const Tile& tile) {
  Vec sums[rows][kWide];
  sum_products<kStep>(
      sums, tile.weight, tile.terms,
      [&tile](int row, int64_t term) RF_INLINE_LAMBDA { return tile.x[row * kChunk + term]; },
      [&tile](int64_t term, int i) RF_INLINE_LAMBDA {
        if (i % kTiles == 0) fetch_to_read(tile.next_weight + ((term - i) / kTiles + i / kTiles) * kStep);
        fetch_a_line<kTermsALine>(tile.next_x, term, i);
      });
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < kWide; ++i) {
      float* so_far = tile.sums + row * kStep + i * Vec::size();
      if (!tile.is_first) sums[row][i] = sums[row][i] + Vec::loadu(so_far);
      if (!tile.is_last) sums[row][i].store(so_far);
    }
  }
  if (tile.is_last) write_outputs<rows>(conv, sums, tile.pixel, tile.output);
}

using Multiply = void (*)(const DirectConv&, const Tile&);
template <int... i>
constexpr std::array<Multiply, kRows> multiply_by_rows(std::integer_sequence<int, i...>) {
  return {&multiply<i + 1>...};
}
constexpr auto kMultiply = multiply_by_rows(std::make_integer_sequence<int, kRows>());  // of pixels, less one

int64_t bounded(int64_t value, int64_t most) { return value < 0 ? 0 : smaller(value, most); }

void copy_values(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + Vec::size() <= count; i += Vec::size()) Vec::loadu(from + i).store(to + i);
  if (i == count) return;
  if (count >= Vec::size()) {  // the last ones, some of them twice
    Vec::loadu(from + count - Vec::size()).store(to + count - Vec::size());
    return;
  }
  for (; i < count; ++i) to[i] = from[i];
}

// The terms of one pixel, one behind the other, to where [chunk][pixel][kChunk] has them.
class Row {
 public:
  explicit Row(float* to) : to_(to) {}

  void zeros(int64_t count) {
    place(count, [](int64_t, int64_t some, float* to) RF_INLINE_LAMBDA { std::memset(to, 0, some * sizeof(float)); });
  }
  void values(const float* from, int64_t count) {
    place(count, [from](int64_t done, int64_t some, float* to) RF_INLINE_LAMBDA { copy_values(from + done, some, to); });
  }

 private:
  template <typename F>
  void place(int64_t count, const F& put) {
    for (int64_t done = 0; done < count;) {
      const int64_t some = smaller(count - done, room_);
      put(done, some, to_);
      done += some;
      to_ += some, room_ -= some;
      if (room_ == 0) to_ += (kBlock - 1) * kChunk, room_ = kChunk;
    }
  }

  float* to_;
  int64_t room_ = kChunk;  // of the chunk
};

// Copies all terms of `pixels` pixels, `at` which is behind them then.
void copy(const DirectConv& conv, Pixel& at, int64_t pixels, float* copies) {
  // Taps of a row of the kernel lie one behind the other, unless they are dilated.
  const int64_t together = conv.dilation[1] == 1 ? conv.kernel_columns : 1;
  for (int64_t i = 0; i < pixels; ++i, at.step()) {
    Row to(copies + i * kChunk);
    for (int64_t r = 0; r < conv.kernel_rows; ++r) {
      const int64_t row = at.top() + r * conv.dilation[0];
      for (int64_t s = 0; s < conv.kernel_columns; s += together) {
        const int64_t column = at.left() + s * conv.dilation[1];
        const bool inside = row >= 0 && row < conv.height;
        const int64_t before = inside ? bounded(-column, together) : together;
        const int64_t behind = inside ? bounded(column + together - conv.width, together - before) : 0;
        if (before > 0) to.zeros(before * conv.channels);
        const int64_t count = together - before - behind;
        if (count > 0) to.values(at.x(row, column + before), count * conv.channels);
        if (behind > 0) to.zeros(behind * conv.channels);
      }
    }
  }
}

// The pixels that come next, of which a tap is fetched, one line behind the other.
class Ahead {
 public:
  Ahead(const DirectConv& conv, Pixel at, int64_t pixels) : count_(pixels), channels_(conv.channels) {
    for (auto& pixel : pixels_) {
      pixel = at.x(bounded(at.top(), conv.height), bounded(at.left(), conv.width));
      at.step();
    }
  }

  const float* here() const { return pixels_[number_] + channel_; }
  void pass(int64_t lines) {
    channel_ += lines * kLine;
    for (; channel_ >= channels_ && number_ + 1 < count_; ++number_) channel_ -= channels_;
  }

 private:
  const float* pixels_[kBlock];
  int64_t count_, channels_, number_ = 0, channel_ = 0;
};

// y of the pixels that were copied.
void multiply_block(
    const DirectConv& conv, const float* copies, const float* weight, Ahead ahead, int64_t pixel, int64_t pixels,
    int64_t outputs_begin, int64_t outputs_end) {
  const int64_t terms = conv.kernel_rows * conv.kernel_columns * conv.channels;
  const int64_t tiles = div_up(pixels, kRows);  // about as large as each other: products of few pixels wait for sums
  float sums[kBlock * kStep];
  Tile tile;
  for (tile.output = outputs_begin; tile.output < outputs_end; tile.output += kStep) {
    fetch_outputs(conv, pixel, pixels, tile.output);
    for (int64_t term = 0; term < terms; term += kChunk) {
      tile.terms = smaller(kChunk, terms - term);
      tile.weight = weight;
      tile.is_first = term == 0;
      tile.is_last = term + kChunk >= terms;
      weight += tile.terms * kStep;
      for (int64_t number = 0, row = 0; number < tiles; ++number) {
        const int64_t rows = div_up(pixels - row, tiles - number);
        tile.x = copies + term * kBlock + row * kChunk;
        tile.next_weight = weight + number * (tile.terms / kTiles) * kStep;
        tile.next_x = ahead.here();
        tile.sums = sums + row * kStep;
        tile.pixel = pixel + row;
        kMultiply[rows - 1](conv, tile);
        ahead.pass(tile.terms / kTermsALine);
        row += rows;
      }
    }
  }
}

}  // namespace

void direct_conv_copied(
    const DirectConv& conv, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last, float* copies) {
  const int64_t outputs_begin = begin * kDirectPanel, outputs_end = smaller(end * kDirectPanel, conv.outputs);
  Pixel at(conv, first);
  for (int64_t left = div_up(last - first, kBlock); left > 0; --left) {
    const int64_t pixels = div_up(last - first, left);
    copy(conv, at, pixels, copies);
    multiply_block(conv, copies, packed, Ahead(conv, at, pixels), first, pixels, outputs_begin, outputs_end);
    first += pixels;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
