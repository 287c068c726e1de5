// What the CPU and the CUDA operator of decoding share: checks, allocation, and the parameters'
// filling in.
#pragma once

#include "attention/attention_host.h"
#include "attention/decoding.h"

namespace lmengine {

// The operator's arguments behind query and the caches; lmengine/ops/decoding.py says what they
// mean.
struct DecodingOptions {
  Tensor cache_lengths;
  std::optional<Tensor> key, value, block_table, rotary_cos, rotary_sin, alibi_slopes;
  bool rotary_interleaved;
  double scale;
  int64_t window_left;
  double softcap;
  int64_t num_splits;
};

inline AttentionType attention_type(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return AttentionType::float32;
    case ScalarType::BFloat16:
      return AttentionType::bfloat16;
    case ScalarType::Half:
      return AttentionType::float16;
    default:
      LMENGINE_CHECK(false, "query: expected float32, bfloat16 or float16");
  }
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  int64_t stride = 1;
  for (int64_t d = tensor.dim() - 1; d >= 0; stride *= tensor.size(d), --d)
    LMENGINE_CHECK(tensor.size(d) <= 1 || tensor.stride(d) == stride,
                   std::string(name) + ": expected contiguous");
}

inline void set_rotary(DecodingParameters& p, const Tensor& query, const DecodingOptions& o) {
  const Tensor &cos = *o.rotary_cos, &sin = *o.rotary_sin;
  for (const auto& [table, name] : {std::pair{&cos, "rotary_cos"}, {&sin, "rotary_sin"}}) {
    check_dim(*table, 2, name);
    for (int64_t d = 0; d < 2; ++d) check_size(*table, d, cos.size(d), name);
    const bool known =
        table->scalar_type() == ScalarType::Float || table->scalar_type() == query.scalar_type();
    LMENGINE_CHECK(known && table->scalar_type() == cos.scalar_type(),
                   std::string(name) + ": expected float32 or the query's dtype");
    check_device(*table, query, name);
    check_contiguous(*table, name);
  }
  LMENGINE_CHECK(2 * cos.size(1) <= p.head_dim, "rotary_cos: expected a rotary_dim up to " +
                                                    std::to_string(p.head_dim) + ", got " +
                                                    std::to_string(2 * cos.size(1)));
  p.rotary_cos = cos.data_ptr(), p.rotary_sin = sin.data_ptr();
  p.rotary_float32 = cos.scalar_type() == ScalarType::Float;
  p.rotary_positions = cos.size(0);
  p.rotary_dim = static_cast<int>(2 * cos.size(1));
  p.rotary_interleaved = o.rotary_interleaved;
}

// `query` and the new keys and values of `o` have contiguous rows.
inline DecodingParameters decoding_parameters(const Tensor& query, const Tensor& key_cache,
                                              const Tensor& value_cache, const DecodingOptions& o) {
  DecodingParameters p;
  const bool paged = o.block_table.has_value();
  const int64_t head_axis = paged ? 2 : 1, key_axis = paged ? 1 : 2;
  p.type = attention_type(query);
  p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2);
  p.head_dim = static_cast<int>(query.size(3));
  p.value_dim = static_cast<int>(value_cache.size(3));
  p.kv_heads = key_cache.size(head_axis);
  LMENGINE_CHECK(p.kv_heads == p.heads || (p.kv_heads > 0 && p.heads % p.kv_heads == 0),
                 "key_cache: expected heads that divide the query's " + std::to_string(p.heads) +
                     ", got " + std::to_string(p.kv_heads));
  for (const auto& [cache, name] :
       {std::pair{&key_cache, "key_cache"}, {&value_cache, "value_cache"}}) {
    for (int64_t d = 0; d < 3; ++d) check_size(*cache, d, key_cache.size(d), name);
    check_dtype(*cache, query.scalar_type(), name);
    check_device(*cache, query, name);
    LMENGINE_CHECK(cache->stride(3) == 1 || cache->size(3) <= 1,
                   std::string(name) + ": expected a last dimension of stride 1");
  }
  check_size(key_cache, 3, p.head_dim, "key_cache");
  const auto cache_tensor = [&](const Tensor& cache) -> AttentionTensor {
    return {cache.data_ptr(), cache.stride(0), cache.stride(head_axis), cache.stride(key_axis)};
  };
  p.key_cache = cache_tensor(key_cache), p.value_cache = cache_tensor(value_cache);
  p.query = attention_tensor(query);
  p.cache_lengths =
      numbers_of<int32_t>(o.cache_lengths, ScalarType::Int, p.batch, query, "cache_lengths");
  if (paged) {
    const Tensor& table = *o.block_table;
    check_dim(table, 2, "block_table");
    check_size(table, 0, p.batch, "block_table");
    check_dtype(table, ScalarType::Int, "block_table");
    check_device(table, query, "block_table");
    check_contiguous(table, "block_table");
    p.block_table = static_cast<const int32_t*>(table.data_ptr());
    p.max_blocks = table.size(1), p.blocks = key_cache.size(0), p.page_size = key_cache.size(1);
    p.capacity = p.max_blocks * p.page_size;
  } else {
    check_size(key_cache, 0, p.batch, "key_cache");
    p.capacity = key_cache.size(2);
  }
  LMENGINE_CHECK(o.key.has_value() == o.value.has_value(), "value: expected together with key");
  if (o.key.has_value()) {
    for (const auto& [tensor, name, dim] :
         {std::tuple{&*o.key, "key", p.head_dim}, {&*o.value, "value", p.value_dim}}) {
      const int64_t sizes[] = {p.batch, p.kv_heads, p.queries, dim};
      for (int64_t d = 0; d < 4; ++d) check_size(*tensor, d, sizes[d], name);
      check_dtype(*tensor, query.scalar_type(), name);
      check_device(*tensor, query, name);
    }
    p.new_key = attention_tensor(*o.key), p.new_value = attention_tensor(*o.value);
  }
  LMENGINE_CHECK(o.rotary_cos.has_value() == o.rotary_sin.has_value(),
                 "rotary_sin: expected together with rotary_cos");
  if (o.rotary_cos.has_value()) set_rotary(p, query, o);
  if (o.alibi_slopes.has_value()) {
    const Tensor& slopes = *o.alibi_slopes;
    check_dim(slopes, 2, "alibi_slopes");
    LMENGINE_CHECK(slopes.size(0) == 1 || slopes.size(0) == p.batch,
                   "alibi_slopes: expected size 1 or the batch in dimension 0");
    check_size(slopes, 1, p.heads, "alibi_slopes");
    check_dtype(slopes, ScalarType::Float, "alibi_slopes");
    check_device(slopes, query, "alibi_slopes");
    check_contiguous(slopes, "alibi_slopes");
    p.alibi_slopes = static_cast<const float*>(slopes.data_ptr());
    p.alibi_batch_stride = slopes.size(0) == 1 ? 0 : slopes.size(1);
  }
  LMENGINE_CHECK(o.num_splits >= 0, "num_splits: expected a number from 0 up");
  p.window_left = o.window_left, p.num_splits = o.num_splits;
  p.scale = static_cast<float>(o.scale), p.softcap = static_cast<float>(o.softcap);
  return p;
}

// The operator around a device's kernel. `prepared` gives a tensor the layout that the kernel
// wants, launch(parameters, query) runs it.
template <class Prepare, class Launch>
std::tuple<Tensor, Tensor> attention_decode_with(Prepare prepared, Launch launch, Tensor query,
                                                 const Tensor& key_cache, const Tensor& value_cache,
                                                 DecodingOptions options) {
  for (const auto& [tensor, name] : {std::pair<const Tensor*, const char*>{&query, "query"},
                                     {&key_cache, "key_cache"},
                                     {&value_cache, "value_cache"}})
    check_dim(*tensor, 4, name);
  if (options.key.has_value()) check_dim(*options.key, 4, "key");
  if (options.value.has_value()) check_dim(*options.value, 4, "value");
  query = prepared(query);
  if (options.key.has_value()) options.key = prepared(*options.key);
  if (options.value.has_value()) options.value = prepared(*options.value);
  DecodingParameters p = decoding_parameters(query, key_cache, value_cache, options);
  const Tensor output = empty_heads(query, p.heads, p.queries, p.value_dim);
  const Tensor logsumexp =
      torch::stable::new_empty(query, {p.batch, p.heads, p.queries}, ScalarType::Float);
  p.output = attention_tensor(output);
  p.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  if (p.batch * p.heads * p.queries > 0) launch(p, query);
  return {output, logsumexp};
}

}  // namespace lmengine
