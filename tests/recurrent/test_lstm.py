"""The operator lstm: numerics on every backend of this machine, edges, errors, torch.compile, instruction sets."""

import os
import subprocess
import sys

import pytest
import torch

import lmengine
from lmengine.ops.recurrent import lstm, lstm_reference
from tests.recurrent.common import PLACE_IDS, PLACES, check_against_torch, make_inputs, run, torch_lstm

SIZES = [(1, 1, 1), (3, 2, 5), (7, 16, 128), (9, 20, 100), (5, 33, 65), (4, 1, 256), (35, 20, 64)]
# Triton's interpreter is slow; 16, 48 and 128 units take the kernel of a whole sequence in 16 bits, others that of a step
INTERPRETED_SIZES = [(1, 1, 1), (3, 2, 5), (3, 17, 48), (2, 2, 128), (2, 18, 70), (1, 1, 160)]


def sizes_of(place):
    backend, device, _ = place
    return INTERPRETED_SIZES if backend == "triton" and device == "cpu" else SIZES


@pytest.fixture(params=PLACES, ids=PLACE_IDS)
def place(request):
    backend, device, dtype = request.param
    with lmengine.use_backend(backend):
        yield device, dtype


@pytest.mark.parametrize(
    "place, sizes",
    [
        pytest.param(place, sizes, id=f"{name}-{sizes}")
        for place, name in zip(PLACES, PLACE_IDS, strict=True)
        for sizes in sizes_of(place)
    ],
    indirect=["place"],
)
def test_numerics(place, sizes):
    device, dtype = place
    inputs = make_inputs(*sizes, dtype, device)
    check_against_torch(lstm, inputs)
    check_against_torch(lstm, inputs, backward=False)


def test_large_magnitudes_saturate(place):
    device, dtype = place
    inputs = make_inputs(6, 3, 40, dtype, device, scale=200.0)
    check_against_torch(lstm, inputs, tiny=1e-5)
    outputs, _, cell = lstm(*inputs)
    assert outputs.isfinite().all() and 0.999 < outputs.abs().max().item() <= 1 and cell.isfinite().all()


def test_strided_inputs(place):
    device, dtype = place
    gates, weight, hidden, cell = make_inputs(5, 6, 24, dtype, device)
    strided = (
        gates.transpose(0, 1).contiguous().transpose(0, 1),
        weight.t().contiguous().t(),
        torch.stack((hidden, hidden), dim=2)[..., 0],
        cell.t().contiguous().t(),
    )
    assert not any(x.is_contiguous() for x in strided)
    check_against_torch(lstm, strided)
    for ours, same in zip(run(lstm, strided), run(lstm, (gates, weight, hidden, cell)), strict=True):
        torch.testing.assert_close(ours, same, rtol=0, atol=0)


@pytest.mark.parametrize("length, batch, hidden", [(0, 3, 8), (4, 0, 8), (0, 0, 8)])
def test_empty(place, length, batch, hidden):
    device, dtype = place
    inputs = [x.requires_grad_() for x in make_inputs(length, batch, hidden, dtype, device)]
    outputs = lstm(*inputs)
    assert [x.shape for x in outputs] == [(length, batch, hidden), (batch, hidden), (batch, hidden)]
    if length == 0:
        torch.testing.assert_close(outputs[1], inputs[2])
        torch.testing.assert_close(outputs[2], inputs[3])
    grads = torch.autograd.grad(sum(x.sum() for x in outputs), inputs)
    assert not grads[1].any()
    if length == 0:
        assert (grads[2] == 1).all() and (grads[3] == 1).all()


def test_nan_stays_in_its_row(place):
    device, dtype = place
    inputs = make_inputs(4, 5, 24, dtype, device)
    inputs[0][1, 2, 7] = float("nan")
    outputs, final_hidden, final_cell = lstm(*inputs)
    rows = torch.arange(5) != 2
    assert outputs[:, rows].isfinite().all() and outputs[0].isfinite().all()
    assert outputs[1, 2].isnan().sum() == 1 and outputs[2, 2].isnan().all()
    assert final_hidden[2].isnan().all() and final_cell[rows].isfinite().all()


def test_only_some_outputs_have_gradients(place):
    device, dtype = place
    inputs = make_inputs(6, 4, 20, dtype, device)
    for which in range(3):
        ours, theirs, exact = (
            torch.autograd.grad(function(*leaves)[which].sum(), leaves, allow_unused=True)
            for function, leaves in (
                (lstm, [x.clone().requires_grad_() for x in inputs]),
                (torch_lstm, [x.clone().requires_grad_() for x in inputs]),
                (lstm_reference, [x.double().requires_grad_() for x in inputs]),
            )
        )
        for mine, other, right in zip(ours, theirs, exact, strict=True):
            error, bound = (mine - right).abs().max(), 2 * (other - right).abs().max() + 1e-6
            assert error <= bound, f"output {which}: {error} > {bound}"


def test_one_thread_and_more_threads_than_work():
    if lmengine.backends.unusable("cpu"):
        pytest.skip("no compiled library")
    inputs = make_inputs(6, 9, 33)
    threads = torch.get_num_threads()
    expected = run(lstm, inputs)
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            check_against_torch(lstm, inputs)
            for ours, same in zip(run(lstm, inputs), expected, strict=True):
                torch.testing.assert_close(ours, same)
    finally:
        torch.set_num_threads(threads)


def test_opcheck(request, place):
    device, dtype = place
    name = "lstm_triton" if request.node.callspec.id.startswith("triton") else "lstm"
    forward, backward = (getattr(torch.ops.lmengine, f"{name}_{direction}") for direction in ("forward", "backward"))
    inputs = [x.requires_grad_() for x in make_inputs(3, 2, 8, dtype, device)]
    torch.library.opcheck(forward, (*inputs, True))
    with torch.no_grad():
        torch.library.opcheck(forward, (*(x.detach() for x in inputs), False))
        outputs, _, _, cells, gates = forward(*inputs, True)
    for grads in ((outputs, None, None), (outputs, inputs[2].detach(), inputs[3].detach())):
        arguments = (*grads, inputs[1].detach(), inputs[3].detach(), cells, gates)
        torch.library.opcheck(backward, arguments)


def test_compiles_without_a_break(place):
    device, dtype = place
    inputs = [x.requires_grad_() for x in make_inputs(4, 3, 16, dtype, device)]

    def loss(*tensors):
        outputs, hidden, cell = lstm(*tensors)
        return (outputs * outputs).sum() + hidden.sum() + cell.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*inputs), inputs)
    for mine, eager in zip(ours, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(mine, eager)


def test_backward_needs_what_forward_keeps():
    inputs = [x.requires_grad_() for x in make_inputs(2, 2, 4)]
    outputs = torch.ops.lmengine.lstm_forward(*inputs, False)[0]
    with pytest.raises(RuntimeError, match="keep=False"):
        outputs.sum().backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda g, w, h, c: (g[0], w, h, c), ValueError, r"input_gates: expected shape \(length, batch, 4 \* hidden\)"),
        (lambda g, w, h, c: (g[..., :6], w, h, c), ValueError, "input_gates: expected shape"),
        (lambda g, w, h, c: (g, w.t(), h, c), ValueError, r"weight_hh: expected shape \(16, 4\), got \(4, 16\)"),
        (lambda g, w, h, c: (g, w, h[:1], c), ValueError, r"hidden: expected shape \(2, 4\), got \(1, 4\)"),
        (lambda g, w, h, c: (g, w, h, c[:, :3]), ValueError, r"cell: expected shape \(2, 4\), got \(2, 3\)"),
        (lambda g, w, h, c: (g, w, h, c.double()), TypeError, "cell: expected torch.float32"),
        (lambda g, w, h, c: (g, w, h, None), TypeError, "cell: expected a tensor, got NoneType"),
        (lambda g, w, h, c: (g.long(), w.long(), h.long(), c.long()), TypeError, "floating-point"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        lstm(*change(*make_inputs(3, 2, 4)))


def test_forced_backend_says_why_not():
    inputs = make_inputs(3, 2, 4, torch.float64)
    with lmengine.use_backend("cpu"), pytest.raises(lmengine.UnsupportedCall, match="input_gates: expected float32"):
        lstm(*inputs)
    assert lmengine.explain(lstm, *make_inputs(3, 2, 4)).backend == "cpu"


CHILD = """
import torch
from lmengine.ops.recurrent import lstm
from tests.recurrent.common import check_against_torch, make_inputs
import lmengine
assert lmengine.info()["instruction set"] == {isa!r}, lmengine.info()
for dtype in (torch.float32, torch.bfloat16):
    for sizes in ((5, 7, 21), (3, 16, 64), (4, 2, 130)):
        check_against_torch(lstm, make_inputs(*sizes, dtype))
"""


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_other_instruction_sets(isa):
    best = lmengine.info()["instruction set"]
    if best is None or isa > best:
        pytest.skip(f"this processor has {best}")
    environment = {**os.environ, "LMENGINE_ISA": isa}
    subprocess.run([sys.executable, "-c", CHILD.format(isa=isa)], env=environment, check=True)
