// The CUDA batch norm kernels on the host: the same params, grids, threads and arithmetic, block after block. What is not
// here is in csrc/cuda/bn_act.cu: the kernels' few lines around them. Built and called by tests/cuda_host.py.
#include <vector>

#include "cuda/bn_launch.h"

namespace {

using namespace resnet_fast::cuda;

template <typename F>
void for_blocks(const Size3& grid, const Size3& block, const F& f) {
  for (int64_t z = 0; z < grid.z; ++z) {
    for (int64_t y = 0; y < grid.y; ++y) {
      for (int64_t x = 0; x < grid.x; ++x) f(Thread{x, y, z, 0, 0, block.x, block.y, grid.y, grid.z});
    }
  }
}

template <typename F>
void for_threads(Thread t, const F& f) {
  for (t.y = 0; t.y < t.block_size_y; ++t.y) {
    for (t.x = 0; t.x < t.block_size_x; ++t.x) f(t);
  }
}

struct HostLauncher {
  template <int V, typename Op>
  void map(const Op& op, const Matrix& m, const Size3& grid, const Size3& block) const {
    for_blocks(grid, block, [&](const Thread& first) {
      for_threads(first, [&](const Thread& t) {
        if (m.channels_last) {
          map_thread<V, true>(op, m, t);
        } else {
          map_thread<V, false>(op, m, t);
        }
      });
    });
  }

  template <int V, typename Op, typename State>
  void reduce(const Op& op, const Matrix& m, const Size3& grid, const Size3& block, State* partials) const {
    if (m.channels_last) {
      reduce_blocks<V, true>(op, m, grid, block, partials);
    } else {
      reduce_blocks<V, false>(op, m, grid, block, partials);
    }
  }

  template <typename State, typename Finish>
  void merge(const State* partials, int64_t chunks, int64_t channels, const Finish& finish) const {
    for (int64_t channel = 0; channel < channels; ++channel) {
      std::vector<typename State::Wide> states(kMergeLanes);
      for (int lane = 0; lane < kMergeLanes; ++lane) {
        states[lane] = merge_thread(partials, chunks, channels, channel, lane);
      }
      for (int64_t half = kMergeLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < kMergeLanes; ++lane) merge_step<1>(states.data(), lane, lane, half, 1);
      }
      finish(channel, states[0]);
    }
  }

 private:
  template <int V, bool kChannelsLast, typename Op, typename State>
  void reduce_blocks(const Op& op, const Matrix& m, const Size3& grid, const Size3& block, State* partials) const {
    constexpr int kStates = kChannelsLast ? V : 1;
    for_blocks(grid, block, [&](const Thread& first) {
      std::vector<State> states(kThreads * kStates);
      for_threads(first, [&](const Thread& t) {
        typename Op::Running running[kStates] = {};
        reduce_thread<V, kChannelsLast>(op, m, t, running);
        for (int v = 0; v < kStates; ++v) states[t.index() * kStates + v] = running[v].state();
      });
      const int64_t lanes = kChannelsLast ? block.y : kThreads;
      for (int64_t half = lanes / 2; half > 0; half /= 2) {
        for_threads(first, [&](const Thread& t) {
          const int64_t lane = kChannelsLast ? t.y : t.index();
          merge_step<kStates>(states.data(), t.index() * kStates, lane, half, kChannelsLast ? block.x * kStates : 1);
        });
      }
      for_threads(first, [&](const Thread& t) { write_partials<V, kChannelsLast>(states.data(), m, t, partials); });
    });
  }
};

// Pointers of one norm: mean, var, weight, bias.
NormParams norm(void* const* pointers, double eps) { return {pointers[0], pointers[1], pointers[2], pointers[3], eps}; }

// Partial sums full of NaN, so that one which is never written shows.
std::vector<char> partials(const Image& image, DType dtype) {
  return std::vector<char>(partial_bytes_of(image, dtype), static_cast<char>(0xff));
}

}  // namespace

extern "C" {

void statistics(const Image* image, int dtype, void* const* tensors) {
  std::vector<char> buffer = partials(*image, DType(dtype));
  run(HostLauncher{}, StatisticsParams{*image, DType(dtype), tensors[0], buffer.data(), tensors[1], tensors[2]});
}

// tensors: x, residual, y, norm's four, the residual norm's four.
void apply(const Image* image, int dtype, void* const* tensors, double eps, double residual_eps, bool join, bool relu) {
  run(HostLauncher{}, ApplyParams{*image, DType(dtype), tensors[0], tensors[1], tensors[2], norm(tensors + 3, eps),
                                  norm(tensors + 7, residual_eps), join, relu});
}

// tensors: dy, x, y, norm's four, sum_dz, sum_dzx, dweight.
void backward_reduce(const Image* image, int dtype, void* const* tensors, double eps, int mask) {
  std::vector<char> buffer = partials(*image, DType(dtype));
  const BackwardParams shared{*image, DType(dtype), tensors[0], tensors[1], tensors[2], norm(tensors + 3, eps), Mask(mask)};
  run(HostLauncher{}, BackwardReduceParams{shared, buffer.data(), tensors[7], tensors[8], tensors[9]});
}

// tensors: dy, x, y, norm's four, sum_dz, sum_dzx, dx, dz.
void backward_apply(const Image* image, int dtype, void* const* tensors, double eps, int mask, double inv_count) {
  const BackwardParams shared{*image, DType(dtype), tensors[0], tensors[1], tensors[2], norm(tensors + 3, eps), Mask(mask)};
  run(HostLauncher{}, BackwardApplyParams{shared, tensors[7], tensors[8], inv_count, tensors[9], tensors[10]});
}

// Of the launches of a map and a reduction with accesses of `vector` elements, for the whole accesses and the rest:
// rows, cols, begin, slots, map's grid, block's x and y, the reduction's grid; then all partial results' count and bytes.
void geometry(const Image* image, int64_t vector, int64_t* out) {
  const Split parts = split(*image, vector);
  for (const bool whole : {true, false}) {
    const Matrix& m = whole ? parts.main : parts.rest;
    if (m.rows == 0) {
      out += 12;
      continue;
    }
    const int64_t slots = slots_of(m, whole ? vector : 1);
    const Size3 block = block_shape(slots), mapped = map_grid(m, slots, block), reduced = reduce_grid(m, slots, block);
    for (int64_t value : {m.rows, m.cols, m.begin, slots, mapped.x, mapped.y, mapped.z, block.x, block.y, reduced.x,
                          reduced.y, reduced.z}) {
      *out++ = value;
    }
  }
  *out++ = reduce_chunks(*image, vector);
  *out = partial_bytes_of(*image, vector == 8 ? DType::bfloat16 : vector == 4 ? DType::float32 : DType::float64);
}

// Raises the count of every element by one for every visit of a map that knows its channel and is aligned.
void cover(const Image* image, int64_t vector, int8_t* counts);

}  // extern "C"

namespace {

// An Op that counts.
template <int kVector>
struct Count {
  struct T {
    char bytes[16 / kVector];
  };
  struct Channel {
    int64_t index;
  };
  const Image image;
  int8_t* counts;

  Channel channel(int64_t c) const { return {c}; }

  template <int V, bool kPerColumn>
  void map(int64_t offset, const Channel* channel) const {
    for (int64_t v = 0; v < V; ++v) {
      const int64_t at = offset + v;
      const int64_t own = image.channels_last ? at % image.channels : at / image.plane % image.channels;
      if (channel[kPerColumn ? v : 0].index == own && (V == 1 || offset % V == 0)) ++counts[at];
    }
  }
};

}  // namespace

void cover(const Image* image, int64_t vector, int8_t* counts) {
  if (vector == 8) map(HostLauncher{}, Count<8>{*image, counts}, *image, true);
  if (vector == 4) map(HostLauncher{}, Count<4>{*image, counts}, *image, true);
  if (vector == 2) map(HostLauncher{}, Count<2>{*image, counts}, *image, true);
  if (vector == 1) map(HostLauncher{}, Count<1>{*image, counts}, *image, false);
}
