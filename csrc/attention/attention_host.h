// What the CPU and the CUDA operator share: checks, allocation, and the parameters' filling in.
#pragma once

#include "attention/attention.h"
#include "support/checks.h"

namespace lmengine {

inline AttentionTensor attention_tensor(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// (batch, heads, length, head_dim) laid out as (batch, length, heads, head_dim), so that merging
// the heads again copies nothing.
inline Tensor empty_heads(const Tensor& like, int64_t length) {
  return torch::stable::transpose(
      torch::stable::new_empty(like, {like.size(0), length, like.size(1), like.size(3)}), 1, 2);
}

inline AttentionParameters attention_parameters(const Tensor& query, const Tensor& key,
                                                const Tensor& value, bool is_causal, double scale) {
  check_dim(query, 4, "query");
  check_dim(key, 4, "key");
  check_dim(value, 4, "value");
  for (int64_t d : {0, 1, 3}) {
    check_size(key, d, query.size(d), "key");
    check_size(value, d, query.size(d), "value");
  }
  check_size(value, 2, key.size(2), "value");
  check_dtype(key, query.scalar_type(), "key");
  check_dtype(value, query.scalar_type(), "value");
  AttentionParameters p;
  p.query = attention_tensor(query);
  p.key = attention_tensor(key);
  p.value = attention_tensor(value);
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.query_length = query.size(2);
  p.key_length = key.size(2);
  p.head_dim = static_cast<int>(query.size(3));
  p.is_causal = is_causal;
  p.scale = static_cast<float>(scale);
  switch (query.scalar_type()) {
    case ScalarType::Float:
      p.type = AttentionType::float32;
      break;
    case ScalarType::BFloat16:
      p.type = AttentionType::bfloat16;
      break;
    case ScalarType::Half:
      p.type = AttentionType::float16;
      break;
    default:
      LMENGINE_CHECK(false, "query: expected float32, bfloat16 or float16");
  }
  return p;
}

}  // namespace lmengine
