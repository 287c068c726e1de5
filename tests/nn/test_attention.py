"""nn.MultiheadAttention against torch's: parameters, results, gradients, exceptions, copies, Transformer layers."""

import copy
import inspect
import io
import itertools
import pickle
import random

import pytest
import torch
from torch.nn.utils import parametrize

import lmengine.nn
from tests.numerics import assert_right

E, H = 64, 4
CONFIGURATIONS = [
    {},
    {"batch_first": True},
    {"bias": False, "batch_first": True},
    {"kdim": 24, "vdim": 40},
    {"kdim": 24, "bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "vdim": 40, "bias": False},
]


def causal_mask(length):
    return torch.nn.Transformer.generate_square_subsequent_mask(length)


def pair(*args, dtype=torch.float32, **kwargs):
    """Ours and PyTorch's layer with the same parameters, biases that are not 0 among them."""
    theirs = torch.nn.MultiheadAttention(*args, dtype=dtype, **kwargs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    ours = lmengine.nn.MultiheadAttention(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_inputs(layer, queries, keys, batch=5, dtype=torch.float32):
    """Query, key and value; without `keys` they are one tensor, as in self-attention."""

    def normal(length, features):
        shape = (length, features) if batch is None else (length, batch, features)
        x = torch.randn(shape)
        return (x.transpose(0, 1) if layer.batch_first and batch is not None else x).to(dtype)

    if keys is None:
        return [normal(queries, E)]
    return [normal(queries, E), normal(keys, layer.kdim), normal(keys, layer.vdim)]


def padding(length, batch=5):
    """A mask that hides what lies behind the end of each sequence, one of which fills the length."""
    lengths = torch.randint(1, length + 1, (batch,))
    lengths[-1] = length
    return torch.arange(length) >= lengths[:, None]


def hidden(*shape):
    """A mask that hides a third of the keys, but never the first."""
    mask = torch.rand(shape) < 1 / 3
    mask[..., 0] = False
    return mask


def as_dtype(mask, dtype):
    """A mask of a floating dtype that hides what the bool mask hides and adds random numbers to the other scores."""
    return mask if dtype == torch.bool else torch.randn(mask.shape).masked_fill(mask, -torch.inf).to(dtype)


def results(layer, inputs, grads, **kwargs):
    """Output, weights if there are any, and the gradients of all inputs, parameters and masks that require one."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    kwargs = {k: m.detach().requires_grad_() if requires_grad(m) else m for k, m in kwargs.items()}
    output, weights = layer(*(leaves * 3 if len(leaves) == 1 else leaves), **kwargs)
    outputs = [output] if weights is None else [output, weights]
    wanted = [*leaves, *layer.parameters(), *filter(requires_grad, kwargs.values())]
    gradients = torch.autograd.grad(outputs, wanted, [g.to(output) for g in grads])
    return [*(x.detach() for x in outputs), *gradients]


def requires_grad(argument):
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def compare(ours, theirs, inputs, **kwargs):
    with torch.no_grad():
        outputs = theirs(*(inputs * 3 if len(inputs) == 1 else inputs), **kwargs)
    grads = [torch.randn(x.shape, dtype=torch.float64) for x in outputs if x is not None]
    exact = results(copy.deepcopy(theirs).double(), [x.double() for x in inputs], grads, **wide(kwargs))
    pairs = zip(results(ours, inputs, grads, **kwargs), results(theirs, inputs, grads, **kwargs), exact, strict=True)
    for i, (mine, other, right) in enumerate(pairs):
        # Several roundings lie between input and output, and the largest of so few errors is luck. In float32 a
        # gradient of a score is moreover the difference of two sums in the kernel, rounded as they are, where torch
        # goes step by step if it has no kernel for a mask: 4 of 4098 calls were past 1e-6 of the largest, by 7 percent.
        tiny = 8e-6 if mine.dtype == torch.float32 else 2 * torch.finfo(mine.dtype).eps
        tiny *= max(1.0, right.abs().max().item())
        assert_right(mine, other, right, tiny=tiny, name=f"result {i}")


def wide(kwargs):
    masks = {k: m for k, m in kwargs.items() if isinstance(m, torch.Tensor) and m.is_floating_point()}
    return {**kwargs, **{k: m.detach().double().requires_grad_(m.requires_grad) for k, m in masks.items()}}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_same_parameters_under_the_same_seed(configuration):
    layers = []
    for cls in (lmengine.nn.MultiheadAttention, torch.nn.MultiheadAttention):
        torch.manual_seed(3)
        layers.append(cls(E, H, **configuration))
    ours, theirs = layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", ["__init__", "forward"])
def test_same_signature(name):
    ours, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(getattr(cls, name)).parameters.values()]
        for cls in (lmengine.nn.MultiheadAttention, torch.nn.MultiheadAttention)
    )
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("batch", [5, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_cross_attention(configuration, batch, need_weights, dtype):
    ours, theirs = pair(E, H, dtype=dtype, **configuration)
    compare(ours, theirs, make_inputs(ours, 19, 33, batch, dtype), need_weights=need_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("mask", [None, "float", "bool"])
@pytest.mark.parametrize("batch", [5, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS[:3], ids=str)
def test_self_attention(configuration, batch, mask, need_weights, dtype):
    ours, theirs = pair(E, H, dtype=dtype, **configuration)
    kwargs = {"need_weights": need_weights}
    if mask:
        attn_mask = causal_mask(27).to(dtype)
        kwargs |= {"attn_mask": attn_mask if mask == "float" else attn_mask < 0, "is_causal": True}
    compare(ours, theirs, make_inputs(ours, 27, None, batch, dtype), **kwargs)


def grid():
    """A random tenth of all ways to call a layer of 4 heads with 9 queries."""
    calls = itertools.product(
        CONFIGURATIONS, ["batched", "unbatched"], ["output", "mean weights", "weights"],
        [None, torch.bool, torch.float32], [None, "2-D", "3-D", "causal", "causal hint"], [torch.bool, torch.float32],
        [False, True],
    )  # fmt: skip
    # a gradient is that of an additive mask, and torch's warning of masks of two kinds is tested below
    valid = [
        (*call, grad)
        for *call, grad in calls
        if (call[4] or call[5] == torch.bool)
        and (not grad or (torch.float32 in (call[3], call[5]) and call[4] != "causal hint"))
        and (call[3] is None or call[4] is None or call[3] == call[5])
    ]
    return random.Random(0).sample(valid, len(valid) // 10)


@pytest.mark.parametrize("configuration, batching, returned, padding_dtype, mask, mask_dtype, learned", grid(), ids=str)
def test_masks(configuration, batching, returned, padding_dtype, mask, mask_dtype, learned):
    ours, theirs = pair(E, H, **configuration)
    batch, queries = (5 if batching == "batched" else None), 9
    keys = 9 if mask in ("causal", "causal hint") else 14
    kwargs = {"need_weights": returned != "output", "average_attn_weights": returned == "mean weights"}
    if padding_dtype:
        hides = padding(keys, batch or 1)
        kwargs["key_padding_mask"] = as_dtype(hides if batch else hides[0], padding_dtype)
    if mask in ("causal", "causal hint"):
        kwargs["attn_mask"] = causal_mask(queries) < 0 if mask_dtype == torch.bool else causal_mask(queries)
        kwargs["is_causal"] = mask == "causal hint"
    elif mask:
        shape = (queries, keys) if mask == "2-D" else ((batch or 1) * H, queries, keys)
        kwargs["attn_mask"] = as_dtype(hidden(*shape), mask_dtype)
    for argument in kwargs.values():
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            argument.requires_grad_(learned)
    compare(ours, theirs, make_inputs(ours, queries, keys, batch), **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16], ids=str)
def test_masks_in_bfloat16(dtype, need_weights):
    ours, theirs = pair(E, H, dtype=torch.bfloat16, add_bias_kv=True)
    kwargs = {"key_padding_mask": as_dtype(padding(14), dtype), "attn_mask": as_dtype(hidden(5 * H, 9, 14), dtype)}
    compare(ours, theirs, make_inputs(ours, 9, 14, dtype=torch.bfloat16), need_weights=need_weights, **kwargs)


def test_a_learned_causal_mask_beside_padding_is_read_despite_the_hint():
    ours, theirs = pair(E, H)
    mask = causal_mask(9).requires_grad_()
    kwargs = {"key_padding_mask": as_dtype(padding(9), torch.float32), "attn_mask": mask, "is_causal": True}
    compare(ours, theirs, make_inputs(ours, 9, 9), need_weights=False, **kwargs)


@pytest.mark.parametrize("padding_dtype, mask_dtype", [(torch.bool, torch.float32), (torch.float32, torch.bool)])
def test_masks_of_two_kinds_warn_as_torch_does(padding_dtype, mask_dtype):
    kwargs = {
        "key_padding_mask": as_dtype(padding(14), padding_dtype),
        "attn_mask": as_dtype(hidden(9, 14), mask_dtype),
        "need_weights": False,
    }
    inputs = [torch.randn(length, 5, E) for length in (9, 14, 14)]
    found = []
    for layer in pair(E, H):
        with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"):
            found.append(layer(*inputs, **kwargs)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_masks_are_merged_without_the_heads(monkeypatch):
    """The kernel gets no more of a mask than was given, and bool where it was bool."""
    masks = []
    attend = lmengine.nn.attention.attention
    monkeypatch.setattr(
        lmengine.nn.attention, "attention", lambda *a, **k: masks.append((a[3], k["mask"])) or attend(*a, **k)
    )
    ours = lmengine.nn.MultiheadAttention(E, H)
    x, pads, mask = torch.randn(9, 5, E), padding(9), hidden(9, 9)
    ours(x, x, x, pads, need_weights=False)
    ours(x, x, x, attn_mask=mask, need_weights=False)
    ours(x, x, x, pads, attn_mask=mask, need_weights=False)
    ours(x, x, x, pads, attn_mask=causal_mask(9) < 0, need_weights=False, is_causal=True)
    ours(x, x, x, as_dtype(pads, torch.float32), need_weights=False)
    shapes = [(5, 1, 1, 9), (1, 1, 9, 9), (5, 1, 9, 9), (5, 1, 1, 9), (5, 1, 1, 9)]
    assert [tuple(m.shape) for _, m in masks] == shapes
    assert [m.dtype for _, m in masks] == [torch.bool] * 4 + [torch.float32]
    assert [is_causal for is_causal, _ in masks] == [False, False, False, True, False]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_query_that_sees_no_key_gives_zero(dtype, need_weights):
    """And nothing is NaN; torch's layer gives NaN with need_weights."""
    ours, theirs = pair(E, H)
    everything = torch.zeros(5, 14, dtype=torch.bool)
    everything[2] = True
    mask = everything if dtype == torch.bool else torch.zeros(5, 14).masked_fill(everything, -torch.inf)
    inputs = make_inputs(ours, 9, 14)
    output, weights = ours(*inputs, mask, need_weights=need_weights)
    torch.testing.assert_close(output, theirs(*inputs, mask, need_weights=False)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output[:, 2], ours.out_proj.bias.expand(9, E))
    grads = torch.autograd.grad(output.square().sum(), list(ours.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    if need_weights:
        assert (weights[2] == 0).all() and weights.isfinite().all()


@pytest.mark.parametrize("configuration", [{}, {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}])
def test_dropout_of_the_returned_weights_is_torch_s(configuration):
    """With need_weights the same weights are dropped from the same seed."""
    found = []
    inputs = None
    for layer in pair(E, H, dropout=0.4, **configuration):
        inputs = inputs or make_inputs(layer, 9, 14)
        torch.manual_seed(3)
        found.append(layer(*inputs, average_attn_weights=False))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert (found[0][1] == 0).any()


def test_dropout_in_the_kernel():
    """Without need_weights others are dropped: as many, scaled, the same again from the same seed, none in evaluation.

    Queries and keys of 0 make all weights 1/64, values and projections of 1 add up those that are kept.
    """
    ours = lmengine.nn.MultiheadAttention(64, 4, dropout=0.3, bias=False)
    with torch.no_grad():
        ours.in_proj_weight[:128].zero_()
        ours.in_proj_weight[128:].copy_(torch.eye(64))
        ours.out_proj.weight.copy_(torch.eye(64))
    x = torch.ones(64, 5, 64)
    torch.manual_seed(2)
    output = ours(x, x, x, need_weights=False)[0]  # each a head's kept weights: a multiple of 1/64/0.7
    kept = output * 64 * 0.7
    torch.testing.assert_close(kept, kept.round(), rtol=1e-4, atol=1e-3)
    number = 64 * 5 * 4 * 64
    assert abs(kept[..., ::16].sum().item() / number - 0.7) < 5 * (0.3 * 0.7 / number) ** 0.5
    assert len(kept.round().unique()) > 10
    other = ours(x, x, x, need_weights=False)[0]
    torch.manual_seed(2)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], output)
    assert not torch.equal(other, output)
    torch.testing.assert_close(ours.eval()(x, x, x, need_weights=False)[0], torch.ones_like(x))


def test_weights_of_every_head_and_a_mask_for_every_head():
    ours, theirs = pair(E, H, batch_first=True)
    mask = causal_mask(9).expand(5 * H, 9, 9)
    compare(ours, theirs, make_inputs(ours, 9, None), average_attn_weights=False, attn_mask=mask, is_causal=True)
    compare(ours, theirs, make_inputs(ours, 9, 4, None), average_attn_weights=False)
    inputs = make_inputs(ours, 9, 4)
    assert ours(*inputs, average_attn_weights=False)[1].shape == (5, H, 9, 4)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "query, key", [((4, 0, E), (3, 0, E)), ((0, 5, E), (3, 5, E)), ((4, 5, E), (0, 5, E))], ids=str
)
def test_empty_dimensions(query, key, need_weights):
    ours, theirs = pair(E, H)
    inputs = (torch.randn(query), torch.randn(key), torch.randn(key))
    for mine, other in zip(*(layer(*inputs, need_weights=need_weights) for layer in (ours, theirs)), strict=True):
        if other is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_as_torch_on_its_fast_path(is_causal, grad):
    ours, theirs = (layer.eval() for layer in pair(E, H, dropout=0.2, batch_first=True))
    x = torch.randn(3, 11, E)
    kwargs = {"attn_mask": causal_mask(11) < 0, "is_causal": True} if is_causal else {}
    with torch.set_grad_enabled(grad):
        for need_weights in (False, True):
            mine, other = (layer(x, x, x, need_weights=need_weights, **kwargs) for layer in (ours, theirs))
            torch.testing.assert_close(mine[0], other[0])
            assert mine[0].requires_grad == grad
            if need_weights:
                torch.testing.assert_close(mine[1], other[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_a_transformer_encoder(norm_first, is_causal, training, monkeypatch):
    """PyTorch's layers call ours, in evaluation too, where they would rather read its weights and run a fused path."""
    calls = []
    attend = lmengine.nn.attention.attention
    monkeypatch.setattr(lmengine.nn.attention, "attention", lambda *a, **k: calls.append(a) or attend(*a, **k))
    layer = torch.nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True, norm_first=norm_first)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        attention = lmengine.nn.MultiheadAttention(E, H, batch_first=True)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.train(training)
    theirs.train(training)
    x = torch.randn(3, 11, E)
    mask = causal_mask(11) if is_causal else None
    with torch.set_grad_enabled(training):
        mine, other = (model(x, mask, is_causal=is_causal) for model in (ours, theirs))
    assert [call[3] for call in calls] == [is_causal] * 2
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    if training:
        grads = [
            torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((mine, ours), (other, theirs))
        ]
        for g, h in zip(*grads, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-3)


def test_inside_a_transformer_decoder():
    theirs = torch.nn.TransformerDecoderLayer(E, H, 48, dropout=0.0)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        attention = lmengine.nn.MultiheadAttention(E, H)
        attention.load_state_dict(getattr(ours, name).state_dict())
        setattr(ours, name, attention)
    target, memory = torch.randn(7, 3, E), torch.randn(9, 3, E)
    mine, other = (layer(target, memory, tgt_mask=causal_mask(7), tgt_is_causal=True) for layer in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments", [{"embed_dim": 0}, {"num_heads": -1}, {"num_heads": 5}, {"kdim": -1}, {"dtype": torch.int64}], ids=str
)
def test_same_exceptions_at_construction(arguments):
    raised = []
    for cls in (lmengine.nn.MultiheadAttention, torch.nn.MultiheadAttention):
        with pytest.raises((RuntimeError, ValueError, AssertionError)) as information:
            cls(**{"embed_dim": E, "num_heads": H, **arguments})
        raised.append((information.type, str(information.value)))
    assert raised[0] == raised[1]


def test_nested_tensors_are_refused():
    ours = lmengine.nn.MultiheadAttention(E, H, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with pytest.raises(NotImplementedError, match="nested tensors are not implemented"):
        ours(nested, nested, nested)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    "configuration, shapes, kwargs",
    [
        ({}, [(E,), (E,), (E,)], {}),
        ({}, [(1, 1, 1, E), (E,), (E,)], {}),
        ({}, [(5, 2, E), (5, E), (5, 2, E)], {}),
        ({}, [(5, E), (5, 2, E), (5, E)], {}),
        ({}, [(5, 2, E - 2), (5, 2, E), (5, 2, E)], {}),
        ({}, [(5, 2, E), (5, 2, E), (6, 2, E)], {}),
        ({"batch_first": True}, [(2, 5, E), (2, 5, E), (2, 6, E)], {}),
        ({}, [(5, E), (5, E), (6, E)], {}),
        ({"kdim": 8, "vdim": 12}, [(5, 2, E), (5, 2, 8), (5, 2, 8)], {}),
        ({"kdim": 8, "vdim": 12}, [(5, 2, E), (5, 2, 9), (5, 2, 12)], {}),
        ({"kdim": 8, "vdim": 12}, [(5, 2, E), (5, 2, 8), (4, 2, 12)], {}),
        ({"kdim": 8, "vdim": 12}, [(5, E), (5, 8), (4, 12)], {}),
        ({}, [(5, 2, E)] * 3, {"is_causal": True}),
        ({}, [(5, 2, E)] * 3, {"attn_mask": zeros(5, 5, dtype=torch.int32), "is_causal": True}),
        ({}, [(5, 2, E)] * 3, {"attn_mask": zeros(4, 5), "is_causal": True}),
        ({}, [(5, 2, E)] * 3, {"attn_mask": zeros(1, 5, 5), "is_causal": True}),
        ({}, [(5, 2, E)] * 3, {"attn_mask": zeros(5), "is_causal": True}),
        ({}, [(5, E)] * 3, {"attn_mask": zeros(5), "is_causal": True}),
        ({}, [(5, E)] * 3, {"attn_mask": zeros(1, 5, 5), "is_causal": True}),
        ({}, [(5, E)] * 3, {"attn_mask": zeros(1, 5, 5), "is_causal": True, "need_weights": False}),
        ({}, [(5, E)] * 3, {"attn_mask": zeros(5, 5, dtype=torch.float64), "is_causal": True}),
        ({}, [(5, 2, E)] * 3, {"attn_mask": zeros(5, 6)}),
        ({}, [(5, 2, E)] * 3, {"attn_mask": zeros(2, 5, 5), "need_weights": False}),
        ({}, [(5, 2, E)] * 3, {"key_padding_mask": zeros(2, 5, dtype=torch.uint8)}),
        ({}, [(5, 2, E)] * 3, {"key_padding_mask": zeros(5, dtype=torch.bool)}),
        ({}, [(5, 2, E)] * 3, {"key_padding_mask": zeros(3, 5, dtype=torch.bool)}),
        ({}, [(5, 2, E)] * 3, {"key_padding_mask": zeros(2, 6, dtype=torch.bool), "need_weights": False}),
        ({}, [(5, E)] * 3, {"key_padding_mask": zeros(2, 5, dtype=torch.bool)}),
        ({}, [(5, E)] * 3, {"key_padding_mask": zeros(4, dtype=torch.bool)}),
    ],
    ids=str,
)
def test_same_exceptions_when_called(configuration, shapes, kwargs):
    raised = []
    for layer in pair(E, H, **configuration):
        with pytest.raises((RuntimeError, AssertionError)) as information:
            layer(*(torch.randn(shape) for shape in shapes), **kwargs)
        raised.append((information.type, str(information.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize(
    "shapes, dtype, message",
    [
        ([(5, 2, E), (5, 2, 9), (5, 2, 9)], torch.float32, "key: expected embed_dim = 64 features, got 9"),
        ([(5, 2, E), (5, 3, E), (5, 3, E)], torch.float32, "key: expected the query's batch 2, got 3"),
        ([(5, 2, E)] * 3, torch.float64, "same dtype"),
    ],
)
def test_same_kind_of_exception_in_our_words(shapes, dtype, message):
    ours, theirs = pair(E, H)
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    with pytest.raises(RuntimeError):
        theirs(*inputs)
    with pytest.raises(RuntimeError, match=message):
        ours(*inputs)


def test_copies_pickles_and_saves():
    ours, _ = pair(E, H, batch_first=True)
    x = torch.randn(2, 6, E)
    expected = ours(x, x, x)[0]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x, x, x)[0], expected)
        with torch.no_grad():
            twin.in_proj_weight.zero_()
        assert not torch.equal(twin(x, x, x)[0], expected)
    ours._reset_parameters()
    assert not ours.in_proj_bias.any()


def test_functional_call_parametrize_and_hooks():
    ours, theirs = pair(E, H)
    x = torch.randn(6, 2, E)
    nothing = {name: torch.zeros_like(value) for name, value in ours.named_parameters()}
    assert not torch.func.functional_call(ours, nothing, (x, x, x), {"need_weights": False})[0].any()

    class Halve(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    with torch.no_grad():
        theirs.in_proj_weight /= 2
        theirs.out_proj.weight /= 2
    parametrize.register_parametrization(ours, "in_proj_weight", Halve())
    parametrize.register_parametrization(ours.out_proj, "weight", Halve())
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], theirs(x, x, x)[0])
    calls = []
    ours.register_forward_hook(lambda *args: calls.append(args))
    ours(x, x, x)
    assert len(calls) == 1


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_without_a_break(need_weights):
    torch._dynamo.reset()
    ours, theirs = pair(E, H, batch_first=True)
    x, mask = torch.randn(2, 13, E), causal_mask(13)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mine = compiled(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)[0]
    other = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)[0]
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((mine, ours), (other, theirs))]
    for g, h in zip(*grads, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_as_torch(need_weights):
    ours, theirs = pair(E, H)
    x, mask = torch.randn(11, 3, E), causal_mask(11)
    for kwargs in ({}, {"attn_mask": mask, "is_causal": True}):
        with torch.autocast("cpu", torch.bfloat16):
            found = [layer(x, x, x, need_weights=need_weights, **kwargs) for layer in (ours, theirs)]
        for mine, other in zip(*found, strict=True):
            assert (mine is None) == (other is None)
            if other is not None:
                assert mine.dtype == other.dtype
                torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)


def test_float64_runs_on_the_reference_and_says_so():
    lmengine.backends.warn_of_reference.cache_clear()
    ours, theirs = pair(E, H, dtype=torch.float64)
    x = torch.randn(6, 2, E, dtype=torch.float64)
    with pytest.warns(UserWarning, match="lmengine.attention: no kernel supports this call on cpu"):
        mine = ours(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(mine, theirs(x, x, x, need_weights=False)[0])
