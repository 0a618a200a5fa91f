#include "conv_kernels.h"
#include "products.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

constexpr bool kCopies = products::kWide == 2;  // NOTES.md, "AVX2 alone"

}  // namespace

const ConvKernels& conv_table() {
  // constexpr: see kernels/table.cpp.
  static constexpr ConvKernels kernels = {
      &winograd_input,
      &winograd_product,
      &winograd_output,
      &winograd_pack,
      &winograd_gradient_input,
      &winograd_gradient_product,
      &winograd_gradient_output,
      &direct_conv,
      kCopies ? &direct_conv_copied : nullptr,
      &direct_conv_image,
      &direct_pack,
  };
  return kernels;
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
