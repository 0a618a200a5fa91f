// A 3x3 of bfloat16 and its gradients by Winograd's F(2x2, 3x3) in dot products, from tensor to tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace resnet_fast::cpu {

// As ../winograd_bfloat16.h has them, add undefined for none.
std::tuple<at::Tensor, bool> dots_winograd_conv(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& add, bool turned);
std::tuple<at::Tensor, bool> dots_winograd_weight_gradient(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight);

inline bool is_rows(const at::Tensor& t) {
  return t.scalar_type() == at::kBFloat16 && t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace resnet_fast::cpu
