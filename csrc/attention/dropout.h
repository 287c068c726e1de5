// The random numbers of dropout, the same on every backend: Philox 4x32 with 7 rounds (Salmon et
// al. 2011). The weight of query i and key j of head h in sequence b is kept where word j % 4 of
// the block with counter (j / 4, i, low, high of b * heads + h) and the seed as its key is at least
// the threshold, dropout_p * 2^32.
#pragma once

#include <cstdint>

#include "attention/sequence.h"

namespace lmengine::attention {

struct Words {
  uint32_t word[4];
};

LMENGINE_HOST_DEVICE Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint64_t c23) {
  uint32_t c2 = static_cast<uint32_t>(c23), c3 = static_cast<uint32_t>(c23 >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A word below this is dropped. Where dropout_p is 1 one word in 2^32 is not: factor is 0.
LMENGINE_HOST_DEVICE uint32_t dropout_threshold(double dropout_p) {
  const double threshold = dropout_p * 4294967296.0;
  return threshold >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(threshold);
}

// What a kept weight is multiplied by.
LMENGINE_HOST_DEVICE float dropout_factor(double dropout_p) {
  return dropout_p >= 1 ? 0 : static_cast<float>(1 / (1 - dropout_p));
}

}  // namespace lmengine::attention
