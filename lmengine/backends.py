"""Which implementation of an operator runs, and why.

Four backends: `cuda` (CUDA C++), `triton`, `cpu` (C++ with SIMD) and `reference` (plain PyTorch, the definition of
right). An `Operator` takes the first that supports the call, in the order of `default_order`, or the one that
`use_backend` or the variable LMENGINE_BACKEND forces; a forced backend that cannot do the call raises UnsupportedCall.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
LIBRARY = Path(__file__).parent / "_operators.so"


class UnsupportedCall(RuntimeError):
    """No backend that may be used can do the call; the message names the argument that is in the way."""


# ---- what this machine has -------------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operator library, loaded and registered with PyTorch; None where it was not built."""
    if not LIBRARY.exists():
        return None
    torch.ops.load_library(str(LIBRARY))
    loaded = ctypes.CDLL(str(LIBRARY))
    loaded.lmengine_instruction_set.restype = ctypes.c_char_p
    _keep_freed_memory()
    return loaded


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for what comes next, as it does by itself once a tensor of 32 MB was freed.

    Otherwise it hands the memory of every tensor of some megabytes back to the system, and the next one costs a page
    fault for every 4 KB: a fifth of the time of an LSTM's training step. Variables MALLOC_* of the user's stand.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 256 << 20)


@torch.compiler.assume_constant_result
def unusable(backend: str) -> str | None:
    """Why `backend` cannot be used on this machine at all, or None where it can."""
    return _unusable(backend)


@functools.cache
def _unusable(backend: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        if interpreting():
            return None
        return None if torch.cuda.is_available() else "no GPU, and TRITON_INTERPRET=1 is not set"
    loaded = library()
    if loaded is None:
        return f"the compiled library {LIBRARY.name} is missing: build it with `pip install -e .`"
    if backend == "cpu":
        return "the processor lacks AVX2, FMA or BMI2" if loaded.lmengine_instruction_set() == b"none" else None
    if backend == "cuda":
        if not loaded.lmengine_built_with_cuda():
            return "the library was built without CUDA (there was no nvcc)"
        if not torch.cuda.is_available():
            return "no GPU that this PyTorch can use"
        capability = torch.cuda.get_device_capability()
        return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def default_order(device_type: str) -> tuple[str, ...]:
    """The backends that are tried for tensors on a device, fastest first."""
    return ("cuda", "triton", "reference") if device_type == "cuda" else ("cpu", "reference")


def info() -> dict[str, Any]:
    """Versions, devices, and for each backend `usable` or the reason why not."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None

    loaded = library()
    return {
        "lmengine": importlib.metadata.version("lmengine"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "instruction set": loaded.lmengine_instruction_set().decode() if loaded else None,
        "GPUs": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "library": str(LIBRARY) if loaded else None,
        "library holds CUDA": bool(loaded and loaded.lmengine_built_with_cuda()),
        "forced backend": forced_backend(),
        "backends": {backend: unusable(backend) or "usable" for backend in BACKENDS},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


# ---- which backend is forced -----------------------------------------------------------------------------------


def _checked(backend: str | None, source: str) -> str | None:
    if backend in (None, "", "auto"):
        return None
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    return backend


# a wrong value is told when it is first asked for, so that importing never fails
_forced: str | None = os.environ.get("LMENGINE_BACKEND")


def forced_backend() -> str | None:
    """The backend that use_backend or LMENGINE_BACKEND forces, None for the default choice.

    Raises:
        ValueError: LMENGINE_BACKEND names no backend.
    """
    return _checked(_forced, "LMENGINE_BACKEND")


class use_backend:
    """Force a backend for the whole process: `use_backend("triton")`, or for a block: `with use_backend("cpu"):`.

    Args:
        backend: "cuda", "triton", "cpu", "reference", or "auto" for the default choice.

    Raises:
        ValueError: there is no backend of that name.
        UnsupportedCall: the backend cannot be used on this machine; the message says why.
    """

    def __init__(self, backend: str | None) -> None:
        global _forced
        self.previous = _forced
        wanted = _checked(backend, "backend")
        reason = unusable(wanted) if wanted else None
        if reason:
            raise UnsupportedCall(f"backend: {wanted!r} cannot be used here: {reason}")
        _forced = wanted

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self.previous


# ---- operators -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """One backend's way to do an operator: `run` takes the operator's arguments; `unsupported` takes them too and
    returns why this backend cannot do the call (naming the argument), or None where it can."""

    run: Callable[..., Any]
    unsupported: Callable[..., str | None]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that would run, and for each other why it would not."""

    operator: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend or 'no backend can do this call'}"]
        lines += [f"  {backend}: {reason}" for backend, reason in self.reasons.items()]
        return "\n".join(lines)


@dataclass
class Operator:
    """A family's public operator: its implementations by backend, and the choice between them.

    Attributes:
        name: how `lmengine.explain` knows it.
        check: called with the arguments before any backend; raises ValueError or TypeError for what no backend takes.
        implementations: filled by `register`.
    """

    name: str
    check: Callable[..., None]
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPERATORS[self.name] = self

    def register(self, backend: str, run: Callable[..., Any], unsupported: Callable[..., str | None]) -> None:
        """Add a backend's implementation. `unsupported` need not look at what `unusable` and the device decide."""
        self.implementations[backend] = Implementation(run, unsupported)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.check(*args, **kwargs)
        device_type = args[0].device.type
        forced = forced_backend()
        if forced is not None:
            reason = self.refusal(forced, device_type, *args, **kwargs)
            if reason is not None:
                raise UnsupportedCall(f"{self.name}: the forced backend {forced!r} cannot do this call: {reason}")
            return self.implementations[forced].run(*args, **kwargs)
        for backend in default_order(device_type):
            if self.refusal(backend, device_type, *args, **kwargs) is None:
                if backend == "reference" and not torch.compiler.is_compiling():
                    warn_of_reference(self.name, device_type)
                return self.implementations[backend].run(*args, **kwargs)
        raise UnsupportedCall(str(self.explain(*args, **kwargs)))

    def refusal(self, backend: str, device_type: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `backend` cannot do this call, or None where it can."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return "not implemented for this operator"
        reason = unusable(backend)
        if reason is not None:
            return reason
        if backend == "cpu" and device_type != "cpu":
            return f"the tensors are on {device_type}"
        if backend == "cuda" and device_type != "cuda":
            return f"the tensors are on {device_type}"
        if backend == "triton" and device_type != ("cpu" if interpreting() else "cuda"):
            return f"the tensors are on {device_type}"
        return implementation.unsupported(*args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which backend this call would run on, and why the others would not do it."""
        self.check(*args, **kwargs)
        device_type = args[0].device.type
        forced = forced_backend()
        order = (forced,) if forced else default_order(device_type)
        chosen: str | None = None
        reasons: dict[str, str] = {}
        for backend in (*order, *(b for b in BACKENDS if b not in order)):
            reason = self.refusal(backend, device_type, *args, **kwargs)
            if reason is not None:
                reasons[backend] = reason
            elif chosen is None and backend in order:
                chosen = backend
                reasons[backend] = "runs" + (" (forced)" if forced else "")
            else:
                reasons[backend] = "could, but does not: " + (
                    f"{forced} is forced" if forced else f"{chosen} comes first on {device_type}"
                )
        return Explanation(self.name, chosen, reasons)


OPERATORS: dict[str, Operator] = {}


@functools.cache
def warn_of_reference(name: str, device_type: str) -> None:
    """Say once an operator and device that only the slow reference could do a call."""
    warnings.warn(
        f"lmengine.{name}: no kernel supports this call on {device_type}; the plain PyTorch reference runs. "
        f"`print(lmengine.explain({name!r}, ...))` says why.",
        stacklevel=4,
    )
