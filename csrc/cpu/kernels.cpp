#include "kernels.h"

#include <ATen/Version.h>

#include <algorithm>
#include <string>

#include "integers.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kVectorColumns = 32;     // widest vector step: 32 bf16 values of AVX-512
constexpr int64_t kRepeatBelow = 128;      // wider odd C loses too little to its last, partial vector
constexpr int64_t kItemElements = 65536;   // a block stays within the second-level cache
constexpr int64_t kMaxRows = 512;          // bounds the rounding of a block's float sums
constexpr int64_t kGrainElements = 32768;  // as at::internal::GRAIN_SIZE

int64_t vector_repeat(int64_t channels) {
  int64_t repeat = 1;
  while (channels < kRepeatBelow && (channels * repeat) % kVectorColumns != 0) repeat *= 2;
  return repeat;
}

}  // namespace

Plan make_plan(int64_t batch, int64_t channels, int64_t plane, bool rows_layout) {
  Plan p;
  p.rows_layout = rows_layout;
  p.channels = channels;
  p.batch = batch;
  p.plane = plane;
  int64_t item_elements = 0;
  if (rows_layout) {
    const int64_t pixels = batch * plane;
    p.repeat = vector_repeat(channels);
    if (pixels < 4 * p.repeat) p.repeat = 1;
    p.rows = pixels / p.repeat;
    p.cols = channels * p.repeat;
    p.tail_rows = pixels % p.repeat;
    p.col_block = std::min(p.cols, kMaxColBlock);
    p.row_block = std::clamp(kItemElements / p.col_block, int64_t{64}, kMaxRows);
    p.row_blocks = div_up(p.rows, p.row_block);
    p.col_blocks = div_up(p.cols, p.col_block);
    p.chunks = p.row_blocks + (p.tail_rows > 0 ? 1 : 0);
    p.items = p.row_blocks * p.col_blocks + (p.tail_rows > 0 ? 1 : 0);
    p.width = p.cols;
    item_elements = std::min(p.row_block, p.rows) * p.col_block;
  } else {
    p.plane_block = std::min(plane, kItemElements / 2);
    p.batch_block = std::clamp(kItemElements / 4 / plane, int64_t{1}, batch);
    p.plane_blocks = div_up(plane, p.plane_block);
    p.batch_blocks = div_up(batch, p.batch_block);
    p.chunks = p.batch_blocks * p.plane_blocks;
    p.items = p.chunks * channels;
    p.width = channels;
    item_elements = p.batch_block * p.plane_block;
  }
  p.grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, item_elements));
  return p;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
    (void)capability;
#ifdef WITH_AVX512
    if (capability.rfind("AVX512", 0) == 0) return AVX512::table();
#endif
#ifdef WITH_AVX2
    if (capability.rfind("AVX2", 0) == 0 || capability.rfind("AVX512", 0) == 0) return AVX2::table();
#endif
    return DEFAULT::table();
  }();
  return chosen;
}

}  // namespace resnet_fast::cpu
