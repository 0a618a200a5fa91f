// (x - mean) * scale + bias: the one expression that the forward stores and the backward recomputes for its ReLU mask.
#pragma once

#include "lanes.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> normalize(
    const Lanes<scalar_t>& x, const Lanes<scalar_t>& mean, const Lanes<scalar_t>& scale, const Lanes<scalar_t>& bias) {
  return fmadd(x - mean, scale, bias);
}

// The largest value that rounds to zero in scalar_t: half its smallest subnormal (ties go to even). With it the mask
// !(y <= limit) of an unrounded y equals the mask !(y <= 0) of the y that was stored.
template <typename scalar_t>
constexpr acc_type<scalar_t> rounds_to_zero() {
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) return 0x1p-134f;
  if constexpr (std::is_same_v<scalar_t, c10::Half>) return 0x1p-25f;
  return 0;
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
