// Tensor maps, which CUDA's driver encodes. It is asked for the function at run time, so that the
// library is not linked to it and loads on machines without one.
#include "support/tensor_map.h"

#include <stdexcept>
#include <string>

#ifndef LMENGINE_HOST_EMULATION
#include <cuda_runtime.h>
#endif

namespace lmengine {

TensorMap tensor_map(const void* data, bool is_half, int64_t batch, int64_t heads, int64_t length,
                     int dim, int64_t batch_stride, int64_t head_stride, int64_t row_stride,
                     int rows) {
  const uint64_t sizes[4] = {static_cast<uint64_t>(dim), static_cast<uint64_t>(length),
                             static_cast<uint64_t>(heads), static_cast<uint64_t>(batch)};
  const int64_t steps[3] = {row_stride, head_stride, batch_stride};
  uint64_t strides[3];
  for (int d = 0; d < 3; ++d) {
    strides[d] = static_cast<uint64_t>(steps[d]) * 2;
    // the stride of a dimension of size 1 may be anything: as if the tensor were contiguous
    if (sizes[d + 1] == 1) strides[d] = d == 0 ? sizes[0] * 2 : strides[d - 1] * sizes[d];
  }
  const uint32_t box[4] = {64, static_cast<uint32_t>(rows), 1, 1};
  TensorMap map;
#ifdef LMENGINE_HOST_EMULATION
  if (reinterpret_cast<uintptr_t>(data) % 16) emulation::fail("tensor_map: address");
  for (uint64_t stride : strides)
    if (stride % 16 || stride >> 40) emulation::fail("tensor_map: stride");
  for (uint64_t size : sizes)
    if (size == 0 || size > 1ull << 32) emulation::fail("tensor_map: size");
  if (rows < 1 || rows > 256) emulation::fail("tensor_map: rows");
  map.base = static_cast<const unsigned char*>(data);
  map.rank = 4, map.element_bytes = 2;
  map.strides[0] = 2;
  for (int d = 0; d < 4; ++d) map.sizes[d] = sizes[d], map.box[d] = box[d];
  for (int d = 0; d < 3; ++d) map.strides[d + 1] = strides[d];
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("lmengine: the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  const uint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(data), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("lmengine: cuTensorMapEncodeTiled: error " + std::to_string(result));
#endif
  return map;
}

}  // namespace lmengine
