// Attention's forward on the GPU. A block has some queries of one head and goes over the keys and
// values, whose tiles alternate in a ring of shared memory (Dao 2023, FlashAttention-2).
#include "attention/attention_cuda.h"
#include "attention/attention_features.h"
#include "attention/attention_tiles.h"

namespace lmengine {
namespace {

using namespace attention;

// While one tile of the ring is used the others are under way.
template <class Engine, int ring, bool general>
__global__ void __launch_bounds__(Engine::kThreads, 1) forward_kernel(AttentionParameters p) {
  using T = typename Engine::Type;
  using ColumnTile = typename Engine::ColumnTile;
  LMENGINE_SHARED_MEMORY(shared);
  T* query_tile = reinterpret_cast<T*>(shared);
  T* tiles = query_tile + Engine::RowTile::kElements;
  unsigned char* scratch = reinterpret_cast<unsigned char*>(tiles + ring * ColumnTile::kElements);

  // under the causal mask the last queries have the most work: they come first
  const auto place = [&](unsigned index) {
    return place_of_block<Engine::kRows>(index, p.heads, p.query_length,
                                         p.window_right >= 0 && p.window_left < 0);
  };
  const Place at = place(blockIdx.x);
  const Sequence s = sequence_of(p, at.batch);
  if (at.first >= s.query_length) return;
  const Limits<general> limits(s);
  const int kv_head = kv_head_of(p, at.head);
  const auto query = matrix_of<T>(p.query, at.batch, at.head, s.query_begin, s.query_length);
  const auto key = matrix_of<T>(p.key, at.batch, kv_head, s.key_begin, s.key_length);
  const auto value = matrix_of<T>(p.value, at.batch, kv_head, s.key_begin, s.key_length);
  const KeyBlocks<general, Engine::kColumns> blocks(s, limits, at.first, Engine::kRows);
  const int steps = 2 * blocks.count;

  const auto load = [&](int step) {
    if (step < steps)
      ColumnTile::template load<Engine::kThreads>(tiles + step % ring * ColumnTile::kElements,
                                                  step % 2 ? value : key, blocks.begin(step / 2),
                                                  step % 2 ? p.value_dim : p.head_dim);
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

  constexpr float unit = kBefore<Engine, general>, after = kAfter<Engine, general>;
  const float scale = p.scale * unit;
  float sums[Engine::kThreadRows][Engine::kThreadDims] = {};
  float largest[Engine::kThreadRows], total[Engine::kThreadRows];  // total: this lane's part
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) largest[i] = -INFINITY, total[i] = 0;
  const int warp_first = at.first + Engine::first_row();  // the warp's first query

  for (int block = 0; block < blocks.count; ++block) {
    const int begin = blocks.begin(block);
    const T* key_tile = next_tile();
    // the warp's queries may see none of these keys; the barriers it keeps to nevertheless
    const bool sees = !limits.sees_none(warp_first, Engine::kWarpRows, begin, Engine::kColumns);
    float weights[Engine::kThreadRows][Engine::kThreadColumns];
    if (sees) {
      Engine::products(weights, rows, key_tile);
      [[maybe_unused]] const auto features = features_of<general, T>(p, limits, at.batch, at.head);
#pragma unroll
      for (int i = 0; i < Engine::kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j) {
          if constexpr (general) {
            float unused;
            weights[i][j] = features.score(weights[i][j], at.first + Engine::row(i),
                                           begin + Engine::column(j), unused);
          } else {
            weights[i][j] = rounded_product(weights[i][j], scale);
          }
        }
      if (!general && !limits.sees_all(warp_first, Engine::kWarpRows, begin, Engine::kColumns)) {
#pragma unroll
        for (int i = 0; i < Engine::kThreadRows; ++i) {
          const int seen = min(limits.keys, at.first + Engine::row(i) + limits.reach) - begin;
#pragma unroll
          for (int j = 0; j < Engine::kThreadColumns; ++j)
            if (Engine::column(j) >= seen) weights[i][j] = -INFINITY;
        }
      }
#pragma unroll
      for (int i = 0; i < Engine::kThreadRows; ++i) {
        float now = largest[i];
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j) now = fmaxf(now, weights[i][j]);
        now = largest_of_row<Engine>(now);
        const float shift = now == -INFINITY ? 0 : now;
        const float factor = Engine::exp2((largest[i] - shift) * after);
        largest[i] = now;
        total[i] *= factor;
#pragma unroll
        for (int j = 0; j < Engine::kThreadColumns; ++j) {
          weights[i][j] = Engine::exp2((weights[i][j] - shift) * after);
          total[i] += weights[i][j];
        }
#pragma unroll
        for (int j = 0; j < Engine::kThreadDims; ++j) sums[i][j] *= factor;
      }
      if constexpr (general)
        if (p.seed != nullptr) {
#pragma unroll
          for (int i = 0; i < Engine::kThreadRows; ++i)
#pragma unroll
            for (int j = 0; j < Engine::kThreadColumns; ++j)
              if (!features.keeps(at.first + Engine::row(i), begin + Engine::pair(j),
                                  Engine::column(j)))
                weights[i][j] = 0;
        }
    }
    const T* value_tile = next_tile();
    if (sees) Engine::add(sums, weights, value_tile, scratch);
  }

  const Place again = place(block_index_anew());
  const Sequence sequence = sequence_of(p, again.batch);
  const auto output =
      matrix_of<T>(p.output, again.batch, again.head, sequence.query_begin, sequence.query_length);
  float* logsumexp = p.logsumexp + sequence.logsumexp + again.head * sequence.logsumexp_head;
  float inverse[Engine::kThreadRows];
  const float factor = general && p.seed != nullptr ? dropout_factor(p.dropout_p) : 1;
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i) {
    const float sum = sum_over_row<Engine>(total[i]);
    inverse[i] = sum == 0 ? 0 : factor / sum;  // a query without keys: 0, and -infinity
    const int row = again.first + Engine::row(i);
    if (threadIdx.x % Engine::kLanes == 0 && row < output.length)
      logsumexp[row] = sum == 0 ? -INFINITY : largest[i] / unit + logf(sum);
  }
  cp_async_wait<0>();
  Engine::store(sums, inverse, query_tile, output, again.first, p.value_dim);
}

template <class T>
void forward(const AttentionParameters& p, cudaStream_t stream) {
  choose_variant(p, [&](auto variant) {
    constexpr bool general = decltype(variant)::value;
    TilesOf<T, general>::Forward::choose(p, [&](auto tiles) {
      using Tiles = decltype(tiles);
      using Engine = typename Tiles::Engine;
      const size_t shared =
          (Engine::RowTile::kElements + Tiles::kRing * Engine::ColumnTile::kElements) * sizeof(T) +
          Engine::kScratch;
      const unsigned grid = grid_of({p.batch, p.heads, blocks_of(p.query_length, Engine::kRows)});
      cuda::launch(forward_kernel<Engine, Tiles::kRing, general>, grid, Engine::kThreads, shared,
                   stream, p);
    });
  });
}

}  // namespace

void attention_forward_cuda(const AttentionParameters& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.query_length == 0) return;
  check_lengths(p);
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
