// Parameters of the float32 matrix product around the recurrence: the products of inputs and of
// gradients that take all steps at once.
#pragma once

#include <cstdint>

#include "recurrent/recurrent.h"

namespace lmengine {

// output = left @ right + bias, with output contiguous.
struct Matmul {
  int64_t rows, depth, columns;
  const float* left;  // element (row, k) at row * left_strides[0] + k * left_strides[1]
  int64_t left_strides[2];
  const float* right;  // element (k, column)
  int64_t right_strides[2];
  const float* bias;  // (columns,), or null
  float* output;      // (rows, columns)
  float* workspace;   // matmul_workspace(...) floats
};

// Depth is cut into blocks, so that a block of a panel stays in the first-level cache.
constexpr int64_t matmul_block_depth = 256;

// The right factor, packed into panels of at most 64 columns.
inline int64_t matmul_workspace(int64_t depth, int64_t columns) {
  return depth * round_up(columns, 64);
}

}  // namespace lmengine
