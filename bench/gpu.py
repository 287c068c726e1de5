"""Timing on a GPU: CUDA events, inputs that rotate, no zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

L2_BYTES = 64 << 20  # more than any GPU's L2 cache has: inputs that rotate are larger together


def measure(benchmark: Any, calls: Callable[[], Any] | Sequence[Callable[[], Any]], repeats: int = 50) -> None:
    """Time `calls` on the current GPU and leave the samples, in seconds, in `benchmark.extra_info["samples"]`.

    Args:
        benchmark: pytest-benchmark's fixture.
        calls: one call, or several that do the same work on different inputs, which are called in turn; give as
            many as make their inputs together larger than the GPU's L2 cache.
        repeats: how many samples.
    """
    calls = [calls] if callable(calls) else list(calls)
    for call in calls:  # compiles, and fills the allocator
        call()
        call()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for index, (start, end) in enumerate(events):
        start.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    benchmark.extra_info["samples"] = [start.elapsed_time(end) / 1000 for start, end in events]
    benchmark.extra_info["device"] = "cuda"
    benchmark.pedantic(lambda: (calls[0](), torch.cuda.synchronize()), rounds=1)
