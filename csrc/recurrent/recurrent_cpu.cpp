// The LSTM operators on the CPU, around the kernels of recurrent_simd.cpp.
#include <torch/csrc/stable/library.h>

#include "recurrent/recurrent_host.h"
#include "support/instruction_set.h"
#include "support/parallel.h"
#include "support/scratch.h"

LMENGINE_DECLARE_KERNEL(lstm_forward, LstmForward)
LMENGINE_DECLARE_KERNEL(lstm_backward, LstmBackward)

namespace lmengine {
namespace {

LstmSizes checked(LstmSizes sizes) {
  LMENGINE_CHECK(sizes.type != LstmType::float16,
                 "input_gates: expected float32 or bfloat16 on the CPU, got float16");
  sizes.threads = num_threads();
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor input_gates, Tensor weight_hh,
                                                           Tensor hidden, Tensor cell, bool keep) {
  const auto launch = [](LstmForward& p, const Tensor&) {
    p.sizes = checked(p.sizes);
    const Scratch workspace(lstm_workspace(p.sizes));
    p.workspace = workspace.data();
    LMENGINE_DISPATCH(lstm_forward, p);
  };
  return lstm_forward_with(launch, input_gates, weight_hh, hidden, cell, keep);
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_outputs,
                                            std::optional<Tensor> grad_final_hidden,
                                            std::optional<Tensor> grad_final_cell, Tensor weight_hh,
                                            Tensor cell, Tensor cells, Tensor gates) {
  const auto launch = [](LstmBackward& p, const Tensor&) {
    p.sizes = checked(p.sizes);
    const Scratch workspace(lstm_workspace(p.sizes));
    p.workspace = workspace.data();
    LMENGINE_DISPATCH(lstm_backward, p);
  };
  return lstm_backward_with(launch, grad_outputs, grad_final_hidden, grad_final_cell, weight_hh,
                            cell, cells, gates);
}

}  // namespace
}  // namespace lmengine

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lmengine::forward));
  m.impl("lstm_backward", TORCH_BOX(&lmengine::backward));
}
