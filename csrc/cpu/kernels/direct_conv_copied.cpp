// The direct convolution by weights that do not stay in the second cache level: pixels are copied, all terms of each together,
// and more of them at a time multiplied by weights that stay in the first. See kernels.h for what is read and written.
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
        if (i % kTermsALine == 0) fetch_to_read(tile.next_x + ((term - i) / kTermsALine + i / kTermsALine) * kLine);
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
// By the number of pixels, less one.
constexpr Multiply kMultiply[kRows] = {&multiply<1>, &multiply<2>, &multiply<3>,
                                       &multiply<4>, &multiply<5>, &multiply<6>};

void copy_values(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + Vec::size() <= count; i += Vec::size()) Vec::loadu(from + i).store(to + i);
  for (; i < count; ++i) to[i] = from[i];
}

// All terms of pixels, as [chunk][pixel][kChunk].
void copy(const DirectConv& conv, const Sources<kBlock>& x, int64_t pixels, float* copies) {
  const int64_t taps = conv.kernel_rows * conv.kernel_columns;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    float* to = copies + pixel * kChunk;
    int64_t room = kChunk;  // of the chunk
    for (int64_t tap = 0, next; tap < taps; tap = next) {
      const float* from = x[tap][pixel];
      int64_t left = conv.channels;  // of taps that lie one behind the other
      for (next = tap + 1; next < taps && x[next][pixel] == from + left; ++next) left += conv.channels;
      while (left > 0) {
        const int64_t count = smaller(left, room);
        copy_values(from, count, to);
        from += count, left -= count;
        to += count, room -= count;
        if (room == 0) to += (kBlock - 1) * kChunk, room = kChunk;
      }
    }
  }
}

// Lines of the first tap of the pixels that come next, one behind the other.
class Ahead {
 public:
  Ahead(const DirectConv& conv, const Sources<kBlock>& next, int64_t pixels)
      : pixel_(next[0]), last_(next[0] + pixels - 1), channels_(conv.channels) {}

  const float* here() const { return *pixel_ + channel_; }
  void pass(int64_t lines) {
    channel_ += lines * kLine;
    for (; channel_ >= channels_ && pixel_ < last_; ++pixel_) channel_ -= channels_;
  }

 private:
  const float* const* pixel_;
  const float* const* last_;
  int64_t channels_, channel_ = 0;
};

// y of the pixels that were copied.
void multiply_block(
    const DirectConv& conv, const float* copies, const float* weight, Ahead ahead, int64_t pixel, int64_t pixels,
    int64_t outputs_begin, int64_t outputs_end) {
  const int64_t terms = conv.kernel_rows * conv.kernel_columns * conv.channels;
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
      for (int64_t row = 0; row < pixels; row += kRows) {
        tile.x = copies + term * kBlock + row * kChunk;
        tile.next_weight = weight + row / kRows * (tile.terms / kTiles) * kStep;
        tile.next_x = ahead.here();
        tile.sums = sums + row * kStep;
        tile.pixel = pixel + row;
        kMultiply[smaller(kRows, pixels - row) - 1](conv, tile);
        ahead.pass(tile.terms / kTermsALine);
      }
    }
  }
}

}  // namespace

void direct_conv_copied(
    const DirectConv& conv, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last, float* copies) {
  const int64_t outputs_begin = begin * kDirectPanel, outputs_end = smaller(end * kDirectPanel, conv.outputs);
  Walk walk(conv, first);
  Sources<kBlock> sources[2] = {};  // of these pixels and the next
  int64_t count = smaller(kBlock, last - first);
  walk.find<kBlock>(count, sources[0]);
  int here = 0;
  for (int64_t pixel = first; pixel < last; pixel += kBlock, here ^= 1) {
    const int64_t next = smaller(kBlock, last - pixel - count);
    copy(conv, sources[here], count, copies);
    if (next > 0) walk.find<kBlock>(next, sources[here ^ 1]);
    const Ahead ahead(conv, sources[next > 0 ? here ^ 1 : here], next > 0 ? next : 1);
    multiply_block(conv, copies, packed, ahead, pixel, count, outputs_begin, outputs_end);
    count = next;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
