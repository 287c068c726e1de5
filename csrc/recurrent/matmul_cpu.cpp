// The float32 matrix product on the CPU: checks and allocation around matmul_simd.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "recurrent/matmul.h"
#include "support/checks.h"
#include "support/instruction_set.h"
#include "support/scratch.h"

LMENGINE_DECLARE_KERNEL(matmul, Matmul)

namespace lmengine {
namespace {

Tensor matmul(Tensor left, Tensor right, std::optional<Tensor> bias) {
  check_dim(left, 2, "left");
  check_dim(right, 2, "right");
  check_size(right, 0, left.size(1), "right");
  check_dtype(left, ScalarType::Float, "left");
  check_dtype(right, ScalarType::Float, "right");
  if (bias) {
    check_dim(*bias, 1, "bias");
    check_size(*bias, 0, right.size(1), "bias");
    check_dtype(*bias, ScalarType::Float, "bias");
    bias = torch::stable::contiguous(*bias);
  }
  const int64_t rows = left.size(0), depth = left.size(1), columns = right.size(1);
  Tensor output = torch::stable::new_empty(left, {rows, columns});
  if (rows == 0 || columns == 0) return output;
  if (depth == 0) {
    torch::stable::zero_(output);
    if (!bias) return output;
    for (int64_t row = 0; row < rows; ++row) {
      Tensor to = torch::stable::select(output, 0, row);
      torch::stable::copy_(to, *bias);
    }
    return output;
  }
  const Scratch workspace(matmul_workspace(depth, columns));
  const auto data = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  const Matmul parameters{rows,
                          depth,
                          columns,
                          data(left),
                          {left.stride(0), left.stride(1)},
                          data(right),
                          {right.stride(0), right.stride(1)},
                          bias ? data(*bias) : nullptr,
                          data(output),
                          workspace.data()};
  LMENGINE_DISPATCH(matmul, parameters);
  return output;
}

}  // namespace
}  // namespace lmengine

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) { m.impl("matmul", TORCH_BOX(&lmengine::matmul)); }
