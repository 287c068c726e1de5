// The attention operators on the CPU.
#include <torch/csrc/stable/library.h>

#include "attention/attention_host.h"
#include "support/instruction_set.h"

LMENGINE_DECLARE_KERNEL(attention_forward, AttentionParameters)
LMENGINE_DECLARE_KERNEL(attention_backward, AttentionParameters)

namespace lmengine {
namespace {

// The kernels trust these numbers with their addresses.
void check_lengths(const AttentionParameters& p) {
  const auto check = [&](const int32_t* starts, int64_t rows, const char* name) {
    if (starts == nullptr) return;
    bool ordered = starts[0] == 0 && starts[p.batch] == rows;
    for (int64_t b = 0; b < p.batch; ++b) ordered = ordered && starts[b] <= starts[b + 1];
    LMENGINE_CHECK(ordered, std::string(name) + ": expected sums of lengths from 0 to " +
                                std::to_string(rows));
  };
  check(p.cu_query, p.query_rows, "cu_seqlens_q");
  check(p.cu_key, p.key_rows, "cu_seqlens_k");
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value,
                                   std::optional<Tensor> mask, std::optional<Tensor> alibi_slopes,
                                   std::optional<Tensor> prefix_lengths,
                                   std::optional<Tensor> key_lengths,
                                   std::optional<Tensor> cu_query, std::optional<Tensor> cu_key,
                                   std::optional<Tensor> seed, int64_t max_query, int64_t max_key,
                                   int64_t window_left, int64_t window_right, bool bottom_right,
                                   double scale, double softcap, double dropout_p,
                                   bool deterministic) {
  const AttentionOptions options{mask,     alibi_slopes, prefix_lengths, key_lengths,
                                 cu_query, cu_key,       seed,           max_query,
                                 max_key,  window_left,  window_right,   bottom_right,
                                 scale,    softcap,      dropout_p,      deterministic};
  const auto launch = [](const AttentionParameters& p, const Tensor&) {
    check_lengths(p);
    LMENGINE_DISPATCH(attention_forward, p);
  };
  return attention_forward_with(with_contiguous_rows, launch, query, key, value, options);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_output, std::optional<Tensor> grad_logsumexp, Tensor query, Tensor key,
    Tensor value, Tensor output, Tensor logsumexp, std::optional<Tensor> mask,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> prefix_lengths,
    std::optional<Tensor> key_lengths, std::optional<Tensor> cu_query, std::optional<Tensor> cu_key,
    std::optional<Tensor> seed, int64_t max_query, int64_t max_key, int64_t window_left,
    int64_t window_right, bool bottom_right, double scale, double softcap, double dropout_p,
    bool deterministic, bool needs_grad_mask) {
  const AttentionOptions options{mask,     alibi_slopes, prefix_lengths, key_lengths,
                                 cu_query, cu_key,       seed,           max_query,
                                 max_key,  window_left,  window_right,   bottom_right,
                                 scale,    softcap,      dropout_p,      deterministic};
  const auto launch = [](const AttentionParameters& p, const Tensor&) {
    check_lengths(p);
    LMENGINE_DISPATCH(attention_backward, p);
  };
  return attention_backward_with(with_contiguous_rows, launch, grad_output, grad_logsumexp, query,
                                 key, value, output, logsumexp, options, needs_grad_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
  m.impl("attention_plain_forward", TORCH_BOX(&attention_plain_forward<&forward>));
  m.impl("attention_plain_backward", TORCH_BOX(&attention_plain_backward<&backward>));
}

}  // namespace lmengine
