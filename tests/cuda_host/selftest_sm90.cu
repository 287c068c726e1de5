// Kernels that test the emulation of sm_90's instructions: right ones, and wrong ones that it has
// to catch.
#include "support/sm90.h"

namespace {

using lmengine::TensorMap;
using lmengine::cuda::launch;

enum Fault {
  kNone,
  kNoWaitForTile,
  kNoWaitForProduct,
  kNoFence,
  kTouchedAccumulator,
  kChangedLeft,
  kNoProxyFence,
  kTooManyArrivals,
  kNoInit,
  kMisalignedTile,
  kOtherProduct,
  kNeverWaited,
  kLeftBarrier,
  kTileInUse
};

__device__ void start(uint64_t* barrier) {
  if (threadIdx.x == 0) {
    lmengine::mbarrier_init(barrier, 1);
    lmengine::mbarrier_init_fence();
  }
  __syncthreads();
}

// out: the bytes of a box (rows, 64) in shared memory.
__global__ void tile(const __grid_constant__ TensorMap map, unsigned char* out, int rows, int x,
                     int row, int head, int batch, Fault fault) {
  LMENGINE_SHARED_MEMORY(shared);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + rows * 128);
  unsigned char* to = shared + (fault == kMisalignedTile ? 128 : 0);
  if (fault != kNoInit) start(barrier);
  if (threadIdx.x == 0) {
    lmengine::mbarrier_arrive_expecting(barrier, rows * 128);
    lmengine::tma_load(to, &map, barrier, x, row, head, batch);
    if (fault == kTooManyArrivals) {
      lmengine::mbarrier_arrive(barrier);
      lmengine::mbarrier_arrive(barrier);
    }
    if (fault == kTileInUse) lmengine::tma_load(to, &map, barrier, x, row, head, batch);
  }
  if (fault != kNoWaitForTile) lmengine::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < rows * 128; i += blockDim.x) out[i] = shared[i];
  if (fault == kNoWaitForTile) lmengine::mbarrier_wait(barrier, 0);
}

// out (64, columns) = a b with the sum over 128; a (64, 128) or its transpose, b (128, columns) or
// its transpose, each as TMA leaves it. Left from registers, or from shared memory.
template <class T, int columns, bool registers, bool a_transposed, bool b_transposed>
__global__ void product(const __grid_constant__ TensorMap a_map,
                        const __grid_constant__ TensorMap b_map, const T* a, float* out,
                        Fault fault) {
  LMENGINE_SHARED_MEMORY(shared);
  constexpr int a_rows = a_transposed ? 128 : 64, b_rows = b_transposed ? 128 : columns;
  constexpr int a_panels = a_transposed ? 1 : 2, b_panels = b_transposed ? columns / 64 : 2;
  unsigned char* b_tile = shared + a_rows * a_panels * 128;
  uint64_t* barrier = reinterpret_cast<uint64_t*>(b_tile + b_rows * b_panels * 128);
  start(barrier);
  if (threadIdx.x == 0) {
    lmengine::mbarrier_arrive_expecting(barrier, (a_rows * a_panels + b_rows * b_panels) * 128);
    for (int panel = 0; panel < a_panels; ++panel)
      lmengine::tma_load(shared + panel * a_rows * 128, &a_map, barrier, panel * 64, 0, 0, 0);
    for (int panel = 0; panel < b_panels; ++panel)
      lmengine::tma_load(b_tile + panel * b_rows * 128, &b_map, barrier, panel * 64, 0, 0, 0);
  }
  lmengine::mbarrier_wait(barrier, 0);
  // a left operand that the threads write themselves: the same values once more
  if (!registers && !a_transposed) {
    const uint32_t word = reinterpret_cast<uint32_t*>(shared)[threadIdx.x];
    __syncthreads();
    if (fault == kNoProxyFence) reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = 0;
    __syncthreads();
    reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = fault == kNoProxyFence ? 0 : word;
    if (fault != kNoProxyFence) lmengine::fence_async_proxy();
    __syncthreads();
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, pair = 2 * (lane % 4);
  uint32_t fragments[8][4];
  for (int k = 0; k < 8; ++k)
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + group + i % 2 * 8, column = k * 16 + pair + i / 2 * 8;
      fragments[k][i] = *reinterpret_cast<const uint32_t*>(a + row * 128 + column);
    }
  float d[columns / 2];
  for (float& sum : d) sum = 1;
  const uint64_t left = lmengine::tile_descriptor(shared, a_rows, a_transposed);
  const uint64_t right = lmengine::tile_descriptor(b_tile, b_rows, b_transposed);
  if (fault != kNoFence) lmengine::wgmma_fence();
  for (int k = 0; k < 8; ++k) {
    const uint64_t b_at =
        b_transposed ? lmengine::along_rows(right, 16 * k) : lmengine::along_dim(right, b_rows, k);
    if constexpr (registers) {
      lmengine::wgmma<columns, T, b_transposed>(d, fragments[k], b_at,
                                                fault == kOtherProduct && warp == 1 ? true : k > 0);
    } else {
      const uint64_t a_at =
          a_transposed ? lmengine::along_rows(left, 16 * k) : lmengine::along_dim(left, a_rows, k);
      lmengine::wgmma<columns, T, a_transposed, b_transposed>(d, a_at, b_at, k > 0);
    }
  }
  lmengine::wgmma_commit();
  if (fault == kTouchedAccumulator) d[0] = 0;
  if (fault == kChangedLeft) fragments[3][2] = 0;
  if (fault == kNoWaitForProduct || fault == kNeverWaited) {
    lmengine::wgmma_wait<1>();
  } else {
    lmengine::wgmma_wait<0>();
  }
  for (int i = 0; i < columns / 2; ++i)
    out[(warp * 16 + group + i / 2 % 2 * 8) * columns + i / 4 * 8 + pair + i % 2] = d[i];
  if (fault == kNoWaitForProduct) lmengine::wgmma_wait<0>();
}

// Two warp groups in turn: the second adds to what the first wrote, round for round.
__global__ void turns(float* out, int rounds, Fault fault) {
  LMENGINE_SHARED_MEMORY(shared);
  float* sum = reinterpret_cast<float*>(shared);
  const int group = threadIdx.x / 128, i = threadIdx.x % 128;
  if (group == 1) lmengine::named_barrier_arrive(1, 256);
  if (group == 0) sum[i] = 0;
  for (int round = 0; round < rounds; ++round) {
    lmengine::named_barrier_sync(1 + group, 256);
    sum[i] = group == 0 ? sum[i] * 2 : sum[i] + 1;
    lmengine::named_barrier_arrive(2 - group, 256);
  }
  if (group == 0 && fault != kLeftBarrier) lmengine::named_barrier_sync(1, 256);
  if (group == 1) out[i] = sum[i];
}

template <class T, int columns, bool registers, bool a_transposed, bool b_transposed>
void run(const T* a, const T* a_stored, const T* b_stored, float* out, Fault fault) {
  constexpr bool is_half = std::is_same_v<T, __half>;
  constexpr int a_rows = a_transposed ? 128 : 64, b_rows = b_transposed ? 128 : columns;
  constexpr int a_dim = a_transposed ? 64 : 128, b_dim = b_transposed ? columns : 128;
  const TensorMap a_map =
      lmengine::tensor_map(a_stored, is_half, 1, 1, a_rows, a_dim, 0, 0, a_dim, a_rows);
  const TensorMap b_map =
      lmengine::tensor_map(b_stored, is_half, 1, 1, b_rows, b_dim, 0, 0, b_dim, b_rows);
  launch(product<T, columns, registers, a_transposed, b_transposed>, 1, 128,
         static_cast<size_t>(a_rows * a_dim + b_rows * b_dim) * 2 + 8, nullptr, a_map, b_map, a,
         out, fault);
}

template <class T, int columns>
void run(const T* a, const T* a_stored, const T* b_stored, float* out, int64_t kind, Fault fault) {
  if (kind == 0) run<T, columns, true, false, false>(a, a_stored, b_stored, out, fault);
  if (kind == 1) run<T, columns, true, false, true>(a, a_stored, b_stored, out, fault);
  if (kind == 2) run<T, columns, false, false, false>(a, a_stored, b_stored, out, fault);
  if (kind == 3) run<T, columns, false, false, true>(a, a_stored, b_stored, out, fault);
  if (kind == 4) run<T, columns, false, true, false>(a, a_stored, b_stored, out, fault);
  if (kind == 5) run<T, columns, false, true, true>(a, a_stored, b_stored, out, fault);
}

}  // namespace

extern "C" {

// in (batch, heads, length, dim) with rows of dim + gap
void run_tile(const __half* in, unsigned char* out, int64_t batch, int64_t heads, int64_t length,
              int64_t dim, int64_t gap, int64_t rows, int64_t x, int64_t row, int64_t head,
              int64_t batch_index, int64_t fault) {
  const int64_t step = dim + gap;
  const TensorMap map =
      lmengine::tensor_map(in, true, batch, heads, length, static_cast<int>(dim),
                           heads * length * step, length * step, step, static_cast<int>(rows));
  launch(tile, 1, 64, static_cast<size_t>(rows * 128 + 136), nullptr, map, out, rows, x, row, head,
         batch_index, static_cast<Fault>(fault));
}

void run_product_bf16(const __nv_bfloat16* a, const __nv_bfloat16* a_stored,
                      const __nv_bfloat16* b_stored, float* out, int64_t columns, int64_t kind,
                      int64_t fault) {
  if (columns == 64) run<__nv_bfloat16, 64>(a, a_stored, b_stored, out, kind, Fault(fault));
  if (columns == 256) run<__nv_bfloat16, 256>(a, a_stored, b_stored, out, kind, Fault(fault));
}

void run_product_half(const __half* a, const __half* a_stored, const __half* b_stored, float* out,
                      int64_t columns, int64_t kind, int64_t fault) {
  run<__half, 128>(a, a_stored, b_stored, out, kind, Fault(fault));
}

void run_turns(float* out, int64_t rounds, int64_t fault) {
  launch(turns, 1, 256, 512, nullptr, out, rounds, Fault(fault));
}

}  // extern "C"
