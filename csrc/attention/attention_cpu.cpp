// The attention operators on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention/attention_host.h"
#include "support/instruction_set.h"

LMENGINE_DECLARE_KERNEL(attention_forward, AttentionParameters)
LMENGINE_DECLARE_KERNEL(attention_backward, AttentionParameters)

namespace lmengine {
namespace {

void check_type(const AttentionParameters& p) {
  LMENGINE_CHECK(p.type != AttentionType::float16,
                 "query: expected float32 or bfloat16 on the CPU, got float16");
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, bool is_causal,
                                   double scale) {
  query = with_contiguous_rows(query);
  key = with_contiguous_rows(key);
  value = with_contiguous_rows(value);
  AttentionParameters p = attention_parameters(query, key, value, is_causal, scale);
  check_type(p);
  Tensor output = empty_heads(query, query.size(2));
  Tensor logsumexp =
      torch::stable::new_empty(query, {p.batch, p.heads, p.query_length}, ScalarType::Float);
  p.output = attention_tensor(output);
  p.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  LMENGINE_DISPATCH(attention_forward, p);
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor query, Tensor key,
                                            Tensor value, Tensor output, Tensor logsumexp,
                                            bool is_causal, double scale) {
  query = with_contiguous_rows(query);
  key = with_contiguous_rows(key);
  value = with_contiguous_rows(value);
  output = with_contiguous_rows(output);
  grad_output = with_contiguous_rows(grad_output);
  logsumexp = torch::stable::contiguous(logsumexp);
  AttentionParameters p = attention_parameters(query, key, value, is_causal, scale);
  check_type(p);
  Tensor grad_query = empty_heads(query, query.size(2)), grad_key = empty_heads(key, key.size(2)),
         grad_value = empty_heads(value, value.size(2));
  p.output = attention_tensor(output);
  p.grad_output = attention_tensor(grad_output);
  p.grad_query = attention_tensor(grad_query);
  p.grad_key = attention_tensor(grad_key);
  p.grad_value = attention_tensor(grad_value);
  p.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  LMENGINE_DISPATCH(attention_backward, p);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace lmengine
