// Wraps decoding's CUDA launcher for runs on the CPU. Queries, new keys and values and the output
// are (batch, queries, heads, dim); a cache is (batch, keys, kv_heads, dim), or (blocks, page_size,
// kv_heads, dim) where page_size is not 0.
#include "attention/decoding_cuda.h"

namespace {

lmengine::AttentionTensor heads_inside(void* data, int64_t rows, int64_t heads, int64_t dim) {
  return {data, rows * heads * dim, dim, heads * dim};
}

}  // namespace

extern "C" {

void attention_decode(void* query, void* new_key, void* new_value, const int32_t* cache_lengths,
                      const int32_t* block_table, const void* rotary_cos, const void* rotary_sin,
                      const float* alibi_slopes, void* key_cache, void* value_cache, void* output,
                      float* logsumexp, void* rotated_query, float* partials, int64_t type,
                      int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                      int64_t capacity, int64_t head_dim, int64_t value_dim, int64_t page_size,
                      int64_t blocks, int64_t rotary_dim, int64_t rotary_positions,
                      int64_t rotary_float32, int64_t rotary_interleaved,
                      int64_t alibi_batch_stride, int64_t window_left, int64_t num_splits,
                      float scale, float softcap) {
  lmengine::DecodingParameters p;
  p.type = static_cast<lmengine::AttentionType>(type);
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.queries = queries;
  p.head_dim = static_cast<int>(head_dim), p.value_dim = static_cast<int>(value_dim);
  p.capacity = capacity, p.page_size = page_size, p.blocks = blocks;
  p.max_blocks = page_size > 0 ? capacity / page_size : 0;
  const int64_t rows = page_size > 0 ? page_size : capacity;
  p.query = heads_inside(query, queries, heads, head_dim);
  p.output = heads_inside(output, queries, heads, value_dim);
  p.new_key = heads_inside(new_key, queries, kv_heads, head_dim);
  p.new_value = heads_inside(new_value, queries, kv_heads, value_dim);
  p.key_cache = heads_inside(key_cache, rows, kv_heads, head_dim);
  p.value_cache = heads_inside(value_cache, rows, kv_heads, value_dim);
  p.cache_lengths = cache_lengths, p.block_table = block_table;
  p.rotary_cos = rotary_cos, p.rotary_sin = rotary_sin;
  p.rotary_dim = static_cast<int>(rotary_dim), p.rotary_positions = rotary_positions;
  p.rotary_float32 = rotary_float32 != 0, p.rotary_interleaved = rotary_interleaved != 0;
  p.alibi_slopes = alibi_slopes, p.alibi_batch_stride = alibi_batch_stride;
  p.logsumexp = logsumexp, p.rotated_query = rotated_query, p.partials = partials;
  p.window_left = window_left, p.num_splits = num_splits, p.scale = scale, p.softcap = softcap;
  lmengine::attention_decode_cuda(p, nullptr);
}

// Floats of the workspace `partials`.
void partial_floats(int64_t* floats, int64_t batch, int64_t heads, int64_t kv_heads,
                    int64_t queries, int64_t capacity, int64_t value_dim, int64_t window_left,
                    int64_t num_splits) {
  lmengine::DecodingParameters p;
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.queries = queries;
  p.capacity = capacity, p.value_dim = static_cast<int>(value_dim);
  p.window_left = window_left, p.num_splits = num_splits;
  *floats = lmengine::decoding::partial_floats(p);
}

}  // extern "C"
