// Memory that every thread of a parallel region has to itself.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "kernels.h"

namespace resnet_fast::cpu {

// What every thread works in, without a fresh allocation a slab.
class Scratch {
 public:
  Scratch(int64_t elements, at::ScalarType dtype)
      : stride_((elements * static_cast<int64_t>(c10::elementSize(dtype)) + kLanePadding * 8) / 64 * 64),
        buffer_(at::empty({elements == 0 ? 0 : at::get_num_threads() * stride_}, at::kByte)) {}

  void* mine() const { return static_cast<char*>(buffer_.mutable_data_ptr()) + at::get_thread_num() * stride_; }

 private:
  int64_t stride_;
  at::Tensor buffer_;
};

}  // namespace resnet_fast::cpu
