"""Runs CUDA C++ kernels on the CPU, under AddressSanitizer and UBSan, or under ThreadSanitizer.

    library = build("attention")
    result = run(library, "attention_forward", {"query": query, "key": key}, {"out": (query.shape, query.dtype)}, 7, 0.5)

`build` compiles csrc/<family>/*_sm80.cu with the host compiler against emulation.h, together with
tests/<family>/cuda_host.cpp, which wraps the launchers as `extern "C"` functions. Such a function takes its pointers
in the order of `inputs` and then `outputs`, and after them the numbers: an int as int64_t, a float as float.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import pickle
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX", "g++")
COMMON = f"-std=c++20 -g -fPIC -Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas -DLMENGINE_HOST_EMULATION -I{ROOT / 'csrc'} -I{ROOT / 'tests'}"
# optimised and not instrumented: the scheduler and the matrix instruction's arithmetic
EMULATION = f"{COMMON} -O3 -mavx2 -mfma"
KERNELS = f"{COMMON} -O1 -mavx2 -mfma -fno-strict-aliasing -fno-omit-frame-pointer"
# what each kind of library is compiled with, and the run-time library that its process has to load first
SANITIZERS = {"memory": "-fsanitize=address,undefined -fno-sanitize-recover=all", "races": "-fsanitize=thread"}
DEFINES = {"memory": "-DLMENGINE_ASAN", "races": "-DLMENGINE_TSAN"}
RUNTIMES = {"memory": "libasan.so", "races": "libtsan.so"}
ORDERS = ("forward", "reverse")


class KernelError(AssertionError):
    """A kernel did something that a GPU may punish; the message holds the sanitizer's or the emulation's report."""


def build(family: str, sources: Sequence[Path] | None = None, kind: str = "memory") -> Path:
    """Compiles a family's CUDA kernels for the CPU and returns the shared library, from a cache where it can.

    Args:
        family: the family's name.
        sources: other sources in place of the family's *_sm80.cu and tests/<family>/cuda_host.cpp.
        kind: "memory" for AddressSanitizer and UBSan; "races" for ThreadSanitizer, which reports accesses of two
            threads to the same memory, shared or global, that no barrier, fence or atomic orders.

    Raises:
        KernelError: the sources do not compile.
    """
    if sources is None:
        kernels = sorted((ROOT / "csrc" / family).glob("*_sm80.cu"))
        sources = [*kernels, ROOT / "tests" / family / "cuda_host.cpp"]
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{family}.{kind}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other pytest processes build the same
        emulation = [FOLDER / "emulation.cpp"]
        if any(source.stem.endswith("_sm90") for source in sources):
            emulation.append(FOLDER / "emulation_sm90.cpp")
        objects = {source: folder / f"{family}.{kind}.{source.name}.o" for source in [*emulation, *sources]}
        changed = [
            _compile(
                source,
                target,
                f"{EMULATION} {DEFINES[kind]}" if source in emulation else f"{KERNELS} {SANITIZERS[kind]}",
            )
            for source, target in objects.items()
        ]
        if any(changed) or not library.exists():
            fresh = folder / f"{family}.{kind}.{os.getpid()}.so"
            command = [COMPILER, "-shared", *SANITIZERS[kind].split(), *map(str, objects.values()), "-o", str(fresh)]
            _execute(command)
            fresh.replace(library)
    return library


def _compile(source: Path, target: Path, flags: str) -> bool:
    """Compiles one source unless nothing it is made of has changed; says whether it did."""
    stamp, depends = target.with_suffix(".stamp"), target.with_suffix(".d")
    command = [
        COMPILER,
        *shlex.split(flags),
        "-MD",
        "-MF",
        str(depends),
        "-x",
        "c++",
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    if target.exists() and stamp.exists() and depends.exists() and stamp.read_text() == _digest(command, depends):
        return False
    _execute(command)
    stamp.write_text(_digest(command, depends))
    return True


def _digest(command: list[str], depends: Path) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    for name in depends.read_text().replace("\\\n", " ").split(":", 1)[1].split():
        path = Path(name)
        digest.update(path.read_bytes() if path.exists() else b"gone")
    return digest.hexdigest()


def _execute(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"{shlex.join(command)}\n{done.stderr[-8000:]}")


def run(
    library: Path,
    function: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    *numbers: int | float,
    tolerance: float = 0.0,
    orders: Sequence[str] | None = None,
    timeout: float = 120.0,
) -> dict[str, Any]:
    """Calls a function of a built library in a child process, once with the threads in each order.

    Args:
        library: what `build` returned.
        function: the name of an `extern "C"` function.
        inputs: arrays (NumPy or PyTorch, any strides: the kernel gets a contiguous copy), or None for a null pointer.
        outputs: name -> (shape, dtype), to be written by the kernel (it holds 0xff bytes before: NaN); or an array
            that the kernel reads and writes; or None. Where the dtype or array is PyTorch's, so is the result.
        numbers: the function's numbers, after all its pointers.
        tolerance: by how much, relative to the largest value, results may differ between the orders. More than 0 only
            where atomics add in no fixed order.
        orders: "forward", "reverse": which thread and which block goes first. By default both, and one under
            ThreadSanitizer, which needs no second order to see a race.
        timeout: seconds that the child may take.

    Raises:
        KernelError: a report of a sanitizer or the emulation, a changed input, results that depend on the order.
    """
    if orders is None:
        orders = ORDERS[:1] if library.suffixes[-2:] == [".races", ".so"] else ORDERS
    pointers: list[tuple[str, bytes | int | None]] = []
    for name, value in inputs.items():
        pointers.append((name, None if value is None else _bytes(value)))
    for name, value in outputs.items():
        pointers.append((name, _size(value) if isinstance(value, tuple) else None if value is None else _bytes(value)))
    with tempfile.TemporaryDirectory(prefix="lmengine-") as folder:
        request, answer = Path(folder) / "request", Path(folder) / "answer"
        request.write_bytes(pickle.dumps((str(library), function, pointers, numbers, tuple(orders))))
        kind = library.name.split(".")[-2]
        preload = [_runtime(RUNTIMES[kind]), _runtime("libstdc++.so")]
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(preload),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1",
        }
        command = [sys.executable, "-I", str(FOLDER / "child.py"), str(request), str(answer)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, preexec_fn=_fix_addresses
            )
        except subprocess.TimeoutExpired as error:
            raise KernelError(f"{function}: still running after {timeout} s") from error
        if done.returncode or not answer.exists():
            raise KernelError(f"{function}: exit status {done.returncode}\n{done.stderr[-8000:]}")
        memories: list[list[bytes | None]] = pickle.loads(answer.read_bytes())
    for index, (name, before) in enumerate(pointers[: len(inputs)]):
        if any(memory[index] != before for memory in memories):
            raise KernelError(f"{function}: the kernel changed its input {name!r}")
    results = [
        {
            name: None if value is None else _array(memory[len(inputs) + index], value)
            for index, (name, value) in enumerate(outputs.items())
        }
        for memory in memories
    ]
    for name in outputs:
        for order, other in zip(orders[1:], results[1:], strict=True):
            _assert_same(results[0][name], other[name], tolerance, f"{function}: {name!r} differs in {order} order")
    return results[0]


def _fix_addresses() -> None:
    """Keeps the kernel from scattering memory, which ThreadSanitizer's layout cannot always bear."""
    ctypes.CDLL(None).personality(0x0040000)  # ADDR_NO_RANDOMIZE


def _runtime(name: str) -> str:
    return subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _bytes(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(value).tobytes()


def _size(value: tuple[Sequence[int], Any]) -> int:
    shape, dtype = value
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else np.dtype(dtype).itemsize
    return int(np.prod(shape, dtype=np.int64)) * itemsize


def _array(memory: bytes | None, value: Any) -> Any:
    assert memory is not None
    shape, dtype = value if isinstance(value, tuple) else (value.shape, value.dtype)
    if isinstance(dtype, torch.dtype):
        return (
            torch.frombuffer(bytearray(memory) or bytearray(1), dtype=torch.uint8)[: len(memory)]
            .view(dtype)
            .reshape(shape)
        )
    return np.frombuffer(memory, dtype=dtype).reshape(shape).copy()


def _assert_same(first: Any, second: Any, tolerance: float, message: str) -> None:
    if first is None:
        return
    with np.errstate(invalid="ignore"):  # a signalling NaN is a value like any other here
        a, b = (
            x.double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float64)
            for x in (first, second)
        )
    if tolerance == 0.0:
        if not np.array_equal(a, b, equal_nan=True):
            raise KernelError(f"{message}: a race between threads")
        return
    finite = np.isfinite(a)
    scale = max(np.abs(a[finite]).max(initial=0.0), np.finfo(np.float64).tiny)
    if not np.array_equal(finite, np.isfinite(b)) or np.abs(a - b)[finite].max(initial=0.0) > tolerance * scale:
        raise KernelError(f"{message} by more than {tolerance} of its largest value: a race between threads")
