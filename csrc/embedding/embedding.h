// GloVe's training epoch: parameters. What is computed is said in lmengine/ops/embedding.py.
#pragma once

#include <cstdint>

namespace lmengine {

struct GloveParameters {
  float* parameters;         // (2, vocabulary, dim + 1): words, contexts; the last column is a bias
  float* squared_gradients;  // (2, vocabulary, dim + 1)
  const int32_t* rows;       // (entries)
  const int32_t* columns;    // (entries)
  const float* values;       // (entries)
  const int64_t* stages;     // (stages, partitions + 1): where a stage's partitions begin and end
  int64_t vocabulary_size, dim, num_stages, partitions;
  float eta, x_max, alpha, grad_clip;
  double* costs;  // (stages, partitions)
};

}  // namespace lmengine
