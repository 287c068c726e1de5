"""GloVe's training epoch: AdaGrad on the weighted least squares of Pennington et al. 2014.

Dimensions: vocabulary, dim = size of a word vector, entries = co-occurrence counts, stages and partitions = the order
in which the entries are visited, see `glove_schedule`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmengine import backends
from lmengine.backends import Operator
from lmengine.checks import check_above_zero, check_integer, shown

MAX_PARTITIONS = 32767


def glove_epoch(
    parameters: Tensor,
    squared_gradients: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    stages: Tensor,
    eta: float = 0.05,
    x_max: float = 100.0,
    alpha: float = 0.75,
    grad_clip: float = 100.0,
) -> Tensor:
    """Visit every co-occurrence count once, and change the vectors of its two words at once (in place).

    For a count x of row i and column j, with word vector w, context vector c and their biases a, b:
        difference = w_i · c_j + a_i + b_j − log x,   f = min(1, (x / x_max)^alpha),   cost = f · difference² / 2
        g = eta · clip(f · difference · c_j, ±grad_clip)   (the gradient for w_i times eta; likewise the other three)
        w_i ← w_i − g / √G,   G ← G + g²
    Both words' gradients are taken before either changes. The entries are visited one after another in the order of
    `stages`: stage after stage, in a stage partition after partition. Partitions of one stage must share no row and no
    column: then they may run at the same time with exactly the result of running in turn.

    Args:
        parameters: (2, vocabulary, dim + 1) float32 (float64 on the reference): [0] words, [1] contexts; the last
            column is the bias. Changed in place.
        squared_gradients: like parameters: G, of ones before the first epoch. Changed in place.
        rows, columns: (entries,) int32, in [0, vocabulary).
        values: (entries,) counts of the parameters' dtype, above 0 and finite.
        stages: (stages, partitions + 1) int64: partition p of stage s is the entries from stages[s, p] to
            stages[s, p + 1].
        eta, x_max, alpha, grad_clip: as above; all above 0, and finite but for grad_clip.

    Returns:
        the sum of the costs before each step: () float64.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or dtype.
        RuntimeError: an index out of range, or a value that is not above 0 and finite. Nothing was changed then.

    Source: Pennington, Socher, Manning, "GloVe: Global Vectors for Word Representation", EMNLP 2014, equation 8;
    AdaGrad as in the authors' program, which accumulates squares of gradients times eta.
    """
    return _operator(parameters, squared_gradients, rows, columns, values, stages, eta, x_max, alpha, grad_clip)


glove_epoch.operator_name = "glove_epoch"  # type: ignore[attr-defined]


def glove_schedule(
    rows: Tensor, columns: Tensor, vocabulary_size: int, partitions: int = 16, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """An order of the entries, and the stages of `glove_epoch` that go with it.

    Words are dealt into partitions by falling frequency, so that these are about equally long; the block of row
    partition p and column partition q runs in stage (q − p) mod partitions. Inside a block the order is random.

    Args:
        rows, columns: (entries,) int32 or int64, in [0, vocabulary_size).
        partitions: how many parts may run at once, up to 32767.
        generator: source of the randomness.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or dtype, or out of range.

    Returns:
        order (entries,) int64, a permutation to apply to rows, columns and values once; stages (partitions,
        partitions + 1) int64, whose rows may be put in another order before any epoch.
    """
    check_integer("vocabulary_size", vocabulary_size, 1, 2**31 - 1)
    check_integer("partitions", partitions, 1, MAX_PARTITIONS)
    for name, words in (("rows", rows), ("columns", columns)):
        if not isinstance(words, Tensor) or words.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected a tensor of int32 or int64, got {shown(words)}")
        if words.shape != (rows.numel(),):
            raise ValueError(f"{name}: expected shape (entries,) = ({rows.numel()},), got {tuple(words.shape)}")
        check_range(name, words, vocabulary_size)
    row_part = _deal(rows, vocabulary_size, partitions)
    column_part = _deal(columns, vocabulary_size, partitions)
    shuffled = torch.randperm(len(rows), generator=generator, device=generator.device if generator else "cpu")
    shuffled = shuffled.to(rows.device)
    part = row_part[rows.long()]
    block = ((column_part[columns.long()] - part) % partitions * partitions + part)[shuffled]
    order = shuffled[block.argsort(stable=True)]
    ends = torch.bincount(block, minlength=partitions * partitions).cumsum(0)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    stages = torch.cat([begins.view(partitions, partitions), ends.view(partitions, partitions)[:, -1:]], dim=1)
    return order, stages


def _deal(words: Tensor, vocabulary_size: int, partitions: int) -> Tensor:
    """The partition of each word: 0, 1, ..., n − 1, n − 1, ..., 1, 0, 0, 1, ... by falling frequency."""
    frequency = torch.bincount(words, minlength=vocabulary_size)
    turn = torch.arange(vocabulary_size, device=words.device) % (2 * partitions)
    part = torch.empty_like(turn)
    part[frequency.argsort(descending=True, stable=True)] = torch.minimum(turn, 2 * partitions - 1 - turn)
    return part


def _check(
    parameters: Tensor,
    squared_gradients: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    stages: Tensor,
    eta: float = 0.05,
    x_max: float = 100.0,
    alpha: float = 0.75,
    grad_clip: float = 100.0,
) -> None:
    tensors = {
        "parameters": parameters,
        "squared_gradients": squared_gradients,
        "rows": rows,
        "columns": columns,
        "values": values,
        "stages": stages,
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {shown(tensor)}")
        if tensor.device != parameters.device:
            raise ValueError(f"{name}: expected a tensor on the parameters' {parameters.device}, got {tensor.device}")
    if parameters.dim() != 3 or parameters.shape[0] != 2 or parameters.shape[2] < 2:
        raise ValueError(f"parameters: expected shape (2, vocabulary, dim + 1), got {tuple(parameters.shape)}")
    if not parameters.is_contiguous():
        raise ValueError("parameters: expected a contiguous tensor, since it is changed in place")
    if squared_gradients.shape != parameters.shape or not squared_gradients.is_contiguous():
        raise ValueError(
            f"squared_gradients: expected a contiguous tensor of the parameters' shape {tuple(parameters.shape)}, "
            f"got {tuple(squared_gradients.shape)}"
        )
    for name, tensor in (("squared_gradients", squared_gradients), ("values", values)):
        if tensor.dtype != parameters.dtype:
            raise TypeError(f"{name}: expected the parameters' dtype {parameters.dtype}, got {tensor.dtype}")
    for name, tensor in (("rows", rows), ("columns", columns)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: expected dtype int32, got {tensor.dtype}")
    for name, tensor in (("rows", rows), ("columns", columns), ("values", values)):
        if tensor.shape != (values.numel(),):
            raise ValueError(f"{name}: expected shape (entries,) = ({values.numel()},), got {tuple(tensor.shape)}")
    if stages.dtype != torch.int64:
        raise TypeError(f"stages: expected dtype int64, got {stages.dtype}")
    if stages.dim() != 2 or stages.shape[1] < 2:
        raise ValueError(f"stages: expected shape (stages, partitions + 1), got {tuple(stages.shape)}")
    check_above_zero("eta", eta)
    check_above_zero("x_max", x_max)
    check_above_zero("alpha", alpha)
    check_above_zero("grad_clip", grad_clip, infinite=True)


_operator = Operator("glove_epoch", _check)


# ---- reference -------------------------------------------------------------------------------------------------


def _reference(
    parameters: Tensor,
    squared_gradients: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    stages: Tensor,
    eta: float = 0.05,
    x_max: float = 100.0,
    alpha: float = 0.75,
    grad_clip: float = 100.0,
) -> Tensor:
    check_entries(parameters.shape[1], rows, columns, values, stages)
    words, contexts = parameters  # (vocabulary, dim + 1)
    word_squares, context_squares = squared_gradients
    cost = torch.zeros((), dtype=torch.float64, device=parameters.device)
    for begin, end in zip(stages[:, 0].tolist(), stages[:, -1].tolist(), strict=True):
        for i, j, x in zip(rows[begin:end].tolist(), columns[begin:end].tolist(), values[begin:end], strict=True):
            word, context = words[i].clone(), contexts[j].clone()  # (dim + 1,)
            difference = word[:-1] @ context[:-1] + word[-1] + context[-1] - x.log()
            weighted = (x / x_max).pow(alpha).clamp(max=1) * difference
            cost += (weighted * difference / 2).double()
            one = torch.ones_like(word[-1:])
            for vector, squares, other in (
                (words[i], word_squares[i], context),
                (contexts[j], context_squares[j], word),
            ):
                gradient = eta * (weighted * torch.cat([other[:-1], one])).clamp(-grad_clip, grad_clip)
                vector -= gradient / squares.sqrt()
                squares += gradient**2
    return cost


def check_entries(vocabulary_size: int, rows: Tensor, columns: Tensor, values: Tensor, stages: Tensor) -> None:
    """Raise RuntimeError for a row, column, value or stage that is out of its range."""
    try:
        check_range("rows", rows, vocabulary_size)
        check_range("columns", columns, vocabulary_size)
        check_counts(values)
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    if stages.numel() and (stages.min() < 0 or stages.max() > len(rows) or (stages.diff(dim=1) < 0).any()):
        raise RuntimeError(f"stages: expected rows that do not fall, of numbers from 0 to {len(rows)}")


def check_range(name: str, words: Tensor, vocabulary_size: int) -> None:
    """Raise ValueError for a word that is not in [0, vocabulary_size)."""
    if words.numel() == 0 or (words.min() >= 0 and words.max() < vocabulary_size):
        return
    at = int(((words < 0) | (words >= vocabulary_size)).nonzero()[0])
    raise ValueError(f"{name}: expected 0 to {vocabulary_size - 1}, got {int(words[at])} at entry {at}")


def check_counts(values: Tensor) -> None:
    """Raise ValueError for a count that is not above 0 and finite."""
    if values.numel() == 0 or (values.min() > 0 and values.max() < torch.inf):
        return
    at = int((~((values > 0) & (values < torch.inf))).nonzero()[0])
    raise ValueError(f"values: expected finite numbers above 0, got {float(values[at]):g} at entry {at}")


_operator.register("reference", _reference, lambda *args, **kwargs: None)


# ---- C++ and CUDA C++ ------------------------------------------------------------------------------------------


def _compiled(
    parameters: Tensor,
    squared_gradients: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    stages: Tensor,
    eta: float = 0.05,
    x_max: float = 100.0,
    alpha: float = 0.75,
    grad_clip: float = 100.0,
) -> Tensor:
    return torch.ops.lmengine.glove_epoch(
        parameters,
        squared_gradients,
        rows.contiguous(),
        columns.contiguous(),
        values.contiguous(),
        stages.contiguous(),
        eta,
        x_max,
        alpha,
        grad_clip,
    )


def _only_float32(parameters: Tensor, *args: object, **kwargs: object) -> str | None:
    if parameters.dtype != torch.float32:
        return f"parameters: expected dtype float32, got {parameters.dtype}"
    return None


def _fake(parameters: Tensor, *args: object) -> Tensor:
    return parameters.new_empty((), dtype=torch.float64)


if backends.library() is not None:
    torch.library.register_fake("lmengine::glove_epoch", _fake)
    _operator.register("cpu", _compiled, _only_float32)
    _operator.register("cuda", _compiled, _only_float32)


# ---- Triton ----------------------------------------------------------------------------------------------------


def _triton(
    parameters: Tensor,
    squared_gradients: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    stages: Tensor,
    eta: float = 0.05,
    x_max: float = 100.0,
    alpha: float = 0.75,
    grad_clip: float = 100.0,
) -> Tensor:
    return torch.ops.lmengine.glove_epoch_triton(
        parameters,
        squared_gradients,
        rows.contiguous(),
        columns.contiguous(),
        values.contiguous(),
        stages.contiguous(),
        eta,
        x_max,
        alpha,
        grad_clip,
    )


def _triton_unsupported(parameters: Tensor, *args: object, **kwargs: object) -> str | None:
    from lmengine.kernels.embedding import MAX_DIM

    if parameters.shape[2] - 1 > MAX_DIM:
        return f"parameters: expected dim at most {MAX_DIM}, got {parameters.shape[2] - 1}"
    return _only_float32(parameters)


@torch.library.custom_op("lmengine::glove_epoch_triton", mutates_args=("parameters", "squared_gradients"))
def _triton_operator(
    parameters: Tensor,
    squared_gradients: Tensor,
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    stages: Tensor,
    eta: float,
    x_max: float,
    alpha: float,
    grad_clip: float,
) -> Tensor:
    from lmengine.kernels import embedding as kernels

    check_entries(parameters.shape[1], rows, columns, values, stages)
    return kernels.glove_epoch(
        parameters, squared_gradients, rows, columns, values, stages, eta, x_max, alpha, grad_clip
    )


_triton_operator.register_fake(_fake)
_operator.register("triton", _triton, _triton_unsupported)
