"""Timing on the CPU: the implementations' calls one after the other, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

ROUNDS = (7, 400)  # at least and at most


def samples_in_turn(
    calls: dict[str, Callable[[], Any]], chosen: Callable[[str], AbstractContextManager[Any]], seconds: float
) -> dict[str, list[float]]:
    """Seconds of each implementation's calls.

    Args:
        calls: implementation -> a call; all do the same work.
        chosen: gives the context in which an implementation is called.
        seconds: how long to go on, within ROUNDS.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def one_round() -> float:
        begin = time.perf_counter()
        for name, call in calls.items():
            with chosen(name):
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
        return time.perf_counter() - begin

    one_round()
    taken = one_round()
    for numbers in samples.values():
        numbers.clear()
    for _ in range(min(max(int(seconds / taken), ROUNDS[0]), ROUNDS[1])):
        one_round()
    return samples
