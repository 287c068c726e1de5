// Attention's backward on the GPU: a kernel for delta, one with a block for some keys that gives
// the gradients of keys and values, and one with a block for some queries that gives theirs. The
// weights are computed again in each, so that no sum is made by atomics and results never vary.
//   delta = sum(grad_output * output) - grad_logsumexp           of a query
//   grad_scores = weights * (grad_output value^T - delta)
//   grad_value = weights^T grad_output, grad_key = scale * grad_scores^T query,
//   grad_query = scale * grad_scores key
// With dropout a kept weight in grad_value, and grad_output value^T where the weight is kept, is
// multiplied by `factor`; with a softcap grad_scores by its slope. attention_mask_sm80.cu has the
// gradient of a mask.
#include "attention/attention_cuda.h"
#include "attention/attention_features.h"
#include "attention/attention_tiles.h"

namespace lmengine {
namespace {

using namespace attention;

// ---- delta -------------------------------------------------------------------------------------

constexpr int kDeltaThreads = 256, kDeltaRows = kDeltaThreads / 16;

// 16 lanes have a query.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(AttentionParameters p) {
  const Place at = place_of_block<kDeltaRows>(blockIdx.x, p.heads, p.query_length, false);
  const Sequence s = sequence_of(p, at.batch);
  const int row = at.first + static_cast<int>(threadIdx.x) / 16;
  float sum = 0;
  if (row < s.query_length) {
    const auto output = matrix_of<T>(p.output, at.batch, at.head, s.query_begin, s.query_length);
    const auto grad = matrix_of<T>(p.grad_output, at.batch, at.head, s.query_begin, s.query_length);
    for (int d = threadIdx.x % 16 * kChunk<T>; d < p.value_dim; d += 16 * kChunk<T>) {
      const uint4 a = *reinterpret_cast<const uint4*>(output.data + row * output.stride + d);
      const uint4 b = *reinterpret_cast<const uint4*>(grad.data + row * grad.stride + d);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i)
        sum = fmaf(static_cast<float>(reinterpret_cast<const T*>(&a)[i]),
                   static_cast<float>(reinterpret_cast<const T*>(&b)[i]), sum);
    }
  }
#pragma unroll
  for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (threadIdx.x % 16 == 0 && row < s.query_length) {
    const int64_t index = s.logsumexp + at.head * s.logsumexp_head + row;
    if (p.grad_logsumexp != nullptr) sum -= p.grad_logsumexp[index];
    // whatever the gradients of a query without keys are, they go nowhere
    p.delta[index] = p.logsumexp[index] == -INFINITY ? 0 : sum;
  }
}

// ---- keys and values ---------------------------------------------------------------------------

// Columns of the block's products are queries: those of all heads that share the keys, one head
// behind the other. Two stages: while one is used the next is under way.
template <class Engine, bool split, bool general>
__global__ void __launch_bounds__(Engine::kThreads, 1) key_value_kernel(AttentionParameters p) {
  using T = typename Engine::Type;
  using RowTile = typename Engine::RowTile;
  using ColumnTile = typename Engine::ColumnTile;
  constexpr int kQueries = Engine::kColumns;
  LMENGINE_SHARED_MEMORY(shared);
  T* key_tile = reinterpret_cast<T*>(shared);
  T* value_tile = key_tile + RowTile::kElements;
  T* stages = value_tile + RowTile::kElements;  // of each the queries, then the output's gradient
  float* numbers = reinterpret_cast<float*>(stages + 4 * ColumnTile::kElements);
  unsigned char* scratch = reinterpret_cast<unsigned char*>(numbers + 4 * kQueries);

  // a split kernel has two blocks for the same keys
  const bool has_keys = !split || blockIdx.x % 2 == 0, has_values = !split || blockIdx.x % 2 != 0;
  const auto place = [&](unsigned index) {
    return place_of_block<Engine::kRows>(split ? index / 2 : index, p.kv_heads, p.key_length,
                                         false);
  };
  const Place at = place(blockIdx.x);
  const Sequence s = sequence_of(p, at.batch);
  if (at.first >= key_rows_of(p, at.batch)) return;
  const Limits<general> limits(s);
  const KeyRange seen_by = queries_of(s, at.first, Engine::kRows);
  const int start = static_cast<int>(seen_by.begin) / kQueries * kQueries;
  const int stop = static_cast<int>(seen_by.end);
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int steps = group * ((max(stop - start, 0) + kQueries - 1) / kQueries);

  // what is loaded next: the queries from next_begin on of head next_head
  int next_begin = start, next_head = at.head * group;
  const auto advance = [&] {
    next_begin += kQueries;
    if (next_begin >= stop) next_begin = start, ++next_head;
  };
  const int query_begin = static_cast<int>(s.query_begin);
  const auto load = [&](int step) {
    if (step < steps) {
      T* stage = stages + step % 2 * 2 * ColumnTile::kElements;
      ColumnTile::template load<Engine::kThreads>(
          stage, matrix_of<T>(p.query, at.batch, next_head, query_begin, limits.queries),
          next_begin, p.head_dim);
      ColumnTile::template load<Engine::kThreads>(
          stage + ColumnTile::kElements,
          matrix_of<T>(p.grad_output, at.batch, next_head, query_begin, limits.queries), next_begin,
          p.value_dim);
    }
    cp_async_commit();
  };
  // logsumexp and delta of a query, by one thread each: read early, put down late
  const int thread = static_cast<int>(threadIdx.x);
  float next_shift = INFINITY, next_delta = 0;
  const auto read_numbers = [&](int step) {
    const bool valid = step < steps && thread < kQueries && next_begin + thread < limits.queries;
    const int64_t index = logsumexp_of(p, at.batch, next_head, query_begin) + next_begin + thread;
    next_shift = valid ? shift_of(p.logsumexp[index], kBefore<Engine, general>) : INFINITY;
    next_delta = valid ? p.delta[index] : 0;
  };
  const auto write_numbers = [&](int step) {
    float* to = numbers + step % 2 * 2 * kQueries;
    if (thread < kQueries) to[thread] = next_shift, to[kQueries + thread] = next_delta;
  };

  RowTile::template load<Engine::kThreads>(
      key_tile, matrix_of<T>(p.key, at.batch, at.head, s.key_begin, s.key_length), at.first,
      p.head_dim);
  RowTile::template load<Engine::kThreads>(
      value_tile, matrix_of<T>(p.value, at.batch, at.head, s.key_begin, s.key_length), at.first,
      p.value_dim);
  load(0);
  read_numbers(0);
  write_numbers(0);
  cp_async_wait<0>();
  __syncthreads();
  const typename Engine::Rows keys(key_tile), values(value_tile);

  const float scale = p.scale * kBefore<Engine, general>;
  float grad_key[Engine::kThreadRows][Engine::kThreadDims] = {};
  float second[Engine::kThreadRows][Engine::kThreadDims] = {};
  auto& grad_value = split ? grad_key : second;
  const int warp_first = at.first + Engine::first_row();

  for (int step = 0; step < steps; ++step) {
    const int begin = next_begin;
    [[maybe_unused]] const int head = next_head;
    advance();
    cp_async_wait<0>();
    __syncthreads();  // this stage is here, and nobody uses the other any more
    load(step + 1);
    read_numbers(step + 1);
    const T* query_tile = stages + step % 2 * 2 * ColumnTile::kElements;
    const T* grad_tile = query_tile + ColumnTile::kElements;
    const float* shift = numbers + step % 2 * 2 * kQueries;
    const float* minus = shift + kQueries;

    float weights[Engine::kThreadRows][Engine::kThreadColumns];
    float grad_scores[Engine::kThreadRows][Engine::kThreadColumns];
    if (!general || !limits.sees_none(begin, kQueries, warp_first, Engine::kWarpRows)) {
      Engine::products(weights, keys, query_tile);
      if constexpr (general) {
        const Features<T> features(p, limits, at.batch, head);
        if (has_keys) Engine::products(grad_scores, values, grad_tile);
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j)
#pragma unroll
          for (int i = 0; i < Engine::kThreadRows; ++i) {
            const int column = Engine::column(j), row = at.first + Engine::row(i);
            features.template backward<Engine>(weights[i][j], grad_scores[i][j], begin + column,
                                               row, row, row, shift[column], minus[column]);
          }
        if (has_values) Engine::add(grad_value, weights, grad_tile, scratch);
      } else {
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j)
#pragma unroll
          for (int i = 0; i < Engine::kThreadRows; ++i)
            weights[i][j] =
                weight_again<Engine, false>(fmaf(weights[i][j], scale, -shift[Engine::column(j)]));
        if (!limits.sees_all(begin, kQueries, warp_first, Engine::kWarpRows)) {
#pragma unroll
          for (int j = 0; j < Engine::kThreadColumns; ++j) {
            const int seen = min(limits.keys, begin + Engine::column(j) + limits.reach) - at.first;
#pragma unroll
            for (int i = 0; i < Engine::kThreadRows; ++i)
              if (Engine::row(i) >= seen) weights[i][j] = 0;
          }
        }
        if (has_values) Engine::add(grad_value, weights, grad_tile, scratch);
        if (has_keys) {
          Engine::products(grad_scores, values, grad_tile);
#pragma unroll
          for (int j = 0; j < Engine::kThreadColumns; ++j)
#pragma unroll
            for (int i = 0; i < Engine::kThreadRows; ++i)
              grad_scores[i][j] = weights[i][j] * (grad_scores[i][j] - minus[Engine::column(j)]);
        }
      }
      if (has_keys) Engine::add(grad_key, grad_scores, query_tile, scratch);
    }
    write_numbers(step + 1);
  }

  cp_async_wait<0>();
  float scales[Engine::kThreadRows], factors[Engine::kThreadRows];
  const float factor = general && p.seed != nullptr ? dropout_factor(p.dropout_p) : 1;
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) scales[i] = p.scale, factors[i] = factor;
  const Place again = place(block_index_anew());
  const int64_t begin = sequence_of(p, again.batch).key_begin;
  // rows behind a key length exist, and their gradients are 0
  const int64_t rows = key_rows_of(p, again.batch);
  if (has_keys)
    Engine::store(grad_key, scales, key_tile,
                  matrix_of<T>(p.grad_key, again.batch, again.head, begin, rows), again.first,
                  p.head_dim);
  if (has_values)
    Engine::store(grad_value, factors, value_tile,
                  matrix_of<T>(p.grad_value, again.batch, again.head, begin, rows), again.first,
                  p.value_dim);
}

// ---- queries -----------------------------------------------------------------------------------

// Columns of the block's products are keys.
template <class Engine, bool general>
__global__ void __launch_bounds__(Engine::kThreads, 1) query_kernel(AttentionParameters p) {
  using T = typename Engine::Type;
  using RowTile = typename Engine::RowTile;
  using ColumnTile = typename Engine::ColumnTile;
  LMENGINE_SHARED_MEMORY(shared);
  T* query_tile = reinterpret_cast<T*>(shared);
  T* grad_tile = query_tile + RowTile::kElements;
  T* stages = grad_tile + RowTile::kElements;  // of each the keys, then the values
  unsigned char* scratch = reinterpret_cast<unsigned char*>(stages + 4 * ColumnTile::kElements);

  const auto place = [&](unsigned index) {
    return place_of_block<Engine::kRows>(index, p.heads, p.query_length,
                                         p.window_right >= 0 && p.window_left < 0);
  };
  const Place at = place(blockIdx.x);
  const Sequence s = sequence_of(p, at.batch);
  if (at.first >= s.query_length) return;
  const Limits<general> limits(s);
  const int kv_head = kv_head_of(p, at.head);
  const auto key = matrix_of<T>(p.key, at.batch, kv_head, s.key_begin, s.key_length);
  const auto value = matrix_of<T>(p.value, at.batch, kv_head, s.key_begin, s.key_length);
  const KeyBlocks<general, Engine::kColumns> blocks(s, limits, at.first, Engine::kRows);

  const auto load = [&](int block) {
    T* stage = stages + block % 2 * 2 * ColumnTile::kElements;
    if (block < blocks.count) {
      const int begin = blocks.begin(block);
      ColumnTile::template load<Engine::kThreads>(stage, key, begin, p.head_dim);
      ColumnTile::template load<Engine::kThreads>(stage + ColumnTile::kElements, value, begin,
                                                  p.value_dim);
    }
    cp_async_commit();
  };
  RowTile::template load<Engine::kThreads>(
      query_tile, matrix_of<T>(p.query, at.batch, at.head, s.query_begin, s.query_length), at.first,
      p.head_dim);
  RowTile::template load<Engine::kThreads>(
      grad_tile, matrix_of<T>(p.grad_output, at.batch, at.head, s.query_begin, s.query_length),
      at.first, p.value_dim);
  load(0);
  const float scale = p.scale * kBefore<Engine, general>;
  float shift[Engine::kThreadRows], minus[Engine::kThreadRows];
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) {
    const int row = at.first + Engine::row(i);
    const bool valid = row < s.query_length;
    const int64_t index = s.logsumexp + at.head * s.logsumexp_head + row;
    shift[i] = valid ? shift_of(p.logsumexp[index], kBefore<Engine, general>) : INFINITY;
    minus[i] = valid ? p.delta[index] : 0;
  }
  cp_async_wait<0>();
  __syncthreads();
  const typename Engine::Rows queries(query_tile), grads(grad_tile);

  float sums[Engine::kThreadRows][Engine::kThreadDims] = {};
  const int warp_first = at.first + Engine::first_row();
  for (int block = 0; block < blocks.count; ++block) {
    const int begin = blocks.begin(block);
    cp_async_wait<0>();
    __syncthreads();  // this stage is here, and nobody uses the other any more
    load(block + 1);
    if (limits.sees_none(warp_first, Engine::kWarpRows, begin, Engine::kColumns)) continue;
    const T* key_tile = stages + block % 2 * 2 * ColumnTile::kElements;
    const T* value_tile = key_tile + ColumnTile::kElements;

    float weights[Engine::kThreadRows][Engine::kThreadColumns];
    float grad_scores[Engine::kThreadRows][Engine::kThreadColumns];
    Engine::products(weights, queries, key_tile);
    Engine::products(grad_scores, grads, value_tile);
    if constexpr (general) {
      const Features<T> features(p, limits, at.batch, at.head);
#pragma unroll
      for (int i = 0; i < Engine::kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j)
          features.template backward<Engine>(weights[i][j], grad_scores[i][j],
                                             at.first + Engine::row(i), begin + Engine::column(j),
                                             begin + Engine::pair(j), Engine::column(j), shift[i],
                                             minus[i]);
    } else {
#pragma unroll
      for (int i = 0; i < Engine::kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j)
          grad_scores[i][j] = (grad_scores[i][j] - minus[i]) *
                              weight_again<Engine, false>(fmaf(weights[i][j], scale, -shift[i]));
      if (!limits.sees_all(warp_first, Engine::kWarpRows, begin, Engine::kColumns)) {
#pragma unroll
        for (int i = 0; i < Engine::kThreadRows; ++i) {
          const int seen = min(limits.keys, at.first + Engine::row(i) + limits.reach) - begin;
#pragma unroll
          for (int j = 0; j < Engine::kThreadColumns; ++j)
            if (Engine::column(j) >= seen) grad_scores[i][j] = 0;
        }
      }
    }
    Engine::add(sums, grad_scores, key_tile, scratch);
  }

  cp_async_wait<0>();
  float scales[Engine::kThreadRows];
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) scales[i] = p.scale;
  const Place again = place(block_index_anew());
  const Sequence sequence = sequence_of(p, again.batch);
  Engine::store(sums, scales, query_tile,
                matrix_of<T>(p.grad_query, again.batch, again.head, sequence.query_begin,
                             sequence.query_length),
                again.first, p.head_dim);
}

// ---- launchers ---------------------------------------------------------------------------------

// Both kernels: two tiles of rows, two stages of two tiles of columns, and for the keys' kernel
// logsumexp and delta of both stages.
template <class Engine>
size_t shared_bytes(bool numbers) {
  return (2 * Engine::RowTile::kElements + 4 * Engine::ColumnTile::kElements) *
             sizeof(typename Engine::Type) +
         (numbers ? 4 * Engine::kColumns * sizeof(float) : 0) + Engine::kScratch;
}

template <class T>
void backward(const AttentionParameters& p, cudaStream_t stream) {
  if (p.query_length != 0)
    cuda::launch(delta_kernel<T>,
                 grid_of({p.batch, p.heads, blocks_of(p.query_length, kDeltaRows)}), kDeltaThreads,
                 0, stream, p);
  choose_variant(p, [&](auto variant) {
    constexpr bool general = decltype(variant)::value;
    if (p.key_length != 0)
      TilesOf<T, general>::Keys::choose(p, [&](auto tiles) {
        using Engine = typename decltype(tiles)::Engine;
        constexpr bool split = decltype(tiles)::kSplit;
        const unsigned grid =
            grid_of({p.batch, p.kv_heads, blocks_of(p.key_length, Engine::kRows), split ? 2 : 1});
        cuda::launch(key_value_kernel<Engine, split, general>, grid, Engine::kThreads,
                     shared_bytes<Engine>(true), stream, p);
      });
    if (p.query_length != 0)
      TilesOf<T, general>::Queries::choose(p, [&](auto tiles) {
        using Engine = typename decltype(tiles)::Engine;
        const unsigned grid = grid_of({p.batch, p.heads, blocks_of(p.query_length, Engine::kRows)});
        cuda::launch(query_kernel<Engine, general>, grid, Engine::kThreads,
                     shared_bytes<Engine>(false), stream, p);
      });
  });
}

}  // namespace

void attention_backward_cuda(const AttentionParameters& p, cudaStream_t stream) {
  check_lengths(p);
  if (p.batch * p.heads != 0) switch (p.type) {
      case AttentionType::float32:
        backward<float>(p, stream);
        break;
      case AttentionType::bfloat16:
        backward<__nv_bfloat16>(p, stream);
        break;
      case AttentionType::float16:
        backward<__half>(p, stream);
        break;
    }
  if (p.grad_mask.type != MaskType::none) attention_mask_gradient_cuda(p, stream);
}

}  // namespace lmengine
