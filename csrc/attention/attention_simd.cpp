// Attention on the CPU. A task is one head, or some of its rows where there are fewer heads than
// threads. Blocks are widened to float and packed, so that every product is gemm.h's.
#include <cmath>
#include <cstdlib>
#include <new>

#include "attention/attention.h"
#include "support/gemm.h"
#include "support/instruction_set.h"
#include "support/parallel.h"

LMENGINE_DECLARE_KERNEL(attention_forward, AttentionParameters)
LMENGINE_DECLARE_KERNEL(attention_backward, AttentionParameters)

namespace lmengine::LMENGINE_ISA {
namespace {

constexpr int kQueries = 48;  // rows of a block: the multiple of 6, 8 and 12 that gemm likes
constexpr int kKeys = 128;    // columns of a block; 48 x 128 scores are 24 KB

// Aligned floats that end with the scope.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return data_; }

 private:
  float* data_;
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class T>
const T* row_of(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(t.data) + batch * t.batch_stride + head * t.head_stride +
         row * t.row_stride;
}

template <class T>
T* row_of_output(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row) {
  return const_cast<T*>(row_of<T>(t, batch, head, row));
}

// Copies rows x dim, times a factor, to float with rows of `padded` elements, zeros behind dim.
template <class T>
void pack(const T* from, int64_t row_stride, int64_t rows, int dim, int padded, float* to,
          float factor = 1) {
  const Vec times = Vec::set(factor);
  for (int64_t i = 0; i < rows; ++i, from += row_stride, to += padded) {
    int d = 0;
    for (; d + Vec::width <= dim; d += Vec::width) (Vec::load(from + d) * times).store(to + d);
    if (d < dim) (Vec::load(from + d, dim - d) * times).store(to + d);
  }
}

// Transposes `rows` packed rows of `padded` floats into blocks of kKeys columns: the block that
// begins at row r is (dim x kKeys) at to + r * dim. Columns behind the last row are zeros.
void transpose(const float* from, int64_t rows, int dim, int padded, float* to) {
  for (int64_t begin = 0; begin < rows; begin += kKeys) {
    const int count = static_cast<int>(smaller(kKeys, rows - begin));
    float* block = to + begin * dim;
    for (int first = 0; first < dim; first += 8) {  // by 8 columns, so that reads stay in the cache
      const int last = first + 8 < dim ? first + 8 : dim;
      for (int r = 0; r < count; ++r)
        for (int d = first; d < last; ++d) block[d * kKeys + r] = from[(begin + r) * padded + d];
      for (int d = first; d < last; ++d)
        for (int r = count; r < kKeys; ++r) block[d * kKeys + r] = 0;
    }
  }
}

template <class T>
void store_row(const float* from, Vec factor, int dim, T* to) {
  int d = 0;
  for (; d + Vec::width <= dim; d += Vec::width) (Vec::load(from + d) * factor).store(to + d);
  if (d < dim) (Vec::load(from + d, dim - d) * factor).store(to + d, dim - d);
}

// How many of a block's `count` columns, which begin at key `first`, a query may see.
int visible(const AttentionParameters& p, int64_t query, int64_t first, int count) {
  if (!p.is_causal) return count;
  const int64_t seen = query + 1 - first;
  return seen <= 0 ? 0 : static_cast<int>(smaller(seen, count));
}

// Sets the columns of a row of scores from `seen` to `width` to -infinity.
void mask(float* row, int seen, int width) {
  for (int j = seen; j < width; ++j) row[j] = -INFINITY;
}

// ---- forward
// --------------------------------------------------------------------------------------

// One block of queries against the packed keys and values.
template <class T>
void forward_block(const AttentionParameters& p, int64_t batch, int64_t head, int64_t first,
                   int count, int padded, const float* keys, const float* values, float* query,
                   float* scores, float* sum) {
  pack(row_of<T>(p.query, batch, head, first), p.query.row_stride, count, p.head_dim, padded, query,
       p.scale);
  float largest[kQueries], total[kQueries];
  for (int i = 0; i < count; ++i) largest[i] = -INFINITY, total[i] = 0;
  const int64_t end = p.is_causal ? smaller(p.key_length, first + count) : p.key_length;
  for (int64_t begin = 0; begin < end; begin += kKeys) {
    const int columns = static_cast<int>(smaller(kKeys, end - begin));
    const int width = static_cast<int>(round_up(columns, Vec::width));
    gemm(count, width, p.head_dim, query, padded, 1, keys + begin * p.head_dim, kKeys, scores,
         kKeys, false);
    for (int i = 0; i < count; ++i) {
      float* row = scores + i * kKeys;
      mask(row, visible(p, first + i, begin, columns), width);
      Vec top = Vec::set(largest[i]);
      for (int j = 0; j < width; j += Vec::width) top = max(top, Vec::load(row + j));
      const float now = top.largest();
      const float shift = now == -INFINITY ? 0 : now;
      Vec part = Vec::zero();
      for (int j = 0; j < width; j += Vec::width) {
        const Vec weight = exp(Vec::load(row + j) - Vec::set(shift));
        weight.store(row + j);
        part = part + weight;
      }
      const float factor = begin == 0 ? 0 : std::exp(largest[i] - shift);
      total[i] = (begin == 0 ? 0 : total[i] * factor) + part.sum();
      largest[i] = now;
      if (begin != 0 && factor != 1)
        for (int d = 0; d < padded; d += Vec::width)
          (Vec::load(sum + i * padded + d) * Vec::set(factor)).store(sum + i * padded + d);
    }
    gemm(count, padded, columns, scores, kKeys, 1, values + begin * padded, padded, sum, padded,
         begin != 0);
  }
  float* logsumexp = p.logsumexp + (batch * p.heads + head) * p.query_length + first;
  for (int i = 0; i < count; ++i) {
    T* output = row_of_output<T>(p.output, batch, head, first + i);
    const bool none = end <= 0 || total[i] == 0;
    if (none)
      for (int d = 0; d < padded; ++d) sum[i * padded + d] = 0;
    store_row(sum + i * padded, Vec::set(none ? 0 : 1 / total[i]), p.head_dim, output);
    logsumexp[i] = none ? -INFINITY : largest[i] + std::log(total[i]);
  }
}

template <class T>
void forward(const AttentionParameters& p) {
  const int padded = static_cast<int>(round_up(p.head_dim, Vec::width));
  const int64_t heads = p.batch * p.heads;
  const int64_t blocks = (p.query_length + kQueries - 1) / kQueries;
  // a task packs the keys of its head: cut a head only where threads would be idle
  const int64_t wanted = heads >= 2 * num_threads() ? 1 : (2 * num_threads() + heads - 1) / heads;
  const int64_t pieces = smaller(wanted, blocks);
  parallel_for(0, heads * pieces, 1, [&](int64_t first, int64_t last) {
    const int64_t key_rows = round_up(p.key_length, kKeys);
    Buffer values(key_rows * padded + Vec::width), packed(key_rows * padded + Vec::width),
        keys(key_rows * p.head_dim), query(kQueries * padded), scores(kQueries * kKeys),
        sum(kQueries * padded);
    int64_t head_packed = -1;
    for (int64_t task = first; task < last; ++task) {
      const int64_t batch = task / pieces / p.heads, head = task / pieces % p.heads;
      if (task / pieces != head_packed) {
        pack(row_of<T>(p.key, batch, head, 0), p.key.row_stride, p.key_length, p.head_dim, padded,
             packed);
        transpose(packed, p.key_length, p.head_dim, padded, keys);
        pack(row_of<T>(p.value, batch, head, 0), p.value.row_stride, p.key_length, p.head_dim,
             padded, values);
        head_packed = task / pieces;
      }
      // under the causal mask later blocks have more work: deal them out in turn
      for (int64_t b = task % pieces; b < blocks; b += pieces) {
        const int count = static_cast<int>(smaller(kQueries, p.query_length - b * kQueries));
        forward_block<T>(p, batch, head, b * kQueries, count, padded, keys, values, query, scores,
                         sum);
      }
    }
  });
}

// ---- backward
// -------------------------------------------------------------------------------------

// What a task of the backward packs of its head, and its blocks.
struct Head {
  int64_t query_rows, key_rows;
  Buffer query, key, grad_output, grad_query, delta;
  Buffer key_block, value_block, weights, grad_scores, grad_key, grad_value;

  Head(const AttentionParameters& p, int padded)
      : query_rows(round_up(p.query_length, kQueries)),
        key_rows(round_up(p.key_length, kKeys)),
        query(query_rows * padded),
        key(key_rows * padded),
        grad_output(query_rows * padded),
        grad_query(query_rows * padded),
        delta(query_rows),
        key_block(kKeys * padded),
        value_block(kKeys * padded),
        weights(kQueries * kKeys),
        grad_scores(kQueries * kKeys),
        grad_key(kKeys * padded),
        grad_value(kKeys * padded) {}
};

// Packs the queries (times the scale), the output's gradient and delta = sum(grad_output * output).
template <class T>
void pack_head(const AttentionParameters& p, int64_t batch, int64_t head, int padded, Head& h) {
  pack(row_of<T>(p.query, batch, head, 0), p.query.row_stride, p.query_length, p.head_dim, padded,
       h.query, p.scale);
  pack(row_of<T>(p.key, batch, head, 0), p.key.row_stride, p.key_length, p.head_dim, padded, h.key);
  pack(row_of<T>(p.grad_output, batch, head, 0), p.grad_output.row_stride, p.query_length,
       p.head_dim, padded, h.grad_output);
  for (int64_t i = 0; i < p.query_length; ++i) {
    const T* output = row_of<T>(p.output, batch, head, i);
    Vec sum = Vec::zero();
    for (int d = 0; d < p.head_dim; d += Vec::width) {
      const int left = p.head_dim - d;
      const Vec o = left >= Vec::width ? Vec::load(output + d) : Vec::load(output + d, left);
      sum = fma(o, Vec::load(h.grad_output + i * padded + d), sum);
    }
    h.delta[i] = sum.sum();
    if (p.grad_logsumexp != nullptr)
      h.delta[i] -= p.grad_logsumexp[(batch * p.heads + head) * p.query_length + i];
  }
  for (int64_t i = 0; i < p.query_length * padded; ++i) h.grad_query[i] = 0;
}

// The keys [begin, begin + columns) against all queries that see them: their own gradients, and
// their part of grad_query (without the scale).
template <class T>
void backward_block(const AttentionParameters& p, int64_t batch, int64_t head, int64_t begin,
                    int padded, Head& h) {
  const int columns = static_cast<int>(smaller(kKeys, p.key_length - begin));
  const int width = static_cast<int>(round_up(columns, Vec::width));
  float* value = h.grad_value;  // packed here first: the gradient overwrites it
  transpose(h.key + begin * padded, columns, p.head_dim, padded, h.key_block);
  pack(row_of<T>(p.value, batch, head, begin), p.value.row_stride, columns, p.head_dim, padded,
       value);
  transpose(value, columns, p.head_dim, padded, h.value_block);
  const float* logsumexp = p.logsumexp + (batch * p.heads + head) * p.query_length;
  const int64_t start = p.is_causal ? begin / kQueries * kQueries : 0;
  for (int64_t first = start; first < p.query_length; first += kQueries) {
    const int count = static_cast<int>(smaller(kQueries, p.query_length - first));
    const float* query = h.query + first * padded;
    const float* grad_output = h.grad_output + first * padded;
    gemm(count, width, p.head_dim, query, padded, 1, h.key_block, kKeys, h.weights, kKeys, false);
    gemm(count, width, p.head_dim, grad_output, padded, 1, h.value_block, kKeys, h.grad_scores,
         kKeys, false);
    for (int i = 0; i < count; ++i) {
      float *weight = h.weights + i * kKeys, *grad = h.grad_scores + i * kKeys;
      mask(weight, visible(p, first + i, begin, columns), width);
      const Vec shift = Vec::set(logsumexp[first + i]), delta = Vec::set(h.delta[first + i]);
      for (int j = 0; j < width; j += Vec::width) {
        // at most 1, which a score of 1e8 computed again may miss by many units; a NaN passes
        const Vec probability = exp(min(Vec::zero(), Vec::load(weight + j) - shift));
        probability.store(weight + j);
        (probability * (Vec::load(grad + j) - delta)).store(grad + j);
      }
    }
    const bool more = first != start;
    gemm(columns, padded, count, h.weights, 1, kKeys, grad_output, padded, h.grad_value, padded,
         more);
    gemm(columns, padded, count, h.grad_scores, 1, kKeys, query, padded, h.grad_key, padded, more);
    gemm(count, padded, columns, h.grad_scores, kKeys, 1, h.key + begin * padded, padded,
         h.grad_query + first * padded, padded, true);
  }
  const bool none = start >= p.query_length;  // no query sees these keys
  for (int j = 0; j < columns; ++j) {
    if (none)
      for (int d = 0; d < padded; ++d)
        h.grad_key[j * padded + d] = h.grad_value[j * padded + d] = 0;
    store_row(h.grad_key + j * padded, Vec::set(1), p.head_dim,
              row_of_output<T>(p.grad_key, batch, head, begin + j));
    store_row(h.grad_value + j * padded, Vec::set(1), p.head_dim,
              row_of_output<T>(p.grad_value, batch, head, begin + j));
  }
}

template <class T>
void backward(const AttentionParameters& p) {
  const int padded = static_cast<int>(round_up(p.head_dim, Vec::width));
  const int64_t heads = p.batch * p.heads;
  const int64_t blocks = (p.key_length + kKeys - 1) / kKeys;
  // fewer heads than threads: several tasks share a head, each with its own part of grad_query
  const int64_t wanted = heads >= num_threads() ? 1 : (num_threads() + heads - 1) / heads;
  const int64_t pieces = smaller(wanted, blocks > 1 ? blocks : 1);
  const int64_t size = p.query_length * padded;
  Buffer parts(pieces > 1 ? heads * pieces * size : 1);
  const auto store = [&](int64_t head, const float* grad_query) {
    for (int64_t i = 0; i < p.query_length; ++i)
      store_row(grad_query + i * padded, Vec::set(p.scale), p.head_dim,
                row_of_output<T>(p.grad_query, head / p.heads, head % p.heads, i));
  };
  parallel_for(0, heads * pieces, 1, [&](int64_t first, int64_t last) {
    Head h(p, padded);
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / pieces;
      pack_head<T>(p, head / p.heads, head % p.heads, padded, h);
      for (int64_t b = task % pieces; b < blocks; b += pieces)
        backward_block<T>(p, head / p.heads, head % p.heads, b * kKeys, padded, h);
      if (pieces == 1)
        store(head, h.grad_query);
      else
        for (int64_t i = 0; i < size; ++i) parts[task * size + i] = h.grad_query[i];
    }
  });
  if (pieces == 1) return;
  parallel_for(0, heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head) {
      float* sum = parts + head * pieces * size;
      for (int64_t piece = 1; piece < pieces; ++piece)
        for (int64_t i = 0; i < size; ++i) sum[i] += sum[piece * size + i];
      store(head, sum);
    }
  });
}

}  // namespace

void attention_forward(const AttentionParameters& p) {
  if (p.batch * p.heads * p.query_length == 0) return;
  if (p.type == AttentionType::float32)
    forward<float>(p);
  else
    forward<bf16>(p);
}

void attention_backward(const AttentionParameters& p) {
  if (p.batch * p.heads == 0) return;
  if (p.type == AttentionType::float32)
    backward<float>(p);
  else
    backward<bf16>(p);
}

}  // namespace lmengine::LMENGINE_ISA
