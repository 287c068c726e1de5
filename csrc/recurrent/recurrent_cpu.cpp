// The LSTM operators on the CPU: checks and allocation around the kernels of recurrent_simd.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "recurrent/recurrent.h"
#include "support/checks.h"
#include "support/instruction_set.h"
#include "support/parallel.h"

LMENGINE_DECLARE_KERNEL(lstm_forward, LstmForward)
LMENGINE_DECLARE_KERNEL(lstm_backward, LstmBackward)

namespace lmengine {
namespace {

LstmSizes sizes_of(int64_t length, int64_t batch, int64_t hidden, ScalarType dtype) {
  LMENGINE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                 "input_gates: expected float32 or bfloat16");
  return {length, batch, hidden, dtype == ScalarType::BFloat16, num_threads()};
}

Tensor workspace_for(const LstmSizes& sizes, const Tensor& like) {
  return torch::stable::new_empty(like, {lstm_workspace(sizes)}, ScalarType::Float);
}

void check_states(const Tensor& tensor, const LstmSizes& sizes, ScalarType dtype,
                  const char* name) {
  check_dim(tensor, 2, name);
  check_size(tensor, 0, sizes.batch, name);
  check_size(tensor, 1, sizes.hidden, name);
  check_dtype(tensor, dtype, name);
}

void check_weight(const Tensor& weight_hh, const LstmSizes& sizes, ScalarType dtype) {
  check_dim(weight_hh, 2, "weight_hh");
  check_size(weight_hh, 0, 4 * sizes.hidden, "weight_hh");
  check_size(weight_hh, 1, sizes.hidden, "weight_hh");
  check_dtype(weight_hh, dtype, "weight_hh");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(Tensor input_gates,
                                                                Tensor weight_hh, Tensor hidden,
                                                                Tensor cell, bool keep) {
  check_dim(input_gates, 3, "input_gates");
  check_dim(hidden, 2, "hidden");
  const ScalarType dtype = input_gates.scalar_type();
  const LstmSizes sizes = sizes_of(input_gates.size(0), input_gates.size(1), hidden.size(1), dtype);
  check_size(input_gates, 2, 4 * sizes.hidden, "input_gates");
  check_weight(weight_hh, sizes, dtype);
  check_states(hidden, sizes, dtype, "hidden");
  check_states(cell, sizes, dtype, "cell");

  input_gates = torch::stable::contiguous(input_gates);
  weight_hh = torch::stable::contiguous(weight_hh);
  hidden = torch::stable::contiguous(hidden);
  cell = torch::stable::contiguous(cell);
  const int64_t kept = keep ? sizes.length : 0;
  Tensor outputs = torch::stable::new_empty(input_gates, {sizes.length, sizes.batch, sizes.hidden});
  Tensor final_cell = torch::stable::new_empty(input_gates, {sizes.batch, sizes.hidden});
  Tensor cells =
      torch::stable::new_empty(input_gates, {kept, sizes.batch, sizes.hidden}, ScalarType::Float);
  Tensor gates = torch::stable::new_empty(input_gates, {kept, sizes.batch, 4 * sizes.hidden});
  if (sizes.length == 0) {
    return {outputs, torch::stable::clone(hidden), torch::stable::clone(cell), cells, gates};
  }
  Tensor workspace = workspace_for(sizes, input_gates);
  const LstmForward parameters{sizes,
                               input_gates.data_ptr(),
                               weight_hh.data_ptr(),
                               hidden.data_ptr(),
                               cell.data_ptr(),
                               outputs.data_ptr(),
                               final_cell.data_ptr(),
                               keep ? static_cast<float*>(cells.data_ptr()) : nullptr,
                               keep ? gates.data_ptr() : nullptr,
                               static_cast<float*>(workspace.data_ptr())};
  if (sizes.batch > 0 && sizes.hidden > 0) LMENGINE_DISPATCH(lstm_forward, parameters);
  Tensor final_hidden = torch::stable::clone(torch::stable::select(outputs, 0, sizes.length - 1));
  return {outputs, final_hidden, final_cell, cells, gates};
}

std::tuple<Tensor, Tensor, Tensor> lstm_backward(std::optional<Tensor> grad_outputs,
                                                 std::optional<Tensor> grad_final_hidden,
                                                 std::optional<Tensor> grad_final_cell,
                                                 Tensor weight_hh, Tensor cell, Tensor cells,
                                                 Tensor gates) {
  check_dim(cells, 3, "cells");
  check_dtype(cells, ScalarType::Float, "cells");
  check_dim(gates, 3, "gates");
  const ScalarType dtype = gates.scalar_type();
  const LstmSizes sizes = sizes_of(cells.size(0), cells.size(1), cells.size(2), dtype);
  check_size(gates, 0, sizes.length, "gates");
  check_size(gates, 1, sizes.batch, "gates");
  check_size(gates, 2, 4 * sizes.hidden, "gates");
  check_weight(weight_hh, sizes, dtype);
  check_states(cell, sizes, dtype, "cell");
  if (grad_outputs) {
    check_dim(*grad_outputs, 3, "grad_outputs");
    for (int64_t dim = 0; dim < 3; ++dim)
      check_size(*grad_outputs, dim, cells.size(dim), "grad_outputs");
    check_dtype(*grad_outputs, dtype, "grad_outputs");
    grad_outputs = torch::stable::contiguous(*grad_outputs);
  }
  if (grad_final_hidden) {
    check_states(*grad_final_hidden, sizes, dtype, "grad_final_hidden");
    grad_final_hidden = torch::stable::contiguous(*grad_final_hidden);
  }
  if (grad_final_cell) {
    check_states(*grad_final_cell, sizes, dtype, "grad_final_cell");
    grad_final_cell = torch::stable::contiguous(*grad_final_cell);
  }
  weight_hh = torch::stable::contiguous(weight_hh);
  cell = torch::stable::contiguous(cell);
  cells = torch::stable::contiguous(cells);
  gates = torch::stable::contiguous(gates);

  Tensor grad_input_gates = torch::stable::empty_like(gates);
  Tensor grad_hidden = torch::stable::empty_like(cell);
  Tensor grad_cell = torch::stable::empty_like(cell);
  if (sizes.length == 0) {
    for (auto& [grad, from] :
         {std::pair{&grad_hidden, &grad_final_hidden}, std::pair{&grad_cell, &grad_final_cell}})
      *from ? torch::stable::copy_(*grad, **from) : torch::stable::zero_(*grad);
    return {grad_input_gates, grad_hidden, grad_cell};
  }
  Tensor workspace = workspace_for(sizes, cells);
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->data_ptr() : nullptr;
  };
  const LstmBackward parameters{sizes,
                                data(grad_outputs),
                                data(grad_final_hidden),
                                data(grad_final_cell),
                                weight_hh.data_ptr(),
                                cell.data_ptr(),
                                static_cast<const float*>(cells.data_ptr()),
                                gates.data_ptr(),
                                grad_input_gates.data_ptr(),
                                grad_hidden.data_ptr(),
                                grad_cell.data_ptr(),
                                static_cast<float*>(workspace.data_ptr())};
  if (sizes.batch > 0 && sizes.hidden > 0) LMENGINE_DISPATCH(lstm_backward, parameters);
  return {grad_input_gates, grad_hidden, grad_cell};
}

}  // namespace
}  // namespace lmengine

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lmengine::lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&lmengine::lstm_backward));
}
