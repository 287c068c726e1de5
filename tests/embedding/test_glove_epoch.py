"""GloVe's epoch: every backend against the reference in float64, and what goes wrong."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import lmengine
from lmengine.backends import unusable
from lmengine.ops.embedding import glove_epoch, glove_schedule
from tests.numerics import assert_right

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(unusable(name) is not None, reason=str(unusable(name))))
    for name in ("cuda", "triton", "cpu")
]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def problem(vocabulary=12, dim=10, entries=60, partitions=3, seed=0, scale=0.3):
    """Arguments up to the stages, in float32."""
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(2, vocabulary, dim + 1, generator=generator) * scale
    squared = 1 + torch.rand(2, vocabulary, dim + 1, generator=generator)
    rows, columns = torch.randint(0, vocabulary, (2, entries), generator=generator).int()
    values = torch.rand(entries, generator=generator).exp() * torch.randint(1, 200, (entries,), generator=generator)
    order, stages = glove_schedule(rows, columns, vocabulary, partitions, generator)
    return [parameters, squared, rows[order], columns[order], values[order], stages]


def run(backend, arguments, dtype=torch.float32, device="cpu", **options):
    copies = [t.to(device, dtype if t.is_floating_point() else t.dtype, copy=True) for t in arguments]
    with lmengine.use_backend(backend):
        cost = glove_epoch(*copies, **options)
    return cost.cpu(), copies[0].cpu(), copies[1].cpu()


def check(backend, arguments, **options):
    assert_epoch(run(backend, arguments, device=device_of(backend), **options), arguments, **options)


def assert_epoch(ours, arguments, **options):
    """Hold cost, parameters and squared gradients after an epoch against the reference."""
    same = run("reference", arguments, **options)
    right = run("reference", arguments, torch.float64, **options)
    for name, *tensors in zip(("cost", "parameters", "squared_gradients"), ours, same, right, strict=True):
        assert_right(*tensors, name=name, tiny=1e-6 * (1 + right[0].abs().item() if name == "cost" else 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [1, 7, 8, 16, 17, 50, 100, 300])
def test_numerics_by_dim(backend, dim):
    check(backend, problem(dim=dim, scale=dim**-0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("partitions", [1, 2, 5, 16])
@pytest.mark.parametrize("entries", [0, 1, 65, 200])
def test_numerics_by_entries(backend, partitions, entries):
    check(backend, problem(vocabulary=20, entries=entries, partitions=partitions, seed=entries), eta=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"eta": 0.2}, {"x_max": 5.0, "alpha": 0.5}, {"grad_clip": 0.01}, {"x_max": 1e6}, {"alpha": 1.0}]
)
def test_options(backend, options):
    check(backend, problem(), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend):
    """Counts over the whole range of float32, large vectors, and squared gradients over many magnitudes."""
    arguments = problem(entries=40, scale=30.0)
    arguments[4] = torch.logspace(-30, 30, 40)
    arguments[1] = torch.logspace(-3, 20, arguments[1].numel()).view_as(arguments[1])
    check(backend, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    """What a NaN touches becomes NaN, as in the reference, and is not clipped to a number."""
    arguments = problem(vocabulary=30, entries=30)
    arguments[0][0, arguments[2][7], 3] = torch.nan
    check(backend, arguments)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_many_partitions_on_a_gpu(backend):
    """Blocks at work on neighbouring vectors at a time: the same bits each time, and nearly the CPU's."""
    arguments = problem(vocabulary=5000, dim=100, entries=300_000, partitions=256, scale=0.1)
    first, again = (run(backend, arguments, device=device_of(backend)) for _ in range(2))
    for ours, same, right in zip(first, again, run("cpu", arguments), strict=True):
        assert torch.equal(ours, same)
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3)


def test_a_step_by_hand():
    """One entry, against the gradient that autograd finds of the weighted square."""
    parameters, squared, *_ = (tensor.double() for tensor in problem(vocabulary=2, dim=4, entries=1))
    entry = [torch.tensor([1]).int(), torch.tensor([0]).int(), torch.tensor([20.0]).double(), torch.tensor([[0, 1]])]
    leaf = parameters.clone().requires_grad_()
    word, context = leaf[0, 1], leaf[1, 0]
    difference = word[:-1] @ context[:-1] + word[-1] + context[-1] - torch.tensor(20.0).double().log()
    cost = (20 / 100) ** 0.75 * difference**2 / 2
    cost.backward()
    gradient = 0.05 * leaf.grad
    expected = parameters - gradient / squared.sqrt(), squared + gradient**2
    found = run("reference", [parameters, squared, *entry], torch.float64)
    for ours, right in zip(found, (cost.detach(), *expected), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("partitions", [1, 4, 32])
def test_schedule(partitions):
    rows, columns = torch.randint(0, 50, (2, 2000))
    order, stages = glove_schedule(rows, columns, 50, partitions, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(2000))
    assert stages.shape == (partitions, partitions + 1)
    assert int((stages[:, -1] - stages[:, 0]).sum()) == 2000
    for bounds in stages.tolist():
        seen_rows, seen_columns = set(), set()
        for begin, end in itertools.pairwise(bounds):
            entries = order[begin:end]
            here_rows, here_columns = set(rows[entries].tolist()), set(columns[entries].tolist())
            assert not here_rows & seen_rows and not here_columns & seen_columns
            seen_rows |= here_rows
            seen_columns |= here_columns
    again, _ = glove_schedule(rows, columns, 50, partitions, torch.Generator().manual_seed(0))
    assert torch.equal(order, again)


def test_schedule_is_balanced():
    """With word frequencies by Zipf's law no partition has twice its share."""
    frequency = 1 / torch.arange(1, 5001).double()
    words = torch.multinomial(frequency, 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    _, stages = glove_schedule(words, words.flip(0), 5000, 8)
    assert stages.diff(dim=1).max() < 2 * 100_000 / 64 * 1.5


BAD_ENTRIES = [
    (2, 12, r"rows: expected 0 to 11, got 12 at entry 5"),
    (3, -1, r"columns: expected 0 to 11, got -1 at entry 5"),
    (4, float("nan"), r"values: expected finite numbers above 0, got nan at entry 5"),
    (4, float("inf"), r"values: expected finite numbers above 0, got inf at entry 5"),
    (4, 0.0, r"values: expected finite numbers above 0, got 0 at entry 5"),
    (5, 61, r"stages: expected rows that do not fall, of numbers from 0 to 60"),
]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("argument", "value", "message"), BAD_ENTRIES)
def test_bad_entries(backend, argument, value, message):
    arguments = [tensor.to(device_of(backend)) for tensor in problem()]
    before = arguments[0].clone()
    arguments[argument].view(-1)[5] = value
    with pytest.raises(RuntimeError, match=message), lmengine.use_backend(backend):
        glove_epoch(*arguments)
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        (0, lambda t: t[0], ValueError, r"parameters: expected shape \(2, vocabulary, dim \+ 1\), got \(12, 11\)"),
        (0, lambda t: t.transpose(1, 2), ValueError, r"parameters: expected a contiguous tensor"),
        (1, lambda t: t[:, :-1], ValueError, r"squared_gradients: expected a contiguous tensor of the parameters'"),
        (1, lambda t: t.double(), TypeError, r"squared_gradients: expected the parameters' dtype torch.float32"),
        (2, lambda t: t.long(), TypeError, r"rows: expected dtype int32, got torch.int64"),
        (3, lambda t: t[:-1], ValueError, r"columns: expected shape \(entries,\) = \(60,\), got \(59,\)"),
        (5, lambda t: t.int(), TypeError, r"stages: expected dtype int64, got torch.int32"),
        (5, lambda t: t[0], ValueError, r"stages: expected shape \(stages, partitions \+ 1\), got \(4,\)"),
    ],
)
def test_bad_arguments(argument, change, error, message):
    arguments = problem()
    arguments[argument] = change(arguments[argument])
    with pytest.raises(error, match=message):
        glove_epoch(*arguments)
    with pytest.raises(ValueError, match=r"eta: expected a finite number above 0, got 0"):
        glove_epoch(*problem(), eta=0)


def test_float64_runs_on_the_reference_only():
    arguments = [tensor.double() if tensor.is_floating_point() else tensor for tensor in problem()]
    with pytest.raises(lmengine.UnsupportedCall, match=r"parameters: expected dtype float32, got torch.float64"):
        run("cpu", arguments, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    operators = torch.ops.lmengine
    operator = operators.glove_epoch_triton if backend == "triton" else operators.glove_epoch
    arguments = [tensor.to(device_of(backend)) for tensor in problem()]
    torch.library.opcheck(
        operator.default,
        (*arguments, 0.05, 100.0, 0.75, 100.0),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    right = run(backend, arguments, device=device_of(backend))
    with lmengine.use_backend(backend):
        compiled = torch.compile(lambda *a: glove_epoch(*a), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments).cpu(), right[0])
    assert torch.equal(arguments[0].cpu(), right[1])


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_lower_instruction_set(isa):
    """The numerics tests once more, on a processor without the newest instructions."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "(numerics or options or extreme or nan) and cpu"]
    done = subprocess.run(command, env={**os.environ, "LMENGINE_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
