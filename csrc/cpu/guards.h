// What every native op sets up around itself.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "activation_pool.h"

namespace resnet_fast::cpu {

// Below autograd (the op has its own formula) and autocast (dtypes were settled by the caller), with outputs and
// temporaries taken from the activation pool.
struct OpGuard {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};
  PoolGuard pooled;
};

}  // namespace resnet_fast::cpu
