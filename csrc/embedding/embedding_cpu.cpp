// The operator glove_epoch for CPU tensors: checks, then the kernel of this processor.
#include "embedding/embedding.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "embedding/embedding_checks.h"
#include "support/instruction_set.h"

LMENGINE_DECLARE_KERNEL(glove_epoch, GloveParameters)

namespace lmengine {
namespace {

void check_index(const int32_t* indices, int64_t entries, int64_t size, const char* name) {
  for (int64_t i = 0; i < entries; ++i)
    LMENGINE_CHECK(indices[i] >= 0 && indices[i] < size, bad_index(name, indices[i], i, size));
}

void check_entries(const GloveParameters& p, int64_t entries) {
  check_index(p.rows, entries, p.vocabulary_size, "rows");
  check_index(p.columns, entries, p.vocabulary_size, "columns");
  for (int64_t i = 0; i < entries; ++i)
    LMENGINE_CHECK(p.values[i] > 0 && p.values[i] < INFINITY, bad_value(p.values[i], i));
  for (int64_t s = 0; s < p.num_stages; ++s) {
    const int64_t* bounds = p.stages + s * (p.partitions + 1);
    bool rising = bounds[0] >= 0 && bounds[p.partitions] <= entries;
    for (int64_t part = 0; part < p.partitions; ++part)
      rising = rising && bounds[part] <= bounds[part + 1];
    LMENGINE_CHECK(rising, bad_stages(entries));
  }
}

Tensor glove_epoch(Tensor parameters, Tensor squared_gradients, const Tensor& rows,
                   const Tensor& columns, const Tensor& values, const Tensor& stages, double eta,
                   double x_max, double alpha, double grad_clip) {
  GloveParameters p = glove_parameters(parameters, squared_gradients, rows, columns, values, stages,
                                       eta, x_max, alpha, grad_clip);
  check_entries(p, rows.numel());
  std::vector<double> costs(p.num_stages * p.partitions, 0.0);
  p.costs = costs.data();
  LMENGINE_DISPATCH(glove_epoch, p);
  double cost = 0;
  for (double part : costs) cost += part;
  Tensor result = torch::stable::new_empty(parameters, {}, ScalarType::Double);
  *static_cast<double*>(result.mutable_data_ptr()) = cost;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) { m.impl("glove_epoch", TORCH_BOX(&glove_epoch)); }

}  // namespace lmengine
