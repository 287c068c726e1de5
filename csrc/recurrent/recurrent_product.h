// The recurrent product of a block on a GPU: its rows of states times its columns of the packed
// weight, the depth divided among warps. For recurrent_sm80.cu only.
//
// The warps' sums lie in shared memory as (part, row, column) afterwards. The depth is rounded up
// to a multiple of 32, with zeros.
#pragma once

#include "support/tensor_core.h"

namespace lmengine {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kDepth = 32;             // of a step of the product
constexpr int kSumRows = kWarps * 16;  // parts * rows of the sums, for every plan

// Where a sum lies: columns of neighbouring rows are shifted against each other, because 4 rows are
// written at a time.
template <int kColumns>
__device__ __forceinline__ int sum_at(int row, int column) {
  return row * kColumns + (column ^ ((row & 3) << 3 & (kColumns - 1)));
}

// How the weight is packed: vectors of 16 bytes, in the order in which lanes load them. A slice, a
// block's columns, is `depth * columns / kValues` vectors.
template <class T>
struct Packing;

// For the matrix instruction: (step, tile, lane). A lane holds 8 consecutive values of the depth in
// one column; which of them the instruction takes for which k is the same for states and weights.
template <class T>
struct Packing16 {
  static constexpr int kValues = 8;
  template <int kTiles>
  __device__ static void position(int64_t vector, int value, int64_t& k, int& column) {
    const int lane = static_cast<int>(vector % 32), tile = static_cast<int>(vector / 32 % kTiles);
    k = vector / (32 * kTiles) * kDepth + 8 * (lane % 4) + value;
    column = tile * 8 + lane / 4;
  }
};
template <>
struct Packing<__nv_bfloat16> : Packing16<__nv_bfloat16> {};
template <>
struct Packing<__half> : Packing16<__half> {};

// In float: (k, column).
template <>
struct Packing<float> {
  static constexpr int kValues = 4;
  template <int kTiles>
  __device__ static void position(int64_t vector, int value, int64_t& k, int& column) {
    k = vector / (2 * kTiles);
    column = static_cast<int>(vector % (2 * kTiles)) * 4 + value;
  }
};

// The sums of one warp: 16 rows from `states` on, steps [begin, end) of the depth.
template <class T, int kTiles>
__device__ __forceinline__ void warp_product(const T* states, const T* weight, int64_t depth,
                                             int begin, int end, int first_row, float* sums) {
  constexpr int kAtOnce = 4;  // steps whose states are loaded together
  const int lane = threadIdx.x % 32;
  const T* from = states + lane / 4 * depth + 8 * (lane % 4);
  const uint4* columns = reinterpret_cast<const uint4*>(weight) + lane;
  float acc[kTiles][4] = {};
  for (int step = begin; step < end; step += kAtOnce) {
    uint4 low[kAtOnce], high[kAtOnce];  // rows lane / 4 and lane / 4 + 8
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (step + i >= end) break;
      low[i] = __ldcg(reinterpret_cast<const uint4*>(from + (step + i) * kDepth));
      high[i] = __ldcg(reinterpret_cast<const uint4*>(from + 8 * depth + (step + i) * kDepth));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (step + i >= end) break;
      const uint32_t first[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
      const uint32_t second[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 w = columns[((step + i) * kTiles + tile) * 32];
        mma_m16n8k16<T>(acc[tile], first, {w.x, w.y});
        mma_m16n8k16<T>(acc[tile], second, {w.z, w.w});
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane / 4 + 8 * half, column = tile * 8 + 2 * (lane % 4);
      *reinterpret_cast<float2*>(sums + sum_at<8 * kTiles>(row, column)) =
          make_float2(acc[tile][2 * half], acc[tile][2 * half + 1]);
    }
  }
}

// In float a lane has rows lane / 8 + 0, 4, 8, 12 and kTiles columns.
template <int kTiles>
__device__ __forceinline__ void warp_product(const float* states, const float* weight,
                                             int64_t depth, int begin, int end, int first_row,
                                             float* sums) {
  struct alignas(kTiles < 4 ? 4 * kTiles : 16) Columns {
    float value[kTiles];
  };
  const int lane = threadIdx.x % 32, column = lane % 8 * kTiles;
  const float* from = states + lane / 8 * depth;
  float acc[kTiles][4] = {};
  for (int k = begin * kDepth; k < end * kDepth; k += 4) {
    float4 state[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      state[i] = __ldcg(reinterpret_cast<const float4*>(from + 4 * i * depth + k));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Columns w =
          *reinterpret_cast<const Columns*>(weight + (k + j) * int64_t{8 * kTiles} + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = j == 0   ? state[i].x
                            : j == 1 ? state[i].y
                            : j == 2 ? state[i].z
                                     : state[i].w;
#pragma unroll
        for (int c = 0; c < kTiles; ++c) acc[c][i] = fmaf(value, w.value[c], acc[c][i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int c = 0; c < kTiles; ++c)
      sums[sum_at<8 * kTiles>(first_row + lane / 8 + 4 * i, column + c)] = acc[c][i];
  }
}

// The product of all warps of a block; __syncthreads has to follow.
template <class T, int kRows, int kTiles>
__device__ __forceinline__ void product(const T* states, const T* weight, int64_t depth,
                                        float* sums) {
  constexpr int kRowTiles = kRows / 16, kParts = kWarps / kRowTiles;
  const int warp = threadIdx.x / 32, tile = warp % kRowTiles, part = warp / kRowTiles;
  const int steps = static_cast<int>(depth / kDepth);
  const int begin = steps * part / kParts, end = steps * (part + 1) / kParts;
  const T* rows = states + tile * 16 * depth;
  const int first_row = part * kRows + tile * 16;
  if constexpr (sizeof(T) == 4) {
    warp_product<kTiles>(rows, weight, depth, begin, end, first_row, sums);
  } else {
    warp_product<T, kTiles>(rows, weight, depth, begin, end, first_row, sums);
  }
}

}  // namespace
}  // namespace lmengine
