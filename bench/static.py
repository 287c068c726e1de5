"""What the compilers make of every GPU kernel, read without a GPU: registers, shared memory, spills, tensor cores.

python -m bench.static              all kernels: a table, and exit status 1 where a limit is broken
python -m bench.static FAMILY ...   only these families

Triton kernels are compiled offline for sm_80 and sm_90, in every configuration that kernels/<family>.py lists in
`static_configurations()`; CUDA kernels are read from the object files that `make build` left. Readings are kept under
build/static/ until a source changes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "static"
ARCHITECTURES = (80, 90)
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have
# instructions and where a Reading counts them
COUNTED = {
    "LDL": "spills", "STL": "spills", "HMMA": "hmma", "HGMMA": "hgmma", "UTMALDG": "utmaldg",
    "WARPGROUP.DEPBAR": "waits",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One kernel compiled for one architecture.

    Attributes:
        language: "triton" or "cuda".
        shared: bytes of shared memory; what a CUDA kernel asks for at launch is not known here.
        spills: instructions that read or write local memory (LDL, STL): spilled registers and indexed local arrays.
        hmma, hgmma: tensor-core instructions, of a warp and of a warp group.
        utmaldg: loads of a block by a tensor descriptor.
        waits: waits for a warp group's tensor-core instructions.
        needs_matrix_instructions: whether there must be some.
        error: the compiler's message, where the kernel does not compile.
    """

    family: str
    language: str
    kernel: str
    architecture: int
    registers: int = 0
    shared: int = 0
    spills: int = 0
    hmma: int = 0
    hgmma: int = 0
    utmaldg: int = 0
    waits: int = 0
    needs_matrix_instructions: bool = False
    error: str = ""

    def broken_limits(self) -> list[str]:
        if self.error:
            return [f"does not compile: {self.error}"]
        broken = []
        if self.spills:
            broken.append(f"{self.spills} instructions on local memory, expected none")
        if self.shared > SHARED_LIMITS[self.architecture]:
            limit = SHARED_LIMITS[self.architecture]
            broken.append(f"{self.shared} bytes of shared memory, sm_{self.architecture} has {limit}")
        if self.needs_matrix_instructions and not self.hmma + self.hgmma:
            broken.append("no tensor-core instruction, expected some")
        if self.language == "cuda" and self.waits >= self.hgmma > 1:
            broken.append(f"{self.waits} waits for {self.hgmma} HGMMA: the compiler has put them one after the other")
        return broken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", nargs="*", help="only these families")
    options = parser.parse_args(arguments)
    known = sorted({*triton_families(), *(source.parent.name for source in cuda_sources())})
    for family in options.family:
        if family not in known:
            print(
                f"family: expected some of {', '.join(known) or '(there is none yet)'}, got {family!r}", file=sys.stderr
            )
            return 2
    readings = []
    for family in options.family or known:
        readings += triton_readings(family) if family in triton_families() else []
        for source in cuda_sources():
            if source.parent.name == family and cuda_object(source).exists():
                readings += cuda_readings(source)
    print(table(readings))
    for source in cuda_sources():
        if not cuda_object(source).exists():
            print(f"{source.relative_to(ROOT)}: not read, the library is not built with CUDA")
    broken = [(reading, message) for reading in readings for message in reading.broken_limits()]
    for reading, message in broken:
        print(f"{reading.language} {reading.kernel}, sm_{reading.architecture}: {message}", file=sys.stderr)
    return 1 if broken else 0


def table(readings: list[Reading]) -> str:
    lines = [("language", "kernel", "arch", "registers", "shared", "spills", "HMMA", "HGMMA", "UTMALDG")]
    for r in readings:
        numbers = (r.registers, r.shared, r.spills, r.hmma, r.hgmma, r.utmaldg)
        lines.append((r.language, r.kernel, f"sm_{r.architecture}", *("-" if r.error else str(n) for n in numbers)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def triton_families() -> list[str]:
    """The families with Triton kernels: the modules of kernels/ that define `static_configurations`."""
    return [path.stem for path in sorted((ROOT / "kernels").glob("*.py")) if _is_family(path)]


def _is_family(path: Path) -> bool:
    return re.search(r"^def static_configurations\(", path.read_text(), re.MULTILINE) is not None


def configurations(family: str) -> list[Any]:
    """A family's StaticConfigurations, as kernels/<family>.py lists them."""
    return importlib.import_module(f"lmengine.kernels.{family}").static_configurations()


def triton_readings(family: str, quick: bool = False) -> list[Reading]:
    """Compiles a family's Triton kernels in every configuration, or takes the readings from build/static/.

    With `quick` only in those configurations that say so.
    """
    import triton

    others = [path for path in sorted((ROOT / "kernels").glob("*.py")) if not _is_family(path)]
    sources = [ROOT / "kernels" / f"{family}.py", Path(__file__), *others]
    folder = CACHE / f"triton-{family}-{_digest(triton.__version__.encode(), *(p.read_bytes() for p in sources))}"
    jobs = [
        (family, number, architecture, folder / f"{number}-sm{architecture}.json")
        for number, configuration in enumerate(configurations(family))
        for architecture in configuration.architectures
        if configuration.quick or not quick
    ]
    missing = [job for job in jobs if not job[-1].exists()]
    if missing and os.environ.get("TRITON_INTERPRET", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            for _ in pool.map(_read, *zip(*missing, strict=True)):
                pass
    elif missing:  # the kernels of this process are the interpreter's
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        code = f"from bench.static import triton_readings; triton_readings({family!r}, {quick})"
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling the Triton kernels of {family} failed:\n{done.stderr[-8000:]}")
    return [reading for job in jobs for reading in _load(job[-1])]


def _read(family: str, number: int, architecture: int, path: Path) -> None:
    _store(path, [compile_offline(family, configurations(family)[number], architecture)])


def compile_offline(family: str, configuration: Any, architecture: int) -> Reading:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = configuration.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # under @triton.autotune or @triton.heuristics
    names = kernel.arg_names
    given = {**configuration.signature, **dict.fromkeys(configuration.constants, "constexpr")}
    if set(given) != set(names):
        raise ValueError(
            f"{configuration.name}: signature and constants together must name {names}; missing "
            f"{sorted(set(names) - set(given))}, unknown {sorted(set(given) - set(names))}"
        )
    divisible = {name for name, kind in configuration.signature.items() if kind.startswith("*")}
    divisible |= configuration.divisible_by_16
    source = ASTSource(
        kernel,
        signature={name: given[name] for name in names},
        constexprs=configuration.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible)},
    )
    common = dict(
        family=family,
        language="triton",
        kernel=configuration.name,
        architecture=architecture,
        needs_matrix_instructions=configuration.matrix_instructions,
    )
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages},
        )
    except Exception as error:  # whatever Triton's compiler raises is what there is to read
        return Reading(**common, error=f"{type(error).__name__}: {str(error)[:2000]}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (functions,) = read_object(Path(file.name)).values()
    (numbers,) = functions.values()
    return Reading(**common, **{**numbers, "shared": compiled.metadata.shared})


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc").rglob("*.cu"))


def cuda_object(source: Path) -> Path:
    """The object file that setup.py compiles a .cu file to; it is there only where nvcc was."""
    name = str(source.relative_to(ROOT / "csrc").with_suffix("")).replace("/", "_")
    return ROOT / "build" / f"ninja-{sys.implementation.cache_tag}" / "objects" / f"{name}_cu.o"


def cuda_readings(source: Path) -> list[Reading]:
    """Reads every kernel of a compiled .cu file, for every architecture that the object holds.

    A source that calls mma_m16n8k16 or wgmma, or whose family's headers do, must show tensor-core instructions on every
    architecture, in one kernel at least.
    """
    target = cuda_object(source)
    cache = (
        CACHE
        / f"cuda-{source.stem}-{_digest(Path(__file__).read_bytes(), target.read_bytes(), source.read_bytes())}.json"
    )
    if not cache.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        readings = []
        for architecture, functions in read_object(target).items():
            wanted = {"mma_m16n8k16": "hmma", "wgmma<": "hgmma"}
            text = with_headers(source)
            missing = any(
                call in text and not any(f[kind] for f in functions.values()) for call, kind in wanted.items()
            )
            for name, numbers in functions.items():
                readings.append(
                    Reading(
                        source.parent.name, "cuda", name, architecture, needs_matrix_instructions=missing, **numbers
                    )
                )
        _store(cache, readings)
    return _load(cache)


def with_headers(source: Path) -> str:
    """The text of a CUDA source and of the headers of its family that it includes."""
    text = source.read_text()
    headers = re.findall(rf'#include "({source.parent.name}/[^"]+)"', text)
    return "\n".join([text, *((ROOT / "csrc" / header).read_text() for header in headers)])


def read_object(path: Path) -> dict[int, dict[str, dict[str, int]]]:
    """Reads a cubin or an object file with cuobjdump: architecture -> kernel -> Reading's numbers."""
    usage, sass = _cuobjdump("-res-usage", path), _cuobjdump("-sass", path)
    result: dict[int, dict[str, dict[str, int]]] = {}
    architecture = _architecture(sass, path)
    name = ""
    for line in usage.splitlines():
        if found := re.match(r"\s*arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:\d+ SHARED:(\d+)", line):
            numbers = dict(registers=int(found[1]), shared=int(found[2]), **dict.fromkeys(COUNTED.values(), 0))
            result.setdefault(architecture, {})[name] = numbers
    for line in sass.splitlines():
        if found := re.match(r"\s*arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function : (\S+)", line):
            name = found[1]
        elif found := re.search(rf"\b({'|'.join(COUNTED)})\b", line.split(";")[0]):
            result[architecture][name][COUNTED[found[1]]] += 1
    names = _demangled([name for functions in result.values() for name in functions])
    return {a: {names[name]: numbers for name, numbers in functions.items()} for a, functions in result.items()}


def _architecture(sass: str, path: Path) -> int:
    found = re.search(r"(?:arch = |code for |EF_CUDA_)(?:sm_|SM)(\d+)", sass)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say which architecture {path} is for")
    return int(found[1])


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([str(program), option, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} {path}: {done.stderr}")
    return done.stdout


def _demangled(names: list[str]) -> dict[str, str]:
    """C++ names in readable form, without the anonymous namespace and the parameters, where c++filt is installed."""
    if shutil.which("c++filt") is None or not names:
        return {name: name for name in names}
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    readable = {}
    for name, line in zip(names, text.splitlines(), strict=True):
        line = line.replace("(anonymous namespace)::", "").removeprefix("void ")
        readable[name] = re.sub(r"\((?:int|bool|long|unsigned int)\)", "", line).split("(")[0]
    return readable if len(set(readable.values())) == len(set(names)) else {name: name for name in names}


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _store(path: Path, readings: list[Reading]) -> None:
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps([asdict(reading) for reading in readings], indent=1))
    fresh.replace(path)


def _load(path: Path) -> list[Reading]:
    return [Reading(**entry) for entry in json.loads(path.read_text())]


if __name__ == "__main__":
    sys.exit(main())
