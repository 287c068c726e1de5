"""Triton kernels, one file a family. Each file lists in `static_configurations()` what may ever be launched."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from lmengine.kernels.interpreter import correct_arithmetic

    correct_arithmetic()
