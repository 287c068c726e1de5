// CUDA's built-in functions for the emulation: barriers, warp instructions, atomics, arithmetic.
// One thread runs at a time, so an atomic is an ordinary read and write. Included by emulation.h.
#pragma once

inline void __syncthreads(
    lmengine::emulation::Location where = lmengine::emulation::Location::current()) {
  lmengine::emulation::sync_threads(where);
}

inline void __syncwarp(unsigned mask = 0xffffffff, lmengine::emulation::Location where =
                                                       lmengine::emulation::Location::current()) {
  lmengine::emulation::warp_instruction("__syncwarp", mask, nullptr, nullptr, where);
}

inline void __threadfence() { lmengine::emulation::thread_fence(); }
inline void __threadfence_block() { lmengine::emulation::thread_fence(); }

namespace lmengine::emulation {

// Every lane of `mask` gives a value; `values[lane]` is what it gave.
template <class T>
struct Gathered {
  T value;
  bool present[32];
  T values[32];
};

template <class T>
inline Gathered<T> gather(const char* name, unsigned mask, T value, const Location& where) {
  Gathered<T> mine{};
  mine.value = value;
  warp_instruction(
      name, mask, &mine,
      [](void* const* arguments) __attribute__((no_sanitize_thread)) {
        for (int to = 0; to < 32; ++to) {
          if (!arguments[to]) continue;
          auto& receiver = *static_cast<Gathered<T>*>(arguments[to]);
          for (int from = 0; from < 32; ++from) {
            receiver.present[from] = arguments[from] != nullptr;
            if (arguments[from])
              receiver.values[from] = static_cast<Gathered<T>*>(arguments[from])->value;
          }
        }
      },
      where);
  return mine;
}

template <class T>
inline T shuffle(const char* name, unsigned mask, T value, int source, int width,
                 const Location& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2);
  if (width <= 0 || width > 32 || (width & (width - 1)))
    fail(std::string(name) + ": width is no power of 2", &where);
  const Gathered<T> all = gather(name, mask, value, where);
  const int first = lane() & ~(width - 1);
  if (source < first || source >= first + width)
    return value;  // out of the segment: one's own value
  if (!all.present[source]) fail(std::string(name) + ": reads a lane that takes no part", &where);
  return all.values[source];
}

template <class T, class Combine>
inline T reduce(const char* name, unsigned mask, T value, Combine combine, const Location& where) {
  const Gathered<T> all = gather(name, mask, value, where);
  T result = value;
  for (int from = 0; from < 32; ++from) {
    if (all.present[from] && from != lane()) result = combine(result, all.values[from]);
  }
  return result;
}

}  // namespace lmengine::emulation

#define LMENGINE_WHERE \
  lmengine::emulation::Location where = lmengine::emulation::Location::current()

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, LMENGINE_WHERE) {
  const int first = lmengine::emulation::lane() & ~(width - 1);
  return lmengine::emulation::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)),
                                      width, where);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, LMENGINE_WHERE) {
  const int source = lmengine::emulation::lane() ^ lanes;
  return lmengine::emulation::shuffle("__shfl_xor_sync", mask, value, source, width, where);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LMENGINE_WHERE) {
  const int source = lmengine::emulation::lane() + static_cast<int>(delta);
  return lmengine::emulation::shuffle("__shfl_down_sync", mask, value, source, width, where);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LMENGINE_WHERE) {
  const int source = lmengine::emulation::lane() - static_cast<int>(delta);
  return lmengine::emulation::shuffle("__shfl_up_sync", mask, value, source, width, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, LMENGINE_WHERE) {
  const auto all = lmengine::emulation::gather("__ballot_sync", mask, predicate, where);
  unsigned result = 0;
  for (int from = 0; from < 32; ++from) {
    if (all.present[from] && all.values[from]) result |= 1u << from;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate, LMENGINE_WHERE) {
  return lmengine::emulation::reduce(
      "__any_sync", mask, predicate != 0, [](bool a, bool b) { return a || b; }, where);
}
inline int __all_sync(unsigned mask, int predicate, LMENGINE_WHERE) {
  return lmengine::emulation::reduce(
      "__all_sync", mask, predicate != 0, [](bool a, bool b) { return a && b; }, where);
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, LMENGINE_WHERE) {
  const auto all = lmengine::emulation::gather("__match_any_sync", mask, value, where);
  unsigned result = 0;
  for (int from = 0; from < 32; ++from) {
    if (all.present[from] && all.values[from] == value) result |= 1u << from;
  }
  return result;
}
template <class T>
inline T __reduce_add_sync(unsigned mask, T value, LMENGINE_WHERE) {
  return lmengine::emulation::reduce(
      "__reduce_add_sync", mask, value, [](T a, T b) { return a + b; }, where);
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T value, LMENGINE_WHERE) {
  return lmengine::emulation::reduce(
      "__reduce_max_sync", mask, value, [](T a, T b) { return a > b ? a : b; }, where);
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T value, LMENGINE_WHERE) {
  return lmengine::emulation::reduce(
      "__reduce_min_sync", mask, value, [](T a, T b) { return a < b ? a : b; }, where);
}
#undef LMENGINE_WHERE

// The value's type follows from the address, as in CUDA's overloads.
#define LMENGINE_ATOMIC(name, expression)                                      \
  template <class T>                                                           \
  inline T name(T* address, std::type_identity_t<T> value) {                   \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, #name ": no such atomic"); \
    T old;                                                                     \
    __atomic_load(address, &old, __ATOMIC_RELAXED);                            \
    T wanted = (expression);                                                   \
    __atomic_store(address, &wanted, __ATOMIC_RELAXED);                        \
    return old;                                                                \
  }
LMENGINE_ATOMIC(atomicAdd, old + value)
LMENGINE_ATOMIC(atomicSub, old - value)
LMENGINE_ATOMIC(atomicMax, old > value ? old : value)
LMENGINE_ATOMIC(atomicMin, old < value ? old : value)
LMENGINE_ATOMIC(atomicExch, value)
LMENGINE_ATOMIC(atomicOr, old | value)
LMENGINE_ATOMIC(atomicAnd, old& value)
#undef LMENGINE_ATOMIC
template <class T>
inline T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "atomicCAS takes integers");
  const T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  if (old == expected) __atomic_store_n(address, value, __ATOMIC_RELAXED);
  return old;
}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
inline void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

namespace lmengine::emulation {
template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
}  // namespace lmengine::emulation
inline int __float_as_int(float x) { return lmengine::emulation::bits_as<int>(x); }
inline float __int_as_float(int x) { return lmengine::emulation::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return lmengine::emulation::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return lmengine::emulation::bits_as<float>(x); }

#define LMENGINE_MIN_MAX(type)                              \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
LMENGINE_MIN_MAX(int)
LMENGINE_MIN_MAX(unsigned)
LMENGINE_MIN_MAX(long)
LMENGINE_MIN_MAX(unsigned long)
LMENGINE_MIN_MAX(long long)
LMENGINE_MIN_MAX(unsigned long long)
#undef LMENGINE_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
