// Co-occurrence counts on a GPU, as the operator and the tests call them.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "cooccurrence/cooccurrence.h"

namespace lmengine {

using GpuMemory = std::shared_ptr<void>;

// Counts one band of rows after another:
//   CooccurrenceCounter counter(...);
//   for (int64_t band = 0; band < counter.bands(); ++band) {
//     allocate counter.count(band) entries;
//     counter.write(rows, columns, values);
//   }
class CooccurrenceCounter {
 public:
  static constexpr int64_t kSlots = int64_t{1} << 27;

  // Takes tokens on the GPU and units on the host. `slots` bounds the table of a band's sums, of 12
  // bytes a slot, unless a single row needs more. Throws std::runtime_error for a token that is not
  // below vocabulary_size.
  CooccurrenceCounter(const CooccurrenceParameters& parameters,
                      std::function<GpuMemory(size_t)> allocate, void* stream,
                      int64_t slots = kSlots);

  int64_t bands() const { return static_cast<int64_t>(bands_.size()); }

  // Sums the pairs of a band's rows and returns the number of entries.
  int64_t count(int64_t band);

  // Writes the entries of the band that was counted last, sorted by row, then column.
  void write(int32_t* rows, int32_t* columns, float* values);

 private:
  struct Band {
    int64_t first_row, last_row;
    int64_t first_position, last_position;  // in the list of positions
    int64_t slots;
  };

  void group_positions();
  void plan(int64_t slots);

  CooccurrenceParameters p_;
  std::function<GpuMemory(size_t)> allocate_;
  void* stream_;
  std::vector<uint32_t> occurrences_;  // (vocabulary)
  std::vector<Band> bands_;
  int64_t band_ = 0, entries_ = 0;
  GpuMemory units_, words_, positions_, rows_, table_sums_, table_columns_;
};

}  // namespace lmengine
