// Parameters of the LSTM kernels. All tensors are contiguous; gates are in the order input, forget,
// cell, output (i, f, g, o), as in PyTorch.
#pragma once

#include <cstdint>

namespace lmengine {

enum class LstmType { float32, bfloat16, float16 };

struct LstmSizes {
  int64_t length, batch, hidden;
  LstmType type;    // of the elements
  int threads = 1;  // how many threads may share a step, on the CPU
};

// Elements without a note are of the element type; cell states and workspaces are float always.
struct LstmForward {
  LstmSizes sizes;
  const void* input_gates;  // (length, batch, 4 * hidden): x W_ih' + b_ih + b_hh
  const void* weight_hh;    // (4 * hidden, hidden)
  const void* hidden;       // (batch, hidden)
  const void* cell;         // (batch, hidden)
  void* outputs;            // (length, batch, hidden)
  void* final_cell;         // (batch, hidden)
  float* cells;             // (length, batch, hidden), or null: not kept
  void* gates;              // (length, batch, 4 * hidden) after their nonlinearities, or null
  void* workspace;  // lstm_workspace(sizes) floats, 64-byte aligned; on a GPU see recurrent_cuda.h
};

struct LstmBackward {
  LstmSizes sizes;
  const void* grad_outputs;       // (length, batch, hidden), or null: zero
  const void* grad_final_hidden;  // (batch, hidden), or null: zero
  const void* grad_final_cell;    // (batch, hidden), or null: zero
  const void* weight_hh;
  const void* cell;
  const float* cells;
  const void* gates;
  void* grad_input_gates;  // (length, batch, 4 * hidden)
  void* grad_hidden;       // (batch, hidden)
  void* grad_cell;         // (batch, hidden)
  void* workspace;
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Floats of workspace on the CPU, for either direction: the packed weight (in panels of at most 64
// hidden units), two steps' operands of the recurrent product (hidden states forward, gate
// gradients backward), the running hidden and cell states or their gradients, and the barriers.
inline int64_t lstm_workspace(const LstmSizes& sizes) {
  const int64_t padded = round_up(sizes.hidden, 64);
  return 4 * padded * padded + 2 * sizes.batch * 4 * padded + 2 * sizes.batch * padded +
         16 * (sizes.threads + 1);
}

}  // namespace lmengine
