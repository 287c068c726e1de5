"""The LSTM in Triton, forward and backward: one launch a step for any size, and one launch for a whole sequence where
a program holds all hidden units of its rows.

T: length, B: batch, H: hidden. Gates are in the order input, forget, cell, output, as rows of weight_hh (4 * H, H).
A program has BLOCK_M rows of the batch and BLOCK_N hidden units, with their four gates; cell states are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lmengine.kernels.configuration import StaticConfiguration
from torch import Tensor

MAX_WHOLE = 128  # hidden units that one program can hold


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def gate_gradients(i, f, g, o, cell, previous_cell, grad_hidden, grad_cell):
    """The gradients of the gates before their nonlinearities, and of the cell state before the step."""
    tanh_cell = tanh(cell)
    grad_cell += grad_hidden * o * (1.0 - tanh_cell * tanh_cell)
    grad_i = grad_cell * g * i * (1.0 - i)
    grad_f = grad_cell * previous_cell * f * (1.0 - f)
    grad_g = grad_cell * i * (1.0 - g * g)
    grad_o = grad_hidden * tanh_cell * o * (1.0 - o)
    return grad_i, grad_f, grad_g, grad_o, grad_cell * f


# ---- forward ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["t", "batch", "hidden", "keep"])
def forward_step_kernel(
    input_gates, weight_hh, hidden_states, states, outputs, cells, gates, t, batch, hidden, keep,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Step t. hidden_states: (B, H) before step 0; states: the cell states (B, H), float32, updated in place."""
    if ALIGNED:
        hidden = hidden // 16 * 16  # the same, but the compiler sees that rows are aligned
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, unit_inside = rows < batch, units < hidden
    inside = row_inside[:, None] & unit_inside[None, :]
    step = t * tl.cast(batch, tl.int64)
    previous = hidden_states
    if t > 0:
        previous = outputs + (step - batch) * hidden
    i = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    f = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate_size = tl.cast(hidden, tl.int64) * hidden
    for begin in range(0, hidden, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        h = tl.load(previous + rows[:, None] * hidden + k[None, :], row_inside[:, None] & (k < hidden)[None, :], 0.0)
        weight = weight_hh + units[None, :] * hidden + k[:, None]  # transposed: (k, unit)
        there = (k < hidden)[:, None] & unit_inside[None, :]
        i = tl.dot(h, tl.load(weight, there, 0.0), i, input_precision="ieee")
        f = tl.dot(h, tl.load(weight + gate_size, there, 0.0), f, input_precision="ieee")
        g = tl.dot(h, tl.load(weight + 2 * gate_size, there, 0.0), g, input_precision="ieee")
        o = tl.dot(h, tl.load(weight + 3 * gate_size, there, 0.0), o, input_precision="ieee")
    at = (step + rows)[:, None] * 4 * hidden + units[None, :]
    i = tl.sigmoid(i + tl.load(input_gates + at, inside, 0.0).to(tl.float32))
    f = tl.sigmoid(f + tl.load(input_gates + at + hidden, inside, 0.0).to(tl.float32))
    g = tanh(g + tl.load(input_gates + at + 2 * hidden, inside, 0.0).to(tl.float32))
    o = tl.sigmoid(o + tl.load(input_gates + at + 3 * hidden, inside, 0.0).to(tl.float32))
    state_at = rows[:, None] * hidden + units[None, :]
    cell = f * tl.load(states + state_at, inside, 0.0) + i * g
    tl.store(states + state_at, cell, inside)
    output_at = step * hidden + state_at
    tl.store(outputs + output_at, (o * tanh(cell)).to(outputs.dtype.element_ty), inside)
    kept = inside & (keep != 0)
    tl.store(cells + output_at, cell, kept)
    tl.store(gates + at, i.to(gates.dtype.element_ty), kept)
    tl.store(gates + at + hidden, f.to(gates.dtype.element_ty), kept)
    tl.store(gates + at + 2 * hidden, g.to(gates.dtype.element_ty), kept)
    tl.store(gates + at + 3 * hidden, o.to(gates.dtype.element_ty), kept)


@triton.jit(do_not_specialize=["length", "batch", "hidden", "keep"])
def forward_whole_kernel(
    input_gates, weight_hh, hidden_states, states, outputs, cells, gates, length, batch, hidden, keep,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All steps; BLOCK_N covers all hidden units, a multiple of 16. Hidden and cell states stay in the program."""
    hidden = hidden // 16 * 16
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.arange(0, BLOCK_N)
    inside = (rows < batch)[:, None] & (units < hidden)[None, :]
    state_at = rows[:, None] * hidden + units[None, :]
    h = tl.load(hidden_states + state_at, inside, 0.0)
    cell = tl.load(states + state_at, inside, 0.0)
    # transposed: (k, unit)
    weight = weight_hh + units[None, :] * hidden + units[:, None]
    there = (units < hidden)[:, None] & (units < hidden)[None, :]
    gate_size = hidden * hidden
    at = rows[:, None] * 4 * hidden + units[None, :]
    output_at = state_at
    kept = inside & (keep != 0)
    for _ in range(length):
        # a gate at a time, each stored as soon as it is there, so that few are held
        i = tl.load(input_gates + at, inside, 0.0).to(tl.float32)
        i = tl.sigmoid(tl.dot(h, tl.load(weight, there, 0.0), i, input_precision="ieee"))
        tl.store(gates + at, i.to(gates.dtype.element_ty), kept)
        g = tl.load(input_gates + at + 2 * hidden, inside, 0.0).to(tl.float32)
        g = tanh(tl.dot(h, tl.load(weight + 2 * gate_size, there, 0.0), g, input_precision="ieee"))
        tl.store(gates + at + 2 * hidden, g.to(gates.dtype.element_ty), kept)
        f = tl.load(input_gates + at + hidden, inside, 0.0).to(tl.float32)
        f = tl.sigmoid(tl.dot(h, tl.load(weight + gate_size, there, 0.0), f, input_precision="ieee"))
        tl.store(gates + at + hidden, f.to(gates.dtype.element_ty), kept)
        cell = f * cell + i * g
        tl.store(cells + output_at, cell, kept)
        o = tl.load(input_gates + at + 3 * hidden, inside, 0.0).to(tl.float32)
        o = tl.sigmoid(tl.dot(h, tl.load(weight + 3 * gate_size, there, 0.0), o, input_precision="ieee"))
        tl.store(gates + at + 3 * hidden, o.to(gates.dtype.element_ty), kept)
        h = (o * tanh(cell)).to(outputs.dtype.element_ty)
        tl.store(outputs + output_at, h, inside)
        output_at += tl.cast(batch, tl.int64) * hidden
        at += tl.cast(batch, tl.int64) * 4 * hidden
    tl.store(states + state_at, cell, inside)


# ---- backward --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["t", "length", "batch", "hidden", "has_grad_outputs"])
def backward_step_kernel(
    grad_outputs, grad_states, weight_hh, cell, cells, gates, grad_gates, grad_hidden, t, length, batch, hidden,
    has_grad_outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Step t, from the gates' gradients at t + 1 to those at t; step -1 gives the gradient of the first hidden state.

    grad_states: the cell state's gradient (B, H), float32, updated in place. grad_hidden: (B, H), read as that of the
    last hidden state by step length - 1 and written by step -1.
    """
    if ALIGNED:
        hidden = hidden // 16 * 16
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, unit_inside = rows < batch, units < hidden
    inside = row_inside[:, None] & unit_inside[None, :]
    state_at = rows[:, None] * hidden + units[None, :]
    step = t * tl.cast(batch, tl.int64)
    grad_h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if t + 1 == length:
        grad_h = tl.load(grad_hidden + state_at, inside, 0.0).to(tl.float32)
    else:
        for begin in range(0, 4 * hidden, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            following = grad_gates + (step + batch + rows)[:, None] * 4 * hidden + k[None, :]
            left = tl.load(following, row_inside[:, None] & (k < 4 * hidden)[None, :], 0.0)
            weight = weight_hh + k.to(tl.int64)[:, None] * hidden + units[None, :]
            right = tl.load(weight, (k < 4 * hidden)[:, None] & unit_inside[None, :], 0.0)
            grad_h = tl.dot(left, right, grad_h, input_precision="ieee")
    if t < 0:
        tl.store(grad_hidden + state_at, grad_h.to(grad_hidden.dtype.element_ty), inside)
    else:
        at = (step + rows)[:, None] * 4 * hidden + units[None, :]
        output_at = step * hidden + state_at
        i = tl.load(gates + at, inside, 0.0).to(tl.float32)
        f = tl.load(gates + at + hidden, inside, 0.0).to(tl.float32)
        g = tl.load(gates + at + 2 * hidden, inside, 0.0).to(tl.float32)
        o = tl.load(gates + at + 3 * hidden, inside, 0.0).to(tl.float32)
        now = tl.load(cells + output_at, inside, 0.0)
        before = tl.load(cells + output_at - batch * hidden, inside & (t > 0), 0.0)
        before += tl.load(cell + state_at, inside & (t == 0), 0.0).to(tl.float32)
        grad_h += tl.load(grad_outputs + output_at, inside & (has_grad_outputs != 0), 0.0).to(tl.float32)
        grad_i, grad_f, grad_g, grad_o, grad_c = gate_gradients(
            i, f, g, o, now, before, grad_h, tl.load(grad_states + state_at, inside, 0.0)
        )
        tl.store(grad_states + state_at, grad_c, inside)
        tl.store(grad_gates + at, grad_i.to(grad_gates.dtype.element_ty), inside)
        tl.store(grad_gates + at + hidden, grad_f.to(grad_gates.dtype.element_ty), inside)
        tl.store(grad_gates + at + 2 * hidden, grad_g.to(grad_gates.dtype.element_ty), inside)
        tl.store(grad_gates + at + 3 * hidden, grad_o.to(grad_gates.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["length", "batch", "hidden", "has_grad_outputs"])
def backward_whole_kernel(
    grad_outputs, grad_states, weight_hh, cell, cells, gates, grad_gates, grad_hidden, length, batch, hidden,
    has_grad_outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All steps; BLOCK_N covers all hidden units, a multiple of 16. grad_hidden is read at first and written at last."""
    hidden = hidden // 16 * 16
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.arange(0, BLOCK_N)
    inside = (rows < batch)[:, None] & (units < hidden)[None, :]
    state_at = rows[:, None] * hidden + units[None, :]
    grad_h = tl.load(grad_hidden + state_at, inside, 0.0).to(tl.float32)
    grad_c = tl.load(grad_states + state_at, inside, 0.0)
    weight = weight_hh + units[:, None] * hidden + units[None, :]  # (gate's unit, unit)
    there = (units < hidden)[:, None] & (units < hidden)[None, :]
    gate_size = hidden * hidden
    last = (length - 1) * tl.cast(batch, tl.int64)
    at = (last + rows)[:, None] * 4 * hidden + units[None, :]
    output_at = last * hidden + state_at
    now = tl.load(cells + output_at, inside, 0.0)
    for step in range(length):
        i = tl.load(gates + at, inside, 0.0).to(tl.float32)
        f = tl.load(gates + at + hidden, inside, 0.0).to(tl.float32)
        g = tl.load(gates + at + 2 * hidden, inside, 0.0).to(tl.float32)
        o = tl.load(gates + at + 3 * hidden, inside, 0.0).to(tl.float32)
        first = step + 1 == length
        before = tl.load(cells + output_at - batch * hidden, inside & (step + 1 < length), 0.0)
        before += tl.load(cell + state_at, inside & first, 0.0).to(tl.float32)
        grad_h += tl.load(grad_outputs + output_at, inside & (has_grad_outputs != 0), 0.0).to(tl.float32)
        grad_i, grad_f, grad_g, grad_o, grad_c = gate_gradients(i, f, g, o, now, before, grad_h, grad_c)
        now = before
        i = grad_i.to(grad_gates.dtype.element_ty)
        f = grad_f.to(grad_gates.dtype.element_ty)
        g = grad_g.to(grad_gates.dtype.element_ty)
        o = grad_o.to(grad_gates.dtype.element_ty)
        tl.store(grad_gates + at, i, inside)
        tl.store(grad_gates + at + hidden, f, inside)
        tl.store(grad_gates + at + 2 * hidden, g, inside)
        tl.store(grad_gates + at + 3 * hidden, o, inside)
        grad_h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        grad_h = tl.dot(i, tl.load(weight, there, 0.0), grad_h, input_precision="ieee")
        grad_h = tl.dot(f, tl.load(weight + gate_size, there, 0.0), grad_h, input_precision="ieee")
        grad_h = tl.dot(g, tl.load(weight + 2 * gate_size, there, 0.0), grad_h, input_precision="ieee")
        grad_h = tl.dot(o, tl.load(weight + 3 * gate_size, there, 0.0), grad_h, input_precision="ieee")
        output_at -= tl.cast(batch, tl.int64) * hidden
        at -= tl.cast(batch, tl.int64) * 4 * hidden
    tl.store(grad_hidden + state_at, grad_h.to(grad_hidden.dtype.element_ty), inside)
    tl.store(grad_states + state_at, grad_c, inside)


# ---- launchers -------------------------------------------------------------------------------------------------


def step_blocks(kernel: str, dtype: torch.dtype, batch: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps and num_stages of a step: small tiles, so that a step has many programs."""
    rows = 16 if batch <= 16 else 32
    if dtype == torch.float32:  # without tensor cores
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    columns = 16 if kernel == "forward" else 32
    return {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}


def whole_blocks(hidden: int) -> dict[str, int]:
    block_n = max(16, triton.next_power_of_2(hidden))
    warps = 8 if block_n == 128 else 4
    return {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 1}


def is_whole(dtype: torch.dtype, hidden: int) -> bool:
    return dtype != torch.float32 and hidden <= MAX_WHOLE and hidden % 16 == 0


def forward(
    input_gates: Tensor, weight_hh: Tensor, hidden: Tensor, cell: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs (T, B, H), final hidden and cell state (B, H); and, if they are to be kept, cells (T, B, H) in float32
    and gates (T, B, 4 * H) after their nonlinearities."""
    input_gates, weight_hh, hidden = input_gates.contiguous(), weight_hh.contiguous(), hidden.contiguous()
    length, batch, _ = input_gates.shape
    size = hidden.shape[1]
    outputs = input_gates.new_empty(length, batch, size)
    cells = input_gates.new_empty((length if keep else 0, batch, size), dtype=torch.float32)
    gates = input_gates.new_empty(length if keep else 0, batch, 4 * size)
    if outputs.numel() == 0:
        return outputs, hidden.clone(), cell.clone(), cells, gates
    states = torch.empty_like(hidden, dtype=torch.float32).copy_(cell)
    arguments = (input_gates, weight_hh, hidden, states, outputs, cells, gates)
    if is_whole(input_gates.dtype, size):
        chosen = whole_blocks(size)
        grid = (triton.cdiv(batch, chosen["BLOCK_M"]),)
        forward_whole_kernel[grid](*arguments, length, batch, size, int(keep), **chosen)
    else:
        chosen = step_blocks("forward", input_gates.dtype, batch)
        grid = (triton.cdiv(batch, chosen["BLOCK_M"]), triton.cdiv(size, chosen["BLOCK_N"]))
        for t in range(length):
            forward_step_kernel[grid](*arguments, t, batch, size, int(keep), ALIGNED=size % 16 == 0, **chosen)
    return outputs, outputs[-1].clone(), states.to(cell.dtype), cells, gates


def backward(
    grad_outputs: Tensor | None,
    grad_final_hidden: Tensor | None,
    grad_final_cell: Tensor | None,
    weight_hh: Tensor,
    cell: Tensor,
    cells: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the input gates (T, B, 4 * H) and of the states before the first step (B, H)."""
    length, batch, size = cells.shape
    weight_hh, cell, cells, gates = (x.contiguous() for x in (weight_hh, cell, cells, gates))
    grad_gates = torch.empty_like(gates)
    grad_hidden, grad_states = torch.zeros_like(cell), torch.zeros_like(cell, dtype=torch.float32)
    if grad_final_hidden is not None:
        grad_hidden.copy_(grad_final_hidden)
    if grad_final_cell is not None:
        grad_states.copy_(grad_final_cell)
    if grad_gates.numel():
        has_grad_outputs = int(grad_outputs is not None)
        grad_outputs = gates if grad_outputs is None else grad_outputs.contiguous()  # not read in the first case
        arguments = (grad_outputs, grad_states, weight_hh, cell, cells, gates, grad_gates, grad_hidden)
        if is_whole(gates.dtype, size):
            chosen = whole_blocks(size)
            grid = (triton.cdiv(batch, chosen["BLOCK_M"]),)
            backward_whole_kernel[grid](*arguments, length, batch, size, has_grad_outputs, **chosen)
        else:
            chosen = step_blocks("backward", gates.dtype, batch)
            grid = (triton.cdiv(batch, chosen["BLOCK_M"]), triton.cdiv(size, chosen["BLOCK_N"]))
            for t in range(length - 1, -2, -1):
                backward_step_kernel[grid](
                    *arguments, t, length, batch, size, has_grad_outputs, ALIGNED=size % 16 == 0, **chosen
                )
    return grad_gates, grad_hidden, grad_states.to(cell.dtype)


# ---- for inspection without a GPU --------------------------------------------------------------------------------


def static_configurations() -> list[StaticConfiguration]:
    """All that may be launched: each kernel for each dtype and tile, the steps with hidden divisible by 16 and not."""
    found = []
    singles = ("states", "grad_states", "cells")  # in float32 always
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        launches = []
        for direction, kernel in (("forward", forward_step_kernel), ("backward", backward_step_kernel)):
            tiles = {batch: step_blocks(direction, dtype, batch) for batch in (16, 17)}
            for chosen in tiles.values() if tiles[16] != tiles[17] else [tiles[16]]:
                launches.append((f"{direction} step m{chosen['BLOCK_M']}", kernel, chosen))
        for direction, kernel in (("forward", forward_whole_kernel), ("backward", backward_whole_kernel)):
            for size in (16, 32, 64, 128):
                if is_whole(dtype, size):
                    launches.append((f"{direction} whole h{size}", kernel, whole_blocks(size)))
        for label, kernel, chosen in launches:
            constants = {key: size for key, size in chosen.items() if key.startswith("BLOCK")}
            for aligned in (True, False) if "step" in label else (True,):
                if "step" in label:
                    constants = {**constants, "ALIGNED": aligned}
                numbers = kernel.arg_names[
                    kernel.arg_names.index("grad_hidden" if "backward" in label else "gates") + 1 :
                ]
                signature = {
                    a: "i32" if a in numbers else "*fp32" if a in singles else f"*{name}"
                    for a in kernel.arg_names
                    if a not in constants
                }
                found.append(
                    StaticConfiguration(
                        f"recurrent {label} {name}{'' if aligned else ' odd'}", kernel, signature, constants,
                        chosen["num_warps"], chosen["num_stages"], matrix_instructions=name != "fp32",
                    )
                )  # fmt: skip
    return found
