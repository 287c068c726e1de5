// Which calls of attention go to the kernels for Hopper.
#pragma once

#include "attention/attention.h"

namespace lmengine {

// `capability`: of the device, 90 for 9.0. These kernels have run on the emulation of
// tests/cuda_host only, never on a GPU: to do without them, return false here.
inline bool takes_sm90(const AttentionParameters& p, int capability) {
  const bool shape = p.head_dim % 8 == 0 && p.value_dim % 8 == 0 && p.head_dim >= 8 &&
                     p.value_dim >= 8 && p.head_dim <= 256 && p.value_dim <= 256;
  const bool masks = p.mask.type == MaskType::none && p.alibi_slopes == nullptr &&
                     p.prefix_lengths == nullptr && p.key_lengths == nullptr &&
                     p.cu_query == nullptr && p.window_left < 0;
  const bool plain = p.seed == nullptr && p.softcap == 0 && p.scale > 0;
  return capability == 90 && p.type != AttentionType::float32 && shape && masks && plain;
}

inline bool takes_sm90_backward(const AttentionParameters& p, int capability) {
  return takes_sm90(p, capability) && p.head_dim <= 128 && p.value_dim <= 128 && !p.deterministic;
}

}  // namespace lmengine
