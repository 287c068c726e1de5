// Working memory of the CPU kernels, kept from call to call: fresh memory costs a page fault for
// every 4 KB, and leaves the cache cold.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace lmengine {

// So many floats, 64-byte aligned, for as long as it lives. Each thread keeps one buffer of up to
// 16 MB for the next call; a larger or a second one at a time is allocated and freed.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    Kept& kept = of_this_thread();
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    borrowed_ = !kept.taken && bytes <= kLargestKept;
    if (!borrowed_) {
      memory_ = allocate(bytes);
      return;
    }
    if (kept.bytes < bytes) {
      std::free(kept.memory);
      kept.memory = nullptr;
      kept.bytes = 0;
      kept.memory = allocate(bytes);
      kept.bytes = bytes;
    }
    kept.taken = true;
    memory_ = kept.memory;
  }
  ~Scratch() {
    if (borrowed_) {
      of_this_thread().taken = false;
    } else {
      std::free(memory_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return static_cast<float*>(memory_); }

 private:
  static constexpr size_t kLargestKept = size_t{16} << 20;

  struct Kept {
    void* memory = nullptr;
    size_t bytes = 0;
    bool taken = false;
    ~Kept() { std::free(memory); }
  };

  static Kept& of_this_thread() {
    thread_local Kept kept;
    return kept;
  }
  static void* allocate(size_t bytes) {
    void* memory = std::aligned_alloc(64, bytes ? bytes : 64);
    if (!memory) throw std::bad_alloc();
    return memory;
  }

  void* memory_;
  bool borrowed_;
};

}  // namespace lmengine
