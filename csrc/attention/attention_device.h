// What the CUDA kernels of attention are made of: tiles in shared memory, and the two engines that
// multiply them. An engine's block has kRows rows of one matrix and goes over the other matrix's
// rows, the columns, by kColumns. Each thread holds kThreadRows rows of the block's products.
//   products (rows, columns) += own rows  x  (columns, dim) tile, transposed
//   sums     (rows, dim)     += weights (rows, columns)  x  (columns, dim) tile
#pragma once

#include "attention/attention.h"
#include "support/tensor_core.h"

namespace lmengine::attention {

constexpr float kLog2E = 1.4426950408889634f;

#ifdef LMENGINE_HOST_EMULATION
inline float exp2_approximate(float x) { return exp2f(x); }
inline float bounded_by_zero(float x) { return x > 0 ? 0 : x; }
inline float rounded_product(float a, float b) { return a * b; }
#else
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A NaN passes, which fminf would hide.
__device__ __forceinline__ float bounded_by_zero(float x) {
  float y;
  asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
// a * b that the compiler does not fuse into a sum.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
#endif

// ---- tiles -------------------------------------------------------------------------------------

template <class T>
constexpr int kChunk = 16 / sizeof(T);  // elements of the 16 bytes that move together

// Rows of one head in global memory.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
  int length;
};

// (rows, dim) in shared memory, in panels of 8 chunks (128 bytes) or 4. The chunks of a row are
// permuted by its number, so that neither the rows of one chunk nor the chunks of a row meet in a
// bank.
template <class T, int rows, int dim>
struct Tile {
  static constexpr int kChunks = dim / kChunk<T>, kPanel = kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kElements = rows * dim;
  // the addresses of many copies at a time would take the registers of wide accumulators
  static constexpr int kUnrolled = dim > 128 ? 1 : 4;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int permuted = chunk % kPanel ^ (kPanel == 8 ? row & 7 : row >> 1 & 3);
    return ((chunk / kPanel * rows + row) * kPanel + permuted) * kChunk<T>;
  }

  // Copies rows [first, first + rows) in the background; zeros behind the last and behind head_dim.
  template <int threads>
  static __device__ __forceinline__ void load(T* tile, const Matrix<T>& from, int first,
                                              int head_dim) {
#pragma unroll kUnrolled
    for (int i = 0; i < (rows * kChunks + threads - 1) / threads; ++i) {
      const int index = i * threads + static_cast<int>(threadIdx.x);
      if (rows * kChunks % threads != 0 && index >= rows * kChunks) break;
      const int row = index / kChunks, chunk = index % kChunks;
      const bool valid = first + row < from.length && chunk * kChunk<T> < head_dim;
      const T* source = from.data;
      if (valid) source += (first + row) * from.stride + chunk * kChunk<T>;
      cp_async_16(tile + offset(row, chunk), source, valid);
    }
  }
};

// ---- tensor cores, for the 16-bit types --------------------------------------------------------

// A warp has 16 * row_tiles rows. `keep`: the block's own rows stay in registers.
template <class T, int dim, int row_tiles, int columns, bool keep>
struct MatrixEngine {
  using Type = T;
  static constexpr int kThreads = 128, kRows = 64 * row_tiles, kColumns = columns, kDim = dim;
  static constexpr int kThreadRows = 2 * row_tiles;
  static constexpr int kThreadColumns = columns / 4, kThreadDims = dim / 4;
  static constexpr int kLanes = 4;                      // that share a row, neighbours
  static constexpr int kScratch = 0;                    // bytes of shared memory
  static constexpr float kBefore = kLog2E, kAfter = 1;  // see attention_features.h
  using RowTile = Tile<T, kRows, dim>;
  using ColumnTile = Tile<T, columns, dim>;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 * 16 * row_tiles; }
  static constexpr int kWarpRows = 16 * row_tiles;
  static __device__ __forceinline__ int row(int i) {
    return first_row() + i / 2 * 16 + i % 2 * 8 + lane() / 4;
  }
  static __device__ __forceinline__ int column(int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  // A column of the same four whose number does not hang on j % 2: see Features::keeps.
  static __device__ __forceinline__ int pair(int j) { return column(j / 2 * 2); }

  static __device__ __forceinline__ float exp2(float x) { return exp2_approximate(x); }

  // The block's rows as the left operand.
  struct Rows {
    const T* tile;
    uint32_t kept[keep ? row_tiles : 1][keep ? dim / 16 : 1][4];

    __device__ __forceinline__ explicit Rows(const T* rows) : tile(rows) {
      if constexpr (keep) {
#pragma unroll
        for (int r = 0; r < row_tiles; ++r)
#pragma unroll
          for (int k = 0; k < dim / 16; ++k) read(r, k, kept[r][k]);
      }
    }
    __device__ __forceinline__ void read(int r, int k, uint32_t (&fragment)[4]) const {
      ldmatrix_x4(fragment,
                  tile + RowTile::offset(first_row() + r * 16 + lane() % 16, 2 * k + lane() / 16));
    }
    __device__ __forceinline__ void fragment(int r, int k, uint32_t (&out)[4]) const {
      if constexpr (keep) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = kept[r][k][i];
      } else {
        read(r, k, out);
      }
    }
  };

  static __device__ __forceinline__ void products(float (&out)[kThreadRows][kThreadColumns],
                                                  const Rows& rows, const T* tile) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) out[i][j] = 0;
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      uint32_t a[row_tiles][4];
#pragma unroll
      for (int r = 0; r < row_tiles; ++r) rows.fragment(r, k, a[r]);
#pragma unroll
      for (int n = 0; n < columns / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, tile + ColumnTile::offset(n * 16 + lane() / 16 * 8 + lane() % 8,
                                                 2 * k + lane() / 8 % 2));
#pragma unroll
        for (int r = 0; r < row_tiles; ++r) multiply_add(out, r, n, a[r], b);
      }
    }
  }

  // The weights as the left operand: what a lane holds of two products' fragments side by side is
  // what it has to hold of a left operand.
  static __device__ __forceinline__ void add(float (&sums)[kThreadRows][kThreadDims],
                                             const float (&weights)[kThreadRows][kThreadColumns],
                                             const T* tile, unsigned char*) {
#pragma unroll
    for (int k = 0; k < columns / 16; ++k) {
      uint32_t a[row_tiles][4];
#pragma unroll
      for (int r = 0; r < row_tiles; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&from)[kThreadColumns] = weights[2 * r + i % 2];
          a[r][i] = pack<T>(from[4 * k + i / 2 * 2], from[4 * k + i / 2 * 2 + 1]);
        }
#pragma unroll
      for (int n = 0; n < dim / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, tile + ColumnTile::offset(k * 16 + lane() / 8 % 2 * 8 + lane() % 8,
                                                       2 * n + lane() / 16));
#pragma unroll
        for (int r = 0; r < row_tiles; ++r) multiply_add(sums, r, n, a[r], b);
      }
    }
  }

  template <int width>
  static __device__ __forceinline__ void multiply_add(float (&out)[kThreadRows][width], int r,
                                                      int n, const uint32_t (&a)[4],
                                                      const uint32_t (&b)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = 4 * n + 2 * half;
      const uint32_t right[2] = {b[2 * half], b[2 * half + 1]};
      float d[4] = {out[2 * r][j], out[2 * r][j + 1], out[2 * r + 1][j], out[2 * r + 1][j + 1]};
      mma_m16n8k16<T>(d, a, right);
      out[2 * r][j] = d[0], out[2 * r][j + 1] = d[1];
      out[2 * r + 1][j] = d[2], out[2 * r + 1][j + 1] = d[3];
    }
  }

  // Writes sums * factor to rows [first, first + kRows) of a matrix, through a tile that only this
  // warp uses the rows of.
  static __device__ __forceinline__ void store(const float (&sums)[kThreadRows][kThreadDims],
                                               const float (&factor)[kThreadRows], T* tile,
                                               const Matrix<T>& to, int first, int head_dim) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadDims; j += 2) {
        T* at = tile + RowTile::offset(row(i), j / 2) + lane() % 4 * 2;
        *reinterpret_cast<uint32_t*>(at) =
            pack<T>(sums[i][j] * factor[i], sums[i][j + 1] * factor[i]);
      }
    __syncwarp();
    constexpr int chunks = RowTile::kChunks;
#pragma unroll
    for (int i = 0; i < kWarpRows * chunks / 32; ++i) {
      const int index = i * 32 + lane(), r = first_row() + index / chunks, chunk = index % chunks;
      if (first + r < to.length && chunk * 8 < head_dim)
        *reinterpret_cast<uint4*>(to.data + (first + r) * to.stride + chunk * 8) =
            *reinterpret_cast<const uint4*>(tile + RowTile::offset(r, chunk));
    }
  }
};

// ---- fused multiply-adds, for float32 ----------------------------------------------------------

// 16 lanes share 4 rows. A sum over dim goes from the first to the last in every kernel, so that
// the backward finds the forward's scores to the last bit.
template <int dim, int columns, int threads = 256>
struct ScalarEngine {
  using Type = float;
  static constexpr int kThreads = threads, kRows = threads / 4, kColumns = columns, kDim = dim;
  static constexpr int kThreadRows = 4, kThreadColumns = columns / 16, kThreadDims = dim / 16;
  static constexpr int kLanes = 16;
  static constexpr int kScratchRow = columns + 4;  // the odd multiple of 4 keeps two rows apart
  static constexpr int kScratch = kRows * kScratchRow * 4;
  static constexpr float kBefore = 1, kAfter = kLog2E;
  using RowTile = Tile<float, kRows, dim>;
  using ColumnTile = Tile<float, columns, dim>;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 16; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 * 8; }
  static constexpr int kWarpRows = 8;
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 16 * 4 + i; }
  static __device__ __forceinline__ int column(int j) { return lane() + 16 * j; }
  static __device__ __forceinline__ int pair(int j) { return column(j); }

  static __device__ __forceinline__ float exp2(float x) { return exp2f(x); }

  struct Rows {
    const float* tile;
    __device__ __forceinline__ explicit Rows(const float* rows) : tile(rows) {}
  };

  static __device__ __forceinline__ void products(float (&out)[kThreadRows][kThreadColumns],
                                                  const Rows& rows, const float* tile) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) out[i][j] = 0;
#pragma unroll 1
    for (int panel = 0; panel < dim / 4; panel += 8) {
#pragma unroll
      for (int chunk = 0; chunk < 8; ++chunk) {
        float4 a[kThreadRows];
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i)
          a[i] =
              *reinterpret_cast<const float4*>(rows.tile + RowTile::offset(row(i), panel + chunk));
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) {
          const float4 b =
              *reinterpret_cast<const float4*>(tile + ColumnTile::offset(column(j), panel + chunk));
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
            out[i][j] = fmaf(a[i].x, b.x, out[i][j]);
            out[i][j] = fmaf(a[i].y, b.y, out[i][j]);
            out[i][j] = fmaf(a[i].z, b.z, out[i][j]);
            out[i][j] = fmaf(a[i].w, b.w, out[i][j]);
          }
        }
      }
    }
  }

  // The weights change hands through `scratch`; only lanes of one warp share a row.
  static __device__ __forceinline__ void add(float (&sums)[kThreadRows][kThreadDims],
                                             const float (&weights)[kThreadRows][kThreadColumns],
                                             const float* tile, unsigned char* scratch) {
    float* shared = reinterpret_cast<float*>(scratch);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j)
        shared[row(i) * kScratchRow + column(j)] = weights[i][j];
    __syncwarp();
#pragma unroll 2
    for (int c = 0; c < columns; c += 4) {
      float4 w[kThreadRows];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i)
        w[i] = *reinterpret_cast<const float4*>(shared + row(i) * kScratchRow + c);
#pragma unroll
      for (int l = 0; l < 4; ++l)
#pragma unroll
        for (int d = 0; d < kThreadDims; d += 2) {
          const float2 b = *reinterpret_cast<const float2*>(
              tile + ColumnTile::offset(c + l, d * 4 + lane() / 2) + lane() % 2 * 2);
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
            const float weight = l == 0 ? w[i].x : l == 1 ? w[i].y : l == 2 ? w[i].z : w[i].w;
            sums[i][d] = fmaf(weight, b.x, sums[i][d]);
            sums[i][d + 1] = fmaf(weight, b.y, sums[i][d + 1]);
          }
        }
    }
  }

  static __device__ __forceinline__ void store(const float (&sums)[kThreadRows][kThreadDims],
                                               const float (&factor)[kThreadRows], float*,
                                               const Matrix<float>& to, int first, int head_dim) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
      for (int d = 0; d < kThreadDims; d += 2) {
        const int at = d * 16 + lane() * 2;
        if (first + row(i) < to.length && at < head_dim)
          *reinterpret_cast<float2*>(to.data + (first + row(i)) * to.stride + at) =
              make_float2(sums[i][d] * factor[i], sums[i][d + 1] * factor[i]);
      }
  }
};

// ---- both --------------------------------------------------------------------------------------

template <class Engine>
__device__ __forceinline__ float sum_over_row(float value) {
#pragma unroll
  for (int step = Engine::kLanes / 2; step; step /= 2)
    value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

template <class Engine>
__device__ __forceinline__ float largest_of_row(float value) {
#pragma unroll
  for (int step = Engine::kLanes / 2; step; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, step));
  return value;
}

}  // namespace lmengine::attention
