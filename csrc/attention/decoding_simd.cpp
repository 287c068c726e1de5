// Decoding on the CPU. It is bound by memory: keys and values are read once, in blocks that stay in
// the cache, for all queries of the heads that share them. A task is one split of a key head; who
// finishes the last split of a key head folds them.
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "attention/decoding.h"
#include "support/instruction_set.h"
#include "support/parallel.h"
#include "support/scratch.h"
#include "support/simd.h"

LMENGINE_DECLARE_KERNEL(attention_decode, DecodingParameters)

namespace lmengine::LMENGINE_ISA {
namespace {

using decoding::Splits;

constexpr int kKeys = 64;  // of a block
constexpr int kW = Vec::width;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class T>
T* row_of(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + head * t.head_stride +
         row * t.row_stride;
}

template <class T>
T* row_of_cache(const DecodingParameters& p, const AttentionTensor& cache, int64_t batch,
                int64_t head, int64_t key) {
  const decoding::Place at = decoding::place_of(p, batch, key);
  return row_of<T>(cache, at.block, head, at.row);
}

template <class T>
void widen(const T* from, int count, float* to) {
  int d = 0;
  for (; d + kW <= count; d += kW) Vec::load(from + d).store(to + d);
  if (d < count) Vec::load(from + d, count - d).store(to + d, count - d);
}

template <class T>
void narrow(const float* from, Vec factor, int count, T* to) {
  int d = 0;
  for (; d + kW <= count; d += kW) (Vec::load(from + d) * factor).store(to + d);
  if (d < count) (Vec::load(from + d, count - d) * factor).store(to + d, count - d);
}

// ---- rotary position embedding -----------------------------------------------------------------

// Widens a row of head_dim elements and turns its pairs by the position's angles. `work` has room
// for rotary_dim floats. A position before the first is that of a query that sees nothing.
template <class T>
void rotated_row(const DecodingParameters& p, const T* from, int64_t position, float* work,
                 float* to) {
  widen(from, p.head_dim, to);
  if (p.rotary_dim == 0 || position < 0) return;
  const int half = p.rotary_dim / 2;
  float *cos = work, *sin = work + half;
  if (p.rotary_float32) {
    widen(static_cast<const float*>(p.rotary_cos) + position * half, half, cos);
    widen(static_cast<const float*>(p.rotary_sin) + position * half, half, sin);
  } else {
    widen(static_cast<const T*>(p.rotary_cos) + position * half, half, cos);
    widen(static_cast<const T*>(p.rotary_sin) + position * half, half, sin);
  }
  const int step = p.rotary_interleaved ? 2 : 1, apart = p.rotary_interleaved ? 1 : half;
  for (int j = 0; j < half; ++j) {
    float &first = to[j * step], &second = to[j * step + apart];
    const float x = first, y = second;
    first = x * cos[j] - y * sin[j];
    second = y * cos[j] + x * sin[j];
  }
}

// Writes the new keys and values into the cache.
template <class T>
void append(const DecodingParameters& p) {
  parallel_for(0, p.batch * p.kv_heads * p.queries, 32, [&](int64_t first, int64_t last) {
    std::vector<float> row(p.head_dim + p.rotary_dim);
    for (int64_t task = first; task < last; ++task) {
      const int64_t i = task % p.queries, head = task / p.queries % p.kv_heads;
      const int64_t batch = task / p.queries / p.kv_heads;
      const int64_t position = p.cache_lengths[batch] + i;
      const T* key = row_of<T>(p.new_key, batch, head, i);
      T* key_to = row_of_cache<T>(p, p.key_cache, batch, head, position);
      if (p.rotary_dim == 0) {
        std::memcpy(key_to, key, p.head_dim * sizeof(T));
      } else {
        rotated_row(p, key, position, row.data() + p.head_dim, row.data());
        narrow(row.data(), Vec::set(1), p.head_dim, key_to);
      }
      std::memcpy(row_of_cache<T>(p, p.value_cache, batch, head, position),
                  row_of<T>(p.new_value, batch, head, i), p.value_dim * sizeof(T));
    }
  });
}

// ---- scores ------------------------------------------------------------------------------------

// How a query's element meets a key's: `kStep` of them at a time.
template <class T>
struct Product {
  using Query = float;
  static constexpr int kStep = kW;
  static Vec add(Vec sum, const T* key, const float* query) {
    return fma(Vec::load(key), Vec::load(query), sum);
  }
  static Vec add(Vec sum, const T* key, int count, const float* query) {
    return fma(Vec::load(key, count), Vec::load(query), sum);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Product<bf16> {
  using Query = bf16;
  static constexpr int kStep = 32;
  static Vec add(Vec sum, const bf16* key, const bf16* query) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_loadu_si512(key),
                             (__m512bh)_mm512_loadu_si512(query))};
  }
  static Vec add(Vec sum, const bf16* key, int count, const bf16* query) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_maskz_loadu_epi16(mask, key),
                             (__m512bh)_mm512_loadu_si512(query))};
  }
};
#endif

// Products of `rows` queries with `keys` keys, rows * keys == kW: lane row * keys + key.
template <class T, int rows, int keys>
inline Vec products(const T* const* key, const typename Product<T>::Query* query, int64_t padded,
                    int dim) {
  using P = Product<T>;
  Vec sums[kW];
#pragma GCC unroll 16
  for (int i = 0; i < kW; ++i) sums[i] = Vec::zero();
  int d = 0;
  for (; d + P::kStep <= dim; d += P::kStep)
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int k = 0; k < keys; ++k)
        sums[r * keys + k] = P::add(sums[r * keys + k], key[k] + d, query + r * padded + d);
  if (d < dim)
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int k = 0; k < keys; ++k)
        sums[r * keys + k] =
            P::add(sums[r * keys + k], key[k] + d, dim - d, query + r * padded + d);
  return sums_of(sums);
}

// Asks for rows that are read soon: what the processor guesses by itself ends with each page.
template <class T>
inline void prefetch_rows(const T* const* row, int count, int dim) {
  for (int k = 0; k < count; ++k)
    for (int64_t at = 0; at < dim; at += 64 / sizeof(T))
      _mm_prefetch(reinterpret_cast<const char*>(row[k] + at), _MM_HINT_T0);
}

// Products of `rows` queries with a block's keys, to rows of kKeys scores. key[count] and what
// follows up to a multiple of kW are rows that may be read. Where `value` is given, asks for the
// block's values, and for the next block's keys, which are at key + kKeys.
template <class T, int rows>
void score_rows(const T* const* key, int count, const typename Product<T>::Query* query,
                int64_t padded, int dim, float* scores, const T* const* value, int value_dim) {
  constexpr int keys = kW / rows;
  for (int k = 0; k < count; k += keys) {
    float found[kW];
    if (value != nullptr) {
      const int some = count - k < keys ? count - k : keys;
      prefetch_rows(value + k, some, value_dim);
      prefetch_rows(key + k + kKeys, some, dim);
    }
    products<T, rows, keys>(key + k, query, padded, dim).store(found);
    for (int r = 0; r < rows; ++r)
      std::memcpy(scores + r * kKeys + k, found + r * keys, keys * sizeof(float));
  }
}

// ---- values ------------------------------------------------------------------------------------

// sums (rows, vectors * kW at a stride) = sums * factor + weights (rows, count) values (count, ...)
template <class T, int rows, int vectors, bool whole>
inline void add_values(const T* const* value, int count, int at, int left, const float* weights,
                       const float* factor, float* sums, int64_t stride) {
  Vec sum[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      sum[r][v] = Vec::load(sums + r * stride + at + v * kW) * Vec::set(factor[r]);
  for (int k = 0; k < count; ++k) {
    Vec row[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      row[v] = whole ? Vec::load(value[k] + at + v * kW) : Vec::load(value[k] + at, left);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec weight = Vec::set(weights[r * kKeys + k]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(weight, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v].store(sums + r * stride + at + v * kW);
}

template <class T, int rows>
void value_rows(const T* const* value, int count, int dim, const float* weights,
                const float* factor, float* sums, int64_t stride) {
  constexpr int most = rows == 4 ? (kW == 16 ? 4 : 2) : rows == 2 ? 4 : 8;
  int at = 0;
  for (; at + most * kW <= dim; at += most * kW)
    add_values<T, rows, most, true>(value, count, at, 0, weights, factor, sums, stride);
  if constexpr (most > 4)
    for (; at + 4 * kW <= dim; at += 4 * kW)
      add_values<T, rows, 4, true>(value, count, at, 0, weights, factor, sums, stride);
  for (; at + kW <= dim; at += kW)
    add_values<T, rows, 1, true>(value, count, at, 0, weights, factor, sums, stride);
  if (at < dim)
    add_values<T, rows, 1, false>(value, count, at, dim - at, weights, factor, sums, stride);
}

// Calls body(integral_constant rows, first) for pieces of 4, 2 and 1 rows.
template <class Body>
inline void for_rows(int64_t rows, Body&& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(std::integral_constant<int, 4>(), r);
  for (; r + 2 <= rows; r += 2) body(std::integral_constant<int, 2>(), r);
  if (r < rows) body(std::integral_constant<int, 1>(), r);
}

// ---- a split -----------------------------------------------------------------------------------

// The partial result of a row: padded sums, then the largest score and the weights' sum.
struct Layout {
  int64_t rows, padded_key, padded_value, partial;
  explicit Layout(const DecodingParameters& p)
      : rows(p.heads / p.kv_heads * p.queries),
        padded_key(round_up(p.head_dim, 32)),
        padded_value(round_up(p.value_dim, kW)),
        partial(padded_value + kW) {}
  // floats that a task works on
  int64_t work(const DecodingParameters& p) const {
    return rows * (padded_key + kKeys + 1) + padded_key + p.rotary_dim + kW;
  }
};

// Turns a row of products into weights; returns the factor of what was summed before.
float weigh(const DecodingParameters& p, float slope, int64_t position, int64_t begin, int count,
            float* scores, float& largest, float& total) {
  const int width = static_cast<int>(round_up(count, kW));
  const int64_t last = position - begin;
  const int64_t before = p.window_left < 0 ? 0 : position - p.window_left - begin;
  const Vec scale = Vec::set(p.scale), cap = Vec::set(p.softcap);
  const Vec inverse = Vec::set(p.softcap > 0 ? 1 / p.softcap : 0);
  const bool plain = p.softcap == 0 && slope == 0;
  float ramp[kW];
  for (int j = 0; j < kW; ++j) ramp[j] = static_cast<float>(j);
  for (int j = 0; j < width; j += kW) {
    Vec score = Vec::load(scores + j) * scale;
    if (!plain) {
      if (p.softcap > 0) score = cap * tanh(score * inverse);
      const Vec distance = Vec::set(static_cast<float>(last - j)) - Vec::load(ramp);
      score = fnma(Vec::set(slope), max(distance, Vec::zero() - distance), score);
    }
    score.store(scores + j);
  }
  const int seen = static_cast<int>(last < count - 1 ? (last < -1 ? 0 : last + 1) : count);
  for (int j = seen; j < width; ++j) scores[j] = -INFINITY;
  for (int j = 0; j < before && j < width; ++j) scores[j] = -INFINITY;
  Vec most = Vec::set(-INFINITY);
  for (int j = 0; j < width; j += kW) most = max(Vec::load(scores + j), most);
  const float found = most.largest(), now = found > largest ? found : largest;
  const float shift = now == -INFINITY ? 0 : now;
  Vec sum = Vec::zero();
  for (int j = 0; j < width; j += kW) {
    const Vec weight = exp(Vec::load(scores + j) - Vec::set(shift));
    weight.store(scores + j);
    sum = sum + weight;
  }
  const float factor = now == largest ? 1 : std::exp(largest - shift);
  total = total * factor + sum.sum();
  largest = now;
  return factor;
}

template <class T>
void run_split(const DecodingParameters& p, const Layout& layout, const Splits& splits,
               int64_t batch, int64_t kv_head, int64_t split, float* work, float* partials) {
  using Query = typename Product<T>::Query;
  const int64_t length = splits.end, rows = layout.rows, group = p.heads / p.kv_heads;
  float* scores = work;
  float* factors = scores + rows * kKeys;
  Query* queries = reinterpret_cast<Query*>(factors + round_up(rows, kW));
  float* turned = reinterpret_cast<float*>(queries + rows * layout.padded_key);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = r % p.queries;
    const T* query = row_of<T>(p.query, batch, kv_head * group + r / p.queries, i);
    Query* to = queries + r * layout.padded_key;
    std::memset(to, 0, layout.padded_key * sizeof(Query));
    if (std::is_same_v<T, Query> && p.rotary_dim == 0) {
      std::memcpy(to, query, p.head_dim * sizeof(T));
    } else {
      rotated_row(p, query, length - p.queries + i, turned + layout.padded_key, turned);
      narrow(turned, Vec::set(1), p.head_dim, to);
    }
    float* sums = partials + r * layout.partial;
    std::memset(sums, 0, layout.partial * sizeof(float));
    sums[layout.padded_value] = -INFINITY;
  }
  const int64_t start = splits.first + split * splits.size;
  const int64_t end = start + splits.size < length ? start + splits.size : length;
  for (int64_t begin = start > splits.begin ? start : splits.begin; begin < end; begin += kKeys) {
    const int count = static_cast<int>(end - begin < kKeys ? end - begin : kKeys);
    const T *key[2 * kKeys], *value[kKeys];
    for (int k = 0; k < count; ++k) {
      key[k] = row_of_cache<T>(p, p.key_cache, batch, kv_head, begin + k);
      value[k] = row_of_cache<T>(p, p.value_cache, batch, kv_head, begin + k);
    }
    // one row a key leaves little arithmetic: asking ahead helps where rows are so short that the
    // processor's own guesses are, and what is asked for is not in its caches anyway
    const int64_t row_bytes = (p.head_dim + p.value_dim) * sizeof(T);
    const bool ahead =
        rows > 1 || (row_bytes <= 512 && p.batch * p.kv_heads * length * row_bytes > (32 << 20));
    for (int64_t k = 0; k < count && ahead; ++k) {
      const int64_t next = begin + kKeys + k;
      key[kKeys + k] = row_of_cache<T>(p, p.key_cache, batch, kv_head, next < end ? next : end - 1);
    }
    for (int k = count; k < round_up(count, kW); ++k) key[k] = key[count - 1];
    for_rows(rows, [&](auto piece, int64_t r) {
      score_rows<T, piece()>(key, count, queries + r * layout.padded_key, layout.padded_key,
                             p.head_dim, scores + r * kKeys, ahead && r == 0 ? value : nullptr,
                             p.value_dim);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = kv_head * group + r / p.queries;
      const float slope =
          p.alibi_slopes == nullptr ? 0 : p.alibi_slopes[batch * p.alibi_batch_stride + head];
      float* state = partials + r * layout.partial + layout.padded_value;
      factors[r] = weigh(p, slope, length - p.queries + r % p.queries, begin, count,
                         scores + r * kKeys, state[0], state[1]);
    }
    for_rows(rows, [&](auto piece, int64_t r) {
      value_rows<T, piece()>(value, count, p.value_dim, scores + r * kKeys, factors + r,
                             partials + r * layout.partial, layout.partial);
    });
  }
}

// Folds a row's partial results, `step` floats apart, into the first and writes the output.
template <class T>
void finish_row(const DecodingParameters& p, const Layout& layout, float* partial, int64_t count,
                int64_t step, T* output, float* logsumexp) {
  float &largest = partial[layout.padded_value], &total = partial[layout.padded_value + 1];
  for (int64_t s = 1; s < count; ++s) {
    const float* other = partial + s * step;
    const float more = other[layout.padded_value];
    const float now = more > largest ? more : largest, shift = now == -INFINITY ? 0 : now;
    const float mine = std::exp(largest - shift), theirs = std::exp(more - shift);
    for (int64_t d = 0; d < layout.padded_value; d += kW)
      fma(Vec::load(other + d), Vec::set(theirs), Vec::load(partial + d) * Vec::set(mine))
          .store(partial + d);
    total = total * mine + other[layout.padded_value + 1] * theirs;
    largest = now;
  }
  narrow(partial, Vec::set(total == 0 ? 0 : 1 / total), p.value_dim, output);
  *logsumexp = total == 0 ? -INFINITY : largest + std::log(total);
}

template <class T>
void decode(const DecodingParameters& p) {
  if (p.new_key.data != nullptr) append<T>(p);
  const Layout layout(p);
  const int64_t added = p.new_key.data != nullptr ? p.queries : 0, group = p.heads / p.kv_heads;
  std::vector<Splits> splits(p.batch);
  std::vector<int64_t> first_task(p.batch + 1, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    splits[b] = decoding::splits_of(p, p.cache_lengths[b] + added, decoding::kSmallestSplitCpu);
    first_task[b + 1] = first_task[b] + splits[b].count * p.kv_heads;
  }
  const auto output = [&](int64_t batch, int64_t kv_head, int64_t r) {
    return row_of<T>(p.output, batch, kv_head * group + r / p.queries, r % p.queries);
  };
  const auto logsumexp = [&](int64_t batch, int64_t kv_head, int64_t r) {
    return p.logsumexp + (batch * p.heads + kv_head * group) * p.queries + r;
  };
  for (int64_t b = 0; b < p.batch; ++b)
    if (splits[b].count == 0)
      for (int64_t row = 0; row < p.kv_heads * layout.rows; ++row) {
        std::memset(output(b, row / layout.rows, row % layout.rows), 0, p.value_dim * sizeof(T));
        *logsumexp(b, row / layout.rows, row % layout.rows) = -INFINITY;
      }
  const int64_t tasks = first_task[p.batch];
  const int64_t of_task = layout.rows * layout.partial;
  const Scratch partials(tasks * of_task);
  std::vector<std::atomic<int64_t>> done(p.batch * p.kv_heads);
  parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const Scratch work(layout.work(p));
    int64_t b = 0;
    for (int64_t task = first; task < last; ++task) {
      while (task >= first_task[b + 1]) ++b;
      const int64_t kv_head = (task - first_task[b]) / splits[b].count;
      const int64_t split = (task - first_task[b]) % splits[b].count;
      run_split<T>(p, layout, splits[b], b, kv_head, split, work.data(),
                   partials.data() + task * of_task);
      if (done[b * p.kv_heads + kv_head].fetch_add(1, std::memory_order_acq_rel) + 1 <
          splits[b].count)
        continue;
      float* folded = partials.data() + (first_task[b] + kv_head * splits[b].count) * of_task;
      for (int64_t r = 0; r < layout.rows; ++r)
        finish_row<T>(p, layout, folded + r * layout.partial, splits[b].count, of_task,
                      output(b, kv_head, r), logsumexp(b, kv_head, r));
    }
  });
}

}  // namespace

void attention_decode(const DecodingParameters& p) {
  switch (p.type) {
    case AttentionType::float32:
      return decode<float>(p);
    case AttentionType::bfloat16:
      return decode<bf16>(p);
    case AttentionType::float16:
      return decode<fp16>(p);
  }
}

}  // namespace lmengine::LMENGINE_ISA
