// The launchers of attention's CUDA kernels. All tensors on the current device, of p.type; every
// pointer and stride of a tensor a multiple of 16 bytes, head_dim and value_dim multiples of 8 from
// 8 to 256. Masks have any strides.
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

// Part of it: writes grad_mask, out of delta.
void attention_mask_gradient_cuda(const AttentionParameters& p, cudaStream_t stream);

// The forward for Hopper.
void attention_forward_sm90(const AttentionParameters& p, cudaStream_t stream);

// `workspace`: so many floats, 16-byte aligned. The gradient of queries is summed by atomics, in an
// order that does not vary only where p.deterministic says so.
void attention_backward_sm90(const AttentionParameters& p, float* workspace, cudaStream_t stream);
int64_t attention_backward_sm90_workspace(const AttentionParameters& p);

}  // namespace lmengine
