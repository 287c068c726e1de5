// GloVe's epoch on a GPU for runs on the CPU.
#include <vector>

#include "embedding/embedding_cuda.h"

extern "C" void glove_epoch(const int32_t* rows, const int32_t* columns, const float* values,
                            const int64_t* stages, float* parameters, float* squared_gradients,
                            double* costs, double* cost, int64_t vocabulary_size, int64_t dim,
                            int64_t num_stages, int64_t partitions, float eta, float x_max,
                            float alpha, float grad_clip) {
  lmengine::glove_epoch_cuda(
      {parameters, squared_gradients, rows, columns, values, stages, vocabulary_size, dim,
       num_stages, partitions, eta, x_max, alpha, grad_clip, costs},
      cost, nullptr);
}

// found (4): the first bad row, column and value, and whether the stages are bad.
extern "C" void check_entries(const int32_t* rows, const int32_t* columns, const float* values,
                              const int64_t* stages, int64_t* found, int64_t vocabulary_size,
                              int64_t num_stages, int64_t partitions, int64_t entries) {
  lmengine::GloveParameters p{};
  p.rows = rows;
  p.columns = columns;
  p.values = values;
  p.stages = stages;
  p.vocabulary_size = vocabulary_size;
  p.num_stages = num_stages;
  p.partitions = partitions;
  std::vector<uint64_t> workspace(4);
  const lmengine::BadEntries bad = lmengine::check_entries(p, entries, workspace.data(), nullptr);
  found[0] = bad.row;
  found[1] = bad.column;
  found[2] = bad.value;
  found[3] = bad.stages;
}
