"""Inputs of the LSTM operator, and PyTorch's own operator with the same signature."""

import torch

from lmengine.ops.recurrent import lstm_reference
from tests.numerics import assert_right

NAMES = ("input_gates", "weight_hh", "hidden", "cell")
GPU = torch.cuda.is_available()
# where each backend's numerics are tested, and in which dtypes
PLACES = [("cpu", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
if GPU:
    PLACES += [(b, "cuda", d) for b in ("cuda", "triton") for d in (torch.float32, torch.bfloat16, torch.float16)]
else:
    PLACES += [("triton", "cpu", d) for d in (torch.float32, torch.bfloat16, torch.float16)]  # in the interpreter
PLACE_IDS = [f"{backend}-{str(dtype).removeprefix('torch.')}" for backend, _, dtype in PLACES]


def make_inputs(length, batch, hidden, dtype=torch.float32, device="cpu", scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, factor=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * factor).to(device, dtype)

    return (
        normal(length, batch, 4 * hidden, factor=scale),
        normal(4 * hidden, hidden, factor=max(hidden, 1) ** -0.5),
        normal(batch, hidden),
        normal(batch, hidden, factor=scale),
    )


def torch_lstm(input_gates, weight_hh, hidden, cell):
    """PyTorch's LSTM, whose input weight is the identity, so that its input is the input gates."""
    identity = torch.eye(weight_hh.shape[0], dtype=weight_hh.dtype, device=weight_hh.device)
    states = (hidden[None], cell[None])
    outputs, h, c = torch._VF.lstm(input_gates, states, [identity, weight_hh], False, 1, 0.0, False, False, False)
    return outputs, h[0], c[0]


def run(function, inputs, grads=None):
    """The outputs of function(*inputs) and, where `grads` of them are given, the gradients of the inputs."""
    if grads is None:
        with torch.no_grad():
            return [x.detach() for x in function(*inputs)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


def check_against_torch(function, inputs, backward=True, compare=torch_lstm, tiny=1e-6):
    """Hold function(*inputs), and its gradients, to the numerics rule."""
    length, batch, size = inputs[0].shape
    generator = torch.Generator().manual_seed(1)
    shapes = ((length, batch, size // 4), (batch, size // 4), (batch, size // 4))
    grads = [torch.randn(*shape, generator=generator).to(inputs[0]) for shape in shapes] if backward else None
    ours = run(function, inputs, grads)
    theirs = run(compare, inputs, grads)
    ref64 = run(lstm_reference, [x.double() for x in inputs], grads and [x.double() for x in grads])
    names = ["outputs", "final_hidden", "final_cell", *(f"grad of {name}" for name in NAMES)]
    for name, mine, other, exact in zip(names, ours, theirs, ref64, strict=False):
        assert_right(mine, other, exact, tiny=tiny, name=name)
