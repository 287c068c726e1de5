// Wraps attention's CUDA launchers for runs on the CPU. Tensors are (batch, length, heads,
// dim + gap): the kernels get views of them with `heads` before `length` and a row stride that
// skips the gap. Packed sequences have a batch of 1. A mask has any strides, its gradient has
// those of Numbers.
#include "attention/attention_cuda.h"

namespace {

using namespace lmengine;

// tests/attention/cuda_kernels.py fills these in, in this order.
struct Numbers {
  int64_t type, batch, heads, kv_heads, query_length, key_length, query_rows, key_rows, head_dim,
      value_dim, gap, window_left, window_right, bottom_right, deterministic, alibi_batch_stride,
      mask_type;
  int64_t mask_strides[4], grad_mask_strides[4];
};

struct Factors {
  double scale, softcap, dropout_p;
};

struct Inputs {
  const Numbers* numbers;
  const Factors* factors;
  void *query, *key, *value, *mask;
  const float* alibi_slopes;
  const int32_t *prefix_lengths, *key_lengths, *cu_query, *cu_key;
  const int64_t* seed;
};

AttentionTensor tensor(const Numbers& n, void* data, int64_t heads, int64_t rows, int64_t dim,
                       bool packed) {
  const int64_t row = heads * (dim + n.gap);
  return {data, packed ? 0 : rows * row, dim + n.gap, row};
}

AttentionMask mask(void* data, int64_t type, const int64_t (&strides)[4]) {
  return {data, static_cast<MaskType>(type), strides[0], strides[1], strides[2], strides[3]};
}

AttentionParameters parameters(const Inputs& in) {
  const Numbers& n = *in.numbers;
  const bool packed = in.cu_query != nullptr;
  AttentionParameters p;
  p.query = tensor(n, in.query, n.heads, n.query_rows, n.head_dim, packed);
  p.key = tensor(n, in.key, n.kv_heads, n.key_rows, n.head_dim, packed);
  p.value = tensor(n, in.value, n.kv_heads, n.key_rows, n.value_dim, packed);
  if (in.mask != nullptr) p.mask = mask(in.mask, n.mask_type, n.mask_strides);
  p.alibi_slopes = in.alibi_slopes, p.alibi_batch_stride = n.alibi_batch_stride;
  p.prefix_lengths = in.prefix_lengths, p.key_lengths = in.key_lengths;
  p.cu_query = in.cu_query, p.cu_key = in.cu_key, p.seed = in.seed;
  p.batch = n.batch, p.heads = n.heads, p.kv_heads = n.kv_heads;
  p.query_length = n.query_length, p.key_length = n.key_length;
  p.query_rows = n.query_rows, p.key_rows = n.key_rows;
  p.head_dim = static_cast<int>(n.head_dim), p.value_dim = static_cast<int>(n.value_dim);
  p.window_left = n.window_left, p.window_right = n.window_right;
  p.bottom_right = n.bottom_right != 0, p.deterministic = n.deterministic != 0;
  p.scale = in.factors->scale, p.softcap = in.factors->softcap;
  p.dropout_p = in.factors->dropout_p;
  p.type = static_cast<AttentionType>(n.type);
  return p;
}

}  // namespace

#define INPUTS                                                                         \
  const Numbers *numbers, const Factors *factors, void *query, void *key, void *value, \
      void *mask_data, const float *alibi_slopes, const int32_t *prefix_lengths,       \
      const int32_t *key_lengths, const int32_t *cu_query, const int32_t *cu_key,      \
      const int64_t *seed
#define GIVEN                                                              \
  {numbers,      factors,        query,       key,      value,  mask_data, \
   alibi_slopes, prefix_lengths, key_lengths, cu_query, cu_key, seed}

extern "C" {

void attention_forward(INPUTS, void* output, float* logsumexp) {
  AttentionParameters p = parameters(GIVEN);
  p.output = tensor(*numbers, output, p.heads, p.query_rows, p.value_dim, cu_query != nullptr);
  p.logsumexp = logsumexp;
  attention_forward_cuda(p, nullptr);
}

void attention_backward(INPUTS, void* output, float* logsumexp, void* grad_output,
                        const float* grad_logsumexp, float* delta, void* grad_query, void* grad_key,
                        void* grad_value, float* grad_mask) {
  AttentionParameters p = parameters(GIVEN);
  const auto like = [](AttentionTensor tensor, void* data) {
    tensor.data = data;
    return tensor;
  };
  p.output = tensor(*numbers, output, p.heads, p.query_rows, p.value_dim, cu_query != nullptr);
  p.logsumexp = logsumexp;
  p.grad_output = like(p.output, grad_output);
  p.grad_logsumexp = grad_logsumexp;
  p.delta = delta;
  p.grad_query = like(p.query, grad_query);
  p.grad_key = like(p.key, grad_key);
  p.grad_value = like(p.value, grad_value);
  if (grad_mask != nullptr)
    p.grad_mask =
        mask(grad_mask, static_cast<int64_t>(MaskType::float32), numbers->grad_mask_strides);
  attention_backward_cuda(p, nullptr);
}

}  // extern "C"
