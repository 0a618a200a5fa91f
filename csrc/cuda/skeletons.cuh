// The two shapes that every bn_act kernel has: map (elementwise with per-channel parameters) and reduce (per-channel
// sums in two stages). What an element does is in the Op (bn_act.cu); what a thread owns is here.
//
// A tensor is seen as a row-major matrix [rows, cols]: channels_last is [N*H*W, C], one channel a column; contiguous is
// [N*C, H*W], one channel a row. Threads own V neighbouring columns, one 16-byte access where shapes and addresses allow.
// Grids depend on the shape only and partial results are merged in a fixed order without atomics: results are bitwise
// reproducible. All offsets are int64.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

namespace resnet_fast::cuda {

constexpr int kThreads = 256;
constexpr int kMergeChannels = 32;  // merge_kernel: channels a block owns
constexpr int kMergeLanes = 16;     // and threads a channel
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kReduceBlocks = 1024;  // about enough to fill a large GPU twice

struct Matrix {
  int64_t rows;
  int64_t cols;
  int64_t channels;
  bool channels_last;
};

// T: storage type. Acc: what it is computed in. V: neighbouring elements a thread handles at once.
template <typename T_, typename Acc_, int V_>
struct Traits {
  using T = T_;
  using Acc = Acc_;
  static constexpr int V = V_;
  struct alignas(sizeof(T) * V) Vec {
    T values[V];
  };

  static __device__ __forceinline__ Vec load(const T* at) { return *reinterpret_cast<const Vec*>(at); }
  static __device__ __forceinline__ void store(T* at, const Vec& vec) { *reinterpret_cast<Vec*>(at) = vec; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads along columns (a power of two, just wide enough), the rest of the block along rows.
inline dim3 block_shape(int64_t col_vectors) {
  unsigned x = 1;
  while (x < kThreads && static_cast<int64_t>(x) < col_vectors) x *= 2;
  return dim3(x, kThreads / x);
}

template <typename Op, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) map_kernel(Op op, Matrix m) {
  // A thread owns V columns from col, and every gridDim.y * blockDim.y-th row from its own. Channel parameters are read
  // once a thread (channels_last) or once a row (contiguous).
  constexpr int V = Op::V;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (col >= m.cols) return;
  typename Op::Channel channel[kChannelsLast ? V : 1];
  if constexpr (kChannelsLast) {
#pragma unroll
    for (int v = 0; v < V; ++v) channel[v] = op.channel(col + v);
  }
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < m.rows; row += row_step) {
    if constexpr (!kChannelsLast) channel[0] = op.channel(row % m.channels);
    op.template map<kChannelsLast>(row * m.cols + col, channel);
  }
}

// Merges the block's states pairwise over `lanes` (a power of two) that lie `stride` apart; the sum ends in lane 0.
template <typename State>
__device__ __forceinline__ void merge_block(State* states, int index, int lane, int lanes, int stride) {
  for (int half = lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) states[index].merge(states[index + half * stride]);
  }
}

template <typename Op, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) reduce_kernel(Op op, Matrix m, typename Op::State* partials) {
  // channels_last: a block owns blockDim.x * V channels and every gridDim.y-th group of blockDim.y rows.
  // contiguous: a block owns channel blockIdx.x, every gridDim.y-th group of blockDim.y images and every gridDim.z-th
  // group of blockDim.x * V pixels. It writes partials[blockIdx.z * gridDim.y + blockIdx.y, channel].
  using State = typename Op::State;
  constexpr int V = Op::V;
  constexpr int kStates = kChannelsLast ? V : 1;
  __shared__ State states[kThreads * kStates];

  typename Op::Running running[kStates] = {};
  typename Op::Channel channel[kStates];
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  if constexpr (kChannelsLast) {
    const int64_t col = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (col < m.cols) {
#pragma unroll
      for (int v = 0; v < V; ++v) channel[v] = op.channel(col + v);
      for (int64_t row = first_row; row < m.rows; row += row_step) {
        op.template reduce<true>(row * m.cols + col, channel, running);
      }
    }
  } else {
    channel[0] = op.channel(blockIdx.x);
    const int64_t first_col = (static_cast<int64_t>(blockIdx.z) * blockDim.x + threadIdx.x) * V;
    const int64_t col_step = static_cast<int64_t>(gridDim.z) * blockDim.x * V;
    for (int64_t image = first_row; image * m.channels < m.rows; image += row_step) {
      const int64_t row = image * m.channels + blockIdx.x;
      for (int64_t col = first_col; col < m.cols; col += col_step) {
        op.template reduce<false>(row * m.cols + col, channel, running);
      }
    }
  }

  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int v = 0; v < kStates; ++v) states[thread * kStates + v] = running[v].state();
  const int64_t chunk = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  if constexpr (kChannelsLast) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      merge_block(states, thread * V + v, threadIdx.y, blockDim.y, blockDim.x * V);
      const int64_t col = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V + v;
      if (threadIdx.y == 0 && col < m.cols) partials[chunk * m.channels + col] = states[thread * V + v];
    }
  } else {
    merge_block(states, thread, thread, kThreads, 1);
    if (thread == 0) partials[chunk * m.channels + blockIdx.x] = states[0];
  }
}

template <typename State, typename Finish>
__global__ void __launch_bounds__(kMergeChannels * kMergeLanes)
    merge_kernel(const State* partials, int64_t chunks, int64_t channels, Finish finish) {
  // A block owns kMergeChannels channels; lane y of a channel merges chunks y, y + kMergeLanes, ... in that order.
  __shared__ State states[kMergeChannels * kMergeLanes];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kMergeChannels + threadIdx.x;
  const int thread = threadIdx.y * kMergeChannels + threadIdx.x;
  State state = {};
  if (channel < channels) {
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kMergeLanes) {
      state.merge(partials[chunk * channels + channel]);
    }
  }
  states[thread] = state;
  merge_block(states, thread, threadIdx.y, kMergeLanes, kMergeChannels);
  if (threadIdx.y == 0 && channel < channels) finish(channel, states[thread]);
}

template <typename Op>
void launch_map(const Op& op, const Matrix& m, cudaStream_t stream) {
  const int64_t col_vectors = m.cols / Op::V;
  const dim3 block = block_shape(col_vectors);
  constexpr int kRowsPerThread = 8;
  const int64_t row_blocks = ceil_div(m.rows, static_cast<int64_t>(block.y) * kRowsPerThread);
  const dim3 grid(ceil_div(col_vectors, block.x), std::min(row_blocks, kMaxGridY));
  auto* kernel = m.channels_last ? &map_kernel<Op, true> : &map_kernel<Op, false>;
  kernel<<<grid, block, 0, stream>>>(op, m);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

inline dim3 reduce_grid(const Matrix& m, int64_t col_vectors, const dim3& block) {
  constexpr int kStepsPerThread = 16;
  if (m.channels_last) {
    const int64_t x = ceil_div(col_vectors, block.x);
    const int64_t y = ceil_div(m.rows, static_cast<int64_t>(block.y) * kStepsPerThread);
    return dim3(x, std::min(y, ceil_div(kReduceBlocks, x)));
  }
  const int64_t blocks_per_channel = ceil_div(kReduceBlocks, m.channels);
  const int64_t y = std::min(ceil_div(m.rows / m.channels, block.y), blocks_per_channel);
  const int64_t z = ceil_div(col_vectors, static_cast<int64_t>(block.x) * kStepsPerThread);
  return dim3(m.channels, y, std::min(z, ceil_div(blocks_per_channel, y)));
}

inline int64_t chunk_count(const dim3& grid) { return static_cast<int64_t>(grid.y) * grid.z; }

// allocate(bytes) returns device memory that lives until the launches are enqueued.
template <typename Op, typename Finish, typename Allocate>
void launch_reduce(const Op& op, const Matrix& m, const Finish& finish, const Allocate& allocate, cudaStream_t stream) {
  using State = typename Op::State;
  const int64_t col_vectors = m.cols / Op::V;
  const dim3 block = block_shape(col_vectors);
  const dim3 grid = reduce_grid(m, col_vectors, block);
  auto* partials = static_cast<State*>(allocate(chunk_count(grid) * m.channels * sizeof(State)));
  auto* kernel = m.channels_last ? &reduce_kernel<Op, true> : &reduce_kernel<Op, false>;
  kernel<<<grid, block, 0, stream>>>(op, m, partials);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const dim3 merge_block_shape(kMergeChannels, kMergeLanes);
  merge_kernel<State, Finish><<<ceil_div(m.channels, kMergeChannels), merge_block_shape, 0, stream>>>(
      partials, chunk_count(grid), m.channels, finish);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace resnet_fast::cuda
