// The LSTM's CUDA kernels as the host sees them: how a call is cut into blocks, and its launchers.
#pragma once

#include "recurrent/recurrent.h"

#ifdef LMENGINE_HOST_EMULATION
#include "support/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace lmengine {

// Every block has some rows of the batch and some columns of the recurrent product: the four gates
// of its hidden units forward, the hidden units themselves backward.
struct LstmPlan {
  int rows;    // 16, 32 or 64
  int tiles;   // of 8 columns: 4 or 8 forward, 2 or 4 backward
  bool whole;  // one launch for the sequence, the weight in shared memory; or one for each step
};

// The quickest plan that the current device can run.
LstmPlan lstm_forward_plan(const LstmSizes& sizes);
LstmPlan lstm_backward_plan(const LstmSizes& sizes);

// Bytes of workspace, 128-byte aligned.
int64_t lstm_forward_workspace(const LstmSizes& sizes, const LstmPlan& plan);
int64_t lstm_backward_workspace(const LstmSizes& sizes, const LstmPlan& plan);

// length, batch and hidden are at least 1.
void lstm_forward_cuda(const LstmForward& parameters, const LstmPlan& plan, cudaStream_t stream);
void lstm_backward_cuda(const LstmBackward& parameters, const LstmPlan& plan, cudaStream_t stream);

}  // namespace lmengine
