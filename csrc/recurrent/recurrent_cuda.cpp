// The LSTM operators on a GPU: checks and allocation around the kernels of recurrent_sm80.cu.
#include <torch/csrc/stable/library.h>

#include "recurrent/recurrent_cuda.h"
#include "recurrent/recurrent_host.h"
#include "support/stream.h"

namespace lmengine {
namespace {

Tensor allocate(int64_t bytes, const Tensor& like) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor input_gates, Tensor weight_hh,
                                                           Tensor hidden, Tensor cell, bool keep) {
  const cuda::DeviceGuard guard(input_gates.get_device_index());
  const auto launch = [](LstmForward& p, const Tensor& like) {
    const LstmPlan plan = lstm_forward_plan(p.sizes);
    const Tensor workspace = allocate(lstm_forward_workspace(p.sizes, plan), like);
    p.workspace = workspace.data_ptr();
    lstm_forward_cuda(p, plan, cuda::current_stream(like.get_device_index()));
  };
  return lstm_forward_with(launch, input_gates, weight_hh, hidden, cell, keep);
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_outputs,
                                            std::optional<Tensor> grad_final_hidden,
                                            std::optional<Tensor> grad_final_cell, Tensor weight_hh,
                                            Tensor cell, Tensor cells, Tensor gates) {
  const cuda::DeviceGuard guard(gates.get_device_index());
  const auto launch = [](LstmBackward& p, const Tensor& like) {
    const LstmPlan plan = lstm_backward_plan(p.sizes);
    const Tensor workspace = allocate(lstm_backward_workspace(p.sizes, plan), like);
    p.workspace = workspace.data_ptr();
    lstm_backward_cuda(p, plan, cuda::current_stream(like.get_device_index()));
  };
  return lstm_backward_with(launch, grad_outputs, grad_final_hidden, grad_final_cell, weight_hh,
                            cell, cells, gates);
}

}  // namespace
}  // namespace lmengine

STABLE_TORCH_LIBRARY_IMPL(lmengine, CUDA, m) {
  m.impl("lstm_forward", TORCH_BOX(&lmengine::forward));
  m.impl("lstm_backward", TORCH_BOX(&lmengine::backward));
}
