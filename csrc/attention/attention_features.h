// What the CUDA kernels of attention do with the products of queries and keys: which keys a query
// sees, and what a mask, ALiBi, a softcap and dropout make of a score.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "attention/attention_device.h"
#include "attention/dropout.h"
#include "attention/sequence.h"

namespace lmengine::attention {

// ---- the place of a block ----------------------------------------------------------------------

// Which head and which rows a block has. The grid is one-dimensional: batch * heads may exceed
// what the others hold.
struct Place {
  int batch, head, first;
};

template <int rows>
__device__ __forceinline__ Place place_of_block(unsigned block_index, int64_t heads, int64_t length,
                                                bool last_first) {
  const unsigned blocks = static_cast<unsigned>((length + rows - 1) / rows);
  const unsigned index = block_index / blocks, block = block_index % blocks;
  const unsigned head_count = static_cast<unsigned>(heads);
  return {static_cast<int>(index / head_count), static_cast<int>(index % head_count),
          static_cast<int>(last_first ? blocks - 1 - block : block) * rows};
}

#ifdef LMENGINE_HOST_EMULATION
inline unsigned block_index_anew() { return blockIdx.x; }
#else
// The block's index, of which the compiler does not know that it had it before: what is computed
// from it at the end of a kernel takes no registers during the loop.
__device__ __forceinline__ unsigned block_index_anew() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
#endif

// The number of blocks of a grid, whose factors may be large.
inline unsigned grid_of(std::initializer_list<int64_t> factors) {
  int64_t blocks = 1;
  for (const int64_t factor : factors) {
    if (factor != 0 && blocks > 2147483647 / factor)
      throw std::runtime_error("lmengine: query, key: batch * heads * length is too large");
    blocks *= factor;
  }
  return static_cast<unsigned>(blocks);
}

inline int64_t blocks_of(int64_t length, int rows) { return (length + rows - 1) / rows; }

inline void check_lengths(const AttentionParameters& p) {
  if (p.query_length > (1 << 30) || p.key_length > (1 << 30))
    throw std::runtime_error("lmengine: query, key: expected a length of at most 2^30");
}

// Rows of one head of a sequence that begins at row `begin` of the tensor.
template <class T>
__device__ __forceinline__ Matrix<T> matrix_of(const AttentionTensor& tensor, int64_t batch,
                                               int64_t head, int64_t begin, int64_t length) {
  return {static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride +
              begin * tensor.row_stride,
          tensor.row_stride, static_cast<int>(length)};
}

__device__ __forceinline__ int kv_head_of(const AttentionParameters& p, int head) {
  return head / static_cast<int>(p.heads / p.kv_heads);
}

// The rows of keys that a sequence has, with those behind its key length.
__device__ __forceinline__ int64_t key_rows_of(const AttentionParameters& p, int64_t batch) {
  return p.cu_key != nullptr ? p.cu_key[batch + 1] - p.cu_key[batch] : p.key_length;
}

// The index in logsumexp of the first query of a head and sequence.
__device__ __forceinline__ int64_t logsumexp_of(const AttentionParameters& p, int batch, int head,
                                                int query_begin) {
  if (p.cu_query != nullptr) return query_begin + head * p.query_rows;
  return (batch * p.heads + head) * p.query_length;
}

// ---- which keys a query sees -------------------------------------------------------------------

__device__ __forceinline__ int clamped(int64_t x, int64_t low, int64_t high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

// Sequence in 32 bits: a query sees the keys [query + floor, query + reach) and those before
// `prefix`, as far as there are keys. Without `general` there is neither a floor nor a prefix.
template <bool general>
struct Limits {
  int queries, keys, reach, floor, prefix, offset;

  __device__ __forceinline__ explicit Limits(const Sequence& s)
      : queries(static_cast<int>(s.query_length)),
        keys(static_cast<int>(s.key_length)),
        reach(clamped(s.offset + s.right + 1, -s.query_length, s.key_length)),
        floor(general ? clamped(s.offset - s.left, -s.query_length, s.key_length) : 0),
        prefix(general ? clamped(s.prefix, 0, s.key_length) : 0),
        offset(static_cast<int>(s.offset)) {}

  __device__ __forceinline__ bool sees(int query, int key) const {
    if constexpr (!general) return key < min(keys, query + reach);
    return key < prefix || (key >= query + floor && key < min(keys, query + reach));
  }

  // Of all pairs of `rows` queries and `columns` keys.
  __device__ __forceinline__ bool sees_none(int query, int rows, int key, int columns) const {
    const bool beyond = key >= min(keys, query + rows - 1 + reach);
    if constexpr (!general) return beyond;
    return key >= prefix && (beyond || key + columns <= query + floor);
  }
  __device__ __forceinline__ bool sees_all(int query, int rows, int key, int columns) const {
    const bool within = key + columns <= min(keys, query + reach);
    if constexpr (!general) return within;
    return key + columns <= prefix || (within && key >= query + rows - 1 + floor);
  }
};

// The blocks of keys that some queries see: those of the prefix, then those of the window.
template <bool general, int columns>
struct KeyBlocks {
  int prefix = 0, skipped = 0, count;

  __device__ __forceinline__ KeyBlocks(const Sequence& s, const Limits<general>& limits, int first,
                                       int rows) {
    if constexpr (!general) {
      count = max(0, min(limits.keys, first + rows - 1 + limits.reach) + columns - 1) / columns;
    } else {
      const KeyRange band = band_of(s, first, min(rows, limits.queries - first));
      prefix = (limits.prefix + columns - 1) / columns;
      const int begin = max(static_cast<int>(band.begin / columns), prefix);
      const int end = static_cast<int>((band.end + columns - 1) / columns);
      skipped = begin - prefix;
      count = prefix + (band.end > band.begin ? max(0, end - begin) : 0);
    }
  }
  __device__ __forceinline__ int begin(int block) const {
    if constexpr (!general) return block * columns;
    return (block < prefix ? block : block + skipped) * columns;
  }
};

// ---- what becomes of a score -------------------------------------------------------------------

// The exponent's unit before the running maximum is taken off, and what the difference is
// multiplied by. 16-bit types fold log2(e) into the scale. A score with a mask may be the smallest
// float, which a factor would make infinite.
template <class Engine, bool general>
constexpr float kBefore = general ? 1 : Engine::kBefore;
template <class Engine, bool general>
constexpr float kAfter = general ? kLog2E : Engine::kAfter;

// exp2((score - shift) * kAfter), both in units of kBefore, and never more than 1: a score of 1e8
// that is computed again may exceed the logsumexp by many units.
template <class Engine, bool general>
__device__ __forceinline__ float weight_again(float score_minus_shift) {
  return Engine::exp2(bounded_by_zero(score_minus_shift) * kAfter<Engine, general>);
}

// What the backward subtracts from a score: the logsumexp, or infinity where no key is seen.
__device__ __forceinline__ float shift_of(float logsumexp, float unit) {
  return logsumexp == -INFINITY ? INFINITY : logsumexp * unit;
}

__device__ __forceinline__ uint32_t word_of(const Words& words, int index) {
  const uint32_t low = index & 1 ? words.word[1] : words.word[0];
  const uint32_t high = index & 1 ? words.word[3] : words.word[2];
  return index & 2 ? high : low;
}

// All of attention.h's features, for one head.
template <class T>
struct Features {
  const AttentionParameters& p;
  const Limits<true>& limits;
  const void* mask = nullptr;
  float slope = 0, inverse_softcap, factor = 1;
  uint64_t seed = 0;
  uint32_t index, threshold = 0;

  __device__ __forceinline__ Features(const AttentionParameters& p, const Limits<true>& limits,
                                      int batch, int head)
      : p(p),
        limits(limits),
        inverse_softcap(1 / p.softcap),
        index(static_cast<uint32_t>(batch * static_cast<int>(p.heads) + head)) {
    const int64_t begin = batch * p.mask.batch_stride + head * p.mask.head_stride;
    const int64_t size = p.mask.type == MaskType::boolean   ? 1
                         : p.mask.type == MaskType::float32 ? 4
                                                            : sizeof(T);
    if (p.mask.type != MaskType::none)
      mask = static_cast<const unsigned char*>(p.mask.data) + begin * size;
    if (p.alibi_slopes != nullptr) slope = p.alibi_slopes[batch * p.alibi_batch_stride + head];
    if (p.seed != nullptr) {
      seed = static_cast<uint64_t>(*p.seed);
      threshold = dropout_threshold(p.dropout_p);
      factor = dropout_factor(p.dropout_p);
    }
  }

  // What the mask adds to a score.
  __device__ __forceinline__ float mask_at(int query, int key) const {
    if (query >= limits.queries || key >= limits.keys) return 0;
    const int64_t at = query * p.mask.row_stride + key * p.mask.column_stride;
    if (p.mask.type == MaskType::boolean)
      return static_cast<const unsigned char*>(mask)[at] ? 0 : -INFINITY;
    if (p.mask.type == MaskType::float32) return static_cast<const float*>(mask)[at];
    return static_cast<float>(static_cast<const T*>(mask)[at]);
  }

  // The score of a product; `slope_of_softcap` is its derivative by the score before.
  __device__ __forceinline__ float score(float product, int query, int key,
                                         float& slope_of_softcap) const {
    float score = rounded_product(product, p.scale);
    slope_of_softcap = 1;
    if (p.softcap != 0) {
      const float t = tanhf(score * inverse_softcap);
      score = p.softcap * t;
      slope_of_softcap = 1 - t * t;
    }
    if (mask != nullptr) score += mask_at(query, key);
    if (p.alibi_slopes != nullptr)
      score -= slope * fabsf(static_cast<float>(key - query - limits.offset));
    return limits.sees(query, key) ? score : -INFINITY;
  }

  // Whether dropout keeps a weight. `first` is a key of the same block of four whose place among
  // the keys the compiler knows to be that of its neighbour's, so that it computes one for both.
  __device__ __forceinline__ bool keeps(int query, int first, int key_in_block) const {
    const Words words =
        philox(seed, static_cast<uint32_t>(first) / 4, static_cast<uint32_t>(query), index);
    return word_of(words, key_in_block) >= threshold;
  }

  // A weight and the gradient of its score, out of both products. `weight` becomes what the value
  // is multiplied by, but for `factor`; `grad` the gradient of the product times p.scale; the
  // result is the gradient of the mask.
  template <class Engine>
  __device__ __forceinline__ float backward(float& weight, float& grad, int query, int key,
                                            int first, int key_in_block, float shift,
                                            float delta) const {
    float slope_of_softcap;
    const float score = this->score(weight, query, key, slope_of_softcap);
    const float now = weight_again<Engine, true>(score - shift);
    const bool kept = p.seed == nullptr || keeps(query, first, key_in_block);
    weight = kept ? now : 0;
    // a product with a value of infinity counts for nothing where the key is not seen
    const float grad_score = score == -INFINITY ? 0 : now * ((kept ? grad * factor : 0) - delta);
    grad = grad_score * slope_of_softcap;
    return grad_score;
  }
};

struct NoFeatures {};

template <bool general, class T>
__device__ __forceinline__ auto features_of(const AttentionParameters& p,
                                            const Limits<general>& limits, int batch, int head) {
  if constexpr (general)
    return Features<T>(p, limits, batch, head);
  else
    return NoFeatures{};
}

}  // namespace lmengine::attention
