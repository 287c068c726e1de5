// What the CPU and the CUDA operators share: checks, allocation, and the parameters' filling in.
// `launch` allocates the workspace and runs the kernels; it is not called where nothing is to do.
#pragma once

#include <optional>
#include <tuple>

#include "recurrent/recurrent.h"
#include "support/checks.h"

namespace lmengine {

inline LstmType lstm_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return LstmType::float32;
    case ScalarType::BFloat16:
      return LstmType::bfloat16;
    case ScalarType::Half:
      return LstmType::float16;
    default:
      LMENGINE_CHECK(false, "input_gates: expected float32, bfloat16 or float16");
  }
}

inline void check_place(const Tensor& tensor, const Tensor& like, const char* name) {
  LMENGINE_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
      std::string(name) + ": expected on the device of the other tensors");
  check_dtype(tensor, like.scalar_type(), name);
}

// `like` has the device and dtype.
inline void check_states(const Tensor& tensor, const LstmSizes& sizes, const Tensor& like,
                         const char* name) {
  check_dim(tensor, 2, name);
  check_size(tensor, 0, sizes.batch, name);
  check_size(tensor, 1, sizes.hidden, name);
  check_place(tensor, like, name);
}

inline void check_weight(const Tensor& weight_hh, const LstmSizes& sizes, const Tensor& like) {
  check_dim(weight_hh, 2, "weight_hh");
  check_size(weight_hh, 0, 4 * sizes.hidden, "weight_hh");
  check_size(weight_hh, 1, sizes.hidden, "weight_hh");
  check_place(weight_hh, like, "weight_hh");
}

template <class Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward_with(
    Launch&& launch, Tensor input_gates, Tensor weight_hh, Tensor hidden, Tensor cell, bool keep) {
  check_dim(input_gates, 3, "input_gates");
  check_dim(hidden, 2, "hidden");
  const LstmSizes sizes{input_gates.size(0), input_gates.size(1), hidden.size(1),
                        lstm_type(input_gates.scalar_type())};
  check_size(input_gates, 2, 4 * sizes.hidden, "input_gates");
  check_weight(weight_hh, sizes, input_gates);
  check_states(hidden, sizes, input_gates, "hidden");
  check_states(cell, sizes, input_gates, "cell");

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
  LstmForward parameters{sizes,
                         input_gates.data_ptr(),
                         weight_hh.data_ptr(),
                         hidden.data_ptr(),
                         cell.data_ptr(),
                         outputs.data_ptr(),
                         final_cell.data_ptr(),
                         keep ? static_cast<float*>(cells.data_ptr()) : nullptr,
                         keep ? gates.data_ptr() : nullptr,
                         nullptr};
  if (sizes.batch > 0 && sizes.hidden > 0) launch(parameters, input_gates);
  Tensor final_hidden = torch::stable::clone(torch::stable::select(outputs, 0, sizes.length - 1));
  return {outputs, final_hidden, final_cell, cells, gates};
}

template <class Launch>
std::tuple<Tensor, Tensor, Tensor> lstm_backward_with(Launch&& launch,
                                                      std::optional<Tensor> grad_outputs,
                                                      std::optional<Tensor> grad_final_hidden,
                                                      std::optional<Tensor> grad_final_cell,
                                                      Tensor weight_hh, Tensor cell, Tensor cells,
                                                      Tensor gates) {
  check_dim(cells, 3, "cells");
  check_dtype(cells, ScalarType::Float, "cells");
  check_dim(gates, 3, "gates");
  const LstmSizes sizes{cells.size(0), cells.size(1), cells.size(2),
                        lstm_type(gates.scalar_type())};
  LMENGINE_CHECK(
      cells.is_cuda() == gates.is_cuda() && cells.get_device_index() == gates.get_device_index(),
      "cells: expected on the device of the other tensors");
  check_size(gates, 0, sizes.length, "gates");
  check_size(gates, 1, sizes.batch, "gates");
  check_size(gates, 2, 4 * sizes.hidden, "gates");
  check_weight(weight_hh, sizes, gates);
  check_states(cell, sizes, gates, "cell");
  if (grad_outputs) {
    check_dim(*grad_outputs, 3, "grad_outputs");
    for (int64_t dim = 0; dim < 3; ++dim)
      check_size(*grad_outputs, dim, cells.size(dim), "grad_outputs");
    check_place(*grad_outputs, gates, "grad_outputs");
    grad_outputs = torch::stable::contiguous(*grad_outputs);
  }
  if (grad_final_hidden) {
    check_states(*grad_final_hidden, sizes, gates, "grad_final_hidden");
    grad_final_hidden = torch::stable::contiguous(*grad_final_hidden);
  }
  if (grad_final_cell) {
    check_states(*grad_final_cell, sizes, gates, "grad_final_cell");
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
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->data_ptr() : nullptr;
  };
  LstmBackward parameters{sizes,
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
                          nullptr};
  if (sizes.batch > 0 && sizes.hidden > 0) launch(parameters, cells);
  return {grad_input_gates, grad_hidden, grad_cell};
}

}  // namespace lmengine
