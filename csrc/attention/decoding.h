// Decoding: the last queries of each sequence against a cache of its keys and values. The
// arithmetic of a score is attention.h's; query i of Q has position length - Q + i and sees the
// keys from position - window_left to itself.
//
// The keys that a sequence's queries see are cut into splits, whose partial results (largest score,
// sum of weights, weighted sum of values) are combined in a fixed order. Where the cuts are
// depends on the sequence's own length, on kv_heads and num_splits, never on the batch.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "attention/sequence.h"

namespace lmengine {

struct DecodingParameters {
  AttentionTensor query, output;       // (batch, heads, queries, dim)
  AttentionTensor new_key, new_value;  // (batch, kv_heads, queries, dim); null: append nothing
  AttentionTensor key_cache,
      value_cache;  // batch_stride: from sequence to sequence, or page to page
  const int32_t* cache_lengths = nullptr;  // (batch), before appending
  const int32_t* block_table = nullptr;    // (batch, max_blocks); null: not paged
  int64_t max_blocks = 0, blocks = 0,
          page_size = 0;  // entries of a sequence, pages, keys of a page
  const void *rotary_cos = nullptr, *rotary_sin = nullptr;  // (positions, rotary_dim / 2)
  bool rotary_float32 = false, rotary_interleaved = false;  // else of the query's type
  int64_t rotary_positions = 0;
  int rotary_dim = 0;
  const float* alibi_slopes = nullptr;  // (heads), or (batch, heads) with the batch's stride
  int64_t alibi_batch_stride = 0;
  float* logsumexp = nullptr;     // (batch, heads, queries)
  void* rotated_query = nullptr;  // workspace of the GPU, laid out as a contiguous query; or null
  float* partials = nullptr;      // workspace of the GPU: partial_floats()
  int64_t batch = 0, heads = 0, kv_heads = 0;  // head h has key head h / (heads / kv_heads)
  int64_t queries = 0, capacity = 0;           // capacity: keys that a sequence has room for
  int head_dim = 0, value_dim = 0;
  int64_t window_left = -1, num_splits = 0;  // negative: unlimited; 0: chosen by the length
  float scale = 1, softcap = 0;
  AttentionType type = AttentionType::float32;
};

namespace decoding {

constexpr int64_t kStep = 64;               // cuts are at its multiples
constexpr int64_t kSmallestSplit = 128;     // keys, on a GPU
constexpr int64_t kSmallestSplitCpu = 512;  // keys: enough for what a task costs by itself
constexpr int64_t kWantedSplits = 512;      // over all key heads of a sequence

// The keys [begin, end) that any query of a sequence sees, and where they are cut: split s has
// those from first + s * size on.
struct Splits {
  int64_t begin, end, first, size, count;
};

LMENGINE_HOST_DEVICE int64_t split_count(int64_t keys, int64_t size) {
  return (keys + size - 1) / size;
}

// Keys of a split of so many keys.
LMENGINE_HOST_DEVICE int64_t split_size(int64_t keys, int64_t kv_heads, int64_t num_splits,
                                        int64_t smallest) {
  if (num_splits > 0) {
    const int64_t size = (keys + num_splits - 1) / num_splits;
    return size <= kStep ? kStep : (size + kStep - 1) / kStep * kStep;
  }
  int64_t size = smallest;
  while (size < keys && split_count(keys, size) * kv_heads > kWantedSplits) size *= 2;
  return size;
}

// The splits of a sequence of `length` keys in all. Keys that the cache has no room for do not
// count.
LMENGINE_HOST_DEVICE Splits splits_of(const DecodingParameters& p, int64_t length,
                                      int64_t smallest = kSmallestSplit) {
  Splits s;
  const int64_t begin = p.window_left < 0 ? 0 : length - p.queries - p.window_left;
  s.begin = begin > 0 ? begin : 0, s.end = length < p.capacity ? length : p.capacity;
  s.first = s.begin / kStep * kStep;
  s.size = split_size(s.end - s.first, p.kv_heads, p.num_splits, smallest);
  s.count = s.end > s.begin ? split_count(s.end - s.first, s.size) : 0;
  return s;
}

// The most splits that a sequence can have: what the workspace and the grid are made for.
inline int64_t most_splits(const DecodingParameters& p) {
  int64_t keys = p.capacity;
  if (p.window_left >= 0 && p.window_left + p.queries + kStep < keys)
    keys = p.window_left + p.queries + kStep;
  const int64_t finest = split_count(keys, p.num_splits > 0 ? kStep : kSmallestSplit);
  int64_t most = p.num_splits;
  if (most == 0) most = p.kv_heads > kWantedSplits ? 1 : kWantedSplits / p.kv_heads;
  return most < finest ? most : finest;
}

// Floats of the GPU's workspace: of each row and split the weighted sum of values, the largest
// score and the sum of weights.
inline int64_t partial_floats(const DecodingParameters& p) {
  const int64_t most = most_splits(p);
  return most <= 1 ? 0 : p.batch * p.heads * p.queries * most * (p.value_dim + 2);
}

// Where key `key` of a sequence lies: which sequence or page of the cache, and which of its rows.
struct Place {
  int64_t block, row;
};

LMENGINE_HOST_DEVICE Place place_of(const DecodingParameters& p, int64_t batch, int64_t key) {
  if (p.block_table == nullptr) return {batch, key};
  return {p.block_table[batch * p.max_blocks + key / p.page_size], key % p.page_size};
}

}  // namespace decoding
}  // namespace lmengine
