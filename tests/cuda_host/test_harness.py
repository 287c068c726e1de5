"""The emulation of CUDA against NumPy, and kernels with faults that it has to catch."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import cuda_host

NONE, NO_BARRIER, SKIPPED_BARRIER, OTHER_BARRIER, LONG_SHARED, LONG_GLOBAL, EXITED_LANE = range(7)


SOURCES = [Path(__file__).with_name("selftest.cu")]


@pytest.fixture(scope="module")
def memory_library():
    return cuda_host.build("selftest", SOURCES)


@pytest.fixture(scope="module")
def races_library():
    return cuda_host.build("selftest", SOURCES, kind="races")


@pytest.fixture(params=["memory", "races"])
def library(request):
    """For kernels without a fault: they have to pass under every sanitizer."""
    return request.getfixturevalue(f"{request.param}_library")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_instruction(library, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    name = "matrix_product_bf16" if dtype == torch.bfloat16 else "matrix_product_half"
    out = cuda_host.run(library, name, {"a": a, "b": b}, {"out": ((16, 8), np.float32)})["out"]
    np.testing.assert_allclose(out, (a.double() @ b.double()).numpy(), rtol=1e-5, atol=1e-5)


def test_conversions(library):
    """Every half, the numbers half-way between two, subnormals, infinities: rounded as PyTorch rounds."""
    half = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16).float()
    half = half[half.isfinite()]
    scales = torch.randn(4096) * torch.exp2(torch.randint(-40, 40, (4096,)).float())
    middles = (half.sort().values[1:] + half.sort().values[:-1]) / 2
    values = torch.cat([half, middles, middles * (1 + 2**-20), scales, torch.tensor([torch.inf, -torch.inf, 65519.0])])
    length = values.numel()
    outputs = {
        "bfloat16": ((length,), torch.bfloat16),
        "half": ((length,), torch.float16),
        "wide": ((length,), torch.float32),
    }
    result = cuda_host.run(library, "convert", {"in": values}, outputs, length)
    assert torch.equal(result["bfloat16"].view(torch.int16), values.bfloat16().view(torch.int16))
    assert torch.equal(result["half"].view(torch.int16), values.half().view(torch.int16))
    assert torch.equal(result["wide"], values.half().float())


def test_shuffles(library):
    values = np.random.default_rng().integers(0, 1000, (2, 32)).astype(np.int32)
    out = cuda_host.run(library, "run_shuffles", {"in": values}, {"out": ((4, 2, 32), np.int32)}, 64)["out"]
    np.testing.assert_array_equal(out[0], values.sum(1, keepdims=True).repeat(32, 1))
    np.testing.assert_array_equal(out[1], values.cumsum(1))
    np.testing.assert_array_equal(out[2], np.concatenate([values[:, 1:], values[:, -1:]], 1))
    ballots = ((values.astype(np.int64) & 1) << np.arange(32)).sum(1).astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(out[3], ballots[:, None].repeat(32, 1))


def test_two_halves_of_a_warp_shuffle_apart(library):
    values = np.arange(32, dtype=np.int32)
    out = cuda_host.run(library, "run_half_warps", {"in": values}, {"out": ((32,), np.int32)})["out"]
    np.testing.assert_array_equal(out, [120] * 16 + [16] * 16)


def test_atomics(library):
    values = np.random.default_rng().integers(0, 10, 1000).astype(np.int32)
    counts, total = np.zeros(10, np.int32), np.zeros(1, np.float32)
    out = cuda_host.run(library, "run_histogram", {"in": values}, {"counts": counts, "total": total}, values.size)
    np.testing.assert_array_equal(out["counts"], np.bincount(values, minlength=10))
    assert out["total"][0] == values.sum()


def test_cooperative_grid(library):
    blocks, steps = 4, 5
    values = np.random.default_rng().standard_normal((2, blocks)).astype(np.float32)
    expected = values[0]
    for _ in range(steps):
        expected = expected + np.roll(expected, -1)
    out = cuda_host.run(library, "run_neighbour_sums", {}, {"values": values, "counter": np.zeros(1, np.uint32)}, steps)
    np.testing.assert_array_equal(out["values"][steps % 2], expected)


@pytest.mark.parametrize("threads", [1, 33, 1024])
def test_barrier(memory_library, threads):
    values = np.random.default_rng().standard_normal(threads).astype(np.float32)
    out = cuda_host.run(
        memory_library, "run_reversal", {"in": values}, {"out": ((threads,), np.float32)}, threads, NONE
    )
    np.testing.assert_array_equal(out["out"], values[::-1])


def test_asynchronous_copy(library):
    values = np.random.default_rng().standard_normal(128).astype(np.float32)
    outputs = {"out": ((128,), np.float32)}
    np.testing.assert_array_equal(cuda_host.run(library, "run_early_read", {"in": values}, outputs, 1)["out"], values)
    early = cuda_host.run(library, "run_early_read", {"in": values}, outputs, 0)["out"]
    assert np.isnan(early).all(), "what a copy brings must not be there before the wait"


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (NO_BARRIER, "differs in reverse order: a race"),
        (SKIPPED_BARRIER, "no thread can go on"),
        (OTHER_BARRIER, "divergent __syncthreads"),
        (LONG_SHARED, "heap-buffer-overflow"),
        (LONG_GLOBAL, "heap-buffer-overflow"),
        (EXITED_LANE, "waits at __shfl_down_sync with mask ffffffff"),
    ],
)
def test_faults_are_caught(memory_library, fault, report):
    values = np.random.default_rng().standard_normal(64).astype(np.float32)
    with pytest.raises(cuda_host.KernelError, match=report):
        cuda_host.run(memory_library, "run_reversal", {"in": values}, {"out": ((64,), np.float32)}, 64, fault)


def test_too_much_shared_memory_is_caught(memory_library):
    outputs = {"out": ((32,), np.float32)}
    cuda_host.run(memory_library, "run_shared", {}, outputs, 163 * 1024)
    with pytest.raises(cuda_host.KernelError, match="166913 bytes of shared memory"):
        cuda_host.run(memory_library, "run_shared", {}, outputs, 163 * 1024 + 1)


def test_wait_without_end_is_caught(memory_library):
    with pytest.raises(cuda_host.KernelError, match="waits in a loop"):
        cuda_host.run(memory_library, "run_lonely_wait", {}, {"counter": np.zeros(1, np.uint32)})


def test_read_past_the_end_is_caught(memory_library):
    with pytest.raises(cuda_host.KernelError, match="heap-buffer-overflow"):
        cuda_host.run(
            memory_library, "run_early_read", {"in": np.zeros(127, np.float32)}, {"out": ((128,), np.float32)}, 1
        )


def test_misaligned_vector_load_is_caught(memory_library):
    values, outputs = np.ones(132, np.float32), {"out": ((32,), np.float32)}
    out = cuda_host.run(memory_library, "run_wide_load", {"in": values}, outputs, 4)["out"]
    np.testing.assert_array_equal(out, 4)
    with pytest.raises(cuda_host.KernelError, match="misaligned address"):
        cuda_host.run(memory_library, "run_wide_load", {"in": values}, outputs, 1)


@pytest.mark.parametrize("fault", [NONE, NO_BARRIER])
def test_race_in_a_block_is_caught(races_library, fault):
    values, outputs = np.ones(64, np.float32), {"out": ((64,), np.float32)}
    with pytest.raises(cuda_host.KernelError, match="data race") if fault else contextlib.nullcontext():
        cuda_host.run(races_library, "run_reversal", {"in": values}, outputs, 64, fault)


@pytest.mark.parametrize("synchronise", [1, 0])
def test_race_in_a_warp_is_caught(races_library, synchronise):
    values, outputs = np.ones(32, np.float32), {"out": ((32,), np.float32)}
    with contextlib.nullcontext() if synchronise else pytest.raises(cuda_host.KernelError, match="data race"):
        cuda_host.run(races_library, "run_warp_exchange", {"in": values}, outputs, synchronise)


@pytest.mark.parametrize("atomic", [1, 0])
def test_race_between_blocks_is_caught(races_library, atomic):
    with contextlib.nullcontext() if atomic else pytest.raises(cuda_host.KernelError, match="data race"):
        cuda_host.run(races_library, "run_same_places", {}, {"out": np.zeros(32, np.float32)}, atomic)
