#include "program.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "../activation_pool.h"
#include "../integers.h"
#include "../shared_items.h"
#include "steps.h"

namespace resnet_fast::cpu {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

Program::Program(int64_t planes, int64_t capacity, int64_t threads, bool tiles)
    : planes_(static_cast<int>(planes)), capacity_(capacity), threads_(threads), tiles_(tiles) {
  TORCH_CHECK(!tiles || amx::usable(), "this CPU, or its system, has no AMX with bfloat16");
  TORCH_CHECK(tiles || amx::dots_usable(), "this CPU has no bfloat16 in AVX-512");
  TORCH_CHECK_VALUE(planes == 1 || (planes == 3 && tiles), "planes must be 1, or 3 with tiles, not ", planes);
  TORCH_CHECK_VALUE(capacity > 0 && threads > 0, "capacity and threads must be positive");
}

Program::~Program() = default;

int64_t Program::buffer(
    int64_t channels, int64_t height, int64_t width, int64_t halo, int64_t group, bool own, int64_t vector) {
  auto b = std::make_unique<Buffer>();
  *b = {channels, height, width, halo, group, vector, own, 0, 0, 0, 0, 0, 0, {}, Place::kStorage};
  const int64_t blocks = (channels + vector - 1) / vector;
  // Tiles of 16 images are one behind another by pixels, so that what a 1x1 reads and writes is in few pages, an odd
  // number of them, so that a block's pixels spread over the first cache level; else by blocks, so that a tile of 16
  // pixels has no gaps.
  const bool by_pixel = tiles_ && group > 1;
  b->pixel = vector * group * (by_pixel ? blocks * planes_ | 1 : 1);
  b->row = (width + halo) * b->pixel;  // a row's right halo is the next one's left
  const int64_t image = (height + 2 * halo) * b->row + halo * b->pixel;
  b->plane = by_pixel ? vector * group : image;
  b->block = planes_ * b->plane;
  b->unit = by_pixel ? image : blocks * b->block;
  b->origin = halo * (b->row + b->pixel);
  const int64_t units = own ? threads_ : (capacity_ + group - 1) / group;
  // Tiles read on behind the last pixel, and write nothing of what they make of it.
  const int64_t slack = 2 * (amx::kTileRows + halo) * b->pixel + 2 * halo * b->row;
  const PoolGuard pool;
  b->storage = at::zeros({units * b->unit + slack}, at::kBFloat16);
  buffers_.push_back(std::move(b));
  return static_cast<int64_t>(buffers_.size()) - 1;
}

int64_t Program::tensor(Place place, int64_t channels, int64_t height, int64_t width) {
  auto b = std::make_unique<Buffer>();
  const int64_t row = width * channels;
  *b = {channels, height, width, 0, 1, amx::kVector, false, channels, row, 0, amx::kVector, height * row, 0, {}, place};
  buffers_.push_back(std::move(b));
  return static_cast<int64_t>(buffers_.size()) - 1;
}

const Buffer& Program::at(int64_t buffer) const {
  TORCH_CHECK_INDEX(buffer >= 0 && buffer < static_cast<int64_t>(buffers_.size()), "no buffer ", buffer);
  return *buffers_[buffer];
}

void Program::section(bool by_image) { sections_.push_back({by_image, {}}); }

void Program::add(std::unique_ptr<Step> step) {
  if (sections_.empty()) section(false);
  sections_.back().steps.push_back(std::move(step));
}

bool Program::add_or_join(std::unique_ptr<Step> step) {
  // Where threads share an image, each would read all weights of both.
  const bool may_join = sharing() == 1 && !sections_.empty() && !sections_.back().steps.empty();
  if (may_join && sections_.back().steps.back()->join(step)) return true;
  add(std::move(step));
  return false;
}

void Program::read(int64_t y) { add(make_read(planes_, at(y))); }

bool Program::conv(
    const std::string& name, int64_t x, int64_t y, int64_t residual, const at::Tensor& weight, const at::Tensor& bias,
    const std::vector<std::vector<int64_t>>& taps, int64_t stride, int64_t blocks, int64_t outputs_per_group,
    bool relu) {
  const ConvShape shape{stride, blocks, outputs_per_group, relu};
  auto step = make_conv(planes_, tiles_, sharing(), name, at(x), at(y), residual < 0 ? nullptr : &at(residual),
                        {0, false, weight, {}, bias}, taps, shape);
  return add_or_join(std::move(step));
}

void Program::winograd(
    const std::string& name, int64_t x, int64_t y, int64_t residual, const at::Tensor& weight, const at::Tensor& bias,
    bool relu) {
  add(make_winograd(threads_, sharing(), name, at(x), at(y), residual < 0 ? nullptr : &at(residual),
                    {0, false, weight, {}, bias, true}, relu));
}

void Program::skip(int64_t x, int64_t y, int64_t stride) { add(make_skip(planes_, at(x), at(y), stride)); }

void Program::conv_max_pool(
    const std::string& name, int64_t x, int64_t y, const at::Tensor& weight, const at::Tensor& bias,
    const std::vector<std::vector<int64_t>>& taps, int64_t columns, int64_t stride, int64_t height, int64_t width) {
  const Packed packed{0, false, weight, {}, bias};
  add(make_conv_pool(planes_, tiles_, name, at(x), at(band(y, width)), at(y), height, packed, taps, columns, stride));
}

int64_t Program::band(int64_t y, int64_t width) {
  const Buffer& pooled = at(y);
  const int64_t height = band_height(planes_, pooled.channels, width, pooled.height, sharing());
  return buffer(pooled.channels, height, width, 1, 1, true, amx::kVector);
}

int64_t Program::sharing() const { return !sections_.empty() && sections_.back().by_image ? 1 : threads_; }

void Program::average_pool(int64_t x, int64_t y) { add(make_average_pool(planes_, at(x), at(y))); }

void Program::write(int64_t x) { add(make_write(planes_, at(x))); }

std::vector<int64_t> Program::run(const at::Tensor& x, const at::Tensor& y) { return run_all(x, y, nullptr, nullptr); }

void Program::run_live(const at::Tensor& x, const at::Tensor& y, Live* live) {
  if (!run_all(x, y, live, nullptr).empty()) live->finite = false;
}

std::vector<StepTime> Program::timed_run(const at::Tensor& x, const at::Tensor& y) {
  std::vector<StepTime> times;
  for (const Section& section : sections_) {
    for (const auto& step : section.steps) times.push_back({step->name, 0.0});
  }
  std::vector<double> seconds(times.size() * threads_, 0.0);
  run_all(x, y, nullptr, &seconds);
  const int64_t threads = std::min<int64_t>(threads_, at::get_num_threads());
  for (size_t i = 0; i < seconds.size(); ++i) times[i % times.size()].seconds += seconds[i] / threads;
  return times;
}

std::vector<int64_t> Program::run_all(
    const at::Tensor& x, const at::Tensor& y, Live* live, std::vector<double>* seconds) {
  const std::lock_guard<std::mutex> lock(turn_);
  const int64_t threads = std::min<int64_t>(threads_, at::get_num_threads());
  std::vector<std::atomic<bool>> infinite(x.size(0));
  for (auto& image : infinite) image = false;
  for (int64_t first = 0; first < x.size(0); first += capacity_) {
    run_chunk(x, y, live, first, std::min(capacity_, x.size(0) - first), threads, infinite.data() + first, seconds);
  }
  std::vector<int64_t> found;
  for (size_t image = 0; image < infinite.size(); ++image) {
    if (infinite[image]) found.push_back(static_cast<int64_t>(image));
  }
  return found;
}

void Program::run_chunk(
    const at::Tensor& x, const at::Tensor& y, Live* live, int64_t first, int64_t images, int64_t threads,
    std::atomic<bool>* infinite, std::vector<double>* seconds) {
  int64_t steps = 0;
  for (const Section& section : sections_) steps += static_cast<int64_t>(section.steps.size());
  std::vector<SharedItems> shared;  // of every step, or of a section by image
  for (const Section& section : sections_) {
    if (section.by_image) {
      shared.emplace_back(images, threads);
    } else {
      for (const auto& step : section.steps) shared.emplace_back(div_up(images, step->group) * step->items, threads);
    }
  }

#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t thread = omp_get_thread_num();
    alignas(64) float scratch[amx::kScratchFloats];
    if (tiles_) amx::configure_tiles();
    int64_t number = 0;
    auto next = shared.begin();
    const auto timed = [&](int64_t step, const auto& work) {
      if (seconds == nullptr) return work();
      const auto start = Clock::now();
      work();
      (*seconds)[thread * steps + step] += seconds_since(start);
    };
    for (const Section& section : sections_) {
      if (section.by_image) {
        (next++)->take(thread, [&](int64_t image) {
          const Run run{x, y, first, images, thread, image, scratch, live, tiles_, infinite};
          int64_t step_number = number;
          for (const auto& step : section.steps) {
            timed(step_number++, [&] {
              for (int64_t item = 0; item < step->items; ++item) step->run(run, item);
            });
          }
        });
        number += static_cast<int64_t>(section.steps.size());
#pragma omp barrier
        continue;
      }
      for (const auto& step : section.steps) {
        timed(number++, [&] {
          (next++)->take(thread, [&](int64_t item) {
            const Run run{x, y, first, images, thread, item / step->items, scratch, live, tiles_, infinite};
            step->run(run, item % step->items);
          });
#pragma omp barrier
        });
      }
    }
    if (tiles_) amx::release_tiles();
  }
}

}  // namespace resnet_fast::cpu
