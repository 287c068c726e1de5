"""The CUDA C++ kernels of the LSTM on the CPU, under AddressSanitizer and UBSan, and under ThreadSanitizer."""

import pytest
import torch

from lmengine.ops.recurrent import lstm_reference
from tests import cuda_host
from tests.numerics import assert_right
from tests.recurrent.common import make_inputs, run, torch_lstm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS, WHOLE, CHOSEN = (0, 1, -1)
# batch 13 and 35 leave rows of a block without work, hidden 5, 27 and 45 units and depth
SIZES = [(1, 1, 5), (3, 13, 27), (2, 35, 45)]


@pytest.fixture(scope="module")
def libraries():
    return {kind: cuda_host.build("recurrent", kind=kind) for kind in ("memory", "races")}


def plan_numbers(forward, rows, few, whole):
    """Rows, tiles and whether the sequence is one launch; rows 0 leaves the choice to the launcher."""
    tiles = (4 if forward else 2) * (1 if few else 2)
    return (0, 0, 0) if whole == CHOSEN else (rows, tiles, whole)


def forward(library, inputs, plan, keep=True):
    """outputs, final_cell, cells, gates: what lstm_forward gives besides the copy of the last output."""
    length, batch, size = inputs[0].shape
    dtype, units = inputs[0].dtype, size // 4
    outputs = {
        "outputs": ((length, batch, units), dtype),
        "final_cell": ((batch, units), dtype),
        "cells": ((length, batch, units), torch.float32) if keep else None,
        "gates": ((length, batch, size), dtype) if keep else None,
    }
    names = ("input_gates", "weight_hh", "hidden", "cell")
    numbers = (length, batch, units, DTYPES.index(dtype), *plan)
    return cuda_host.run(library, "lstm_forward", dict(zip(names, inputs, strict=True)), outputs, *numbers)


def backward(library, grads, inputs, found, plan):
    """The gradients of input_gates, hidden and cell."""
    length, batch, size = inputs[0].shape
    dtype, units = inputs[0].dtype, size // 4
    names = ("grad_outputs", "grad_final_hidden", "grad_final_cell", "weight_hh", "cell", "cells", "gates")
    values = (*grads, inputs[1], inputs[3], found["cells"], found["gates"])
    outputs = {
        "grad_input_gates": ((length, batch, size), dtype),
        "grad_hidden": ((batch, units), dtype),
        "grad_cell": ((batch, units), dtype),
    }
    numbers = (length, batch, units, DTYPES.index(dtype), *plan)
    result = cuda_host.run(library, "lstm_backward", dict(zip(names, values, strict=True)), outputs, *numbers)
    return list(result.values())


def check(library, inputs, rows, few, whole, given=(True, True, True), tiny=2e-6):
    """Outputs and all gradients against float64, by the rule of tests/numerics.py."""
    length, batch, size = inputs[0].shape
    shapes = ((length, batch, size // 4), (batch, size // 4), (batch, size // 4))
    grads = [torch.randn(shape).to(inputs[0].dtype) for shape in shapes]
    found = forward(library, inputs, plan_numbers(True, rows, few, whole))
    some = [grad if wanted else None for grad, wanted in zip(grads, given, strict=True)]
    gradients = backward(library, some, inputs, found, plan_numbers(False, rows, few, whole))

    all_grads = [grad if wanted else torch.zeros_like(grad) for grad, wanted in zip(grads, given, strict=True)]
    theirs = run(torch_lstm, inputs, all_grads)
    exact = run(lstm_reference, [x.double() for x in inputs], [grad.double() for grad in all_grads])
    ours = [found["outputs"], found["outputs"][-1], found["final_cell"], gradients[0], *gradients[1:]]
    names = ("outputs", "final_hidden", "final_cell", "grad_input_gates", "grad_hidden", "grad_cell")
    for name, mine, index in zip(names, ours, (0, 1, 2, 3, 5, 6), strict=True):
        # of few values the largest error is a matter of luck, PyTorch's too: then a unit in the last place is let pass
        unit = torch.finfo(mine.dtype).eps * exact[index].abs().max().item() if mine.numel() < 1000 else 0.0
        assert_right(mine, theirs[index], exact[index], tiny=max(tiny, unit), name=name)


def fresh_inputs(length, batch, hidden, dtype, scale=1.0):
    return make_inputs(length, batch, hidden, dtype, scale=scale, seed=int(torch.randint(2**31, ())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("whole", [STEPS, WHOLE], ids=["steps", "whole"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_numerics(libraries, sizes, whole, dtype):
    rows = 64 if sizes[1] > 32 else 32 if sizes[1] > 1 else 16
    check(libraries["memory"], fresh_inputs(*sizes, dtype), rows, False, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smaller_slices_and_more_batch_groups(libraries, dtype):
    check(libraries["memory"], fresh_inputs(3, 18, 50, dtype), 16, True, WHOLE)  # 7 x 2 and 4 x 2 blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depth_divided_among_warps(libraries, dtype):
    """Hidden 100 gives a product of 4 steps forward and 13 backward for 8 warps, with zeros at the end."""
    check(libraries["memory"], fresh_inputs(2, 2, 100, dtype), 16, False, WHOLE)


@pytest.mark.parametrize("sizes", [(2, 3, 20), (2, 17, 70)], ids=str)
def test_plan_of_the_launcher(libraries, sizes):
    check(libraries["memory"], fresh_inputs(*sizes, torch.bfloat16), 0, False, CHOSEN)


@pytest.mark.parametrize("whole", [STEPS, WHOLE], ids=["steps", "whole"])
@pytest.mark.parametrize("given", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_some_gradients_only(libraries, given, whole):
    check(libraries["memory"], fresh_inputs(3, 5, 19, torch.float32), 16, False, whole, given)


@pytest.mark.parametrize("whole", [STEPS, WHOLE], ids=["steps", "whole"])
def test_without_kept_state(libraries, whole):
    inputs, plan = fresh_inputs(3, 5, 19, torch.bfloat16), plan_numbers(True, 16, False, whole)
    kept = forward(libraries["memory"], inputs, plan)
    lean = forward(libraries["memory"], inputs, plan, keep=False)
    assert lean["cells"] is None and lean["gates"] is None
    for name in ("outputs", "final_cell"):
        assert torch.equal(lean[name], kept[name])


def test_large_magnitudes(libraries):
    # the forget gate's gradient is 1 - f, off by 6e-8 in float where f is near 1, times cells of several hundred
    inputs = fresh_inputs(3, 3, 20, torch.float32, scale=200.0)
    check(libraries["memory"], inputs, 16, False, WHOLE, tiny=6e-8 * 2 * inputs[3].abs().max().item() * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_magnitudes_in_16_bits(libraries, dtype):
    """1 - f of a rounded f is worth nothing where f is near 1, so of the gradients only that they are finite."""
    inputs = fresh_inputs(3, 3, 20, dtype, scale=200.0)
    found = forward(libraries["memory"], inputs, plan_numbers(True, 16, False, WHOLE))
    theirs, exact = run(torch_lstm, inputs), run(lstm_reference, [x.double() for x in inputs])
    for name, index in (("outputs", 0), ("final_cell", 2)):
        unit = torch.finfo(dtype).eps * exact[index].abs().max().item()
        assert_right(found[name], theirs[index], exact[index], tiny=unit, name=name)
    grads = [torch.randn(found[name].shape).to(dtype) for name in ("outputs", "final_cell", "final_cell")]
    for grad in backward(libraries["memory"], grads, inputs, found, plan_numbers(False, 16, False, WHOLE)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [STEPS, WHOLE], ids=["steps", "whole"])
def test_no_race(libraries, whole, dtype):
    check(libraries["races"], fresh_inputs(3, 5, 35, dtype), 16, False, whole)  # 3 and 2 slices


def plans(libraries, length, batch, hidden, dtype):
    outputs = {"forward": ((3,), torch.int64), "backward": ((3,), torch.int64)}
    found = cuda_host.run(libraries["memory"], "lstm_plans", {}, outputs, length, batch, hidden, DTYPES.index(dtype))
    return found["forward"].tolist(), found["backward"].tolist()


def test_plans_fit(libraries):
    """The emulated device has 4 multiprocessors, and 163 KB of shared memory each."""
    assert all(plan[2] == WHOLE for plan in plans(libraries, 4, 16, 32, torch.bfloat16))
    assert all(plan[2] == STEPS for plan in plans(libraries, 4, 16, 512, torch.bfloat16))  # too many slices
    assert all(plan[0] == 64 for plan in plans(libraries, 4, 10**6, 512, torch.bfloat16))
