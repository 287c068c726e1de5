"""PyTorch's own attention on lmengine's kernels: models that call F.scaled_dot_product_attention stay as they are.

B: batch, N: heads, M: heads of keys and values, Q: query length, K: key length, D: head_dim, T: all queries of a batch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from lmengine import backends
from lmengine.backends import UnsupportedCall
from lmengine.ops.attention import lowered, operator, triton_backward

NAME = "lmengine"


def register() -> None:
    """Make "lmengine" known to torch.nn.attention.activate_flash_attention_impl; changes nothing else.

    Raises:
        RuntimeError: this PyTorch is older than 2.13 and has no place for it.
    """
    registry().register_flash_attention_impl(NAME, register_fn=Overrides)


def activate() -> None:
    """Let F.scaled_dot_product_attention, and torch.nn.attention.varlen, take lmengine's kernels in this process.

    Where PyTorch would take FlashAttention on a GPU (float16 and bfloat16, no mask) or its blocked kernel on a CPU (no
    dropout), forward and backward, lmengine's kernels run. What they do not support PyTorch's kernel goes on
    doing, and a warning says why, once a reason. `restore` undoes it, and so does
    torch.nn.attention.restore_flash_attention_impl.

    PyTorch prefers cuDNN to FlashAttention on some GPUs; torch.backends.cuda.enable_cudnn_sdp is False meanwhile. In
    evaluation without gradients torch.nn.TransformerEncoderLayer computes its attention by other operators.

    Raises:
        RuntimeError: this PyTorch is older than 2.13.
    """
    register()
    registry().activate_flash_attention_impl(NAME)


def restore() -> None:
    """Give F.scaled_dot_product_attention back to PyTorch's kernels, if `activate` took it."""
    if registry().current_flash_attention_impl() == NAME:
        registry().restore_flash_attention_impl()


def registry() -> Any:
    module = torch.nn.attention
    if not hasattr(module, "register_flash_attention_impl"):
        raise RuntimeError(
            f"lmengine.integrations.torch needs PyTorch 2.13 or later, which lets kernels be replaced; this is "
            f"{torch.__version__}. lmengine.nn.functional.scaled_dot_product_attention works on every version."
        )
    return module


class Overrides:
    """Our implementations in the place of PyTorch's, until `remove`."""

    def __init__(self) -> None:
        self.cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            for key, implementations in IMPLEMENTATIONS.items():
                for name, run in implementations.items():
                    self.library.impl(name, or_pytorch(run, f"aten::{name}", key), key, with_keyset=True)

    def remove(self) -> None:
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)
        self.library = None


def or_pytorch(run: Callable[..., Any], name: str, key: str) -> Callable[..., Any]:
    """`run`, or PyTorch's kernel of this operator for what ours do not support."""
    try:
        theirs = torch.library.get_kernel(name, key)
    except RuntimeError:  # a PyTorch without CUDA
        theirs = None

    @functools.wraps(run)
    def implementation(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except UnsupportedCall as error:
            if theirs is None or backends.forced_backend() is not None:
                raise
            warn_of_pytorch(str(error))
        return theirs.call_boxed(keyset, *args, **kwargs)

    return implementation


@functools.cache
def warn_of_pytorch(reason: str) -> None:
    warnings.warn(f"scaled_dot_product_attention: PyTorch's kernel runs, not lmengine's: {reason}", stacklevel=3)


# ---- the kernels -----------------------------------------------------------------------------------------------


def compiled_backward(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.lmengine.attention_backward(*args)


# below autograd, where we are called, the reference has no gradient
BACKWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "cuda": compiled_backward,
    "triton": triton_backward,
    "cpu": compiled_backward,
}


def chosen(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, options: dict[str, Any]) -> str:
    """The backend for a call, of those in BACKWARD."""
    forced = backends.forced_backend()
    device_type = query.device.type
    reasons = []
    for backend in (forced,) if forced else backends.default_order(device_type):
        if backend not in BACKWARD:
            continue
        reason = operator.refusal(backend, device_type, query, key, value, is_causal, scale, **options)
        if reason is None:
            return backend
        reasons.append(f"{backend}: {reason}")
    raise UnsupportedCall("; ".join(reasons) or f"the forced backend {forced!r} has no backward kernel")


def forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Q, D), laid out in memory as the query, and logsumexp (B, N, Q)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    operator.check(query, key, value, is_causal, scale, **options)
    backend = chosen(query, key, value, is_causal, scale, options)
    found, logsumexp = operator.implementations[backend].run(query, key, value, is_causal, scale, **options)
    output = torch.empty_like(query) if found.shape == query.shape else found
    return (found if output.stride() == found.stride() else output.copy_(found)), logsumexp


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each laid out as (B, length, heads, D)."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    backend = chosen(query, key, value, is_causal, scale, options)
    if backend != "cpu":  # as the forward does it
        query, key = (multiple_of_8(tensor) for tensor in (query, key))
        value, output, grad_output = (multiple_of_8(tensor) for tensor in (value, output, grad_output))
    arguments = lowered(query, key, is_causal, scale, **options)
    run = BACKWARD[backend]
    grads = run(grad_output, None, query, key, value, output, logsumexp.contiguous(), *arguments, False)
    return grads[0][..., :head_dim], grads[1][..., :head_dim], grads[2][..., :value_dim]


def multiple_of_8(tensor: Tensor) -> Tensor:
    head_dim = tensor.shape[-1]
    return F.pad(tensor, (0, max(16, -(-head_dim // 8) * 8) - head_dim))


# ---- CPU -------------------------------------------------------------------------------------------------------


def for_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    output, logsumexp = forward(query, key, value, is_causal, scale, cpu_options(query, dropout_p, attn_mask))
    return output, logsumexp.transpose(1, 2).contiguous().transpose(1, 2)  # PyTorch's layout, which graphs rely on


def for_cpu_backward(
    grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):  # fmt: skip
    options = cpu_options(query, dropout_p, attn_mask)
    return backward(grad_out, query, key, value, out, logsumexp, is_causal, scale, options)


def cpu_options(query: Tensor, dropout_p: float, mask: Tensor | None) -> dict[str, Any]:
    if dropout_p:
        raise UnsupportedCall(f"dropout_p: expected 0, got {dropout_p}")
    if mask is None:
        return {}
    return {"mask": mask[(None,) * (4 - mask.dim())]}  # (Q, K), or four dimensions


# ---- CUDA ------------------------------------------------------------------------------------------------------


def flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention: (B, N, Q, D), (B, M, K, D), (B, M, K, D)."""
    if return_debug_mask:
        raise UnsupportedCall("return_debug_mask: expected False")
    state = dropout_state(query, dropout_p)
    options = flash_options(query, key, dropout_p, is_causal, state)
    output, logsumexp = forward(query, key, value, is_causal, scale, options)
    unused, debug_mask = query.new_zeros((), dtype=torch.uint64), query.new_empty(0)
    return output, logsumexp, None, None, query.shape[2], key.shape[2], state, unused, debug_mask


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    options = flash_options(query, key, dropout_p, is_causal, philox_seed)
    return backward(grad_out, query, key, value, out, logsumexp, is_causal, scale, options)


def varlen(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    """aten::_flash_attention_forward: (B, Q, N, D) and so on, or (T, N, D) and so on with cum_seq_q and cum_seq_k."""
    for name, given in (("return_debug_mask", return_debug_mask or None), ("block_table", block_table)):
        if given is not None:
            raise UnsupportedCall(f"{name}: not in these kernels")
    state = dropout_state(query, dropout_p)
    packed = cum_seq_q is not None
    query, key, value = (heads_first(tensor, packed) for tensor in (query, key, value))
    options = flash_options(
        query, key, dropout_p, is_causal, state, cum_seq_q, cum_seq_k, max_q, max_k, window_size_left,
        window_size_right, seqused_k, alibi_slopes,
    )  # fmt: skip
    output, logsumexp = forward(query, key, value, is_causal, scale, options)
    unused, debug_mask = query.new_zeros((), dtype=torch.uint64), query.new_empty(0)
    if packed:
        return output[0].transpose(0, 1), logsumexp[0], state, unused, debug_mask  # (T, N, D), (N, T)
    return output.transpose(1, 2), logsumexp, state, unused, debug_mask


def varlen_into(out, *args, **kwargs):
    output, logsumexp, *_ = varlen(*args, **kwargs)
    out.copy_(output)
    return logsumexp


def varlen_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    packed = cum_seq_q is not None
    grad_out, query, key, value, out = (heads_first(tensor, packed) for tensor in (grad_out, query, key, value, out))
    options = flash_options(
        query, key, dropout_p, is_causal, rng_state, cum_seq_q, cum_seq_k, max_q, max_k, window_size_left,
        window_size_right,
    )  # fmt: skip
    logsumexp = logsumexp[None] if packed else logsumexp
    grads = backward(grad_out, query, key, value, out, logsumexp, is_causal, scale, options)
    return tuple(grad[0].transpose(0, 1) if packed else grad.transpose(1, 2) for grad in grads)


def heads_first(tensor: Tensor, packed: bool) -> Tensor:
    """(B, Q, N, D) as (B, N, Q, D), or (T, N, D) as (1, N, T, D)."""
    return tensor.transpose(0, 1)[None] if packed else tensor.transpose(1, 2)


def dropout_state(query: Tensor, dropout_p: float) -> Tensor:
    """What PyTorch keeps for the backward, two numbers: the seed, from its generator, and 0."""
    state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if dropout_p:
        state[0] = torch.randint(-(2**63), 2**63 - 1, (), device=query.device)
    return state.view(torch.uint64)


def flash_options(
    query, key, dropout_p, is_causal, state, cum_seq_q=None, cum_seq_k=None, max_q=None, max_k=None,
    window_left=None, window_right=None, seqused_k=None, alibi_slopes=None,
) -> dict[str, Any]:  # fmt: skip
    """FlashAttention's arguments as those of `attention`: its positions count so that the last query is at the last key."""
    left, right = (-1 if side is None else max(side, -1) for side in (window_left, window_right))
    options: dict[str, Any] = {}
    if (left, right) != (-1, -1):
        options["window_size"] = (left, right)
    if cum_seq_q is not None:
        options |= {"cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_q if cum_seq_k is None else cum_seq_k}
        options |= {"max_seqlen_q": int(max_q), "max_seqlen_k": int(max_k)}
    if seqused_k is not None:
        options["key_lengths"] = seqused_k
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    one_length = cum_seq_q is None and seqused_k is None and query.shape[2] == key.shape[2]
    if not one_length and (is_causal or alibi_slopes is not None or "window_size" in options):
        options["bottom_right"] = True
    if dropout_p:
        options |= {"dropout_p": dropout_p, "seed": state[:1].view(torch.int64)}
    return options


IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": for_cpu,
        "_scaled_dot_product_flash_attention_for_cpu_backward": for_cpu_backward,
    },
    "CUDA": {
        "_scaled_dot_product_flash_attention": flash,
        "_scaled_dot_product_flash_attention_backward": flash_backward,
        "_flash_attention_forward": varlen,
        "_flash_attention_forward_no_dropout_inplace": varlen_into,
        "_flash_attention_backward": varlen_backward,
    },
}
