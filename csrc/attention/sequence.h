// Which keys a query sees, for host and device: the arithmetic of attention.h's masks.
#pragma once

#include "attention/attention.h"

#ifdef __CUDACC__
#define LMENGINE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LMENGINE_HOST_DEVICE inline
#endif

namespace lmengine::attention {

// One sequence of the batch.
struct Sequence {
  int64_t query_begin, key_begin;    // the first row in the tensors, 0 unless packed
  int64_t query_length, key_length;  // its own
  int64_t offset;                    // a query's position minus its index
  int64_t prefix;                    // keys that every query sees
  int64_t left, right;               // of the window, non-negative
  int64_t logsumexp;                 // index of its first query in logsumexp, for head 0
  int64_t logsumexp_head;            // between the heads of logsumexp
};

constexpr int64_t kUnlimited = int64_t{1} << 40;

LMENGINE_HOST_DEVICE Sequence sequence_of(const AttentionParameters& p, int64_t batch) {
  Sequence s;
  if (p.cu_query != nullptr) {
    s.query_begin = p.cu_query[batch], s.key_begin = p.cu_key[batch];
    s.query_length = p.cu_query[batch + 1] - s.query_begin;
    s.key_length = p.cu_key[batch + 1] - s.key_begin;
    s.logsumexp = s.query_begin, s.logsumexp_head = p.query_rows;
  } else {
    s.query_begin = s.key_begin = 0;
    s.query_length = p.query_length, s.key_length = p.key_length;
    s.logsumexp = batch * p.heads * p.query_length, s.logsumexp_head = p.query_length;
  }
  if (p.key_lengths != nullptr) {
    const int64_t length = p.key_lengths[batch];
    s.key_length = length < s.key_length ? (length > 0 ? length : 0) : s.key_length;
  }
  s.offset = p.bottom_right ? s.key_length - s.query_length : 0;
  s.prefix = p.prefix_lengths != nullptr ? p.prefix_lengths[batch] : 0;
  s.left = p.window_left < 0 ? kUnlimited : p.window_left;
  s.right = p.window_right < 0 ? kUnlimited : p.window_right;
  return s;
}

// The keys [begin, end) outside of the prefix that queries [first, first + count) see at all.
struct KeyRange {
  int64_t begin, end;
};

LMENGINE_HOST_DEVICE KeyRange band_of(const Sequence& s, int64_t first, int64_t count) {
  const int64_t begin = first + s.offset - s.left, end = first + count + s.offset + s.right;
  KeyRange range{begin > 0 ? begin : 0, end < s.key_length ? end : s.key_length};
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// The same with the prefix: between them may lie keys that none of the queries sees.
LMENGINE_HOST_DEVICE KeyRange keys_of(const Sequence& s, int64_t first, int64_t count) {
  KeyRange range = band_of(s, first, count);
  if (s.prefix > 0) {
    const int64_t prefix = s.prefix < s.key_length ? s.prefix : s.key_length;
    range = {0, range.begin < range.end && range.end > prefix ? range.end : prefix};
  }
  return range;
}

// The queries [begin, end) that see any of the keys [first, first + count).
LMENGINE_HOST_DEVICE KeyRange queries_of(const Sequence& s, int64_t first, int64_t count) {
  if (first >= s.key_length) return {0, 0};
  if (first < s.prefix) return {0, s.query_length};
  const int64_t begin = first - s.offset - s.right, end = first + count - s.offset + s.left;
  KeyRange range{begin > 0 ? begin : 0, end < s.query_length ? end : s.query_length};
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

LMENGINE_HOST_DEVICE bool sees(const Sequence& s, int64_t query, int64_t key) {
  const int64_t distance = key - query - s.offset;
  return key < s.key_length && (key < s.prefix || (distance >= -s.left && distance <= s.right));
}

// What a block of queries and keys is, before a boolean mask.
enum class Visibility { none, all, some };

LMENGINE_HOST_DEVICE Visibility visibility(const Sequence& s, int64_t query, int64_t queries,
                                           int64_t key, int64_t keys) {
  const int64_t last_query = query + queries - 1, last_key = key + keys - 1;
  const KeyRange band = band_of(s, query, queries);
  if (key >= s.key_length) return Visibility::none;
  if (key >= s.prefix && (key >= band.end || last_key < band.begin)) return Visibility::none;
  const bool inside =
      last_key - query - s.offset <= s.right && key - last_query - s.offset >= -s.left;
  return last_key < s.key_length && (last_key < s.prefix || inside) ? Visibility::all
                                                                    : Visibility::some;
}

}  // namespace lmengine::attention
