// The LSTM on a GPU, forward and backward: the whole sequence in one cooperative launch whose
// blocks keep their slices of the recurrent weight in shared memory and exchange the states through
// global memory (Diamos et al. 2016, "Persistent RNNs"); or, where the weight does not fit, one
// launch a step. Both run the same code.
#include "recurrent/recurrent_cuda.h"

#include "recurrent/recurrent_product.h"

namespace lmengine {
namespace {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16(value);
}
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half(value); }

template <class T>
__device__ __forceinline__ float load_or_zero(const void* from, int64_t at) {
  return from ? to_float(static_cast<const T*>(from)[at]) : 0.0f;
}

// The quick exponential is far more exact than 16-bit results.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + (sizeof(T) == 4 ? expf(-x) : __expf(-x)));
}
template <class T>
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  return sizeof(T) == 4 ? tanhf(x) : 2.0f / (1.0f + __expf(-2.0f * x)) - 1.0f;
}

// The workspace, cut up. `depth` is the product's: hidden forward and 4 * hidden backward, rounded
// up.
template <class T>
struct Workspace {
  unsigned* barrier;
  T* states;  // (2, rows, depth): what the product multiplies, for two steps; zeros in the padding
  T* weight;  // packed
  float* cell;  // (batch, hidden): between launches, the cell state or its gradient
  int64_t rows, depth, slices;
  int64_t zeroed, bytes;  // barrier and states; all

  Workspace(const LstmSizes& sizes, const LstmPlan& plan, bool forward, void* memory) {
    const int64_t columns = 8 * plan.tiles, units = forward ? columns / 4 : columns;
    rows = round_up(sizes.batch, plan.rows);
    depth = round_up(forward ? sizes.hidden : 4 * sizes.hidden, kDepth);
    slices = (sizes.hidden + units - 1) / units;
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t count) {
      char* taken = next;
      next += round_up(count, 128);
      return taken;
    };
    barrier = reinterpret_cast<unsigned*>(take(sizeof(unsigned)));
    states = reinterpret_cast<T*>(take(2 * rows * depth * sizeof(T)));
    zeroed = next - static_cast<char*>(memory);
    weight = reinterpret_cast<T*>(take(slices * columns * depth * sizeof(T)));
    cell = reinterpret_cast<float*>(take(sizes.batch * sizes.hidden * sizeof(float)));
    bytes = next - static_cast<char*>(memory);
  }
};

// Packs weight_hh into slices of kTiles * 8 columns, and copies the states before the first step.
// Forward, column 4 * unit + gate of a slice is that gate of that unit; backward, a column is a
// unit.
template <class T, int kTiles, bool kForward>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const T* weight_hh, const T* hidden_states, Workspace<T> work, int64_t batch,
                int64_t hidden) {
  constexpr int kColumns = 8 * kTiles, kValues = Packing<T>::kValues;
  const int64_t slice_vectors = kColumns * work.depth / kValues;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t vector = first; vector < work.slices * slice_vectors; vector += threads) {
    const int64_t slice = vector / slice_vectors;
    for (int value = 0; value < kValues; ++value) {
      int64_t k;
      int column;
      Packing<T>::template position<kTiles>(vector % slice_vectors, value, k, column);
      float packed = 0.0f;
      if constexpr (kForward) {
        const int64_t unit = slice * (kColumns / 4) + column / 4;
        if (unit < hidden && k < hidden)
          packed = to_float(weight_hh[(column % 4 * hidden + unit) * hidden + k]);
      } else {
        const int64_t unit = slice * kColumns + column;
        if (unit < hidden && k < 4 * hidden) packed = to_float(weight_hh[k * hidden + unit]);
      }
      store(work.weight + vector * kValues + value, packed);
    }
  }
  if constexpr (kForward) {
    for (int64_t at = first; at < batch * hidden; at += threads)
      work.states[at / hidden * work.depth + at % hidden] = hidden_states[at];
  }
}

// What a block multiplies by in every step: its slice of the packed weight, brought into shared
// memory where it stays for a whole sequence.
template <class T, int kTiles, bool kWhole>
__device__ __forceinline__ const T* block_weight(const Workspace<T>& work, T* shared) {
  const int64_t slice = 8 * kTiles * work.depth;
  const T* from = work.weight + blockIdx.x * slice;
  if constexpr (!kWhole) return from;
  constexpr int kValues = Packing<T>::kValues;
  for (int64_t at = threadIdx.x * kValues; at < slice; at += kThreads * kValues)
    cp_async_16(shared + at, from + at);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  return shared;
}

// A thread's share of its block's rows and units: item j.
template <int kRows, int kUnits>
struct Item {
  static constexpr int kCount = (kRows * kUnits + kThreads - 1) / kThreads;
  int row, unit;  // of the block
  int64_t batch_row, hidden_unit;
  bool valid;

  __device__ __forceinline__ Item(int j, const LstmSizes& sizes) {
    const int index = threadIdx.x + j * kThreads;
    row = index / kUnits;
    unit = index % kUnits;
    batch_row = static_cast<int64_t>(blockIdx.y) * kRows + row;
    hidden_unit = static_cast<int64_t>(blockIdx.x) * kUnits + unit;
    valid = row < kRows && batch_row < sizes.batch && hidden_unit < sizes.hidden;
  }
  __device__ __forceinline__ int64_t state_at(const LstmSizes& sizes) const {
    return batch_row * sizes.hidden + hidden_unit;
  }
};

// ---- forward -----------------------------------------------------------------------------------

// Steps [begin, end) of the sequence.
template <class T, int kRows, int kTiles, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(LstmForward p, Workspace<T> work, int64_t begin, int64_t end) {
  constexpr int kColumns = 8 * kTiles, kUnits = kColumns / 4, kParts = kSumRows / kRows;
  using Item = lmengine::Item<kRows, kUnits>;
  LMENGINE_SHARED_MEMORY(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int64_t batch = p.sizes.batch, hidden = p.sizes.hidden;
  const T* input_gates = static_cast<const T*>(p.input_gates);
  const T* weight =
      block_weight<T, kTiles, kWhole>(work, reinterpret_cast<T*>(sums + kSumRows * kColumns));

  float cell[Item::kCount];
  T input[Item::kCount][4];
  const auto load_input = [&](int64_t t) {
#pragma unroll
    for (int j = 0; j < Item::kCount; ++j) {
      const Item item(j, p.sizes);
      if (!item.valid) continue;
      const T* from = input_gates + (t * batch + item.batch_row) * 4 * hidden + item.hidden_unit;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) input[j][gate] = from[gate * hidden];
    }
  };
#pragma unroll
  for (int j = 0; j < Item::kCount; ++j) {
    const Item item(j, p.sizes);
    if (!item.valid) continue;
    cell[j] = begin == 0 ? load_or_zero<T>(p.cell, item.state_at(p.sizes))
                         : work.cell[item.state_at(p.sizes)];
  }
  load_input(begin);

  unsigned phase = 0;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t states_size = work.rows * work.depth;
    const T* states = work.states + t % 2 * states_size;
    T* next_states = work.states + (t + 1) % 2 * states_size;
    product<T, kRows, kTiles>(states + static_cast<int64_t>(blockIdx.y) * kRows * work.depth,
                              weight, work.depth, sums);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Item::kCount; ++j) {
      const Item item(j, p.sizes);
      if (!item.valid) continue;
      float gates[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) gates[gate] = to_float(input[j][gate]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float4 sum = *reinterpret_cast<const float4*>(
            sums + sum_at<kColumns>(part * kRows + item.row, 4 * item.unit));
        gates[0] += sum.x;
        gates[1] += sum.y;
        gates[2] += sum.z;
        gates[3] += sum.w;
      }
      gates[0] = sigmoid<T>(gates[0]);
      gates[1] = sigmoid<T>(gates[1]);
      gates[2] = hyperbolic_tangent<T>(gates[2]);
      gates[3] = sigmoid<T>(gates[3]);
      cell[j] = gates[1] * cell[j] + gates[0] * gates[2];
      const float h = gates[3] * hyperbolic_tangent<T>(cell[j]);
      const int64_t row = t * batch + item.batch_row;
      store(static_cast<T*>(p.outputs) + row * hidden + item.hidden_unit, h);
      store(next_states + item.batch_row * work.depth + item.hidden_unit, h);
      if (p.cells) {
        p.cells[row * hidden + item.hidden_unit] = cell[j];
        T* to = static_cast<T*>(p.gates) + row * 4 * hidden + item.hidden_unit;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) store(to + gate * hidden, gates[gate]);
      }
      if (t + 1 == p.sizes.length) {
        store(static_cast<T*>(p.final_cell) + item.state_at(p.sizes), cell[j]);
      } else if (!kWhole) {
        work.cell[item.state_at(p.sizes)] = cell[j];
      }
    }
    if (t + 1 < end) {
      load_input(t + 1);  // while the other blocks arrive
      cuda::grid_barrier(work.barrier, phase);
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------

// Steps begin, begin - 1 .. end. Step t takes the product of the gates' gradients at t + 1 and
// gives those at t; step -1 gives the gradients of the states before the sequence.
template <class T, int kRows, int kTiles, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(LstmBackward p, Workspace<T> work, int64_t begin, int64_t end) {
  constexpr int kUnits = 8 * kTiles, kParts = kSumRows / kRows;
  using Item = lmengine::Item<kRows, kUnits>;
  LMENGINE_SHARED_MEMORY(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int64_t batch = p.sizes.batch, hidden = p.sizes.hidden, length = p.sizes.length;
  const T* gates = static_cast<const T*>(p.gates);
  T* grad_input_gates = static_cast<T*>(p.grad_input_gates);
  const T* weight =
      block_weight<T, kTiles, kWhole>(work, reinterpret_cast<T*>(sums + kSumRows * kUnits));

  // what a step needs besides the product
  struct Kept {
    T gates[4];
    float cell, previous_cell;
    float grad_output;
  };
  float grad_cell[Item::kCount];
  const auto load_kept = [&](const Item& item, int64_t t) {
    const int64_t row = t * batch + item.batch_row, at = row * hidden + item.hidden_unit;
    Kept found;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      found.gates[gate] = gates[row * 4 * hidden + gate * hidden + item.hidden_unit];
    found.cell = p.cells[at];
    found.previous_cell =
        t > 0 ? p.cells[at - batch * hidden] : load_or_zero<T>(p.cell, item.state_at(p.sizes));
    found.grad_output = load_or_zero<T>(p.grad_outputs, at);
    return found;
  };
  // loaded ahead, while the other blocks arrive, unless that takes too many registers
  constexpr bool kAhead = kWhole && Item::kCount <= 4;
  Kept ahead[kAhead ? Item::kCount : 1];
  const auto load_ahead = [&](int64_t t) {
    if constexpr (kAhead) {
#pragma unroll
      for (int j = 0; j < Item::kCount; ++j) {
        const Item item(j, p.sizes);
        if (item.valid) ahead[j] = load_kept(item, t);
      }
    }
  };
#pragma unroll
  for (int j = 0; j < Item::kCount; ++j) {
    const Item item(j, p.sizes);
    if (!item.valid) continue;
    grad_cell[j] = begin + 1 == length ? load_or_zero<T>(p.grad_final_cell, item.state_at(p.sizes))
                                       : work.cell[item.state_at(p.sizes)];
  }
  if (begin >= 0) load_ahead(begin);

  unsigned phase = 0;
  for (int64_t t = begin; t >= end; --t) {
    const bool last = t + 1 == length;
    const int64_t states_size = work.rows * work.depth;
    const T* states = work.states + (t + 1) % 2 * states_size;
    T* next_states = work.states + (t + 2) % 2 * states_size;
    if (!last) {
      product<T, kRows, kTiles>(states + static_cast<int64_t>(blockIdx.y) * kRows * work.depth,
                                weight, work.depth, sums);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Item::kCount; ++j) {
      const Item item(j, p.sizes);
      if (!item.valid) continue;
      float grad_h = 0.0f;
      if (last) {
        grad_h = load_or_zero<T>(p.grad_final_hidden, item.state_at(p.sizes));
      } else {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          grad_h += sums[sum_at<kUnits>(part * kRows + item.row, item.unit)];
      }
      if (t < 0) {
        store(static_cast<T*>(p.grad_hidden) + item.state_at(p.sizes), grad_h);
        store(static_cast<T*>(p.grad_cell) + item.state_at(p.sizes), grad_cell[j]);
        continue;
      }
      const Kept kept = kAhead ? ahead[kAhead ? j : 0] : load_kept(item, t);
      grad_h += kept.grad_output;
      const float i = to_float(kept.gates[0]), f = to_float(kept.gates[1]);
      const float g = to_float(kept.gates[2]), o = to_float(kept.gates[3]);
      const float tanh_c = hyperbolic_tangent<T>(kept.cell);
      const float grad_c = grad_h * o * (1.0f - tanh_c * tanh_c) + grad_cell[j];
      const float grads[4] = {grad_c * g * i * (1.0f - i),
                              grad_c * kept.previous_cell * f * (1.0f - f),
                              grad_c * i * (1.0f - g * g), grad_h * tanh_c * o * (1.0f - o)};
      grad_cell[j] = grad_c * f;
      if (!kWhole) work.cell[item.state_at(p.sizes)] = grad_cell[j];
      T* to = grad_input_gates + (t * batch + item.batch_row) * 4 * hidden + item.hidden_unit;
      T* next = next_states + item.batch_row * work.depth + item.hidden_unit;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        store(to + gate * hidden, grads[gate]);
        store(next + gate * hidden, grads[gate]);
      }
    }
    if (t > end) {
      if (t > 0) load_ahead(t - 1);
      cuda::grid_barrier(work.barrier, phase);
    }
  }
}

// ---- plans and launches ------------------------------------------------------------------------

constexpr bool kForward = true, kBackward = false;

// The smaller number of tiles of a plan; the larger is twice as many.
constexpr int few_tiles(bool forward) { return forward ? 4 : 2; }

template <class T>
int64_t shared_bytes(const LstmPlan& plan, int64_t depth) {
  const int64_t columns = 8 * plan.tiles;
  return kSumRows * columns * sizeof(float) + (plan.whole ? columns * depth * sizeof(T) : 0);
}

// Calls body.template operator()<rows, tiles, whole>() as the plan says.
template <bool forward, class Body>
void dispatch_plan(const LstmPlan& plan, Body&& body) {
  constexpr int few = few_tiles(forward);
  const auto with_tiles = [&]<int tiles, bool whole>() {
    switch (plan.rows) {
      case 16:
        return body.template operator()<16, tiles, whole>();
      case 32:
        return body.template operator()<32, tiles, whole>();
      default:
        return body.template operator()<64, tiles, whole>();
    }
  };
  if (!plan.whole) return with_tiles.template operator()<2 * few, false>();
  if (plan.tiles == few) return with_tiles.template operator()<few, true>();
  return with_tiles.template operator()<2 * few, true>();
}

template <class Body>
auto dispatch_type(LstmType type, Body&& body) {
  switch (type) {
    case LstmType::bfloat16:
      return body(__nv_bfloat16());
    case LstmType::float16:
      return body(__half());
    case LstmType::float32:
      break;
  }
  return body(float());
}

// Whether all blocks of a whole plan are on the device at a time.
template <class T, bool forward>
bool fits(const LstmPlan& plan, const Workspace<T>& work, int64_t blocks) {
  const int64_t bytes = shared_bytes<T>(plan, work.depth);
  if (bytes > cuda::shared_memory_per_block()) return false;
  int at_a_time = 0;
  dispatch_plan<forward>(plan, [&]<int rows, int tiles, bool whole>() {
    if constexpr (forward) {
      at_a_time =
          cuda::blocks_per_multiprocessor(forward_kernel<T, rows, tiles, whole>, kThreads, bytes);
    } else {
      at_a_time =
          cuda::blocks_per_multiprocessor(backward_kernel<T, rows, tiles, whole>, kThreads, bytes);
    }
  });
  return blocks <= static_cast<int64_t>(at_a_time) * cuda::multiprocessors();
}

// A step's time, roughly, in cycles of a multiprocessor: 64 bytes of the second-level cache, 128 of
// shared memory, 128 multiplications in float.
template <class T>
double step_cost(const LstmPlan& plan, const Workspace<T>& work, int64_t blocks) {
  const double columns = 8 * plan.tiles, depth = static_cast<double>(work.depth);
  const double states = plan.rows * depth * sizeof(T) / 64;
  const double weight = columns * depth * sizeof(T) / (plan.whole ? 128.0 * 16 / plan.rows : 64.0);
  const double arithmetic = sizeof(T) == 4 ? plan.rows * columns * depth / 128 : 0.0;
  const int64_t multiprocessors = cuda::multiprocessors();
  const int64_t waves = (blocks + multiprocessors - 1) / multiprocessors;
  return static_cast<double>(waves) * (states + weight + arithmetic);
}

template <bool forward>
LstmPlan choose_plan(const LstmSizes& sizes) {
  return dispatch_type(sizes.type, [&]<class T>(T) {
    LstmPlan best{};
    double best_cost = 0.0;
    for (const bool whole : {true, false}) {
      for (const int tiles : {few_tiles(forward), 2 * few_tiles(forward)}) {
        if (!whole && tiles == few_tiles(forward)) continue;
        for (const int rows : {16, 32, 64}) {
          const LstmPlan plan{rows, tiles, whole};
          const Workspace<T> work(sizes, plan, forward, nullptr);
          const int64_t blocks = work.slices * (work.rows / rows);
          const double cost = step_cost(plan, work, blocks);
          if (best.rows != 0 && cost >= best_cost) continue;
          if (whole && !fits<T, forward>(plan, work, blocks)) continue;
          best = plan;
          best_cost = cost;
        }
      }
      if (best.rows != 0) break;  // one launch for all beats a launch for each, whatever the cost
    }
    return best;
  });
}

template <class T, bool forward, class Parameters>
void run(const Parameters& p, const LstmPlan& plan, const T* hidden, cudaStream_t stream) {
  const Workspace<T> work(p.sizes, plan, forward, p.workspace);
  const dim3 grid(static_cast<unsigned>(work.slices), static_cast<unsigned>(work.rows / plan.rows));
  const int64_t bytes = shared_bytes<T>(plan, work.depth), length = p.sizes.length;
  cuda::zero(p.workspace, static_cast<size_t>(work.zeroed), stream);
  const int64_t vectors = work.slices * 8 * plan.tiles * work.depth / Packing<T>::kValues;
  const int64_t pack_blocks = (vectors + kThreads - 1) / kThreads;
  dispatch_plan<forward>(plan, [&]<int rows, int tiles, bool whole>() {
    cuda::launch(pack_kernel<T, tiles, forward>,
                 static_cast<unsigned>(pack_blocks < 2048 ? pack_blocks : 2048), kThreads, 0,
                 stream, static_cast<const T*>(p.weight_hh), hidden, work, p.sizes.batch,
                 p.sizes.hidden);
    if constexpr (forward) {
      const auto kernel = forward_kernel<T, rows, tiles, whole>;
      if (whole) {
        cuda::launch_cooperative(kernel, grid, kThreads, bytes, stream, p, work, 0, length);
      } else {
        for (int64_t t = 0; t < length; ++t)
          cuda::launch(kernel, grid, kThreads, bytes, stream, p, work, t, t + 1);
      }
    } else {
      const auto kernel = backward_kernel<T, rows, tiles, whole>;
      if (whole) {
        cuda::launch_cooperative(kernel, grid, kThreads, bytes, stream, p, work, length - 1, -1);
      } else {
        for (int64_t t = length - 1; t >= -1; --t)
          cuda::launch(kernel, grid, kThreads, bytes, stream, p, work, t, t);
      }
    }
  });
}

int64_t workspace_bytes(const LstmSizes& sizes, const LstmPlan& plan, bool forward) {
  return dispatch_type(
      sizes.type, [&]<class T>(T) { return Workspace<T>(sizes, plan, forward, nullptr).bytes; });
}

}  // namespace

LstmPlan lstm_forward_plan(const LstmSizes& sizes) { return choose_plan<kForward>(sizes); }
LstmPlan lstm_backward_plan(const LstmSizes& sizes) { return choose_plan<kBackward>(sizes); }

int64_t lstm_forward_workspace(const LstmSizes& sizes, const LstmPlan& plan) {
  return workspace_bytes(sizes, plan, kForward);
}
int64_t lstm_backward_workspace(const LstmSizes& sizes, const LstmPlan& plan) {
  return workspace_bytes(sizes, plan, kBackward);
}

void lstm_forward_cuda(const LstmForward& p, const LstmPlan& plan, cudaStream_t stream) {
  dispatch_type(p.sizes.type, [&]<class T>(T) {
    run<T, kForward>(p, plan, static_cast<const T*>(p.hidden), stream);
  });
}

void lstm_backward_cuda(const LstmBackward& p, const LstmPlan& plan, cudaStream_t stream) {
  dispatch_type(p.sizes.type, [&]<class T>(T) {
    run<T, kBackward>(p, plan, static_cast<const T*>(nullptr), stream);
  });
}

}  // namespace lmengine
