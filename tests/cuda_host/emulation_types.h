// CUDA's vector types and 16-bit floats for the emulation, with CUDA's sizes and alignments.
#pragma once

#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define LMENGINE_VECTORS(scalar, name)                                                         \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                                 \
  struct alignas(sizeof(scalar) < 8 ? 4 * sizeof(scalar) : 16) name##4 { scalar x, y, z, w; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                         \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
LMENGINE_VECTORS(float, float)
LMENGINE_VECTORS(double, double)
LMENGINE_VECTORS(int, int)
LMENGINE_VECTORS(unsigned, uint)
LMENGINE_VECTORS(short, short)
LMENGINE_VECTORS(unsigned short, ushort)
#undef LMENGINE_VECTORS

namespace lmengine::emulation {

inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >>
                               16);  // to nearest, ties to even
}

inline float bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;  // NaN
  if (magnitude >= 0x477ff000)
    return static_cast<uint16_t>(sign | 0x7c00);                   // 65520 and up: infinity
  if (magnitude < 0x33000001) return static_cast<uint16_t>(sign);  // at most 2^-25: zero
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
  const int dropped = exponent < -14 ? 13 + (-14 - exponent) : 13;  // a subnormal drops more bits
  uint32_t result = mantissa >> dropped;
  const uint32_t rest = mantissa & ((1u << dropped) - 1), middle = 1u << (dropped - 1);
  if (rest > middle || (rest == middle && (result & 1))) ++result;
  if (exponent >= -14)
    result += static_cast<uint32_t>(exponent + 14) << 10;  // the hidden bit adds one more
  return static_cast<uint16_t>(sign | result);
}

inline float half_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31, mantissa = bits & 0x3ff;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t wide =
      sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&value, &wide, 4);
  return value;
}

}  // namespace lmengine::emulation

// Arithmetic on these goes through float: the kernels accumulate in float anyway.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(lmengine::emulation::bfloat16_bits(value)) {}
  operator float() const { return lmengine::emulation::bfloat16_value(bits); }
};
struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(lmengine::emulation::half_bits(value)) {}
  operator float() const { return lmengine::emulation::half_value(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
