"""Co-occurrence counts beside the quickest PyTorch code for them that was found (lmengine.tasks.speed)."""

import functools

import pytest
import torch

import lmengine
from bench import gpu
from lmengine.ops.cooccurrence import cooccurrence
from lmengine.tasks.speed import cooccurrence_case, samples, torch_cooccurrence, zipf_tokens

SIZES = [(100_000, 8000), (500_000, 8000), (500_000, 50_000), (2_000_000, 20_000)]  # tokens, vocabulary
WINDOWS = [5, 10]
PLACES = [("lmengine cpu", "cpu"), ("torch", "cpu")]
CPU_SECONDS = 1.0  # a cell's rounds together, at least
if torch.cuda.is_available():
    PLACES += [("lmengine cuda", "cuda"), ("lmengine triton", "cuda"), ("torch", "cuda")]


@functools.cache
def tokens_of(length, vocabulary_size, device, seed=0):
    return zipf_tokens(length, vocabulary_size, seed).to(device)


@functools.cache
def samples_in_turn(length, vocabulary_size, window_size):
    """Seconds of each implementation's calls on the CPU, one call of each after the other."""
    case = cooccurrence_case(tokens_of(length, vocabulary_size, "cpu"), vocabulary_size, window_size)
    with lmengine.use_backend("cpu"):
        return dict(zip(("lmengine cpu", "torch"), samples(case, CPU_SECONDS), strict=True))


@pytest.mark.parametrize("implementation, device", PLACES, ids=["-".join(place) for place in PLACES])
@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("length, vocabulary_size", SIZES)
def test_cooccurrence(benchmark, length, vocabulary_size, window_size, implementation, device):
    count = torch_cooccurrence if implementation == "torch" else cooccurrence
    shape = f"{length} tokens, {vocabulary_size} words, window {window_size}"
    benchmark.group = f"cooccurrence {shape} {device}"
    benchmark.extra_info.update(
        family="cooccurrence", implementation=implementation, shape=shape, dtype="int32", direction="forward"
    )
    if device == "cuda":
        texts = [tokens_of(length, vocabulary_size, device, seed) for seed in range(4)]
        with lmengine.use_backend(None if implementation == "torch" else implementation.removeprefix("lmengine ")):
            gpu.measure(benchmark, [functools.partial(count, t, vocabulary_size, window_size) for t in texts], 20)
        return
    benchmark.extra_info["samples"] = samples_in_turn(length, vocabulary_size, window_size)[implementation]
    # pytest-benchmark wants a call of its own; the samples are those above
    benchmark.pedantic(count, (tokens_of(length, vocabulary_size, device), vocabulary_size, window_size), rounds=1)
