// Adds two sorted lists of counts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace lmengine::corpus {

// Sorted by row, then column; no pair stands twice.
struct Counts {
  const int32_t* rows;
  const int32_t* columns;
  const double* values;
  int64_t length;

  uint64_t key(int64_t i) const {
    return static_cast<uint64_t>(rows[i]) << 32 | static_cast<uint32_t>(columns[i]);
  }
  int64_t first_not_below(uint64_t wanted) const {
    int64_t low = 0, high = length;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      (key(middle) < wanted ? low : high) = key(middle) < wanted ? middle + 1 : middle;
    }
    return low;
  }
};

// Calls emit(row, column, value) for the sum of one[i..i_end) and other[j..j_end), in order.
template <class Emit>
void merge(const Counts& one, int64_t i, int64_t i_end, const Counts& other, int64_t j,
           int64_t j_end, Emit&& emit) {
  while (i < i_end && j < j_end) {
    const uint64_t a = one.key(i), b = other.key(j);
    const Counts& first = a <= b ? one : other;
    const int64_t at = a <= b ? i : j;
    emit(first.rows[at], first.columns[at],
         a == b ? one.values[i] + other.values[j] : first.values[at]);
    i += a <= b;
    j += b <= a;
  }
  for (; i < i_end; ++i) emit(one.rows[i], one.columns[i], one.values[i]);
  for (; j < j_end; ++j) emit(other.rows[j], other.columns[j], other.values[j]);
}

// The sum of two lists on several threads: each takes a range of keys, first to count its part of
// the sum and then to write it, into memory that allocate(length) gives as pointers to rows,
// columns and values.
template <class Allocate>
void add_counts(const Counts& one, const Counts& other, int64_t threads, Allocate&& allocate) {
  const int64_t parts = std::clamp<int64_t>(one.length / 65536, 1, threads);
  std::vector<int64_t> cuts(parts + 1, 0), other_cuts(parts + 1, 0), offsets(parts + 1, 0);
  for (int64_t part = 1; part < parts; ++part) {
    cuts[part] = one.length * part / parts;
    other_cuts[part] = other.first_not_below(one.key(cuts[part]));
  }
  cuts[parts] = one.length;
  other_cuts[parts] = other.length;
  const auto on_threads = [&](auto&& work) {
    std::vector<std::thread> others;
    for (int64_t part = 1; part < parts; ++part) others.emplace_back(work, part);
    work(0);
    for (std::thread& thread : others) thread.join();
  };
  const auto merge_part = [&](int64_t part, auto&& emit) {
    merge(one, cuts[part], cuts[part + 1], other, other_cuts[part], other_cuts[part + 1], emit);
  };
  on_threads([&](int64_t part) {
    int64_t number = 0;
    merge_part(part, [&](int32_t, int32_t, double) { ++number; });
    offsets[part + 1] = number;
  });
  for (int64_t part = 0; part < parts; ++part) offsets[part + 1] += offsets[part];
  const auto [rows, columns, values] = allocate(offsets[parts]);
  int32_t *const to_rows = rows, *const to_columns = columns;
  double* const to_values = values;
  on_threads([&](int64_t part) {
    int64_t at = offsets[part];
    merge_part(part, [&](int32_t row, int32_t column, double value) {
      to_rows[at] = row;
      to_columns[at] = column;
      to_values[at++] = value;
    });
  });
}

}  // namespace lmengine::corpus
