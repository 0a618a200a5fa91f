// Every convolution of one instruction set, in float32: Winograd's and the direct ones.
#pragma once

#include "../conv_kernels.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

void winograd_input(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end);
void winograd_product(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end);
bool winograd_output(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end);
void winograd_pack(const WinogradWeight& weight, int64_t begin, int64_t end);
void winograd_gradient_input(const WinogradGradient& conv, const WinogradSlab& slab, int64_t begin, int64_t end);
void winograd_gradient_product(const WinogradGradient& conv, const WinogradSlab& slab, int64_t begin, int64_t end);
bool winograd_gradient_output(const WinogradGradient& conv, int64_t begin, int64_t end);
void direct_conv(const DirectConv& conv, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last);
void direct_conv_copied(
    const DirectConv& conv, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last, float* copies);
void direct_conv_image(
    const DirectConv& conv, const float* packed, int64_t image, int64_t first, int64_t last, int64_t pixel, float* rows);
void direct_pack(const DirectWeight& weight, int64_t begin, int64_t end);

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
