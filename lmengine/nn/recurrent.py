"""Recurrent layers in the place of torch.nn's: the same constructor, state_dict, results and exceptions.

Dimensions: length, batch, features, hidden, directions (1 or 2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence

from lmengine.ops.matmul import linear
from lmengine.ops.recurrent import lstm

State = tuple[torch.Tensor, torch.Tensor]


class LSTM(torch.nn.RNNBase):
    """`torch.nn.LSTM` on lmengine's kernels; takes its arguments, its state_dict and its inputs, and compiles whole.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch's.
        proj_size: must be 0; projections are not implemented.

    Inputs: input (length, batch, input_size), or (batch, length, input_size) with batch_first, or (length, input_size),
        or a PackedSequence; hx, a pair (h_0, c_0) of (num_layers * directions, batch, hidden_size), zeros if left out.

    Returns:
        output (length, batch, directions * hidden_size), laid out as the input; and (h_n, c_n), shaped as hx.

    Raises:
        NotImplementedError: proj_size is not 0.
        ValueError, TypeError, RuntimeError: as torch.nn.LSTM.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size:
            raise NotImplementedError(f"proj_size: expected 0, got {proj_size}: projections are not implemented")
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels take the weights wherever they lie."""

    def forward(
        self, input: torch.Tensor | PackedSequence, hx: State | None = None
    ) -> tuple[torch.Tensor | PackedSequence, State]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            if hx is not None:
                _check_dim(hx, 2, "unbatched 2-D input")
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        elif hx is not None:
            _check_dim(hx, 3, "batched 3-D input")
        if self.batch_first:
            input = input.transpose(0, 1)  # (length, batch, features)
        self._check_features(input)
        if input.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        input, h_0, c_0 = self._states(input, hx, input.shape[1])

        h_n, c_n = [], []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(1 + self.bidirectional):
                index = layer * (1 + self.bidirectional) + direction
                gates, weight_hh = self._input_gates(input, index)
                output, h, c = lstm(gates.flip(0) if direction else gates, weight_hh, h_0[index], c_0[index])
                outputs.append(output.flip(0) if direction else output)
                h_n.append(h)
                c_n.append(c)
            input = self._between(outputs, layer)

        if self.batch_first:
            input = input.transpose(0, 1)
        if not batched:
            return input.squeeze(0 if self.batch_first else 1), (torch.cat(h_n), torch.cat(c_n))
        return input, (torch.stack(h_n), torch.stack(c_n))

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        """Steps that share a batch size run in one call; sequences leave the batch, the shortest first, as they end
        (or, backwards in time, join it)."""
        input, batch_sizes, sorted_indices, unsorted_indices = packed
        if input.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
        self._check_features(input)
        if hx is not None and sorted_indices is not None:
            hx = (hx[0].index_select(1, sorted_indices), hx[1].index_select(1, sorted_indices))
        input, h_0, c_0 = self._states(input, hx, int(batch_sizes[0]))
        sizes, steps = (x.tolist() for x in torch.unique_consecutive(batch_sizes, return_counts=True))

        h_n, c_n = [], []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(1 + self.bidirectional):
                index = layer * (1 + self.bidirectional) + direction
                gates, weight_hh = self._input_gates(input, index)
                run = _run_packed_reverse if direction else _run_packed
                output, h, c = run(gates, weight_hh, h_0[index], c_0[index], sizes, steps)
                outputs.append(output)
                h_n.append(h)
                c_n.append(c)
            input = self._between(outputs, layer)

        h, c = torch.stack(h_n), torch.stack(c_n)
        if unsorted_indices is not None:
            h, c = h.index_select(1, unsorted_indices), c.index_select(1, unsorted_indices)
        return PackedSequence(input, batch_sizes, sorted_indices, unsorted_indices), (h, c)

    def _input_gates(self, input: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The product of all inputs of one layer and direction, and its recurrent weight."""
        weight_ih, weight_hh, *biases = (getattr(self, name) for name in self._all_weights[index])
        if torch.is_autocast_enabled(input.device.type):
            weight_ih, weight_hh, biases = (
                weight_ih.to(input.dtype),
                weight_hh.to(input.dtype),
                [b.to(input.dtype) for b in biases],
            )
        return linear(input, weight_ih, biases[0] + biases[1] if biases else None), weight_hh

    def _between(self, outputs: list[torch.Tensor], layer: int) -> torch.Tensor:
        """Both directions' outputs side by side, with dropout if another layer follows."""
        output = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        if self.dropout and self.training and layer + 1 < self.num_layers:
            output = F.dropout(output, self.dropout)
        return output

    def _check_features(self, input: torch.Tensor) -> None:
        dtype = getattr(self, self._all_weights[0][0]).dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )

    def _states(
        self, input: torch.Tensor, hx: State | None, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The input and the checked initial states, (num_layers * directions, batch, hidden), in one dtype."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
            hx = hx and (hx[0].to(input.dtype), hx[1].to(input.dtype))
        shape = (self.num_layers * (1 + self.bidirectional), batch, self.hidden_size)
        if hx is None:
            zeros = input.new_zeros(shape)
            return input, zeros, zeros
        for i, state in enumerate(hx):
            if state.shape != shape:
                raise RuntimeError(f"Expected hidden[{i}] size {shape}, got {list(state.shape)}")
        return input, hx[0], hx[1]


def _check_dim(hx: State, dim: int, what: str) -> None:
    if hx[0].dim() != dim or hx[1].dim() != dim:
        raise RuntimeError(
            f"For {what}, hx and cx should also be {dim}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )


def _run_packed(
    gates: torch.Tensor, weight_hh: torch.Tensor, h: torch.Tensor, c: torch.Tensor, sizes: list[int], steps: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs, ended = [], []
    for part, size, count in zip(
        gates.split([n * t for n, t in zip(sizes, steps, strict=True)]), sizes, steps, strict=True
    ):
        ended.append((h[size:], c[size:]))
        output, h, c = lstm(part.unflatten(0, (count, size)), weight_hh, h[:size], c[:size])
        outputs.append(output.flatten(0, 1))
    ended.append((h, c))
    final_h, final_c = (torch.cat(states[::-1]) for states in zip(*ended, strict=True))
    return torch.cat(outputs), final_h, final_c


def _run_packed_reverse(
    gates: torch.Tensor,
    weight_hh: torch.Tensor,
    h_0: torch.Tensor,
    c_0: torch.Tensor,
    sizes: list[int],
    steps: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs: list[torch.Tensor] = []
    parts = gates.split([size * count for size, count in zip(sizes, steps, strict=True)])
    h, c = h_0[:0], c_0[:0]
    for part, size, count in reversed(list(zip(parts, sizes, steps, strict=True))):
        joined = len(h)
        h, c = torch.cat((h, h_0[joined:size])), torch.cat((c, c_0[joined:size]))
        output, h, c = lstm(part.unflatten(0, (count, size)).flip(0), weight_hh, h, c)
        outputs.append(output.flip(0).flatten(0, 1))
    return torch.cat(outputs[::-1]), h, c
