"""Build of lmengine's two compiled parts: the operator library (LibTorch's stable ABI) and the corpus reader (pybind11).

The sources are compiled by ninja, so a second build recompiles only what changed. With nvcc (on PATH or under
CUDA_HOME) the operator library holds the CUDA kernels as well; without it, the CPU kernels alone.
LMENGINE_CUDA=0 leaves CUDA out, LMENGINE_CUDA=1 makes a missing nvcc an error.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
INSTRUCTION_SETS = {
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mfma -mf16c -mbmi2 -mprefer-vector-width=512",
    "avx512bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mavx512bf16 -mfma -mf16c -mbmi2"
    " -mprefer-vector-width=512",
}
GPU_TARGETS = {
    "_sm80": "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a"
    " -gencode arch=compute_80,code=compute_80",
    "_sm90": "-gencode arch=compute_90a,code=sm_90a",
}
COMMON = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -fno-math-errno -fno-trapping-math"
)


def find_nvcc() -> str | None:
    wanted = os.environ.get("LMENGINE_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"LMENGINE_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if os.access(nvcc, os.X_OK):
        return nvcc
    if wanted == "1":
        sys.exit(f"LMENGINE_CUDA=1, but there is no nvcc at {nvcc}: set CUDA_HOME or put nvcc on PATH")
    return None


def toolkit(nvcc: str) -> Path:
    """The folder of the CUDA toolkit that an nvcc belongs to; nvcc may be a link or a script elsewhere."""
    text = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    for line in text.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    sys.exit(f"{nvcc} --dryrun does not say where its toolkit lies: {text[:500]}")


def ninja_file(nvcc: str | None, torch_include: list[str], torch_lib: str, library: Path, corpus: Path) -> str:
    """The text of a build.ninja that makes `library` and `corpus`."""
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    includes = " ".join(f"-isystem {shlex.quote(path)}" for path in torch_include) + f" -I{ROOT / 'csrc'}"
    defines = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    lines = [
        "ninja_required_version = 1.10",
        f"rule cxx\n  command = {compiler} -MMD -MF $out.d {COMMON} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} -shared $in -o $out.new $flags && mv $out.new $out",
    ]
    if nvcc:
        # CUDA sources get their -I only: with -isystem nvcc would hide warnings of our own headers too
        lines.append(
            f"rule cuda\n  command = {nvcc} -MD -MF $out.d -ccbin {compiler} -std=c++20 -O3 -lineinfo --threads 2"
            " -Xcompiler -fPIC,-fvisibility=hidden -diag-suppress 20012 $flags -c $in -o $out"
            "\n  depfile = $out.d\n  deps = gcc"
        )
    objects = []

    def compile_source(rule: str, source: Path, name: str, flags: str) -> None:
        target = f"objects/{name}.o"
        lines.append(f"build {target}: {rule} {source}\n  flags = {flags}")
        objects.append(target)

    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        name = str(source.relative_to(ROOT / "csrc")).replace("/", "_").removesuffix(".cpp")
        if source.parent.name == "corpus" or (source.stem.endswith("_cuda") and not nvcc):
            continue
        if source.stem.endswith("_simd"):
            for isa, options in INSTRUCTION_SETS.items():
                compile_source("cxx", source, f"{name}_{isa}", f"-I{ROOT / 'csrc'} -DLMENGINE_ISA={isa} {options}")
        else:
            with_cuda = "-DLMENGINE_WITH_CUDA" if nvcc else ""
            compile_source("cxx", source, name, f"{includes} {defines} {with_cuda}")
    if nvcc:
        for source in sorted((ROOT / "csrc").rglob("*.cu")):
            name = str(source.relative_to(ROOT / "csrc")).replace("/", "_").removesuffix(".cu")
            targets = next((flags for suffix, flags in GPU_TARGETS.items() if source.stem.endswith(suffix)), None)
            if targets is None:
                sys.exit(f"{source}: the name of a CUDA source ends in one of {sorted(GPU_TARGETS)}")
            compile_source("cuda", source, f"{name}_cu", f"{includes} {defines} {targets}")
    # libtorch_cpu is found at run time through the torch that is imported first: no run path to the build's torch
    libraries = f"-L{torch_lib} -ltorch_cpu -ltorch -lc10 -lpthread"
    if nvcc:
        libraries += f" -L{toolkit(nvcc) / 'lib64'} -lcudart_static -ldl -lrt"
    lines.append(f"build {library}: link {' '.join(objects)}\n  flags = {libraries}")

    corpus_objects = []
    corpus_flags = f"-I{ROOT / 'csrc'} -isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    for source in sorted((ROOT / "csrc" / "corpus").glob("*.cpp")):
        target = f"objects/corpus_{source.stem}.o"
        lines.append(f"build {target}: cxx {source}\n  flags = {corpus_flags}")
        corpus_objects.append(target)
    lines.append(f"build {corpus}: link {' '.join(corpus_objects)}\n  flags = -lpthread")
    lines.append(f"default {library} {corpus}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    def run(self) -> None:
        try:
            import torch
            from torch.utils.cpp_extension import include_paths
        except ImportError as error:
            sys.exit(f"building lmengine needs torch's headers ({error}); build with isolation, or install torch first")
        nvcc = find_nvcc()
        include = include_paths("cpu")
        if nvcc:
            include = [*include, str(toolkit(nvcc) / "include")]
        output = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = output / "lmengine"
        package.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        text = ninja_file(nvcc, include, str(Path(torch.__file__).parent / "lib"), package / "_operators.so",
                          package / f"_corpus{suffix}")  # fmt: skip
        manifest = folder / "build.ninja"
        if not manifest.exists() or manifest.read_text() != text:
            manifest.write_text(text)
        print(
            f"lmengine: building {'CPU and CUDA' if nvcc else 'CPU (no nvcc found: without CUDA)'} kernels", flush=True
        )
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        if subprocess.run([*command, "-C", str(folder)], check=False).returncode:
            sys.exit("lmengine: the compiled library could not be built; the compiler's message is above")

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "lmengine"
        return [str(package / "_operators.so"), str(package / f"_corpus{sysconfig.get_config_var('EXT_SUFFIX')}")]


# one Extension makes the wheel a platform wheel; what it is built from is in ninja_file
setup(ext_modules=[Extension("lmengine._corpus", sources=[])], cmdclass={"build_ext": NinjaBuild})
