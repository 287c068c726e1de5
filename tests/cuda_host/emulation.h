// CUDA on the CPU, for tests: the threads of a block are fibers that run one at a time and change
// over where they synchronise. csrc/support/cuda.h includes this file when g++ compiles a .cu
// source with -DLMENGINE_HOST_EMULATION.
//
// What is stricter than a GPU: shared memory is as long as was asked for and starts as NaN; a
// barrier or a warp instruction that not all its threads reach ends the program with a report; a
// destination of cp_async reads as NaN until cp_async_wait. What is not seen: memory order between
// blocks, and the speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda_host/emulation_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using cudaStream_t = struct lmengine_emulated_stream*;

// Set for the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace lmengine::emulation {

using Location = std::source_location;

// Reports on stderr what is wrong, where and in which thread, and ends the program.
[[noreturn]] void fail(const std::string& message, const Location* where = nullptr);

// All threads of the block wait for each other here.
void sync_threads(const Location& where);

// Waits for the other lanes of `mask` to arrive with the same instruction; the last to arrive calls
// complete(arguments), where arguments[lane] is what each lane passed (null for lanes not in the
// mask).
using Complete = void (*)(void* const* arguments);
void warp_instruction(const char* name, unsigned mask, void* argument, Complete complete,
                      const Location& where);

// Orders what this thread wrote before what other threads do after their own fence.
void thread_fence();

// Lets all other threads run before this one goes on: for loops that wait for another block.
void spin();

// Tells ThreadSanitizer that what was done before release(x) comes before what is done after
// acquire(x).
void release(void* order);
void acquire(void* order);

// Of the block of the running thread; its number in the block.
unsigned char* shared_memory();
int thread_index();

// Bytes of shared memory that a block may have: of sm_80, or of sm_90 where a library holds kernels
// for it.
inline size_t shared_memory_limit = 163 * 1024;

// What emulation_sm90.cpp has to know: a block begins; no thread can go on, so that something under
// way has to arrive (false if nothing is); all threads of the resident blocks have returned.
inline void (*on_block_start)(unsigned char* shared, size_t bytes, int threads) = nullptr;
inline bool (*on_idle)() = nullptr;
inline void (*on_blocks_end)() = nullptr;

void check_shared(const void* address, size_t bytes, const char* name, const Location& where);

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative,
              const std::function<void()>& thread);

inline int lane() {
  return static_cast<int>(((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) %
                          32);
}

// Copies under way of the running thread.
void copy_later(void* shared, const unsigned char (&bytes)[16]);
void close_group();
void wait_groups(int pending);

}  // namespace lmengine::emulation

#define LMENGINE_SHARED_MEMORY(name) unsigned char* name = ::lmengine::emulation::shared_memory()

#include "cuda_host/emulation_builtins.h"
#include "cuda_host/emulation_tensor_core.h"

namespace lmengine::cuda {

inline int multiprocessors() { return 4; }

inline int shared_memory_per_block() { return static_cast<int>(emulation::shared_memory_limit); }

template <class... Parameters>
inline int blocks_per_multiprocessor(void (*)(Parameters...), int, size_t) {
  return 1;
}

template <class... Parameters, class... Arguments>
inline void run(bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                size_t shared_bytes, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments),
                "the kernel takes another number of arguments");
  static_assert((0 + ... + sizeof(Parameters)) <= 4096,
                "CUDA passes at most 4096 bytes of kernel arguments");
  [&](Parameters... values) {
    emulation::run_grid(grid, block, shared_bytes, cooperative, [&] { kernel(values...); });
  }(static_cast<Parameters>(arguments)...);
}

template <class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Arguments&&... arguments) {
  run(false, kernel, grid, block, shared_bytes, arguments...);
}

template <class... Parameters, class... Arguments>
inline void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  run(true, kernel, grid, block, shared_bytes, arguments...);
}

inline void zero(void* memory, size_t bytes, cudaStream_t) { std::memset(memory, 0, bytes); }

inline void copy_to_host(void* host, const void* device, size_t bytes, cudaStream_t) {
  std::memcpy(host, device, bytes);
}
inline void copy_to_device(void* device, const void* host, size_t bytes, cudaStream_t) {
  std::memcpy(device, host, bytes);
}

inline unsigned load_relaxed(const unsigned* address) {
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}

inline unsigned load_acquire(const unsigned* address) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

inline void spin_pause() { emulation::spin(); }

}  // namespace lmengine::cuda
