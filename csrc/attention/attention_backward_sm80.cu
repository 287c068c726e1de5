// Attention's backward on the GPU: a kernel for delta, one with a block for some keys that gives
// the gradients of keys and values, and one with a block for some queries that gives theirs. The
// weights are computed again in each, so that no sum is made by atomics and results never vary.
//   delta = sum(grad_output * output)                            of a query
//   grad_scores = weights * (grad_output value^T - delta)
//   grad_value = weights^T grad_output, grad_key = scale * grad_scores^T query,
//   grad_query = scale * grad_scores key
#include "attention/attention_cuda.h"
#include "attention/attention_device.h"

namespace lmengine {
namespace {

using namespace attention;

// ---- delta -------------------------------------------------------------------------------------

constexpr int kDeltaThreads = 256, kDeltaRows = kDeltaThreads / 16;

// 16 lanes have a query.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(AttentionParameters p) {
  const Place at = place_of_block<kDeltaRows>(p, p.query_length, false);
  const int row = at.first + static_cast<int>(threadIdx.x) / 16;
  float sum = 0;
  if (row < p.query_length) {
    const auto output = matrix_of<T>(p.output, at.batch, at.head, p.query_length);
    const auto grad = matrix_of<T>(p.grad_output, at.batch, at.head, p.query_length);
    for (int d = threadIdx.x % 16 * kChunk<T>; d < p.head_dim; d += 16 * kChunk<T>) {
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
  if (threadIdx.x % 16 == 0 && row < p.query_length) {
    const int64_t index = at.index * p.query_length + row;
    p.delta[index] = p.grad_logsumexp == nullptr ? sum : sum - p.grad_logsumexp[index];
  }
}

// ---- keys and values ---------------------------------------------------------------------------

// Columns of the block's products are queries. Two stages: while one is used the next is under way.
template <class Engine>
__global__ void __launch_bounds__(Engine::kThreads) key_value_kernel(AttentionParameters p) {
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

  const Place at = place_of_block<Engine::kRows>(p, p.key_length, false);
  const auto query = matrix_of<T>(p.query, at.batch, at.head, p.query_length);
  const auto key = matrix_of<T>(p.key, at.batch, at.head, p.key_length);
  const auto value = matrix_of<T>(p.value, at.batch, at.head, p.key_length);
  const auto grad_output = matrix_of<T>(p.grad_output, at.batch, at.head, p.query_length);
  const float* logsumexp = p.logsumexp + at.index * p.query_length;
  const float* delta = p.delta + at.index * p.query_length;
  // under the causal mask the queries before the block's first key do not see it
  const int start = p.is_causal ? at.first / kQueries * kQueries : 0;

  const auto load = [&](int begin) {
    T* stage = stages + begin / kQueries % 2 * 2 * ColumnTile::kElements;
    if (begin < query.length) {
      ColumnTile::template load<Engine::kThreads>(stage, query, begin, p.head_dim);
      ColumnTile::template load<Engine::kThreads>(stage + ColumnTile::kElements, grad_output, begin,
                                                  p.head_dim);
    }
    cp_async_commit();
  };
  // logsumexp and delta of a query, by one thread each: read early, put down late
  const int thread = static_cast<int>(threadIdx.x);
  float next_logsumexp = INFINITY, next_delta = 0;
  const auto read_numbers = [&](int begin) {
    const bool valid = thread < kQueries && begin + thread < query.length;
    next_logsumexp = valid ? logsumexp[begin + thread] * Engine::kBefore : INFINITY;
    next_delta = valid ? delta[begin + thread] : 0;
  };
  const auto write_numbers = [&](int begin) {
    float* to = numbers + begin / kQueries % 2 * 2 * kQueries;
    if (thread < kQueries) to[thread] = next_logsumexp, to[kQueries + thread] = next_delta;
  };

  RowTile::template load<Engine::kThreads>(key_tile, key, at.first, p.head_dim);
  RowTile::template load<Engine::kThreads>(value_tile, value, at.first, p.head_dim);
  load(start);
  read_numbers(start);
  write_numbers(start);
  cp_async_wait<0>();
  __syncthreads();
  const typename Engine::Rows keys(key_tile), values(value_tile);

  const float scale = p.scale * Engine::kBefore;
  float grad_key[Engine::kThreadRows][Engine::kThreadDims] = {};
  float grad_value[Engine::kThreadRows][Engine::kThreadDims] = {};
  const int warp_last = at.first + Engine::first_row() + Engine::kWarpRows - 1;

  for (int begin = start; begin < query.length; begin += kQueries) {
    cp_async_wait<0>();
    __syncthreads();  // this stage is here, and nobody uses the other any more
    load(begin + kQueries);
    read_numbers(begin + kQueries);
    const T* query_tile = stages + begin / kQueries % 2 * 2 * ColumnTile::kElements;
    const T* grad_tile = query_tile + ColumnTile::kElements;
    const float* shift = numbers + begin / kQueries % 2 * 2 * kQueries;
    const float* minus = shift + kQueries;

    float weights[Engine::kThreadRows][Engine::kThreadColumns];
    Engine::products(weights, keys, query_tile);
    const bool masked = p.is_causal && begin < warp_last;
#pragma unroll
    for (int j = 0; j < Engine::kThreadColumns; ++j) {
      const int column = Engine::column(j);
#pragma unroll
      for (int i = 0; i < Engine::kThreadRows; ++i) {
        weights[i][j] = weight_again<Engine>(weights[i][j], scale, shift[column]);
        if (masked && at.first + Engine::row(i) > begin + column) weights[i][j] = 0;
      }
    }
    Engine::add(grad_value, weights, grad_tile, scratch);
    float grad_scores[Engine::kThreadRows][Engine::kThreadColumns];
    Engine::products(grad_scores, values, grad_tile);
#pragma unroll
    for (int j = 0; j < Engine::kThreadColumns; ++j)
#pragma unroll
      for (int i = 0; i < Engine::kThreadRows; ++i)
        grad_scores[i][j] = weights[i][j] * (grad_scores[i][j] - minus[Engine::column(j)]);
    Engine::add(grad_key, grad_scores, query_tile, scratch);
    write_numbers(begin + kQueries);
  }

  cp_async_wait<0>();
  float scales[Engine::kThreadRows], ones[Engine::kThreadRows];
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) scales[i] = p.scale, ones[i] = 1;
  Engine::store(grad_key, scales, key_tile,
                matrix_of<T>(p.grad_key, at.batch, at.head, p.key_length), at.first, p.head_dim);
  Engine::store(grad_value, ones, value_tile,
                matrix_of<T>(p.grad_value, at.batch, at.head, p.key_length), at.first, p.head_dim);
}

// ---- queries -----------------------------------------------------------------------------------

// Columns of the block's products are keys.
template <class Engine>
__global__ void __launch_bounds__(Engine::kThreads) query_kernel(AttentionParameters p) {
  using T = typename Engine::Type;
  using RowTile = typename Engine::RowTile;
  using ColumnTile = typename Engine::ColumnTile;
  LMENGINE_SHARED_MEMORY(shared);
  T* query_tile = reinterpret_cast<T*>(shared);
  T* grad_tile = query_tile + RowTile::kElements;
  T* stages = grad_tile + RowTile::kElements;  // of each the keys, then the values
  unsigned char* scratch = reinterpret_cast<unsigned char*>(stages + 4 * ColumnTile::kElements);

  const Place at = place_of_block<Engine::kRows>(p, p.query_length, p.is_causal);
  const auto query = matrix_of<T>(p.query, at.batch, at.head, p.query_length);
  const auto key = matrix_of<T>(p.key, at.batch, at.head, p.key_length);
  const auto value = matrix_of<T>(p.value, at.batch, at.head, p.key_length);
  const auto grad_output = matrix_of<T>(p.grad_output, at.batch, at.head, p.query_length);
  const int end = p.is_causal ? min(key.length, at.first + Engine::kRows) : key.length;

  const auto load = [&](int begin) {
    T* stage = stages + begin / Engine::kColumns % 2 * 2 * ColumnTile::kElements;
    if (begin < end) {
      ColumnTile::template load<Engine::kThreads>(stage, key, begin, p.head_dim);
      ColumnTile::template load<Engine::kThreads>(stage + ColumnTile::kElements, value, begin,
                                                  p.head_dim);
    }
    cp_async_commit();
  };
  RowTile::template load<Engine::kThreads>(query_tile, query, at.first, p.head_dim);
  RowTile::template load<Engine::kThreads>(grad_tile, grad_output, at.first, p.head_dim);
  load(0);
  const float scale = p.scale * Engine::kBefore;
  float shift[Engine::kThreadRows], minus[Engine::kThreadRows];
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) {
    const int row = at.first + Engine::row(i);
    const bool valid = row < query.length;
    const int64_t index = at.index * p.query_length + row;
    shift[i] = valid ? p.logsumexp[index] * Engine::kBefore : INFINITY;
    minus[i] = valid ? p.delta[index] : 0;
  }
  cp_async_wait<0>();
  __syncthreads();
  const typename Engine::Rows queries(query_tile), grads(grad_tile);

  float sums[Engine::kThreadRows][Engine::kThreadDims] = {};
  const int warp_first = at.first + Engine::first_row();
  for (int begin = 0; begin < end; begin += Engine::kColumns) {
    cp_async_wait<0>();
    __syncthreads();  // this stage is here, and nobody uses the other any more
    load(begin + Engine::kColumns);
    const T* key_tile = stages + begin / Engine::kColumns % 2 * 2 * ColumnTile::kElements;
    const T* value_tile = key_tile + ColumnTile::kElements;

    float weights[Engine::kThreadRows][Engine::kThreadColumns];
    float grad_scores[Engine::kThreadRows][Engine::kThreadColumns];
    Engine::products(weights, queries, key_tile);
    Engine::products(grad_scores, grads, value_tile);
    const bool masked = begin + Engine::kColumns > key.length ||
                        (p.is_causal && begin + Engine::kColumns > warp_first + 1);
#pragma unroll
    for (int i = 0; i < Engine::kThreadRows; ++i) {
      const int seen =
          (p.is_causal ? min(key.length, at.first + Engine::row(i) + 1) : key.length) - begin;
#pragma unroll
      for (int j = 0; j < Engine::kThreadColumns; ++j) {
        const float weight = weight_again<Engine>(weights[i][j], scale, shift[i]);
        grad_scores[i][j] =
            masked && Engine::column(j) >= seen ? 0 : weight * (grad_scores[i][j] - minus[i]);
      }
    }
    Engine::add(sums, grad_scores, key_tile, scratch);
  }

  cp_async_wait<0>();
  float scales[Engine::kThreadRows];
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) scales[i] = p.scale;
  Engine::store(sums, scales, query_tile,
                matrix_of<T>(p.grad_query, at.batch, at.head, p.query_length), at.first,
                p.head_dim);
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

template <class KeyEngine, class QueryEngine = KeyEngine>
void launch_backward(const AttentionParameters& p, cudaStream_t stream) {
  if (p.key_length != 0)
    cuda::launch(key_value_kernel<KeyEngine>, blocks_for(p, p.key_length, KeyEngine::kRows),
                 KeyEngine::kThreads, shared_bytes<KeyEngine>(true), stream, p);
  if (p.query_length != 0)
    cuda::launch(query_kernel<QueryEngine>, blocks_for(p, p.query_length, QueryEngine::kRows),
                 QueryEngine::kThreads, shared_bytes<QueryEngine>(false), stream, p);
}

template <class T>
void backward(const AttentionParameters& p, cudaStream_t stream) {
  if (p.query_length != 0)
    cuda::launch(delta_kernel<T>, blocks_for(p, p.query_length, kDeltaRows), kDeltaThreads, 0,
                 stream, p);
  if constexpr (std::is_same_v<T, float>) {
    if (p.head_dim <= 32) return launch_backward<ScalarEngine<32, 32>>(p, stream);
    if (p.head_dim <= 64) return launch_backward<ScalarEngine<64, 32>>(p, stream);
    if (p.head_dim <= 96) return launch_backward<ScalarEngine<96, 32>>(p, stream);
    return launch_backward<ScalarEngine<128, 32>>(p, stream);
  } else {
    // 32 rows a warp, which halves the reads of shared memory, where the registers suffice
    if (p.head_dim <= 32)
      return launch_backward<MatrixEngine<T, 32, 2, 32, true>, MatrixEngine<T, 32, 2, 64, true>>(
          p, stream);
    if (p.head_dim <= 64)
      return launch_backward<MatrixEngine<T, 64, 1, 64, true>, MatrixEngine<T, 64, 2, 32, true>>(
          p, stream);
    if (p.head_dim <= 96) return launch_backward<MatrixEngine<T, 96, 1, 32, false>>(p, stream);
    return launch_backward<MatrixEngine<T, 128, 1, 32, false>>(p, stream);
  }
}

}  // namespace

void attention_backward_cuda(const AttentionParameters& p, cudaStream_t stream) {
  if (p.batch * p.heads == 0) return;
  switch (p.type) {
    case AttentionType::float32:
      return backward<float>(p, stream);
    case AttentionType::bfloat16:
      return backward<__nv_bfloat16>(p, stream);
    case AttentionType::float16:
      return backward<__half>(p, stream);
  }
}

}  // namespace lmengine
