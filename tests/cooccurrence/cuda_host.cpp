// The counting on a GPU for runs on the CPU: every allocation of exactly its size, and holding NaN.
#include <cstdlib>
#include <cstring>
#include <new>

#include "cooccurrence/cooccurrence_cuda.h"
#include "cooccurrence/sort.h"

namespace {

lmengine::GpuMemory allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, bytes)) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  return {memory, std::free};
}

}  // namespace

// counts (2): entries, bands. message (200): the error, or an empty string.
extern "C" void count(const int32_t* tokens, int64_t* counts, int32_t* rows, int32_t* columns,
                      float* values, char* message, int64_t length, int64_t vocabulary_size,
                      int64_t window_size, int64_t symmetric, int64_t distance_weighting,
                      int64_t slots, int64_t capacity) {
  std::memset(message, 0, 200);
  counts[0] = counts[1] = 0;
  const lmengine::DistanceUnits distances(window_size, distance_weighting);
  try {
    lmengine::CooccurrenceCounter counter({tokens, length, vocabulary_size, window_size,
                                           symmetric != 0, distances.units.data(), distances.scale},
                                          allocate, nullptr, slots);
    counts[1] = counter.bands();
    for (int64_t band = 0; band < counter.bands(); ++band) {
      const int64_t entries = counter.count(band), first = counts[0];
      const auto part_rows = allocate(entries * 4), part_columns = allocate(entries * 4);
      const auto part_values = allocate(entries * 4);
      counter.write(static_cast<int32_t*>(part_rows.get()),
                    static_cast<int32_t*>(part_columns.get()),
                    static_cast<float*>(part_values.get()));
      counts[0] += entries;
      if (counts[0] > capacity) std::abort();
      std::memcpy(rows + first, part_rows.get(), entries * 4);
      std::memcpy(columns + first, part_columns.get(), entries * 4);
      std::memcpy(values + first, part_values.get(), entries * 4);
    }
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), 199);
  }
}

// Sorts `keys` and `values` in place.
extern "C" void sort(uint64_t* keys, float* values, int64_t length, int64_t bits) {
  const auto other_keys = allocate(length * 8), other_values = allocate(length * 4);
  const auto workspace = allocate(lmengine::sort_workspace(length) * 4);
  const int result = lmengine::sort_by_key({{keys, static_cast<uint64_t*>(other_keys.get())},
                                            {values, static_cast<float*>(other_values.get())},
                                            static_cast<uint32_t*>(workspace.get())},
                                           length, static_cast<int>(bits), nullptr);
  if (result == 0) return;
  std::memcpy(keys, other_keys.get(), length * 8);
  std::memcpy(values, other_values.get(), length * 4);
}
