// A vector of floats in the instruction set that the including *_simd.cpp is compiled for: 16 lanes
// with AVX-512, 8 with AVX2. Everything lies in lmengine::LMENGINE_ISA, so that no two instruction
// sets share a symbol.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#ifndef LMENGINE_ISA
#error "simd.h is for *_simd.cpp, which setup.py compiles once for each instruction set"
#endif

namespace lmengine::LMENGINE_ISA {

// bfloat16 as stored; arithmetic is in float.
using bf16 = uint16_t;
// The same of float16, as a type of its own.
struct fp16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float value) { return {_mm512_set1_ps(value)}; }
  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec load(const float* from, int count) {
    return {_mm512_maskz_loadu_ps(mask(count), from)};
  }
  static Vec load(const bf16* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vec load(const bf16* from, int count) {
    return widen(_mm256_maskz_loadu_epi16(mask(count), from));
  }
  static Vec load(const fp16* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static Vec load(const fp16* from, int count) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(count), from))};
  }
  // 0, 1, 2 ...
  static Vec counting() {
    return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(float* to, int count) const { _mm512_mask_storeu_ps(to, mask(count), v); }
  void store(bf16* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow()); }
  void store(bf16* to, int count) const { _mm256_mask_storeu_epi16(to, mask(count), narrow()); }
  void store(fp16* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halved()); }
  void store(fp16* to, int count) const { _mm256_mask_storeu_epi16(to, mask(count), halved()); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  // a * b + c, and c - a * b
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  friend Vec round(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  // a - round(a), 0 for an infinity
  friend Vec fraction(Vec a) {
    return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  friend Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  // a where the bit of the lane is set, else b
  friend Vec select(uint32_t bits, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(bits), a.v)};
  }
  // a * 2^n for integral n
  friend Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }

 private:
  static __mmask16 mask(int count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  }
  static Vec widen(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  __m256i halved() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  // rounds to nearest even; a NaN stays a NaN
  __m256i narrow() const {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  }
};

#else  // AVX2

struct Vec {
  static constexpr int width = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float value) { return {_mm256_set1_ps(value)}; }
  static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vec load(const float* from, int count) { return {_mm256_maskload_ps(from, mask(count))}; }
  static Vec load(const bf16* from) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vec load(const bf16* from, int count) {
    if (count >= 8) return load(from);
    bf16 buffer[8] = {};
    for (int i = 0; i < count; ++i) buffer[i] = from[i];
    return load(buffer);
  }
  static Vec load(const fp16* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static Vec load(const fp16* from, int count) {
    if (count >= 8) return load(from);
    fp16 buffer[8] = {};
    for (int i = 0; i < count; ++i) buffer[i] = from[i];
    return load(buffer);
  }
  // 0, 1, 2 ...
  static Vec counting() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store(float* to, int count) const { _mm256_maskstore_ps(to, mask(count), v); }
  void store(bf16* to) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow()); }
  void store(bf16* to, int count) const {
    if (count >= 8) return store(to);
    bf16 buffer[8];
    store(buffer);
    for (int i = 0; i < count; ++i) to[i] = buffer[i];
  }
  void store(fp16* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(fp16* to, int count) const {
    if (count >= 8) return store(to);
    fp16 buffer[8];
    store(buffer);
    for (int i = 0; i < count; ++i) to[i] = buffer[i];
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  // a * b + c, and c - a * b
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  friend Vec round(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  // a - round(a), 0 for an infinity
  friend Vec fraction(Vec a) {
    const __m256 finite = _mm256_cmp_ps(abs(a).v, _mm256_set1_ps(INFINITY), _CMP_NEQ_UQ);
    return {_mm256_and_ps(finite, (a - round(a)).v)};
  }
  friend Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  // a where the bit of the lane is set, else b
  friend Vec select(uint32_t bits, Vec a, Vec b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)))};
  }
  // a * 2^n for integral n, in two steps, so that results below the normal range are reached too
  friend Vec scale_by_power(Vec a, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return a * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
  }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  float largest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }

 private:
  static __m256i mask(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec power_of_two(__m256i n) {
    return {
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))};
  }
  static Vec widen(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  // rounds to nearest even; a NaN stays a NaN
  __m128i narrow() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

#endif

// Lane i is the sum over the lanes of v[i].
inline Vec sums_of(const Vec (&v)[Vec::width]) {
#if defined(__AVX512F__)
  const auto pairs = [](__m512 a, __m512 b) {  // of each 128 bits: a, b, a, b
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const auto fours = [&](int i) {  // of each 128 bits: v[i], v[i + 1], v[i + 2], v[i + 3]
    const __m512d a = _mm512_castps_pd(pairs(v[i].v, v[i + 1].v));
    const __m512d b = _mm512_castps_pd(pairs(v[i + 2].v, v[i + 3].v));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {halves(halves(fours(0), fours(4)), halves(fours(8), fours(12)))};
#else
  const auto fours = [&](int i) {
    return _mm256_hadd_ps(_mm256_hadd_ps(v[i].v, v[i + 1].v),
                          _mm256_hadd_ps(v[i + 2].v, v[i + 3].v));
  };
  const __m256 a = fours(0), b = fours(4);
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
#endif
}

// e^x within 2 units in the last place over the whole range; 0 below -104, infinity above 89. The
// order of the arguments of min and max lets a NaN through.
inline Vec exp(Vec x) {
  x = max(Vec::set(-104.0f), min(Vec::set(89.0f), x));
  const Vec n = round(x * Vec::set(1.44269504088896341f));
  Vec r = fnma(n, Vec::set(0.693359375f), x);
  r = fnma(n, Vec::set(-2.12194440e-4f), r);
  Vec p = Vec::set(1.9875691500e-4f);
  p = fma(p, r, Vec::set(1.3981999507e-3f));
  p = fma(p, r, Vec::set(8.3334519073e-3f));
  p = fma(p, r, Vec::set(4.1665795894e-2f));
  p = fma(p, r, Vec::set(1.6666665459e-1f));
  p = fma(p, r, Vec::set(5.0000001201e-1f));
  p = fma(p, r * r, r) + Vec::set(1.0f);
  return scale_by_power(p, n);
}

// 2^x for x up to 127, with a relative error of 1.5e-7, or of 3e-6 where that is enough; 0 from
// -150 and for -infinity. The polynomials have the least relative error on [-1/2, 1/2] with 2^0
// = 1.
template <bool precise = true>
inline Vec exp2(Vec x) {
#if !defined(__AVX512F__)
  x = max(Vec::set(-252.0f), x);
#endif
  const Vec n = round(x), r = fraction(x);
  Vec p;
  if constexpr (precise) {
    p = fma(Vec::set(1.326472727e-3f), r, Vec::set(9.671512733e-3f));
    p = fma(p, r, Vec::set(5.550733744e-2f));
    p = fma(p, r, Vec::set(2.402224208e-1f));
    p = fma(p, r, Vec::set(6.931469776e-1f));
  } else {
    p = fma(Vec::set(9.582853217e-3f), r, Vec::set(5.590642544e-2f));
    p = fma(p, r, Vec::set(2.402409861e-1f));
    p = fma(p, r, Vec::set(6.931241933e-1f));
  }
  return scale_by_power(fma(p, r, Vec::set(1.0f)), n);
}

// 1 / x for x from 2^-126 to 2^126, within 1 unit in the last place; NaN for a NaN.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess{_mm512_rcp14_ps(x.v)};  // one step of Newton's takes less time than a division
  return fma(guess, fnma(x, guess, Vec::set(1.0f)), guess);
#else
  return Vec::set(1.0f) / x;
#endif
}

// Within 1.2e-7 of the exact value; from -87 down it is 1e-38. 2^r on [-1/2, 1/2] is a polynomial
// with the least relative error, 7.5e-8.
inline Vec sigmoid(Vec x) {
  x = max(Vec::set(-126.0f), min(Vec::set(126.0f), x * Vec::set(-1.44269504088896341f)));
  const Vec n = round(x);
  const Vec r = x - n;
  Vec p = Vec::set(1.327647203e-03f);
  p = fma(p, r, Vec::set(9.675541480e-03f));
  p = fma(p, r, Vec::set(5.550713275e-02f));
  p = fma(p, r, Vec::set(2.402211972e-01f));
  p = fma(p, r, Vec::set(6.931469671e-01f));
  p = fma(p, r, Vec::set(1.0f));
  return reciprocal(Vec::set(1.0f) + scale_by_power(p, n));
}

// tanh as a rational function of x (Eigen's and Cephes' form), within a few units in the last
// place.
inline Vec tanh(Vec x) {
  x = max(Vec::set(-7.90531110763549805f), min(Vec::set(7.90531110763549805f), x));
  const Vec x2 = x * x;
  Vec p = Vec::set(-2.76076847742355e-16f);
  p = fma(p, x2, Vec::set(2.00018790482477e-13f));
  p = fma(p, x2, Vec::set(-8.60467152213735e-11f));
  p = fma(p, x2, Vec::set(5.12229709037114e-08f));
  p = fma(p, x2, Vec::set(1.48572235717979e-05f));
  p = fma(p, x2, Vec::set(6.37261928875436e-04f));
  p = fma(p, x2, Vec::set(4.89352455891786e-03f));
  Vec q = Vec::set(1.19825839466702e-06f);
  q = fma(q, x2, Vec::set(1.18534705686654e-04f));
  q = fma(q, x2, Vec::set(2.26843463243900e-03f));
  q = fma(q, x2, Vec::set(4.89352518554385e-03f));
  return x * p * reciprocal(q);
}

#if defined(__AVX512BF16__)
// 32 floats rounded to bfloat16, one behind the other.
inline Vec neighbours(Vec first, Vec second) {
  return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second.v, first.v))};
}

// Each lane's two floats rounded to bfloat16, `first` in the lower half.
inline Vec pair(Vec first, Vec second) {
  alignas(64) static constexpr uint16_t places[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i together = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(places), together))};
}
#endif

// Transposes a square block of 32-bit values.
inline void transpose(Vec (&block)[Vec::width]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(block[i].v, block[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(block[i].v, block[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // b[4 * i + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 * i .. 4 * i + 3
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
    block[j].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    block[j + 8].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    block[j + 4].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    block[j + 12].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
#else
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(block[i].v, block[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(block[i].v, block[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  }
  // b[4 * i + j] holds columns j and j + 4 of rows 4 * i .. 4 * i + 3
  for (int j = 0; j < 4; ++j) {
    block[j].v = _mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
    block[j + 4].v = _mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
  }
#endif
}

}  // namespace lmengine::LMENGINE_ISA
