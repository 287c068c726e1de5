// The primitives of csrc/support/sm90.h for the emulation, as the PTX manual defines them: barriers
// in shared memory that count arrivals and bytes, tiles that the tensor memory accelerator copies,
// products of a warp group on tiles in shared memory, named barriers.
//
// What is asynchronous comes as late as it may: a tile when no thread can go on without it, a
// product when it is waited for. Until then the tile and the accumulators hold NaN, so that reading
// or changing them too early gives wrong results. Products and the accelerator see what threads
// wrote to shared memory only after fence_async_proxy.
#pragma once

#include "cuda_host/emulation.h"

namespace lmengine {

// A tensor of up to 5 dimensions and the box of it that one copy takes; innermost first, bytes.
struct alignas(64) TensorMap {
  const unsigned char* base;
  int rank, element_bytes;
  uint64_t sizes[5], strides[5];
  uint32_t box[5];
};
static_assert(sizeof(TensorMap) <= 192);

namespace emulation {

// Sets sm_90's limits; called before main by whoever includes this.
bool use_sm90();
inline const bool sm90_used = use_sm90();

uint32_t shared_address(const void* shared);

void mbarrier_init(uint64_t* barrier, unsigned count, const Location& where);
void mbarrier_arrive(uint64_t* barrier, unsigned bytes, const Location& where);
bool mbarrier_test(uint64_t* barrier, unsigned parity, const Location& where);

// Bytes that are known arrive later, those of a tile swizzled.
void bytes_later(void* shared, std::string bytes, bool swizzle, uint64_t* barrier,
                 const Location& where);

void fence_async_proxy();

struct Product {
  float* d = nullptr;
  int n = 0;
  const uint32_t* a_registers = nullptr;
  uint64_t a = 0, b = 0;
  bool a_transposed = false, b_transposed = false, accumulate = false, is_half = false;
  int group = 0;
  Location where;
};
void product_later(const Product& product);
void product_fence();
void product_commit();
void product_wait(int pending, const Location& where);

void named_barrier(int id, int threads, bool wait, const Location& where);

}  // namespace emulation

inline uint32_t shared_address(const void* shared) { return emulation::shared_address(shared); }

inline void mbarrier_init(uint64_t* barrier, unsigned count,
                          emulation::Location where = emulation::Location::current()) {
  emulation::mbarrier_init(barrier, count, where);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier,
                            emulation::Location where = emulation::Location::current()) {
  emulation::mbarrier_arrive(barrier, 0, where);
}
inline void mbarrier_arrive_expecting(uint64_t* barrier, unsigned bytes,
                                      emulation::Location where = emulation::Location::current()) {
  emulation::mbarrier_arrive(barrier, bytes, where);
}
inline void mbarrier_wait(uint64_t* barrier, unsigned parity,
                          emulation::Location where = emulation::Location::current()) {
  while (!emulation::mbarrier_test(barrier, parity, where)) emulation::spin();
}

// Reads the box here, where AddressSanitizer sees it; what lies outside the tensor is zero.
inline void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int x, int row,
                     int head, int batch,
                     emulation::Location where = emulation::Location::current()) {
  const int64_t start[5] = {x, row, head, batch, 0};
  if (map->rank != 4) emulation::fail("tma_load: the tensor map is not of 4 dimensions", &where);
  const size_t element = static_cast<size_t>(map->element_bytes);
  size_t count = 1;
  for (int d = 0; d < map->rank; ++d) count *= map->box[d];
  std::string bytes(count * element, '\0');
  for (size_t i = 0; i < count; ++i) {
    size_t rest = i;
    bool inside = true;
    const unsigned char* from = map->base;
    for (int d = 0; d < map->rank; ++d) {
      const int64_t at = start[d] + static_cast<int64_t>(rest % map->box[d]);
      rest /= map->box[d];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map->sizes[d]);
      from += at * static_cast<int64_t>(map->strides[d]);
    }
    if (!inside) continue;
    for (size_t byte = 0; byte < element; ++byte)
      bytes[i * element + byte] = static_cast<char>(from[byte]);
  }
  emulation::bytes_later(shared, std::move(bytes), true, barrier, where);
}

inline void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier,
                      emulation::Location where = emulation::Location::current()) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 ||
      bytes % 16)
    emulation::fail("bulk_load: addresses and bytes have to be multiples of 16", &where);
  std::string copy(bytes, '\0');
  for (unsigned i = 0; i < bytes; ++i) copy[i] = static_cast<const char*>(global)[i];
  emulation::bytes_later(shared, std::move(copy), false, barrier, where);
}

inline void add_to_global(float* to, float a, float b, float c, float d,
                          emulation::Location where = emulation::Location::current()) {
  if (reinterpret_cast<uintptr_t>(to) % 16)
    emulation::fail("add_to_global: address not 16-byte aligned", &where);
  atomicAdd(to, a), atomicAdd(to + 1, b), atomicAdd(to + 2, c), atomicAdd(to + 3, d);
}

inline void fence_async_proxy() { emulation::fence_async_proxy(); }

template <int n, class T, bool b_transposed>
inline void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                  emulation::Location where = emulation::Location::current()) {
  emulation::Product product;
  product.d = d, product.n = n, product.a_registers = a, product.b = b;
  product.b_transposed = b_transposed, product.accumulate = accumulate;
  product.is_half = std::is_same_v<T, __half>, product.where = where;
  emulation::product_later(product);
}

template <int n, class T, bool a_transposed, bool b_transposed>
inline void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate,
                  emulation::Location where = emulation::Location::current()) {
  emulation::Product product;
  product.d = d, product.n = n, product.a = a, product.b = b;
  product.a_transposed = a_transposed, product.b_transposed = b_transposed;
  product.accumulate = accumulate;
  product.is_half = std::is_same_v<T, __half>, product.where = where;
  emulation::product_later(product);
}

inline void wgmma_fence() { emulation::product_fence(); }
inline void wgmma_commit() { emulation::product_commit(); }
template <int pending>
inline void wgmma_wait(emulation::Location where = emulation::Location::current()) {
  static_assert(pending >= 0 && pending < 8);
  emulation::product_wait(pending, where);
}

inline void named_barrier_sync(int id, int threads,
                               emulation::Location where = emulation::Location::current()) {
  emulation::named_barrier(id, threads, true, where);
}
inline void named_barrier_arrive(int id, int threads,
                                 emulation::Location where = emulation::Location::current()) {
  emulation::named_barrier(id, threads, false, where);
}

template <int count>
inline void set_registers_up() {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0);
}
template <int count>
inline void set_registers_down() {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0);
}

}  // namespace lmengine
