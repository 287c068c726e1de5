// The launchers of attention's CUDA kernels. All tensors on the current device, of p.type; every
// pointer and stride a multiple of 16 bytes, head_dim a multiple of 8 from 16 to 128.
#pragma once

#include "attention/attention.h"

#ifdef LMENGINE_HOST_EMULATION
#include "support/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace lmengine {

// Writes output and logsumexp.
void attention_forward_cuda(const AttentionParameters& p, cudaStream_t stream);

// Writes delta and the gradients. Deterministic: no atomics.
void attention_backward_cuda(const AttentionParameters& p, cudaStream_t stream);

}  // namespace lmengine
