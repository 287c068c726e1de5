"""Hugging Face transformers on lmengine's attention: importing this makes `attn_implementation="lmengine"` work.

B: batch, N: heads, M: heads of keys and values, Q: query length, K: key length, D: head_dim, E: the values' head_dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lmengine.ops.attention import attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
except ImportError as error:
    raise ImportError(
        "lmengine.integrations.transformers needs transformers 5.20 or later: pip install lmengine[transformers]"
    ) from error

NAME = "lmengine"

# what some models hand over in the place of a mask, and to kernels of their own: without it the result would be wrong
REFUSED = ("cache", "indices", "block_indices", "sinks")


def register() -> None:
    """Register the attention and its mask with transformers as "lmengine"; happens when this module is imported.

    Both are needed: where a name has no mask function, transformers hands over no mask at all, causal or not.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


# ---- attention -------------------------------------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a transformers model calls for its attention.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query, key, value: (B, N, Q, D), (B, M, K, D), (B, M, K, E).
        attention_mask: what `attention_mask` of this module made: None where is_causal says all, a Structure, or bool
            (True: the query sees the key); or floating, added to the scores. Broadcasts to (B, N, Q, K).
        dropout: the probability that a weight is dropped.
        scaling: 1/sqrt(D) where it is None.
        softcap: Gemma 2's; None or 0 for none.
        position_bias: broadcasts to (B, N, Q, K), added to the scores (T5); may require a gradient.
        s_aux: (N,), a logit for each head that takes part in the softmax and has no value (GPT-OSS's sinks).
        kwargs: of the model, unused; a window comes with the mask.

    Returns:
        (B, Q, N, E), and None for the weights, which are never computed.

    Raises:
        NotImplementedError: attention weights, a paged cache, or sparse indices are asked for.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'{name}: expected None with attn_implementation="lmengine"')
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            'output_attentions: expected False with attn_implementation="lmengine", which computes no weights; '
            'use "eager" to see them'
        )
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    queries, keys = query.shape[2], key.shape[2]

    if query.shape[0] != key.shape[0]:  # learned queries, the same for every sequence
        query = query.expand(key.shape[0], *query.shape[1:])

    options: dict[str, Any] = {}
    if isinstance(attention_mask, Structure):
        whole = (query.shape[0], 1, queries, keys)
        as_made = attention_mask.shape == whole and not attention_mask.exposed
        options.update(attention_mask.options if as_made else {"mask": attention_mask.build()})
    elif attention_mask is not None:
        options["mask"] = attention_mask
    elif queries > 1 and (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        # the empty part of a cache of fixed size lies behind the queries, out of their sight
        options["is_causal"] = True
    mask = options.get("mask")
    if mask is not None and mask.is_floating_point() and mask.dtype not in (query.dtype, torch.float32):
        options["mask"] = mask.to(query.dtype)
    if position_bias is not None:
        options["mask"] = with_bias(options.get("mask"), position_bias)
    if dropout:
        options["dropout_p"] = dropout
    if softcap:
        options["softcap"] = softcap

    if s_aux is None:
        output = attention(query, key, value, scale=scaling, **options)
    else:
        output, logsumexp = attention(query, key, value, scale=scaling, return_logsumexp=True, **options)
        # the sum of exponentials without the sinks' over that with them
        kept = torch.sigmoid(logsumexp - s_aux.to(logsumexp.dtype)[:, None])
        output = output * kept.to(output.dtype)[..., None]
    assert isinstance(output, Tensor)
    return output.transpose(1, 2).contiguous(), None


def with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


# ---- masks -----------------------------------------------------------------------------------------------------


class Structure(Tensor):
    """A boolean mask (B, 1, Q, K) that holds arguments of `attention`, and is built only where another looks at it.

    Attributes:
        options: the arguments that say the same as the mask.
        exposed: somebody has, or had, his hands on the built mask and may write to it; the arguments no longer count.
    """

    options: dict[str, Any]
    exposed: bool
    build: Callable[[], Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: Any, options: dict[str, Any], build: Callable[[], Tensor]):
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.options, mask.exposed, mask.build = options, False, functools.cache(lambda: build().contiguous())
        return mask

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Structure(shape={tuple(self.shape)}, {self.options})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        exposes = func._schema.is_mutable or any(value.alias_info for value in func._schema.returns)

        def built(mask: Structure) -> Tensor:
            mask.exposed |= exposes
            return mask.build()

        args, kwargs = tree_map_only(cls, built, (args, kwargs or {}))
        return func(*args, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What a transformers model calls, once a step, for the mask that it hands to each layer's attention.

    Args:
        batch_size, q_length, kv_length: B, Q, K.
        q_offset, kv_offset: the positions of the first query and the first key.
        mask_function: (batch, head, query position, key position) to whether the query sees the key.
        attention_mask: (B, keys from position 0), bool, False for padding.
        local_size: the window of mask_function, where it has one.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may stand for causal, and for all.

    Returns:
        None where the layer's `is_causal` says all; a Structure for causal masks, windows, packed sequences and
        padding; and (B, 1, Q, K), bool, for what a model's own mask_function draws, for single queries, and
        where a graph is traced.
    """
    skips = {"allow_is_causal_skip": allow_is_causal_skip, "allow_is_bidirectional_skip": allow_is_bidirectional_skip}
    sdpa_mask: Any = functools.partial(
        masking_utils.sdpa_mask, batch_size, q_length, kv_length, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, local_size=local_size, device=device, **kwargs,
    )  # fmt: skip
    # a graph must not depend on what is padding, and the mask of a single query may be the input of a compiled graph
    if q_length == 1 or masking_utils.is_tracing(attention_mask):
        return sdpa_mask(q_offset=q_offset, **skips)
    q_offset = int(q_offset)  # of a cache of fixed size it is a tensor, which the cache goes on to change
    pattern = recognized(mask_function, local_size, batch_size)
    if pattern is None:
        return sdpa_mask(q_offset=q_offset, **skips)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    options = arguments(pattern, batch_size, q_length, kv_length, q_offset - kv_offset, padding, device)
    if options is None:
        return sdpa_mask(q_offset=q_offset, **skips)
    if (not options and allow_is_bidirectional_skip) or (options == {"is_causal": True} and allow_is_causal_skip):
        return None
    build = functools.partial(sdpa_mask, q_offset=q_offset, **dict.fromkeys(skips, False))
    return Structure((batch_size, 1, q_length, kv_length), device, options, build)


def recognized(mask_function: Callable, local_size: int | None, batch: int) -> dict[str, Any] | None:
    """What a mask function draws, as arguments of `attention`; None where it is none of transformers' own."""
    if same(mask_function, masking_utils.causal_mask_function):
        return {"is_causal": True}
    if same(mask_function, masking_utils.bidirectional_mask_function):
        return {}
    if local_size is not None:
        if same(mask_function, masking_utils.sliding_window_causal_mask_function(local_size)):
            return {"is_causal": True, "window_size": (local_size - 1, -1)}
        if same(mask_function, masking_utils.sliding_window_bidirectional_mask_function(local_size)):
            return {"window_size": (local_size, local_size)}
    parts = closure(mask_function).get("mask_functions", ())
    packed = getattr(masking_utils, "packed_sequence_compatibility_function", None)  # from 5.23 on
    if packed is not None and batch == 1 and len(parts) == 2:  # sequences one behind the other
        sequences, (each, positions) = closure(parts[0]), map(closure(parts[1]).get, ("mask_function", "position_ids"))
        numbers = sequences.get("packed_sequence_mask")  # (1, Q): to which sequence a token belongs
        pattern = None if each is None else recognized(each, local_size, batch)
        if numbers is not None and pattern is not None and same(mask_function, packed(each, positions, numbers)):
            lengths = numbers[0].unique_consecutive(return_counts=True)[1]
            starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
            longest = int(lengths.max())
            names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
            return pattern | dict(zip(names, (starts, starts, longest, longest), strict=True))
    return None


def closure(function: Any) -> dict[str, Any]:
    """The values that a function has from where it was defined."""
    if not inspect.isfunction(function):
        return {}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code and the same values around it."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if inspect.isfunction(one) and inspect.isfunction(other):
        return one.__code__ is other.__code__ and same((*closure(one).values(),), (*closure(other).values(),))
    return one is other or (isinstance(one, int) and isinstance(other, int) and one == other)


def arguments(
    pattern: dict[str, Any], batch: int, queries: int, keys: int, offset: int, padding: Tensor | None, device: Any
) -> dict[str, Any] | None:
    """The arguments of `attention` that draw a pattern here, or None where none do.

    Args:
        pattern: from `recognized`; says nothing of where the queries stand.
        offset: the position of the first query, where the first key's is 0.
        padding: (B, K), bool, False for padding.
    """
    options = dict(pattern)
    is_causal = "is_causal" in options
    after = offset + queries  # the position behind the last query
    if "window_size" in options:
        left, right = options["window_size"]
        if left >= after - 1 and (is_causal or right >= keys - 1 - offset):
            del options["window_size"]  # it reaches over all keys
    end = min(keys, after) if is_causal else keys  # the keys from here on are seen by no query
    if options and offset:
        if offset < 0 or after != end:
            return None
        options["bottom_right"] = True
        if end < keys:
            options["key_lengths"] = torch.full((batch,), end, dtype=torch.int32, device=device)
    if padding is not None and not (seen := padding[:, :end]).all():
        lengths = seen.sum(1, dtype=torch.int32)
        behind = torch.arange(end, device=device) < lengths[:, None]
        if "bottom_right" not in options and torch.equal(seen, behind):
            options["key_lengths"] = lengths
        else:
            options["mask"] = padding[:, None, None, :]  # (B, 1, 1, K)
    return options


register()
