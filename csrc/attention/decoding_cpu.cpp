// The operator of decoding on the CPU, where lengths and block numbers can be looked at.
#include <torch/csrc/stable/library.h>

#include "attention/decoding_host.h"
#include "support/instruction_set.h"

LMENGINE_DECLARE_KERNEL(attention_decode, DecodingParameters)

namespace lmengine {
namespace {

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// Before anything is written: each length fits the cache, and each block number that is used is
// one.
void check_numbers(const DecodingParameters& p) {
  const int64_t added = p.new_key.data != nullptr ? p.queries : 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.cache_lengths[b] + added;
    LMENGINE_CHECK(p.cache_lengths[b] >= 0 && length <= p.capacity,
                   "cache_lengths[" + std::to_string(b) + "]: expected a number from 0 to " +
                       std::to_string(p.capacity - added) + ", got " +
                       std::to_string(p.cache_lengths[b]));
    LMENGINE_CHECK(p.rotary_dim == 0 || length <= p.rotary_positions,
                   "rotary_cos: expected at least " + std::to_string(length) + " positions, got " +
                       std::to_string(p.rotary_positions));
    if (p.block_table == nullptr) continue;
    const auto splits = decoding::splits_of(p, length);
    for (int64_t key = splits.begin; key < length; key += p.page_size - key % p.page_size) {
      const int32_t block = p.block_table[b * p.max_blocks + key / p.page_size];
      LMENGINE_CHECK(block >= 0 && block < p.blocks,
                     "block_table[" + std::to_string(b) + ", " + std::to_string(key / p.page_size) +
                         "]: expected a block number below " + std::to_string(p.blocks) + ", got " +
                         std::to_string(block));
    }
  }
}

std::tuple<Tensor, Tensor> decode(Tensor query, Tensor key_cache, Tensor value_cache,
                                  Tensor cache_lengths, std::optional<Tensor> key,
                                  std::optional<Tensor> value, std::optional<Tensor> block_table,
                                  std::optional<Tensor> rotary_cos,
                                  std::optional<Tensor> rotary_sin,
                                  std::optional<Tensor> alibi_slopes, bool rotary_interleaved,
                                  double scale, int64_t window_left, double softcap,
                                  int64_t num_splits) {
  const DecodingOptions options{cache_lengths, key,         value,        block_table,
                                rotary_cos,    rotary_sin,  alibi_slopes, rotary_interleaved,
                                scale,         window_left, softcap,      num_splits};
  const auto launch = [](const DecodingParameters& p, const Tensor&) {
    check_numbers(p);
    LMENGINE_DISPATCH(attention_decode, p);
  };
  return attention_decode_with(with_contiguous_rows, launch, query, key_cache, value_cache,
                               options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmengine, CPU, m) { m.impl("attention_decode", TORCH_BOX(&decode)); }

}  // namespace lmengine
