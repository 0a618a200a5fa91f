// A weight as autocast casts it.
#pragma once

#include <ATen/core/Tensor.h>

namespace resnet_fast {

// weight in dtype, differentiable. Autocast keeps the cast of a leaf that learns until its outermost context ends, and
// this is that one where there is one: PyTorch has no way to it but through an op that autocast knows.
at::Tensor autocast_cast(const at::Tensor& weight, at::ScalarType dtype);

}  // namespace resnet_fast
