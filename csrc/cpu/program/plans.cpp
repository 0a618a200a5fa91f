#include "plans.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <list>
#include <memory>
#include <mutex>

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kFull = 14;  // of a group's images: no fewer are worth one
constexpr size_t kKept = 32;   // idle programs

using Key = std::vector<int64_t>;

// Idle programs, the last used first. A caller takes one out, so that no two run the same.
class Plans {
 public:
  std::unique_ptr<Program> take(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(idle_.begin(), idle_.end(), [&](const Plan& plan) { return plan.key == key; });
    if (found == idle_.end()) return nullptr;
    std::unique_ptr<Program> program = std::move(found->program);
    idle_.erase(found);
    return program;
  }

  void put(const Key& key, std::unique_ptr<Program> program) {
    std::list<Plan> oldest;  // dies when the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_front({key, std::move(program)});
    if (idle_.size() > kKept) oldest.splice(oldest.begin(), idle_, std::prev(idle_.end()));
  }

 private:
  struct Plan {
    Key key;
    std::unique_ptr<Program> program;
  };
  std::mutex mutex_;
  std::list<Plan> idle_;
};

Plans& plans() {
  static Plans* const plans = new Plans;  // never destroyed: other threads may run until the process ends
  return *plans;
}

}  // namespace

void run_planned(
    const Key& key, int planes, Unit unit, const Build& build, const at::Tensor& x, const at::Tensor& y, Live& live) {
  const int64_t batch = x.size(0), rest = batch % kGroup, whole = rest >= kFull ? batch : batch - rest;
  const int64_t threads = at::get_num_threads();
  const at::Tensor residual = live.residual;
  for (int64_t first = 0; first < batch;) {
    const int64_t images = first < whole ? whole : batch - whole, capacity = images < kFull ? images : kGroup;
    Key own = key;
    own.insert(own.end(), {planes, unit == Unit::kTiles, capacity, threads, images <= capacity});
    std::unique_ptr<Program> program = plans().take(own);
    if (program == nullptr) {
      program = std::make_unique<Program>(planes, capacity, threads, unit == Unit::kTiles);
      build(*program, capacity, threads, images <= capacity);
    }
    if (residual.defined()) live.residual = residual.narrow(0, first, images);
    program->run_live(x.narrow(0, first, images), y.narrow(0, first, images), &live);
    plans().put(own, std::move(program));
    first += images;
  }
}

}  // namespace resnet_fast::cpu
