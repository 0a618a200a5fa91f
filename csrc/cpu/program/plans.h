// Programs for calls that bring their own weights: kept by what they were built for, with their buffers and no more.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "program.h"
#include "../unit.h"
#include "steps.h"

namespace resnet_fast::cpu {

constexpr int64_t kGroup = amx::kTileRows;  // images side by side in a tile

// Whether `unit` can multiply activations of this type.
inline bool computes(Unit unit, at::ScalarType dtype) {
  return unit != Unit::kNone && (dtype == at::kBFloat16 || (dtype == at::kFloat && unit == Unit::kTiles));
}

// Lays out a new program for so many images at a time, which are all or not, and at most so many threads.
using Build = std::function<void(Program& program, int64_t capacity, int64_t threads, bool all)>;

// y = program(x), by a program that nobody else runs meanwhile: one that was built for this key, or a new one.
void run_planned(
    const std::vector<int64_t>& key, int planes, Unit unit, const Build& build, const at::Tensor& x,
    const at::Tensor& y, Live& live);

}  // namespace resnet_fast::cpu
