// Softmax attention (Vaswani et al. 2017) block by block with a running maximum and sum, so that no
// matrix of all scores is stored (Milakov and Gimelshein 2018; Dao et al. 2022).
//   scores = scale * query key^T, with is_causal only keys at or before the query's position
//   output = softmax(scores) value, logsumexp = log of the sum of exp(scores), natural
// A query without any key has output 0 and logsumexp -infinity.
#pragma once

#include <cstdint>

namespace lmengine {

// A (batch, heads, length, head_dim) tensor whose last dimension is contiguous; strides in
// elements.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

enum class AttentionType { float32, bfloat16, float16 };

struct AttentionParameters {
  AttentionTensor query, key, value, output;
  AttentionTensor grad_output, grad_query, grad_key, grad_value;  // backward only
  float* logsumexp = nullptr;                                     // (batch, heads, query_length)
  float* delta =
      nullptr;  // workspace of the GPU's backward, as logsumexp: sum(grad_output * output)
  int64_t batch = 0, heads = 0, query_length = 0, key_length = 0;
  int head_dim = 0;
  bool is_causal = false;
  float scale = 1;
  AttentionType type = AttentionType::float32;
};

}  // namespace lmengine
