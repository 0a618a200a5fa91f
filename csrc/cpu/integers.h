// Division of sizes, rounded up.
#pragma once

#include <cstdint>

namespace resnet_fast::cpu {

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

}  // namespace resnet_fast::cpu
