"""nn.functional.scaled_dot_product_attention against torch's: masks, shapes that broadcast, heads, errors, autocast."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from lmengine.nn.functional import scaled_dot_product_attention
from tests.numerics import assert_right


def results(function, tensors, mask, grad, **arguments):
    """Output and the gradients of query, key, value and of a mask that requires one."""
    output = function(*tensors, mask, **arguments)
    learned = mask is not None and mask.requires_grad
    gradients = torch.autograd.grad(output, [*tensors, mask] if learned else tensors, grad.to(output))
    return [output.detach(), *gradients]


def wide(tensor):
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def compare(tensors, mask=None, **arguments):
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with torch.no_grad():
        grad = torch.randn(F.scaled_dot_product_attention(*tensors, mask, **arguments).shape)
    floating = mask is not None and mask.is_floating_point()
    exact = results(
        F.scaled_dot_product_attention, list(map(wide, tensors)), wide(mask) if floating else mask, grad, **arguments
    )
    ours, theirs = (
        results(function, tensors, mask, grad, **arguments)
        for function in (scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    for name, mine, other, right in zip(("output", "query", "key", "value", "mask"), ours, theirs, exact, strict=False):
        # Beside the middle between two numbers of 16 bits a result is rounded either way. In float32 a gradient of a
        # score is the difference of two sums, rounded as they are; torch, which has no kernel for most of these calls,
        # takes it step by step, and gets exactly 0 where 0 is due: a query's only key, a mask that has one key.
        eps = 8e-6 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps
        assert_right(mine, other, right, tiny=eps * max([1.0, *right.abs().flatten().tolist()]), name=name)


def hidden(*shape):
    """A bool mask that shows two thirds of the keys, and none to the first query where there is more than one."""
    mask = torch.rand(shape) < 2 / 3
    if len(shape) > 1 and shape[-2] > 1:
        mask[..., 0, :] = False
    return mask


def added(*shape):
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -torch.inf)


MASKS = [(5, 7), (1, 7), (5, 1), (3, 5, 7), (3, 1, 1), (2, 1, 1, 7), (1, 3, 5, 7), (2, 3, 5, 7), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "learned"])
def test_masks_as_torch(shape, kind):
    mask = hidden(*shape) if kind == "bool" else added(*shape).requires_grad_(kind == "learned")
    compare([torch.randn(2, 3, length, 16) for length in (5, 7, 7)], mask, scale=0.3)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_masks_in_bfloat16(mask_dtype):
    mask = hidden(5, 7) if mask_dtype == torch.bool else added(5, 7).to(mask_dtype)
    compare([torch.randn(2, 3, length, 16).bfloat16() for length in (5, 7, 7)], mask)


@pytest.mark.parametrize(
    "queries, keys, mask",
    [
        ((5, 16), (7, 16), (5, 7)),
        ((5, 16), (7, 16), (1, 1)),
        ((3, 5, 16), (3, 7, 16), (5, 7)),
        ((3, 5, 16), (3, 7, 16), (3, 1, 7)),
        ((4, 2, 3, 5, 16), (4, 2, 3, 7, 16), (3, 5, 7)),
        ((4, 2, 3, 5, 16), (4, 2, 3, 7, 16), (2, 1, 5, 7)),
        ((4, 2, 3, 5, 16), (4, 2, 3, 7, 16), (4, 1, 3, 1, 7)),
        ((4, 2, 3, 5, 16), (1, 2, 1, 7, 16), (1, 1, 1, 5, 1)),
        ((3, 5, 16), (4, 2, 1, 7, 16), (2, 1, 1, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bool", "learned"])
def test_masks_of_any_rank(queries, keys, mask, kind):
    made = hidden(*mask) if kind == "bool" else added(*mask).requires_grad_()
    compare([torch.randn(queries), torch.randn(keys), torch.randn(keys)], made)


def test_masks_of_fewer_dimensions_than_torch_takes():
    tensors = [torch.randn(2, 3, length, 16) for length in (5, 7, 7)]
    for mask in (torch.randn(7), torch.tensor(0.5)):
        ours, theirs = (
            scaled_dot_product_attention(*tensors, mask),
            F.scaled_dot_product_attention(*tensors, mask.expand(5, 7)),
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_and_is_causal_both_hold(kind):
    """As in torch's CPU kernel; on four dimensions without gradients it does not raise."""
    tensors = [torch.randn(2, 3, length, 16) for length in (5, 7, 7)]
    mask = hidden(5, 7) if kind == "bool" else added(5, 7)
    ours = scaled_dot_product_attention(*tensors, mask, is_causal=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(*tensors, mask, is_causal=True))


@pytest.mark.parametrize(
    "queries, keys, values",
    [
        ((2, 6, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
        ((2, 6, 5, 16), (2, 1, 7, 16), (2, 1, 7, 16)),
        ((2, 6, 5, 16), (2, 6, 7, 16), (2, 6, 7, 16)),
        ((2, 6, 5, 16), (2, 3, 7, 16), (2, 2, 7, 24)),
        ((2, 6, 5, 16), (2, 1, 7, 16), (2, 3, 7, 8)),
        ((6, 5, 16), (2, 7, 16), (2, 7, 16)),
        ((3, 2, 6, 5, 16), (3, 2, 2, 7, 16), (3, 2, 2, 7, 16)),
        ((2, 6, 5, 16), (1, 3, 7, 16), (2, 3, 7, 16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_grouped_queries(queries, keys, values, masked):
    mask = added(6, 5, 7).requires_grad_() if masked else None
    compare([torch.randn(queries), torch.randn(keys), torch.randn(values)], mask, enable_gqa=True)


@pytest.mark.parametrize("value_dim", [0, 1, 8, 24, 130])
@pytest.mark.parametrize("is_causal", [False, True])
def test_values_of_another_head_dim(value_dim, is_causal):
    compare([torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, value_dim)], is_causal=is_causal)


def test_a_head_dim_of_zero():
    """All scores are 0: the mean of the values."""
    compare([torch.randn(2, 3, 5, 0), torch.randn(2, 3, 7, 0), torch.randn(2, 3, 7, 4)])
    compare([torch.randn(2, 3, 5, 0), torch.randn(2, 3, 5, 0), torch.randn(2, 3, 5, 0)])


@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (7, 5)], ids=str)
@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias(lengths, variant):
    queries, keys = lengths
    tensors = [torch.randn(2, 3, length, 16) for length in (queries, keys, keys)]
    bias = variant(queries, keys)
    ours = scaled_dot_product_attention(*tensors, bias)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(*tensors, bias))
    grouped = scaled_dot_product_attention(tensors[0], tensors[1][:, :1], tensors[2][:, :1], bias, enable_gqa=True)
    mask = bias._materialize()
    expected = F.scaled_dot_product_attention(tensors[0], tensors[1][:, :1], tensors[2][:, :1], mask)
    torch.testing.assert_close(grouped, expected)
    with pytest.raises(ValueError, match="is_causal: expected False with a CausalBias"):
        scaled_dot_product_attention(*tensors, bias, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask: expected a CausalBias of the lengths .* got \(4, 4\)"):
        scaled_dot_product_attention(*tensors, variant(4, 4))


def test_dropout():
    """As many weights as asked for are dropped, the same again from the same seed; the others are scaled."""
    query, key = torch.zeros(4, 4, 64, 16), torch.zeros(4, 4, 64, 16)
    value = torch.eye(64).expand(4, 4, 64, 64)
    torch.manual_seed(2)
    weights = scaled_dot_product_attention(query, key, value, dropout_p=0.3)
    kept = weights > 0
    torch.testing.assert_close(weights[kept], torch.full((int(kept.sum()),), 1 / 64 / 0.7))
    assert abs(kept.float().mean().item() - 0.7) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
    other = scaled_dot_product_attention(query, key, value, dropout_p=0.3)
    torch.manual_seed(2)
    assert torch.equal(scaled_dot_product_attention(query, key, value, dropout_p=0.3), weights)
    assert not torch.equal(other, weights)
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        assert not function(query, key, value, dropout_p=1.0).any()


@pytest.mark.parametrize("kind", ["causal", "bool", "learned", "grouped", "bias", "rank 5"])
def test_compiles_without_a_break(kind):
    torch._dynamo.reset()
    heads = 1 if kind == "grouped" else 3
    tensors = [torch.randn(2, n, length, 16, requires_grad=True) for n, length in ((3, 5), (heads, 7), (heads, 7))]
    mask, arguments = None, {}
    if kind == "causal":
        arguments["is_causal"] = True
    if kind in ("bool", "learned"):
        mask = hidden(5, 7) if kind == "bool" else added(5, 7).requires_grad_()
    if kind == "grouped":
        arguments["enable_gqa"] = True
    if kind == "bias":
        mask = causal_lower_right(5, 7)
    if kind == "rank 5":
        tensors = [tensor.detach()[:, None].requires_grad_() for tensor in tensors]
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    grad = torch.randn(tensors[0].shape)
    found = (
        results(function, tensors, mask, grad, **arguments) for function in (compiled, scaled_dot_product_attention)
    )
    for mine, eager in zip(*found, strict=True):
        torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "query, key, value",
    [
        ((5, 16), (7, 16), (7, 16)),
        ((3, 5, 16), (3, 7, 16), (3, 7, 16)),
        ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
        ((4, 2, 3, 5, 16), (4, 2, 3, 7, 16), (4, 2, 3, 7, 16)),
        ((2, 3, 5, 16), (3, 7, 16), (7, 16)),
        ((5, 16), (3, 7, 16), (2, 1, 7, 16)),
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
        ((X, X, X), {"dropout_p": -1}, "dropout_p: expected a number from 0 to 1, got -1"),
        ((X, X, X), {"attn_mask": torch.ones(3, 5, 6)}, "attn_mask: expected a shape that broadcasts"),
        ((X, X, X), {"attn_mask": torch.ones(2, 2, 3, 5, 5)}, "attn_mask: expected a shape that broadcasts"),
        ((X[:1], X[:1], X[:1]), {"attn_mask": torch.ones(2, 1, 5, 5)}, "attn_mask: expected a shape that broadcasts"),
        ((X, X, X), {"attn_mask": torch.ones(5, 5).long()}, "attn_mask: expected bool, float32 or the query's"),
        ((X, X, X), {"attn_mask": torch.ones(5, 5).double()}, "attn_mask: expected bool, float32 or the query's"),
        ((X.half(),) * 3, {"attn_mask": torch.ones(5, 5).bfloat16()}, "attn_mask: expected bool, float32 or the"),
        ((X, X, X), {"attn_mask": [True]}, "attn_mask: expected a tensor, got list"),
        ((X, X[:, :2], X[:, :2]), {"enable_gqa": True}, "key: expected a number of heads that divides the query's 3"),
        ((X, X, X[:, :2]), {"enable_gqa": True}, "value: expected a number of heads that divides the query's 3"),
        (([1.0], X, X), {}, "query: expected a tensor, got list"),
    ],
)
def test_raises_where_torch_does_and_names_the_argument(tensors, arguments, message):
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.scaled_dot_product_attention(*tensors, **arguments)
    with pytest.raises(theirs.type, match=message):
        scaled_dot_product_attention(*tensors, **arguments)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(3, 5, 16), torch.randn(3, 4, 16)])
    jagged = torch.nested.nested_tensor([torch.randn(5, 3, 16), torch.randn(4, 3, 16)], layout=torch.jagged)
    for tensor in (nested, jagged.transpose(1, 2)):
        with pytest.raises(NotImplementedError, match="query: nested tensors are not supported"):
            scaled_dot_product_attention(tensor, tensor, tensor)


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
    # torch casts a floating mask, but no query of float64, and then finds that they differ
    for mask in (None, hidden(9, 9), *([added(9, 9)] if dtypes[0] != torch.float64 else [])):
        with torch.autocast("cpu", torch.bfloat16):
            ours = scaled_dot_product_attention(*tensors, mask)
            theirs = F.scaled_dot_product_attention(*tensors, mask)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
