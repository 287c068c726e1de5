// Kernels that test the emulation itself: right ones, and wrong ones that it has to catch.
#include "support/tensor_core.h"

namespace {

using lmengine::cuda::launch;
using lmengine::cuda::launch_cooperative;

// out (16, 8) = a (16, 16) b (16, 8), through shared memory, cp.async and ldmatrix.
template <class T>
__global__ void matrix_product(const T* a, const T* b, float* out) {
  LMENGINE_SHARED_MEMORY(shared);
  T* a_shared = reinterpret_cast<T*>(shared);  // (16, 16)
  T* b_shared = a_shared + 16 * 16;            // (16, 8)
  const int lane = threadIdx.x;
  lmengine::cp_async_16(a_shared + lane * 8, a + lane * 8);
  if (lane < 16) lmengine::cp_async_16(b_shared + lane * 8, b + lane * 8);
  lmengine::cp_async_commit();
  lmengine::cp_async_wait<0>();
  __syncthreads();
  uint32_t a_fragment[4], b_fragment[2];
  lmengine::ldmatrix_x4(a_fragment, a_shared + (lane % 16) * 16 + lane / 16 * 8);
  lmengine::ldmatrix_x2_trans(b_fragment, b_shared + (lane % 16) * 8);
  float d[4] = {};
  lmengine::mma_m16n8k16<T>(d, a_fragment, b_fragment);
  const int group = lane / 4, pair = 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + pair + i % 2] = d[i];
}

// out (4, 32): a warp's sum by shuffles, the prefix sum, the neighbour below, the ballot of odd
// values.
__global__ void shuffles(const int* in, int* out) {
  const int lane = threadIdx.x % 32, value = in[threadIdx.x];
  int sum = value;
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  int prefix = value;
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffff, prefix, step);
    if (lane >= step) prefix += before;
  }
  out[threadIdx.x] = sum;
  out[blockDim.x + threadIdx.x] = prefix;
  out[2 * blockDim.x + threadIdx.x] = __shfl_down_sync(0xffffffff, value, 1);
  out[3 * blockDim.x + threadIdx.x] = static_cast<int>(__ballot_sync(0xffffffff, value & 1));
}

// Two halves of a warp shuffle on their own.
__global__ void half_warps(const int* in, int* out) {
  int value = in[threadIdx.x];
  if (threadIdx.x < 16) {
    for (int step = 8; step; step /= 2) value += __shfl_xor_sync(0x0000ffff, value, step, 16);
  } else {
    value = __shfl_sync(0xffff0000, value, 16);
  }
  out[threadIdx.x] = value;
}

__global__ void histogram(const int* in, int* counts, float* total, int64_t length) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < length; i += gridDim.x * blockDim.x) {
    atomicAdd(counts + in[i], 1);
    atomicAdd(total, static_cast<float>(in[i]));
  }
}

// Each step adds the neighbouring block's value of the step before: the barrier keeps the steps
// apart.
__global__ void neighbour_sums(float* values, unsigned* counter, int steps) {
  unsigned phase = 0;
  const int next = (blockIdx.x + 1) % gridDim.x;
  for (int step = 0; step < steps; ++step) {
    const float* from = values + step % 2 * gridDim.x;
    float* to = values + (step + 1) % 2 * gridDim.x;
    if (threadIdx.x == 0) to[blockIdx.x] = from[blockIdx.x] + from[next];
    lmengine::cuda::grid_barrier(counter, phase);
  }
}

// Reverses a block's values through shared memory: with a barrier, without, with one that half of
// the threads skip, and with two different ones.
enum Fault {
  kNone,
  kNoBarrier,
  kSkippedBarrier,
  kOtherBarrier,
  kLongShared,
  kLongGlobal,
  kExitedLane
};

__global__ void reversal(const float* in, float* out, Fault fault) {
  LMENGINE_SHARED_MEMORY(shared);
  float* values = reinterpret_cast<float*>(shared);
  const unsigned i = threadIdx.x, last = blockDim.x - 1;
  values[fault == kLongShared ? i + 1 : i] = in[i];
  if (fault == kSkippedBarrier) {
    if (i >= blockDim.x / 2) return;
    __syncthreads();
  } else if (fault == kOtherBarrier && i < blockDim.x / 2) {
    __syncthreads();
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  if (fault == kExitedLane) {
    if (i % 32 == 31) return;
    values[i] += __shfl_down_sync(0xffffffff, values[i], 1);
  }
  out[fault == kLongGlobal ? i + 1 : i] = values[last - i];
}

// Reads what cp.async brings, before or after waiting for it.
__global__ void early_read(const float* in, float* out, bool wait) {
  LMENGINE_SHARED_MEMORY(shared);
  float* values = reinterpret_cast<float*>(shared) + threadIdx.x * 4;
  lmengine::cp_async_16(values, in + threadIdx.x * 4);
  lmengine::cp_async_commit();
  if (wait) {
    lmengine::cp_async_wait<0>();
  } else {
    lmengine::cp_async_wait<1>();
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = values[i];
}

// Every thread reads its neighbour's value in the warp through shared memory.
__global__ void warp_exchange(const float* in, float* out, bool synchronise) {
  LMENGINE_SHARED_MEMORY(shared);
  float* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = in[threadIdx.x];
  if (synchronise) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Blocks that write to the same places, with the same values even.
__global__ void same_places(float* out, bool atomic) {
  if (atomic) {
    atomicExch(out + threadIdx.x, 1.0f);
  } else {
    out[threadIdx.x] = 1.0f;
  }
}

__global__ void wide_load(const float* in, float* out, int64_t offset) {
  const float4 value = *reinterpret_cast<const float4*>(in + offset + threadIdx.x * 4);
  out[threadIdx.x] = value.x + value.y + value.z + value.w;
}

__global__ void lonely_wait(unsigned* counter) {
  while (lmengine::cuda::load_acquire(counter) == 0) lmengine::cuda::spin_pause();
}

}  // namespace

extern "C" {

void matrix_product_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out) {
  launch(matrix_product<__nv_bfloat16>, 1, 32, 768, nullptr, a, b, out);
}
void matrix_product_half(const __half* a, const __half* b, float* out) {
  launch(matrix_product<__half>, 1, 32, 768, nullptr, a, b, out);
}
void convert(const float* in, __nv_bfloat16* bfloat16, __half* half, float* from_half,
             int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    bfloat16[i] = __float2bfloat16(in[i]);
    half[i] = __float2half(in[i]);
    from_half[i] = __half2float(half[i]);
  }
}
void run_shuffles(const int* in, int* out, int64_t threads) {
  launch(shuffles, 1, static_cast<unsigned>(threads), 0, nullptr, in, out);
}
void run_half_warps(const int* in, int* out) { launch(half_warps, 1, 32, 0, nullptr, in, out); }
void run_histogram(const int* in, int* counts, float* total, int64_t length) {
  launch(histogram, 3, 64, 0, nullptr, in, counts, total, length);
}
void run_neighbour_sums(float* values, unsigned* counter, int64_t steps) {
  launch_cooperative(neighbour_sums, lmengine::cuda::multiprocessors(), 64, 0, nullptr, values,
                     counter, steps);
}
void run_reversal(const float* in, float* out, int64_t threads, int64_t fault) {
  launch(reversal, 1, static_cast<unsigned>(threads), threads * sizeof(float), nullptr, in, out,
         static_cast<Fault>(fault));
}
void run_early_read(const float* in, float* out, int64_t wait) {
  launch(early_read, 1, 32, 512, nullptr, in, out, wait != 0);
}
void run_warp_exchange(const float* in, float* out, int64_t synchronise) {
  launch(warp_exchange, 1, 32, 128, nullptr, in, out, synchronise != 0);
}
void run_same_places(float* out, int64_t atomic) {
  launch(same_places, 2, 32, 0, nullptr, out, atomic != 0);
}
void run_wide_load(const float* in, float* out, int64_t offset) {
  launch(wide_load, 1, 32, 0, nullptr, in, out, offset);
}
void run_shared(float* out, int64_t bytes) {
  launch(same_places, 1, 32, static_cast<size_t>(bytes), nullptr, out, false);
}
void run_lonely_wait(unsigned* counter) { launch(lonely_wait, 2, 32, 0, nullptr, counter); }

}  // extern "C"
