// The recurrent product: a few rows of states times one packed panel of the weight, in registers.
// Included by recurrent_simd.cpp only, once for each instruction set.
#pragma once

#include "support/simd.h"

namespace lmengine::LMENGINE_ISA {
namespace {

// A panel is 4 vectors wide. With 32 vector registers 6 rows fit beside it, with 16 only 2.
#if defined(__AVX512F__)
constexpr int max_rows = 6;
#else
constexpr int max_rows = 2;
#endif
constexpr int panel_width = 4 * Vec::width;

// One step of a product consumes `Operand<T>::depth` values of each row. Products of bfloat16 use
// the dot product of pairs where the processor has it; otherwise operands are widened to float.
template <class T>
struct Operand {
  using type = float;
  static constexpr int depth = 1;
  static Vec broadcast(const float* from) { return Vec::set(*from); }
  static Vec load(const float* from) { return Vec::load(from); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  using type = bf16;
  static constexpr int depth = 2;
  static Vec broadcast(const bf16* from) {
    int pair;
    __builtin_memcpy(&pair, from, sizeof(pair));
    return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
  }
  static Vec load(const bf16* from) { return {_mm512_loadu_ps(from)}; }
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v),
                             (__m512bh)_mm512_castps_si512(b.v))};
  }
};
#endif

// acc[r][q] += sum over k of states[r][k] * panel[k][q], k in steps of Operand::depth.
template <class T, int rows>
inline __attribute__((always_inline)) void product(const typename Operand<T>::type* states,
                                                   int64_t stride,
                                                   const typename Operand<T>::type* panel,
                                                   int64_t depth, Vec (&acc)[rows][4]) {
  using Op = Operand<T>;
  for (int64_t k = 0; k < depth; k += Op::depth, panel += panel_width * Op::depth) {
    Vec weight[4];
    for (int q = 0; q < 4; ++q) weight[q] = Op::load(panel + q * Vec::width * Op::depth);
    for (int r = 0; r < rows; ++r) {
      const Vec state = Op::broadcast(states + r * stride + k);
      for (int q = 0; q < 4; ++q) acc[r][q] = Op::multiply_add(state, weight[q], acc[r][q]);
    }
  }
}

// The same, in as many parts as there are rows; `before(r)` is called before part r, for prefetches
// of what a row needs afterwards: all of them at a time would fill the queue of cache misses.
template <class T, int rows, class Before>
inline __attribute__((always_inline)) void product_and(const typename Operand<T>::type* states,
                                                       int64_t stride,
                                                       const typename Operand<T>::type* panel,
                                                       int64_t depth, Vec (&acc)[rows][4],
                                                       Before&& before) {
  constexpr int step = Operand<T>::depth;
  const int64_t part = (depth / step / rows + 1) * step;
  for (int r = 0; r < rows; ++r) {
    before(r);
    const int64_t first = r * part, left = depth - first;
    if (left > 0)
      product<T, rows>(states + first, stride, panel + first * panel_width,
                       left < part ? left : part, acc);
  }
}

// Calls body.template operator()<rows>(first) over [begin, end) in blocks of nearly equal size.
template <class Body>
inline void for_row_blocks(int64_t begin, int64_t end, Body&& body) {
  const int64_t blocks = (end - begin + max_rows - 1) / max_rows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = begin + (end - begin) * block / blocks;
    const int64_t last = begin + (end - begin) * (block + 1) / blocks;
    switch (last - first) {
      case 1:
        body.template operator()<1>(first);
        break;
      case 2:
        body.template operator()<2>(first);
        break;
#if defined(__AVX512F__)
      case 3:
        body.template operator()<3>(first);
        break;
      case 4:
        body.template operator()<4>(first);
        break;
      case 5:
        body.template operator()<5>(first);
        break;
      case 6:
        body.template operator()<6>(first);
        break;
#endif
    }
  }
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

template <class State, class T>
inline State to_state(T value) {
  if constexpr (sizeof(State) == sizeof(T)) {
    return value;
  } else {
    return to_float(value);
  }
}

// Rows of a matrix into columns of a panel: panel[k][column] = source[column * stride + k] for
// k < depth and column < columns <= Vec::width; other columns are zero, and so is the k that fills
// the last pair. The panel's first column is given; its width is panel_width.
template <class T>
inline void pack_transposed(typename Operand<T>::type* panel, const T* source, int64_t stride,
                            int64_t depth, int columns) {
  using State = typename Operand<T>::type;
  constexpr int step = Operand<T>::depth;
  int64_t k = 0;
  if (columns == Vec::width) {
    // a pair of bfloat16 moves as one 32-bit value
    for (; k + Vec::width * step <= depth; k += Vec::width * step) {
      Vec block[Vec::width];
      for (int column = 0; column < Vec::width; ++column) {
        const T* from = source + column * stride + k;
        if constexpr (step == 2) {
          block[column] = Vec::load(reinterpret_cast<const float*>(from));
        } else {
          block[column] = Vec::load(from);
        }
      }
      transpose(block);
      for (int i = 0; i < Vec::width; ++i)
        block[i].store(reinterpret_cast<float*>(panel + (k + i * step) * panel_width));
    }
  }
  for (; k < depth; ++k) {
    State* to = panel + k / step * step * panel_width + k % step;
    for (int column = 0; column < Vec::width; ++column)
      to[column * step] =
          column < columns ? to_state<State>(source[column * stride + k]) : State(0);
  }
  if (depth % step != 0)
    for (int column = 0; column < Vec::width; ++column)
      panel[(depth - 1) * panel_width + column * step + 1] = State(0);
}

// Rows of a matrix into rows of a panel: panel[k][column] = source[k * stride + column], for
// column < columns <= panel_width.
template <class T>
inline void pack_rows(typename Operand<T>::type* panel, const T* source, int64_t stride,
                      int64_t depth, int columns) {
  using State = typename Operand<T>::type;
  constexpr int step = Operand<T>::depth;
  for (int64_t k = 0; k < depth; k += step) {
    for (int q = 0; q < 4; ++q) {
      const int first = q * Vec::width;
      const int count = columns - first < Vec::width ? columns - first : Vec::width;
      State* to = panel + k * panel_width + first * step;
      const T* from = source + k * stride + first;
      if constexpr (step == 1) {
        (count > 0 ? Vec::load(from, count) : Vec::zero()).store(to);
      } else {
        for (int column = 0; column < Vec::width; ++column) {
          to[2 * column] = column < count ? from[column] : State(0);
          to[2 * column + 1] = column < count && k + 1 < depth ? from[stride + column] : State(0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace lmengine::LMENGINE_ISA
