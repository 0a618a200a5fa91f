// Inference of residual blocks and of a stem by AMX's tiles or dot products, in one call each. Nothing is kept from one
// call to the next but buffers: weights are packed, and batch norms folded into scale and bias, by every call for itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../residual_block.h"
#include "../unit.h"

namespace resnet_fast::cpu {

// One behind another; only a single one may have a residual. nullopt where they are left to other code: types, layout or
// shapes do not fit, or they have run but y has values that are not finite, of which this arithmetic may make others than
// PyTorch's.
std::optional<at::Tensor> amx_residual_blocks(const at::Tensor& x, at::ArrayRef<ResidualBlock> blocks, Unit unit);

// max_pool2d(relu(batch_norm(conv2d(x))), 3, stride 2, padding 1) in conv_weight's dtype; nullopt as above.
std::optional<at::Tensor> amx_stem(const at::Tensor& x, const BlockLayer& layer, Unit unit);

}  // namespace resnet_fast::cpu
