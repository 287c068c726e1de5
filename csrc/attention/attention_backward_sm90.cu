// Attention's backward on Hopper. A block has 128 keys of one head, 64 for each of two warp groups,
// and goes over the queries that see them. Five products a pair of blocks: the weights and their
// gradient are computed transposed, keys by queries, so that they are the left operands of the
// gradients of values and keys as they lie in registers. For the gradient of the queries they go
// through shared memory, and what a block of keys gives is added to sums in global memory; in the
// order of the blocks where the sum has to be the same again.
//   delta = sum(grad_output * output) - grad_logsumexp             of a query
//   grad_scores = weights * (grad_output value^T - delta)
//   grad_value = weights^T grad_output, grad_key = scale * grad_scores^T query,
//   grad_query = scale * grad_scores key
#include "attention/attention_cuda.h"
#include "attention/attention_sm90.h"

namespace lmengine {
namespace {

using namespace hopper;

// A step takes 64 queries with dim 128 and 2 times 64 with dim 64, so that each warp group has a
// share of 64 by 64 in the gradient of queries: a half of dim, or a half of the queries.
template <class T_, int dim>
struct Shape {
  using T = T_;
  static constexpr int kDim = dim, kKeys = 128, kGroups = 2, kThreads = kWarpGroup * (kGroups + 1);
  static constexpr int kPanels = dim / 64, kParts = 2 / kPanels, kQueries = 64 * kParts;
  static constexpr int kRing = 6 * kParts;  // tiles of 64 queries and of the output's gradient
  static constexpr int kKeyBytes = kKeys * dim * 2, kTileBytes = 64 * dim * 2;
  static constexpr int kGradBytes = kKeys * kQueries * 2, kNumberBytes = 64 * 4;
  static constexpr int kBarriers = 2 * kRing + 2;
  static constexpr int kSharedBytes =
      2 * kKeyBytes + kRing * (kTileBytes + kNumberBytes) + 2 * kGradBytes + kBarriers * 8;
  static constexpr int kLoaderRegisters = 24, kRegisters = 240;
  static_assert(kSharedBytes <= 227 * 1024);
};

// Sums of the gradient of queries lie as the products leave them: for 64 queries and 64 of dim, and
// each 4 of a lane's 32 accumulators, the 128 lanes side by side.
constexpr int kSums = 64 * 64;
constexpr int kPadded = 128;  // queries come in a multiple of this

struct Backward : Problem {
  AttentionTensor grad_key, grad_value;
  int head_dim, value_dim;
  int padded;          // query length, rounded up
  float scale;         // of the scores
  const float* shift;  // (batch * heads, padded): logsumexp * log2(e), infinite without keys
  const float* delta;  // likewise, 0 behind the last query
  float* sums;         // (batch * heads, padded / 64, dim / 64, kSums)
  // How many blocks of keys have added to a step's sums, for each head, step and warp group; null:
  // they add in any order.
  unsigned* added;
  Schedule schedule;  // heads of keys

  // The first block of queries that see keys from `first` on.
  template <class S>
  __device__ __forceinline__ int first_block(int first) const {
    return is_causal ? max(0, first - offset) / S::kQueries : 0;
  }
  template <class S>
  __device__ __forceinline__ int end_block() const {
    return (query_length + S::kQueries - 1) / S::kQueries;
  }
};

template <class S>
struct Shared {
  unsigned char *key, *value, *tiles, *grads;
  float* numbers;
  uint64_t *full, *empty, *key_full, *key_empty;

  __device__ __forceinline__ explicit Shared(unsigned char* shared)
      : key(shared),
        value(key + S::kKeyBytes),
        tiles(value + S::kKeyBytes),
        grads(tiles + S::kRing * S::kTileBytes),
        numbers(reinterpret_cast<float*>(grads + 2 * S::kGradBytes)) {
    full = reinterpret_cast<uint64_t*>(numbers + S::kRing * 64);
    empty = full + S::kRing;
    key_full = empty + S::kRing;
    key_empty = key_full + 1;
  }
  __device__ __forceinline__ unsigned char* tile(int slot) const {
    return tiles + slot * S::kTileBytes;
  }
};

// ---- before and after --------------------------------------------------------------------------

constexpr int kRowThreads = 256, kRows = kRowThreads / 16;

// Writes shift and delta; 16 lanes have a query.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    prepare_kernel(AttentionTensor output, AttentionTensor grad_output, const float* logsumexp,
                   const float* grad_logsumexp, float* shift, float* delta, int heads, int length,
                   int padded, int dim) {
  const unsigned blocks = padded / kRows, index = blockIdx.x / blocks;
  const int row =
      static_cast<int>(blockIdx.x % blocks) * kRows + static_cast<int>(threadIdx.x) / 16;
  float sum = 0;
  if (row < length) {
    const T* a = rows_of<T>(output, index / heads, index % heads) + row * output.row_stride;
    const T* b =
        rows_of<T>(grad_output, index / heads, index % heads) + row * grad_output.row_stride;
    for (int d = threadIdx.x % 16 * 8; d < dim; d += 16 * 8) {
      const uint4 x = *reinterpret_cast<const uint4*>(a + d);
      const uint4 y = *reinterpret_cast<const uint4*>(b + d);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        sum = fmaf(static_cast<float>(reinterpret_cast<const T*>(&x)[i]),
                   static_cast<float>(reinterpret_cast<const T*>(&y)[i]), sum);
    }
  }
#pragma unroll
  for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (threadIdx.x % 16 != 0) return;
  const int64_t from = static_cast<int64_t>(index) * length + row;
  const int64_t to = static_cast<int64_t>(index) * padded + row;
  const float log_sum = row < length ? logsumexp[from] : -INFINITY;
  shift[to] = log_sum == -INFINITY ? INFINITY : log_sum * kLog2E;
  delta[to] = row < length && grad_logsumexp != nullptr ? sum - grad_logsumexp[from] : sum;
}

// Rounds sums * scale to the gradient of queries; a block has 64 queries and 64 of dim.
template <class T>
__global__ void __launch_bounds__(kWarpGroup)
    finish_kernel(const float* sums, AttentionTensor grad_query, float scale, int heads, int length,
                  int blocks, int panels, int dim) {
  const int panel = static_cast<int>(blockIdx.x % panels);
  const unsigned rest = blockIdx.x / panels, index = rest / blocks;
  const float* from = sums + static_cast<int64_t>(blockIdx.x) * kSums;
  float own[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 four = *reinterpret_cast<const float4*>(
        from + (i * kWarpGroup + static_cast<int>(threadIdx.x)) * 4);
    own[4 * i] = four.x, own[4 * i + 1] = four.y;
    own[4 * i + 2] = four.z, own[4 * i + 3] = four.w;
  }
  const float factor[2] = {scale, scale};
  const int first = static_cast<int>(rest % blocks) * 64 + static_cast<int>(threadIdx.x) / 32 * 16;
  store_rows<T, 64>(own, factor, rows_of<T>(grad_query, index / heads, index % heads) + panel * 64,
                    grad_query.row_stride, length, first, dim - panel * 64);
}

// ---- the loading warp group --------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void load(const Backward& p, const Shared<S>& shared,
                                     const TensorMap* query, const TensorMap* key,
                                     const TensorMap* value, const TensorMap* grad_output) {
  Ring<S::kRing> ring;
  unsigned key_parity = 0;
  HeadBlock tile;
  for (unsigned round = 0; tile_of_round(p.schedule, round, false, tile); ++round) {
    const int first = static_cast<int>(tile.block) * S::kKeys;
    const int kv_heads = p.heads / p.kv_group;
    const int batch = static_cast<int>(tile.head) / kv_heads;
    const int kv_head = static_cast<int>(tile.head) % kv_heads;
    const int begin = p.first_block<S>(first), end = p.end_block<S>();
    if (begin >= end) continue;

    mbarrier_wait(shared.key_empty, key_parity ^ 1);
    key_parity ^= 1;
    mbarrier_arrive_expecting(shared.key_full, 2 * S::kKeyBytes);
#pragma unroll
    for (int panel = 0; panel < S::kPanels; ++panel) {
      const int at = panel * S::kKeys * 128;
      tma_load(shared.key + at, key, shared.key_full, panel * 64, first, kv_head, batch);
      tma_load(shared.value + at, value, shared.key_full, panel * 64, first, kv_head, batch);
    }
    for (int member = 0; member < p.kv_group; ++member) {
      const int head = kv_head * p.kv_group + member;
      const int64_t numbers = (static_cast<int64_t>(batch) * p.heads + head) * p.padded;
      const auto load_tile = [&](const TensorMap* from, const float* with, int first_query) {
        mbarrier_wait(shared.empty + ring.slot, ring.parity ^ 1);
        uint64_t* barrier = shared.full + ring.slot;
        mbarrier_arrive_expecting(barrier, S::kTileBytes + S::kNumberBytes);
#pragma unroll
        for (int panel = 0; panel < S::kPanels; ++panel)
          tma_load(shared.tile(ring.slot) + panel * 64 * 128, from, barrier, panel * 64,
                   first_query, head, batch);
        bulk_load(shared.numbers + ring.slot * 64, with + numbers + first_query, S::kNumberBytes,
                  barrier);
        ring.next();
      };
      for (int at = begin * S::kQueries; at < end * S::kQueries; at += 64) {
        load_tile(query, p.shift, at);
        load_tile(grad_output, p.delta, at);
      }
    }
  }
}

// ---- the computing warp groups -----------------------------------------------------------------

// Writes a left operand of 64 queries to lines `row` and `row` + 8 of a tile of 128 keys.
template <class S>
__device__ __forceinline__ void write_grads(unsigned char* tile, int row,
                                            const uint32_t (&words)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int line = row + i % 2 * 8, chunk = (2 * k + i / 2) ^ line % 8;
      *reinterpret_cast<uint32_t*>(tile + line * 128 + chunk * 16 + threadIdx.x % 4 * 4) =
          words[k][i];
    }
}

// The blocks of keys that some queries see are the first ones: they add in the order of their
// numbers. Called by a warp group.
__device__ __forceinline__ void wait_for_sums(const unsigned* added, unsigned block) {
  while (cuda::load_acquire(added) != block) cuda::spin_pause();
}
__device__ __forceinline__ void give_sums(unsigned* added, int group) {
  __threadfence();
  named_barrier_sync(2 + group, kWarpGroup);
  if (threadIdx.x % kWarpGroup == 0) atomicAdd(added, 1u);
}

template <class S>
__device__ __forceinline__ void compute(const Backward& p, const Shared<S>& shared) {
  using T = typename S::T;
  constexpr int kKeys = S::kKeys, kDim = S::kDim;
  const int group = static_cast<int>(threadIdx.x) / kWarpGroup - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, pair = lane % 4 * 2;
  const int own = group * 64 + warp * 16 + lane / 4;  // this lane's first key
  const uint64_t key_rows = along_rows(tile_descriptor(shared.key, kKeys, false), group * 64);
  const uint64_t value_rows = along_rows(tile_descriptor(shared.value, kKeys, false), group * 64);
  // this warp group's share of the gradient of queries
  constexpr int kHalf = kKeys * 128;
  const uint64_t key_columns =
      tile_descriptor(shared.key + (S::kPanels == 2 ? group * kHalf : 0), kKeys, true);
  const uint64_t grads_rows =
      tile_descriptor(shared.grads + (S::kParts == 2 ? group * kHalf : 0), kKeys, true);

  Ring<S::kRing> ring;
  unsigned key_parity = 0, buffer = 0;
  float grad_key[kDim / 2], grad_value[kDim / 2];
  float weights[32], grad_weights[32], grad_query[32];
  uint32_t weights_operand[4][4], grads_operand[4][4];
  int query_slot = 0, output_slot = 0;
  const float scale = p.scale * kLog2E;
  const auto done_with = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const auto start_weights = [&] {
    query_slot = ring.slot;
    mbarrier_wait(shared.full + ring.slot, ring.parity);
    ring.next();
    wgmma_fence();
    multiply_by_lines<T, 64, kDim, kKeys>(weights, key_rows, shared.tile(query_slot));
    wgmma_commit();
  };
  const auto start_grad_weights = [&] {
    output_slot = ring.slot;
    mbarrier_wait(shared.full + ring.slot, ring.parity);
    ring.next();
    wgmma_fence();
    multiply_by_lines<T, 64, kDim, kKeys>(grad_weights, value_rows, shared.tile(output_slot));
    wgmma_commit();
  };
  // f(accumulator's number, the number of its query)
  const auto for_each = [&](const float* numbers, const auto& f) {
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float2 two = *reinterpret_cast<const float2*>(numbers + pair + 2 * i);
      f(i, two.x), f(i + 1, two.y), f(i + 2, two.x), f(i + 3, two.y);
    }
  };

  HeadBlock tile;
  for (unsigned round = 0; tile_of_round(p.schedule, round, false, tile); ++round) {
    const int first = static_cast<int>(tile.block) * kKeys;
    const int kv_heads = p.heads / p.kv_group;
    const int64_t batch = tile.head / kv_heads, kv_head = tile.head % kv_heads;
    const int begin = p.first_block<S>(first) * S::kQueries;
    const int end = p.end_block<S>() * S::kQueries;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) grad_key[i] = grad_value[i] = 0;

    if (begin < end) {
      int at = begin;  // the step's first query
      int head = static_cast<int>(tile.head) * p.kv_group;
      mbarrier_wait(shared.key_full, key_parity);
      key_parity ^= 1;

#pragma unroll 1
      for (int steps = p.kv_group * ((end - begin) / S::kQueries); steps > 0; --steps) {
#pragma unroll
        for (int part = 0; part < S::kParts; ++part) {
          const int query_before = query_slot, output_before = output_slot;
          start_weights();
          start_grad_weights();
          wgmma_wait<1>();
          if (part != 0) {
            done_with(shared.empty + query_before);
            done_with(shared.empty + output_before);
          }
          for_each(shared.numbers + query_slot * 64, [&](int i, float shift) {
            weights[i] = exp2_approximate(bounded_by_zero(fmaf(weights[i], scale, -shift)));
          });
          const int sees = at + 64 * part + p.offset;  // the last key that the first query sees
          if (p.is_causal && first + group * 64 + 63 > sees) {
            const int ahead = first + own - sees - pair;
#pragma unroll
            for (int i = 0; i < 32; ++i)
              if (ahead + i / 2 % 2 * 8 > i / 4 * 8 + i % 2) weights[i] = 0;
          }
          round_to_operand<T, 64>(weights_operand, weights);
          wgmma_fence();
          add_lines<T, 64, kDim>(grad_value, weights_operand, shared.tile(output_slot));
          wgmma_commit();

          wgmma_wait<1>();
          for_each(shared.numbers + output_slot * 64, [&](int i, float delta) {
            grad_weights[i] = weights[i] * (grad_weights[i] - delta);
          });
          round_to_operand<T, 64>(grads_operand, grad_weights);
          wgmma_fence();
          add_lines<T, 64, kDim>(grad_key, grads_operand, shared.tile(query_slot));
          wgmma_commit();
          write_grads<S>(shared.grads + buffer * S::kGradBytes + part * kHalf, own, grads_operand);
        }
        // Two buffers in turn: behind the barrier of one step nobody reads what was written two
        // steps before.
        fence_async_proxy();
        named_barrier_sync(1, S::kGroups * kWarpGroup);
        const uint64_t left = along_rows(grads_rows, buffer * S::kGradBytes / 128);
        buffer ^= 1;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k)
          wgmma<64, T, true, true>(grad_query, along_rows(left, 16 * k),
                                   along_rows(key_columns, 16 * k), k != 0);
        wgmma_commit();
        wgmma_wait<1>();
        done_with(shared.empty + query_slot);
        done_with(shared.empty + output_slot);
        wgmma_wait<0>();
        const int64_t query = static_cast<int64_t>(head) * p.padded + at;
        const int64_t turn = query / S::kQueries * S::kGroups + group;
        if (p.added != nullptr) wait_for_sums(p.added + turn, tile.block);
        float* to = p.sums + query * kDim + (group * kWarpGroup * 8 + threadIdx.x % kWarpGroup) * 4;
#pragma unroll
        for (int i = 0; i < 32; i += 4)
          add_to_global(to + i * kWarpGroup, grad_query[i], grad_query[i + 1], grad_query[i + 2],
                        grad_query[i + 3]);
        if (p.added != nullptr) give_sums(p.added + turn, group);
        at += S::kQueries;
        if (at == end) at = begin, ++head;
      }
      done_with(shared.key_empty);
    }

    const int row = first + group * 64 + warp * 16;
    const float scales[2] = {p.scale, p.scale}, ones[2] = {1, 1};
    store_rows<T, kDim>(grad_key, scales, rows_of<T>(p.grad_key, batch, kv_head),
                        p.grad_key.row_stride, p.key_length, row, p.head_dim);
    store_rows<T, kDim>(grad_value, ones, rows_of<T>(p.grad_value, batch, kv_head),
                        p.grad_value.row_stride, p.key_length, row, p.value_dim);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    backward_kernel(const __grid_constant__ Backward p, const __grid_constant__ TensorMap query,
                    const __grid_constant__ TensorMap key, const __grid_constant__ TensorMap value,
                    const __grid_constant__ TensorMap grad_output) {
  LMENGINE_SHARED_MEMORY(memory);
  const Shared<S> shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kRing; ++i) {
      mbarrier_init(shared.full + i, 1);
      mbarrier_init(shared.empty + i, 4 * S::kGroups);
    }
    mbarrier_init(shared.key_full, 1);
    mbarrier_init(shared.key_empty, 4 * S::kGroups);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpGroup) {
    set_registers_down<S::kLoaderRegisters>();
    if (threadIdx.x == 0) load<S>(p, shared, &query, &key, &value, &grad_output);
  } else {
    set_registers_up<S::kRegisters>();
    compute<S>(p, shared);
  }
}

// ---- launchers ---------------------------------------------------------------------------------

int padded_length(const AttentionParameters& p) {
  return static_cast<int>((p.query_length + kPadded - 1) / kPadded * kPadded);
}

int padded_dim(const AttentionParameters& p) {
  return p.head_dim > 64 || p.value_dim > 64 ? 128 : 64;
}

template <class S>
void launch_backward(const AttentionParameters& p, float* workspace, cudaStream_t stream) {
  using T = typename S::T;
  constexpr bool is_half = std::is_same_v<T, __half>;
  const auto map = [&](const AttentionTensor& tensor, int64_t heads, int64_t length, int dim,
                       int rows) {
    return tensor_map(tensor.data, is_half, p.batch, heads, length, dim, tensor.batch_stride,
                      tensor.head_stride, tensor.row_stride, rows);
  };
  const int padded = padded_length(p);
  const int64_t heads = p.batch * p.heads, rows = heads * padded;
  float* sums = workspace;
  unsigned* added = reinterpret_cast<unsigned*>(sums + rows * S::kDim);
  float *shift = sums + rows * S::kDim + rows / 32, *delta = shift + rows;
  const int64_t head_bytes = p.query_length * (2 * (p.head_dim + p.value_dim) + 4 * S::kDim);
  AttentionParameters by_keys = p;
  by_keys.heads = p.kv_heads;
  const Backward backward{Problem(p),
                          p.grad_key,
                          p.grad_value,
                          p.head_dim,
                          p.value_dim,
                          padded,
                          p.scale,
                          shift,
                          delta,
                          sums,
                          p.deterministic ? added : nullptr,
                          Schedule(by_keys, p.key_length, S::kKeys, head_bytes)};
  cuda::zero(sums, static_cast<size_t>(rows * S::kDim + rows / 32) * sizeof(float), stream);
  cuda::launch(prepare_kernel<T>, static_cast<unsigned>(rows / kRows), kRowThreads, 0, stream,
               p.output, p.grad_output, p.logsumexp, p.grad_logsumexp, shift, delta, p.heads,
               p.query_length, padded, p.value_dim);
  if (p.key_length != 0) {
    const TensorMap query = map(p.query, p.heads, p.query_length, p.head_dim, 64);
    const TensorMap key = map(p.key, p.kv_heads, p.key_length, p.head_dim, S::kKeys);
    const TensorMap value = map(p.value, p.kv_heads, p.key_length, p.value_dim, S::kKeys);
    const TensorMap grad = map(p.grad_output, p.heads, p.query_length, p.value_dim, 64);
    const unsigned grid = backward.schedule.grid();
    if (p.deterministic) {  // blocks wait for each other
      cuda::launch_cooperative(backward_kernel<S>, grid, S::kThreads, S::kSharedBytes, stream,
                               backward, query, key, value, grad);
    } else {
      cuda::launch(backward_kernel<S>, grid, S::kThreads, S::kSharedBytes, stream, backward, query,
                   key, value, grad);
    }
  }
  cuda::launch(finish_kernel<T>, static_cast<unsigned>(rows / 64 * S::kPanels), kWarpGroup, 0,
               stream, sums, p.grad_query, p.scale, p.heads, p.query_length, padded / 64,
               S::kPanels, p.head_dim);
}

template <class T>
void backward(const AttentionParameters& p, float* workspace, cudaStream_t stream) {
  if (padded_dim(p) == 64) return launch_backward<Shape<T, 64>>(p, workspace, stream);
  launch_backward<Shape<T, 128>>(p, workspace, stream);
}

}  // namespace

int64_t attention_backward_sm90_workspace(const AttentionParameters& p) {
  const int64_t rows = p.batch * p.heads * padded_length(p);
  return rows * (padded_dim(p) + 2) + rows / 32;
}

void attention_backward_sm90(const AttentionParameters& p, float* workspace, cudaStream_t stream) {
  if (p.batch * p.heads == 0) return;
  if (p.type == AttentionType::float16) return backward<__half>(p, workspace, stream);
  backward<__nv_bfloat16>(p, workspace, stream);
}

}  // namespace lmengine
