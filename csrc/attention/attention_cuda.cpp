// The attention operators on a GPU: checks and allocation around the CUDA kernels.
#include "attention/attention_cuda.h"

#include <torch/csrc/stable/library.h>

#include "attention/attention_host.h"
#include "support/stream.h"

namespace lmengine {
namespace {

// The kernels read 16 bytes at a time: rows that are not contiguous, or that do not begin at a
// multiple of 16 bytes, are copied.
Tensor with_aligned_rows(const Tensor& tensor) {
  const int64_t step = tensor.scalar_type() == ScalarType::Float ? 4 : 8;
  bool aligned = tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d)
    aligned = aligned && (tensor.size(d) == 1 || tensor.stride(d) % step == 0);
  if (aligned) return tensor;
  Tensor copy = empty_heads(tensor, tensor.size(2));
  torch::stable::copy_(copy, tensor);
  return copy;
}

void check_head_dim(const AttentionParameters& p) {
  LMENGINE_CHECK(p.head_dim >= 16 && p.head_dim <= 128 && p.head_dim % 8 == 0,
                 "query: expected a head_dim from 16 to 128 that 8 divides, got " +
                     std::to_string(p.head_dim));
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, bool is_causal,
                                   double scale) {
  const cuda::DeviceGuard guard(query.get_device_index());
  const auto launch = [](const AttentionParameters& p, const Tensor& like) {
    check_head_dim(p);
    attention_forward_cuda(p, cuda::current_stream(like.get_device_index()));
  };
  return attention_forward_with(with_aligned_rows, launch, query, key, value, is_causal, scale);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor query, Tensor key,
                                            Tensor value, Tensor output, Tensor logsumexp,
                                            bool is_causal, double scale) {
  const cuda::DeviceGuard guard(query.get_device_index());
  const auto launch = [](AttentionParameters& p, const Tensor& like) {
    check_head_dim(p);
    const Tensor delta =
        torch::stable::new_empty(like, {p.batch, p.heads, p.query_length}, ScalarType::Float);
    p.delta = static_cast<float*>(delta.data_ptr());
    attention_backward_cuda(p, cuda::current_stream(like.get_device_index()));
  };
  return attention_backward_with(with_aligned_rows, launch, grad_output, query, key, value, output,
                                 logsumexp, is_causal, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace lmengine
