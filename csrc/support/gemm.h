// The inner product of the CPU kernels: a small matrix product in float on packed blocks that lie
// in the first two cache levels. For *_simd.cpp only.
#pragma once

#include "support/simd.h"

namespace lmengine::LMENGINE_ISA {

// As many accumulators as leave registers for a row of B and a broadcast.
constexpr int kAccumulators = Vec::width == 16 ? 24 : 12;
constexpr int kMaxVectors = Vec::width == 16 ? 4 : 2;

// What a product multiplies: floats, or pairs of bfloat16 that are summed in float, each pair where
// a float would be. A pair holds two neighbours along k; k counts pairs.
struct FloatProduct {
  static constexpr int depth = 1;
  static Vec add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct PairProduct {
  static constexpr int depth = 2;
  static Vec add(Vec a, Vec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
#endif

// C (rows x vectors*width) = or += A (rows x k) B (k x vectors*width).
// A's element (i, l) is a[i * a_row + l * a_column]; B and C have rows of ldb and ldc floats.
template <int rows, int vectors, class Product = FloatProduct>
inline void gemm_tile(int k, const float* a, int64_t a_row, int64_t a_column, const float* b,
                      int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  Vec sum[rows][vectors];
#pragma GCC unroll 24
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
      sum[i][j] = accumulate ? Vec::load(c + i * ldc + j * Vec::width) : Vec::zero();
  for (int l = 0; l < k; ++l) {
    Vec row[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) row[j] = Vec::load(b + l * ldb + j * Vec::width);
#pragma GCC unroll 24
    for (int i = 0; i < rows; ++i) {
      const Vec value = Vec::set(a[i * a_row + l * a_column]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = Product::add(value, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j].store(c + i * ldc + j * Vec::width);
}

template <int vectors, class Product>
inline void gemm_panel(int m, int k, const float* a, int64_t a_row, int64_t a_column,
                       const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  constexpr int rows = kAccumulators / vectors < 12 ? kAccumulators / vectors : 12;
  int i = 0;
  for (; i + rows <= m; i += rows)
    gemm_tile<rows, vectors, Product>(k, a + i * a_row, a_row, a_column, b, ldb, c + i * ldc, ldc,
                                      accumulate);
  if (rows > 8 && i + 8 <= m) {
    gemm_tile<8, vectors, Product>(k, a + i * a_row, a_row, a_column, b, ldb, c + i * ldc, ldc,
                                   accumulate);
    i += 8;
  }
  if (rows > 4 && i + 4 <= m) {
    gemm_tile<4, vectors, Product>(k, a + i * a_row, a_row, a_column, b, ldb, c + i * ldc, ldc,
                                   accumulate);
    i += 4;
  }
  for (; i + 2 <= m; i += 2)
    gemm_tile<2, vectors, Product>(k, a + i * a_row, a_row, a_column, b, ldb, c + i * ldc, ldc,
                                   accumulate);
  if (i < m)
    gemm_tile<1, vectors, Product>(k, a + i * a_row, a_row, a_column, b, ldb, c + i * ldc, ldc,
                                   accumulate);
}

// C (m x n) = or += A (m x k) B (k x n), n a multiple of Vec::width.
template <class Product = FloatProduct>
inline void gemm(int m, int n, int k, const float* a, int64_t a_row, int64_t a_column,
                 const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int j = 0;
  for (; j + kMaxVectors * Vec::width <= n; j += kMaxVectors * Vec::width)
    gemm_panel<kMaxVectors, Product>(m, k, a, a_row, a_column, b + j, ldb, c + j, ldc, accumulate);
  const int left = (n - j) / Vec::width;
  if constexpr (kMaxVectors > 2) {
    if (left == 3)
      gemm_panel<3, Product>(m, k, a, a_row, a_column, b + j, ldb, c + j, ldc, accumulate);
    if (left == 2)
      gemm_panel<2, Product>(m, k, a, a_row, a_column, b + j, ldb, c + j, ldc, accumulate);
  }
  if (left == 1)
    gemm_panel<1, Product>(m, k, a, a_row, a_column, b + j, ldb, c + j, ldc, accumulate);
}

}  // namespace lmengine::LMENGINE_ISA
