// Attention's forward on the GPU. A block has some queries of one head and goes over the keys and
// values, whose tiles alternate in a ring of shared memory (Dao 2023, FlashAttention-2).
#include "attention/attention_cuda.h"
#include "attention/attention_device.h"

namespace lmengine {
namespace {

using namespace attention;

// `ring`: how many tiles of keys and values there are. While one is used the others are under way.
template <class Engine, int ring>
__global__ void __launch_bounds__(Engine::kThreads) forward_kernel(AttentionParameters p) {
  using T = typename Engine::Type;
  using ColumnTile = typename Engine::ColumnTile;
  LMENGINE_SHARED_MEMORY(shared);
  T* query_tile = reinterpret_cast<T*>(shared);
  T* tiles = query_tile + Engine::RowTile::kElements;
  unsigned char* scratch = reinterpret_cast<unsigned char*>(tiles + ring * ColumnTile::kElements);

  // under the causal mask the last queries have the most work: they come first
  const Place at = place_of_block<Engine::kRows>(p, p.query_length, p.is_causal);
  const auto query = matrix_of<T>(p.query, at.batch, at.head, p.query_length);
  const auto key = matrix_of<T>(p.key, at.batch, at.head, p.key_length);
  const auto value = matrix_of<T>(p.value, at.batch, at.head, p.key_length);
  const int end = p.is_causal ? min(key.length, at.first + Engine::kRows) : key.length;
  const int steps = 2 * ((end + Engine::kColumns - 1) / Engine::kColumns);

  const auto load = [&](int step) {
    if (step < steps)
      ColumnTile::template load<Engine::kThreads>(tiles + step % ring * ColumnTile::kElements,
                                                  step % 2 ? value : key,
                                                  step / 2 * Engine::kColumns, p.head_dim);
    cp_async_commit();
  };
  int step = 0;
  const auto next_tile = [&]() -> const T* {
    cp_async_wait<ring - 2>();
    __syncthreads();  // the tile is here, and nobody uses the one before any more
    load(step + ring - 1);
    return tiles + step++ % ring * ColumnTile::kElements;
  };

  Engine::RowTile::template load<Engine::kThreads>(query_tile, query, at.first, p.head_dim);
#pragma unroll
  for (int i = 0; i < ring - 1; ++i) load(i);
  cp_async_wait<ring - 2>();
  __syncthreads();
  const typename Engine::Rows rows(query_tile);

  const float scale = p.scale * Engine::kBefore;
  float sums[Engine::kThreadRows][Engine::kThreadDims] = {};
  float largest[Engine::kThreadRows], total[Engine::kThreadRows];  // total: this lane's part
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) largest[i] = -INFINITY, total[i] = 0;
  const int warp_first = at.first + Engine::first_row();  // the warp's first query

  for (int begin = 0; begin < end; begin += Engine::kColumns) {
    const T* key_tile = next_tile();
    // the warp's queries may all come before these keys; the barriers it keeps to nevertheless
    const bool sees = !p.is_causal || begin < warp_first + Engine::kWarpRows;
    const bool masked = begin + Engine::kColumns > key.length ||
                        (p.is_causal && begin + Engine::kColumns > warp_first + 1);
    float weights[Engine::kThreadRows][Engine::kThreadColumns];
    if (sees) {
      Engine::products(weights, rows, key_tile);
#pragma unroll
      for (int i = 0; i < Engine::kThreadRows; ++i) {
        const int seen =
            (p.is_causal ? min(key.length, at.first + Engine::row(i) + 1) : key.length) - begin;
        float now = largest[i];
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j) {
          weights[i][j] = rounded_product(weights[i][j], scale);
          if (masked && Engine::column(j) >= seen) weights[i][j] = -INFINITY;
          now = fmaxf(now, weights[i][j]);
        }
        now = largest_of_row<Engine>(now);
        const float shift = now == -INFINITY ? 0 : now;
        const float factor = Engine::exp2((largest[i] - shift) * Engine::kAfter);
        largest[i] = now;
        total[i] *= factor;
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j) {
          weights[i][j] = Engine::exp2((weights[i][j] - shift) * Engine::kAfter);
          total[i] += weights[i][j];
        }
#pragma unroll
        for (int j = 0; j < Engine::kThreadDims; ++j) sums[i][j] *= factor;
      }
    }
    const T* value_tile = next_tile();
    if (sees) Engine::add(sums, weights, value_tile, scratch);
  }

  float inverse[Engine::kThreadRows];
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) {
    const float sum = sum_over_row<Engine>(total[i]);
    inverse[i] = sum == 0 ? 0 : 1 / sum;  // a query without keys: 0, and -infinity
    const int row = at.first + Engine::row(i);
    if (threadIdx.x % Engine::kLanes == 0 && row < query.length)
      p.logsumexp[at.index * p.query_length + row] =
          sum == 0 ? -INFINITY : largest[i] / Engine::kBefore + logf(sum);
  }
  cp_async_wait<0>();
  Engine::store(sums, inverse, query_tile,
                matrix_of<T>(p.output, at.batch, at.head, p.query_length), at.first, p.head_dim);
}

template <class Engine, int ring>
void launch_forward(const AttentionParameters& p, cudaStream_t stream) {
  const size_t shared = (Engine::RowTile::kElements + ring * Engine::ColumnTile::kElements) *
                            sizeof(typename Engine::Type) +
                        Engine::kScratch;
  cuda::launch(forward_kernel<Engine, ring>, blocks_for(p, p.query_length, Engine::kRows),
               Engine::kThreads, shared, stream, p);
}

// 32 queries a warp, so that a tile is read from shared memory half as often. Where their
// accumulators leave no room the queries themselves are read again for each tile of keys.
template <class T>
void forward(const AttentionParameters& p, cudaStream_t stream) {
  if (p.head_dim <= 32) return launch_forward<MatrixEngine<T, 32, 2, 64, true>, 4>(p, stream);
  if (p.head_dim <= 64) return launch_forward<MatrixEngine<T, 64, 2, 64, true>, 4>(p, stream);
  if (p.head_dim <= 96) return launch_forward<MatrixEngine<T, 96, 2, 48, false>, 3>(p, stream);
  return launch_forward<MatrixEngine<T, 128, 2, 32, false>, 4>(p, stream);
}

template <>
void forward<float>(const AttentionParameters& p, cudaStream_t stream) {
  if (p.head_dim <= 32) return launch_forward<ScalarEngine<32, 64>, 3>(p, stream);
  if (p.head_dim <= 64) return launch_forward<ScalarEngine<64, 64>, 3>(p, stream);
  if (p.head_dim <= 96) return launch_forward<ScalarEngine<96, 32>, 2>(p, stream);
  return launch_forward<ScalarEngine<128, 32>, 2>(p, stream);
}

}  // namespace

void attention_forward_cuda(const AttentionParameters& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.query_length == 0) return;
  switch (p.type) {
    case AttentionType::float32:
      return forward<float>(p, stream);
    case AttentionType::bfloat16:
      return forward<__nv_bfloat16>(p, stream);
    case AttentionType::float16:
      return forward<__half>(p, stream);
  }
}

}  // namespace lmengine
