// What the CPU and the CUDA operator share: checks, allocation, and the parameters' filling in.
#pragma once

#include <optional>
#include <tuple>

#include "attention/attention.h"
#include "support/checks.h"

namespace lmengine {

// The operators' arguments behind query, key and value; attention.h says what they mean.
struct AttentionOptions {
  std::optional<Tensor> mask, alibi_slopes, prefix_lengths, key_lengths, cu_query, cu_key, seed;
  int64_t max_query, max_key, window_left, window_right;
  bool bottom_right;
  double scale, softcap, dropout_p;
  bool deterministic;
};

inline AttentionTensor attention_tensor(const Tensor& tensor, bool packed = false) {
  return {tensor.data_ptr(), packed ? 0 : tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A new tensor of another's dtype, or of float32, on its device.
inline Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes,
                            std::initializer_list<int64_t> strides, bool as_float32 = false) {
  int32_t dtype = aoti_torch_dtype_float32(), device_type = 0, device_index = 0;
  if (!as_float32) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.begin(), dtype, device_type, device_index,
                                                  &made));
  return Tensor(made);
}

// (batch, heads, length, dim) laid out as (batch, length, heads, dim), so that merging the heads
// again copies nothing.
inline Tensor empty_heads(const Tensor& like, int64_t heads, int64_t length, int64_t dim) {
  return empty_strided(like, {like.size(0), heads, length, dim},
                       {length * heads * dim, dim, heads * dim, 1});
}

inline Tensor empty_heads_like(const Tensor& tensor) {
  return empty_heads(tensor, tensor.size(1), tensor.size(2), tensor.size(3));
}

// The data of a contiguous one-dimensional tensor of `size` numbers; null where it is not given.
template <class T>
const T* numbers_of(const std::optional<Tensor>& tensor, ScalarType dtype, int64_t size,
                    const Tensor& query, const char* name) {
  if (!tensor.has_value()) return nullptr;
  check_dim(*tensor, 1, name);
  check_size(*tensor, 0, size, name);
  check_dtype(*tensor, dtype, name);
  check_device(*tensor, query, name);
  LMENGINE_CHECK(size <= 1 || tensor->stride(0) == 1, std::string(name) + ": expected contiguous");
  return static_cast<const T*>(tensor->data_ptr());
}

inline AttentionMask attention_mask(const Tensor& mask, MaskType type) {
  const auto stride = [&](int64_t d) { return mask.size(d) == 1 ? 0 : mask.stride(d); };
  return {mask.data_ptr(), type, stride(0), stride(1), stride(2), stride(3)};
}

inline AttentionParameters attention_parameters(const Tensor& query, const Tensor& key,
                                                const Tensor& value, const AttentionOptions& o) {
  AttentionParameters p;
  const bool packed = o.cu_query.has_value();
  LMENGINE_CHECK(packed == o.cu_key.has_value(),
                 "cu_seqlens_k: expected to be given together with cu_seqlens_q");
  for (const auto& [tensor, name] : {std::pair{&key, "key"}, {&value, "value"}}) {
    check_size(*tensor, 0, query.size(0), name);
    check_size(*tensor, 1, key.size(1), name);
    check_size(*tensor, 2, key.size(2), name);
    check_dtype(*tensor, query.scalar_type(), name);
    check_device(*tensor, query, name);
  }
  check_size(key, 3, query.size(3), "key");
  p.heads = query.size(1), p.kv_heads = key.size(1);
  LMENGINE_CHECK(p.kv_heads == p.heads || (p.kv_heads > 0 && p.heads % p.kv_heads == 0),
                 "key: expected heads that divide the query's " + std::to_string(p.heads) +
                     ", got " + std::to_string(p.kv_heads));
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
  p.query = attention_tensor(query, packed);
  p.key = attention_tensor(key, packed);
  p.value = attention_tensor(value, packed);
  p.query_rows = query.size(2), p.key_rows = key.size(2);
  p.head_dim = static_cast<int>(query.size(3));
  p.value_dim = static_cast<int>(value.size(3));
  if (packed) {
    check_size(query, 0, 1, "query");
    p.batch = o.cu_query->size(0) - 1;
    LMENGINE_CHECK(p.batch >= 0, "cu_seqlens_q: expected at least one number");
    LMENGINE_CHECK(o.max_query >= 0 && o.max_key >= 0, "max_seqlen_q, max_seqlen_k: expected >= 0");
    p.query_length = o.max_query, p.key_length = o.max_key;
  } else {
    p.batch = query.size(0);
    p.query_length = p.query_rows, p.key_length = p.key_rows;
  }
  p.cu_query = numbers_of<int32_t>(o.cu_query, ScalarType::Int, p.batch + 1, query, "cu_seqlens_q");
  p.cu_key = numbers_of<int32_t>(o.cu_key, ScalarType::Int, p.batch + 1, query, "cu_seqlens_k");
  p.prefix_lengths =
      numbers_of<int32_t>(o.prefix_lengths, ScalarType::Int, p.batch, query, "prefix_lengths");
  p.key_lengths =
      numbers_of<int32_t>(o.key_lengths, ScalarType::Int, p.batch, query, "key_lengths");
  p.seed = numbers_of<int64_t>(o.seed, ScalarType::Long, 1, query, "seed");
  if (o.alibi_slopes.has_value()) {
    const Tensor& slopes = *o.alibi_slopes;
    check_dim(slopes, 2, "alibi_slopes");
    LMENGINE_CHECK(slopes.size(0) == 1 || slopes.size(0) == p.batch,
                   "alibi_slopes: expected size 1 or the batch in dimension 0");
    check_size(slopes, 1, p.heads, "alibi_slopes");
    check_dtype(slopes, ScalarType::Float, "alibi_slopes");
    check_device(slopes, query, "alibi_slopes");
    LMENGINE_CHECK(p.heads <= 1 || slopes.stride(1) == 1, "alibi_slopes: expected contiguous rows");
    p.alibi_slopes = static_cast<const float*>(slopes.data_ptr());
    p.alibi_batch_stride = slopes.size(0) == 1 ? 0 : slopes.stride(0);
  }
  if (o.mask.has_value()) {
    const Tensor& mask = *o.mask;
    check_dim(mask, 4, "mask");
    check_device(mask, query, "mask");
    LMENGINE_CHECK(!packed, "mask: expected None with packed sequences");
    const int64_t sizes[] = {p.batch, p.heads, p.query_length, p.key_length};
    for (int64_t d = 0; d < 4; ++d)
      LMENGINE_CHECK(mask.size(d) == 1 || mask.size(d) == sizes[d],
                     "mask: expected size 1 or " + std::to_string(sizes[d]) + " in dimension " +
                         std::to_string(d) + ", got " + std::to_string(mask.size(d)));
    const ScalarType dtype = mask.scalar_type();
    LMENGINE_CHECK(
        dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == query.scalar_type(),
        "mask: expected bool, float32 or the query's dtype");
    p.mask = attention_mask(mask, dtype == ScalarType::Bool    ? MaskType::boolean
                                  : dtype == ScalarType::Float ? MaskType::float32
                                                               : MaskType::same);
  }
  p.window_left = o.window_left, p.window_right = o.window_right;
  p.bottom_right = o.bottom_right;
  p.scale = static_cast<float>(o.scale);
  p.softcap = static_cast<float>(o.softcap);
  p.dropout_p = o.dropout_p;
  p.deterministic = o.deterministic;
  return p;
}

// The forward operator around a device's kernel. `prepared` gives a tensor the layout that the
// kernel wants, launch(parameters, query) runs it.
template <class Prepare, class Launch>
std::tuple<Tensor, Tensor> attention_forward_with(Prepare prepared, Launch launch, Tensor query,
                                                  Tensor key, Tensor value,
                                                  const AttentionOptions& options) {
  for (const auto& [tensor, name] : {std::pair{&query, "query"}, {&key, "key"}, {&value, "value"}})
    check_dim(*tensor, 4, name);
  query = prepared(query), key = prepared(key), value = prepared(value);
  AttentionParameters p = attention_parameters(query, key, value, options);
  const Tensor output = empty_heads(query, p.heads, p.query_rows, p.value_dim);
  const Tensor logsumexp =
      torch::stable::new_empty(query, {query.size(0), p.heads, p.query_rows}, ScalarType::Float);
  p.output = attention_tensor(output, p.cu_query != nullptr);
  p.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  launch(p, query);
  return {output, logsumexp};
}

// The same for the backward.
template <class Prepare, class Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_with(
    Prepare prepared, Launch launch, Tensor grad_output, std::optional<Tensor> grad_logsumexp,
    Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp,
    const AttentionOptions& options, bool needs_grad_mask) {
  for (const auto& [tensor, name] : {std::pair{&query, "query"}, {&key, "key"}, {&value, "value"}})
    check_dim(*tensor, 4, name);
  query = prepared(query), key = prepared(key), value = prepared(value);
  AttentionParameters p = attention_parameters(query, key, value, options);
  const bool packed = p.cu_query != nullptr;
  for (const auto& [tensor, name] : {std::pair{&output, "output"}, {&grad_output, "grad_output"}}) {
    check_dim(*tensor, 4, name);
    for (int64_t d = 0; d < 3; ++d) check_size(*tensor, d, query.size(d), name);
    check_size(*tensor, 3, p.value_dim, name);
    check_dtype(*tensor, query.scalar_type(), name);
    check_device(*tensor, query, name);
  }
  const auto single = [&](const Tensor& tensor, const char* name) {
    check_dim(tensor, 3, name);
    for (int64_t d = 0; d < 3; ++d) check_size(tensor, d, query.size(d), name);
    check_dtype(tensor, ScalarType::Float, name);
    check_device(tensor, query, name);
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  };
  logsumexp = single(logsumexp, "logsumexp");
  if (grad_logsumexp.has_value()) {
    grad_logsumexp = single(*grad_logsumexp, "grad_logsumexp");
    p.grad_logsumexp = static_cast<const float*>(grad_logsumexp->data_ptr());
  }
  output = prepared(output), grad_output = prepared(grad_output);
  const Tensor grad_query = empty_heads_like(query), grad_key = empty_heads_like(key),
               grad_value = empty_heads_like(value);
  Tensor grad_mask = needs_grad_mask ? Tensor() : empty_strided(query, {0}, {1}, true);
  if (needs_grad_mask) {
    LMENGINE_CHECK(p.mask.type == MaskType::float32 || p.mask.type == MaskType::same,
                   "mask: expected a floating mask where its gradient is needed");
    const Tensor& mask = *options.mask;
    grad_mask = torch::stable::new_empty(
        query, {mask.size(0), mask.size(1), mask.size(2), mask.size(3)}, ScalarType::Float);
    p.grad_mask = attention_mask(grad_mask, MaskType::float32);
  }
  p.output = attention_tensor(output, packed);
  p.grad_output = attention_tensor(grad_output, packed);
  p.grad_query = attention_tensor(grad_query, packed);
  p.grad_key = attention_tensor(grad_key, packed);
  p.grad_value = attention_tensor(grad_value, packed);
  p.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  launch(p, query);
  return {grad_query, grad_key, grad_value, grad_mask};
}

// A device's forward and backward with the few arguments of the plain operators.
template <auto forward>
std::tuple<Tensor, Tensor> attention_plain_forward(Tensor query, Tensor key, Tensor value,
                                                   bool is_causal, double scale) {
  return forward(query, key, value, {}, {}, {}, {}, {}, {}, {}, -1, -1, -1, is_causal ? 0 : -1,
                 false, scale, 0, 0, false);
}

template <auto backward>
std::tuple<Tensor, Tensor, Tensor> attention_plain_backward(Tensor grad_output, Tensor query,
                                                            Tensor key, Tensor value, Tensor output,
                                                            Tensor logsumexp, bool is_causal,
                                                            double scale, bool deterministic) {
  auto [grad_query, grad_key, grad_value, none] =
      backward(grad_output, {}, query, key, value, output, logsumexp, {}, {}, {}, {}, {}, {}, {},
               -1, -1, -1, is_causal ? 0 : -1, false, scale, 0, 0, deterministic, false);
  return {grad_query, grad_key, grad_value};
}

}  // namespace lmengine
