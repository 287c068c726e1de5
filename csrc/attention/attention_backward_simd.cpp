// Attention's backward on the CPU, with the scores computed again. A task goes through the blocks
// of keys of a head, or through some of them where there are fewer heads than threads, and holds
// each against all queries that see it. Heads whose gradients meet, in a key that they share or in
// a mask, form a team: a team's heads come one after the other, in rounds, so that every sum is
// taken in the same order each time.
#include <cstring>

#include "attention/attention_scores.h"
#include "support/instruction_set.h"

LMENGINE_DECLARE_KERNEL(attention_backward, AttentionParameters)

namespace lmengine::LMENGINE_ISA {
namespace {

constexpr int kQueries = 48;

// Memory handed out piece by piece, each aligned; with no memory it counts what is wanted.
class Layout {
 public:
  explicit Layout(float* memory) : memory_(memory) {}
  float* take(int64_t floats) {
    float* taken = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(floats, 16);
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

template <class Product>
class Backward {
 public:
  explicit Backward(const AttentionParameters& p)
      : p_(p),
        words_((p.head_dim + Product::depth - 1) / Product::depth),
        value_words_((p.value_dim + Product::depth - 1) / Product::depth),
        stride_(round_up(words_, Vec::width)),
        value_stride_(round_up(value_words_, Vec::width)),
        width_(static_cast<int>(round_up(p.head_dim, Vec::width))),
        value_width_(static_cast<int>(round_up(p.value_dim, Vec::width))),
        group_(p.kv_heads > 0 ? p.heads / p.kv_heads : 1) {
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      const Sequence s = attention::sequence_of(p, batch);
      queries_ = larger(queries_, s.query_length);
      // keys behind a key length get their zeros too
      keys_ = larger(keys_, rows_of_keys(batch));
    }
    const bool mask = p.grad_mask.data != nullptr;
    batch_teams_ = mask && p.grad_mask.batch_stride == 0 ? 1 : p.batch;
    head_teams_ = mask && p.grad_mask.head_stride == 0 ? 1 : p.kv_heads;
  }

  void run() {
    const int64_t mask_size = size_of_grad_mask();
    if (mask_size > 0) std::memset(p_.grad_mask.data, 0, mask_size * sizeof(float));
    const int64_t heads = p_.batch * p_.heads;
    if (heads == 0) return;
    const int64_t teams = batch_teams_ * head_teams_, rounds = heads / teams;
    const int64_t blocks = blocks_of(keys_, kKeys);
    const double work = 2.5 * rounds * teams * queries_ * keys_ * (p_.head_dim + p_.value_dim);
    const int threads = threads_for(work);
    const int64_t wanted = teams >= threads ? 1 : blocks_of(threads, teams);
    pieces_ = larger(smaller(wanted, blocks), 1);

    // sums of several tasks: of heads that share keys, of pieces that share queries or a mask's
    // number
    const int64_t key_floats = keys_ * (width_ + value_width_);
    const Scratch shared_keys(group_ > 1 ? p_.batch * p_.kv_heads * key_floats : 0);
    const int64_t query_floats = queries_ * width_;
    const Scratch parts(pieces_ > 1 ? teams * pieces_ * query_floats : 0);
    const bool mask_parts = pieces_ > 1 && mask_size > 0 && p_.grad_mask.column_stride == 0;
    const Scratch masks(mask_parts ? pieces_ * mask_size : 0);
    if (mask_parts) std::memset(masks.data(), 0, pieces_ * mask_size * sizeof(float));

    for (int64_t round = 0; round < rounds; ++round) {
      for_each_task(threads, teams * pieces_, Task(*this, nullptr).floats,
                    [&](int64_t number, float* memory) {
                      const int64_t team = number / pieces_;
                      Task t(*this, memory);
                      t.piece = number % pieces_;
                      place(team, round, t.batch, t.head);
                      const int64_t unit = t.batch * p_.kv_heads + t.head / group_;
                      if (group_ > 1) t.shared_keys = shared_keys.data() + unit * key_floats;
                      if (pieces_ > 1) t.grad_query = parts.data() + number * query_floats;
                      t.grad_mask = mask_parts ? masks.data() + t.piece * mask_size
                                               : static_cast<float*>(p_.grad_mask.data);
                      head(t);
                    });
      if (pieces_ > 1) {
        constexpr int64_t rows = 64;
        const int64_t chunks = blocks_of(queries_, rows);
        for_each_task(threads, teams * chunks, 0, [&](int64_t number, float*) {
          int64_t batch, head;
          const int64_t team = number / chunks, first = number % chunks * rows;
          place(team, round, batch, head);
          const int64_t length = attention::sequence_of(p_, batch).query_length;
          float* sum = parts.data() + team * pieces_ * query_floats;
          const int64_t last = smaller(first + rows, length);
          for (int64_t piece = 1; piece < pieces_; ++piece)
            for (int64_t i = first * width_; i < last * width_; ++i)
              sum[i] += sum[piece * query_floats + i];
          store_queries(batch, head, first, last, sum);
        });
      }
    }
    if (mask_parts) {
      float* sum = static_cast<float*>(p_.grad_mask.data);
      for (int64_t piece = 0; piece < pieces_; ++piece)
        for (int64_t i = 0; i < mask_size; ++i) sum[i] += masks.data()[piece * mask_size + i];
    }
  }

 private:
  // A head's, or a piece of its blocks of keys, and the memory for it. Rows of queries and of the
  // output's gradient are packed twice: as words of a row, and as words of neighbouring rows.
  struct Task {
    int64_t batch = 0, head = 0, piece = 0;
    float* shared_keys = nullptr;  // gradients of all keys and values, where heads share them
    float* grad_mask = nullptr;    // where all of it is summed
    float *query, *query_across, *grad_output, *grad_output_across, *grad_query, *delta, *shift;
    float *keys, *keys_across, *values, *weights, *grad_scores, *slopes, *rows;
    float *grad_key, *grad_value;
    int64_t floats;

    Task(const Backward& backward, float* memory) {
      const auto& b = backward;
      constexpr bool pairs = Product::depth == 2;
      const int64_t across = (b.queries_ + 1) / 2;
      Layout layout(memory);
      query = layout.take(b.queries_ * b.stride_);
      query_across = pairs ? layout.take(across * b.width_) : query;
      grad_output = layout.take(b.queries_ * b.value_stride_);
      grad_output_across = pairs ? layout.take(across * b.value_width_) : grad_output;
      grad_query = layout.take(b.pieces_ > 1 ? 0 : b.queries_ * b.width_);
      delta = layout.take(b.queries_);
      shift = layout.take(b.queries_);
      keys = layout.take(int64_t{b.words_} * kKeys);
      keys_across = layout.take(int64_t{kKeys / Product::depth} * b.width_);
      values = layout.take(int64_t{b.value_words_} * kKeys);
      weights = layout.take(kQueries * kKeys);
      grad_scores = layout.take(kQueries * kKeys);
      slopes = layout.take(b.p_.softcap > 0 ? kQueries * kKeys : 0);
      rows = pairs ? layout.take(kQueries * kKeys / 2) : grad_scores;
      grad_key = layout.take(b.group_ > 1 ? 0 : int64_t{kKeys} * b.width_);
      grad_value = layout.take(b.group_ > 1 ? 0 : int64_t{kKeys} * b.value_width_);
      floats = layout.used();
    }
  };

  // The head of a team in a round.
  void place(int64_t team, int64_t round, int64_t& batch, int64_t& head) const {
    const int64_t head_rounds = p_.heads / head_teams_;
    batch = batch_teams_ == p_.batch ? team / head_teams_ : round / head_rounds;
    head = team % head_teams_ * head_rounds + round % head_rounds;
  }

  int64_t rows_of_keys(int64_t batch) const {
    return p_.cu_key != nullptr ? p_.cu_key[batch + 1] - p_.cu_key[batch] : p_.key_length;
  }

  int64_t size_of_grad_mask() const {
    const AttentionMask& m = p_.grad_mask;
    if (m.data == nullptr) return 0;
    return (m.batch_stride ? p_.batch : 1) * (m.head_stride ? p_.heads : 1) *
           (m.row_stride ? p_.query_length : 1) * (m.column_stride ? p_.key_length : 1);
  }

  // All of a task's blocks of keys.
  void head(Task& t) const {
    const Scores scores(p_, t.batch, t.head);
    const Sequence& s = scores.sequence();
    pack_queries(scores, t);
    const int64_t rows = rows_of_keys(t.batch);
    for (int64_t begin = t.piece * kKeys; begin < rows; begin += pieces_ * kKeys) {
      if (t.shared_keys != nullptr) {
        t.grad_key = t.shared_keys + begin * width_;
        t.grad_value = t.shared_keys + keys_ * width_ + begin * value_width_;
      }
      const int columns = static_cast<int>(smaller(kKeys, rows - begin));
      const bool first_head = t.head % group_ == 0, last_head = (t.head + 1) % group_ == 0;
      const int seen = key_block(scores, begin, first_head, t);
      if (first_head) {
        std::memset(t.grad_key + seen * width_, 0, sizeof(float) * (columns - seen) * width_);
        std::memset(t.grad_value + seen * value_width_, 0,
                    sizeof(float) * (columns - seen) * value_width_);
      }
      if (last_head) store_keys(s, t, begin, columns);
    }
    if (pieces_ == 1) store_queries(t.batch, t.head, 0, s.query_length, t.grad_query);
  }

  // Packs queries and grad_output; finds delta = sum(grad_output * output) - grad_logsumexp, and
  // the logsumexp as a power of two.
  void pack_queries(const Scores& scores, Task& t) const {
    const Sequence& s = scores.sequence();
    const int64_t length = s.query_length;
    const int64_t statistics = s.logsumexp + t.head * s.logsumexp_head;
    with_type(p_.type, [&](auto zero) {
      using T = decltype(zero);
      const T* query = row_of<const T>(p_.query, t.batch, t.head, s.query_begin);
      const T* grad = row_of<const T>(p_.grad_output, t.batch, t.head, s.query_begin);
      const T* output = row_of<const T>(p_.output, t.batch, t.head, s.query_begin);
      pack_rows<Product>(query, p_.query.row_stride, length, p_.head_dim, stride_, t.query);
      pack_rows<Product>(grad, p_.grad_output.row_stride, length, p_.value_dim, value_stride_,
                         t.grad_output);
      if constexpr (Product::depth == 2) {
        pack_across_rows<Product>(query, p_.query.row_stride, length, p_.head_dim, width_,
                                  t.query_across);
        pack_across_rows<Product>(grad, p_.grad_output.row_stride, length, p_.value_dim,
                                  value_width_, t.grad_output_across);
      }
      for (int64_t i = 0; i < length; ++i) {
        Vec sum = Vec::zero();
        for (int d = 0; d < p_.value_dim; d += Vec::width) {
          const int left = p_.value_dim - d;
          sum = fma(Vec::load(output + i * p_.output.row_stride + d, left),
                    Vec::load(grad + i * p_.grad_output.row_stride + d, left), sum);
        }
        t.delta[i] = sum.sum();
        if (p_.grad_logsumexp != nullptr) t.delta[i] -= p_.grad_logsumexp[statistics + i];
        const float logsumexp = p_.logsumexp[statistics + i];
        t.shift[i] = logsumexp == -INFINITY ? -INFINITY : -logsumexp * kLog2e;
      }
    });
    std::memset(t.grad_query, 0, sizeof(float) * length * width_);
  }

  // A block of keys against all queries that see it: its gradients, and its part of grad_query
  // (without the scale). Returns how many of the keys have a gradient by now.
  int key_block(const Scores& scores, int64_t begin, bool first_head, Task& t) const {
    const Sequence& s = scores.sequence();
    Block b;
    b.begin = begin;
    b.columns = static_cast<int>(smaller(kKeys, s.key_length - begin));
    if (b.columns <= 0) return 0;
    const int columns = b.columns;
    int written = first_head ? 0 : columns;
    bool packed = false;
    const attention::KeyRange range = attention::queries_of(s, begin, columns);
    for (b.first = range.begin / kQueries * kQueries; b.first < range.end; b.first += kQueries) {
      b.count = static_cast<int>(smaller(kQueries, range.end - b.first));
      const int64_t end = attention::keys_of(s, b.first, b.count).end;
      b.columns = static_cast<int>(smaller(columns, end - begin));
      if (b.columns <= 0 || scores.hidden(b)) continue;
      if (!packed) pack_keys(s, begin, columns, t);
      packed = true;
      block(scores, b, written, t);
      written = written > b.columns ? written : b.columns;
    }
    return written;
  }

  void pack_keys(const Sequence& s, int64_t begin, int columns, Task& t) const {
    const int64_t row = s.key_begin + begin, kv_head = t.head / group_;
    with_type(p_.type, [&](auto zero) {
      using T = decltype(zero);
      const T* key = row_of<const T>(p_.key, t.batch, kv_head, row);
      const T* value = row_of<const T>(p_.value, t.batch, kv_head, row);
      pack_columns<Product>(key, p_.key.row_stride, columns, p_.head_dim, t.keys);
      pack_across_rows<Product>(key, p_.key.row_stride, columns, p_.head_dim, width_,
                                t.keys_across);
      pack_columns<Product>(value, p_.value.row_stride, columns, p_.value_dim, t.values);
    });
  }

  // `written` of the keys have gradients that are added to.
  void block(const Scores& scores, const Block& b, int written, Task& t) const {
    constexpr int depth = Product::depth;
    const int width = static_cast<int>(round_up(b.columns, Vec::width));
    gemm<Product>(b.count, width, words_, t.query + b.first * stride_, stride_, 1, t.keys, kKeys,
                  t.weights, kKeys, false);
    gemm<Product>(b.count, width, value_words_, t.grad_output + b.first * value_stride_,
                  value_stride_, 1, t.values, kKeys, t.grad_scores, kKeys, false);
    scores.finish(b, t.weights, t.slopes);
    derive(scores, b, t);
    // weights and grad_scores now hold words of neighbouring rows, `rows` words of neighbouring
    // keys
    const int pairs = (b.count + depth - 1) / depth;
    const auto add = [&](int from, int to, bool more) {
      gemm<Product>(to - from, value_width_, pairs, t.weights + from, 1, depth * kKeys,
                    t.grad_output_across + b.first / depth * value_width_, value_width_,
                    t.grad_value + from * value_width_, value_width_, more);
      gemm<Product>(to - from, width_, pairs, t.grad_scores + from, 1, depth * kKeys,
                    t.query_across + b.first / depth * width_, width_, t.grad_key + from * width_,
                    width_, more);
    };
    const int old = written < b.columns ? written : b.columns;
    if (old > 0) add(0, old, true);
    if (old < b.columns) add(old, b.columns, false);
    gemm<Product>(b.count, width_, (b.columns + depth - 1) / depth, t.rows, kKeys / depth, 1,
                  t.keys_across, width_, t.grad_query + b.first * width_, width_, true);
  }

  // From scores and the weights' gradients to weights and the scores' gradients.
  void derive(const Scores& scores, const Block& b, Task& t) const {
    const int width = static_cast<int>(round_up(b.columns, Product::depth * Vec::width));
    const Vec factor = Vec::set(scores.factor());
    const Vec kept_factor = Vec::set(attention::dropout_factor(p_.dropout_p));
    for (int i = 0; i < b.count; i += Product::depth) {
      for (int r = i; r < i + Product::depth && r < b.count; ++r) {
        float *weight = t.weights + r * kKeys, *grad = t.grad_scores + r * kKeys;
        const Vec shift = Vec::set(t.shift[b.first + r]), delta = Vec::set(t.delta[b.first + r]);
        uint64_t kept[kKeys / 64];
        if (scores.dropout()) scores.choose(b, r, kept);
        for (int j = 0; j < width; j += Vec::width) {
          // at most 1, which a score of 1e8 computed again may miss by many units; a NaN passes
          Vec w = exp2<Product::depth == 1>(
              min(Vec::zero(), fma(Vec::load(weight + j), factor, shift)));
          Vec g = Vec::load(grad + j);
          const Vec before = w;
          if (scores.dropout()) {
            const auto bits = static_cast<uint32_t>(kept[j / 64] >> (j % 64));
            g = select(bits, g * kept_factor, Vec::zero());
            w = select(bits, w * kept_factor, Vec::zero());
          }
          w.store(weight + j);
          (before * (g - delta)).store(grad + j);
        }
        if (t.grad_mask != nullptr) add_to_mask(b, r, grad, t);
        if (p_.softcap > 0)
          for (int j = 0; j < b.columns; j += Vec::width)
            (Vec::load(grad + j) * Vec::load(t.slopes + r * kKeys + j)).store(grad + j);
      }
      if constexpr (Product::depth == 2) round_pair(b, i, width, t);
    }
  }

  // Two rows of weights and of grad_scores to words of both, and grad_scores to words of a row.
  void round_pair(const Block& b, int i, int width, Task& t) const {
#if defined(__AVX512BF16__)
    float *weight = t.weights + i * kKeys, *grad = t.grad_scores + i * kKeys;
    float* row = t.rows + i * (kKeys / 2);
    if (i + 1 == b.count) {
      std::memset(weight + kKeys, 0, sizeof(float) * width);
      std::memset(grad + kKeys, 0, sizeof(float) * width);
    }
    for (int j = 0; j < width; j += 2 * Vec::width) {
      for (int k = j; k < j + 2 * Vec::width; k += Vec::width)
        pair(Vec::load(weight + k), Vec::load(weight + kKeys + k)).store(weight + k);
      const Vec first = Vec::load(grad + j), second = Vec::load(grad + kKeys + j);
      const Vec first_next = Vec::load(grad + j + Vec::width);
      const Vec second_next = Vec::load(grad + kKeys + j + Vec::width);
      neighbours(first, first_next).store(row + j / 2);
      neighbours(second, second_next).store(row + kKeys / 2 + j / 2);
      pair(first, second).store(grad + j);
      pair(first_next, second_next).store(grad + j + Vec::width);
    }
#endif
  }

  void add_to_mask(const Block& b, int row, const float* grad, Task& t) const {
    const AttentionMask& m = p_.grad_mask;
    float* sum = t.grad_mask + t.batch * m.batch_stride + t.head * m.head_stride +
                 (b.first + row) * m.row_stride + b.begin * m.column_stride;
    Vec all = Vec::zero();
    for (int j = 0; j < b.columns; j += Vec::width) {
      const int left = b.columns - j;
      const Vec part = Vec::load(grad + j, left);
      if (m.column_stride == 0)
        all = all + part;
      else
        (Vec::load(sum + j, left) + part).store(sum + j, left);
    }
    if (m.column_stride == 0) *sum += all.sum();
  }

  void store_queries(int64_t batch, int64_t head, int64_t first, int64_t last,
                     const float* grad) const {
    const Sequence s = attention::sequence_of(p_, batch);
    with_type(p_.type, [&](auto zero) {
      for (int64_t i = first; i < last; ++i)
        store_row(grad + i * width_, Vec::set(p_.scale), p_.head_dim,
                  row_of<decltype(zero)>(p_.grad_query, batch, head, s.query_begin + i));
    });
  }

  void store_keys(const Sequence& s, const Task& t, int64_t begin, int columns) const {
    const int64_t kv_head = t.head / group_, row = s.key_begin + begin;
    with_type(p_.type, [&](auto zero) {
      using T = decltype(zero);
      for (int j = 0; j < columns; ++j) {
        store_row(t.grad_key + j * width_, Vec::set(p_.scale), p_.head_dim,
                  row_of<T>(p_.grad_key, t.batch, kv_head, row + j));
        store_row(t.grad_value + j * value_width_, Vec::set(1), p_.value_dim,
                  row_of<T>(p_.grad_value, t.batch, kv_head, row + j));
      }
    });
  }

  const AttentionParameters& p_;
  const int words_, value_words_;        // of a row
  const int64_t stride_, value_stride_;  // words between packed rows
  const int width_, value_width_;        // floats of a padded row
  const int64_t group_;                  // heads of queries to a head of keys
  int64_t queries_ = 0, keys_ = 0;       // the longest
  int64_t batch_teams_, head_teams_, pieces_ = 1;
};

}  // namespace

void attention_backward(const AttentionParameters& p) {
#if defined(__AVX512BF16__)
  if (p.type == AttentionType::bfloat16) return Backward<PairProduct>(p).run();
#endif
  Backward<FloatProduct>(p).run();
}

}  // namespace lmengine::LMENGINE_ISA
