// The attention operators on a GPU: checks and allocation around the CUDA kernels.
#include "attention/attention_cuda.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "attention/attention_host.h"
#include "attention/takes_sm90.h"
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
  Tensor copy = empty_heads_like(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Whether the kernels for Hopper may be taken; lmengine_attention_use_sm90 changes it.
std::atomic<bool> use_sm90 = true;

// The current device's compute capability, 90 for 9.0; 0 where the kernels for Hopper may not be
// taken.
int capability() {
  int device = 0, major = 0, minor = 0;
  LMENGINE_CHECK(
      cudaGetDevice(&device) == cudaSuccess &&
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
              cudaSuccess &&
          cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess,
      "query: the device's compute capability cannot be read");
  return use_sm90 ? 10 * major + minor : 0;
}

void check_head_dims(const AttentionParameters& p) {
  for (const auto& [dim, name] : {std::pair{p.head_dim, "query"}, {p.value_dim, "value"}})
    LMENGINE_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0,
                   std::string(name) + ": expected a head_dim from 8 to 256 that 8 divides, got " +
                       std::to_string(dim));
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
  const cuda::DeviceGuard guard(query.get_device_index());
  const AttentionOptions options{mask,     alibi_slopes, prefix_lengths, key_lengths,
                                 cu_query, cu_key,       seed,           max_query,
                                 max_key,  window_left,  window_right,   bottom_right,
                                 scale,    softcap,      dropout_p,      deterministic};
  const auto launch = [](const AttentionParameters& p, const Tensor& like) {
    if (takes_sm90(p, capability()))
      return attention_forward_sm90(p, cuda::current_stream(like.get_device_index()));
    check_head_dims(p);
    attention_forward_cuda(p, cuda::current_stream(like.get_device_index()));
  };
  return attention_forward_with(with_aligned_rows, launch, query, key, value, options);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_output, std::optional<Tensor> grad_logsumexp, Tensor query, Tensor key,
    Tensor value, Tensor output, Tensor logsumexp, std::optional<Tensor> mask,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> prefix_lengths,
    std::optional<Tensor> key_lengths, std::optional<Tensor> cu_query, std::optional<Tensor> cu_key,
    std::optional<Tensor> seed, int64_t max_query, int64_t max_key, int64_t window_left,
    int64_t window_right, bool bottom_right, double scale, double softcap, double dropout_p,
    bool deterministic, bool needs_grad_mask) {
  const cuda::DeviceGuard guard(query.get_device_index());
  const AttentionOptions options{mask,     alibi_slopes, prefix_lengths, key_lengths,
                                 cu_query, cu_key,       seed,           max_query,
                                 max_key,  window_left,  window_right,   bottom_right,
                                 scale,    softcap,      dropout_p,      deterministic};
  const auto launch = [](AttentionParameters& p, const Tensor& like) {
    if (takes_sm90_backward(p, capability())) {
      const Tensor workspace =
          torch::stable::new_empty(like, {attention_backward_sm90_workspace(p)}, ScalarType::Float);
      return attention_backward_sm90(p, static_cast<float*>(workspace.data_ptr()),
                                     cuda::current_stream(like.get_device_index()));
    }
    check_head_dims(p);
    const Tensor delta =
        torch::stable::new_empty(like, {like.size(0), p.heads, p.query_rows}, ScalarType::Float);
    p.delta = static_cast<float*>(delta.data_ptr());
    attention_backward_cuda(p, cuda::current_stream(like.get_device_index()));
  };
  return attention_backward_with(with_aligned_rows, launch, grad_output, grad_logsumexp, query, key,
                                 value, output, logsumexp, options, needs_grad_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
  m.impl("attention_plain_forward", TORCH_BOX(&attention_plain_forward<&forward>));
  m.impl("attention_plain_backward", TORCH_BOX(&attention_plain_backward<&backward>));
}

}  // namespace lmengine

// Whether attention's kernels for Hopper may be taken where they can be, so that tests and
// benchmarks hold them against the others; returns what it was before.
extern "C" __attribute__((visibility("default"))) int lmengine_attention_use_sm90(int use) {
  return lmengine::use_sm90.exchange(use != 0);
}
