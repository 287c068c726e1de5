// What the CPU and the CUDA operator share: checks, allocation, and the parameters' filling in.
#pragma once

#include <tuple>

#include "attention/attention.h"
#include "support/checks.h"

namespace lmengine {

inline AttentionTensor attention_tensor(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// (batch, heads, length, head_dim) laid out as (batch, length, heads, head_dim), so that merging
// the heads again copies nothing.
inline Tensor empty_heads(const Tensor& like, int64_t length) {
  return torch::stable::transpose(
      torch::stable::new_empty(like, {like.size(0), length, like.size(1), like.size(3)}), 1, 2);
}

inline void check_heads(const Tensor& query, const Tensor& key, const Tensor& value) {
  check_dim(query, 4, "query");
  check_dim(key, 4, "key");
  check_dim(value, 4, "value");
}

// The parameters of three tensors that are checked to be four-dimensional.
inline AttentionParameters attention_parameters(const Tensor& query, const Tensor& key,
                                                const Tensor& value, bool is_causal, double scale) {
  for (int64_t d : {0, 1, 3}) {
    check_size(key, d, query.size(d), "key");
    check_size(value, d, query.size(d), "value");
  }
  check_size(value, 2, key.size(2), "value");
  check_dtype(key, query.scalar_type(), "key");
  check_dtype(value, query.scalar_type(), "value");
  check_device(key, query, "key");
  check_device(value, query, "value");
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

// The forward operator around a device's kernel. `prepared` gives a tensor the layout that the
// kernel wants, launch(parameters, query) runs it.
template <class Prepare, class Launch>
std::tuple<Tensor, Tensor> attention_forward_with(Prepare prepared, Launch launch, Tensor query,
                                                  Tensor key, Tensor value, bool is_causal,
                                                  double scale) {
  check_heads(query, key, value);
  query = prepared(query), key = prepared(key), value = prepared(value);
  AttentionParameters p = attention_parameters(query, key, value, is_causal, scale);
  const Tensor output = empty_heads(query, query.size(2));
  const Tensor logsumexp =
      torch::stable::new_empty(query, {p.batch, p.heads, p.query_length}, ScalarType::Float);
  p.output = attention_tensor(output);
  p.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  launch(p, query);
  return {output, logsumexp};
}

// The same for the backward.
template <class Prepare, class Launch>
std::tuple<Tensor, Tensor, Tensor> attention_backward_with(Prepare prepared, Launch launch,
                                                           Tensor grad_output, Tensor query,
                                                           Tensor key, Tensor value, Tensor output,
                                                           Tensor logsumexp, bool is_causal,
                                                           double scale) {
  check_heads(query, key, value);
  query = prepared(query), key = prepared(key), value = prepared(value);
  AttentionParameters p = attention_parameters(query, key, value, is_causal, scale);
  for (const auto& [tensor, name] : {std::pair{&output, "output"}, {&grad_output, "grad_output"}}) {
    check_dim(*tensor, 4, name);
    for (int64_t d = 0; d < 4; ++d) check_size(*tensor, d, query.size(d), name);
    check_dtype(*tensor, query.scalar_type(), name);
    check_device(*tensor, query, name);
  }
  check_dim(logsumexp, 3, "logsumexp");
  for (int64_t d = 0; d < 3; ++d) check_size(logsumexp, d, query.size(d), "logsumexp");
  check_dtype(logsumexp, ScalarType::Float, "logsumexp");
  check_device(logsumexp, query, "logsumexp");
  output = prepared(output), grad_output = prepared(grad_output);
  logsumexp = torch::stable::contiguous(logsumexp);
  const Tensor grad_query = empty_heads(query, query.size(2)),
               grad_key = empty_heads(key, key.size(2)),
               grad_value = empty_heads(value, value.size(2));
  p.output = attention_tensor(output);
  p.grad_output = attention_tensor(grad_output);
  p.grad_query = attention_tensor(grad_query);
  p.grad_key = attention_tensor(grad_key);
  p.grad_value = attention_tensor(grad_value);
  p.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  launch(p, query);
  return {grad_query, grad_key, grad_value};
}

}  // namespace lmengine
