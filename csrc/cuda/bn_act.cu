// The batch norm kernels and their launches: params struct -> types -> kernel -> launch.
//
// Compiled for sm_80, sm_90 and sm_100 without spills, but NOT YET RUN ON A GPU: nothing chooses them by itself, only
// backend="native" on a CUDA tensor does. What a thread does is tested on the host (tests/test_cuda_core.py).
//
// Headers of c10 only: those of ATen would double the time that this takes to compile.
#include "bn_act.h"

#include <c10/cuda/CUDAException.h>

#include "bn_launch.h"

namespace resnet_fast::cuda {

namespace {

constexpr int kBlocksPerSm = 2;  // spelled out, or ptxas aims at more of them and spills a few bytes for that

__device__ __forceinline__ Thread this_thread() {
  return {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, blockDim.x, blockDim.y, gridDim.y, gridDim.z};
}

template <typename Op, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) map_kernel(Op op, Matrix m) {
  map_thread<V, kChannelsLast>(op, m, this_thread());
}

// Merges the block's states over `lanes` (a power of two) that lie `stride` apart; the result ends in lane 0.
template <int kStates, typename State>
__device__ __forceinline__ void merge_block(State* states, int index, int lane, int lanes, int stride) {
  for (int half = lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    merge_step<kStates>(states, index, lane, half, stride);
  }
}

template <typename Op, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reduce_kernel(Op op, Matrix m, typename Op::Running::State* __restrict__ partials) {
  using State = typename Op::Running::State;
  constexpr int kStates = kChannelsLast ? V : 1;
  __shared__ State states[kThreads * kStates];

  const Thread t = this_thread();
  typename Op::Running running[kStates] = {};
  reduce_thread<V, kChannelsLast>(op, m, t, running);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int v = 0; v < kStates; ++v) states[thread * kStates + v] = running[v].state();
  if constexpr (kChannelsLast) {
    merge_block<kStates>(states, thread * kStates, threadIdx.y, blockDim.y, blockDim.x * kStates);
  } else {
    merge_block<1>(states, thread, thread, kThreads, 1);
  }
  write_partials<V, kChannelsLast>(states, m, t, partials);
}

template <typename State, typename Finish>
__global__ void __launch_bounds__(kMergeChannels * kMergeLanes)
    merge_kernel(const State* __restrict__ partials, int64_t chunks, int64_t channels, Finish finish) {
  // A block owns kMergeChannels channels.
  __shared__ typename State::Wide states[kMergeChannels * kMergeLanes];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kMergeChannels + threadIdx.x;
  const int thread = threadIdx.y * kMergeChannels + threadIdx.x;
  states[thread] = merge_thread(partials, chunks, channels, channel, threadIdx.y);
  merge_block<1>(states, thread, threadIdx.y, kMergeLanes, kMergeChannels);
  if (threadIdx.y == 0 && channel < channels) finish(channel, states[thread]);
}

dim3 as_dim3(const Size3& size) {
  TORCH_CHECK(
      size.x <= kMaxGridX && size.y <= kMaxGridYZ && size.z <= kMaxGridYZ,
      "x: too large for one CUDA launch: a grid of ", size.x, " x ", size.y, " x ", size.z);
  return dim3(size.x, size.y, size.z);
}

struct Launcher {
  cudaStream_t stream;

  template <int V, typename Op>
  void map(const Op& op, const Matrix& m, const Size3& grid, const Size3& block) const {
    auto* kernel = m.channels_last ? &map_kernel<Op, V, true> : &map_kernel<Op, V, false>;
    kernel<<<as_dim3(grid), as_dim3(block), 0, stream>>>(op, m);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <int V, typename Op, typename State>
  void reduce(const Op& op, const Matrix& m, const Size3& grid, const Size3& block, State* partials) const {
    auto* kernel = m.channels_last ? &reduce_kernel<Op, V, true> : &reduce_kernel<Op, V, false>;
    kernel<<<as_dim3(grid), as_dim3(block), 0, stream>>>(op, m, partials);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename State, typename Finish>
  void merge(const State* partials, int64_t chunks, int64_t channels, const Finish& finish) const {
    const dim3 grid(ceil_div(channels, kMergeChannels));
    merge_kernel<<<grid, dim3(kMergeChannels, kMergeLanes), 0, stream>>>(partials, chunks, channels, finish);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

int64_t partial_bytes(const Image& image, DType dtype) { return partial_bytes_of(image, dtype); }

void launch_statistics(const StatisticsParams& params, cudaStream_t stream) { run(Launcher{stream}, params); }
void launch_apply(const ApplyParams& params, cudaStream_t stream) { run(Launcher{stream}, params); }
void launch_backward_reduce(const BackwardReduceParams& params, cudaStream_t stream) { run(Launcher{stream}, params); }
void launch_backward_apply(const BackwardApplyParams& params, cudaStream_t stream) { run(Launcher{stream}, params); }

}  // namespace resnet_fast::cuda
