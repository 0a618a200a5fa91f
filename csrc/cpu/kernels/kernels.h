// Every kernel of one instruction set, instantiated in stats.cpp, apply.cpp, centre.cpp, backward.cpp and max_pool.cpp for the
// four dtypes.
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

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
