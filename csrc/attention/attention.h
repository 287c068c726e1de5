// Softmax attention (Vaswani et al. 2017) block by block with a running maximum and sum, so that no
// matrix of all scores is stored (Milakov and Gimelshein 2018; Dao et al. 2022).
//   score = scale * query key^T
//   score = softcap * tanh(score / softcap)                 with a softcap (Gemma 2)
//   score = score + mask                                    an additive mask
//   score = score - slope * |position of the query - key|   with ALiBi (Press et al. 2022)
//   output = softmax(score) value, over the keys that the query sees
//   logsumexp = log of the sum of exp(score), natural, before dropout
// Query i of a sequence has position i + offset; offset is 0, or key length - query length where
// the mask is aligned at the bottom right. It sees key j where
//   j < the sequence's key length, the boolean mask allows it, and
//   j < prefix, or position - window_left <= j <= position + window_right
// A query that sees no key has output 0 and logsumexp -infinity.
// Dropout keeps a weight, times 1 / (1 - dropout_p), or sets it to 0: see dropout.h.
#pragma once

#include <cstdint>

namespace lmengine {

// A (batch, heads, length, head_dim) tensor whose last dimension is contiguous; strides in
// elements. Packed sequences have batch stride 0: the batch is told by cu_seqlens.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

enum class AttentionType { float32, bfloat16, float16 };

enum class MaskType { none, boolean, float32, same };  // same: the type of the query

// A mask that broadcasts to (batch, heads, query_length, key_length): a dimension of size 1 has
// stride 0. Strides in elements.
struct AttentionMask {
  void* data = nullptr;
  MaskType type = MaskType::none;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, column_stride = 0;
};

struct AttentionParameters {
  AttentionTensor query, key, value, output;
  AttentionTensor grad_output, grad_query, grad_key, grad_value;  // backward only
  float* logsumexp = nullptr;             // (batch, heads, query_length), or (heads, all queries)
  const float* grad_logsumexp = nullptr;  // backward only, laid out as logsumexp; may be null
  float* delta = nullptr;  // workspace of the GPU's backward, as logsumexp: sum(grad_output *
                           // output) - grad_logsumexp
  AttentionMask mask;
  AttentionMask grad_mask;              // backward only: float32 of the mask's own sizes, or none
  const float* alibi_slopes = nullptr;  // (heads), or (batch, heads) with the batch's stride
  int64_t alibi_batch_stride = 0;
  const int32_t* prefix_lengths = nullptr;               // (batch)
  const int32_t* key_lengths = nullptr;                  // (batch)
  const int32_t *cu_query = nullptr, *cu_key = nullptr;  // (batch + 1), both or none
  const int64_t* seed = nullptr;                         // one number; null: no dropout
  int64_t batch = 0, heads = 0, kv_heads = 0;  // head h has key head h / (heads / kv_heads)
  int64_t query_length = 0, key_length = 0;    // the longest, of packed sequences
  int64_t query_rows = 0, key_rows = 0;        // of the tensors: the sum, of packed ones
  int head_dim = 0, value_dim = 0;
  int64_t window_left = -1, window_right = -1;  // negative: unlimited
  bool bottom_right = false;
  bool deterministic = false;    // backward only
  float scale = 1, softcap = 0;  // softcap 0: none
  double dropout_p = 0;
  AttentionType type = AttentionType::float32;
};

}  // namespace lmengine
