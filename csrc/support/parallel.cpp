#include "support/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace lmengine {

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  if (begin >= end) return;
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { body(first, last, context); });
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace lmengine
