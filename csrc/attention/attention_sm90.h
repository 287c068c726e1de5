// What attention's sm_90 kernels share: the order in which persistent blocks take their tiles, and
// the products of a warp group with tiles in shared memory.
#pragma once

#include "attention/attention.h"
#include "support/sm90.h"

namespace lmengine::hopper {

constexpr int kWarpGroup = 128;
constexpr float kLog2E = 1.4426950408889634f;

#ifdef LMENGINE_HOST_EMULATION
inline float exp2_approximate(float x) { return exp2f(x); }
inline float rounded_product(float a, float b) { return a * b; }
inline float bounded_by_zero(float x) { return x > 0 ? 0 : x; }
#else
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// a * b that the compiler does not fuse into a sum.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
// A NaN passes, which fminf would hide.
__device__ __forceinline__ float bounded_by_zero(float x) {
  float y;
  asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// Which keys a query sees, and where the heads of its keys are.
struct Problem {
  int heads, kv_group;  // kv_group: query heads that share a key head
  int query_length, key_length;
  bool is_causal;
  int offset;  // under the causal mask query i sees the keys up to i + offset

  explicit Problem(const AttentionParameters& p)
      : heads(static_cast<int>(p.heads)),
        kv_group(static_cast<int>(p.heads / p.kv_heads)),
        query_length(static_cast<int>(p.query_length)),
        key_length(static_cast<int>(p.key_length)),
        is_causal(p.window_right >= 0),
        offset(0) {
    const int64_t far = int64_t{1} << 30;  // as good as without a limit
    if (is_causal)
      offset = static_cast<int>((p.window_right < far ? p.window_right : far) +
                                (p.bottom_right ? p.key_length - p.query_length : 0));
  }

  // How many of the keys the queries before `end` see.
  __device__ __forceinline__ int seen_by(int end) const {
    return is_causal ? max(0, min(key_length, end + offset)) : key_length;
  }
};

template <class T>
__device__ __forceinline__ T* rows_of(const AttentionTensor& tensor, int64_t batch, int64_t head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
}

// ---- schedule ----------------------------------------------------------------------------------

// Every block of the grid takes one tile of a head in each round. Tiles come in order of falling
// work (the longest first), and every second round goes through the blocks backwards, so that a
// block with much work in one round has little in the next. Heads are taken `together` at a time:
// what they read fits in the second cache level.
struct Schedule {
  unsigned heads, blocks, together;  // heads: batch * heads; blocks: of a head

  // `rows`: of a block. `head_bytes`: what is read again and again of a head.
  Schedule(const AttentionParameters& p, int64_t length, int rows, int64_t head_bytes) {
    const int64_t all = p.batch * p.heads, each = (length + rows - 1) / rows;
    if (p.query_length > (1 << 29) || p.key_length > (1 << 29))
      throw std::runtime_error("lmengine: query, key: expected a length of at most 2^29");
    if (each != 0 && all > 2147483647 / each)
      throw std::runtime_error("lmengine: query: expected batch * heads * length below " +
                               std::to_string(2147483647LL * rows));
    const int64_t fits = (int64_t{32} << 20) / (head_bytes > 0 ? head_bytes : 1);
    heads = static_cast<unsigned>(all), blocks = static_cast<unsigned>(each);
    together = static_cast<unsigned>(fits < 1 ? 1 : fits < all ? fits : all);
  }
  unsigned grid() const {
    const unsigned tiles = heads * blocks, most = static_cast<unsigned>(cuda::multiprocessors());
    return tiles < most ? tiles : most;
  }
};

struct HeadBlock {
  unsigned head;  // batch * heads + head
  unsigned block;
};

__device__ __forceinline__ bool tile_of_round(const Schedule& schedule, unsigned round,
                                              bool last_first, HeadBlock& tile) {
  const unsigned place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const unsigned index = round * gridDim.x + place;
  if (index >= schedule.heads * schedule.blocks) return false;
  const unsigned many = schedule.together * schedule.blocks, first = index / many;
  const unsigned rest = index - first * many;
  const unsigned size = min(schedule.together, schedule.heads - first * schedule.together);
  const unsigned block = rest / size;
  tile.head = first * schedule.together + rest % size;
  tile.block = last_first ? schedule.blocks - 1 - block : block;
  return true;
}

// ---- a ring of tiles ---------------------------------------------------------------------------

// Where one reads or writes in a ring of `size` tiles, and the parity of the barrier's phase.
template <int size>
struct Ring {
  int slot = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == size) slot = 0, parity ^= 1;
  }
};

// ---- products ----------------------------------------------------------------------------------

// scores = rows of one tile times columns, the lines of another, summed over dim.
template <class T, int columns, int dim, int rows>
__device__ __forceinline__ void multiply_by_lines(float (&scores)[columns / 2], uint64_t left,
                                                  const void* tile) {
  const uint64_t right = tile_descriptor(tile, columns, false);
#pragma unroll
  for (int k = 0; k < dim / 16; ++k)
    wgmma<columns, T, false, false>(scores, along_dim(left, rows, k), along_dim(right, columns, k),
                                    k != 0);
}

// sums += weights times the tile's lines.
template <class T, int columns, int dim>
__device__ __forceinline__ void add_lines(float (&sums)[dim / 2],
                                          const uint32_t (&weights)[columns / 16][4],
                                          const void* tile) {
  const uint64_t right = tile_descriptor(tile, columns, true);
#pragma unroll
  for (int k = 0; k < columns / 16; ++k)
    wgmma<dim, T, true>(sums, weights[k], along_rows(right, 16 * k), true);
}

// A product's accumulators, rounded, are the left operand of another.
template <class T, int columns>
__device__ __forceinline__ void round_to_operand(uint32_t (&out)[columns / 16][4],
                                                 const float (&in)[columns / 2]) {
#pragma unroll
  for (int k = 0; k < columns / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[k][i] = pack<T>(in[8 * k + 2 * i], in[8 * k + 2 * i + 1]);
}

// Writes a warp's 16 rows of accumulators, times a factor for each row, to rows [first, first + 16)
// of `length`. Four lanes share a row: they exchange pairs so that each has 8 neighbouring columns,
// 16 bytes.
template <class T, int dim>
__device__ __forceinline__ void store_rows(const float (&sums)[dim / 2], const float (&factor)[2],
                                           T* to, int64_t stride, int length, int first,
                                           int head_dim) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
    T* line = to + row * stride;
#pragma unroll
    for (int j = 0; j < dim / 32; ++j) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 16 * j + 4 * i + 2 * half;
        word[i] = pack<T>(sums[at] * factor[half], sums[at + 1] * factor[half]);
      }
      // the transpose of the quad's 4 by 4 words, by bits of the lane's number
#pragma unroll
      for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & step) continue;
          const bool upper = quad & step;
          const uint32_t send = upper ? word[i] : word[i + step];
          const uint32_t got = __shfl_xor_sync(0xffffffff, send, step);
          if (upper) {
            word[i] = got;
          } else {
            word[i + step] = got;
          }
        }
      const int column = 32 * j + 8 * quad;
      if (row < length && column < head_dim)
        *reinterpret_cast<uint4*>(line + column) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

}  // namespace lmengine::hopper
