// What every .cu file includes: CUDA's own headers, kernel launches that check their errors, and
// the barrier over a grid. Compiled by g++ with -DLMENGINE_HOST_EMULATION, the same names come from
// tests/cuda_host/emulation.h instead, and the kernels run on the CPU; no CUDA toolkit is needed
// for that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef LMENGINE_HOST_EMULATION
#include "cuda_host/emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Declares `unsigned char* name`: the block's dynamic shared memory, 1024-byte aligned, which the
// tensor memory accelerator's tiles need.
#define LMENGINE_SHARED_MEMORY(name)                                                \
  extern __shared__ __align__(1024) unsigned char lmengine_dynamic_shared_memory[]; \
  unsigned char* name = lmengine_dynamic_shared_memory

namespace lmengine::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here: do not let it surface again in somebody else's
                       // call
  throw std::runtime_error(std::string("lmengine: ") + what + ": " + cudaGetErrorString(error));
}

// The number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

// Bytes of shared memory that a block may ask for on the current device.
inline int shared_memory_per_block() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

template <class... Parameters>
inline void allow_shared_memory(void (*kernel)(Parameters...), size_t shared_bytes) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "the kernel's shared memory");
  }
}

// How many blocks of a kernel one multiprocessor holds at a time: the bound on a cooperative grid
// is this times multiprocessors().
template <class... Parameters>
inline int blocks_per_multiprocessor(void (*kernel)(Parameters...), int block_threads,
                                     size_t shared_bytes) {
  int count = 0;
  allow_shared_memory(kernel, shared_bytes);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, block_threads, shared_bytes),
        "occupancy");
  return count;
}

// Launches kernel(args...) and throws std::runtime_error where the launch is refused. The arguments
// are converted to the kernel's parameter types.
template <class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments),
                "the kernel takes another number of arguments");
  allow_shared_memory(kernel, shared_bytes);
  [&](Parameters... values) {
    void* pointers[] = {static_cast<void*>(&values)..., nullptr};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                           shared_bytes, stream),
          "kernel launch");
  }(static_cast<Parameters>(arguments)...);
}

// The same for a kernel that uses grid_barrier: all its blocks are resident at a time, or the
// launch is refused.
template <class... Parameters, class... Arguments>
inline void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments),
                "the kernel takes another number of arguments");
  allow_shared_memory(kernel, shared_bytes);
  [&](Parameters... values) {
    void* pointers[] = {static_cast<void*>(&values)..., nullptr};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                                      shared_bytes, stream),
          "cooperative kernel launch");
  }(static_cast<Parameters>(arguments)...);
}

inline void zero(void* memory, size_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync");
}

// Copies from the GPU and waits until it is done, and all that came before in the stream with it.
inline void copy_to_host(void* host, const void* device, size_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

// Copies from pageable memory, which may be changed after the return.
inline void copy_to_device(void* device, const void* host, size_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
}

// A load that may stand beside other blocks' atomics on the same word.
__device__ __forceinline__ unsigned load_relaxed(const unsigned* address) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// A load that sees what other blocks wrote before a __threadfence().
__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// To be called in every loop that waits for another block.
__device__ __forceinline__ void spin_pause() {}

}  // namespace lmengine::cuda
#endif

namespace lmengine::cuda {

// Waits until all blocks of a cooperative grid are here, and makes what they wrote to global memory
// before visible. `counter` is one zeroed word of global memory, `phase` a variable of each thread
// that starts at 0.
__device__ __forceinline__ void grid_barrier(unsigned* counter, unsigned& phase) {
  __syncthreads();
  phase += gridDim.x * gridDim.y * gridDim.z;
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (static_cast<int>(load_acquire(counter) - phase) < 0) spin_pause();
    __threadfence();
  }
  __syncthreads();
}

}  // namespace lmengine::cuda
