// Sizes and points of the Winograd transform, which the packed weights (winograd.cpp) and the kernels share.
#pragma once

#include <cstdint>

namespace resnet_fast::cpu {

constexpr int64_t kWinogradOut = 4, kWinogradIn = 6;  // of a tile's side
constexpr int64_t kWinogradElements = kWinogradIn * kWinogradIn;
// Of a tile of the weight's gradient, by columns; by rows the above.
constexpr int64_t kWinogradWideOut = 2, kWinogradWideIn = 4;
constexpr int64_t kWinogradGradientElements = kWinogradIn * kWinogradWideIn;
constexpr int64_t kWinogradBlock = 32;  // channels of a transformed tile that lie together
constexpr int64_t kWinogradPanel = 64;  // output channels of weights and products that lie together
constexpr int64_t kWinogradRows = 6;    // tiles that are multiplied at once
constexpr float kPointP = 0.625f, kPointQ = 1.5f;  // the others are 0, -P, -Q and infinity

}  // namespace resnet_fast::cpu
