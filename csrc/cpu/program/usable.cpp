#include "../amx/amx.h"

#include <ATen/Version.h>

#include <string>

#if defined(WITH_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resnet_fast::cpu::amx {

namespace {

#if defined(WITH_AMX) && defined(__linux__)
bool has(unsigned leaf, unsigned subleaf, unsigned reg, unsigned bit) {
  unsigned values[4];
  if (!__get_cpuid_count(leaf, subleaf, &values[0], &values[1], &values[2], &values[3])) return false;
  return (values[reg] >> bit) & 1;
}

// Linux saves a process's tiles only once it has asked for it (Documentation/arch/x86/xstate.rst).
bool system_permits() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool find_dots() {
  constexpr unsigned kEax = 0;
  return has(7, 1, kEax, 5) && at::get_cpu_capability().rfind("AVX512", 0) == 0;
}

bool find_tiles() {
  constexpr unsigned kEdx = 3;
  return find_dots() && has(7, 0, kEdx, 24) && has(7, 0, kEdx, 22) && system_permits();
}
#else
bool find_dots() { return false; }
bool find_tiles() { return false; }
#endif

}  // namespace

bool usable() {
  static const bool answer = find_tiles();
  return answer;
}

bool dots_usable() {
  static const bool answer = find_dots();
  return answer;
}

const char* name() { return "AMX"; }

}  // namespace resnet_fast::cpu::amx
