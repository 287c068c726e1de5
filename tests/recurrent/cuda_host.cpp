// The LSTM's CUDA launchers for tests on the CPU, with the plan given or (rows = 0) chosen.
#include <cstdlib>
#include <memory>

#include "recurrent/recurrent_cuda.h"

namespace {

using namespace lmengine;

LstmPlan plan_or(const LstmPlan& given, LstmPlan (*choose)(const LstmSizes&),
                 const LstmSizes& sizes) {
  return given.rows ? given : choose(sizes);
}

// As long as was asked for, and filled with NaN.
std::unique_ptr<void, decltype(&std::free)> allocate(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, static_cast<size_t>(bytes))) std::abort();
  std::memset(memory, 0xff, static_cast<size_t>(bytes));
  return {memory, &std::free};
}

}  // namespace

extern "C" {

void lstm_forward(const void* input_gates, const void* weight_hh, const void* hidden,
                  const void* cell, void* outputs, void* final_cell, float* cells, void* gates,
                  int64_t length, int64_t batch, int64_t units, int64_t type, int64_t rows,
                  int64_t tiles, int64_t whole) {
  const LstmSizes sizes{length, batch, units, static_cast<LstmType>(type)};
  const LstmPlan plan = plan_or({static_cast<int>(rows), static_cast<int>(tiles), whole != 0},
                                lstm_forward_plan, sizes);
  const auto workspace = allocate(lstm_forward_workspace(sizes, plan));
  lstm_forward_cuda({sizes, input_gates, weight_hh, hidden, cell, outputs, final_cell, cells, gates,
                     workspace.get()},
                    plan, nullptr);
}

void lstm_backward(const void* grad_outputs, const void* grad_final_hidden,
                   const void* grad_final_cell, const void* weight_hh, const void* cell,
                   const float* cells, const void* gates, void* grad_input_gates, void* grad_hidden,
                   void* grad_cell, int64_t length, int64_t batch, int64_t units, int64_t type,
                   int64_t rows, int64_t tiles, int64_t whole) {
  const LstmSizes sizes{length, batch, units, static_cast<LstmType>(type)};
  const LstmPlan plan = plan_or({static_cast<int>(rows), static_cast<int>(tiles), whole != 0},
                                lstm_backward_plan, sizes);
  const auto workspace = allocate(lstm_backward_workspace(sizes, plan));
  lstm_backward_cuda({sizes, grad_outputs, grad_final_hidden, grad_final_cell, weight_hh, cell,
                      cells, gates, grad_input_gates, grad_hidden, grad_cell, workspace.get()},
                     plan, nullptr);
}

// What is chosen: rows, tiles, whole.
void lstm_plans(int64_t* forward, int64_t* backward, int64_t length, int64_t batch, int64_t units,
                int64_t type) {
  const LstmSizes sizes{length, batch, units, static_cast<LstmType>(type)};
  const LstmPlan plans[] = {lstm_forward_plan(sizes), lstm_backward_plan(sizes)};
  for (int i = 0; i < 2; ++i) {
    int64_t* to = i ? backward : forward;
    to[0] = plans[i].rows;
    to[1] = plans[i].tiles;
    to[2] = plans[i].whole;
  }
}

}  // extern "C"
