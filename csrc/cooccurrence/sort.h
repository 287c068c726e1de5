// Sorts 64-bit keys with 32-bit values on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmengine {

// Two sets of buffers, which the passes of the sort use in turn.
struct SortBuffers {
  uint64_t* keys[2];
  float* values[2];
  uint32_t* workspace;  // (sort_workspace(count))
};

// How many uint32_t the workspace for `count` keys has.
size_t sort_workspace(int64_t count);

// Sorts by the lowest `bits` of the keys, stably, and returns which of the two buffers holds the
// result; the input is in buffer 0. count < 2^31.
int sort_by_key(const SortBuffers& buffers, int64_t count, int bits, void* stream);

}  // namespace lmengine
