// Radix sort, the lowest digit first: for each digit of 8 bits, a histogram of every tile, the
// running sum over digits and tiles, and a stable move to the places that these give. A band of
// counts has some ten times fewer entries than pairs, so the sort is a small part of the whole, and
// the moves go to global memory directly, without a detour over shared memory.
#include "cooccurrence/sort.h"

#include "support/cuda.h"

namespace lmengine {
namespace {

constexpr int kBits = 8, kDigits = 1 << kBits;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kItems = 16;                  // of a thread
constexpr int kWarpItems = 32 * kItems;     // a warp's part of a tile, 32 neighbours at a time
constexpr int kTile = kWarps * kWarpItems;  // of a block
static_assert(kDigits == kThreads);

__device__ __forceinline__ int digit_of(uint64_t key, int shift) {
  return static_cast<int>(key >> shift) & (kDigits - 1);
}

__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const uint64_t* keys, int64_t count, int shift, uint32_t* counts) {
  LMENGINE_SHARED_MEMORY(shared);
  auto* digits = reinterpret_cast<unsigned*>(shared);  // (kDigits)
  digits[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kTile;
  for (int64_t i = first + threadIdx.x; i < min(count, first + kTile); i += kThreads)
    atomicAdd(digits + digit_of(keys[i], shift), 1u);
  __syncthreads();
  counts[int64_t{threadIdx.x} * gridDim.x + blockIdx.x] = digits[threadIdx.x];
}

// `places` (kDigits, tiles): where the first key of a tile's digit goes.
__global__ void __launch_bounds__(kThreads)
    move_kernel(const uint64_t* keys, const float* values, int64_t count, int shift,
                const uint32_t* places, uint64_t* to_keys, float* to_values) {
  LMENGINE_SHARED_MEMORY(shared);
  auto* seen = reinterpret_cast<uint32_t*>(shared);  // (kWarps, kDigits)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < kWarps * kDigits; i += kThreads) seen[i] = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kTile + warp * kWarpItems + lane;
  uint64_t key[kItems];
  uint32_t rank[kItems];  // among the warp's keys of the same digit
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const bool inside = first + j * 32 < count;
    key[j] = inside ? keys[first + j * 32] : 0;
    const int digit = inside ? digit_of(key[j], shift) : kDigits;
    const unsigned same = __match_any_sync(0xffffffff, digit);
    const unsigned before = same & ((1u << lane) - 1);
    rank[j] = inside ? seen[warp * kDigits + digit] + __popc(before) : 0;
    __syncwarp();
    if (inside && before == 0) seen[warp * kDigits + digit] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  uint32_t place = places[int64_t{threadIdx.x} * gridDim.x + blockIdx.x];
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t number = seen[w * kDigits + threadIdx.x];
    seen[w * kDigits + threadIdx.x] = place;
    place += number;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (first + j * 32 >= count) continue;
    const uint32_t to = seen[warp * kDigits + digit_of(key[j], shift)] + rank[j];
    to_keys[to] = key[j];
    to_values[to] = values[first + j * 32];
  }
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

// The sum of each tile of `values`.
__global__ void __launch_bounds__(kThreads)
    tile_sums_kernel(const uint32_t* values, int64_t count, uint32_t* sums) {
  LMENGINE_SHARED_MEMORY(shared);
  auto* totals = reinterpret_cast<uint32_t*>(shared);  // (kWarps)
  const int64_t first = int64_t{blockIdx.x} * kTile;
  uint32_t sum = 0;
  for (int64_t i = first + threadIdx.x; i < min(count, first + kTile); i += kThreads)
    sum += values[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kWarps; ++w) sum += totals[w];
  sums[blockIdx.x] = sum;
}

// Replaces each value by the sum of those before it in its tile, plus the tile's base if there are
// bases.
__global__ void __launch_bounds__(kThreads)
    running_sums_kernel(uint32_t* values, int64_t count, const uint32_t* bases) {
  LMENGINE_SHARED_MEMORY(shared);
  auto* totals = reinterpret_cast<uint32_t*>(shared);  // (kWarps)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t{blockIdx.x} * kTile + warp * kWarpItems + lane;
  uint32_t value[kItems];
  uint32_t sum = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    value[j] = first + j * 32 < count ? values[first + j * 32] : 0;
    sum += value[j];
  }
  sum = warp_sum(sum);
  if (lane == 0) totals[warp] = sum;
  __syncthreads();
  uint32_t base = bases ? bases[blockIdx.x] : 0;
  for (int w = 0; w < warp; ++w) base += totals[w];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    uint32_t running = value[j];
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffff, running, step);
      if (lane >= step) running += before;
    }
    if (first + j * 32 < count) values[first + j * 32] = base + running - value[j];
    base += __shfl_sync(0xffffffff, running, 31);
  }
}

int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

// Running sums in place; what follows the values holds the tiles' sums.
void running_sums(uint32_t* values, int64_t count, cudaStream_t stream) {
  const int64_t tiles = tiles_of(count);
  const auto grid = static_cast<unsigned>(tiles);
  uint32_t* sums = tiles > 1 ? values + count : nullptr;
  if (sums) {
    cuda::launch(tile_sums_kernel, grid, kThreads, kWarps * 4, stream, values, count, sums);
    running_sums(sums, tiles, stream);
  }
  cuda::launch(running_sums_kernel, grid, kThreads, kWarps * 4, stream, values, count, sums);
}

}  // namespace

size_t sort_workspace(int64_t count) {
  int64_t words = 0;
  for (int64_t level = kDigits * tiles_of(count); level; level = level > 1 ? tiles_of(level) : 0)
    words += level;
  return words;
}

int sort_by_key(const SortBuffers& buffers, int64_t count, int bits, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const int64_t tiles = tiles_of(count);
  const auto grid = static_cast<unsigned>(tiles);
  int from = 0;
  if (count == 0) return from;
  for (int shift = 0; shift < bits; shift += kBits) {
    cuda::launch(histogram_kernel, grid, kThreads, kDigits * 4, stream, buffers.keys[from], count,
                 shift, buffers.workspace);
    running_sums(buffers.workspace, kDigits * tiles, stream);
    cuda::launch(move_kernel, grid, kThreads, kWarps * kDigits * 4, stream, buffers.keys[from],
                 buffers.values[from], count, shift, buffers.workspace, buffers.keys[1 - from],
                 buffers.values[1 - from]);
    from = 1 - from;
  }
  return from;
}

}  // namespace lmengine
