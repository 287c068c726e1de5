"""The counting on a GPU, run on the CPU under sanitizers: exactly the reference's numbers."""

import numpy as np
import pytest
import torch

import lmengine
from lmengine.ops.cooccurrence import cooccurrence
from tests import cuda_host
from tests.cooccurrence.test_cooccurrence import text

SLOTS = 2**27  # as the operator asks for


@pytest.fixture(scope="module")
def memory_library():
    return cuda_host.build("cooccurrence")


@pytest.fixture(params=["memory", "races"])
def library(request, memory_library):
    return memory_library if request.param == "memory" else cuda_host.build("cooccurrence", kind="races")


def count(library, tokens, vocabulary, window=10, symmetric=True, weighted=True, slots=SLOTS):
    """Rows, columns and values, and the number of bands."""
    capacity = len(tokens) * window * (1 + symmetric)
    outputs = {
        "counts": ((2,), np.int64),
        "rows": ((capacity,), torch.int32),
        "columns": ((capacity,), torch.int32),
        "values": ((capacity,), torch.float32),
        "message": ((200,), np.uint8),
    }
    numbers = (len(tokens), vocabulary, window, int(symmetric), int(weighted), slots, capacity)
    found = cuda_host.run(library, "count", {"tokens": tokens.int()}, outputs, *numbers)
    message = bytes(found["message"]).rstrip(b"\0").decode()
    if message:
        raise RuntimeError(message)
    entries, bands = found["counts"].tolist()
    return [found[name][:entries] for name in ("rows", "columns", "values")], bands


def check(library, tokens, vocabulary, window=10, symmetric=True, weighted=True, slots=SLOTS):
    ours, bands = count(library, tokens, vocabulary, window, symmetric, weighted, slots)
    with lmengine.use_backend("reference"):
        right = cooccurrence(tokens, vocabulary, window, symmetric, weighted)
    for name, tensor, expected in zip(("rows", "columns", "values"), ours, right, strict=True):
        assert torch.equal(tensor, expected), name
    return bands


@pytest.mark.parametrize("length", [0, 1, 2, 333])
@pytest.mark.parametrize(("vocabulary", "window"), [(1, 5), (7, 1), (130, 3), (4000, 23)])
def test_same_as_reference(library, length, vocabulary, window):
    """Dense and hashed rows, windows of a few lanes and of all, longer than the text."""
    tokens = text(length, vocabulary, seed=length + vocabulary)
    check(library, tokens, vocabulary, window, symmetric=window != 3, weighted=length != 333 or window != 1)


@pytest.mark.parametrize("window", [32, 33, 70])
def test_wide_windows(library, window):
    check(library, text(200, 300, seed=window, breaks=window != 70), 300, window)


@pytest.mark.parametrize("symmetric", [True, False])
def test_bands(library, symmetric):
    """A table that is too small for the text: band after band, down to one for every row."""
    tokens = text(80, 6, seed=5)
    numbers = [check(library, tokens, 6, 4, symmetric, slots=slots) for slots in (SLOTS, 14, 1)]
    assert numbers[0] == 1 < numbers[1] < numbers[2] == len(tokens[tokens >= 0].unique())


def test_full_hash_table(memory_library):
    """A row whose columns are all different takes as many slots as it may."""
    length = 1001
    tokens = torch.zeros(length, dtype=torch.int32)
    tokens[1::2] = torch.randperm(100_000, generator=torch.Generator().manual_seed(0))[: length // 2].int() + 1
    check(memory_library, tokens, 100_001, 1)


def test_colliding_columns(memory_library):
    """Columns that the hash function sends to neighbouring slots."""
    inverse = pow(0x9E3779B9, -1, 2**32)
    columns = [c for c in (i * inverse % 2**32 for i in range(1, 400_000)) if 0 < c < 2**20][:40]
    assert len(columns) == 40
    tokens = torch.zeros(81, dtype=torch.int32)
    tokens[1::2] = torch.tensor(columns)
    check(memory_library, tokens, 2**20, 2)


@pytest.mark.parametrize("tokens", [[-1] * 50, [3], [-5, 3, -1, 4, -1], [2] * 40])
def test_hardly_any_pairs(memory_library, tokens):
    check(memory_library, torch.tensor(tokens), 5)


@pytest.mark.parametrize("slots", [SLOTS, 1])
def test_large_vocabulary(memory_library, slots):
    """Few of many words: rows without a position between bands, keys of many bits."""
    tokens = torch.tensor([999_999, 3, 3, 70_000, -1, 999_999, 65_536, 0, 255, 256])
    check(memory_library, tokens, 1_000_000, 3, slots=slots)


def test_word_outside_of_vocabulary(memory_library):
    for tokens, position in (([1, -1, 10, 3, 12], 2), ([10], 0), ([0] * 300 + [11, 10], 300)):
        message = f"tokens: expected tokens below vocabulary_size = 10, got {tokens[position]} at position {position}$"
        with pytest.raises(RuntimeError, match=message):
            count(memory_library, torch.tensor(tokens), 10)


@pytest.mark.parametrize(("length", "bits"), [(1, 8), (100, 64), (4096, 9), (9000, 20), (9000, 0), (70_000, 8)])
def test_sort(memory_library, length, bits):
    """Several tiles, running sums over several tiles of counts, odd and even passes, equal keys in their order."""
    generator = np.random.default_rng()
    keys = generator.integers(0, 2 ** min(bits, 63), length, dtype=np.uint64, endpoint=True)
    keys[: length // 2] >>= np.uint64(bits // 2)
    values = np.arange(length, dtype=np.float32)
    found = cuda_host.run(memory_library, "sort", {}, {"keys": keys, "values": values}, length, bits)
    mask = np.uint64(2 ** (-(-bits // 8) * 8) - 1)
    order = np.argsort(keys & mask, kind="stable")
    np.testing.assert_array_equal(found["keys"], keys[order])
    np.testing.assert_array_equal(found["values"], values[order])
