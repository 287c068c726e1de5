// Co-occurrence counts on a GPU. The positions of the text are grouped by their token. Then, a band
// of rows after the other, the pairs of all positions are added to a table of sums, in which every
// row has a region of its own: dense where the row may meet most of the vocabulary, a hash table
// otherwise. What is in the table is collected and sorted.
//
// Why so. The list of all pairs, which the Triton kernels sort, is some ten times as long as the
// list of the entries. One hash table for the whole text would be hit all over global memory; with
// the positions grouped, the blocks that run at a time add to few rows, whose regions stay in the
// L2 cache. A row cannot have more entries than the vocabulary has words, nor more than its token
// has pairs: with regions of twice that bound no table fills, and bands of so many rows as fit into
// the table bound the memory. Bands are ranges of rows, so their results follow one another, and
// nothing has to be merged.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cooccurrence/cooccurrence_cuda.h"
#include "cooccurrence/sort.h"
#include "support/cuda.h"

namespace lmengine {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 16;  // slots of a thread in collect_kernel

// The region of a row in the table: `x` is its first slot, `y` the number of slots; dense where
// that is vocabulary_size.
using Region = uint2;

struct Table {
  const Region* regions;     // (vocabulary)
  unsigned* columns;         // (slots): column + 1, or 0; unused in dense regions
  unsigned long long* sums;  // (slots): above 0 in the slots that are used
  int64_t slots;
};

__device__ __forceinline__ int64_t thread_index() {
  return int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}

// Adds to `occurrences` (vocabulary), and to `bad` the length minus the first position whose token
// is not below vocabulary_size.
__global__ void __launch_bounds__(kThreads)
    occurrences_kernel(CooccurrenceParameters p, unsigned* occurrences, unsigned long long* bad) {
  const int64_t i = thread_index();
  if (i >= p.length || p.tokens[i] < 0) return;
  if (p.tokens[i] < p.vocabulary_size) {
    atomicAdd(occurrences + p.tokens[i], 1u);
  } else {
    atomicMax(bad, static_cast<unsigned long long>(p.length - i));
  }
}

// `next` (vocabulary): where the next position of a token goes. The order within a token is any:
// sums of whole numbers do not depend on it.
__global__ void __launch_bounds__(kThreads)
    group_kernel(CooccurrenceParameters p, unsigned* next, uint32_t* positions) {
  const int64_t i = thread_index();
  if (i < p.length && p.tokens[i] >= 0)
    positions[atomicAdd(next + p.tokens[i], 1u)] = static_cast<uint32_t>(i);
}

__device__ __forceinline__ void add(const Table& table, const Region& region, bool dense,
                                    unsigned column, unsigned long long units) {
  unsigned slot = column;
  if (!dense) {
    unsigned* columns = table.columns + region.x;
    slot = __umulhi(column * 0x9e3779b9u, region.y);
    for (;;) {
      unsigned found = cuda::load_relaxed(columns + slot);
      if (found == 0) found = atomicCAS(columns + slot, 0u, column + 1);
      if (found == 0 || found == column + 1) break;
      if (++slot == region.y) slot = 0;
    }
  }
  atomicAdd(table.sums + region.x + slot, units);
}

// 2^lanes_log2 lanes take one side of a position's window, a lane a distance; windows of more than
// 32 take several turns.
__global__ void __launch_bounds__(kThreads)
    pairs_kernel(CooccurrenceParameters p, const uint32_t* positions, int64_t count, Table table,
                 int lanes_log2) {
  const int lanes = 1 << lanes_log2;
  const int64_t item = thread_index() >> lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int64_t number = p.symmetric ? item >> 1 : item;
  const int64_t direction = p.symmetric && (item & 1) ? 1 : -1;
  const bool inside = number < count;
  const int64_t position = inside ? positions[number] : 0;
  const Region region = inside ? table.regions[p.tokens[position]] : Region{0, 0};
  const bool dense = region.y == p.vocabulary_size;
  for (int64_t base = 0; base < p.window_size; base += lanes) {
    const int64_t distance = base + lane + 1, other = position + direction * distance;
    const bool within = inside && distance <= p.window_size && other >= 0 && other < p.length;
    const int32_t token = within ? p.tokens[other] : -1;
    const unsigned stops =
        __ballot_sync(0xffffffff, token < 0) >> (threadIdx.x % 32 & ~(lanes - 1));
    if ((stops & ((2u << lane) - 1)) == 0) add(table, region, dense, token, p.units[distance - 1]);
    if (stops && lanes == 32) break;
  }
}

__global__ void __launch_bounds__(kThreads)
    entries_kernel(Table table, unsigned long long* entries) {
  unsigned number = 0;
  for (int64_t i = thread_index(); i < table.slots; i += int64_t{gridDim.x} * kThreads)
    number += table.sums[i] != 0;
  number = __reduce_add_sync(0xffffffff, number);
  if (threadIdx.x % 32 == 0) atomicAdd(entries, static_cast<unsigned long long>(number));
}

// The row in [low, high] whose region holds a slot: the last that begins at or before it.
__device__ __forceinline__ int row_of(const Region* regions, unsigned slot, int low, int high) {
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (regions[middle].x <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Writes the entries in any order. A key is the row, counted from the band's first, and the column.
__global__ void __launch_bounds__(kThreads)
    collect_kernel(Table table, int first_row, int last_row, int64_t vocabulary_size,
                   int column_bits, double scale, unsigned long long* cursor, uint64_t* keys,
                   float* values) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (thread_index() - lane) * kItems;
  if (first >= table.slots) return;
  unsigned long long sums[kItems];
  unsigned number = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int64_t slot = first + j * 32 + lane;
    sums[j] = slot < table.slots ? table.sums[slot] : 0;
    number += __popc(__ballot_sync(0xffffffff, sums[j] != 0));
  }
  if (number == 0) return;
  unsigned long long place = 0;
  if (lane == 0) place = atomicAdd(cursor, static_cast<unsigned long long>(number));
  place = __shfl_sync(0xffffffff, place, 0);
  const auto last = static_cast<unsigned>(min(first + 32 * kItems, table.slots) - 1);
  const int low = row_of(table.regions, static_cast<unsigned>(first), first_row, last_row - 1);
  const int high = row_of(table.regions, last, low, last_row - 1);
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const unsigned used = __ballot_sync(0xffffffff, sums[j] != 0);
    if (sums[j] != 0) {
      const auto slot = static_cast<unsigned>(first + j * 32 + lane);
      const int row = row_of(table.regions, slot, low, high);
      const Region region = table.regions[row];
      const unsigned column =
          region.y == vocabulary_size ? slot - region.x : table.columns[slot] - 1;
      const unsigned long long to = place + __popc(used & ((1u << lane) - 1));
      keys[to] = static_cast<uint64_t>(row - first_row) << column_bits | column;
      values[to] = static_cast<float>(static_cast<double>(static_cast<int64_t>(sums[j])) / scale);
    }
    place += __popc(used);
  }
}

__global__ void __launch_bounds__(kThreads)
    split_kernel(const uint64_t* keys, const float* from, int64_t count, int first_row,
                 int column_bits, int32_t* rows, int32_t* columns, float* values) {
  const int64_t i = thread_index();
  if (i >= count) return;
  rows[i] = first_row + static_cast<int32_t>(keys[i] >> column_bits);
  columns[i] = static_cast<int32_t>(keys[i] & ((uint64_t{1} << column_bits) - 1));
  values[i] = from[i];
}

unsigned blocks_of(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

int bits_of(int64_t largest) {
  int bits = 0;
  while (bits < 63 && largest >> bits) ++bits;
  return bits;
}

template <class T>
T* at(const GpuMemory& memory) {
  return static_cast<T*>(memory.get());
}

}  // namespace

CooccurrenceCounter::CooccurrenceCounter(const CooccurrenceParameters& parameters,
                                         std::function<GpuMemory(size_t)> allocate, void* stream_,
                                         int64_t slots)
    : p_(parameters), allocate_(std::move(allocate)), stream_(stream_) {
  if (p_.length == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_);
  units_ = allocate_(p_.window_size * sizeof(int64_t));
  cuda::copy_to_device(units_.get(), p_.units, p_.window_size * sizeof(int64_t), stream);
  p_.units = at<int64_t>(units_);

  words_ = allocate_(2 * sizeof(unsigned long long));
  cuda::zero(words_.get(), sizeof(unsigned long long), stream);
  const size_t bytes = p_.vocabulary_size * sizeof(unsigned);
  const GpuMemory occurrences = allocate_(bytes);
  cuda::zero(occurrences.get(), bytes, stream);
  cuda::launch(occurrences_kernel, blocks_of(p_.length), kThreads, 0, stream, p_,
               at<unsigned>(occurrences), at<unsigned long long>(words_));
  unsigned long long bad = 0;
  cuda::copy_to_host(&bad, words_.get(), sizeof bad, stream);
  if (bad) {
    const int64_t position = p_.length - static_cast<int64_t>(bad);
    int32_t token = 0;
    cuda::copy_to_host(&token, p_.tokens + position, sizeof token, stream);
    throw std::runtime_error("lmengine: " + bad_token(token, position, p_.vocabulary_size));
  }
  occurrences_.resize(p_.vocabulary_size);
  cuda::copy_to_host(occurrences_.data(), occurrences.get(), bytes, stream);
  group_positions();
  plan(slots);
}

void CooccurrenceCounter::group_positions() {
  const auto stream = static_cast<cudaStream_t>(stream_);
  std::vector<uint32_t> next(p_.vocabulary_size);
  int64_t total = 0;
  for (int64_t token = 0; token < p_.vocabulary_size; ++token) {
    next[token] = static_cast<uint32_t>(total);
    total += occurrences_[token];
  }
  const size_t bytes = p_.vocabulary_size * sizeof(uint32_t);
  const GpuMemory places = allocate_(bytes);
  cuda::copy_to_device(places.get(), next.data(), bytes, stream);
  positions_ = allocate_(total * sizeof(uint32_t));
  cuda::launch(group_kernel, blocks_of(p_.length), kThreads, 0, stream, p_, at<unsigned>(places),
               at<uint32_t>(positions_));
}

void CooccurrenceCounter::plan(int64_t slots) {
  const int64_t sides = p_.symmetric ? 2 : 1;
  std::vector<Region> regions(p_.vocabulary_size);
  Band band{};
  int64_t largest = 0;
  const auto close = [&](int64_t row) {
    band.last_row = row;
    if (band.slots) bands_.push_back(band);
    largest = std::max(largest, band.slots);
    band = {row, row, band.last_position, band.last_position, 0};
  };
  for (int64_t row = 0; row < p_.vocabulary_size; ++row) {
    const int64_t pairs = occurrences_[row] * p_.window_size * sides;
    const int64_t wanted = std::min(2 * pairs, p_.vocabulary_size);
    if (band.slots && band.slots + wanted > slots) close(row);
    regions[row].x = static_cast<unsigned>(band.slots);
    regions[row].y = static_cast<unsigned>(wanted);
    band.slots += wanted;
    band.last_position += occurrences_[row];
  }
  close(p_.vocabulary_size);
  const size_t bytes = p_.vocabulary_size * sizeof(Region);
  rows_ = allocate_(bytes);
  cuda::copy_to_device(rows_.get(), regions.data(), bytes, static_cast<cudaStream_t>(stream_));
  table_sums_ = allocate_(largest * sizeof(unsigned long long));
  table_columns_ = allocate_(largest * sizeof(unsigned));
}

int64_t CooccurrenceCounter::count(int64_t number) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Band& band = bands_[band_ = number];
  const Table table{at<Region>(rows_), at<unsigned>(table_columns_),
                    at<unsigned long long>(table_sums_), band.slots};
  cuda::zero(table.sums, band.slots * sizeof(unsigned long long), stream);
  cuda::zero(table.columns, band.slots * sizeof(unsigned), stream);
  cuda::zero(words_.get(), 2 * sizeof(unsigned long long), stream);
  const int lanes_log2 = bits_of(std::min<int64_t>(p_.window_size, 32) - 1);
  const int64_t positions = band.last_position - band.first_position;
  cuda::launch(pairs_kernel, blocks_of((positions << lanes_log2) * (p_.symmetric ? 2 : 1)),
               kThreads, 0, stream, p_, at<uint32_t>(positions_) + band.first_position, positions,
               table, lanes_log2);
  const unsigned blocks = std::min(blocks_of(band.slots), 16u * cuda::multiprocessors());
  cuda::launch(entries_kernel, blocks, kThreads, 0, stream, table, at<unsigned long long>(words_));
  unsigned long long entries = 0;
  cuda::copy_to_host(&entries, words_.get(), sizeof entries, stream);
  return entries_ = static_cast<int64_t>(entries);
}

void CooccurrenceCounter::write(int32_t* rows, int32_t* columns, float* values) {
  if (entries_ == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Band& band = bands_[band_];
  const Table table{at<Region>(rows_), at<unsigned>(table_columns_),
                    at<unsigned long long>(table_sums_), band.slots};
  const int column_bits = bits_of(p_.vocabulary_size - 1);
  const int row_bits = bits_of(band.last_row - 1 - band.first_row);
  GpuMemory memory[5];
  for (int i = 0; i < 2; ++i) {
    memory[i] = allocate_(entries_ * sizeof(uint64_t));
    memory[2 + i] = allocate_(entries_ * sizeof(float));
  }
  memory[4] = allocate_(sort_workspace(entries_) * sizeof(uint32_t));
  const SortBuffers buffers{{at<uint64_t>(memory[0]), at<uint64_t>(memory[1])},
                            {at<float>(memory[2]), at<float>(memory[3])},
                            at<uint32_t>(memory[4])};
  cuda::launch(collect_kernel, blocks_of((band.slots + kItems - 1) / kItems), kThreads, 0, stream,
               table, band.first_row, band.last_row, p_.vocabulary_size, column_bits, p_.scale,
               at<unsigned long long>(words_) + 1, buffers.keys[0], buffers.values[0]);
  const int sorted = sort_by_key(buffers, entries_, row_bits + column_bits, stream_);
  cuda::launch(split_kernel, blocks_of(entries_), kThreads, 0, stream, buffers.keys[sorted],
               buffers.values[sorted], entries_, band.first_row, column_bits, rows, columns,
               values);
}

}  // namespace lmengine
