// Which calls of attention go to the kernels for Hopper.
#pragma once

#include "attention/attention.h"

namespace lmengine {

// Whether a tensor map describes the tensor: its strides are positive.
inline bool has_tensor_map(const AttentionTensor& tensor, int64_t batch, int64_t heads,
                           int64_t length) {
  return (batch <= 1 || tensor.batch_stride > 0) && (heads <= 1 || tensor.head_stride > 0) &&
         (length <= 1 || tensor.row_stride > 0);
}

// `capability`: of the device, 90 for 9.0. These kernels have run on the emulation of
// tests/cuda_host only, never on a GPU: to do without them, return false here.
inline bool takes_sm90(const AttentionParameters& p, int capability) {
  const bool shape = p.head_dim % 8 == 0 && p.value_dim % 8 == 0 && p.head_dim >= 8 &&
                     p.value_dim >= 8 && p.head_dim <= 256 && p.value_dim <= 256;
  const bool masks = p.mask.type == MaskType::none && p.alibi_slopes == nullptr &&
                     p.prefix_lengths == nullptr && p.key_lengths == nullptr &&
                     p.cu_query == nullptr && p.window_left < 0;
  const bool plain = p.seed == nullptr && p.softcap == 0 && p.scale > 0;
  const bool maps = has_tensor_map(p.query, p.batch, p.heads, p.query_length) &&
                    has_tensor_map(p.key, p.batch, p.kv_heads, p.key_length) &&
                    has_tensor_map(p.value, p.batch, p.kv_heads, p.key_length);
  return capability == 90 && p.type != AttentionType::float32 && shape && masks && plain && maps;
}

inline bool takes_sm90_backward(const AttentionParameters& p, int capability) {
  return takes_sm90(p, capability) && p.query_length > 0 && p.head_dim <= 128 &&
         p.value_dim <= 128 && has_tensor_map(p.grad_output, p.batch, p.heads, p.query_length);
}

}  // namespace lmengine
