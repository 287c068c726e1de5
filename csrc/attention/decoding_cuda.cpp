// The operator of decoding on a GPU: checks and allocation around the CUDA kernels.
#include "attention/decoding_cuda.h"

#include <torch/csrc/stable/library.h>

#include "attention/decoding_host.h"
#include "support/stream.h"

namespace lmengine {
namespace {

// The kernels read 16 bytes at a time.
bool has_aligned_rows(const Tensor& tensor) {
  const int64_t step = tensor.scalar_type() == ScalarType::Float ? 4 : 8;
  bool aligned = tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d)
    aligned = aligned && (tensor.size(d) <= 1 || tensor.stride(d) % step == 0);
  return aligned;
}

Tensor with_aligned_rows(const Tensor& tensor) {
  if (has_aligned_rows(tensor)) return tensor;
  Tensor copy = empty_heads(tensor, tensor.size(1), tensor.size(2), tensor.size(3));
  torch::stable::copy_(copy, tensor);
  return copy;
}

void check_dim_of_head(int dim, const char* name) {
  LMENGINE_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0,
                 std::string(name) + ": expected a head_dim from 8 to 256 that 8 divides, got " +
                     std::to_string(dim));
}

std::tuple<Tensor, Tensor> decode(Tensor query, Tensor key_cache, Tensor value_cache,
                                  Tensor cache_lengths, std::optional<Tensor> key,
                                  std::optional<Tensor> value, std::optional<Tensor> block_table,
                                  std::optional<Tensor> rotary_cos,
                                  std::optional<Tensor> rotary_sin,
                                  std::optional<Tensor> alibi_slopes, bool rotary_interleaved,
                                  double scale, int64_t window_left, double softcap,
                                  int64_t num_splits) {
  const cuda::DeviceGuard guard(query.get_device_index());
  const DecodingOptions options{cache_lengths, key,         value,        block_table,
                                rotary_cos,    rotary_sin,  alibi_slopes, rotary_interleaved,
                                scale,         window_left, softcap,      num_splits};
  const auto launch = [&](DecodingParameters& p, const Tensor& like) {
    check_dim_of_head(p.head_dim, "query"), check_dim_of_head(p.value_dim, "value_cache");
    for (const auto& [cache, name] :
         {std::pair{&key_cache, "key_cache"}, {&value_cache, "value_cache"}})
      LMENGINE_CHECK(cache->numel() == 0 || has_aligned_rows(*cache),
                     std::string(name) + ": expected rows that begin at multiples of 16 bytes");
    std::optional<Tensor> rotated;
    if (p.rotary_dim > 0) {
      rotated = torch::stable::new_empty(like, {p.batch, p.heads, p.queries, p.head_dim});
      p.rotated_query = rotated->data_ptr();
    }
    const Tensor partials =
        torch::stable::new_empty(like, {decoding::partial_floats(p)}, ScalarType::Float);
    p.partials = static_cast<float*>(partials.data_ptr());
    attention_decode_cuda(p, cuda::current_stream(like.get_device_index()));
  };
  return attention_decode_with(with_aligned_rows, launch, query, key_cache, value_cache, options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CUDA, m) { m.impl("attention_decode", TORCH_BOX(&decode)); }

}  // namespace lmengine
