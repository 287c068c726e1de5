// GloVe's epoch on the CPU: the partitions of a stage on threads, the vector of an entry in SIMD.
#include <math.h>

#include <initializer_list>

#include "embedding/embedding.h"
#include "support/parallel.h"
#include "support/simd.h"

namespace lmengine::LMENGINE_ISA {
namespace {

constexpr int64_t kBatch = 64;      // entries whose logarithms are taken together
constexpr int64_t kPrefetch = 4;    // how many entries ahead the vectors are fetched
constexpr int64_t kCacheLine = 16;  // floats

// 1 / sqrt(x) within two units in the last place, for x of normal size
inline Vec inverse_sqrt(Vec x) {
#if defined(__AVX512F__)
  const Vec y = {_mm512_rsqrt14_ps(x.v)};
  return y * fnma(x * Vec::set(0.5f) * y, y, Vec::set(1.5f));
#else
  return Vec::set(1.0f) / sqrt(x);
#endif
}

// log x and min(1, (x / x_max)^alpha) of the values of up to kBatch entries
void logs_and_weights(const GloveParameters& p, const float* values, int64_t count, float* logs,
                      float* weights) {
  for (int64_t i = 0; i < count; ++i) {
    logs[i] = logf(values[i]);
    weights[i] = values[i] < p.x_max ? powf(values[i] / p.x_max, p.alpha) : 1.0f;
  }
}

// An entry's two vectors, each with its squared gradients.
struct Entry {
  float *word, *context, *word_squares, *context_squares;

  Entry(const GloveParameters& p, int64_t index) {
    const int64_t width = p.dim + 1;
    const int64_t i = p.rows[index] * width;
    const int64_t j = (p.vocabulary_size + p.columns[index]) * width;
    word = p.parameters + i;
    context = p.parameters + j;
    word_squares = p.squared_gradients + i;
    context_squares = p.squared_gradients + j;
  }

  void prefetch(int64_t dim) const {
    for (const float* from : {word, context, word_squares, context_squares})
      for (int64_t k = 0; k <= dim; k += kCacheLine)
        _mm_prefetch(reinterpret_cast<const char*>(from + k), _MM_HINT_T0);
  }
};

inline float dot(const float* a, const float* b, int64_t dim) {
  Vec sums[2] = {Vec::zero(), Vec::zero()};
  int64_t k = 0;
  for (int turn = 0; k + Vec::width <= dim; k += Vec::width, turn ^= 1)
    sums[turn] = fma(Vec::load(a + k), Vec::load(b + k), sums[turn]);
  if (k < dim) {
    const int rest = static_cast<int>(dim - k);
    sums[0] = fma(Vec::load(a + k, rest), Vec::load(b + k, rest), sums[0]);
  }
  return (sums[0] + sums[1]).sum();
}

// One AdaGrad step on a vector whose gradient is given. min and max return their second operand
// where one is NaN, so a NaN stays one.
inline Vec step(Vec vector, Vec& squares, Vec gradient, Vec eta, Vec grad_clip) {
  gradient = min(grad_clip, max(Vec::zero() - grad_clip, gradient)) * eta;
  const Vec result = fnma(gradient, inverse_sqrt(squares), vector);
  squares = fma(gradient, gradient, squares);
  return result;
}

inline void bias_step(float& bias, float& squares, float gradient, const GloveParameters& p) {
  gradient = gradient > p.grad_clip    ? p.grad_clip
             : gradient < -p.grad_clip ? -p.grad_clip
                                       : gradient;
  gradient *= p.eta;
  bias -= gradient / sqrtf(squares);
  squares += gradient * gradient;
}

// Returns the cost before the step.
double visit(const GloveParameters& p, const Entry& e, float log_value, float weight) {
  const int64_t dim = p.dim;
  const float difference = dot(e.word, e.context, dim) + e.word[dim] + e.context[dim] - log_value;
  const float weighted = weight * difference;
  const Vec scale = Vec::set(weighted), eta = Vec::set(p.eta), grad_clip = Vec::set(p.grad_clip);
  const auto update = [&](int64_t k, auto... rest) {
    const Vec word = Vec::load(e.word + k, rest...), context = Vec::load(e.context + k, rest...);
    Vec word_squares = Vec::load(e.word_squares + k, rest...);
    Vec context_squares = Vec::load(e.context_squares + k, rest...);
    step(word, word_squares, scale * context, eta, grad_clip).store(e.word + k, rest...);
    step(context, context_squares, scale * word, eta, grad_clip).store(e.context + k, rest...);
    word_squares.store(e.word_squares + k, rest...);
    context_squares.store(e.context_squares + k, rest...);
  };
  int64_t k = 0;
  for (; k + Vec::width <= dim; k += Vec::width) update(k);
  if (k < dim) update(k, static_cast<int>(dim - k));
  bias_step(e.word[dim], e.word_squares[dim], weighted, p);
  bias_step(e.context[dim], e.context_squares[dim], weighted, p);
  return 0.5 * static_cast<double>(weighted) * difference;
}

double run_partition(const GloveParameters& p, int64_t begin, int64_t end) {
  float logs[kBatch], weights[kBatch];
  double cost = 0;
  for (int64_t first = begin; first < end; first += kBatch) {
    const int64_t count = end - first < kBatch ? end - first : kBatch;
    logs_and_weights(p, p.values + first, count, logs, weights);
    for (int64_t i = 0; i < count; ++i) {
      if (first + i + kPrefetch < end) Entry(p, first + i + kPrefetch).prefetch(p.dim);
      cost += visit(p, Entry(p, first + i), logs[i], weights[i]);
    }
  }
  return cost;
}

}  // namespace

void glove_epoch(const GloveParameters& p) {
  for (int64_t stage = 0; stage < p.num_stages; ++stage) {
    const int64_t* bounds = p.stages + stage * (p.partitions + 1);
    parallel_for(0, p.partitions, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part)
        p.costs[stage * p.partitions + part] = run_partition(p, bounds[part], bounds[part + 1]);
    });
  }
}

}  // namespace lmengine::LMENGINE_ISA
