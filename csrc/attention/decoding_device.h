// What the CUDA kernel of decoding is made of: two engines that multiply the rows of a block, which
// all its warps share, with a warp's own tiles of kWarpKeys keys and values in shared memory.
#pragma once

#include "attention/attention_device.h"
#include "attention/decoding.h"

namespace lmengine::decoding {

using attention::exp2_approximate;
using attention::kChunk;
using attention::kLog2E;

constexpr int kWarps = 4, kWarpKeys = 16, kThreads = 32 * kWarps;
static_assert(kWarps * kWarpKeys == kStep);

// Tensor cores, for the 16-bit types: 16 rows, of which a lane holds two.
template <class T, int dim>
struct MatrixWarp {
  using Type = T;
  static constexpr int kRows = 16, kDim = dim, kLanes = 4;
  static constexpr int kThreadRows = 2, kThreadKeys = 4, kThreadDims = dim / 4;
  static constexpr bool kKeep = dim <= 128;  // the rows in registers
  using RowTile = attention::Tile<T, kRows, dim>;
  using KeyTile = attention::Tile<T, kWarpKeys, dim>;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int row(int i) { return i * 8 + lane() / 4; }
  static __device__ __forceinline__ int key(int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  static __device__ __forceinline__ int dim_of(int j) { return key(j); }
  static __device__ __forceinline__ float exp2(float x) { return exp2_approximate(x); }

  struct Rows {
    const T* tile;
    uint32_t kept[kKeep ? dim / 16 : 1][4];

    __device__ __forceinline__ explicit Rows(const T* rows) : tile(rows) {
      if constexpr (kKeep) {
#pragma unroll
        for (int k = 0; k < dim / 16; ++k) read(k, kept[k]);
      }
    }
    __device__ __forceinline__ void read(int k, uint32_t (&fragment)[4]) const {
      ldmatrix_x4(fragment, tile + RowTile::offset(lane() % 16, 2 * k + lane() / 16));
    }
  };

  static __device__ __forceinline__ void products(float (&out)[kThreadRows][kThreadKeys],
                                                  const Rows& rows, const T* tile) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) out[i][j] = 0;
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      uint32_t a[4], b[4];
      if constexpr (kKeep) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = rows.kept[k][i];
      } else {
        rows.read(k, a);
      }
      ldmatrix_x4(b, tile + KeyTile::offset(lane() / 16 * 8 + lane() % 8, 2 * k + lane() / 8 % 2));
      multiply_add(out, 0, a, b);
    }
  }

  // The weights as the left operand: what a lane holds of two products' fragments side by side is
  // what it has to hold of a left operand.
  static __device__ __forceinline__ void add(float (&sums)[kThreadRows][kThreadDims],
                                             const float (&weights)[kThreadRows][kThreadKeys],
                                             const T* tile) {
    const uint32_t a[4] = {
        pack<T>(weights[0][0], weights[0][1]), pack<T>(weights[1][0], weights[1][1]),
        pack<T>(weights[0][2], weights[0][3]), pack<T>(weights[1][2], weights[1][3])};
#pragma unroll
    for (int n = 0; n < dim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(
          b, tile + KeyTile::offset(lane() / 8 % 2 * 8 + lane() % 8, 2 * n + lane() / 16));
      multiply_add(sums, n, a, b);
    }
  }

  template <int width>
  static __device__ __forceinline__ void multiply_add(float (&out)[kThreadRows][width], int n,
                                                      const uint32_t (&a)[4],
                                                      const uint32_t (&b)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = 4 * n + 2 * half;
      const uint32_t right[2] = {b[2 * half], b[2 * half + 1]};
      float d[4] = {out[0][j], out[0][j + 1], out[1][j], out[1][j + 1]};
      mma_m16n8k16<T>(d, a, right);
      out[0][j] = d[0], out[0][j + 1] = d[1], out[1][j] = d[2], out[1][j + 1] = d[3];
    }
  }
};

// Fused multiply-adds, for float32: 8 rows, of which 16 lanes share 4. A lane has one key of a
// tile.
template <int dim>
struct ScalarWarp {
  using Type = float;
  static constexpr int kRows = 8, kDim = dim, kLanes = 16;
  static constexpr int kThreadRows = 4, kThreadKeys = 1, kThreadDims = dim / 16;
  using RowTile = attention::Tile<float, kRows, dim>;
  using KeyTile = attention::Tile<float, kWarpKeys, dim>;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 16; }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x % 32 / 16 * 4 + i; }
  static __device__ __forceinline__ int key(int) { return lane(); }
  static __device__ __forceinline__ int dim_of(int j) { return (j / 4 * 16 + lane()) * 4 + j % 4; }
  static __device__ __forceinline__ float exp2(float x) { return exp2f(x); }

  struct Rows {
    const float* tile;
    __device__ __forceinline__ explicit Rows(const float* rows) : tile(rows) {}
  };

  static __device__ __forceinline__ void products(float (&out)[kThreadRows][kThreadKeys],
                                                  const Rows& rows, const float* tile) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) out[i][0] = 0;
#pragma unroll 8
    for (int chunk = 0; chunk < dim / 4; ++chunk) {
      const float4 b = *reinterpret_cast<const float4*>(tile + KeyTile::offset(lane(), chunk));
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const float4 a =
            *reinterpret_cast<const float4*>(rows.tile + RowTile::offset(row(i), chunk));
        out[i][0] = fmaf(a.x, b.x, out[i][0]);
        out[i][0] = fmaf(a.y, b.y, out[i][0]);
        out[i][0] = fmaf(a.z, b.z, out[i][0]);
        out[i][0] = fmaf(a.w, b.w, out[i][0]);
      }
    }
  }

  static __device__ __forceinline__ void add(float (&sums)[kThreadRows][kThreadDims],
                                             const float (&weights)[kThreadRows][kThreadKeys],
                                             const float* tile) {
#pragma unroll 4
    for (int j = 0; j < kWarpKeys; ++j) {
      float weight[kThreadRows];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i)
        weight[i] = __shfl_sync(0xffffffff, weights[i][0], j, 16);
#pragma unroll
      for (int d = 0; d < kThreadDims; d += 4) {
        const float4 b =
            *reinterpret_cast<const float4*>(tile + KeyTile::offset(j, d * 4 + lane()));
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
          sums[i][d] = fmaf(weight[i], b.x, sums[i][d]);
          sums[i][d + 1] = fmaf(weight[i], b.y, sums[i][d + 1]);
          sums[i][d + 2] = fmaf(weight[i], b.z, sums[i][d + 2]);
          sums[i][d + 3] = fmaf(weight[i], b.w, sums[i][d + 3]);
        }
      }
    }
  }
};

template <class Warp>
__device__ __forceinline__ float sum_over_row(float value) {
#pragma unroll
  for (int step = Warp::kLanes / 2; step; step /= 2)
    value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

template <class Warp>
__device__ __forceinline__ float largest_of_row(float value) {
#pragma unroll
  for (int step = Warp::kLanes / 2; step; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, step));
  return value;
}

// ---- elements ----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Four elements at a multiple of 4.
__device__ __forceinline__ void store_4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
template <class T>
__device__ __forceinline__ void store_4(T* to, float4 x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
}

}  // namespace lmengine::decoding
