// Sizes that the direct convolution's host side and kernels share.
#pragma once

#include <cstdint>

namespace resnet_fast::cpu {

constexpr int64_t kDirectPanel = 64;  // outputs of a weight that lie together
constexpr int64_t kDirectRows = 6;    // pixels that are multiplied at once
constexpr int64_t kDirectTaps = 64;   // most of a kernel

}  // namespace resnet_fast::cpu
