// Every kernel of one instruction set, instantiated in stats.cpp, apply.cpp, centre.cpp, backward.cpp and max_pool.cpp for the
// four dtypes, and the convolutions in float32: Winograd's and the direct one.
#pragma once

#include "../kernels.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

template <typename scalar_t>
void stats(const Plan& plan, const StatsArgs& args, int64_t begin, int64_t end);
template <typename scalar_t>
void apply(const Plan& plan, const ApplyArgs& args, int64_t begin, int64_t end);
template <typename scalar_t>
void centre(const Plan& plan, const CentreArgs& args, int64_t begin, int64_t end);
template <typename scalar_t>
void backward_reduce(const Plan& plan, const BackwardArgs& args, int64_t begin, int64_t end);
template <typename scalar_t>
void backward_apply_train(const Plan& plan, const BackwardArgs& args, int64_t begin, int64_t end);
template <typename scalar_t>
void backward_apply_eval(const Plan& plan, const BackwardArgs& args, int64_t begin, int64_t end);
template <typename scalar_t>
void max_pool(const MaxPoolArgs& args, int64_t begin, int64_t end);
template <typename scalar_t>
void max_unpool(const MaxPoolArgs& args, int64_t begin, int64_t end);

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
