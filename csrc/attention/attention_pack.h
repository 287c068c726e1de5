// How attention's CPU kernels pack their operands for gemm.h, and deal out their tasks. For
// *_simd.cpp only. A word is a float, or a pair of bfloat16 (gemm.h's PairProduct).
#pragma once

#include <atomic>

#include "attention/attention.h"
#include "support/gemm.h"
#include "support/parallel.h"
#include "support/scratch.h"

namespace lmengine::LMENGINE_ISA {

constexpr int kKeys = 128;  // columns of a block of scores

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t round_up(int64_t count, int64_t step) { return blocks_of(count, step) * step; }

// Calls body with a value of the type that the tensors hold.
template <class Body>
inline void with_type(AttentionType type, Body&& body) {
  switch (type) {
    case AttentionType::float32:
      return body(float{});
    case AttentionType::bfloat16:
      return body(bf16{});
    case AttentionType::float16:
      return body(fp16{});
  }
}

template <class T>
inline T* row_of(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + head * t.head_stride +
         row * t.row_stride;
}

// Up to Vec::width words from `count` elements of a row, zeros behind them.
template <class Product, class T>
inline Vec load_words(const T* from, int count) {
  if constexpr (Product::depth == 1) {
    return Vec::load(from, count);
  } else {
#if defined(__AVX512BF16__)
    const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from))};
#endif
  }
}

// Rows of `dim` elements to rows of `stride` words, a multiple of Vec::width: the left operand of a
// product over the row, or with FloatProduct the right one of a product over rows.
template <class Product, class T>
inline void pack_rows(const T* from, int64_t row_stride, int64_t rows, int dim, int64_t stride,
                      float* to) {
  for (int64_t i = 0; i < rows; ++i, from += row_stride, to += stride)
    for (int d = 0; d < stride; d += Vec::width) {
      const int at = d * Product::depth;
      (at < dim ? load_words<Product>(from + at, dim - at) : Vec::zero()).store(to + d);
    }
}

// Up to kKeys rows to the columns of a (words of dim x kKeys) block: the right operand of a product
// over the row. Columns up to the next multiple of Vec::width are zeros.
template <class Product, class T>
inline void pack_columns(const T* from, int64_t row_stride, int rows, int dim, float* to) {
  const int words = (dim + Product::depth - 1) / Product::depth;
  for (int first = 0; first < rows; first += Vec::width)
    for (int d = 0; d < words; d += Vec::width) {
      Vec tile[Vec::width];
      const int at = d * Product::depth;
      for (int r = 0; r < Vec::width; ++r)
        tile[r] = first + r < rows
                      ? load_words<Product>(from + (first + r) * row_stride + at, dim - at)
                      : Vec::zero();
      transpose(tile);
      for (int c = 0; c < Vec::width && d + c < words; ++c)
        tile[c].store(to + (d + c) * kKeys + first);
    }
}

// Rows to (rows / depth) rows of `stride` words, each word of neighbouring rows: the right operand
// of a product over rows. A missing last row is zeros.
template <class Product, class T>
inline void pack_across_rows(const T* from, int64_t row_stride, int64_t rows, int dim,
                             int64_t stride, float* to) {
  if constexpr (Product::depth == 1) {
    pack_rows<Product>(from, row_stride, rows, dim, stride, to);
  } else {
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < rows; i += 2, from += 2 * row_stride, to += stride)
      for (int d = 0; d < stride; d += Vec::width) {
        const bool inside = d < dim;
        const Vec low = inside ? Vec::load(from + d, dim - d) : Vec::zero();
        const Vec high =
            inside && i + 1 < rows ? Vec::load(from + row_stride + d, dim - d) : Vec::zero();
        pair(low, high).store(to + d);
      }
#endif
  }
}

template <class T>
inline void store_row(const float* from, Vec factor, int dim, T* to) {
  int d = 0;
  for (; d + Vec::width <= dim; d += Vec::width) (Vec::load(from + d) * factor).store(to + d);
  if (d < dim) (Vec::load(from + d, dim - d) * factor).store(to + d, dim - d);
}

// A row of zeros.
template <class T>
inline void clear_row(int dim, T* to) {
  for (int d = 0; d < dim; d += Vec::width) Vec::zero().store(to + d, dim - d);
}

// How many threads are worth their start for so many multiplications.
inline int threads_for(double multiplications) { return multiplications < 1e6 ? 1 : num_threads(); }

// Calls body(task, memory of so many floats) for all tasks; a thread that is done takes the next.
template <class Body>
inline void for_each_task(int threads, int64_t tasks, int64_t floats, Body&& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, smaller(threads, tasks), 1, [&](int64_t, int64_t) {
    const Scratch memory(floats);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      body(task, memory.data());
  });
}

}  // namespace lmengine::LMENGINE_ISA
