"""Writes what a benchmark run measured to bench/results/<device>/<family>.json, raw samples and all.

A benchmark says in `benchmark.extra_info` what it is: family, implementation, shape, dtype, direction, and, where it
is known, flops. A run replaces the entries that it measured again and keeps the others.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import lmengine

RESULTS = Path(__file__).parent / "results"
REQUIRED = ("family", "implementation", "shape", "dtype", "direction")


def device_name(kind: str) -> str:
    """The folder of a device's results: "amd-epyc-2-cores-avx512bf16", "nvidia-h100-80gb-hbm3"."""
    if kind == "cuda":
        name = torch.cuda.get_device_name()
    else:
        found = lmengine.info()
        name = f"{found['processor']} {os.cpu_count()} cores {found['instruction set']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, Any]:
    found = lmengine.info()
    driver = None
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "lmengine": found["lmengine"],
        "torch": found["torch"],
        "triton": found["triton"],
        "python": found["python"],
        "cuda": torch.version.cuda,
        "driver": driver,
        "threads": torch.get_num_threads(),
        "kernel": platform.release(),
    }


def commit() -> str | None:
    """The commit that was measured; "+" follows it where the tree differs from it outside of the results."""
    root = Path(__file__).parent.parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        return None
    command = ["git", "status", "--porcelain", "--", ".", ":!bench/results"]
    changed = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+" if changed.strip() else "")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    benchmarks = getattr(getattr(session.config, "_benchmarksession", None), "benchmarks", [])
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for benchmark in benchmarks:
        if benchmark.has_error:
            continue
        entry = dict(benchmark.extra_info)
        missing = [key for key in REQUIRED if key not in entry]
        if missing:
            raise pytest.UsageError(f"{benchmark.fullname}: extra_info lacks {', '.join(missing)}")
        entry.setdefault("samples", list(benchmark.stats.data))
        entry["samples"] = [float(f"{sample:.4g}") for sample in entry["samples"]]
        entry["test"] = benchmark.name
        measured.setdefault((device_name(entry.get("device", "cpu")), entry["family"]), []).append(entry)
    about = versions() if measured else {}
    for (device, family), entries in measured.items():
        write(RESULTS / device / f"{family}.json", [{**entry, **about} for entry in entries])


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    def key(entry: dict[str, Any]) -> tuple[str, ...]:
        return tuple(entry[name] for name in REQUIRED)

    old = json.loads(path.read_text())["entries"] if path.exists() else []
    merged = {key(entry): entry for entry in [*old, *entries]}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry) for entry in merged.values())
    aside = path.with_suffix(".new")
    aside.write_text(f'{{"entries": [\n{lines}\n]}}\n')
    aside.replace(path)
