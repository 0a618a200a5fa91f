// Sizes that the direct convolution's host side and kernels share.
#pragma once

#include <cstdint>

namespace resnet_fast::cpu {

constexpr int64_t kDirectPanel = 64;   // outputs of a weight that lie together
constexpr int64_t kDirectRows = 6;     // pixels that are multiplied at once
constexpr int64_t kDirectTaps = 64;    // most of a kernel
constexpr int64_t kDirectFewChannels = 4;  // at most, of an image
constexpr int64_t kDirectCopied = 24;  // pixels that are copied, where they are,
constexpr int64_t kDirectChunk = 256;  // with so many of their terms together

}  // namespace resnet_fast::cpu
