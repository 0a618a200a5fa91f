#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "kernels.h"

#define RF_STRINGIFY_(x) #x
#define RF_STRINGIFY(x) RF_STRINGIFY_(x)
#define RF_ALL_DTYPES(kernel) {&kernel<float>, &kernel<double>, &kernel<c10::BFloat16>, &kernel<c10::Half>}

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

const Kernels& table() {
  // constexpr: filled in by the linker, so that no code of this instruction set runs before it is chosen.
  static constexpr Kernels kernels = {
      RF_STRINGIFY(CPU_CAPABILITY),
      RF_ALL_DTYPES(stats),
      RF_ALL_DTYPES(apply),
      RF_ALL_DTYPES(centre),
      RF_ALL_DTYPES(backward_reduce),
      RF_ALL_DTYPES(backward_apply_train),
      RF_ALL_DTYPES(backward_apply_eval),
      RF_ALL_DTYPES(max_pool),
      RF_ALL_DTYPES(max_unpool),
  };
  return kernels;
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
