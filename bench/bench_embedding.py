"""An epoch of GloVe beside the quickest PyTorch code for it that was found (lmengine.tasks.speed)."""

import functools

import pytest
import torch

import lmengine
from bench import gpu
from lmengine.ops.cooccurrence import cooccurrence
from lmengine.tasks.speed import glove_case, samples, zipf_tokens

SIZES = [  # tokens, vocabulary, dim
    (100_000, 8000, 50),
    (100_000, 8000, 100),
    (100_000, 8000, 300),
    (500_000, 8000, 50),
    (500_000, 8000, 100),
    (2_000_000, 20_000, 50),
]
PLACES = [("lmengine cpu", "cpu"), ("torch", "cpu")]
CPU_SECONDS = 1.0  # a cell's rounds together, at least
if torch.cuda.is_available():
    PLACES += [("lmengine cuda", "cuda"), ("lmengine triton", "cuda"), ("torch", "cuda")]


@functools.cache
def counts_of(length, vocabulary_size):
    return cooccurrence(zipf_tokens(length, vocabulary_size), vocabulary_size)


@functools.lru_cache(1)
def case_of(length, vocabulary_size, dim, device):
    counts = counts_of(length, vocabulary_size)
    return glove_case(tuple(tensor.to(device) for tensor in counts), vocabulary_size, dim)


@functools.cache
def samples_in_turn(length, vocabulary_size, dim):
    """Seconds of each implementation's epochs on the CPU, one of each after the other."""
    with lmengine.use_backend("cpu"):
        taken = samples(case_of(length, vocabulary_size, dim, "cpu"), CPU_SECONDS)
    return dict(zip(("lmengine cpu", "torch"), taken, strict=True))


@pytest.mark.parametrize("implementation, device", PLACES, ids=["-".join(place) for place in PLACES])
@pytest.mark.parametrize("length, vocabulary_size, dim", SIZES)
def test_glove_epoch(benchmark, length, vocabulary_size, dim, implementation, device):
    case = case_of(length, vocabulary_size, dim, device)
    benchmark.group = f"glove {case.shape} {device}"
    benchmark.extra_info.update(
        family="embedding",
        implementation=implementation,
        shape=case.shape,
        dtype=case.dtype,
        direction=case.direction,
    )
    call = case.theirs if implementation == "torch" else case.ours
    if device == "cuda":  # an epoch reads more than the cache holds
        with lmengine.use_backend(None if implementation == "torch" else implementation.removeprefix("lmengine ")):
            gpu.measure(benchmark, call, 20)
        return
    benchmark.extra_info["samples"] = samples_in_turn(length, vocabulary_size, dim)[implementation]
    benchmark.pedantic(call, rounds=1)  # pytest-benchmark wants a call of its own; the samples are those above
