// The one list of lmengine's C++ and CUDA operators. What each computes is said in
// lmengine/ops/<family>.py, which also registers the fake implementations and the autograd
// formulas.
#include <torch/csrc/stable/library.h>

#include "support/instruction_set.h"

STABLE_TORCH_LIBRARY(lmengine, m) {
#define LMENGINE_ATTENTION_OPTIONS                                                                 \
  " Tensor? mask, Tensor? alibi_slopes, Tensor? prefix_lengths, Tensor? key_lengths,"              \
  " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, int max_seqlen_q, int max_seqlen_k," \
  " int window_left, int window_right, bool bottom_right, float scale, float softcap,"             \
  " float dropout_p, bool deterministic"
  m.def("attention_forward(Tensor query, Tensor key, Tensor value,"  //
        LMENGINE_ATTENTION_OPTIONS ") -> (Tensor output, Tensor logsumexp)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key,"
      " Tensor value, Tensor output, Tensor logsumexp," LMENGINE_ATTENTION_OPTIONS
      ", bool needs_grad_mask)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)");
  // What most calls want, with few arguments and without an autograd formula, for eager calls:
  // crossing the boundary costs as much as a small kernel.
  m.def(
      "attention_plain_forward(Tensor query, Tensor key, Tensor value, bool is_causal, float scale)"
      " -> (Tensor output, Tensor logsumexp)");
  m.def(
      "attention_plain_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,"
      " Tensor output, Tensor logsumexp, bool is_causal, float scale, bool deterministic)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "attention_decode(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache,"
      " Tensor cache_lengths, Tensor? key, Tensor? value, Tensor? block_table, Tensor? rotary_cos,"
      " Tensor? rotary_sin, Tensor? alibi_slopes, bool rotary_interleaved, float scale,"
      " int window_left, float softcap, int num_splits) -> (Tensor output, Tensor logsumexp)");
  m.def(
      "lstm_forward(Tensor input_gates, Tensor weight_hh, Tensor hidden, Tensor cell, bool keep)"
      " -> (Tensor outputs, Tensor final_hidden, Tensor final_cell, Tensor cells, Tensor gates)");
  m.def(
      "lstm_backward(Tensor? grad_outputs, Tensor? grad_final_hidden, Tensor? grad_final_cell,"
      " Tensor weight_hh, Tensor cell, Tensor cells, Tensor gates)"
      " -> (Tensor grad_input_gates, Tensor grad_hidden, Tensor grad_cell)");
  m.def("matmul(Tensor left, Tensor right, Tensor? bias) -> Tensor");
  m.def(
      "cooccurrence(Tensor tokens, int vocabulary_size, int window_size, bool symmetric,"
      " bool distance_weighting) -> (Tensor rows, Tensor columns, Tensor values)");
  m.def(
      "glove_epoch(Tensor(a!) parameters, Tensor(b!) squared_gradients, Tensor rows, Tensor "
      "columns,"
      " Tensor values, Tensor stages, float eta, float x_max, float alpha, float grad_clip)"
      " -> Tensor cost");
}

// What was built, read by lmengine/backends.py through ctypes.
extern "C" __attribute__((visibility("default"))) int lmengine_built_with_cuda() {
#ifdef LMENGINE_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}

extern "C" __attribute__((visibility("default"))) const char* lmengine_instruction_set() {
  return lmengine::name_of(lmengine::instruction_set());
}
