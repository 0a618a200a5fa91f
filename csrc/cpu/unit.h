// What multiplies in this extension's own convolutions (amx/amx.h), as resnet_fast/backends/native.py asks for it.
#pragma once

#include <c10/util/Exception.h>

#include <string_view>

#include "amx/amx.h"

namespace resnet_fast::cpu {

enum class Unit { kNone, kTiles, kDots };

// "tiles", "dots" or "", of an op's argument; raises where this CPU, or this build, has not got it.
inline Unit unit_named(std::string_view name) {
  if (name.empty()) return Unit::kNone;
  TORCH_CHECK_VALUE(name == "tiles" || name == "dots", "unit: expected tiles or dots, got ", name);
#ifdef WITH_AMX
  const bool tiles = name == "tiles";
  TORCH_CHECK(!tiles || amx::usable(), "this CPU, or its system, has no AMX with bfloat16");
  TORCH_CHECK(tiles || amx::dots_usable(), "this CPU has no bfloat16 in AVX-512");
  return tiles ? Unit::kTiles : Unit::kDots;
#else
  TORCH_CHECK(false, "built without AMX");
#endif
}

}  // namespace resnet_fast::cpu
