"""The choice of backend: what is forced, what is refused and how the refusal reads."""

import subprocess
import sys

import pytest
import torch

import lmengine
from lmengine import backends
from lmengine.backends import Operator, UnsupportedCall


@pytest.fixture
def doubled(monkeypatch):
    """An operator whose CPU backend refuses tensors longer than 3."""
    monkeypatch.setattr(backends, "OPERATORS", dict(backends.OPERATORS))

    def check(tensor):
        if tensor.dim() != 1:
            raise ValueError(f"tensor: expected 1 dimension, got {tensor.dim()}")

    operator = Operator("doubled", check)
    operator.register("cpu", lambda t: ("cpu", t * 2), lambda t: "tensor: longer than 3" if len(t) > 3 else None)
    operator.register("reference", lambda t: ("reference", t + t), lambda t: None)
    return operator


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.setattr(backends, "_forced", None)


needs_library = pytest.mark.skipif(backends.unusable("cpu") is not None, reason=str(backends.unusable("cpu")))


@needs_library
def test_the_default_is_the_first_backend_that_supports_the_call(doubled):
    assert doubled(torch.ones(2))[0] == "cpu"
    backends.warn_of_reference.cache_clear()
    with pytest.warns(UserWarning, match="reference runs"):
        assert doubled(torch.ones(5))[0] == "reference"


@needs_library
def test_a_forced_backend_raises_rather_than_falls_back(doubled):
    with lmengine.use_backend("cpu"):
        assert doubled(torch.ones(3))[0] == "cpu"
        with pytest.raises(UnsupportedCall, match="'cpu' cannot do this call: tensor: longer than 3"):
            doubled(torch.ones(4))
        with lmengine.use_backend("reference"):
            assert doubled(torch.ones(3))[0] == "reference"
        assert doubled(torch.ones(3))[0] == "cpu"
    assert backends.forced_backend() is None


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="expected one of auto, cuda, triton, cpu, reference, got 'gpu'"):
        lmengine.use_backend("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_unusable_backend_says_why_at_once():
    with pytest.raises(UnsupportedCall, match=r"'cuda' cannot be used here: (no GPU|the library was built without)"):
        lmengine.use_backend("cuda")
    assert backends.forced_backend() is None


@needs_library
def test_explain_names_the_choice_and_every_refusal(doubled):
    found = doubled.explain(torch.ones(5))
    assert found.backend == "reference"
    assert found.reasons["cpu"] == "tensor: longer than 3"
    assert found.reasons["triton"] == "not implemented for this operator"
    assert str(found).startswith("doubled: reference\n")
    assert doubled.explain(torch.ones(1)).reasons["reference"] == "could, but does not: cpu comes first on cpu"


def test_checks_come_before_any_backend(doubled):
    with pytest.raises(ValueError, match="tensor: expected 1 dimension, got 2"):
        doubled(torch.ones(1, 1))


def test_explain_of_an_unknown_operator_lists_those_there_are():
    with pytest.raises(ValueError, match=r"expected one of .*, got 'convolution'"):
        lmengine.explain("convolution", torch.ones(1))


@pytest.mark.parametrize(("value", "forced"), [("reference", "reference"), ("", None), ("auto", None)])
def test_the_variable_forces_a_backend(value, forced):
    code = "from lmengine.backends import forced_backend; print(forced_backend())"
    done = subprocess.run([sys.executable, "-c", code], env=environment(value), capture_output=True, text=True)
    assert done.stdout.strip() == str(forced), done.stderr


def test_a_wrong_variable_is_an_error():
    done = subprocess.run(
        [sys.executable, "-c", "import lmengine; lmengine.backends.forced_backend()"],
        env=environment("cpp"),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "LMENGINE_BACKEND: expected one of auto, cuda, triton, cpu, reference, got 'cpp'" in done.stderr


def environment(backend):
    import os

    return {**os.environ, "LMENGINE_BACKEND": backend}


def test_info_names_every_backend():
    found = lmengine.info()
    assert set(found["backends"]) == set(backends.BACKENDS)
    assert found["backends"]["reference"] == "usable"
    assert found["torch"] == torch.__version__
