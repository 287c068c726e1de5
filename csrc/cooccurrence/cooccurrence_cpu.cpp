// Co-occurrence counts on the CPU. The positions of the text are sorted by their token; then each
// thread takes a range of rows, walks the windows of a row's positions, and sums into one dense row
// with a two-level map of what was touched, so that nothing as long as the list of all pairs is
// ever stored or sorted.
#include "cooccurrence/cooccurrence.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "cooccurrence/cooccurrence_checks.h"
#include "support/parallel.h"

namespace lmengine {
namespace {

constexpr int64_t kTokensPerThread = 16384;  // fewer are not worth a thread

// The positions of a text grouped by token: those of token t are positions[start[t] .. start[t+1]).
struct Positions {
  std::vector<int64_t> start;
  std::unique_ptr<uint32_t[]> positions;
};

Positions positions_by_token(const CooccurrenceParameters& p, int64_t threads) {
  const int64_t vocabulary = p.vocabulary_size;
  const int64_t chunk = (p.length + threads - 1) / threads;
  std::vector<std::vector<uint32_t>> next(threads);  // a thread's counts, then its next places
  std::vector<int64_t> bad(threads, -1);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      next[t].assign(vocabulary, 0);
      for (int64_t i = t * chunk; i < std::min(p.length, (t + 1) * chunk); ++i) {
        const int32_t token = p.tokens[i];
        if (token >= vocabulary) {
          bad[t] = i;
          break;
        }
        if (token >= 0) ++next[t][token];
      }
    }
  });
  for (int64_t i : bad) LMENGINE_CHECK(i < 0, bad_token(p.tokens[i], i, vocabulary));
  Positions result{std::vector<int64_t>(vocabulary + 1), nullptr};
  int64_t total = 0;
  for (int64_t token = 0; token < vocabulary; ++token) {
    result.start[token] = total;
    for (auto& counts : next) {
      const uint32_t count = counts[token];
      counts[token] = static_cast<uint32_t>(total);
      total += count;
    }
  }
  result.start[vocabulary] = total;
  result.positions.reset(new uint32_t[total]);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t i = t * chunk; i < std::min(p.length, (t + 1) * chunk); ++i)
        if (p.tokens[i] >= 0) result.positions[next[t][p.tokens[i]]++] = static_cast<uint32_t>(i);
  });
  return result;
}

// One row of sums, with a bit for each entry that is not zero and a flag for each 64 bits that are
// not all zero.
class DenseRow {
 public:
  explicit DenseRow(int64_t columns)
      : sums_(columns), bits_((columns + 63) / 64), flags_((bits_.size() + 7) / 8 * 8) {}

  void add(int32_t column, int64_t amount) {
    sums_[column] += amount;
    bits_[column >> 6] |= uint64_t{1} << (column & 63);
    flags_[column >> 6] = 1;
  }

  // Calls emit(column, sum) by ascending column, and makes the row zero again.
  template <class Emit>
  void drain(Emit&& emit) {
    for (size_t group = 0; group < flags_.size(); group += 8) {
      uint64_t any;
      __builtin_memcpy(&any, &flags_[group], 8);
      if (any == 0) continue;
      __builtin_memset(&flags_[group], 0, 8);
      for (size_t word = group; word < std::min(group + 8, bits_.size()); ++word) {
        for (uint64_t bits = bits_[word]; bits != 0; bits &= bits - 1) {
          const size_t column = word * 64 + __builtin_ctzll(bits);
          emit(static_cast<int32_t>(column), sums_[column]);
          sums_[column] = 0;
        }
        bits_[word] = 0;
      }
    }
  }

 private:
  std::vector<int64_t> sums_;
  std::vector<uint64_t> bits_;
  std::vector<uint8_t> flags_;
};

struct Entries {
  std::vector<int32_t> rows, columns;
  std::vector<float> values;
};

void count_rows(const CooccurrenceParameters& p, const Positions& text, int64_t first_row,
                int64_t last_row, Entries& entries) {
  DenseRow row(p.vocabulary_size);
  const double scale = static_cast<double>(p.scale);
  for (int64_t token = first_row; token < last_row; ++token) {
    if (text.start[token] == text.start[token + 1]) continue;
    for (int64_t k = text.start[token]; k < text.start[token + 1]; ++k) {
      const int64_t i = text.positions[k];
      const int64_t before = std::min(p.window_size, i);
      for (int64_t d = 1; d <= before && p.tokens[i - d] >= 0; ++d)
        row.add(p.tokens[i - d], p.units[d - 1]);
      if (!p.symmetric) continue;
      const int64_t after = std::min(p.window_size, p.length - 1 - i);
      for (int64_t d = 1; d <= after && p.tokens[i + d] >= 0; ++d)
        row.add(p.tokens[i + d], p.units[d - 1]);
    }
    row.drain([&](int32_t column, int64_t sum) {
      entries.columns.push_back(column);
      entries.values.push_back(static_cast<float>(static_cast<double>(sum) / scale));
    });
    entries.rows.resize(entries.columns.size(), static_cast<int32_t>(token));
  }
}

std::tuple<Tensor, Tensor, Tensor> cooccurrence(const Tensor& tokens, int64_t vocabulary_size,
                                                int64_t window_size, bool symmetric,
                                                bool distance_weighting) {
  check_cooccurrence(tokens, vocabulary_size, window_size);
  const DistanceUnits distances(window_size, distance_weighting);
  const CooccurrenceParameters p{static_cast<const int32_t*>(tokens.const_data_ptr()),
                                 tokens.numel(),
                                 vocabulary_size,
                                 window_size,
                                 symmetric,
                                 distances.units.data(),
                                 distances.scale};
  const int64_t threads =
      std::clamp<int64_t>(p.length / kTokensPerThread, 1, std::max(1, num_threads()));
  const Positions text = positions_by_token(p, threads);

  // rows are cut where the positions are in equal parts
  std::vector<int64_t> cuts(threads + 1, vocabulary_size);
  for (int64_t t = 0; t < threads; ++t)
    cuts[t] = std::lower_bound(text.start.begin(), text.start.end() - 1,
                               text.start.back() * t / threads) -
              text.start.begin();
  std::vector<Entries> parts(threads);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) count_rows(p, text, cuts[t], cuts[t + 1], parts[t]);
  });

  std::vector<int64_t> offset(threads + 1, 0);
  for (int64_t t = 0; t < threads; ++t)
    offset[t + 1] = offset[t] + static_cast<int64_t>(parts[t].columns.size());
  const int64_t total = offset[threads];
  Tensor rows = torch::stable::new_empty(tokens, {total});
  Tensor columns = torch::stable::new_empty(tokens, {total});
  Tensor values = torch::stable::new_empty(tokens, {total}, ScalarType::Float);
  auto* to_rows = static_cast<int32_t*>(rows.mutable_data_ptr());
  auto* to_columns = static_cast<int32_t*>(columns.mutable_data_ptr());
  auto* to_values = static_cast<float*>(values.mutable_data_ptr());
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      std::copy(parts[t].rows.begin(), parts[t].rows.end(), to_rows + offset[t]);
      std::copy(parts[t].columns.begin(), parts[t].columns.end(), to_columns + offset[t]);
      std::copy(parts[t].values.begin(), parts[t].values.end(), to_values + offset[t]);
      parts[t] = Entries{};
    }
  });
  return {rows, columns, values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) { m.impl("cooccurrence", TORCH_BOX(&cooccurrence)); }

}  // namespace lmengine
