// Checks of cooccurrence's arguments that the CPU and the CUDA operator share.
#pragma once

#include "support/checks.h"

namespace lmengine {

inline void check_cooccurrence(const Tensor& tokens, int64_t vocabulary_size, int64_t window_size) {
  check_dim(tokens, 1, "tokens");
  check_dtype(tokens, ScalarType::Int, "tokens");
  LMENGINE_CHECK(tokens.is_contiguous(), "tokens: expected a contiguous tensor");
  LMENGINE_CHECK(tokens.numel() < int64_t{1} << 32, "tokens: expected fewer than 2^32");
  LMENGINE_CHECK(vocabulary_size >= 1 && vocabulary_size < int64_t{1} << 31,
                 "vocabulary_size: expected 1 to 2^31 - 1");
  LMENGINE_CHECK(window_size >= 1 && window_size < 32768, "window_size: expected 1 to 32767");
}

}  // namespace lmengine
