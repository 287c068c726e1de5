// Attention's forward on the CPU. A unit is a sequence and a head of its keys, which are packed
// once for all heads of queries that share it; a task is a unit, or some of its blocks of queries
// where there are fewer units than threads.
#include "attention/attention_scores.h"
#include "support/instruction_set.h"

LMENGINE_DECLARE_KERNEL(attention_forward, AttentionParameters)

namespace lmengine::LMENGINE_ISA {
namespace {

constexpr int kQueries = 48;  // rows of a block: the multiple of 6, 8 and 12 that gemm likes

template <class Product>
class Forward {
 public:
  explicit Forward(const AttentionParameters& p)
      : p_(p),
        words_((p.head_dim + Product::depth - 1) / Product::depth),
        query_stride_(round_up(words_, Vec::width)),
        width_(static_cast<int>(round_up(p.value_dim, Vec::width))),
        group_(p.kv_heads > 0 ? p.heads / p.kv_heads : 1) {}

  void run() {
    const int64_t units = p_.batch * p_.kv_heads;
    int64_t queries = 0, keys = 0;  // the longest
    for (int64_t batch = 0; batch < p_.batch; ++batch) {
      const Sequence s = attention::sequence_of(p_, batch);
      queries = larger(queries, s.query_length), keys = larger(keys, s.key_length);
    }
    if (units == 0 || queries == 0) return;
    const int64_t key_blocks = blocks_of(keys, kKeys);
    const int64_t query_blocks = group_ * blocks_of(queries, kQueries);
    const double work = double(units) * group_ * queries * keys * (p_.head_dim + p_.value_dim);
    const int threads = threads_for(work);
    const int64_t wanted = units >= 2 * threads ? 1 : blocks_of(4 * threads, units);
    const int64_t pieces = threads == 1 ? 1 : smaller(wanted, query_blocks);
    const int64_t unit_floats = key_blocks * (key_words() + value_words());
    const int64_t block_floats = kQueries * (query_stride_ + kKeys + width_);
    if (pieces == 1) {
      for_each_task(threads, units, unit_floats + block_floats, [&](int64_t unit, float* memory) {
        for (int64_t block = 0; block < key_blocks; ++block) pack(unit, block, memory);
        for (int64_t block = 0; block < query_blocks; ++block)
          query_block(unit, block, memory, memory + unit_floats);
      });
      return;
    }
    // the tasks of a unit share its packed keys
    const Scratch packed(units * unit_floats);
    for_each_task(threads, units * key_blocks, 0, [&](int64_t task, float*) {
      const int64_t unit = task / key_blocks;
      pack(unit, task % key_blocks, packed.data() + unit * unit_floats);
    });
    for_each_task(threads, units * pieces, block_floats, [&](int64_t task, float* memory) {
      const int64_t unit = task / pieces;
      // under the causal mask later blocks have more work: deal them out in turn
      for (int64_t block = task % pieces; block < query_blocks; block += pieces)
        query_block(unit, block, packed.data() + unit * unit_floats, memory);
    });
  }

 private:
  int64_t key_words() const { return int64_t{words_} * kKeys; }
  int64_t value_words() const { return int64_t{kKeys / Product::depth} * width_; }

  // A block of a unit's keys and values, one behind the other.
  void pack(int64_t unit, int64_t block, float* to) const {
    const int64_t batch = unit / p_.kv_heads, head = unit % p_.kv_heads, begin = block * kKeys;
    const Sequence s = attention::sequence_of(p_, batch);
    const int rows = static_cast<int>(smaller(kKeys, s.key_length - begin));
    if (rows <= 0) return;
    to += block * (key_words() + value_words());
    with_type(p_.type, [&](auto zero) {
      using T = decltype(zero);
      const int64_t row = s.key_begin + begin;
      pack_columns<Product>(row_of<const T>(p_.key, batch, head, row), p_.key.row_stride, rows,
                            p_.head_dim, to);
      pack_across_rows<Product>(row_of<const T>(p_.value, batch, head, row), p_.value.row_stride,
                                rows, p_.value_dim, width_, to + key_words());
    });
  }

  // A block of queries of one of the unit's heads against the packed keys and values.
  void query_block(int64_t unit, int64_t number, const float* packed, float* memory) const {
    const int64_t batch = unit / p_.kv_heads;
    const int64_t head = unit % p_.kv_heads * group_ + number % group_;
    const Scores scores(p_, batch, head);
    const Sequence& s = scores.sequence();
    Block b;
    b.first = number / group_ * kQueries;
    if (b.first >= s.query_length) return;
    b.count = static_cast<int>(smaller(kQueries, s.query_length - b.first));
    float *query = memory, *weights = query + kQueries * query_stride_;
    float* sum = weights + kQueries * kKeys;
    with_type(p_.type, [&](auto zero) {
      using T = decltype(zero);
      pack_rows<Product>(row_of<const T>(p_.query, batch, head, s.query_begin + b.first),
                         p_.query.row_stride, b.count, p_.head_dim, query_stride_, query);
    });

    alignas(64) float shift[kQueries], total[kQueries], rescale[kQueries];
    for (int i = 0; i < kQueries; ++i) shift[i] = -INFINITY, total[i] = rescale[i] = 0;
    const attention::KeyRange range = attention::keys_of(s, b.first, b.count);
    bool more = false;
    for (b.begin = range.begin / kKeys * kKeys; b.begin < range.end; b.begin += kKeys) {
      b.columns = static_cast<int>(smaller(kKeys, range.end - b.begin));
      if (scores.hidden(b)) continue;
      const float* keys = packed + b.begin / kKeys * (key_words() + value_words());
      const int width = static_cast<int>(round_up(b.columns, Vec::width));
      gemm<Product>(b.count, width, words_, query, query_stride_, 1, keys, kKeys, weights, kKeys,
                    false);
      scores.finish(b, weights, nullptr);
      soften(scores, b, weights, shift, total, rescale);
      if (more)
        for (int i = 0; i < b.count; ++i)
          if (rescale[i] != 1) scale_row(sum + i * width_, rescale[i]);
      gemm<Product>(b.count, width_, (b.columns + Product::depth - 1) / Product::depth, weights,
                    kKeys, 1, keys + key_words(), width_, sum, width_, more);
      more = true;
    }

    float* logsumexp = p_.logsumexp + s.logsumexp + head * s.logsumexp_head + b.first;
    const float kept = scores.dropout() ? attention::dropout_factor(p_.dropout_p) : 1;
    with_type(p_.type, [&](auto zero) {
      for (int i = 0; i < b.count; ++i) {
        auto* output = row_of<decltype(zero)>(p_.output, batch, head, s.query_begin + b.first + i);
        if (total[i] == 0) {
          clear_row(p_.value_dim, output);
          logsumexp[i] = -INFINITY;
        } else {
          store_row(sum + i * width_, Vec::set(kept / total[i]), p_.value_dim, output);
          logsumexp[i] = shift[i] * kLn2 + std::log(total[i]);
        }
      }
    });
  }

  // From scores to weights relative to the largest score so far: shift is that score as a power of
  // two, total the sum of the weights, rescale what earlier sums are to be multiplied by.
  void soften(const Scores& scores, const Block& b, float* weights, float* shift, float* total,
              float* rescale) const {
    const int width = static_cast<int>(round_up(b.columns, Product::depth * Vec::width));
    const Vec factor = Vec::set(scores.factor());
    for (int i = 0; i < b.count; ++i) {
      const float* row = weights + i * kKeys;
      Vec top = Vec::load(row);
      for (int j = Vec::width; j < width; j += Vec::width) top = max(top, Vec::load(row + j));
      rescale[i] = top.largest();
    }
    for (int i = 0; i < b.count; i += Vec::width) {
      const Vec before = Vec::load(shift + i), now = max(before, Vec::load(rescale + i) * factor);
      const Vec ratio = exp2(before - max(now, Vec::set(-3e38f)));
      now.store(shift + i);
      ratio.store(rescale + i);
      (Vec::load(total + i) * ratio).store(total + i);
    }
    for (int i = 0; i < b.count; ++i) {
      float* row = weights + i * kKeys;
      uint64_t kept[kKeys / 64];
      if (scores.dropout()) scores.choose(b, i, kept);
      const Vec from = Vec::set(shift[i] == -INFINITY ? 0 : -shift[i]);
      Vec sum = Vec::zero();
      const auto weight = [&](int j) {
        const Vec w = exp2<Product::depth == 1>(fma(Vec::load(row + j), factor, from));
        sum = sum + w;
        if (!scores.dropout()) return w;
        return select(static_cast<uint32_t>(kept[j / 64] >> (j % 64)), w, Vec::zero());
      };
      if constexpr (Product::depth == 1) {
        for (int j = 0; j < width; j += Vec::width) weight(j).store(row + j);
      } else {
#if defined(__AVX512BF16__)
        for (int j = 0; j < width; j += 2 * Vec::width) {
          const Vec first = weight(j);
          neighbours(first, weight(j + Vec::width)).store(row + j / 2);
        }
#endif
      }
      total[i] += sum.sum();
    }
  }

  void scale_row(float* row, float factor) const {
    for (int d = 0; d < width_; d += Vec::width)
      (Vec::load(row + d) * Vec::set(factor)).store(row + d);
  }

  const AttentionParameters& p_;
  const int words_;             // of a row of queries or keys
  const int64_t query_stride_;  // words between packed rows of queries
  const int width_;             // floats of a padded row of values
  const int64_t group_;         // heads of queries to a head of keys
};

}  // namespace

void attention_forward(const AttentionParameters& p) {
#if defined(__AVX512BF16__)
  if (p.type == AttentionType::bfloat16) return Forward<PairProduct>(p).run();
#endif
  Forward<FloatProduct>(p).run();
}

}  // namespace lmengine::LMENGINE_ISA
