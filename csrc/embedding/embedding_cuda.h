// GloVe's epoch on a GPU, as the operator and the tests call it. All pointers are the GPU's, the
// parameters' `costs` too; `stream` is a cudaStream_t.
#pragma once

#include "embedding/embedding.h"

namespace lmengine {

// What check_entries finds: the first entry with a bad row, column and value, or -1, and whether
// the stages are bad.
struct BadEntries {
  int64_t row, column, value;
  bool stages;
};

// Waits for the GPU. `workspace` has 32 bytes.
BadEntries check_entries(const GloveParameters& p, int64_t entries, void* workspace, void* stream);

// Runs the epoch and writes the sum of the costs to `cost`.
void glove_epoch_cuda(const GloveParameters& p, double* cost, void* stream);

}  // namespace lmengine
