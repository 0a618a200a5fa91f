// In place of csrc/cpu/program/usable.cpp where the tiles are emulated: what the kernels need beside them.
#include <ATen/Version.h>

#include <string>

#include "cpu/amx/amx.h"

namespace resnet_fast::cpu::amx {

bool dots_usable() {
  static const bool answer =
      at::get_cpu_capability().rfind("AVX512", 0) == 0 && __builtin_cpu_supports("avx512bf16") != 0;
  return answer;
}

bool usable() { return dots_usable(); }

const char* name() { return "emulated AMX, for tests"; }

}  // namespace resnet_fast::cpu::amx
