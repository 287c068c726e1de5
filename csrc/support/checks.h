// Checks of operator arguments at the C++ boundary. The friendly messages are made in lmengine/ops;
// these are the last line of defence for whoever calls torch.ops.lmengine directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

namespace lmengine {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define LMENGINE_CHECK(condition, message)                                             \
  do {                                                                                 \
    if (!(condition)) throw std::runtime_error(std::string("lmengine: ") + (message)); \
  } while (0)

inline void check_dim(const Tensor& tensor, int64_t dim, const char* name) {
  LMENGINE_CHECK(tensor.dim() == dim, std::string(name) + ": expected " + std::to_string(dim) +
                                          " dimensions, got " + std::to_string(tensor.dim()));
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t size, const char* name) {
  LMENGINE_CHECK(tensor.size(dim) == size,
                 std::string(name) + ": expected size " + std::to_string(size) + " in dimension " +
                     std::to_string(dim) + ", got " + std::to_string(tensor.size(dim)));
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  LMENGINE_CHECK(tensor.scalar_type() == dtype, std::string(name) + ": unexpected dtype");
}

inline void check_device(const Tensor& tensor, const Tensor& other, const char* name) {
  LMENGINE_CHECK(tensor.device() == other.device(),
                 std::string(name) + ": expected the device of the other tensors");
}

}  // namespace lmengine
