// GloVe's epoch on a GPU: a launch for each stage, in it a warp for each partition, which visits
// the partition's entries in order.
//
// A warp's time is the memory's latency, so the vectors of the next entry are fetched into
// registers while the present entry is worked on; where the next entry has the same row or column,
// that vector is the present one as it comes out of its step. A lane always has the same numbers of
// a vector (every 32nd), so the order of its own loads and stores is all the order that there must
// be. A vector of dim + 1 numbers begins at any multiple of 4 bytes, so the loads are of 4 bytes,
// 32 neighbours at a time. A stage ends with its launch: on current GPUs that costs no more than a
// barrier over the grid, and leaves the number of partitions free.
#include "embedding/embedding_cuda.h"
#include "support/cuda.h"

namespace lmengine {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSumThreads = 256;

__device__ __forceinline__ float warp_sum(float value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

// One AdaGrad step on one number. A NaN stays one.
__device__ __forceinline__ void step(float& value, float& squares, float gradient, float eta,
                                     float grad_clip) {
  gradient = gradient > grad_clip ? grad_clip : gradient < -grad_clip ? -grad_clip : gradient;
  gradient *= eta;
  value -= gradient * rsqrtf(squares);
  squares += gradient * gradient;
}

// A lane's part of a vector and of its squared gradients: the numbers lane, lane + 32, ...; 0 past
// the end.
template <int kNumbers>
struct Part {
  float values[kNumbers], squares[kNumbers];

  __device__ __forceinline__ void load(const GloveParameters& p, int64_t vector, int lane) {
    const int64_t at = vector * (p.dim + 1) + lane;
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      const bool inside = lane + 32 * n <= p.dim;
      values[n] = inside ? p.parameters[at + 32 * n] : 0.0f;
      squares[n] = inside ? p.squared_gradients[at + 32 * n] : 1.0f;
    }
  }

  __device__ __forceinline__ void store(const GloveParameters& p, int64_t vector, int lane) const {
    const int64_t at = vector * (p.dim + 1) + lane;
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      if (lane + 32 * n > p.dim) continue;
      p.parameters[at + 32 * n] = values[n];
      p.squared_gradients[at + 32 * n] = squares[n];
    }
  }
};

// What an entry adds to a lane's part of the dot product. The last number of a vector is its bias,
// which is added, not multiplied.
__device__ __forceinline__ float product(float word, float context, bool bias) {
  return bias ? word + context : word * context;
}

__device__ __forceinline__ void step_both(const GloveParameters& p, float& word,
                                          float& word_squares, float& context,
                                          float& context_squares, float weighted, bool bias) {
  const float word_gradient = bias ? weighted : weighted * context;
  const float context_gradient = bias ? weighted : weighted * word;
  step(word, word_squares, word_gradient, p.eta, p.grad_clip);
  step(context, context_squares, context_gradient, p.eta, p.grad_clip);
}

// 32 entries of a partition, an entry a lane.
struct Entries {
  int32_t row, column;
  float log_value, weight;

  __device__ __forceinline__ Entries(const GloveParameters& p, int64_t entry, bool inside) {
    row = inside ? p.rows[entry] : 0;
    column = inside ? p.columns[entry] : 0;
    const float value = inside ? p.values[entry] : 1.0f;
    log_value = logf(value);
    weight = value < p.x_max ? powf(value / p.x_max, p.alpha) : 1.0f;
  }
};

__device__ __forceinline__ double cost_of(float weighted, float difference) {
  return 0.5 * static_cast<double>(weighted) * difference;
}

// `bounds` (partitions + 1) and `costs` (partitions) are the stage's. For dim < 32 kNumbers.
template <int kNumbers>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(GloveParameters p, const int64_t* bounds, double* costs) {
  const int lane = threadIdx.x % 32;
  const int64_t partition = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (partition >= p.partitions) return;
  const int64_t end = bounds[partition + 1];
  double cost = 0;
  for (int64_t first = bounds[partition]; first < end; first += 32) {
    const int count = static_cast<int>(min(end - first, int64_t{32}));
    const Entries entries(p, first + lane, lane < count);
    int row = __shfl_sync(0xffffffff, entries.row, 0);
    int column = __shfl_sync(0xffffffff, entries.column, 0);
    Part<kNumbers> word, context;
    word.load(p, row, lane);
    context.load(p, p.vocabulary_size + column, lane);
    for (int i = 0; i < count; ++i) {
      const int next = min(i + 1, count - 1);
      const int next_row = __shfl_sync(0xffffffff, entries.row, next);
      const int next_column = __shfl_sync(0xffffffff, entries.column, next);
      Part<kNumbers> next_word, next_context;
      if (next_row != row) next_word.load(p, next_row, lane);
      if (next_column != column) next_context.load(p, p.vocabulary_size + next_column, lane);

      float sum = 0;
#pragma unroll
      for (int n = 0; n < kNumbers; ++n)
        sum += product(word.values[n], context.values[n], lane + 32 * n == p.dim);
      const float difference = warp_sum(sum) - __shfl_sync(0xffffffff, entries.log_value, i);
      const float weighted = __shfl_sync(0xffffffff, entries.weight, i) * difference;
      cost += cost_of(weighted, difference);
#pragma unroll
      for (int n = 0; n < kNumbers; ++n)
        step_both(p, word.values[n], word.squares[n], context.values[n], context.squares[n],
                  weighted, lane + 32 * n == p.dim);
      const bool last = i + 1 == count;
      if (last || next_row != row) word.store(p, row, lane);
      if (last || next_column != column) context.store(p, p.vocabulary_size + column, lane);
      if (next_row != row) word = next_word;
      if (next_column != column) context = next_context;
      row = next_row;
      column = next_column;
    }
  }
  if (lane == 0) costs[partition] = cost;
}

// The same for vectors of any length, which go through the caches instead of registers.
__global__ void __launch_bounds__(kThreads)
    long_stage_kernel(GloveParameters p, const int64_t* bounds, double* costs) {
  const int lane = threadIdx.x % 32;
  const int64_t partition = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (partition >= p.partitions) return;
  const int64_t end = bounds[partition + 1], width = p.dim + 1;
  double cost = 0;
  for (int64_t first = bounds[partition]; first < end; first += 32) {
    const int count = static_cast<int>(min(end - first, int64_t{32}));
    const Entries entries(p, first + lane, lane < count);
    for (int i = 0; i < count; ++i) {
      const int64_t at_word = __shfl_sync(0xffffffff, entries.row, i) * width;
      const int64_t at_context =
          (p.vocabulary_size + __shfl_sync(0xffffffff, entries.column, i)) * width;
      float *word = p.parameters + at_word, *context = p.parameters + at_context;
      float* word_squares = p.squared_gradients + at_word;
      float* context_squares = p.squared_gradients + at_context;
      float sum = 0;
      for (int64_t k = lane; k < width; k += 32) sum += product(word[k], context[k], k == p.dim);
      const float difference = warp_sum(sum) - __shfl_sync(0xffffffff, entries.log_value, i);
      const float weighted = __shfl_sync(0xffffffff, entries.weight, i) * difference;
      cost += cost_of(weighted, difference);
      for (int64_t k = lane; k < width; k += 32)
        step_both(p, word[k], word_squares[k], context[k], context_squares[k], weighted,
                  k == p.dim);
    }
  }
  if (lane == 0) costs[partition] = cost;
}

// The sum in an order that is always the same.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const double* costs, int64_t count, double* cost) {
  LMENGINE_SHARED_MEMORY(shared);
  auto* sums = reinterpret_cast<double*>(shared);  // (kSumThreads)
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += costs[i];
  sums[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *cost = sums[0];
}

// `found` (4): for rows, columns and values the number of entries minus the first bad one; for
// stages whether they are bad.
__global__ void __launch_bounds__(kThreads)
    check_kernel(GloveParameters p, int64_t entries, unsigned long long* found) {
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = thread; i < entries; i += threads) {
    const bool bad[] = {p.rows[i] < 0 || p.rows[i] >= p.vocabulary_size,
                        p.columns[i] < 0 || p.columns[i] >= p.vocabulary_size,
                        !(p.values[i] > 0 && p.values[i] < INFINITY)};
#pragma unroll
    for (int kind = 0; kind < 3; ++kind)
      if (bad[kind]) atomicMax(found + kind, static_cast<unsigned long long>(entries - i));
  }
  const int64_t width = p.partitions + 1;
  for (int64_t i = thread; i < p.num_stages * width; i += threads) {
    const bool falls = i % width && p.stages[i] < p.stages[i - 1];
    if (falls || p.stages[i] < 0 || p.stages[i] > entries) atomicMax(found + 3, 1ull);
  }
}

using StageKernel = void (*)(GloveParameters, const int64_t*, double*);

StageKernel kernel_for(int64_t dim) {
  if (dim < 32) return stage_kernel<1>;
  if (dim < 64) return stage_kernel<2>;
  if (dim < 128) return stage_kernel<4>;
  if (dim < 224) return stage_kernel<7>;
  if (dim < 320) return stage_kernel<10>;
  if (dim < 512) return stage_kernel<16>;
  return long_stage_kernel;
}

}  // namespace

BadEntries check_entries(const GloveParameters& p, int64_t entries, void* workspace,
                         void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  unsigned long long found[4];
  cuda::zero(workspace, sizeof found, stream);
  cuda::launch(check_kernel, 4 * cuda::multiprocessors(), kThreads, 0, stream, p, entries,
               static_cast<unsigned long long*>(workspace));
  cuda::copy_to_host(found, workspace, sizeof found, stream);
  const auto first = [&](unsigned long long number) {
    return number ? entries - static_cast<int64_t>(number) : -1;
  };
  return {first(found[0]), first(found[1]), first(found[2]), found[3] != 0};
}

void glove_epoch_cuda(const GloveParameters& p, double* cost, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const auto blocks = static_cast<unsigned>((p.partitions + kWarps - 1) / kWarps);
  const StageKernel kernel = kernel_for(p.dim);
  for (int64_t stage = 0; stage < p.num_stages; ++stage)
    cuda::launch(kernel, blocks, kThreads, 0, stream, p, p.stages + stage * (p.partitions + 1),
                 p.costs + stage * p.partitions);
  cuda::launch(sum_kernel, 1, kSumThreads, kSumThreads * sizeof(double), stream, p.costs,
               p.num_stages * p.partitions, cost);
}

}  // namespace lmengine
