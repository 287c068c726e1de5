"""GloVe's epoch on a GPU, run on the CPU under sanitizers, against the reference in float64."""

import numpy as np
import pytest
import torch

from tests import cuda_host
from tests.embedding.test_glove_epoch import BAD_ENTRIES, assert_epoch, problem


@pytest.fixture(scope="module")
def memory_library():
    return cuda_host.build("embedding")


@pytest.fixture(params=["memory", "races"])
def library(request, memory_library):
    return memory_library if request.param == "memory" else cuda_host.build("embedding", kind="races")


def epoch(library, arguments, eta=0.05, x_max=100.0, alpha=0.75, grad_clip=100.0):
    """Cost, parameters and squared gradients after an epoch; also checks the single costs."""
    parameters, squared, rows, columns, values, stages = arguments
    vocabulary, dim, partitions = parameters.shape[1], parameters.shape[2] - 1, stages.shape[1] - 1
    inputs = {"rows": rows, "columns": columns, "values": values, "stages": stages}
    outputs = {
        "parameters": parameters,
        "squared_gradients": squared,
        "costs": ((len(stages), partitions), torch.float64),
        "cost": ((), torch.float64),
    }
    numbers = (vocabulary, dim, len(stages), partitions, eta, x_max, alpha, grad_clip)
    found = cuda_host.run(library, "glove_epoch", inputs, outputs, *numbers)
    assert found["costs"].sum().item() == pytest.approx(found["cost"].item(), nan_ok=True)
    assert (found["costs"][stages.diff(dim=1) == 0] == 0).all()
    return found["cost"], found["parameters"], found["squared_gradients"]


def check(library, arguments, **options):
    assert_epoch(epoch(library, arguments, **options), arguments, **options)


@pytest.mark.parametrize("dim", [1, 31, 32, 63, 64, 100, 127, 128, 223, 300, 319, 511, 512, 600])
def test_numerics_by_dim(memory_library, dim):
    check(memory_library, problem(dim=dim, scale=dim**-0.5, entries=40))


@pytest.mark.parametrize("dim", [5, 100, 520])
@pytest.mark.parametrize("partitions", [1, 2, 5])
def test_numerics_by_partitions(library, dim, partitions):
    """Partitions of more than 32 entries, empty ones, warps without a partition."""
    entries = 150 if dim == 5 else 40
    arguments = problem(20, dim, entries, partitions, seed=dim, scale=dim**-0.5)
    check(library, arguments, eta=0.1)


@pytest.mark.parametrize(("entries", "partitions"), [(0, 3), (1, 1), (1, 6)])
def test_hardly_any_entries(memory_library, entries, partitions):
    check(memory_library, problem(vocabulary=10, entries=entries, partitions=partitions))


def test_no_stage(memory_library):
    arguments = problem()
    arguments[5] = arguments[5][:0]
    cost, parameters, squared = epoch(memory_library, arguments)
    assert cost == 0 and torch.equal(parameters, arguments[0]) and torch.equal(squared, arguments[1])


@pytest.mark.parametrize("dim", [3, 50])
@pytest.mark.parametrize("pattern", ["same row", "same column", "same entry", "turns"])
def test_vectors_of_neighbouring_entries(library, dim, pattern):
    """Runs of entries that share a vector, over the ends of batches of 32."""
    arguments = problem(vocabulary=5, dim=dim, entries=70, partitions=1)
    turns = torch.arange(70).int()
    if pattern in ("same row", "same entry"):
        arguments[2] = turns // 40
    if pattern in ("same column", "same entry"):
        arguments[3] = turns // 36
    if pattern == "turns":
        arguments[2], arguments[3] = turns % 2, turns // 2 % 2
    check(library, arguments)


@pytest.mark.parametrize(
    "options", [{"eta": 0.2}, {"x_max": 5.0, "alpha": 0.5}, {"grad_clip": 0.01}, {"x_max": 1e6}, {"alpha": 1.0}]
)
def test_options(memory_library, options):
    check(memory_library, problem(), **options)


def test_extreme_values(memory_library):
    arguments = problem(entries=40, scale=30.0)
    arguments[4] = torch.logspace(-30, 30, 40)
    arguments[1] = torch.logspace(-3, 20, arguments[1].numel()).view_as(arguments[1])
    check(memory_library, arguments)


def test_nan_is_not_hidden(memory_library):
    """What a NaN touches becomes NaN, as in the reference, and is not clipped to a number."""
    arguments = problem(vocabulary=30, entries=30)
    arguments[0][0, arguments[2][7], 3] = torch.nan
    check(memory_library, arguments)


def check_entries(library, arguments):
    parameters, _, rows, columns, values, stages = arguments
    inputs = {"rows": rows, "columns": columns, "values": values, "stages": stages}
    numbers = (parameters.shape[1], len(stages), stages.shape[1] - 1, len(rows))
    return cuda_host.run(library, "check_entries", inputs, {"found": ((4,), np.int64)}, *numbers)["found"].tolist()


@pytest.mark.parametrize(("argument", "value", "message"), BAD_ENTRIES)
def test_bad_entries(memory_library, argument, value, message):
    arguments = problem()
    arguments[argument].view(-1)[[9, 5]] = value
    if argument == 5:
        assert check_entries(memory_library, arguments) == [-1, -1, -1, 1]
    else:
        assert check_entries(memory_library, arguments) == [5 if i == argument - 2 else -1 for i in range(3)] + [0]


def test_good_entries(library):
    assert check_entries(library, problem(partitions=5)) == [-1, -1, -1, 0]


def test_bad_stages(memory_library):
    arguments = problem(partitions=5)
    for change in ((2, 3, 0), (0, 0, -1), (4, 5, 61)):
        bad = arguments[5].clone()
        bad[change[0], change[1]] = change[2]
        assert check_entries(memory_library, [*arguments[:5], bad]) == [-1, -1, -1, 1]
    assert check_entries(memory_library, problem(entries=0)) == [-1, -1, -1, 0]
