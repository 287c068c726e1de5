// The attention operators on the CPU.
#include <torch/csrc/stable/library.h>

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

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, bool is_causal,
                                   double scale) {
  const auto launch = [](const AttentionParameters& p, const Tensor&) {
    check_type(p);
    LMENGINE_DISPATCH(attention_forward, p);
  };
  return attention_forward_with(with_contiguous_rows, launch, query, key, value, is_causal, scale);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor query, Tensor key,
                                            Tensor value, Tensor output, Tensor logsumexp,
                                            bool is_causal, double scale) {
  const auto launch = [](const AttentionParameters& p, const Tensor&) {
    check_type(p);
    LMENGINE_DISPATCH(attention_backward, p);
  };
  return attention_backward_with(with_contiguous_rows, launch, grad_output, query, key, value,
                                 output, logsumexp, is_causal, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace lmengine
