// The launcher of decoding's CUDA kernels. All tensors on the current device, of p.type; every
// pointer and stride a multiple of 16 bytes, head_dim and value_dim multiples of 8 from 8 to 256.
#pragma once

#include "attention/decoding.h"

#ifdef LMENGINE_HOST_EMULATION
#include "support/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace lmengine {

// Appends to the cache, then writes output and logsumexp. Deterministic: no atomics. A position
// that the rotary tables lack rotates to NaN.
void attention_decode_cuda(const DecodingParameters& p, cudaStream_t stream);

}  // namespace lmengine
