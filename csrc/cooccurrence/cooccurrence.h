// Co-occurrence counts: parameters and the weights of the distances. What is computed is said in
// lmengine/ops/cooccurrence.py.
#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

namespace lmengine {

struct CooccurrenceParameters {
  const int32_t* tokens;  // (length); negative: a break that no window crosses
  int64_t length;
  int64_t vocabulary_size;
  int64_t window_size;
  bool symmetric;
  const int64_t* units;  // (window_size): the weight of each distance as a multiple of 1 / scale
  int64_t scale;
};

// Weights as whole numbers, so that sums are exact and do not depend on the order of summation.
struct DistanceUnits {
  std::vector<int64_t> units;
  int64_t scale = 1;

  DistanceUnits(int64_t window_size, bool distance_weighting) : units(window_size, 1) {
    if (!distance_weighting) return;
    constexpr int64_t largest = int64_t{1} << 32;
    for (int64_t distance = 1; distance <= window_size; ++distance) {
      scale = std::lcm(scale, distance);
      if (scale > largest) {
        scale = largest;
        break;
      }
    }
    for (int64_t distance = 1; distance <= window_size; ++distance)
      units[distance - 1] = (2 * scale + distance) / (2 * distance);
  }
};

inline std::string bad_token(int64_t token, int64_t position, int64_t vocabulary_size) {
  return "tokens: expected tokens below vocabulary_size = " + std::to_string(vocabulary_size) +
         ", got " + std::to_string(token) + " at position " + std::to_string(position);
}

}  // namespace lmengine
