"""nn.LSTM against torch.nn.LSTM: parameters, results, gradients, exceptions, copies, compilation."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import lmengine
import lmengine.nn
from tests.numerics import assert_right

CONFIGURATIONS = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"batch_first": True, "num_layers": 2},
    {"bidirectional": True},
    {"bidirectional": True, "num_layers": 2, "batch_first": True, "bias": False},
]


def pair(*args, dtype=torch.float32, **kwargs):
    """Ours and PyTorch's layer, built under one seed."""
    layers = []
    for cls in (lmengine.nn.LSTM, torch.nn.LSTM):
        torch.manual_seed(3)
        layers.append(cls(*args, dtype=dtype, **kwargs))
    return layers


def results(layer, input, hx, grads):
    """Outputs, states and all gradients of a layer."""
    leaves = [x.detach().requires_grad_() for x in (input, *(hx or ()))]
    output, (h, c) = layer(leaves[0], (leaves[1], leaves[2]) if hx else None)
    gradients = torch.autograd.grad((output, h, c), [*leaves, *layer.parameters()], grads)
    return [output.detach(), h.detach(), c.detach(), *gradients]


def compare(ours, theirs, input, hx=None, tiny=5e-6):
    output, (h, c) = theirs(input, hx)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (output, h, c)]
    exact_layer = copy.deepcopy(theirs).double()
    exact = results(exact_layer, input.double(), hx and [x.double() for x in hx], [x.double() for x in grads])
    pairs = zip(results(ours, input, hx, grads), results(theirs, input, hx, grads), exact, strict=True)
    for i, (mine, other, right) in enumerate(pairs):
        assert_right(mine, other, right, tiny=tiny, name=f"result {i}")


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_same_parameters_under_the_same_seed(configuration):
    ours, theirs = pair(5, 7, **configuration)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_numerics(configuration, dtype):
    # with fewer values than this the largest of them is a matter of luck in bfloat16
    ours, theirs = pair(24, 33, dtype=dtype, **configuration)
    torch.manual_seed(0)
    input = torch.randn(9, 12, 24, dtype=dtype)
    batch = 9 if ours.batch_first else 12
    states = ours.num_layers * (1 + ours.bidirectional)
    hx = (torch.randn(states, batch, 33, dtype=dtype), torch.randn(states, batch, 33, dtype=dtype))
    compare(ours, theirs, input)
    compare(ours, theirs, input, hx)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(batch_first):
    ours, theirs = pair(5, 7, num_layers=2, bidirectional=True, batch_first=batch_first)
    compare(ours, theirs, torch.randn(6, 5))
    compare(ours, theirs, torch.randn(6, 5), (torch.randn(4, 7), torch.randn(4, 7)))


@pytest.mark.parametrize("given_hx", [False, True])
@pytest.mark.parametrize(
    "configuration", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}], ids=str
)
def test_packed_sequences(configuration, given_hx):
    ours, theirs = pair(5, 7, **configuration)
    torch.manual_seed(0)
    leaves = [torch.randn(length, 5, requires_grad=True) for length in (3, 7, 1, 7, 4)]
    states = ours.num_layers * (1 + ours.bidirectional)
    hx = tuple(torch.randn(states, 5, 7, requires_grad=True) for _ in range(2)) if given_hx else None
    found = []
    for layer in (ours, theirs):
        output, (h, c) = layer(pack_sequence(leaves, enforce_sorted=False), hx)
        padded, lengths = pad_packed_sequence(output)
        loss = (padded * padded).sum() + (h * c).sum()
        grads = torch.autograd.grad(loss, [*leaves, *(hx or ()), *layer.parameters()])
        found.append([padded, lengths, h, c, *grads])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_packed_and_sorted():
    ours, theirs = pair(5, 7)
    packed = pack_padded_sequence(torch.randn(6, 3, 5), torch.tensor([6, 4, 4]))
    for mine, other in zip(ours(packed)[0], theirs(packed)[0], strict=True):
        assert (mine is None and other is None) or torch.allclose(mine.float(), other.float(), atol=1e-6)


def test_dropout_drops_what_torch_drops():
    ours, theirs = pair(5, 7, num_layers=3, dropout=0.4)
    input = torch.randn(4, 6, 5)
    outputs = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(layer(input)[0])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(ours.eval()(input)[0], theirs.eval()(input)[0])
    assert not torch.allclose(outputs[0], ours(input)[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_size": 0},
        {"hidden_size": -1},
        {"input_size": 2.5},
        {"num_layers": 0},
        {"dropout": 1.5},
        {"dropout": True},
        {"bias": 1},
        {"batch_first": "no"},
    ],
    ids=str,
)
def test_same_exceptions_at_construction(arguments):
    raised = []
    for cls in (lmengine.nn.LSTM, torch.nn.LSTM):
        with pytest.raises((TypeError, ValueError)) as information:
            cls(**{"input_size": 5, "hidden_size": 7, **arguments})
        raised.append((information.type, str(information.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize(
    "input, hx",
    [
        (torch.randn(5), None),
        (torch.randn(2, 2, 2, 5), None),
        (torch.randn(4, 6, 3), None),
        (torch.randn(4, 6, 5).double(), None),
        (torch.randn(0, 6, 5), None),
        (torch.randn(4, 6, 5), (torch.randn(6, 7), torch.randn(6, 7))),
        (torch.randn(4, 5), (torch.randn(1, 1, 7), torch.randn(1, 1, 7))),
        (torch.randn(4, 6, 5), (torch.randn(1, 6, 8), torch.randn(1, 6, 7))),
        (torch.randn(4, 6, 5), (torch.randn(1, 6, 7), torch.randn(2, 6, 7))),
    ],
)
def test_same_exceptions_in_forward(input, hx):
    raised = []
    for layer in pair(5, 7):
        with pytest.raises((RuntimeError, ValueError)) as information:
            layer(input, hx)
        raised.append((information.type, str(information.value)))
    assert raised[0] == raised[1]


def test_no_projections():
    with pytest.raises(NotImplementedError, match="proj_size: expected 0, got 3"):
        lmengine.nn.LSTM(5, 7, proj_size=3)


def test_copies_pickles_and_saves():
    ours, theirs = pair(5, 7, num_layers=2)
    input = torch.randn(4, 6, 5)
    expected = ours(input)[0]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(input)[0], expected)
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert not torch.equal(twin(input)[0], expected)
    ours.flatten_parameters()
    converted = [layer.bfloat16()(input.bfloat16())[0] for layer in (ours, theirs)]
    torch.testing.assert_close(*converted, rtol=0.02, atol=0.02)


def test_functional_call_parametrize_and_hooks():
    ours, theirs = pair(5, 7)
    input = torch.randn(4, 6, 5)
    zeros = {name: torch.zeros_like(value) for name, value in ours.named_parameters()}
    assert not torch.func.functional_call(ours, zeros, (input,))[0].any()

    class Halve(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    with torch.no_grad():
        theirs.weight_hh_l0 /= 2
    parametrize.register_parametrization(ours, "weight_hh_l0", Halve())
    torch.testing.assert_close(ours(input)[0], theirs(input)[0])
    calls = []
    ours.register_forward_hook(lambda *args: calls.append(args))
    ours(input)
    assert len(calls) == 1


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_without_a_break(backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, theirs = (layer.to(device) for layer in pair(5, 7, num_layers=2, bidirectional=True))
    input = torch.randn(4, 6, 5, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with lmengine.use_backend(backend):
        output, (h, c) = compiled(input)
        ours_grads = torch.autograd.grad(output.square().sum(), list(ours.parameters()))
    exact, (h_n, c_n) = theirs(input)
    for mine, other in ((output, exact), (h, h_n), (c, c_n)):
        torch.testing.assert_close(mine, other)
    theirs_grads = torch.autograd.grad(exact.square().sum(), list(theirs.parameters()))
    for mine, other in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_autocast_as_torch():
    ours, theirs = pair(5, 7, num_layers=2)
    input = torch.randn(4, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = ours(input)[0], theirs(input)[0]
    assert mine.dtype == other.dtype
    torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


def test_empty_batch():
    ours, _ = pair(5, 7, bidirectional=True)
    output, (h, c) = ours(torch.randn(4, 0, 5))
    assert output.shape == (4, 0, 14) and h.shape == c.shape == (2, 0, 7)
