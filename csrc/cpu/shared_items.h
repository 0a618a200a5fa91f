// Work that threads take item by item. Each begins with a part of its own, the same in every pass over a tensor, which is
// then still in its cache; and goes on with what is left of the others', whose cores may have other people's work to do
// too. Which thread computes an item is left to chance: no bit may depend on it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "integers.h"

namespace resnet_fast::cpu {

class SharedItems {
 public:
  SharedItems(int64_t items, int64_t threads) : items_(items), next_(threads) {
    for (size_t part = 0; part < next_.size(); ++part) next_[part] = begin(part);
  }

  // f(item), for the calling thread's part and for what it finds of others'.
  template <typename F>
  void take(size_t thread, const F& f) {
    for (size_t i = 0; i < next_.size(); ++i) {
      const size_t part = (thread + i) % next_.size();
      const int64_t end = begin(part + 1);
      for (int64_t item; (item = next_[part]++) < end;) f(item);
    }
  }

 private:
  int64_t begin(size_t part) const { return static_cast<int64_t>(part) * items_ / static_cast<int64_t>(next_.size()); }

  int64_t items_;
  std::vector<std::atomic<int64_t>> next_;  // of each thread's part
};

// Every thread calls worker(take) once, and take(f) there is SharedItems'.
template <typename Worker>
void share_items(int64_t items, const Worker& worker) {
  const int64_t threads = std::min<int64_t>(items, at::get_num_threads());
  SharedItems shared(items, threads);
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    worker([&](const auto& f) { shared.take(thread, f); });
  });
}

// f(begin, end) for all of [0, items), `step` at a time.
template <typename F>
void share_pieces(int64_t items, int64_t step, const F& f) {
  share_items(div_up(items, step), [&](const auto& take) {
    take([&](int64_t piece) { f(piece * step, std::min((piece + 1) * step, items)); });
  });
}

// Items a piece, of no less than `least`, if each thread is to take several.
inline int64_t piece_of(int64_t items, int64_t least) {
  constexpr int64_t kPieces = 8;
  return std::max(least, div_up(items, kPieces * at::get_num_threads()));
}

}  // namespace resnet_fast::cpu
