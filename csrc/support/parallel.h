// Threads for the CPU kernels: PyTorch's own pool, reached through one plain function, so that
// sources compiled for several instruction sets need none of PyTorch's headers.
#pragma once

#include <cstdint>
#include <type_traits>

namespace lmengine {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// How many threads parallel_for may use.
int num_threads();

// Calls body(begin, end) on disjoint pieces of [begin, end), each of at least `grain` items but the
// last.
template <class Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, Body&& body) {
  using Callable = std::remove_reference_t<Body>;
  parallel_for_raw(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) {
        (*static_cast<Callable*>(context))(first, last);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace lmengine
