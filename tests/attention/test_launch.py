"""What the Triton launchers launch is what `static_configurations` describes: read from Triton's own binding of arguments.

A process that is not the interpreter, with a driver that names a GPU and stops before anything is compiled.
"""

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
bound = []
knobs.runtime.jit_cache_hook = lambda **found: bound.append(found["compile"]) or True

from lmengine.kernels import attention

count = 0
for kind, options in attention.KINDS.items():
    for architecture in (80, 90):
        for kernel, launch in attention.launches(options, 64, torch.bfloat16, architecture, 100, "cpu").items():
            launch.run()
            described = launch.described(kernel, launch.configurations[0], True)
            (found,) = bound
            bound.clear()
            names = list(found["signature"])
            signature = {n: t.replace(" ", "") for n, t in found["signature"].items() if t != "constexpr"}
            assert signature == described.signature, (kind, kernel, signature, described.signature)
            constants = {names[place]: value for (place,), value in found["constants"].items()}
            assert constants == described.constants, (kind, kernel, constants, described.constants)
            divisible = {names[place] for (place,), marks in found["configs"][0].items() if marks}
            expected = described.divisible_by_16 | {n for n, t in signature.items() if t.startswith("*")}
            assert divisible == expected, (kind, kernel, divisible, expected)
            assert found["num_warps"] == described.num_warps and found["num_stages"] == described.num_stages
            count += 1
print(count)
"""


def test_what_is_launched_is_what_is_described():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == 2 * 4 * 9
