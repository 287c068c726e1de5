"""How fast each kernel family is beside PyTorch, on this machine and at the main job's sizes.

A `Case` is one piece of work done by us and by PyTorch; `measure` times both. Where PyTorch has no operator for the
work (co-occurrence counts, GloVe), its side is vectorised code of the kind that a user of PyTorch would write; of
several ways that were tried it is the fastest.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmengine.nn import LSTM
from lmengine.nn.functional import scaled_dot_product_attention
from lmengine.ops.cooccurrence import cooccurrence
from lmengine.ops.embedding import glove_epoch, glove_schedule

GLOVE_BATCH = 16384
Call = Callable[[], Any]
Counts = tuple[Tensor, Tensor, Tensor]  # rows, columns, values


@dataclass(frozen=True)
class KernelSpeed:
    """The median seconds of one piece of work, ours and PyTorch's, and how many times as fast ours is."""

    family: str
    direction: str
    shape: str
    dtype: str
    ours_seconds: float
    torch_seconds: float
    ratio: float


@dataclass(frozen=True)
class Case:
    """The same work twice: `ours` and `theirs` may be called again and again."""

    family: str
    direction: str
    shape: str
    dtype: str
    ours: Call
    theirs: Call


def measure(
    cases: Sequence[Case] | None = None,
    seconds: float = 0.5,
    progress: Callable[[int, int, str], Any] = lambda done, total, name: None,
) -> list[KernelSpeed]:
    """Time every case: one call each to warm up, then ours and PyTorch's in turn.

    Args:
        cases: what to time; `main_cases()` where it is None.
        seconds: how long to time a case; 3 rounds at least if they fit into eight times as much, and 100 at most.
        progress: called before each case with how many are done, how many there are, and its name; and at the end.
    """
    cases = main_cases() if cases is None else cases
    results = []
    for done, case in enumerate(cases):
        progress(done, len(cases), f"{case.family} {case.direction}")
        ours, theirs = map(statistics.median, samples(case, seconds))
        results.append(KernelSpeed(case.family, case.direction, case.shape, case.dtype, ours, theirs, theirs / ours))
    progress(len(cases), len(cases), "")
    return results


def main_cases(device: str | torch.device = "cpu") -> list[Case]:
    """The sizes of the main job."""
    tokens = zipf_tokens(500_000, 8000).to(device)
    counts = cooccurrence(tokens, 8000)
    return [
        *attention_cases(32, 4, 64, 32, device=device),
        *attention_cases(16, 4, 128, 32, device=device),
        *lstm_cases(32, 64, 128, device=device),
        cooccurrence_case(tokens, 8000),
        glove_case(counts, 8000, 64),
    ]


def samples(case: Case, seconds: float) -> tuple[list[float], list[float]]:
    """The seconds of each of our calls and of PyTorch's, taken in turn; see `measure`."""
    ours: list[float] = []
    theirs: list[float] = []
    calls = [(case.ours, ours), (case.theirs, theirs)]
    for call, _ in calls:
        call()
    begin = time.perf_counter()
    for round in range(100):
        if time.perf_counter() - begin > (seconds if round >= 3 else 8 * seconds):
            break
        for call, taken in calls:
            taken.append(_seconds(call))
        calls.reverse()  # neither is always the one that finds the caches cold
    return ours, theirs


def _seconds(call: Call) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


# ---- attention and LSTM ----------------------------------------------------------------------------------------


def attention_cases(
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    is_causal: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> list[Case]:
    """scaled_dot_product_attention of heads that lie side by side, as a layer's projection leaves them."""
    query, key, value, grad = (
        torch.randn(batch, length, heads, head_dim, dtype=dtype, device=device).transpose(1, 2) for _ in range(4)
    )
    leaves = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    shape = f"{batch} x {heads} x {length} x {head_dim}{' causal' if is_causal else ''}"
    ours, theirs = (
        _both_directions(functools.partial(function, *leaves, is_causal=is_causal), leaves, grad)
        for function in (scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    return _cases("attention", shape, dtype, ours, theirs)


def lstm_cases(
    batch: int, length: int, hidden: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> list[Case]:
    """nn.LSTM with inputs as wide as its state: the product of the inputs and the recurrence."""
    input = torch.randn(length, batch, hidden, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(length, batch, hidden, dtype=dtype, device=device)
    ours, theirs = (
        _both_directions(functools.partial(_outputs, layer, input), [input, *layer.parameters()], grad)
        for layer in (LSTM(hidden, hidden, dtype=dtype, device=device), torch.nn.LSTM(hidden, hidden).to(device, dtype))
    )
    return _cases("recurrent", f"LSTM {batch} x {length} x {hidden}", dtype, ours, theirs)


def _outputs(layer: torch.nn.Module, input: Tensor) -> Tensor:
    return layer(input)[0]


def _both_directions(output: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> tuple[Call, Call]:
    """The forward pass alone, and with the gradients of `leaves`."""
    return torch.no_grad()(output), lambda: torch.autograd.grad(output(), leaves, grad)


def _cases(
    family: str, shape: str, dtype: torch.dtype, ours: tuple[Call, Call], theirs: tuple[Call, Call]
) -> list[Case]:
    name = str(dtype).removeprefix("torch.")
    directions = ("forward", "forward+backward")
    return [
        Case(family, direction, shape, name, mine, other)
        for direction, mine, other in zip(directions, ours, theirs, strict=True)
    ]


# ---- co-occurrence counts ----------------------------------------------------------------------------------------


def zipf_tokens(length: int, vocabulary_size: int, seed: int = 0) -> Tensor:
    """(length,) int32, the word of rank r with a probability proportional to 1/r, as in text."""
    weights = 1 / torch.arange(1, vocabulary_size + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    words = torch.searchsorted(weights.cumsum(0), torch.rand(length, generator=generator).double() * weights.sum())
    return words.clamp(max=vocabulary_size - 1).int()


def cooccurrence_case(tokens: Tensor, vocabulary_size: int, window_size: int = 10) -> Case:
    """Symmetric counts, weighted by distance, of text without breaks."""
    return Case(
        "cooccurrence",
        "forward",
        f"{len(tokens)} tokens, {vocabulary_size} words, window {window_size}",
        "int32",
        lambda: cooccurrence(tokens, vocabulary_size, window_size),
        lambda: torch_cooccurrence(tokens, vocabulary_size, window_size),
    )


def torch_cooccurrence(tokens: Tensor, vocabulary_size: int, window_size: int = 10) -> Counts:
    """What `lmengine.ops.cooccurrence.cooccurrence` counts, in PyTorch.

    The pairs are counted without regard to their order, and the matrix is mirrored at the end: that halves what
    `unique` has to sort. Keys of 32 bits, where they suffice, halve it again. Slower were: all pairs in one `unique`, a
    stable sort with segment sums, a coalesced sparse tensor, and a dense matrix with `bincount`.
    """
    key_dtype = torch.int32 if vocabulary_size**2 < 2**31 else torch.int64
    text = tokens.to(key_dtype)
    keys, weights = [], []
    for distance in range(1, window_size + 1):
        one, other = text[distance:], text[:-distance]
        keys.append(torch.maximum(one, other) * vocabulary_size + torch.minimum(one, other))
        weights.append(torch.full((len(one),), 1 / distance, device=tokens.device))
    distinct, which = torch.unique(torch.cat(keys), return_inverse=True)
    sums = torch.zeros(len(distinct), device=tokens.device).index_add_(0, which, torch.cat(weights))

    rows, columns = distinct // vocabulary_size, distinct % vocabulary_size
    off = rows != columns
    sums = torch.where(off, sums, 2 * sums)
    keys_of_both, order = torch.sort(torch.cat([distinct, (columns * vocabulary_size + rows)[off]]))
    values = torch.cat([sums, sums[off]])[order]
    return (keys_of_both // vocabulary_size).int(), (keys_of_both % vocabulary_size).int(), values


# ---- GloVe -------------------------------------------------------------------------------------------------------


def glove_case(counts: Counts, vocabulary_size: int, dim: int) -> Case:
    """One epoch over all counts; each side goes on training its own vectors."""
    rows, columns, values = counts
    device = values.device
    generator = torch.Generator().manual_seed(0)
    order, stages = glove_schedule(rows, columns, vocabulary_size, 16 if device.type == "cpu" else 1024, generator)
    ours = (*glove_parameters(vocabulary_size, dim, device), rows[order], columns[order], values[order], stages)
    shuffled = torch.randperm(len(values), generator=generator).to(device)
    theirs = (*glove_parameters(vocabulary_size, dim, device), rows[shuffled], columns[shuffled], values[shuffled])
    shape = f"{len(values)} counts, {vocabulary_size} words, dim {dim}"
    return Case(
        "embedding", "GloVe epoch", shape, "float32", lambda: glove_epoch(*ours), lambda: torch_glove_epoch(*theirs)
    )


def glove_parameters(vocabulary_size: int, dim: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Fresh parameters and squared gradients, (2, vocabulary, dim + 1) each, as `glove_epoch` takes them."""
    generator = torch.Generator().manual_seed(0)
    first = (torch.rand(2, vocabulary_size, dim + 1, generator=generator) - 0.5) / dim
    return first.to(device), torch.ones_like(first, device=device)


def torch_glove_epoch(
    parameters: Tensor,
    squared_gradients: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    batch_size: int = GLOVE_BATCH,
    eta: float = 0.05,
    x_max: float = 100.0,
    alpha: float = 0.75,
    grad_clip: float = 100.0,
) -> Tensor:
    """GloVe's epoch in PyTorch, by mini-batches of shuffled counts: see `lmengine.ops.embedding.glove_epoch`.

    A batch's gradients are summed for each word and change its vector once. Slower, at these sizes, were steps on the
    words of the batch alone.

    Args:
        parameters, squared_gradients: (2, vocabulary, dim + 1) float32, changed in place.
        rows, columns, values: (entries,), in random order.

    Returns:
        the sum of the costs, () float64.
    """
    words, contexts = parameters
    word_squares, context_squares = squared_gradients
    logs, weights = values.log(), (values / x_max).pow(alpha).clamp_(max=1)
    cost = torch.zeros((), dtype=torch.float64, device=values.device)
    for i, j, log, weight in zip(*(tensor.split(batch_size) for tensor in (rows, columns, logs, weights)), strict=True):
        word, context = words.index_select(0, i), contexts.index_select(0, j)  # (batch, dim + 1)
        difference = torch.linalg.vecdot(word[:, :-1], context[:, :-1]) + word[:, -1] + context[:, -1] - log
        weighted = weight * difference
        cost += weighted @ difference / 2
        word[:, -1] = 1
        context[:, -1] = 1
        word_gradient = context.mul_(weighted[:, None]).clamp_(-grad_clip, grad_clip)
        context_gradient = word.mul_(weighted[:, None]).clamp_(-grad_clip, grad_clip)
        for vectors, squares, index, gradient in (
            (words, word_squares, i, word_gradient),
            (contexts, context_squares, j, context_gradient),
        ):
            step = torch.zeros_like(vectors).index_add_(0, index, gradient)
            vectors.addcdiv_(step, squares.sqrt(), value=-eta)
            squares.index_add_(0, index, gradient.square_(), alpha=eta**2)
    return cost
