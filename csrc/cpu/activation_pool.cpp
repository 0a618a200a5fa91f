#include "activation_pool.h"

#ifdef __linux__

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace resnet_fast::cpu {

namespace {

constexpr size_t kMinBytes = size_t{1} << 20;
constexpr size_t kBlock = size_t{2} << 20;  // a huge page; sizes and addresses are multiples of it

thread_local int pool_depth = 0;

void* map_block(size_t bytes) {
  const size_t mapped = bytes + kBlock;
  void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(start);
  const uintptr_t aligned = (address + kBlock - 1) / kBlock * kBlock;
  if (aligned > address) munmap(start, aligned - address);
  const uintptr_t end = address + mapped;
  if (end > aligned + bytes) munmap(reinterpret_cast<void*>(aligned + bytes), end - aligned - bytes);
  void* block = reinterpret_cast<void*>(aligned);
  madvise(block, bytes, MADV_HUGEPAGE);  // advice: without huge pages the block still saves the faults
  return block;
}

class Pool {
 public:
  // Null when the system has no memory left.
  void* take(size_t nbytes) {
    const size_t bytes = (nbytes + kBlock - 1) / kBlock * kBlock;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // Best fit, the most recently freed first; a quarter of waste at most.
      size_t best = free_.size();
      for (size_t i = free_.size(); i-- > 0;) {
        if (free_[i].bytes < bytes || free_[i].bytes > bytes + bytes / 4) continue;
        if (best == free_.size() || free_[i].bytes < free_[best].bytes) best = i;
        if (free_[best].bytes == bytes) break;
      }
      if (best < free_.size()) {
        const Block block = free_[best];
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
        stats_.cached_bytes -= static_cast<int64_t>(block.bytes);
        ++stats_.hits;
        hold(block);
        return block.address;
      }
    }
    void* address = map_block(bytes);
    if (address == nullptr) {
      empty_cache();
      address = map_block(bytes);
    }
    if (address == nullptr) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    ++stats_.misses;
    hold({address, bytes});
    return address;
  }

  // False when the address is not one of ours.
  bool give_back(void* address) {
    if (reinterpret_cast<uintptr_t>(address) % kBlock != 0) return false;
    std::vector<Block> evicted;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto held = held_.find(address);
      if (held == held_.end()) return false;
      const Block block{address, held->second};
      held_.erase(held);
      stats_.allocated_bytes -= static_cast<int64_t>(block.bytes);
      free_.push_back(block);
      stats_.cached_bytes += static_cast<int64_t>(block.bytes);
      // Past the limit the blocks unused for longest go: they are those of a shape no longer seen.
      size_t oldest = 0;
      while (stats_.cached_bytes > stats_.limit_bytes) {
        stats_.cached_bytes -= static_cast<int64_t>(free_[oldest].bytes);
        evicted.push_back(free_[oldest++]);
      }
      free_.erase(free_.begin(), free_.begin() + static_cast<std::ptrdiff_t>(oldest));
    }
    for (const Block& block : evicted) munmap(block.address, block.bytes);
    return true;
  }

  void empty_cache() {
    std::vector<Block> blocks;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks.swap(free_);
      stats_.cached_bytes = 0;
    }
    for (const Block& block : blocks) munmap(block.address, block.bytes);
  }

  PoolStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

  void set_limit(int64_t bytes) { stats_.limit_bytes = bytes; }
  void set_enabled() { stats_.enabled = true; }
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Block {
    void* address;
    size_t bytes;
  };

  void hold(const Block& block) {
    held_.emplace(block.address, block.bytes);
    stats_.allocated_bytes += static_cast<int64_t>(block.bytes);
    stats_.peak_bytes = std::max(stats_.peak_bytes, stats_.allocated_bytes + stats_.cached_bytes);
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // oldest first
  std::unordered_map<void*, size_t> held_;
  PoolStats stats_;
};

// Never destroyed: tensors may be freed after static destructors have run.
Pool& pool() {
  static Pool* const instance = new Pool();
  return *instance;
}

std::atomic<c10::Allocator*> previous{nullptr};

void delete_block(void* address) {
  if (address == nullptr) return;
  if (pool().give_back(address)) c10::profiledCPUMemoryReporter().Delete(address);
}

// Serves raw_deallocate for every pointer of this process: those handed out before the pool was there too.
void delete_any(void* address) {
  if (address == nullptr) return;
  if (pool().give_back(address)) {
    c10::profiledCPUMemoryReporter().Delete(address);
  } else {
    previous.load(std::memory_order_acquire)->raw_deallocate(address);
  }
}

class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    if (pool_depth > 0 && nbytes >= kMinBytes) {
      if (void* address = pool().take(nbytes)) {
        c10::profiledCPUMemoryReporter().New(address, nbytes);
        return {address, address, &delete_block, c10::Device(c10::DeviceType::CPU)};
      }
    }
    return previous.load(std::memory_order_acquire)->allocate(nbytes);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &delete_any; }

  bool is_simple_data_ptr(const c10::DataPtr& data) const override {
    return data.get_deleter() == &delete_block ? data.get() == data.get_context()
                                               : previous.load(std::memory_order_acquire)->is_simple_data_ptr(data);
  }

  void copy_data(void* dest, const void* src, std::size_t count) const override { default_copy_data(dest, src, count); }
};

int64_t cache_limit() {
  if (const char* limit = std::getenv("RESNET_FAST_POOL_LIMIT")) {
    char* end = nullptr;
    const long long bytes = std::strtoll(limit, &end, 10);
    if (end != limit && *end == '\0' && bytes >= 0) return bytes;
  }
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 4;
}

// Puts the pool in front of the current CPU allocator, on first use. False where it is switched off or where another
// allocator of higher priority stays in front (it may not forward to us, so the pool keeps out of its way).
bool install() {
  static const bool installed = [] {
    const char* setting = std::getenv("RESNET_FAST_POOL");
    if (setting != nullptr && std::strcmp(setting, "0") == 0) return false;
    c10::Allocator* current = c10::GetAllocator(c10::DeviceType::CPU);
    // Others must be able to free by raw pointer what they got from the allocator in front.
    if (current == nullptr || current->raw_deleter() == nullptr) return false;
    previous.store(current, std::memory_order_release);
    pool().set_limit(cache_limit());
    // A fork while another thread holds the lock would leave the child with a lock nobody releases.
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
    static auto* const allocator = new PoolAllocator();
    c10::SetAllocator(c10::DeviceType::CPU, allocator);
    if (c10::GetAllocator(c10::DeviceType::CPU) != allocator) return false;
    pool().set_enabled();
    return true;
  }();
  return installed;
}

}  // namespace

void pool_enter() {
  if (install()) ++pool_depth;
}

void pool_exit() {
  if (pool_depth > 0) --pool_depth;
}

void pool_empty_cache() { pool().empty_cache(); }

PoolStats pool_stats() {
  install();
  return pool().stats();
}

}  // namespace resnet_fast::cpu

#else  // no mmap with huge pages here: PyTorch's allocator serves everything

namespace resnet_fast::cpu {

void pool_enter() {}
void pool_exit() {}
void pool_empty_cache() {}
PoolStats pool_stats() { return {}; }

}  // namespace resnet_fast::cpu

#endif
