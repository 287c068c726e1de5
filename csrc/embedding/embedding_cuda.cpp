// The operator glove_epoch for CUDA tensors: checks on the GPU, then the stages.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include "embedding/embedding_checks.h"
#include "embedding/embedding_cuda.h"
#include "support/stream.h"

namespace lmengine {
namespace {

template <class T>
T value_at(const T* on_gpu, int64_t index) {
  T value{};
  LMENGINE_CHECK(
      cudaMemcpy(&value, on_gpu + index, sizeof value, cudaMemcpyDeviceToHost) == cudaSuccess,
      std::string("cudaMemcpy: ") + cudaGetErrorString(cudaGetLastError()));
  return value;
}

Tensor glove_epoch(Tensor parameters, Tensor squared_gradients, const Tensor& rows,
                   const Tensor& columns, const Tensor& values, const Tensor& stages, double eta,
                   double x_max, double alpha, double grad_clip) {
  GloveParameters p = glove_parameters(parameters, squared_gradients, rows, columns, values, stages,
                                       eta, x_max, alpha, grad_clip);
  for (const Tensor* tensor :
       std::initializer_list<const Tensor*>{&squared_gradients, &rows, &columns, &values, &stages})
    LMENGINE_CHECK(tensor->is_cuda() && tensor->get_device_index() == parameters.get_device_index(),
                   "glove_epoch: expected all tensors on the parameters' device");
  const cuda::DeviceGuard guard(parameters.get_device_index());
  void* stream = cuda::current_stream(parameters.get_device_index());
  Tensor workspace = torch::stable::new_empty(parameters, {4}, ScalarType::Long);
  const BadEntries bad = check_entries(p, rows.numel(), workspace.mutable_data_ptr(), stream);
  LMENGINE_CHECK(bad.row < 0,
                 bad_index("rows", value_at(p.rows, bad.row), bad.row, p.vocabulary_size));
  LMENGINE_CHECK(bad.column < 0, bad_index("columns", value_at(p.columns, bad.column), bad.column,
                                           p.vocabulary_size));
  LMENGINE_CHECK(bad.value < 0, bad_value(value_at(p.values, bad.value), bad.value));
  LMENGINE_CHECK(!bad.stages, bad_stages(rows.numel()));
  Tensor costs =
      torch::stable::new_empty(parameters, {p.num_stages * p.partitions}, ScalarType::Double);
  Tensor cost = torch::stable::new_empty(parameters, {}, ScalarType::Double);
  p.costs = static_cast<double*>(costs.mutable_data_ptr());
  glove_epoch_cuda(p, static_cast<double*>(cost.mutable_data_ptr()), stream);
  return cost;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CUDA, m) { m.impl("glove_epoch", TORCH_BOX(&glove_epoch)); }

}  // namespace lmengine
