"""Co-occurrence counts: every backend against the reference, and the reference against a count by hand."""

import os
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction

import pytest
import torch

import lmengine
from lmengine.backends import unusable
from lmengine.ops.cooccurrence import cooccurrence

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(unusable(name) is not None, reason=str(unusable(name))))
    for name in ("cuda", "triton", "cpu")
]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def count(backend, tokens, *args, **kwargs):
    with lmengine.use_backend(backend):
        return [tensor.cpu() for tensor in cooccurrence(tokens.to(device_of(backend)), *args, **kwargs)]


def text(length: int, vocabulary: int, seed: int = 0, breaks: bool = True) -> torch.Tensor:
    """Words by Zipf's law, with a break now and then."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, vocabulary + 1).double()
    tokens = torch.multinomial(frequency, max(length, 1), replacement=True, generator=generator)[:length]
    if breaks:
        tokens[torch.rand(length, generator=generator) < 0.05] = -1
    return tokens


def by_hand(tokens, window, symmetric, weighted):
    """The counts by the definition, in exact fractions."""
    counts = defaultdict(Fraction)
    for later in range(len(tokens)):
        for earlier in range(later - 1, max(later - window, 0) - 1, -1):
            if min(tokens[earlier : later + 1]) < 0:
                break
            weight = Fraction(1, later - earlier) if weighted else Fraction(1)
            counts[tokens[later], tokens[earlier]] += weight
            if symmetric:
                counts[tokens[earlier], tokens[later]] += weight
    return sorted((*pair, float(torch.tensor(float(weight)))) for pair, weight in counts.items())


@pytest.mark.parametrize("window", [1, 4, 10])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_reference_counts_by_the_definition(window, symmetric, weighted):
    tokens = text(200, 20, seed=window)
    rows, columns, values = count("reference", tokens, 20, window, symmetric, weighted)
    ours = list(zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True))
    assert ours == by_hand(tokens.tolist(), window, symmetric, weighted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 1, 2, 5, 333])
@pytest.mark.parametrize("vocabulary", [1, 7, 130])
@pytest.mark.parametrize("window", [1, 5, 23])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_same_as_reference(backend, length, vocabulary, window, symmetric, weighted):
    tokens = text(length, vocabulary, seed=length + vocabulary)
    ours = count(backend, tokens, vocabulary, window, symmetric, weighted)
    right = count("reference", tokens, vocabulary, window, symmetric, weighted)
    for tensor, expected in zip(ours, right, strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_long_text_on_threads(symmetric):
    """Long enough for several threads, more columns than one 64-bit word of flags covers, exactly the same counts."""
    tokens = text(100_000, 9000)
    right = count("reference", tokens, 9000, 6, symmetric)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            ours = count("cpu", tokens, 9000, 6, symmetric)
            assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("vocabulary", [3, 60_000])
def test_long_text_on_a_gpu(backend, vocabulary):
    """Many blocks that add to the same rows, and more than one tile of the sort."""
    tokens = text(1_000_000, vocabulary)
    right = count("cpu", tokens, vocabulary, 8)
    assert all(torch.equal(a, b) for a, b in zip(count(backend, tokens, vocabulary, 8), right, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_of_input(backend):
    tokens = text(300, 40)
    right = count("reference", tokens, 40, 3)
    padded = torch.stack([tokens, tokens * 0], dim=1)[:, 0]
    assert not padded.is_contiguous()
    for same in (tokens.int(), tokens, padded, torch.where(tokens < 0, -(2**40), tokens)):
        assert all(torch.equal(a, b) for a, b in zip(count(backend, same, 40, 3), right, strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_only_breaks(backend):
    assert all(len(tensor) == 0 for tensor in count(backend, torch.full((50,), -1), 10))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_word_outside_of_vocabulary(backend):
    with pytest.raises(RuntimeError, match="tokens below vocabulary_size = 10, got 10 at position 2"):
        count(backend, torch.tensor([1, -1, 10, 3, 12]), 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], 3), TypeError, "tokens: expected a tensor, got list"),
        ((torch.zeros(2, 2, dtype=torch.int), 3), ValueError, r"tokens: expected shape \(tokens,\), got \(2, 2\)"),
        ((torch.zeros(2), 3), TypeError, "tokens: expected dtype int32 or int64, got torch.float32"),
        ((torch.zeros(2, dtype=torch.int), 0), ValueError, "vocabulary_size: expected 1 to 2147483647, got 0"),
        ((torch.zeros(2, dtype=torch.int), 3, 0), ValueError, "window_size: expected 1 to 32767, got 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        cooccurrence(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    operators = torch.ops.lmengine
    operator = operators.cooccurrence_triton if backend == "triton" else operators.cooccurrence
    tokens = text(300, 40).int().to(device_of(backend))
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.default, (tokens, 40, 5, True, True), test_utils=utilities)
    capture = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with lmengine.use_backend(backend), capture:
        compiled = torch.compile(lambda tokens: cooccurrence(tokens, 40, 5), fullgraph=True, backend="aot_eager")
        for ours, right in zip(compiled(tokens), cooccurrence(tokens, 40, 5), strict=True):
            assert torch.equal(ours, right)


def test_explain():
    assert lmengine.explain("cooccurrence", text(5, 5), 5).backend == "cpu"
    assert lmengine.explain(cooccurrence, text(5, 5), 5).operator == "cooccurrence"


def test_lower_instruction_set():
    """The same numbers on a processor without AVX-512."""
    program = (
        "import torch; from lmengine.ops.cooccurrence import cooccurrence as f\n"
        "t = torch.arange(5000) * 7919 % 97; print([x.double().sum().item() for x in f(t, 97, 5)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "LMENGINE_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in ("avx2", "avx512", "")
    }
    assert len(outputs) == 1 and outputs.pop().startswith("[")
