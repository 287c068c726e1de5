"""Recurrent layers over whole sequences: the LSTM's recurrence, after the product of its inputs.

Dimensions: length, batch, hidden. Gates are in the order input, forget, cell, output (i, f, g, o), as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lmengine.backends import Operator, library
from lmengine.ops.matmul import matmul

Tensors3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def lstm(input_gates: torch.Tensor, weight_hh: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> Tensors3:
    """One LSTM layer in one direction, over a whole sequence (Hochreiter and Schmidhuber, 1997; with a forget gate).

    For each step, with [i, f, g, o] = input_gates[t] + hidden @ weight_hh.T in quarters of the last dimension:
    ``cell = sigmoid(f) * cell + sigmoid(i) * tanh(g)`` and ``hidden = sigmoid(o) * tanh(cell)``.

    Args:
        input_gates: (length, batch, 4 * hidden), x @ weight_ih.T + bias_ih + bias_hh for all steps at once.
        weight_hh: (4 * hidden, hidden).
        hidden, cell: (batch, hidden), the state before the first step.
            All of one dtype (float32 or bfloat16 on the CPU; float16 too on a GPU) and device.

    Returns:
        outputs: (length, batch, hidden), the hidden state after each step.
        final_hidden, final_cell: (batch, hidden), the state after the last step.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
        lmengine.UnsupportedCall: the forced backend cannot do the call.
    """
    return OPERATOR(input_gates, weight_hh, hidden, cell)


def check(input_gates: torch.Tensor, weight_hh: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> None:
    tensors = {"input_gates": input_gates, "weight_hh": weight_hh, "hidden": hidden, "cell": cell}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype != input_gates.dtype:
            raise TypeError(f"{name}: expected {input_gates.dtype} as input_gates has, got {tensor.dtype}")
        if tensor.device != input_gates.device:
            raise ValueError(f"{name}: expected on {input_gates.device} as input_gates is, got {tensor.device}")
    if not input_gates.is_floating_point():
        raise TypeError(f"input_gates: expected a floating-point dtype, got {input_gates.dtype}")
    if input_gates.dim() != 3 or input_gates.shape[2] % 4:
        raise ValueError(f"input_gates: expected shape (length, batch, 4 * hidden), got {tuple(input_gates.shape)}")
    _, batch, size = input_gates.shape
    for name, shape in (("weight_hh", (size, size // 4)), ("hidden", (batch, size // 4)), ("cell", (batch, size // 4))):
        if tensors[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensors[name].shape)}")


# ---- reference -------------------------------------------------------------------------------------------------


def lstm_reference(
    input_gates: torch.Tensor, weight_hh: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
) -> Tensors3:
    outputs = []
    for step in input_gates.unbind(0):
        i, f, g, o = (step + hidden @ weight_hh.t()).chunk(4, dim=1)  # (batch, hidden) each
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    stacked = torch.stack(outputs) if outputs else input_gates.new_empty(0, *hidden.shape)
    return stacked, hidden.clone(), cell.clone()


# ---- C++ and CUDA ----------------------------------------------------------------------------------------------


def keeps(*tensors: torch.Tensor) -> bool:
    """Whether a backward pass may follow, so that the forward pass must keep what it needs."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def lstm_compiled(
    input_gates: torch.Tensor, weight_hh: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
) -> Tensors3:
    keep = keeps(input_gates, weight_hh, hidden, cell)
    return torch.ops.lmengine.lstm_forward(input_gates, weight_hh, hidden, cell, keep)[:3]


def lstm_forward_fake(
    input_gates: torch.Tensor, weight_hh: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, ...]:
    length, batch, gates = input_gates.shape
    kept = length if keep else 0
    return (
        input_gates.new_empty(length, batch, gates // 4),
        hidden.new_empty(hidden.shape),
        cell.new_empty(cell.shape),
        input_gates.new_empty((kept, batch, gates // 4), dtype=torch.float32),
        input_gates.new_empty(kept, batch, gates),
    )


def lstm_backward_fake(
    grad_outputs: torch.Tensor | None,
    grad_final_hidden: torch.Tensor | None,
    grad_final_cell: torch.Tensor | None,
    weight_hh: torch.Tensor,
    cell: torch.Tensor,
    cells: torch.Tensor,
    gates: torch.Tensor,
) -> Tensors3:
    return gates.new_empty(gates.shape), cell.new_empty(cell.shape), cell.new_empty(cell.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, weight_hh, hidden, cell, keep = inputs
    outputs, _, _, cells, gates = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(cells, gates)
    ctx.kept = keep
    ctx.save_for_backward(weight_hh, hidden, cell, outputs, cells, gates)


def lstm_gradients(backward: Any) -> Any:
    """The autograd formula of a forward operator, given the operator of the gates' gradients."""

    def formula(
        ctx: Any,
        grad_outputs: torch.Tensor | None,
        grad_final_hidden: torch.Tensor | None,
        grad_final_cell: torch.Tensor | None,
        *_: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        if not ctx.kept:
            raise RuntimeError("lstm_forward: keep=False was given, so there is nothing for the backward pass")
        weight_hh, hidden, cell, outputs, cells, gates = ctx.saved_tensors
        grad_gates, grad_hidden, grad_cell = backward(
            grad_outputs, grad_final_hidden, grad_final_cell, weight_hh, cell, cells, gates
        )
        grad_weight = None
        if ctx.needs_input_grad[1]:
            previous = torch.cat((hidden[None], outputs))[:-1]  # the hidden state before each step
            grad_weight = matmul(grad_gates.flatten(0, 1).t(), previous.flatten(0, 1))
        return grad_gates, grad_weight, grad_hidden, grad_cell, None

    return formula


def unsupported(*dtypes: torch.dtype) -> Callable[..., str | None]:
    """A backend's check: its dtypes are all that may be in the way."""

    def reason(
        input_gates: torch.Tensor, weight_hh: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> str | None:
        if input_gates.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"input_gates: expected {names}, got {input_gates.dtype}"
        return None

    return reason


CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATOR = Operator("lstm", check)
OPERATOR.register("reference", lstm_reference, lambda *_: None)
if library() is not None:
    torch.library.register_fake("lmengine::lstm_forward", lstm_forward_fake)
    torch.library.register_fake("lmengine::lstm_backward", lstm_backward_fake)
    torch.library.register_autograd(
        "lmengine::lstm_forward",
        lstm_gradients(torch.ops.lmengine.lstm_backward),
        setup_context=save_for_backward,
    )
    OPERATOR.register("cpu", lstm_compiled, unsupported(*CPU_DTYPES))
    OPERATOR.register("cuda", lstm_compiled, unsupported(*GPU_DTYPES))


# ---- Triton ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("lmengine::lstm_triton_forward", mutates_args=())
def triton_forward(
    input_gates: torch.Tensor, weight_hh: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from lmengine.kernels import recurrent as kernels

    return kernels.forward(input_gates, weight_hh, hidden, cell, keep)


@torch.library.custom_op("lmengine::lstm_triton_backward", mutates_args=())
def triton_backward(
    grad_outputs: torch.Tensor | None,
    grad_final_hidden: torch.Tensor | None,
    grad_final_cell: torch.Tensor | None,
    weight_hh: torch.Tensor,
    cell: torch.Tensor,
    cells: torch.Tensor,
    gates: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from lmengine.kernels import recurrent as kernels

    return kernels.backward(grad_outputs, grad_final_hidden, grad_final_cell, weight_hh, cell, cells, gates)


def lstm_triton(
    input_gates: torch.Tensor, weight_hh: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
) -> Tensors3:
    keep = keeps(input_gates, weight_hh, hidden, cell)
    return triton_forward(input_gates, weight_hh, hidden, cell, keep)[:3]


triton_forward.register_fake(lstm_forward_fake)
triton_backward.register_fake(lstm_backward_fake)
triton_forward.register_autograd(lstm_gradients(triton_backward), setup_context=save_for_backward)
OPERATOR.register("triton", lstm_triton, unsupported(*GPU_DTYPES))

lstm.operator_name = "lstm"  # type: ignore[attr-defined]
