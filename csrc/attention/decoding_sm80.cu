// Decoding on the GPU. A block has one split of a key head and some of the queries that share it,
// packed into the rows of one tile. Each of its warps streams keys and values of its own through a
// ring in shared memory, without barriers; at the end the warps' results are folded one after the
// other. A second kernel combines the splits (Flash-Decoding, Dao et al. 2023).
#include "attention/decoding_cuda.h"
#include "attention/decoding_device.h"

namespace lmengine {
namespace {

using namespace decoding;

// The sequence's keys after appending; a negative length counts as 0.
__device__ __forceinline__ int64_t length_of(const DecodingParameters& p, int64_t batch) {
  const int64_t cached = p.cache_lengths[batch];
  return (cached > 0 ? cached : 0) + (p.new_key.data != nullptr ? p.queries : 0);
}

template <class T>
__device__ __forceinline__ T* row_of(const AttentionTensor& t, int64_t batch, int64_t head,
                                     int64_t row) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + head * t.head_stride +
         row * t.row_stride;
}

__device__ __forceinline__ bool exists(const DecodingParameters& p, const Place& at) {
  return p.block_table == nullptr || (at.block >= 0 && at.block < p.blocks);
}

// ---- appending and rotating --------------------------------------------------------------------

// Copies a row with its pairs turned by the position's angles; a lane takes every 32nd element.
template <class T>
__device__ __forceinline__ void rotate_row(const DecodingParameters& p, const T* from,
                                           int64_t position, T* to) {
  const int half = p.rotary_dim / 2, lane = threadIdx.x % 32;
  const int step = p.rotary_interleaved ? 2 : 1, apart = p.rotary_interleaved ? 1 : half;
  for (int j = lane; j < half; j += 32) {
    float cos = NAN, sin = NAN;
    if (position < p.rotary_positions) {
      const int64_t at = position * half + j;
      cos = p.rotary_float32 ? static_cast<const float*>(p.rotary_cos)[at]
                             : to_float(static_cast<const T*>(p.rotary_cos)[at]);
      sin = p.rotary_float32 ? static_cast<const float*>(p.rotary_sin)[at]
                             : to_float(static_cast<const T*>(p.rotary_sin)[at]);
    }
    const float x = to_float(from[j * step]), y = to_float(from[j * step + apart]);
    to[j * step] = from_float<T>(x * cos - y * sin);
    to[j * step + apart] = from_float<T>(y * cos + x * sin);
  }
  for (int d = p.rotary_dim + lane; d < p.head_dim; d += 32) to[d] = from[d];
}

// A warp for each row: the queries, where they rotate, then the new keys, then the new values.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(DecodingParameters p, int64_t query_rows, int64_t new_rows) {
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row < query_rows) {
    const int64_t i = row % p.queries, head = row / p.queries % p.heads;
    const int64_t batch = row / p.queries / p.heads;
    const int64_t position = length_of(p, batch) - p.queries + i;
    rotate_row(p, row_of<T>(p.query, batch, head, i), position < 0 ? 0 : position,
               static_cast<T*>(p.rotated_query) + row * p.head_dim);
    return;
  }
  row -= query_rows;
  const bool is_key = row < new_rows;
  if (!is_key) row -= new_rows;
  if (row >= new_rows) return;
  const int64_t i = row % p.queries, head = row / p.queries % p.kv_heads;
  const int64_t batch = row / p.queries / p.kv_heads;
  const int64_t position = length_of(p, batch) - p.queries + i;
  if (position >= p.capacity) return;
  const Place at = place_of(p, batch, position);
  if (!exists(p, at)) return;
  if (is_key) {
    const T* from = row_of<T>(p.new_key, batch, head, i);
    rotate_row(p, from, position, row_of<T>(p.key_cache, at.block, head, at.row));
  } else {
    const T* from = row_of<T>(p.new_value, batch, head, i);
    T* to = row_of<T>(p.value_cache, at.block, head, at.row);
    for (int d = lane; d < p.value_dim; d += 32) to[d] = from[d];
  }
}

// ---- a split -----------------------------------------------------------------------------------

// A block's place in the grid: the split is the fastest, then the tile of rows.
struct Work {
  int64_t batch, kv_head, split;
  int first_row;  // of the rows that share the key head: query i of head h is row h * queries + i
};

template <int rows>
__device__ __forceinline__ Work work_of_block(const DecodingParameters& p, int most, int tiles) {
  unsigned index = blockIdx.x / most;
  const int tile = index % tiles;
  index /= tiles;
  return {index / p.kv_heads, index % p.kv_heads, blockIdx.x % most, tile * rows};
}

template <class Warp>
constexpr int kMergedRow = Warp::kDim + 8;  // keeps rows apart in the banks

template <class Warp, int ring>
constexpr size_t kSharedBytes =
    (Warp::RowTile::kElements + 2 * kWarps * ring * Warp::KeyTile::kElements) *
        sizeof(typename Warp::Type) +
    Warp::kRows * (kMergedRow<Warp> + 2) * sizeof(float);

// What both of two partial results with these largest scores are multiplied by.
struct Factors {
  float largest, mine, theirs;
};

template <class Warp>
__device__ __forceinline__ Factors factors_of(float mine, float theirs) {
  const float now = fmaxf(mine, theirs), shift = now == -INFINITY ? 0 : now;
  return {now, Warp::exp2((mine - shift) * kLog2E), Warp::exp2((theirs - shift) * kLog2E)};
}

template <class Warp, int ring>
__global__ void __launch_bounds__(kThreads)
    split_kernel(DecodingParameters p, int most, int tiles) {
  using T = typename Warp::Type;
  using KeyTile = typename Warp::KeyTile;
  constexpr int chunks = KeyTile::kChunks;
  LMENGINE_SHARED_MEMORY(shared);
  T* query_tile = reinterpret_cast<T*>(shared);
  T* own =
      query_tile + Warp::RowTile::kElements + threadIdx.x / 32 * (2 * ring * KeyTile::kElements);
  float* merged = reinterpret_cast<float*>(query_tile + Warp::RowTile::kElements +
                                           2 * kWarps * ring * KeyTile::kElements);
  float* merged_largest = merged + Warp::kRows * kMergedRow<Warp>;
  float* merged_total = merged_largest + Warp::kRows;

  const Work at = work_of_block<Warp::kRows>(p, most, tiles);
  const int64_t length = length_of(p, at.batch);
  const Splits splits = splits_of(p, length);
  if (at.split >= splits.count && at.split > 0) return;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int queries = static_cast<int>(p.queries), rows = group * queries;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // the queries: a group of copies of their own, before those of keys
  for (int index = threadIdx.x; index < Warp::kRows * chunks; index += kThreads) {
    const int row = index / chunks, chunk = index % chunks, r = at.first_row + row;
    const bool valid = r < rows && chunk * kChunk<T> < p.head_dim;
    const T* from = static_cast<const T*>(p.query.data);
    if (valid)
      from = row_of<T>(p.query, at.batch, at.kv_head * group + r / queries, r % queries) +
             chunk * kChunk<T>;
    cp_async_16(query_tile + Warp::RowTile::offset(row, chunk), from, valid);
  }
  cp_async_commit();

  // the warp's tiles: kWarpKeys keys from first_key + tile * kStep on
  const int64_t start = splits.first + at.split * splits.size;
  const int64_t end = start + splits.size < splits.end ? start + splits.size : splits.end;
  const int64_t first_key = start + warp * kWarpKeys;
  const int count = splits.count > 0 && end > first_key
                        ? static_cast<int>((end - first_key + kStep - 1) / kStep)
                        : 0;
  const auto seen_at_all = [&](int64_t key) { return key >= splits.begin && key < end; };
  const auto load = [&](int tile) {
    if (tile < count) {
      // lanes 0 to 15 find the rows of the keys, the others those of the values
      const AttentionTensor& cache = lane < kWarpKeys ? p.key_cache : p.value_cache;
      const int64_t key = first_key + tile * kStep + lane % kWarpKeys;
      int64_t found = -1;
      if (seen_at_all(key)) {
        const Place place = place_of(p, at.batch, key);
        if (exists(p, place))
          found = place.block * cache.batch_stride + at.kv_head * cache.head_stride +
                  place.row * cache.row_stride;
      }
      T* to = own + tile % ring * (2 * KeyTile::kElements);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const T* data = static_cast<const T*>(side == 0 ? p.key_cache.data : p.value_cache.data);
        const int dim = side == 0 ? p.head_dim : p.value_dim;
#pragma unroll
        for (int i = 0; i < kWarpKeys * chunks / 32; ++i) {
          const int index = i * 32 + lane, row = index / chunks, chunk = index % chunks;
          const int64_t offset = __shfl_sync(0xffffffff, found, side * kWarpKeys + row);
          const bool valid = offset >= 0 && chunk * kChunk<T> < dim;
          cp_async_16(to + side * KeyTile::kElements + KeyTile::offset(row, chunk),
                      valid ? data + offset + chunk * kChunk<T> : data, valid);
        }
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < ring - 1; ++i) load(i);
  cp_async_wait<ring - 1>();
  __syncthreads();
  const typename Warp::Rows query_rows(query_tile);

  float sums[Warp::kThreadRows][Warp::kThreadDims] = {};
  float largest[Warp::kThreadRows], total[Warp::kThreadRows];  // total: this lane's part
  float slope[Warp::kThreadRows];
  int64_t position[Warp::kThreadRows];
#pragma unroll
  for (int i = 0; i < Warp::kThreadRows; ++i) {
    largest[i] = -INFINITY, total[i] = 0, slope[i] = 0;
    const int r = at.first_row + Warp::row(i);
    position[i] = length - queries + r % queries;
    if (p.alibi_slopes != nullptr && r < rows)
      slope[i] = p.alibi_slopes[at.batch * p.alibi_batch_stride + at.kv_head * group + r / queries];
  }

  for (int tile = 0; tile < count; ++tile) {
    if constexpr (ring > 1) {
      cp_async_wait<ring - 2>();
      __syncwarp();  // the tile is here, and no lane uses the one before any more
      load(tile + ring - 1);
    } else {
      __syncwarp();
      load(tile);
      cp_async_wait<0>();
      __syncwarp();
    }
    const T* key_tile = own + tile % ring * (2 * KeyTile::kElements);
    const int64_t begin = first_key + tile * kStep;
    unsigned there = 0xffffffff;
    if (p.block_table != nullptr) {
      const int64_t key = begin + lane % kWarpKeys;
      there = __ballot_sync(0xffffffff, seen_at_all(key) && exists(p, place_of(p, at.batch, key)));
    }
    float weights[Warp::kThreadRows][Warp::kThreadKeys];
    Warp::products(weights, query_rows, key_tile);
#pragma unroll
    for (int i = 0; i < Warp::kThreadRows; ++i) {
      float now = largest[i];
#pragma unroll
      for (int j = 0; j < Warp::kThreadKeys; ++j) {
        const int64_t key = begin + Warp::key(j), distance = position[i] - key;
        float score = weights[i][j] * p.scale;
        if (p.softcap > 0) score = p.softcap * tanhf(score / p.softcap);
        score = fmaf(-slope[i], fabsf(static_cast<float>(distance)), score);
        const bool seen = seen_at_all(key) && distance >= 0 && (there >> Warp::key(j) & 1) &&
                          (p.window_left < 0 || distance <= p.window_left);
        weights[i][j] = seen ? score : -INFINITY;
        now = fmaxf(now, weights[i][j]);
      }
      now = largest_of_row<Warp>(now);
      const float shift = now == -INFINITY ? 0 : now;
      const float factor = Warp::exp2((largest[i] - shift) * kLog2E);
      largest[i] = now;
      total[i] *= factor;
#pragma unroll
      for (int j = 0; j < Warp::kThreadKeys; ++j) {
        weights[i][j] = Warp::exp2((weights[i][j] - shift) * kLog2E);
        total[i] += weights[i][j];
      }
#pragma unroll
      for (int j = 0; j < Warp::kThreadDims; ++j) sums[i][j] *= factor;
    }
    Warp::add(sums, weights, key_tile + KeyTile::kElements);
  }
  cp_async_wait<0>();

  // the warps' results, folded one after the other
#pragma unroll 1
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int i = 0; i < Warp::kThreadRows; ++i) {
        const int row = Warp::row(i);
        const float sum = sum_over_row<Warp>(total[i]);
        Factors f{largest[i], 1, 0};
        float before = 0;
        if (turn > 0) {
          f = factors_of<Warp>(largest[i], merged_largest[row]);
          before = merged_total[row];
        }
        __syncwarp();
        if (threadIdx.x % Warp::kLanes == 0) {
          merged_largest[row] = f.largest;
          merged_total[row] = turn > 0 ? fmaf(before, f.theirs, sum * f.mine) : sum;
        }
#pragma unroll
        for (int j = 0; j < Warp::kThreadDims; ++j) {
          float* to = merged + row * kMergedRow<Warp> + Warp::dim_of(j);
          *to = turn > 0 ? fmaf(*to, f.theirs, sums[i][j] * f.mine) : sums[i][j];
        }
      }
    }
    __syncthreads();
  }

  // one split: the output itself; more: a partial result
  const bool last = splits.count <= 1;
  const int quarters = p.value_dim / 4;
  for (int index = threadIdx.x; index < Warp::kRows * quarters; index += kThreads) {
    const int row = index / quarters, d = index % quarters * 4, r = at.first_row + row;
    if (r >= rows) break;
    const int64_t head = at.kv_head * group + r / queries;
    const int64_t flat = (at.batch * p.heads + at.kv_head * group) * queries + r;
    float4 x = *reinterpret_cast<const float4*>(merged + row * kMergedRow<Warp> + d);
    const float sum = merged_total[row];
    if (last) {
      const float inverse = sum == 0 ? 0 : 1 / sum;  // a query that sees no key: 0, and -infinity
      x = make_float4(x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse);
      store_4(row_of<T>(p.output, at.batch, head, r % queries) + d, x);
      if (d == 0) p.logsumexp[flat] = sum == 0 ? -INFINITY : merged_largest[row] + logf(sum);
    } else {
      store_4(p.partials + (flat * most + at.split) * p.value_dim + d, x);
      if (d == 0) {
        const int64_t all = p.batch * p.heads * p.queries * most;
        float* state = p.partials + all * p.value_dim + (flat * most + at.split) * 2;
        state[0] = merged_largest[row], state[1] = sum;
      }
    }
  }
}

// ---- combining the splits ----------------------------------------------------------------------

constexpr int kCombinedRow = 256 + 4;

// A block for each row: its warps take the splits in turn, each lane some of the dimensions.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(DecodingParameters p, int most) {
  LMENGINE_SHARED_MEMORY(shared);
  float* sums = reinterpret_cast<float*>(shared);  // of each warp: values, and the weights' sum
  const int64_t flat = blockIdx.x, batch = flat / (p.heads * p.queries);
  const int64_t count = splits_of(p, length_of(p, batch)).count;
  if (count <= 1) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* part = p.partials + flat * most * p.value_dim;
  const float* state =
      p.partials + p.batch * p.heads * p.queries * most * p.value_dim + flat * most * 2;
  float largest = -INFINITY;
  for (int64_t s = lane; s < count; s += 32) largest = fmaxf(largest, state[2 * s]);
#pragma unroll
  for (int step = 16; step; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step));
  const float shift = largest == -INFINITY ? 0 : largest;
  float sum[8] = {}, total = 0;
#pragma unroll 4
  for (int64_t s = warp; s < count; s += kWarps) {
    const float factor = exp2f((state[2 * s] - shift) * kLog2E);
    total = fmaf(state[2 * s + 1], factor, total);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j * 32 + lane < p.value_dim)
        sum[j] = fmaf(part[s * p.value_dim + j * 32 + lane], factor, sum[j]);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) sums[warp * kCombinedRow + j * 32 + lane] = sum[j];
  if (lane == 0) sums[warp * kCombinedRow + 256] = total;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w * kCombinedRow + 256];
  const float inverse = total == 0 ? 0 : 1 / total;
  T* output = row_of<T>(p.output, batch, flat / p.queries % p.heads, flat % p.queries);
  for (int d = threadIdx.x; d < p.value_dim; d += kThreads) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += sums[w * kCombinedRow + d];
    output[d] = from_float<T>(x * inverse);
  }
  if (threadIdx.x == 0) p.logsumexp[flat] = total == 0 ? -INFINITY : largest + logf(total);
}

// ---- launching ---------------------------------------------------------------------------------

// The number of blocks, which are numbered in one dimension of the grid.
unsigned checked_blocks(int64_t count, const char* what) {
  if (count > 2147483647)
    throw std::runtime_error(std::string("lmengine: query: ") + what + " exceed a grid's 2^31 - 1");
  return static_cast<unsigned>(count);
}

template <class Warp, int ring>
void launch_split(const DecodingParameters& p, int64_t most, cudaStream_t stream) {
  const int64_t rows = p.heads / p.kv_heads * p.queries;
  const int64_t tiles = (rows + Warp::kRows - 1) / Warp::kRows;
  const unsigned blocks = checked_blocks(p.batch * p.kv_heads * tiles * most, "the splits");
  cuda::launch(split_kernel<Warp, ring>, blocks, kThreads, kSharedBytes<Warp, ring>, stream, p,
               static_cast<int>(most), static_cast<int>(tiles));
}

// The ring is as long as one or two blocks on a multiprocessor of sm_80 allow; where it is 1 a
// warp's copies overlap with the other warps' arithmetic only.
template <class T>
void split(const DecodingParameters& p, int64_t most, cudaStream_t stream) {
  const int dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return launch_split<MatrixWarp<T, 64>, 4>(p, most, stream);
  if (dim <= 128) return launch_split<MatrixWarp<T, 128>, 2>(p, most, stream);
  return launch_split<MatrixWarp<T, 256>, 2>(p, most, stream);
}

template <>
void split<float>(const DecodingParameters& p, int64_t most, cudaStream_t stream) {
  const int dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return launch_split<ScalarWarp<64>, 2>(p, most, stream);
  if (dim <= 128) return launch_split<ScalarWarp<128>, 2>(p, most, stream);
  return launch_split<ScalarWarp<256>, 1>(p, most, stream);
}

template <class T>
void decode(DecodingParameters p, cudaStream_t stream) {
  const int64_t query_rows = p.rotated_query != nullptr ? p.batch * p.heads * p.queries : 0;
  const int64_t new_rows = p.new_key.data != nullptr ? p.batch * p.kv_heads * p.queries : 0;
  const int64_t prepared = (query_rows + 2 * new_rows + kWarps - 1) / kWarps;
  if (prepared > 0)
    cuda::launch(prepare_kernel<T>, checked_blocks(prepared, "the rows"), kThreads, 0, stream, p,
                 query_rows, new_rows);
  if (query_rows > 0) {
    const int64_t dim = p.head_dim;
    p.query = {p.rotated_query, p.heads * p.queries * dim, p.queries * dim, dim};
  }
  const int64_t most = most_splits(p) > 0 ? most_splits(p) : 1;
  split<T>(p, most, stream);
  if (most > 1)
    cuda::launch(combine_kernel<T>, checked_blocks(p.batch * p.heads * p.queries, "the rows"),
                 kThreads, kWarps * kCombinedRow * sizeof(float), stream, p,
                 static_cast<int>(most));
}

}  // namespace

void attention_decode_cuda(const DecodingParameters& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries == 0) return;
  switch (p.type) {
    case AttentionType::float32:
      return decode<float>(p, stream);
    case AttentionType::bfloat16:
      return decode<__nv_bfloat16>(p, stream);
    case AttentionType::float16:
      return decode<__half>(p, stream);
  }
}

}  // namespace lmengine
