// What attention's CPU kernels do to a block of scores between the products: scale, soft-capping,
// masks, ALiBi and dropout's choice. For *_simd.cpp only.
#pragma once

#include "attention/attention_pack.h"
#include "attention/dropout.h"
#include "attention/sequence.h"

namespace lmengine::LMENGINE_ISA {

using attention::Sequence;
using attention::Visibility;

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// A block of scores: queries [first, first + count) and keys [begin, begin + columns) of a
// sequence, in rows of kKeys floats.
struct Block {
  int64_t first, begin;
  int count, columns;
};

// Which of 64 weights of a row dropout keeps, from key 4 * quad on; bit by bit dropout.h's choice.
inline uint64_t kept_of_64(uint64_t seed, int64_t quad, int64_t query, uint64_t head,
                           uint32_t threshold) {
  constexpr uint64_t every_fourth = 0x1111111111111111;
  const uint32_t c3 = static_cast<uint32_t>(head >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__AVX512F__)
  const auto set = [](uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); };
  __m512i x0 =
      _mm512_add_epi32(set(static_cast<uint32_t>(quad)),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  __m512i x1 = set(static_cast<uint32_t>(query)), x2 = set(static_cast<uint32_t>(head)),
          x3 = set(c3);
  const auto product = [&](__m512i a, uint32_t b, __m512i& high, __m512i& low) {
    const __m512i even = _mm512_mul_epu32(a, set(b));
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), set(b));
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
    low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
  };
  for (int round = 0; round < 7; ++round) {
    __m512i high_a, low_a, high_b, low_b;
    product(x0, 0xD2511F53u, high_a, low_a);
    product(x2, 0xCD9E8D57u, high_b, low_b);
    x0 = _mm512_xor_si512(_mm512_xor_si512(high_b, x1), set(k0));
    x1 = low_b;
    x2 = _mm512_xor_si512(_mm512_xor_si512(high_a, x3), set(k1));
    x3 = low_a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  uint64_t kept = 0;
  const __m512i words[] = {x0, x1, x2, x3};
  for (int w = 0; w < 4; ++w)
    kept |= _pdep_u64(_mm512_cmpge_epu32_mask(words[w], set(threshold)), every_fourth << w);
  return kept;
#else
  const auto set = [](uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); };
  const auto product = [&](__m256i a, uint32_t b, __m256i& high, __m256i& low) {
    const __m256i even = _mm256_mul_epu32(a, set(b));
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), set(b));
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  };
  uint64_t kept = 0;
  for (int part = 0; part < 2; ++part) {
    __m256i x0 = _mm256_add_epi32(set(static_cast<uint32_t>(quad + 8 * part)),
                                  _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i x1 = set(static_cast<uint32_t>(query)), x2 = set(static_cast<uint32_t>(head)),
            x3 = set(c3);
    uint32_t l0 = k0, l1 = k1;
    for (int round = 0; round < 7; ++round) {
      __m256i high_a, low_a, high_b, low_b;
      product(x0, 0xD2511F53u, high_a, low_a);
      product(x2, 0xCD9E8D57u, high_b, low_b);
      x0 = _mm256_xor_si256(_mm256_xor_si256(high_b, x1), set(l0));
      x1 = low_b;
      x2 = _mm256_xor_si256(_mm256_xor_si256(high_a, x3), set(l1));
      x3 = low_a;
      l0 += 0x9E3779B9u, l1 += 0xBB67AE85u;
    }
    const __m256i words[] = {x0, x1, x2, x3};
    for (int w = 0; w < 4; ++w) {
      const __m256i enough =
          _mm256_cmpeq_epi32(_mm256_max_epu32(words[w], set(threshold)), words[w]);
      const uint64_t bits = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(enough)));
      kept |= _pdep_u64(bits, every_fourth << w) << (32 * part);
    }
  }
  return kept;
#endif
}

// The scores of one head of one sequence.
class Scores {
 public:
  Scores(const AttentionParameters& p, int64_t batch, int64_t head)
      : p_(p), s_(attention::sequence_of(p, batch)), head_(batch * p.heads + head) {
    const bool additive = p.mask.type != MaskType::none && p.mask.type != MaskType::boolean;
    // a scale that is not positive would turn the maximum round
    transformed_ = additive || p.softcap > 0 || p.alibi_slopes != nullptr || !(p.scale > 0);
    mask_ = batch * p.mask.batch_stride + head * p.mask.head_stride;
    if (p.alibi_slopes != nullptr) slope_ = p.alibi_slopes[batch * p.alibi_batch_stride + head];
    if (p.seed != nullptr) seed_ = static_cast<uint64_t>(*p.seed);
  }

  const Sequence& sequence() const { return s_; }

  // The weight is 2^(factor * score - ...) for a score that `finish` has done with.
  float factor() const { return transformed_ ? kLog2e : p_.scale * kLog2e; }

  // Whether no query of the block sees a key of it.
  bool hidden(const Block& b) const {
    if (attention::visibility(s_, b.first, b.count, b.begin, b.columns) == Visibility::none)
      return true;
    if (p_.mask.type != MaskType::boolean) return false;
    const int rows = p_.mask.row_stride == 0 ? 1 : b.count;
    const int columns = p_.mask.column_stride == 0 ? 1 : b.columns;
    for (int i = 0; i < rows; ++i) {
      const bool* mask = mask_row<bool>(b, i);
      for (int j = 0; j < columns; ++j)
        if (mask[j * p_.mask.column_stride]) return false;
    }
    return true;
  }

  // From products of queries and keys to scores, -infinity for what is not seen and behind the last
  // column. `slopes`: where the derivative of soft-capping is stored, for a block of the same form.
  void finish(const Block& b, float* scores, float* slopes) const {
    const bool partly =
        attention::visibility(s_, b.first, b.count, b.begin, b.columns) != Visibility::all;
    if (transformed_)
      for (int i = 0; i < b.count; ++i)
        transform(b, i, scores + i * kKeys, slopes == nullptr ? nullptr : slopes + i * kKeys);
    if (p_.mask.type == MaskType::boolean)
      for (int i = 0; i < b.count; ++i) hide_masked(b, i, scores + i * kKeys);
    if (partly)
      for (int i = 0; i < b.count; ++i) hide_unseen(b, b.first + i, scores + i * kKeys);
    const int width = static_cast<int>(round_up(b.columns, 2 * Vec::width));
    if (b.columns < width)
      for (int i = 0; i < b.count; ++i) hide(scores + i * kKeys, b.columns, width);
  }

  bool dropout() const { return p_.seed != nullptr; }

  // Which weights of a row dropout keeps: bit j % 64 of kept[j / 64] for column j.
  void choose(const Block& b, int row, uint64_t (&kept)[kKeys / 64]) const {
    for (int part = 0; part < (b.columns + 63) / 64; ++part)
      kept[part] =
          kept_of_64(seed_, b.begin / 4 + 16 * part, b.first + row, static_cast<uint64_t>(head_),
                     attention::dropout_threshold(p_.dropout_p));
  }

 private:
  template <class T>
  const T* mask_row(const Block& b, int row) const {
    return static_cast<const T*>(p_.mask.data) + mask_ + (b.first + row) * p_.mask.row_stride +
           b.begin * p_.mask.column_stride;
  }

  void transform(const Block& b, int row, float* scores, float* slopes) const {
    const Vec scale = Vec::set(p_.scale);
    if (p_.softcap > 0) {
      const Vec cap = Vec::set(p_.softcap), factor = scale / cap;
      for (int j = 0; j < b.columns; j += Vec::width) {
        const Vec bent = tanh(Vec::load(scores + j) * factor);
        (bent * cap).store(scores + j);
        if (slopes != nullptr) fnma(bent, bent, Vec::set(1)).store(slopes + j);
      }
    } else {
      for (int j = 0; j < b.columns; j += Vec::width)
        (Vec::load(scores + j) * scale).store(scores + j);
    }
    if (p_.mask.type == MaskType::float32)
      add_mask<float>(b, row, scores);
    else if (p_.mask.type == MaskType::same)
      with_type(p_.type, [&](auto zero) { add_mask<decltype(zero)>(b, row, scores); });
    if (p_.alibi_slopes != nullptr) {
      const Vec start = Vec::set(static_cast<float>(b.begin - (b.first + row + s_.offset)));
      for (int j = 0; j < b.columns; j += Vec::width) {
        const Vec distance = abs(Vec::counting() + (start + Vec::set(static_cast<float>(j))));
        fnma(Vec::set(slope_), distance, Vec::load(scores + j)).store(scores + j);
      }
    }
  }

  template <class T>
  void add_mask(const Block& b, int row, float* scores) const {
    const T* mask = mask_row<T>(b, row);
    T together[kKeys];
    if (p_.mask.column_stride != 1) {
      for (int j = 0; j < b.columns; ++j) together[j] = mask[j * p_.mask.column_stride];
      mask = together;
    }
    for (int j = 0; j < b.columns; j += Vec::width)
      (Vec::load(scores + j) + Vec::load(mask + j, b.columns - j)).store(scores + j);
  }

  void hide_masked(const Block& b, int row, float* scores) const {
    const bool* mask = mask_row<bool>(b, row);
    alignas(16) bool together[kKeys + 16];
    if (p_.mask.column_stride != 1 || b.columns % 16 != 0) {
      for (int j = 0; j < b.columns; ++j) together[j] = mask[j * p_.mask.column_stride];
      mask = together;
    }
    for (int j = 0; j < b.columns; j += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + j));
      const int hidden = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
      for (int k = 0; k < 16; k += Vec::width)
        select(static_cast<uint32_t>(hidden >> k), Vec::set(-INFINITY), Vec::load(scores + j + k))
            .store(scores + j + k);
    }
  }

  void hide_unseen(const Block& b, int64_t query, float* scores) const {
    const attention::KeyRange band = attention::band_of(s_, query, 1);
    const auto column = [&](int64_t key) {
      return static_cast<int>(smaller(larger(key - b.begin, 0), b.columns));
    };
    hide(scores, column(s_.prefix), column(band.begin));
    hide(scores, column(larger(s_.prefix, band.end)), b.columns);
  }

  static void hide(float* scores, int from, int to) {
    for (int j = from; j < to; ++j) scores[j] = -INFINITY;
  }

  const AttentionParameters& p_;
  const Sequence s_;
  const int64_t head_;
  int64_t mask_;
  float slope_ = 0;
  uint64_t seed_ = 0;
  bool transformed_;
};

}  // namespace lmengine::LMENGINE_ISA
