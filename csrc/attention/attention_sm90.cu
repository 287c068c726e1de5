// Attention's forward on Hopper (Shah et al. 2024, FlashAttention-3). One warp group loads: a
// block's queries, then keys and values in a ring of tiles. Two or three others have 64 queries
// each. They take turns at the tensor cores, so that one's softmax runs under the others' products,
// and each multiplies the next keys while it weighs the values before.
#include "attention/attention_sm90.h"

#include "attention/attention_cuda.h"

namespace lmengine {
namespace {

using namespace hopper;

template <class T_, int dim, int groups, int columns, int ring>
struct Shape {
  using T = T_;
  static constexpr int kDim = dim, kGroups = groups, kRows = 64 * groups, kColumns = columns;
  static constexpr int kRing = ring, kThreads = kWarpGroup * (groups + 1);
  static constexpr int kPanels = dim / 64;
  static constexpr int kQueryBytes = kRows * dim * 2, kTileBytes = columns * dim * 2;
  static constexpr int kBarriers = 2 * ring + 2;
  static constexpr int kSharedBytes = kQueryBytes + ring * kTileBytes + kBarriers * 8;
  // registers of a thread that loads and of one that computes: together what the block has
  static constexpr int kLoaderRegisters = groups == 2 ? 24 : 32;
  static constexpr int kRegisters = groups == 2 ? 240 : 160;
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert((kLoaderRegisters + groups * kRegisters) * kWarpGroup <= 65536);
};

struct Forward : Problem {
  AttentionTensor output;
  float* logsumexp;
  int value_dim;
  float scale;  // times log2(e)
  Schedule schedule;
};

template <class S>
struct Shared {
  unsigned char *query, *tiles;
  uint64_t *full, *empty, *query_full, *query_empty;

  __device__ __forceinline__ explicit Shared(unsigned char* shared)
      : query(shared), tiles(shared + S::kQueryBytes) {
    full = reinterpret_cast<uint64_t*>(tiles + S::kRing * S::kTileBytes);
    empty = full + S::kRing;
    query_full = empty + S::kRing;
    query_empty = query_full + 1;
  }
  __device__ __forceinline__ unsigned char* tile(int slot) const {
    return tiles + slot * S::kTileBytes;
  }
};

// ---- the loading warp group --------------------------------------------------------------------

// One thread asks for all tiles: the keys of a block always before the values of the block before.
template <class S>
__device__ __forceinline__ void load(const Forward& p, const Shared<S>& shared,
                                     const TensorMap* query, const TensorMap* key,
                                     const TensorMap* value) {
  Ring<S::kRing> ring;
  unsigned query_parity = 0;
  HeadBlock tile;
  for (unsigned round = 0; tile_of_round(p.schedule, round, p.is_causal, tile); ++round) {
    const int first = static_cast<int>(tile.block) * S::kRows;
    const int blocks =
        (p.seen_by(min(first + S::kRows, p.query_length)) + S::kColumns - 1) / S::kColumns;
    if (blocks == 0) continue;
    const int batch = static_cast<int>(tile.head) / p.heads;
    const int head = static_cast<int>(tile.head) % p.heads, kv_head = head / p.kv_group;

    const auto load_tile = [&](const TensorMap* from, int block) {
      mbarrier_wait(shared.empty + ring.slot, ring.parity ^ 1);
      uint64_t* barrier = shared.full + ring.slot;
      mbarrier_arrive_expecting(barrier, S::kTileBytes);
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel)
        tma_load(shared.tile(ring.slot) + panel * S::kColumns * 128, from, barrier, panel * 64,
                 block * S::kColumns, kv_head, batch);
      ring.next();
    };
    mbarrier_wait(shared.query_empty, query_parity ^ 1);
    query_parity ^= 1;
    mbarrier_arrive_expecting(shared.query_full, S::kQueryBytes);
#pragma unroll
    for (int panel = 0; panel < S::kPanels; ++panel)
      tma_load(shared.query + panel * S::kRows * 128, query, shared.query_full, panel * 64, first,
               head, batch);
    load_tile(key, blocks - 1);
    for (int block = blocks - 2; block >= 0; --block) {
      load_tile(key, block);
      load_tile(value, block + 1);
    }
    load_tile(value, 0);
  }
}

// ---- the computing warp groups -----------------------------------------------------------------

// The running softmax of a lane's two rows. Scores count in units of `scale`.
struct Softmax {
  float largest[2], total[2];  // total: this lane's part

  __device__ __forceinline__ void clear() {
    largest[0] = largest[1] = -INFINITY;
    total[0] = total[1] = 0;
  }

  // Turns scores into weights; `factor` is what weights before are worth now. `seen`: how many of
  // the columns each row sees.
  template <int columns>
  __device__ __forceinline__ void weigh(float (&scores)[columns / 2], float (&factor)[2],
                                        float scale, bool masked, const int (&seen)[2]) {
    const int pair = threadIdx.x % 4 * 2;
    if (masked) {
#pragma unroll
      for (int i = 0; i < columns / 2; ++i)
        if (i / 4 * 8 + i % 2 + pair >= seen[i / 2 % 2]) scores[i] = -INFINITY;
    }
    float shift[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float now = largest[row];
#pragma unroll
      for (int i = 2 * row; i < columns / 2; i += 4)
        now = fmaxf(now, fmaxf(scores[i], scores[i + 1]));
      now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 1));
      now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 2));
      shift[row] = now == -INFINITY ? 0 : rounded_product(now, scale);
      factor[row] = exp2_approximate(rounded_product(largest[row], scale) - shift[row]);
      largest[row] = now;
    }
    // Beyond this the product and its rounding differ by more than the weights can hold: the
    // products are rounded as the shift is, and the largest weight is 1 again.
    if (__any_sync(0xffffffff, fmaxf(fabsf(shift[0]), fabsf(shift[1])) > 0x1p24f)) {
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) scores[i] = rounded_product(scores[i], scale);
      scale = 1;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum = 0;
#pragma unroll
      for (int i = 2 * row; i < columns / 2; i += 4)
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          scores[j] = exp2_approximate(fmaf(scores[j], scale, -shift[row]));
          sum += scores[j];
        }
      total[row] = total[row] * factor[row] + sum;
    }
  }
};

template <class S>
__device__ __forceinline__ void compute(const Forward& p, const Shared<S>& shared) {
  using T = typename S::T;
  constexpr int kColumns = S::kColumns;
  const int group = static_cast<int>(threadIdx.x) / kWarpGroup - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int own = group * 64 + warp * 16 + lane / 4;  // this lane's first row
  const uint64_t left = along_rows(tile_descriptor(shared.query, S::kRows, false), group * 64);

  Ring<S::kRing> ring;
  unsigned query_parity = 0;
  float scores[kColumns / 2], sums[S::kDim / 2], factor[2];
  uint32_t weights[kColumns / 16][4];
  Softmax softmax;
  // one arrival of each warp
  const auto done_with = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const auto wait_for_turn = [&] { named_barrier_sync(1 + group, 2 * kWarpGroup); };
  const auto give_turn = [&] {
    named_barrier_arrive(group == S::kGroups - 1 ? 1 : 2 + group, 2 * kWarpGroup);
  };
  if (group == S::kGroups - 1) give_turn();

  HeadBlock tile;
  for (unsigned round = 0; tile_of_round(p.schedule, round, p.is_causal, tile); ++round) {
    const int first = static_cast<int>(tile.block) * S::kRows;
    const int blocks = (p.seen_by(min(first + S::kRows, p.query_length)) + kColumns - 1) / kColumns;
    softmax.clear();
#pragma unroll
    for (int i = 0; i < S::kDim / 2; ++i) sums[i] = 0;

    if (blocks != 0) {
      const int all_see = p.seen_by(first + group * 64 + 1);
      const int row_sees[2] = {p.seen_by(first + own + 1), p.seen_by(first + own + 9)};
      const auto weigh = [&](int block) {
        const int begin = block * kColumns;
        const int seen[2] = {row_sees[0] - begin, row_sees[1] - begin};
        softmax.template weigh<kColumns>(scores, factor, p.scale, begin + kColumns > all_see, seen);
      };
      mbarrier_wait(shared.query_full, query_parity);
      query_parity ^= 1;
      mbarrier_wait(shared.full + ring.slot, ring.parity);
      wgmma_fence();
      multiply_by_lines<T, kColumns, S::kDim, S::kRows>(scores, left, shared.tile(ring.slot));
      wgmma_commit();
      wgmma_wait<0>();
      done_with(shared.empty + ring.slot);
      ring.next();
      weigh(blocks - 1);
      round_to_operand<T, kColumns>(weights, scores);

#pragma unroll 1
      for (int block = blocks - 2; block >= 0; --block) {
        const int key_slot = ring.slot;
        mbarrier_wait(shared.full + ring.slot, ring.parity);
        wait_for_turn();
        wgmma_fence();
        multiply_by_lines<T, kColumns, S::kDim, S::kRows>(scores, left, shared.tile(ring.slot));
        wgmma_commit();
        ring.next();
        mbarrier_wait(shared.full + ring.slot, ring.parity);
        wgmma_fence();
        add_lines<T, kColumns, S::kDim>(sums, weights, shared.tile(ring.slot));
        wgmma_commit();
        give_turn();
        wgmma_wait<1>();
        done_with(shared.empty + key_slot);
        weigh(block);
        wgmma_wait<0>();
        done_with(shared.empty + ring.slot);
        ring.next();
#pragma unroll
        for (int i = 0; i < S::kDim / 2; ++i) sums[i] *= factor[i / 2 % 2];
        round_to_operand<T, kColumns>(weights, scores);
      }
      done_with(shared.query_empty);
      mbarrier_wait(shared.full + ring.slot, ring.parity);
      wgmma_fence();
      add_lines<T, kColumns, S::kDim>(sums, weights, shared.tile(ring.slot));
      wgmma_commit();
      wgmma_wait<0>();
      done_with(shared.empty + ring.slot);
      ring.next();
    }

    const int64_t batch = tile.head / p.heads, head = tile.head % p.heads;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = softmax.total[i];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      inverse[i] = sum == 0 ? 0 : 1 / sum;  // a query without keys: 0, and -infinity
      const int row = first + own + 8 * i;
      if (lane % 4 == 0 && row < p.query_length)
        p.logsumexp[static_cast<int64_t>(tile.head) * p.query_length + row] =
            sum == 0 ? -INFINITY
                     : rounded_product(softmax.largest[i], p.scale) / kLog2E + logf(sum);
    }
    store_rows<T, S::kDim>(sums, inverse, rows_of<T>(p.output, batch, head), p.output.row_stride,
                           p.query_length, first + own - lane / 4, p.value_dim);
  }
  if (group == 0) wait_for_turn();  // the last turn that nobody took
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    forward_kernel(const __grid_constant__ Forward p, const __grid_constant__ TensorMap query,
                   const __grid_constant__ TensorMap key, const __grid_constant__ TensorMap value) {
  LMENGINE_SHARED_MEMORY(memory);
  const Shared<S> shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kRing; ++i) {
      mbarrier_init(shared.full + i, 1);
      mbarrier_init(shared.empty + i, 4 * S::kGroups);
    }
    mbarrier_init(shared.query_full, 1);
    mbarrier_init(shared.query_empty, 4 * S::kGroups);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpGroup) {
    set_registers_down<S::kLoaderRegisters>();
    if (threadIdx.x == 0) load<S>(p, shared, &query, &key, &value);
  } else {
    set_registers_up<S::kRegisters>();
    compute<S>(p, shared);
  }
}

// ---- launcher ----------------------------------------------------------------------------------

template <class S>
void launch_forward(const AttentionParameters& p, cudaStream_t stream) {
  constexpr bool is_half = std::is_same_v<typename S::T, __half>;
  const auto map = [&](const AttentionTensor& tensor, int64_t heads, int64_t length, int dim,
                       int rows) {
    return tensor_map(tensor.data, is_half, p.batch, heads, length, dim, tensor.batch_stride,
                      tensor.head_stride, tensor.row_stride, rows);
  };
  // a tensor map holds no empty dimension: without keys the queries take their place, and nobody
  // reads them
  const bool none = p.key_length == 0;
  const TensorMap query = map(p.query, p.heads, p.query_length, p.head_dim, S::kRows);
  const TensorMap key =
      none ? query : map(p.key, p.kv_heads, p.key_length, p.head_dim, S::kColumns);
  const TensorMap value =
      none ? query : map(p.value, p.kv_heads, p.key_length, p.value_dim, S::kColumns);
  const int64_t head_bytes = 2 * p.key_length * (p.head_dim + p.value_dim);
  const Forward forward{Problem(p),       p.output,
                        p.logsumexp,      p.value_dim,
                        p.scale * kLog2E, Schedule(p, p.query_length, S::kRows, head_bytes)};
  cuda::launch(forward_kernel<S>, forward.schedule.grid(), S::kThreads, S::kSharedBytes, stream,
               forward, query, key, value);
}

template <class T>
void forward(const AttentionParameters& p, cudaStream_t stream) {
  const int dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return launch_forward<Shape<T, 64, 3, 128, 8>>(p, stream);
  // wider blocks of keys make less of the products' overhead, and waste more beside the causal mask
  if (dim <= 128 && p.window_right < 0) return launch_forward<Shape<T, 128, 2, 176, 4>>(p, stream);
  if (dim <= 128) return launch_forward<Shape<T, 128, 2, 128, 6>>(p, stream);
  return launch_forward<Shape<T, 256, 2, 64, 5>>(p, stream);
}

}  // namespace

void attention_forward_sm90(const AttentionParameters& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.query_length == 0) return;
  if (p.type == AttentionType::float16) return forward<__half>(p, stream);
  forward<__nv_bfloat16>(p, stream);
}

}  // namespace lmengine
