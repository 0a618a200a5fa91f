// From a kernel's params to its launches: types, accesses, grids. The Launcher does the rest, a GPU (bn_act.cu) or the
// tests' loops over blocks and threads. It has
//     map<V>(op, matrix, grid, block)   reduce<V>(op, matrix, grid, block, partials)   merge(partials, chunks, channels, finish)
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <initializer_list>
#include <type_traits>

#include "bn_params.h"
#include "bn_threads.h"

namespace resnet_fast::cuda {

template <typename T_, typename Acc_>
struct Types {
  using T = T_;
  using Acc = Acc_;
};

template <typename F>
void with_types(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(Types<float, float>{});
    case DType::float64:
      return f(Types<double, double>{});
    case DType::bfloat16:
      return f(Types<c10::BFloat16, float>{});
    case DType::float16:
      return f(Types<c10::Half, float>{});
  }
}

inline bool all_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  });
}

template <int V, typename Launcher, typename Op>
void start_map(const Launcher& launcher, const Op& op, const Matrix& m) {
  if (m.rows == 0) return;
  const int64_t slots = slots_of(m, V);
  const Size3 block = block_shape(slots);
  launcher.template map<V>(op, m, map_grid(m, slots, block), block);
}

template <typename Launcher, typename Op>
void map(const Launcher& launcher, const Op& op, const Image& image, bool aligned) {
  constexpr int V = 16 / sizeof(typename Op::T);
  if (!aligned) return start_map<1>(launcher, op, split(image, 1).main);
  const Split parts = split(image, V);
  start_map<V>(launcher, op, parts.main);
  start_map<1>(launcher, op, parts.rest);
}

// Returns where the next partial results go.
template <int V, typename Launcher, typename Op, typename State>
State* start_reduce(const Launcher& launcher, const Op& op, const Matrix& m, State* partials) {
  if (m.rows == 0) return partials;
  const int64_t slots = slots_of(m, V);
  const Size3 block = block_shape(slots);
  const Size3 grid = reduce_grid(m, slots, block);
  launcher.template reduce<V>(op, m, grid, block, partials);
  return partials + chunks_of(m, grid) * m.channels;
}

template <typename Launcher, typename Op, typename Finish>
void reduce(
    const Launcher& launcher, const Op& op, const Finish& finish, const Image& image, bool aligned, void* buffer) {
  using State = typename Op::Running::State;
  constexpr int V = 16 / sizeof(typename Op::T);
  auto* partials = static_cast<State*>(buffer);
  State* end = partials;
  if (aligned) {
    const Split parts = split(image, V);
    end = start_reduce<V>(launcher, op, parts.main, end);
    end = start_reduce<1>(launcher, op, parts.rest, end);
  } else {
    end = start_reduce<1>(launcher, op, split(image, 1).main, end);
  }
  launcher.merge(partials, (end - partials) / image.channels, image.channels, finish);
}

inline int64_t partial_bytes_of(const Image& image, DType dtype) {
  const int64_t vector = dtype == DType::float64 ? 2 : dtype == DType::float32 ? 4 : 8;
  const int64_t chunks = std::max(reduce_chunks(image, vector), reduce_chunks(image, 1));
  const int64_t state = dtype == DType::float64 ? sizeof(Moments<double>) : sizeof(Moments<float>);
  return chunks * image.channels * state;
}

template <typename Acc>
Norm<Acc> norm_of(const NormParams& p) {
  return {static_cast<const Acc*>(p.mean), static_cast<const Acc*>(p.var), static_cast<const Acc*>(p.weight),
          static_cast<const Acc*>(p.bias), static_cast<Acc>(p.eps)};
}

template <typename T, typename Acc>
Gradient<T, Acc> gradient_of(const BackwardParams& p) {
  return {static_cast<const T*>(p.dy), static_cast<const T*>(p.x), static_cast<const T*>(p.y), norm_of<Acc>(p.norm),
          p.mask};
}

template <typename Launcher>
void run(const Launcher& launcher, const StatisticsParams& p) {
  with_types(p.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using Acc = typename decltype(types)::Acc;
    const Statistics<T, Acc> op{static_cast<const T*>(p.x)};
    const FinishStatistics<Acc> finish{static_cast<Acc*>(p.mean), static_cast<Acc*>(p.var)};
    reduce(launcher, op, finish, p.image, all_aligned({p.x}), p.partials);
  });
}

template <typename Launcher>
void run(const Launcher& launcher, const ApplyParams& p) {
  const bool aligned = all_aligned({p.x, p.residual, p.y});
  with_types(p.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using Acc = typename decltype(types)::Acc;
    const auto start = [&](auto join) {
      const Apply<T, Acc, join()> op{
          static_cast<const T*>(p.x), static_cast<const T*>(p.residual), static_cast<T*>(p.y),
          norm_of<Acc>(p.norm), norm_of<Acc>(p.residual_norm), p.relu};
      map(launcher, op, p.image, aligned);
    };
    if (p.join) {
      start(std::true_type{});
    } else {
      start(std::false_type{});
    }
  });
}

template <typename Launcher>
void run(const Launcher& launcher, const BackwardReduceParams& p) {
  const bool aligned = all_aligned({p.dy, p.x, p.y});
  with_types(p.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using Acc = typename decltype(types)::Acc;
    const BackwardReduce<T, Acc> op{gradient_of<T, Acc>(p)};
    const FinishBackward<Acc> finish{
        norm_of<Acc>(p.norm), static_cast<Acc*>(p.sum_dz), static_cast<Acc*>(p.sum_dzx), static_cast<Acc*>(p.dweight)};
    reduce(launcher, op, finish, p.image, aligned, p.partials);
  });
}

template <typename Launcher>
void run(const Launcher& launcher, const BackwardApplyParams& p) {
  const bool aligned = all_aligned({p.dy, p.x, p.y, p.dx, p.dz});
  with_types(p.dtype, [&](auto types) {
    using T = typename decltype(types)::T;
    using Acc = typename decltype(types)::Acc;
    const BackwardApply<T, Acc> op{
        gradient_of<T, Acc>(p), static_cast<const Acc*>(p.sum_dz), static_cast<const Acc*>(p.sum_dzx),
        static_cast<Acc>(p.inv_count), static_cast<T*>(p.dx), static_cast<T*>(p.dz)};
    map(launcher, op, p.image, aligned);
  });
}

}  // namespace resnet_fast::cuda
