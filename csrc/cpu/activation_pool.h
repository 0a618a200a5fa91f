// A cache of large CPU blocks, so that activations do not fault in fresh pages on every step.
//
// glibc returns blocks of this size to the system when they are freed, and the next activation pays for its pages
// again: about 15 ms for 25 MB, more than the convolution that fills it. The pool is a c10 allocator in front of
// PyTorch's: on a thread that is inside a PoolGuard it serves requests of 1 MiB and more from a process-wide list of
// freed blocks (2 MiB-aligned, huge pages advised); everything else goes to the allocator that was there before.
#pragma once

#include <cstdint>

namespace resnet_fast::cpu {

struct PoolStats {
  bool enabled = false;  // Linux, and not RESNET_FAST_POOL=0
  int64_t limit_bytes = 0;      // most bytes kept cached: RESNET_FAST_POOL_LIMIT, or a quarter of the memory
  int64_t cached_bytes = 0;     // in free blocks
  int64_t allocated_bytes = 0;  // in blocks that tensors hold
  int64_t peak_bytes = 0;       // largest sum of the two so far
  int64_t hits = 0;             // requests served from the cache
  int64_t misses = 0;           // requests served by the system
};

// The pool serves this thread between enter and exit; calls nest.
void pool_enter();
void pool_exit();
void pool_empty_cache();
PoolStats pool_stats();

class PoolGuard {
 public:
  PoolGuard() { pool_enter(); }
  ~PoolGuard() { pool_exit(); }
  PoolGuard(const PoolGuard&) = delete;
  PoolGuard& operator=(const PoolGuard&) = delete;
};

}  // namespace resnet_fast::cpu
