// Wraps the launchers of attention's sm_90 kernels for runs on the CPU. Tensors are (batch, length,
// heads, head_dim + gap), as in cuda_host.cpp.
#include <memory>
#include <stdexcept>

#include "attention/attention_cuda.h"
#include "attention/takes_sm90.h"

namespace {

using lmengine::AttentionParameters;
using lmengine::AttentionTensor;
using lmengine::AttentionType;

AttentionParameters parameters(void* query, void* key, void* value, int64_t type, int64_t batch,
                               int64_t heads, int64_t kv_heads, int64_t query_length,
                               int64_t key_length, int64_t head_dim, int64_t value_dim, int64_t gap,
                               int64_t window_right, int64_t bottom_right, float scale) {
  AttentionParameters p;
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads;
  p.query_length = p.query_rows = query_length, p.key_length = p.key_rows = key_length;
  p.head_dim = static_cast<int>(head_dim), p.value_dim = static_cast<int>(value_dim);
  p.window_right = window_right, p.bottom_right = bottom_right != 0, p.scale = scale;
  p.type = static_cast<AttentionType>(type);
  const auto tensor = [&](void* data, int64_t heads, int64_t length, int64_t dim) {
    return AttentionTensor{data, length * heads * (dim + gap), dim + gap, heads * (dim + gap)};
  };
  p.query = tensor(query, heads, query_length, head_dim);
  p.key = tensor(key, kv_heads, key_length, head_dim);
  p.value = tensor(value, kv_heads, key_length, value_dim);
  p.output = tensor(nullptr, heads, query_length, value_dim);
  if (!takes_sm90(p, 90)) throw std::runtime_error("the sm_90 kernels do not take this call");
  return p;
}

}  // namespace

extern "C" {

void attention_forward(void* query, void* key, void* value, void* output, float* logsumexp,
                       int64_t type, int64_t batch, int64_t heads, int64_t kv_heads,
                       int64_t query_length, int64_t key_length, int64_t head_dim,
                       int64_t value_dim, int64_t gap, int64_t window_right, int64_t bottom_right,
                       float scale) {
  AttentionParameters p =
      parameters(query, key, value, type, batch, heads, kv_heads, query_length, key_length,
                 head_dim, value_dim, gap, window_right, bottom_right, scale);
  p.output.data = output;
  p.logsumexp = logsumexp;
  lmengine::attention_forward_sm90(p, nullptr);
}

void attention_backward(void* query, void* key, void* value, void* output, float* logsumexp,
                        void* grad_output, float* grad_logsumexp, void* grad_query, void* grad_key,
                        void* grad_value, int64_t type, int64_t batch, int64_t heads,
                        int64_t kv_heads, int64_t query_length, int64_t key_length,
                        int64_t head_dim, int64_t value_dim, int64_t gap, int64_t window_right,
                        int64_t bottom_right, float scale, int64_t deterministic) {
  AttentionParameters p =
      parameters(query, key, value, type, batch, heads, kv_heads, query_length, key_length,
                 head_dim, value_dim, gap, window_right, bottom_right, scale);
  p.deterministic = deterministic != 0;
  p.grad_output = p.output, p.grad_query = p.query, p.grad_key = p.key, p.grad_value = p.value;
  p.output.data = output, p.grad_output.data = grad_output;
  p.grad_query.data = grad_query, p.grad_key.data = grad_key, p.grad_value.data = grad_value;
  p.logsumexp = logsumexp, p.grad_logsumexp = grad_logsumexp;
  if (!takes_sm90_backward(p, 90)) throw std::runtime_error("takes_sm90_backward: false");
  const auto size = static_cast<size_t>(lmengine::attention_backward_sm90_workspace(p));
  const std::unique_ptr<float[]> workspace(new float[size]);
  lmengine::attention_backward_sm90(p, workspace.get(), nullptr);
}

}  // extern "C"
