"""Small random models of transformers, built from configurations alone, and batches with padding for them."""

import copy

import torch
import transformers as tf
from transformers.masking_utils import sdpa_mask

VOCABULARY, WINDOW, BATCH, LENGTH = 64, 4, 3, 11

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGURATIONS = {
    "llama": lambda: tf.LlamaConfig(**DECODER),
    "mistral": lambda: tf.MistralConfig(**DECODER, sliding_window=WINDOW),
    "gemma2": lambda: tf.Gemma2Config(
        **DECODER, sliding_window=WINDOW, attn_logit_softcapping=3.0, query_pre_attn_scalar=16
    ),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **DECODER, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=2
    ),
    "bert": lambda: tf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3,
    ),
    "modernbert": lambda: tf.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3, local_attention=2 * WINDOW, global_attn_every_n_layers=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    ),
    "t5": lambda: tf.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, initializer_factor=1.0,
        relative_attention_num_buckets=8, pad_token_id=0, decoder_start_token_id=0, eos_token_id=None,
    ),
}  # fmt: skip
CLASSES = {
    "llama": tf.LlamaForCausalLM,
    "mistral": tf.MistralForCausalLM,
    "gemma2": tf.Gemma2ForCausalLM,
    "gpt2": tf.GPT2LMHeadModel,
    "gpt_oss": tf.GptOssForCausalLM,
    "bert": tf.BertForMaskedLM,
    "modernbert": tf.ModernBertForMaskedLM,
    "t5": tf.T5ForConditionalGeneration,
}
DECODERS = ("llama", "mistral", "gemma2", "gpt2", "gpt_oss")


def exact_attention(
    module, query, key, value, mask, scaling, softcap=None, position_bias=None, s_aux=None, **kwargs
):  # fmt: skip
    """Attention as the models define it, in the inputs' precision: eager's softmax is in float32 in most of them."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = scaling * query @ key.mT
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, 0).softmax(-1).masked_fill(~seen, 0)
    return (weights[..., : key.shape[2]] @ value).transpose(1, 2), None


def exact_mask(*args, **kwargs):
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


tf.AttentionInterface.register("exact", exact_attention)
tf.AttentionMaskInterface.register("exact", exact_mask)


def build(name, dtype=torch.float32, **changes):
    """The same random model with exact attention in float64, eager in dtype, and ours in dtype; in evaluation."""
    configuration = CONFIGURATIONS[name]()
    for key, value in changes.items():
        setattr(configuration, key, value)
    configuration._experts_implementation = "eager"  # the only one that takes float64
    ours = CLASSES[name]._from_config(configuration, attn_implementation="lmengine").eval().to(dtype)
    eager, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    eager.set_attn_implementation("eager")
    exact.set_attn_implementation("exact")
    return exact, eager, ours


def batch(padding):
    """Inputs (BATCH, LENGTH), and where they are tokens: padding is None, "left" or "right", of 0, 3 and 7 places."""
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    tokens = torch.ones_like(ids)
    if padding is not None:
        for row, count in enumerate((0, 3, 7)):
            tokens[row, slice(count) if padding == "left" else slice(LENGTH - count, None)] = 0
    return ids * tokens, tokens


def inputs_of(name, ids, tokens):
    """Arguments of the model; positions count from the first token, as generate() has it."""
    inputs = {"input_ids": ids, "attention_mask": tokens}
    if name == "t5":
        inputs["decoder_input_ids"] = ids[:, :7].clamp(min=3)
    else:
        inputs["position_ids"] = (tokens.cumsum(1) - 1).clamp(min=0)
    return inputs


def valid(name, tokens):
    """Which places of the logits count (B, length): a query that is padding sees what nobody specifies."""
    return torch.ones_like(tokens[:, :7]) if name == "t5" else tokens
