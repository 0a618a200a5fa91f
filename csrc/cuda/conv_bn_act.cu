// Convolution with batch norm, residual and ReLU in its epilogue, on tensor cores: an implicit GEMM of mma.sync.
//
// Four stages of cp.async feed shared memory, ldmatrix feeds the registers. Which byte goes where is conv_tiles.h's, and
// tested on the host by emulating this kernel (tests/test_cuda_conv.py). For sm_80 and newer; on sm_90 wgmma would be
// faster, which is what the Triton kernels are for. NOT YET RUN ON A GPU.
#include "conv_bn_act.h"

#include <c10/cuda/CUDAException.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <atomic>
#include <utility>

#include "bn_math.h"

namespace resnet_fast::cuda {

namespace {

// ---- instructions ----

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory; zeros where `valid` is false, and then `from` is not read.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies but the last kPending.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// kBytes beyond `from`.
template <int kBytes>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from), "n"(kBytes)
               : "memory");
}

template <int... kTiles>
__device__ __forceinline__ void load_tiles(
    uint32_t (&to)[sizeof...(kTiles)][4], uint32_t from, std::integer_sequence<int, kTiles...>) {
  (load_matrices<kTiles * kSixteenRows * 2>(to[kTiles], from), ...);
}

template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- epilogue ----

template <typename T>
struct Arguments {
  ConvGeometry geometry;
  const T* x;
  const T* weight;
  const float* conv_bias;  // may be null
  Norm<float> norm;
  const T* residual;  // may be null
  T* y;
  bool relu;
};

template <typename T>
struct alignas(16) Chunk {
  T values[kChunk];
};

__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// conv_bias and norm of one channel: fma(x - centre, scale, bias).
template <typename T>
__device__ __forceinline__ Affine<float> epilogue_of(const Arguments<T>& a, int64_t channel) {
  Affine<float> affine = a.norm.at(channel);
  if (a.conv_bias != nullptr) affine.mean -= a.conv_bias[channel];
  return affine;
}

// ---- kernel ----

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kBlock, 2) conv_kernel(const __grid_constant__ Arguments<T> a) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared[];
  const ConvGeometry& g = a.geometry;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const uint32_t stages = shared_address(shared);
  const auto stage_address = [&](int step) {
    return stages + static_cast<uint32_t>(step % kStages) * (Tile::kStageElements * 2);
  };

  Loader<Tile> loader(g, blockIdx.x, thread);
  const int steps = g.steps();
  const auto load_step = [&](int step) {
    if (step < steps) {
      const uint32_t stage = stage_address(step);
      loader.step(
          g,
          [&](int to, int64_t from) { copy_async(stage + to * 2, from < 0 ? a.x : a.x + from, from >= 0); },
          [&](int to, int64_t from) { copy_async(stage + to * 2, from < 0 ? a.weight : a.weight + from, from >= 0); });
    }
    commit_copies();  // an empty group too: groups are counted
  };

  uint32_t pixel_bytes[kChunks / 2], weight_bytes[kChunks / 2];  // of this lane's fragments in a stage
#pragma unroll
  for (int half = 0; half < kChunks / 2; ++half) {
    pixel_bytes[half] = pixel_offset(lane, Tile::warp_row(warp), half * 2) * 2;
    weight_bytes[half] = weight_offset(lane, Tile::kPixels + Tile::warp_col(warp), half * 2) * 2;
  }

  float acc[Tile::kRowTiles][Tile::kColTiles][4] = {};
  for (int step = 0; step < kStages - 1; ++step) load_step(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this step's tiles are there, and nobody reads those that the next copies overwrite
    load_step(step + kStages - 1);
    const uint32_t stage = stage_address(step);
#pragma unroll
    for (int half = 0; half < kChunks / 2; ++half) {  // 16 of the sum's terms
      uint32_t pixels[Tile::kRowTiles][4], weights[Tile::kColTiles / 2][4];
      load_tiles(pixels, stage + pixel_bytes[half], std::make_integer_sequence<int, Tile::kRowTiles>());
      load_tiles(weights, stage + weight_bytes[half], std::make_integer_sequence<int, Tile::kColTiles / 2>());
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kColTiles; ++j) {
          multiply<T>(acc[i][j], pixels[i], weights[j / 2][j % 2 * 2], weights[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
  wait_copies<0>();
  __syncthreads();  // the stages' memory is the staging buffers' from here on

  float* staging = reinterpret_cast<float*>(shared) + warp * Tile::kStagingFloats;
  const Storer<Tile> storer(g, blockIdx.x, warp, lane);
  Affine<float> affine[kChunk] = {};
  if (storer.has_channels(g)) {
#pragma unroll
    for (int v = 0; v < kChunk; ++v) affine[v] = epilogue_of(a, storer.channel + v);
  }
#pragma unroll
  for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::kColTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        *reinterpret_cast<float2*>(staging + staging_place<Tile>(lane, j, i)) =
            make_float2(acc[tile][j][i], acc[tile][j][i + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Tile::kStores; ++i) {
      const int64_t offset = storer.y_offset(g, tile, i);
      if (offset < 0 || !storer.has_channels(g)) continue;
      Chunk<T> residual = {};
      if (a.residual != nullptr) residual = *reinterpret_cast<const Chunk<T>*>(a.residual + offset);
      Chunk<T> out;
#pragma unroll
      for (int v = 0; v < kChunk; ++v) {
        float value = affine[v](staging[storer.staging_offset(i) + v]);
        if (a.residual != nullptr) value += as_float(residual.values[v]);
        assign(out.values[v], a.relu ? relu_of(value) : value);
      }
      *reinterpret_cast<Chunk<T>*>(a.y + offset) = out;
    }
  }
#endif
}

// ---- launches ----

constexpr int kMostDevices = 64;

int current_device() {
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

template <typename T, typename Tile>
void launch(const ConvParams& p, cudaStream_t stream) {
  static std::array<std::atomic<bool>, kMostDevices> prepared{};  // for more shared memory than 48 KiB, device by device
  const int device = current_device();
  if (device >= kMostDevices || !prepared[device].load(std::memory_order_relaxed)) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(
        conv_kernel<T, Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes));
    if (device < kMostDevices) prepared[device].store(true, std::memory_order_relaxed);
  }
  const auto vector = [](const void* pointer) { return static_cast<const float*>(pointer); };
  const NormParams& n = p.norm;
  const Arguments<T> arguments{
      p.geometry,
      static_cast<const T*>(p.x),
      static_cast<const T*>(p.weight),
      vector(p.conv_bias),
      {vector(n.mean), vector(n.var), vector(n.weight), vector(n.bias), static_cast<float>(n.eps)},
      static_cast<const T*>(p.residual),
      static_cast<T*>(p.y),
      p.relu};
  const dim3 grid(Tile::blocks(p.geometry));
  conv_kernel<T, Tile><<<grid, Tile::kBlock, Tile::kSharedBytes, stream>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch_tiled(const ConvParams& p, cudaStream_t stream) {
  if (prefers_narrow(p.geometry)) {
    launch<T, NarrowTiling>(p, stream);
  } else {
    launch<T, WideTiling>(p, stream);
  }
}

}  // namespace

bool has_conv_kernel() {
  static std::array<std::atomic<int>, kMostDevices> known{};  // 0: not asked yet, 1: yes, 2: no
  const int device = current_device();
  const int before = device < kMostDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (before != 0) return before == 1;
  // What sm_75's code, or its PTX compiled for a newer device, has instead of this kernel is empty.
  cudaFuncAttributes attributes{};
  const bool has = cudaFuncGetAttributes(&attributes, conv_kernel<__half, NarrowTiling>) == cudaSuccess &&
                   attributes.ptxVersion >= 80 && attributes.binaryVersion >= 80;
  if (!has) static_cast<void>(cudaGetLastError());
  if (device < kMostDevices) known[device].store(has ? 1 : 2, std::memory_order_relaxed);
  return has;
}

void launch_conv(const ConvParams& p, cudaStream_t stream) {
  if (p.dtype == DType::float16) {
    launch_tiled<__half>(p, stream);
  } else {
    launch_tiled<__nv_bfloat16>(p, stream);
  }
}

}  // namespace resnet_fast::cuda
