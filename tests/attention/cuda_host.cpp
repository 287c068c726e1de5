// Wraps attention's CUDA launchers for runs on the CPU. Tensors are (batch, length, heads,
// head_dim + gap): the kernels get views of them with `heads` before `length` and a row stride
// that skips the gap.
#include "attention/attention_cuda.h"

namespace {

using lmengine::AttentionParameters;
using lmengine::AttentionTensor;
using lmengine::AttentionType;

AttentionParameters parameters(void* query, void* key, void* value, int64_t type, int64_t batch,
                               int64_t heads, int64_t query_length, int64_t key_length,
                               int64_t head_dim, int64_t gap, int64_t is_causal, float scale) {
  AttentionParameters p;
  p.batch = batch, p.heads = heads, p.query_length = query_length, p.key_length = key_length;
  p.head_dim = static_cast<int>(head_dim), p.is_causal = is_causal != 0, p.scale = scale;
  p.type = static_cast<AttentionType>(type);
  const int64_t row = heads * (head_dim + gap);
  p.query = {query, query_length * row, head_dim + gap, row};
  p.key = {key, key_length * row, head_dim + gap, row};
  p.value = {value, key_length * row, head_dim + gap, row};
  return p;
}

AttentionTensor like(const AttentionTensor& tensor, void* data) {
  AttentionTensor other = tensor;
  other.data = data;
  return other;
}

}  // namespace

extern "C" {

void attention_forward(void* query, void* key, void* value, void* output, float* logsumexp,
                       int64_t type, int64_t batch, int64_t heads, int64_t query_length,
                       int64_t key_length, int64_t head_dim, int64_t gap, int64_t is_causal,
                       float scale) {
  AttentionParameters p = parameters(query, key, value, type, batch, heads, query_length,
                                     key_length, head_dim, gap, is_causal, scale);
  p.output = like(p.query, output);
  p.logsumexp = logsumexp;
  lmengine::attention_forward_cuda(p, nullptr);
}

void attention_backward(void* query, void* key, void* value, void* output, float* logsumexp,
                        void* grad_output, float* delta, void* grad_query, void* grad_key,
                        void* grad_value, int64_t type, int64_t batch, int64_t heads,
                        int64_t query_length, int64_t key_length, int64_t head_dim, int64_t gap,
                        int64_t is_causal, float scale) {
  AttentionParameters p = parameters(query, key, value, type, batch, heads, query_length,
                                     key_length, head_dim, gap, is_causal, scale);
  p.output = like(p.query, output);
  p.logsumexp = logsumexp;
  p.grad_output = like(p.query, grad_output);
  p.delta = delta;
  p.grad_query = like(p.query, grad_query);
  p.grad_key = like(p.key, grad_key);
  p.grad_value = like(p.value, grad_value);
  lmengine::attention_backward_cuda(p, nullptr);
}

}  // extern "C"
