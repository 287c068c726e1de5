"""torch.nn.Linear on lmengine's matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from lmengine.ops.matmul import linear


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` with `lmengine.ops.matmul.linear`: faster on the CPU in float32, PyTorch's own elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
