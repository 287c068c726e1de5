"""Without a GPU the Triton kernels are tested in Triton's interpreter: chosen here, before any kernel is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
