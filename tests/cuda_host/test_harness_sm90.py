"""The emulation of sm_90's instructions against NumPy and PyTorch, and kernels with faults that it has to catch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import cuda_host

(
    NONE,
    NO_WAIT_FOR_TILE,
    NO_WAIT_FOR_PRODUCT,
    NO_FENCE,
    TOUCHED_ACCUMULATOR,
    CHANGED_LEFT,
    NO_PROXY_FENCE,
    TOO_MANY_ARRIVALS,
    NO_INIT,
    MISALIGNED_TILE,
    OTHER_PRODUCT,
    NEVER_WAITED,
    LEFT_BARRIER,
    TILE_IN_USE,
) = range(14)
REGISTERS, REGISTERS_B_TRANSPOSED, SHARED, SHARED_B_TRANSPOSED, SHARED_A_TRANSPOSED, SHARED_BOTH = range(6)
SOURCES = [
    Path(__file__).with_name("selftest_sm90.cu"),
    cuda_host.ROOT / "csrc" / "support" / "tensor_map_cuda.cpp",
]


@pytest.fixture(scope="module")
def memory_library():
    return cuda_host.build("selftest_sm90", SOURCES)


@pytest.fixture(scope="module")
def races_library():
    return cuda_host.build("selftest_sm90", SOURCES, kind="races")


@pytest.fixture(params=["memory", "races"])
def library(request):
    return request.getfixturevalue(f"{request.param}_library")


def load_tile(library, values, gap, rows, at, fault=NONE):
    batch, heads, length, dim = values.shape
    wide = torch.nn.functional.pad(values, (0, gap), value=torch.nan)
    numbers = (batch, heads, length, dim, gap, rows, *at, fault)
    return cuda_host.run(library, "run_tile", {"in": wide}, {"out": ((rows * 128,), np.uint8)}, *numbers)["out"]


@pytest.mark.parametrize("at", [(0, 0, 0, 0), (64, 8, 1, 1), (0, 20, 1, 0), (64, -3, 0, 1)], ids=str)
def test_tile_is_swizzled_and_zero_outside(library, at):
    values = torch.randn(2, 2, 25, 88).half()
    rows, (x, row, head, batch) = 16, at
    out = load_tile(library, values, 8, rows, at)
    box = torch.zeros(rows, 64, dtype=torch.float16)
    for i in range(rows):
        if 0 <= row + i < 25:
            line = values[batch, head, row + i, x : x + 64]
            box[i, : len(line)] = line
    chunks = box.view(torch.uint8).numpy().reshape(rows, 8, 16)
    for i in range(rows):
        for chunk in range(8):
            np.testing.assert_array_equal(out.reshape(rows, 8, 16)[i, chunk ^ i % 8], chunks[i, chunk])


def multiply(library, dtype, columns, kind, fault=NONE):
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, columns).to(dtype)
    a_stored = a.T.contiguous() if kind in (SHARED_A_TRANSPOSED, SHARED_BOTH) else a
    transposed = (REGISTERS_B_TRANSPOSED, SHARED_B_TRANSPOSED, SHARED_BOTH)
    b_stored = b if kind in transposed else b.T.contiguous()
    name = "run_product_half" if dtype == torch.float16 else "run_product_bf16"
    inputs, outputs = {"a": a, "a_stored": a_stored, "b_stored": b_stored}, {"out": ((64, columns), np.float32)}
    out = cuda_host.run(library, name, inputs, outputs, columns, kind, fault)["out"]
    return out, (a.double() @ b.double()).numpy()


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 256)])
def test_product(library, dtype, columns, kind):
    out, right = multiply(library, dtype, columns, kind)
    np.testing.assert_allclose(out, right, rtol=1e-5, atol=1e-4)


def test_turns(library):
    out = cuda_host.run(library, "run_turns", {}, {"out": ((128,), np.float32)}, 5, NONE)["out"]
    np.testing.assert_array_equal(out, 31)


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (TOO_MANY_ARRIVALS, "more arrivals than the barrier counts"),
        (NO_INIT, "was not initialised"),
        (MISALIGNED_TILE, "not 1024-byte aligned"),
        (TILE_IN_USE, "another tile is under way"),
    ],
)
def test_faults_with_tiles_are_caught(memory_library, fault, report):
    with pytest.raises(cuda_host.KernelError, match=report):
        load_tile(memory_library, torch.randn(1, 1, 32, 64).half(), 0, 16, (0, 0, 0, 0), fault)


def test_a_tile_read_too_early_is_nan(memory_library):
    out = load_tile(memory_library, torch.randn(1, 1, 32, 64).half(), 0, 16, (0, 0, 0, 0), NO_WAIT_FOR_TILE)
    assert np.isnan(out.view(np.float16)).all()


@pytest.mark.parametrize(
    ("fault", "kind", "report"),
    [
        (NO_FENCE, REGISTERS, "no wgmma_fence"),
        (TOUCHED_ACCUMULATOR, REGISTERS, "an accumulator was written"),
        (OTHER_PRODUCT, REGISTERS, "ask for different products"),
        (NEVER_WAITED, SHARED, "without waiting for its products"),
    ],
)
def test_faults_with_products_are_caught(memory_library, fault, kind, report):
    with pytest.raises(cuda_host.KernelError, match=report):
        multiply(memory_library, torch.bfloat16, 64, kind, fault)


@pytest.mark.parametrize(
    ("fault", "kind"), [(NO_WAIT_FOR_PRODUCT, REGISTERS), (CHANGED_LEFT, REGISTERS), (NO_PROXY_FENCE, SHARED)]
)
def test_products_with_faults_are_wrong(memory_library, fault, kind):
    """A product comes no earlier than it is waited for, and does not see what no proxy fence has shown it."""
    out, right = multiply(memory_library, torch.bfloat16, 64, kind, fault)
    if fault == NO_PROXY_FENCE:  # the threads wrote zeros, which the product may not have seen
        np.testing.assert_allclose(out, right, rtol=1e-5, atol=1e-4)
    else:
        assert not np.allclose(out, right, rtol=1e-3, atol=1e-3)


def test_an_arrival_that_nobody_waits_for_is_caught(memory_library):
    with pytest.raises(cuda_host.KernelError, match="nobody waited for"):
        cuda_host.run(memory_library, "run_turns", {}, {"out": ((128,), np.float32)}, 5, LEFT_BARRIER)
