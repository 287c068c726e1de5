"""nn.functional.scaled_dot_product_attention against torch's: shapes that broadcast, errors, autocast."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from lmengine.nn.functional import scaled_dot_product_attention


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "query, key, value",
    [
        ((5, 16), (7, 16), (7, 16)),
        ((3, 5, 16), (3, 7, 16), (3, 7, 16)),
        ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
        ((4, 2, 3, 5, 16), (4, 2, 3, 7, 16), (4, 2, 3, 7, 16)),
        ((2, 3, 5, 16), (3, 7, 16), (7, 16)),
        ((2, 3, 5, 16), (1, 3, 7, 16), (2, 1, 7, 16)),
        ((1, 1, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
        ((0, 3, 5, 16), (0, 3, 7, 16), (0, 3, 7, 16)),
        ((2, 3, 5, 16), (2, 3, 0, 16), (2, 3, 0, 16)),
    ],
    ids=str,
)
def test_shapes_as_torch(query, key, value, is_causal):
    tensors = [torch.randn(shape, requires_grad=True) for shape in (query, key, value)]
    found = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        output = function(*tensors, is_causal=is_causal, scale=0.3)
        found.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_signature_as_torch():
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    assert list(parameters) == [
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    ]
    tensor = torch.randn(1, 1, 2, 16)
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        with pytest.raises(TypeError, match="positional arguments"):
            function(tensor, tensor, tensor, None, 0.0, True, 0.5)


X = torch.randn(2, 3, 5, 16)


@pytest.mark.parametrize(
    "tensors, arguments, message",
    [
        ((X[0, 0, 0], X, X), {}, r"query: expected at least 2 dimensions, got \(16,\)"),
        ((X, X, X.double()), {}, "value: expected torch.float32, got torch.float64"),
        ((X.long(), X.long(), X.long()), {}, "query: expected a floating dtype, got torch.int64"),
        ((X, X.to("meta"), X), {}, "key: expected device cpu, got meta"),
        ((X, X[:, :2], X[:, :2]), {}, "not be broadcast|must match|broadcastable"),
        ((X, X[..., :8], X), {}, "key: expected the query's head_dim 16, got 8"),
        ((X, X, X), {"dropout_p": 1.5}, "dropout_p: expected a number from 0 to 1, got 1.5"),
        (([1.0], X, X), {}, "query: expected a tensor, got list"),
    ],
)
def test_raises_where_torch_does_and_names_the_argument(tensors, arguments, message):
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.scaled_dot_product_attention(*tensors, **arguments)
    with pytest.raises(theirs.type, match=message):
        scaled_dot_product_attention(*tensors, **arguments)


@pytest.mark.parametrize(
    "value, arguments, message",
    [
        (X, {"attn_mask": torch.ones(5, 5)}, "attn_mask"),
        (X, {"dropout_p": 0.1}, "dropout_p"),
        (X, {"enable_gqa": True}, "enable_gqa"),
        (X[..., :8], {}, "value: expected the query's head_dim"),
    ],
)
def test_what_is_not_supported_is_named(value, arguments, message):
    with pytest.raises(NotImplementedError, match=message):
        scaled_dot_product_attention(X, X, value, **arguments)
    with pytest.raises(NotImplementedError, match="query: expected a head_dim above 0"):
        scaled_dot_product_attention(X[..., :0], X[..., :0], X[..., :0])


def test_values_of_another_length_than_the_keys_are_an_error():
    with pytest.raises(RuntimeError, match="value: expected the key's length 5, got 4"):
        scaled_dot_product_attention(X, X, X[:, :, :4])


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float32), (torch.float64,) * 3],
    ids=str,
)
def test_autocast_as_torch(dtypes):
    tensors = [torch.randn(2, 3, 9, 32).to(dtype) for dtype in dtypes]
    with torch.autocast("cpu", torch.bfloat16):
        ours = scaled_dot_product_attention(*tensors)
        theirs = F.scaled_dot_product_attention(*tensors)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
