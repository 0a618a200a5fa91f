// Work that threads take piece by piece. Each begins with a part of its own, the same in every pass over a tensor, which is
// then still in its cache; and goes on with what is left of the others', whose cores may have other people's work to do
// too. Which thread computes a piece is left to chance: no bit may depend on it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "integers.h"

namespace resnet_fast::cpu {

// f(begin, end) for all of [0, items), `step` at a time. Every thread calls worker(take) once, and take() does the work.
template <typename F, typename Worker>
void share_items(int64_t items, int64_t step, const F& f, const Worker& worker) {
  const int64_t pieces = div_up(items, step), threads = std::min<int64_t>(pieces, at::get_num_threads());
  std::vector<std::atomic<int64_t>> next(threads);  // piece of each part
  for (int64_t part = 0; part < threads; ++part) next[part] = part * pieces / threads;
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    worker([&] {
      for (int64_t i = 0; i < threads; ++i) {
        const int64_t part = (own + i) % threads, end = (part + 1) * pieces / threads;
        for (int64_t piece; (piece = next[part]++) < end;) f(piece * step, std::min((piece + 1) * step, items));
      }
    });
  });
}

template <typename F>
void share_items(int64_t items, int64_t step, const F& f) {
  share_items(items, step, f, [](const auto& take) { take(); });
}

// Items a piece, of no less than `least`, if each thread is to take several.
inline int64_t piece_of(int64_t items, int64_t least) {
  constexpr int64_t kPieces = 8;
  return std::max(least, div_up(items, kPieces * at::get_num_threads()));
}

}  // namespace resnet_fast::cpu
