// The gradient of attention's additive mask on the GPU: the gradient of the scores, summed over the
// dimensions that the mask broadcasts over. A block owns a tile of the mask and goes over all heads
// and tiles of scores that it was added to, in a fixed order: no atomics, results never vary.
#include "attention/attention_cuda.h"
#include "attention/attention_features.h"
#include "attention/attention_tiles.h"

namespace lmengine {
namespace {

using namespace attention;

// What a block goes over in one dimension: the one that it owns, or all.
struct Span {
  int begin, end;
};

// How many blocks there are in a dimension, and what one of them goes over.
inline int64_t owners(int64_t stride, int64_t count) { return stride == 0 ? 1 : count; }
__device__ __forceinline__ Span span_of(int64_t stride, int64_t count, unsigned& rest) {
  if (stride == 0) return {0, static_cast<int>(count)};
  const int own = static_cast<int>(rest % static_cast<unsigned>(count));
  rest /= static_cast<unsigned>(count);
  return {own, own + 1};
}

// Sums `tile` (rows, columns + 1) over the dimensions that are one, and writes it.
template <int threads, int rows, int columns>
__device__ __forceinline__ void write_sums(const float* tile, const AttentionMask& to, int64_t row,
                                           int64_t column, int64_t all_rows, int64_t all_columns,
                                           float* out) {
  const int height = to.row_stride == 0 ? 1 : rows, width = to.column_stride == 0 ? 1 : columns;
  const int along_rows = to.row_stride == 0 ? rows : 1;
  const int along_columns = to.column_stride == 0 ? columns : 1;
  for (int index = threadIdx.x; index < height * width; index += threads) {
    const int r = index / width, c = index % width;
    if ((to.row_stride != 0 && row + r >= all_rows) ||
        (to.column_stride != 0 && column + c >= all_columns))
      continue;
    float sum = 0;
    for (int i = 0; i < along_rows; ++i)
      for (int j = 0; j < along_columns; ++j) sum += tile[(r + i) * (columns + 1) + c + j];
    out[(row + r) * to.row_stride + (column + c) * to.column_stride] = sum;
  }
}

template <class Engine>
__global__ void __launch_bounds__(Engine::kThreads, 1) mask_kernel(AttentionParameters p) {
  using T = typename Engine::Type;
  using RowTile = typename Engine::RowTile;
  using ColumnTile = typename Engine::ColumnTile;
  constexpr int kRows = Engine::kRows, kColumns = Engine::kColumns, kThreads = Engine::kThreads;
  LMENGINE_SHARED_MEMORY(shared);
  T* query_tile = reinterpret_cast<T*>(shared);
  T* grad_tile = query_tile + RowTile::kElements;
  T* key_tile = grad_tile + RowTile::kElements;
  T* value_tile = key_tile + ColumnTile::kElements;

  const AttentionMask& to = p.grad_mask;
  unsigned rest = blockIdx.x;
  const Span column_tiles =
      span_of(to.column_stride, (p.key_length + kColumns - 1) / kColumns, rest);
  const Span row_tiles = span_of(to.row_stride, (p.query_length + kRows - 1) / kRows, rest);
  const Span heads = span_of(to.head_stride, p.heads, rest);
  const Span batches = span_of(to.batch_stride, p.batch, rest);

  float sums[Engine::kThreadRows][Engine::kThreadColumns] = {};
  for (int batch = batches.begin; batch < batches.end; ++batch) {
    const Sequence s = sequence_of(p, batch);
    const Limits<true> limits(s);
    for (int head = heads.begin; head < heads.end; ++head) {
      const int kv_head = kv_head_of(p, head);
      const auto query = matrix_of<T>(p.query, batch, head, 0, s.query_length);
      const auto key = matrix_of<T>(p.key, batch, kv_head, 0, s.key_length);
      const auto value = matrix_of<T>(p.value, batch, kv_head, 0, s.key_length);
      const auto grad_output = matrix_of<T>(p.grad_output, batch, head, 0, s.query_length);
      const Features<T> features(p, limits, batch, head);
      for (int row_tile = row_tiles.begin; row_tile < row_tiles.end; ++row_tile) {
        const int first = row_tile * kRows;
        const auto unseen = [&](int column_tile) {
          return limits.sees_none(first, kRows, column_tile * kColumns, kColumns);
        };
        bool loaded = false;
        float shift[Engine::kThreadRows], minus[Engine::kThreadRows];
        for (int column_tile = column_tiles.begin; column_tile < column_tiles.end; ++column_tile) {
          if (unseen(column_tile)) continue;
          const int begin = column_tile * kColumns;
          __syncthreads();  // nobody uses the tiles any more
          if (!loaded) {
            RowTile::template load<kThreads>(query_tile, query, first, p.head_dim);
            RowTile::template load<kThreads>(grad_tile, grad_output, first, p.value_dim);
#pragma unroll
            for (int i = 0; i < Engine::kThreadRows; ++i) {
              const int row = first + Engine::row(i);
              const bool valid = row < s.query_length;
              const int64_t index = s.logsumexp + head * s.logsumexp_head + row;
              shift[i] = valid ? shift_of(p.logsumexp[index], 1) : INFINITY;
              minus[i] = valid ? p.delta[index] : 0;
            }
            loaded = true;
          }
          ColumnTile::template load<kThreads>(key_tile, key, begin, p.head_dim);
          ColumnTile::template load<kThreads>(value_tile, value, begin, p.value_dim);
          cp_async_commit();
          cp_async_wait<0>();
          __syncthreads();
          const typename Engine::Rows queries(query_tile), grads(grad_tile);
          float weights[Engine::kThreadRows][Engine::kThreadColumns];
          float grad_scores[Engine::kThreadRows][Engine::kThreadColumns];
          Engine::products(weights, queries, key_tile);
          Engine::products(grad_scores, grads, value_tile);
#pragma unroll
          for (int i = 0; i < Engine::kThreadRows; ++i)
#pragma unroll
            for (int j = 0; j < Engine::kThreadColumns; ++j)
              sums[i][j] += features.template backward<Engine>(
                  weights[i][j], grad_scores[i][j], first + Engine::row(i),
                  begin + Engine::column(j), begin + Engine::pair(j), Engine::column(j), shift[i],
                  minus[i]);
        }
      }
    }
  }

  float* tile = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Engine::kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < Engine::kThreadColumns; ++j)
      tile[Engine::row(i) * (kColumns + 1) + Engine::column(j)] = sums[i][j];
  __syncthreads();
  float* out =
      static_cast<float*>(to.data) + batches.begin * to.batch_stride + heads.begin * to.head_stride;
  write_sums<kThreads, kRows, kColumns>(tile, to, row_tiles.begin * kRows,
                                        column_tiles.begin * kColumns, p.query_length, p.key_length,
                                        out);
}

template <class T>
void mask_gradient(const AttentionParameters& p, cudaStream_t stream) {
  TilesOf<T, true>::Queries::choose(p, [&](auto tiles) {
    using Engine = typename decltype(tiles)::Engine;
    const AttentionMask& to = p.grad_mask;
    const unsigned grid =
        grid_of({owners(to.column_stride, blocks_of(p.key_length, Engine::kColumns)),
                 owners(to.row_stride, blocks_of(p.query_length, Engine::kRows)),
                 owners(to.head_stride, p.heads), owners(to.batch_stride, p.batch)});
    if (grid == 0) return;
    const size_t tiles_bytes =
        2 * (Engine::RowTile::kElements + Engine::ColumnTile::kElements) * sizeof(T);
    const size_t sums_bytes = Engine::kRows * (Engine::kColumns + 1) * sizeof(float);
    cuda::launch(mask_kernel<Engine>, grid, Engine::kThreads, std::max(tiles_bytes, sums_bytes),
                 stream, p);
  });
}

}  // namespace

void attention_mask_gradient_cuda(const AttentionParameters& p, cudaStream_t stream) {
  switch (p.type) {
    case AttentionType::float32:
      return mask_gradient<float>(p, stream);
    case AttentionType::bfloat16:
      return mask_gradient<__nv_bfloat16>(p, stream);
    case AttentionType::float16:
      return mask_gradient<__half>(p, stream);
  }
}

}  // namespace lmengine
