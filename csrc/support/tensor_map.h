// Tensor maps: what the tensor memory accelerator has to know of a tensor.
#pragma once

#include <cstdint>

#ifdef LMENGINE_HOST_EMULATION
#include "cuda_host/emulation_sm90.h"
#else
#include <cuda.h>

namespace lmengine {
using TensorMap = CUtensorMap;
}
#endif

namespace lmengine {

// The map of a (batch, heads, length, dim) tensor of 16-bit elements, strides in elements, for
// copies of `rows` rows by 64 elements of dim. Sizes 1 and more; the address and the strides
// multiples of 16 bytes.
TensorMap tensor_map(const void* data, bool is_half, int64_t batch, int64_t heads, int64_t length,
                     int dim, int64_t batch_stride, int64_t head_stride, int64_t row_stride,
                     int rows);

}  // namespace lmengine
