// The implicit-GEMM convolution of csrc/cuda/conv_bn_act.cu, emulated: its index arithmetic as it is, its instructions as
// the PTX ISA (9.7.9.25 cp.async, 9.7.14.5 mma.m16n8k16, 9.7.14.5.15 ldmatrix) describes them. Built and called by
// tests/test_cuda_conv.py.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <vector>

#include "cuda/bn_math.h"
#include "cuda/conv_tiles.h"

namespace {

using namespace resnet_fast::cuda;

enum Fault { kNone, kOutOfBounds, kMisaligned, kSharedOutOfBounds, kWrittenTwice };

struct Tensors {
  const void *x, *weight, *residual;
  void* y;
  const float* vectors[5];  // conv_bias, mean, var, weight, bias
  int64_t x_size, weight_size, y_size;
};

// Shared memory of one block, into which copies arrive only when they are waited for.
template <typename T>
class Shared {
 public:
  explicit Shared(int64_t elements) : memory_(elements, T(std::numeric_limits<float>::quiet_NaN())) {}

  void copy(int64_t to, const T* from) {
    Copy copy{to, {}};
    if (from != nullptr) std::copy_n(from, kChunk, copy.values);
    open_.push_back(copy);
  }
  void commit() {
    groups_.push_back(open_);
    open_.clear();
  }
  void wait(size_t pending) {
    while (groups_.size() > pending) {
      for (const Copy& copy : groups_.front()) std::copy_n(copy.values, kChunk, &memory_.at(copy.to));
      groups_.erase(groups_.begin());
    }
  }
  const T* at(int64_t offset) const { return &memory_.at(offset); }

 private:
  struct Copy {
    int64_t to;
    T values[kChunk];
  };
  std::vector<T> memory_;
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

// A register of two 16-bit values, for each lane.
template <typename T>
struct Register {
  T values[kWarp][2];
};

// ldmatrix.x4: lane 8 m + j hands over row j of matrix m; register m of a lane holds two values of row lane / 4.
template <typename T>
std::vector<Register<T>> ldmatrix(const Shared<T>& shared, const int64_t (&addresses)[kWarp]) {
  std::vector<Register<T>> out(4);
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const T* row = shared.at(addresses[matrix * 8 + lane / 4]);
      for (int e = 0; e < 2; ++e) out[matrix].values[lane][e] = row[lane % 4 * 2 + e];
    }
  }
  return out;
}

struct Accumulators {
  float values[kWarp][4] = {};
};

// mma.m16n8k16, row.col: groupID = lane / 4, threadID_in_group = lane % 4.
template <typename T>
void mma(Accumulators& acc, const std::vector<Register<T>>& a, const Register<T>& b0, const Register<T>& b1) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      left[group][pair + e] = a[0].values[lane][e];
      left[group + 8][pair + e] = a[1].values[lane][e];
      left[group][pair + 8 + e] = a[2].values[lane][e];
      left[group + 8][pair + 8 + e] = a[3].values[lane][e];
      right[pair + e][group] = b0.values[lane][e];
      right[pair + 8 + e][group] = b1.values[lane][e];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), col = lane % 4 * 2 + (i & 1);
      for (int k = 0; k < 16; ++k) acc.values[lane][i] += left[row][k] * right[k][col];
    }
  }
}

template <typename T, typename Tile>
struct Block {
  const ConvGeometry& g;
  const Tensors& t;
  const int64_t block;
  const bool relu;
  const double eps;
  std::vector<int8_t>& written;
  Fault fault = kNone;
  Shared<T> shared{kStages * Tile::kStageElements};
  std::vector<Loader<Tile>> loaders;
  std::vector<Accumulators> acc = std::vector<Accumulators>(Tile::kWarps * Tile::kRowTiles * Tile::kColTiles);

  Accumulators& at(int warp, int i, int j) { return acc[(warp * Tile::kRowTiles + i) * Tile::kColTiles + j]; }

  void load_step(int step) {
    const auto copy_from = [&](const void* base, int64_t size) {
      return [this, base, size, step](int to, int64_t from) {
        if (from >= 0 && from + kChunk > size) fault = kOutOfBounds;
        if (from >= 0 && from % kChunk != 0) fault = kMisaligned;
        if (to < 0 || to + kChunk > Tile::kStageElements) fault = kSharedOutOfBounds;
        if (fault != kNone) return;
        const int64_t stage = step % kStages * Tile::kStageElements;
        shared.copy(stage + to, from < 0 ? nullptr : static_cast<const T*>(base) + from);
      };
    };
    if (step < g.steps()) {
      for (Loader<Tile>& loader : loaders) loader.step(g, copy_from(t.x, t.x_size), copy_from(t.weight, t.weight_size));
    }
    shared.commit();
  }

  std::vector<Register<T>> fragment(int step, int tile, int (*offset)(int, int, int), int row, int chunk) {
    int64_t addresses[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int64_t stage = step % kStages * Tile::kStageElements;
      addresses[lane] = stage + offset(lane, row, chunk) + tile * kSixteenRows;
    }
    return ldmatrix(shared, addresses);
  }

  void multiply_step(int step) {
    for (int warp = 0; warp < Tile::kWarps; ++warp) {
      for (int chunk = 0; chunk < kChunks; chunk += 2) {
        for (int i = 0; i < Tile::kRowTiles; ++i) {
          const auto pixels = fragment(step, i, pixel_offset, Tile::warp_row(warp), chunk);
          for (int j = 0; j < Tile::kColTiles / 2; ++j) {
            const auto weights = fragment(step, j, weight_offset, Tile::kPixels + Tile::warp_col(warp), chunk);
            mma(at(warp, i, 2 * j), pixels, weights[0], weights[1]);
            mma(at(warp, i, 2 * j + 1), pixels, weights[2], weights[3]);
          }
        }
      }
    }
  }

  void store_tile(int warp, int tile) {
    std::vector<float> staging(Tile::kStagingFloats, std::numeric_limits<float>::quiet_NaN());
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int j = 0; j < Tile::kColTiles; ++j) {
        for (int i = 0; i < 4; ++i) staging.at(staging_place<Tile>(lane, j, i)) = at(warp, tile, j).values[lane][i];
      }
    }
    const Norm<float> norm{t.vectors[1], t.vectors[2], t.vectors[3], t.vectors[4], static_cast<float>(eps)};
    for (int lane = 0; lane < kWarp; ++lane) {
      const Storer<Tile> storer(g, block, warp, lane);
      for (int i = 0; i < Tile::kStores; ++i) {
        const int64_t offset = storer.y_offset(g, tile, i);
        if (offset < 0 || !storer.has_channels(g)) continue;
        if (offset % kChunk != 0) fault = kMisaligned;
        if (offset + kChunk > t.y_size) fault = kOutOfBounds;
        if (fault != kNone) return;
        for (int v = 0; v < kChunk; ++v) {
          Affine<float> affine = norm.at(storer.channel + v);
          if (t.vectors[0] != nullptr) affine.mean -= t.vectors[0][storer.channel + v];
          float value = affine(staging.at(storer.staging_offset(i) + v));
          if (t.residual != nullptr) value += static_cast<const T*>(t.residual)[offset + v];
          static_cast<T*>(t.y)[offset + v] = static_cast<T>(relu ? relu_of(value) : value);
          if (written[offset + v]++ != 0) fault = kWrittenTwice;
        }
      }
    }
  }

  Fault run() {
    for (int thread = 0; thread < Tile::kBlock; ++thread) loaders.emplace_back(g, block, thread);
    for (int step = 0; step < kStages - 1; ++step) load_step(step);
    for (int step = 0; step < g.steps() && fault == kNone; ++step) {
      shared.wait(kStages - 2);
      load_step(step + kStages - 1);
      multiply_step(step);
    }
    for (int warp = 0; warp < Tile::kWarps; ++warp) {
      for (int tile = 0; tile < Tile::kRowTiles && fault == kNone; ++tile) store_tile(warp, tile);
    }
    return fault;
  }
};

template <typename T, typename Tile>
int run_blocks(const ConvGeometry& g, const Tensors& t, double eps, bool relu) {
  std::vector<int8_t> written(t.y_size);
  for (int64_t block = 0; block < Tile::blocks(g); ++block) {
    const Fault fault = Block<T, Tile>{g, t, block, relu, eps, written}.run();
    if (fault != kNone) return fault;
  }
  return kNone;
}

ConvGeometry geometry_of(const int64_t* sizes) {
  ConvGeometry g{};
  g.batch = sizes[0];
  int32_t* const rest[] = {&g.height,        &g.width,        &g.channels,      &g.out_height,
                           &g.out_width,     &g.out_channels, &g.kernel_height, &g.kernel_width,
                           &g.stride_height, &g.stride_width, &g.padding_height, &g.padding_width,
                           &g.dilation_height, &g.dilation_width};
  for (size_t i = 0; i < std::size(rest); ++i) *rest[i] = static_cast<int32_t>(sizes[i + 1]);
  return g;
}

// What a warp's eight rows of one column have in common of the 32 banks: how often the most wanted one is wanted.
int most_in_a_bank(const int64_t (&offsets)[8]) {
  int counts[32] = {}, most = 0;
  for (const int64_t offset : offsets) {
    for (int word = 0; word < 4; ++word) most = std::max(most, ++counts[(offset * 2 / 4 + word) % 32]);
  }
  return most;
}

}  // namespace

extern "C" {

int convolve(const int64_t* sizes, const Tensors* t, bool half, bool wide, double eps, bool relu) {
  const ConvGeometry g = geometry_of(sizes);
  if (half) {
    return wide ? run_blocks<c10::Half, WideTiling>(g, *t, eps, relu) : run_blocks<c10::Half, NarrowTiling>(g, *t, eps, relu);
  }
  return wide ? run_blocks<c10::BFloat16, WideTiling>(g, *t, eps, relu)
              : run_blocks<c10::BFloat16, NarrowTiling>(g, *t, eps, relu);
}

// Blocks, steps, whether the narrow tiling is preferred; the last pixel's window; offsets of the last x chunk of its last
// tap, of the last weight chunk and of the last store.
void places(const int64_t* sizes, int64_t* out) {
  const ConvGeometry g = geometry_of(sizes);
  const Window window = window_of(g, g.pixels() - 1);
  const Tap tap = Tap::of(g, g.chunks() - 1);
  int64_t last = -1, weight_last = -1;
  const int64_t block = WideTiling::blocks(g) - 1;
  if (g.chunks() <= 1 << 20) {
    for (int thread = 0; thread < WideTiling::kBlock; ++thread) {
      Loader<WideTiling> loader(g, block, thread);
      const auto see = [&](int, int64_t from) { weight_last = std::max(weight_last, from); };
      for (int step = 0; step < g.steps(); ++step) loader.step(g, [](int, int64_t) {}, see);
    }
  }
  for (int warp = 0; warp < WideTiling::kWarps; ++warp) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const Storer<WideTiling> storer(g, block, warp, lane);
      for (int tile = 0; tile < WideTiling::kRowTiles; ++tile) {
        for (int i = 0; i < WideTiling::kStores; ++i) {
          if (storer.has_channels(g)) last = std::max(last, storer.y_offset(g, tile, i));
        }
      }
    }
  }
  const int64_t values[] = {WideTiling::blocks(g), NarrowTiling::blocks(g), g.steps(), prefers_narrow(g),
                            window.offset, window.top, window.left, x_offset(g, window, reach_of(g, tap), true),
                            weight_last, last};
  std::copy(std::begin(values), std::end(values), out);
}

// Over every ldmatrix and every copy of a tile: the most accesses of one bank by eight lanes that go together.
int worst_bank_conflict() {
  int worst = 0;
  int64_t offsets[8];
  for (int first = 0; first < 64; first += 8) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int row = 0; row < 8; ++row) offsets[row] = tile_offset(first + row, chunk);
      worst = std::max(worst, most_in_a_bank(offsets));
      for (int lane = 0; lane < 8; ++lane) offsets[lane] = tile_offset(first + chunk * 2 + lane / kChunks, lane % kChunks);
      worst = std::max(worst, most_in_a_bank(offsets));
    }
  }
  return worst;
}

}  // extern "C"
