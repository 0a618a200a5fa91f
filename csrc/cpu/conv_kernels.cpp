#include "conv_kernels.h"

#include <c10/util/Exception.h>

#include <string>

namespace resnet_fast::cpu {

namespace {

const ConvKernels* find() {
  const std::string isa = kernels().name;
#ifdef WITH_AVX512
  if (isa == "AVX512") return &AVX512::conv_table();
#endif
#ifdef WITH_AVX2
  if (isa == "AVX2") return &AVX2::conv_table();
#endif
  return nullptr;
}

}  // namespace

bool has_vectors() { return find() != nullptr; }

const ConvKernels& conv_kernels() {
  static const ConvKernels* const chosen = find();
  TORCH_CHECK(
      chosen != nullptr,
      "convolutions in float32: they need AVX2 or AVX-512, and PyTorch to use them (ATEN_CPU_CAPABILITY); the kernels in use "
      "are of ", kernels().name);
  return *chosen;
}

}  // namespace resnet_fast::cpu
