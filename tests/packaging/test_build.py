"""The package as a user builds and installs it: a wheel with and without CUDA, a source archive, a wrong setting."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def sources() -> list[str]:
    """The files that belong to the project."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources alone, so that nothing built before can help or be disturbed."""
    copy = tmp_path_factory.mktemp("tree")
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def pip_wheel(tree: Path, output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-v", "-w", str(output)]
    return subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["auto", "0"])
def wheel(request, tree, tmp_path_factory):
    """(the wheel built with LMENGINE_CUDA set so, whether it has to hold CUDA kernels)"""
    output = tmp_path_factory.mktemp("wheel")
    done = pip_wheel(tree, output, LMENGINE_CUDA=request.param)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (path,) = output.glob("*.whl")
    with_cuda = "building CPU and CUDA kernels" in done.stdout + done.stderr
    if request.param == "0":
        assert not with_cuda
    elif shutil.which("nvcc"):
        assert with_cuda
    return path, with_cuda


def test_wheel_holds_the_library(wheel):
    path, _ = wheel
    assert "linux_x86_64" in path.name
    names = zipfile.ZipFile(path).namelist()
    assert "lmengine/_operators.so" in names
    assert any(name.startswith("lmengine/_corpus.") and name.endswith(".so") for name in names)
    assert "lmengine/py.typed" in names
    wanted = {f"lmengine/{name}" for name in sources() if name.startswith("kernels/")}
    wanted |= {name for name in sources() if name.startswith("lmengine/") and name.endswith(".py")}
    assert wanted <= set(names)


def test_installed_wheel_works_without_compilers(wheel, tmp_path):
    path, with_cuda = wheel
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "site"), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        "import shutil, lmengine, lmengine.backends as b; print(lmengine.__file__, b.unusable('cpu'), "
        "b.library().lmengine_built_with_cuda(), shutil.which('g++'), shutil.which('nvcc'), sep='|'); import lmengine._corpus"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LMENGINE_", "PYTHON"))}
    environment |= {"PATH": str(tmp_path / "empty"), "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    file, cpu, cuda, compiler, nvcc = done.stdout.splitlines()[-1].split("|")
    assert Path(file).is_relative_to(tmp_path / "site")
    assert (cpu, int(cuda), compiler, nvcc) == ("None", int(with_cuda), "None", "None")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LMENGINE_CUDA": "bogus"}, "LMENGINE_CUDA: expected 0, 1 or auto, got 'bogus'"),
        ({"LMENGINE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "there is no nvcc at /nowhere/bin/nvcc"),
    ],
)
def test_wrong_setting_is_an_error(tree, tmp_path, environment, message):
    done = pip_wheel(tree, tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_source_archive_is_complete(tree, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "LICENSE", "README.md"}
    needed |= {name for name in sources() if name.startswith(("csrc/", "kernels/", "lmengine/"))}
    assert needed <= names, f"missing from {path.name}: {sorted(needed - names)}"
