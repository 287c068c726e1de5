"""The Transformer layers and stacks against torch's: parameters, results, gradients, exceptions, copies, compilation."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import lmengine.nn
from tests.numerics import assert_right

E, H, N, S, T = 32, 4, 3, 11, 7
CLASSES = [
    "Transformer", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer", "TransformerDecoderLayer",
]  # fmt: skip
CONFIGURATIONS = [
    {},
    {"batch_first": True, "activation": "gelu"},
    {"norm_first": True, "bias": False},
    {"batch_first": True, "norm_first": True, "activation": torch.nn.SiLU(), "layer_norm_eps": 1e-3},
]


def make(library, name, dtype=torch.float32, **configuration):
    """A layer or stack of torch.nn or lmengine.nn."""
    arguments = {"d_model": E, "nhead": H, "dim_feedforward": 40, "dropout": 0.0, "dtype": dtype} | configuration
    if name == "Transformer":
        return library.Transformer(num_encoder_layers=2, num_decoder_layers=2, **arguments)
    if "Layer" in name:
        return getattr(library, name)(**arguments)
    layer = getattr(library, f"{name}Layer")(**arguments)
    return getattr(library, name)(layer, 2, torch.nn.LayerNorm(E, dtype=dtype))


def pair(name, **configuration):
    """Ours and torch's with the same parameters, none of them 0."""
    theirs = make(torch.nn, name, **configuration)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    ours = make(lmengine.nn, name, **configuration)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch_first(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)).batch_first


def make_inputs(model, unbatched=False):
    """The source, or the target and the memory, or the source and the target."""
    lengths = (S,) if "Encoder" in type(model).__name__ else (T, S) if "Decoder" in type(model).__name__ else (S, T)
    if unbatched:
        return [torch.randn(length, E) for length in lengths]
    tensors = [torch.randn(N, length, E) for length in lengths]
    return tensors if batch_first(model) else [x.transpose(0, 1).contiguous() for x in tensors]


def causal(length):
    return torch.nn.Transformer.generate_square_subsequent_mask(length)


def padding(length, unbatched=False):
    """Padding behind the sequences' ends; the first has none."""
    lengths = torch.tensor([length, length - 3, 1])
    mask = torch.arange(length) >= lengths[:, None]
    return mask[1] if unbatched else mask


def hidden(*shape):
    """A mask that hides a third of the keys, but never the first."""
    mask = torch.rand(shape) < 1 / 3
    mask[..., 0] = False
    return mask


def masks_of(name, case, unbatched=False):
    """The arguments of a case for an encoder, a decoder or both."""
    added = torch.randn(T, S)
    encoder = {
        "none": {},
        "causal": {"mask": causal(S), "is_causal": True},
        "found causal": {"mask": causal(S) if "Layer" not in name else causal(S) < 0},
        "padding": {"src_key_padding_mask": padding(S, unbatched)},
        "causal and padding": {
            "mask": causal(S) < 0,
            "is_causal": True,
            "src_key_padding_mask": padding(S, unbatched),
        },
        "each head's": {"mask": hidden((1 if unbatched else N) * H, S, S)},
    }[case]
    decoder = {
        "none": {},
        "causal": {"tgt_mask": causal(T), "tgt_is_causal": True, "memory_mask": added},
        "found causal": {"tgt_mask": causal(T) < 0},
        "padding": {"tgt_key_padding_mask": padding(T, unbatched), "memory_key_padding_mask": padding(S, unbatched)},
        "causal and padding": {
            "tgt_mask": causal(T) < 0,
            "tgt_is_causal": True,
            "tgt_key_padding_mask": padding(T, unbatched),
            "memory_mask": hidden(T, S),
            "memory_key_padding_mask": padding(S, unbatched),
        },
        "each head's": {"memory_mask": hidden((1 if unbatched else N) * H, T, S)},
    }[case]
    if "Decoder" in name:
        return decoder
    if name == "TransformerEncoder":
        return encoder
    renamed = {"mask": "src_mask", "is_causal": "src_is_causal"} if name == "Transformer" else {"mask": "src_mask"}
    encoder = {renamed.get(key, key): value for key, value in encoder.items()}
    return encoder | decoder if name == "Transformer" else encoder


def results(model, inputs, grad, masks):
    """Output and the gradients of all inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = model(*leaves, **masks)
    return [output.detach(), *torch.autograd.grad(output, [*leaves, *model.parameters()], grad.to(output))]


def doubled(masks):
    floating = {k: m.double() for k, m in masks.items() if isinstance(m, torch.Tensor) and m.is_floating_point()}
    return masks | floating


def compare(ours, theirs, inputs, masks):
    output = inputs[-1 if isinstance(ours, torch.nn.Transformer) else 0]
    grad = torch.randn(output.shape, dtype=torch.float64)
    exact = results(copy.deepcopy(theirs).double(), [x.double() for x in inputs], grad, doubled(masks))
    pairs = zip(results(ours, inputs, grad, masks), results(theirs, inputs, grad, masks), exact, strict=True)
    for i, (mine, other, right) in enumerate(pairs):
        tiny = 8e-6 * max(1.0, right.abs().max().item())  # as in test_attention.py, which says why
        assert_right(mine, other, right, tiny=tiny, name=f"result {i}")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_same_parameters_under_the_same_seed(name, configuration):
    models = []
    for library in (lmengine.nn, torch.nn):
        torch.manual_seed(3)
        models.append(make(library, name, **configuration))
    ours, theirs = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    parts = {type(part) for part in ours.modules()}
    assert lmengine.nn.MultiheadAttention in parts and lmengine.nn.Linear in parts
    assert not parts & {torch.nn.MultiheadAttention, torch.nn.Linear}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("function", ["__init__", "forward"])
def test_same_signature(name, function):
    ours, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(getattr(cls, function)).parameters.values()]
        for cls in (getattr(lmengine.nn, name), getattr(torch.nn, name))
    )
    assert ours == theirs


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("case", ["none", "causal", "found causal", "padding", "causal and padding", "each head's"])
def test_training(name, configuration, case):
    ours, theirs = pair(name, **configuration)
    compare(ours, theirs, make_inputs(ours), masks_of(name, case))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("case", ["none", "causal and padding", "each head's"])
def test_unbatched(name, case):
    ours, theirs = pair(name)
    compare(ours, theirs, make_inputs(ours, unbatched=True), masks_of(name, case, unbatched=True))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("case", ["none", "causal", "padding", "causal and padding"])
def test_evaluation_as_torch_on_its_fused_path(name, configuration, case):
    ours, theirs = (model.eval() for model in pair(name, **configuration))
    inputs, masks = make_inputs(ours), masks_of(name, case)
    with torch.no_grad():
        mine, other = ours(*inputs, **masks), theirs(*inputs, **masks)
    if case == "padding" and name == "TransformerEncoder":  # torch packs the batch, and gives zeros for the padding
        there = ~padding(S) if batch_first(ours) else ~padding(S).t()
        mine, other = mine[there], other[there]
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("training", [True, False])
def test_every_attention_is_ours(name, training, monkeypatch):
    """In evaluation too, and in torch's own stacks."""
    calls = []
    attend = lmengine.nn.attention.attention
    monkeypatch.setattr(lmengine.nn.attention, "attention", lambda *a, **k: calls.append(a) or attend(*a, **k))
    models = [make(lmengine.nn, name, batch_first=True)]
    if name in ("TransformerEncoder", "TransformerDecoder"):
        layer = make(lmengine.nn, f"{name}Layer", batch_first=True)
        models.append(getattr(torch.nn, name)(layer, 2, **({"enable_nested_tensor": False} if "E" in name else {})))
    for model in models:
        inputs, masks = make_inputs(model), masks_of(name, "padding")
        with torch.set_grad_enabled(training):
            model.train(training)(*inputs, **masks)
        attentions = [part for part in model.modules() if isinstance(part, torch.nn.MultiheadAttention)]
        assert len(calls) == len(attentions)
        calls.clear()


def test_inside_of_torch_stack_no_nested_tensor_comes():
    layer = make(lmengine.nn, "TransformerEncoderLayer", batch_first=True)
    with pytest.warns(UserWarning, match="enable_nested_tensor is True, but self.use_nested_tensor is False"):
        stack = torch.nn.TransformerEncoder(layer, 2).eval()
    ours = lmengine.nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(N, S, E)
    with torch.no_grad():
        expected = ours(x, src_key_padding_mask=padding(S))
        torch.testing.assert_close(stack(x, src_key_padding_mask=padding(S)), expected)
    assert ours.enable_nested_tensor and not ours.use_nested_tensor and ours.mask_check


@pytest.mark.parametrize(
    "mask, found",
    [
        (causal(S), True),
        (causal(S) < 0, True),
        (causal(S).double(), True),
        (causal(S + 1), None),
        (causal(S).clamp(min=-1e9), False),
        (torch.zeros(S, S), False),
        (causal(S).expand(N * H, S, S), False),
    ],
    ids=["float", "bool", "double", "longer", "finite", "zeros", "every head"],
)
def test_the_causal_mask_is_recognised(mask, found, monkeypatch):
    calls = []
    attend = lmengine.nn.attention.attention
    monkeypatch.setattr(lmengine.nn.attention, "attention", lambda *a, **k: calls.append(a[3]) or attend(*a, **k))
    double = mask.dtype == torch.float64
    ours = make(lmengine.nn, "TransformerEncoder", dtype=torch.float64 if double else torch.float32)
    inputs = make_inputs(ours)
    inputs = [x.double() for x in inputs] if double else inputs
    if found is None:
        with pytest.raises(RuntimeError, match=f"2D attn_mask is .* but should be \\({S}, {S}\\)"):
            ours(*inputs, mask)
        return
    ours(*inputs, mask)
    assert calls == [found] * 2
    calls.clear()
    decoder = make(lmengine.nn, "TransformerDecoder", dtype=inputs[0].dtype)
    decoder(inputs[0], inputs[0], mask)
    assert calls == [found, False] * 2


def test_the_mask_of_the_transformer():
    mask = lmengine.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    assert torch.equal(mask, torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64))


def test_custom_parts():
    encoder, decoder = torch.nn.Identity(), make(lmengine.nn, "TransformerDecoder")
    model = lmengine.nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder and model.decoder is decoder


@pytest.mark.parametrize("name", CLASSES)
def test_dropout_in_training_only(name):
    model = make(lmengine.nn, name, dropout=0.4)
    inputs = make_inputs(model)
    torch.manual_seed(1)
    first, second = model(*inputs), model(*inputs)
    torch.manual_seed(1)
    again = model(*inputs)
    assert torch.equal(first, again) and not torch.equal(first, second)
    model.eval()
    without = make(lmengine.nn, name, dropout=0.0)
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(*inputs), without(*inputs))


@pytest.mark.parametrize("name", CLASSES)
def test_copies_pickles_and_saves(name):
    ours, theirs = pair(name)
    inputs = make_inputs(ours)
    expected = ours(*inputs)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(*inputs), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(twin(*inputs), expected)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_compiles_without_a_break(name):
    torch._dynamo.reset()
    ours, theirs = pair(name, batch_first=True)
    inputs, masks = make_inputs(ours), masks_of(name, "found causal")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    grad = torch.randn(inputs[-1 if name == "Transformer" else 0].shape)
    found = (results(compiled, inputs, grad, masks), results(theirs, inputs, grad, masks))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_autocast_as_torch(name):
    ours, theirs = pair(name)
    inputs, masks = make_inputs(ours), masks_of(name, "causal and padding")
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = ours(*inputs, **masks), theirs(*inputs, **masks)
    assert mine.dtype == other.dtype
    torch.testing.assert_close(mine, other, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16(name):
    ours, theirs = pair(name, dtype=torch.bfloat16)
    inputs = [x.bfloat16() for x in make_inputs(ours)]
    exact = copy.deepcopy(theirs).double()(*(x.double() for x in inputs))
    mine, other = ours(*inputs), theirs(*inputs)
    tiny = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    assert_right(mine, other, exact, tiny=tiny)


@pytest.mark.parametrize(
    "name, configuration, shapes, masks",
    [
        ("TransformerEncoderLayer", {"activation": "tanh"}, [], {}),
        ("TransformerEncoderLayer", {"nhead": 5}, [], {}),
        ("TransformerDecoderLayer", {"nhead": 0}, [], {}),
        ("TransformerDecoderLayer", {"activation": "tanh"}, [], {}),
        ("Transformer", {"activation": "tanh"}, [], {}),
        ("TransformerEncoderLayer", {}, [(S, N, E + 1)], {}),
        ("TransformerEncoderLayer", {}, [(S, N, E)], {"is_causal": True}),
        ("TransformerEncoderLayer", {}, [(S, N, E)], {"src_mask": torch.zeros(S, S + 1)}),
        ("TransformerEncoderLayer", {}, [(S, N, E)], {"src_mask": torch.zeros(S, S, dtype=torch.int32)}),
        ("TransformerEncoderLayer", {}, [(S, N, E)], {"src_key_padding_mask": torch.zeros(N, S + 1).bool()}),
        ("TransformerDecoderLayer", {}, [(T, N, E), (S, N + 1, E)], {}),
        ("TransformerDecoder", {}, [(T, N, E), (S, N, E)], {"memory_mask": torch.zeros(T, T)}),
        ("Transformer", {}, [(S, N, E), (T, N + 1, E)], {}),
        ("Transformer", {}, [(S, N, E), (T, N, E - 1)], {}),
    ],
    ids=str,
)
def test_same_kind_of_exception(name, configuration, shapes, masks):
    raised = []
    for library in (lmengine.nn, torch.nn):
        with pytest.raises((RuntimeError, AssertionError, ZeroDivisionError, ValueError)) as information:
            model = make(library, name, **configuration)
            model(*(torch.randn(shape) for shape in shapes), **masks)
        raised.append(information.type)
    assert raised[0] is raised[1]


def test_gelu_by_function():
    ours, theirs = pair("TransformerEncoderLayer", activation=F.gelu)
    compare(ours, theirs, make_inputs(ours), {})
