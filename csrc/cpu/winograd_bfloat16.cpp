#include "winograd_bfloat16.h"

#include "guards.h"
#include "unit.h"
#ifdef WITH_AMX
#include "program/winograd_conv.h"
#endif

namespace resnet_fast::cpu {

std::tuple<Tensor, bool> winograd_dots_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& add, bool turned) {
  const OpGuard guard;
  unit_named("dots");  // raises where there are none
#ifdef WITH_AMX
  return dots_winograd_conv(x, weight, add.value_or(Tensor()), turned);
#else
  return {};
#endif
}

std::tuple<Tensor, bool> winograd_dots_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  const OpGuard guard;
  unit_named("dots");
#ifdef WITH_AMX
  return dots_winograd_weight_gradient(dy, x, weight);
#else
  return {};
#endif
}

}  // namespace resnet_fast::cpu
