"""Every GPU kernel as compiled: no spills, shared memory within the chip's, tensor cores where they belong."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from bench import static

CONFIGURATIONS = [
    pytest.param(
        family, configuration.name, architecture, configuration.quick,
        marks=() if configuration.quick else pytest.mark.slow, id=f"{configuration.name} sm_{architecture}",
    )
    for family in static.triton_families()
    for configuration in static.configurations(family)
    for architecture in configuration.architectures
]  # fmt: skip
FAULTS = """
import json
from dataclasses import asdict
from bench.static import ARCHITECTURES, compile_offline
from tests.static.kernels_with_faults import static_configurations
print(json.dumps([asdict(compile_offline("faults", c, a)) for c in static_configurations() for a in ARCHITECTURES]))
"""


@pytest.mark.parametrize(("family", "name", "architecture", "quick"), CONFIGURATIONS)
def test_triton_kernel(family, name, architecture, quick):
    found = [r for r in static.triton_readings(family, quick) if (r.kernel, r.architecture) == (name, architecture)]
    assert len(found) == 1, f"the names of {family}'s configurations must differ: {name!r}"
    assert found[0].broken_limits() == []


@pytest.mark.parametrize("source", static.cuda_sources(), ids=lambda path: path.stem)
def test_cuda_kernels(source):
    if not static.cuda_object(source).exists():
        pytest.skip("the library is built without CUDA: no object file to read")
    readings = static.cuda_readings(source)
    assert {r.architecture for r in readings} >= ({90} if source.stem.endswith("_sm90") else {80, 90})
    assert {r.kernel: r.broken_limits() for r in readings if r.broken_limits()} == {}


@functools.cache
def readings_of_faults() -> list[static.Reading]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=static.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return [static.Reading(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("right", None),
        ("spills", "instructions on local memory"),
        ("too much shared memory", "bytes of shared memory"),
        ("no matrix instructions", "no tensor-core instruction"),
        ("does not compile", "does not compile"),
    ],
)
def test_limits_are_watched(name, report):
    readings = [reading for reading in readings_of_faults() if reading.kernel == name]
    assert [reading.architecture for reading in readings] == [80, 90]
    for reading in readings:
        broken = reading.broken_limits()
        assert len(broken) == (report is not None)
        assert report is None or report in broken[0]
    if name == "right":
        assert readings[0].hmma > 0 and readings[1].hgmma > 0


def test_products_one_after_the_other_are_a_broken_limit():
    serial = static.Reading("f", "cuda", "f backward", 90, registers=168, hgmma=32, waits=32)
    assert "one after the other" in serial.broken_limits()[0]
    assert static.Reading("f", "cuda", "f backward", 90, registers=168, hgmma=32, waits=4).broken_limits() == []


def test_table_shows_every_reading():
    readings = [static.Reading("f", "triton", "f forward", 80, registers=64, shared=8192, hmma=16)]
    assert " ".join(static.table(readings).splitlines()[1].split()) == "triton f forward sm_80 64 8192 0 16 0 0"


def test_unknown_family_is_refused(capsys):
    assert static.main(["nonsense"]) == 2
    assert "got 'nonsense'" in capsys.readouterr().err


def test_readings_survive_the_cache(tmp_path):
    readings = [static.Reading("f", "cuda", "kernel", 90, registers=32, spills=2)]
    static._store(tmp_path / "readings.json", readings)
    assert [asdict(r) for r in static._load(tmp_path / "readings.json")] == [asdict(r) for r in readings]
