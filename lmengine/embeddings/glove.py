"""GloVe word vectors (Pennington et al. 2014), trained on co-occurrence counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lmengine.checks import check_above_zero, check_callable, check_integer, shown
from lmengine.embeddings.cooccurrence import Cooccurrence
from lmengine.ops.embedding import MAX_PARTITIONS, glove_epoch, glove_schedule

MAX_SEED = 2**62


class GloVe:
    """Word vectors whose dot products approach the logarithms of co-occurrence counts.

    The result depends on the seed and on `partitions`, not on the number of threads.

    Args:
        vocabulary_size: number of words.
        dim: size of a word vector.
        x_max, alpha: a count x weighs min(1, (x / x_max)^alpha).
        eta: step size of AdaGrad.
        grad_clip: bound on every number of a gradient.
        seed: of the first vectors and of the order of the counts.
        partitions: how many parts of the counts may be learned from at once; 16 by default, 1024 on a GPU.
        device: where to train.

    Attributes:
        parameters: (2, vocabulary, dim + 1) float32: words' and contexts' vectors, each with its bias.
        squared_gradients: AdaGrad's state, like parameters.
        epoch: how many epochs were trained.
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int = 100,
        x_max: float = 100.0,
        alpha: float = 0.75,
        eta: float = 0.05,
        grad_clip: float = 100.0,
        seed: int = 0,
        partitions: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        check_integer("vocabulary_size", vocabulary_size, 1, 2**31 - 1)
        check_integer("dim", dim, 1)
        check_integer("seed", seed, 0, MAX_SEED)
        if partitions is not None:
            check_integer("partitions", partitions, 1, MAX_PARTITIONS)
        check_above_zero("x_max", x_max)
        check_above_zero("alpha", alpha)
        check_above_zero("eta", eta)
        check_above_zero("grad_clip", grad_clip, infinite=True)
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device: expected a device such as 'cpu' or 'cuda:0', got {shown(device)}") from error
        self.vocabulary_size, self.dim = vocabulary_size, dim
        self.x_max, self.alpha, self.eta, self.grad_clip = x_max, alpha, eta, grad_clip
        self.seed = seed
        self.partitions = partitions or (16 if device.type == "cpu" else 1024)
        self.epoch = 0
        first = torch.rand(2, vocabulary_size, dim + 1, generator=torch.Generator().manual_seed(seed))
        self.parameters = ((first - 0.5) / dim).to(device)
        self.squared_gradients = torch.ones_like(self.parameters)

    def fit(
        self, cooccurrence: Cooccurrence, epochs: int = 25, callback: Callable[[int, float], Any] | None = None
    ) -> GloVe:
        """Train for so many epochs more.

        Args:
            cooccurrence: the counts.
            epochs: how many times to go over them.
            callback: called after every epoch with its number (from 1) and the mean cost of a count.

        Raises:
            TypeError, ValueError: the counts are of another vocabulary, or there are none; another argument is wrong.
        """
        if not isinstance(cooccurrence, Cooccurrence):
            raise TypeError(f"cooccurrence: expected counts (Cooccurrence), got {shown(cooccurrence)}")
        check_integer("epochs", epochs, 0)
        check_callable("callback", callback)
        if cooccurrence.vocabulary_size != self.vocabulary_size:
            raise ValueError(
                f"cooccurrence: expected counts of {self.vocabulary_size} words, got {cooccurrence.vocabulary_size}"
            )
        if len(cooccurrence) == 0:
            raise ValueError("cooccurrence: expected at least one count, got none")
        device = self.parameters.device
        rows, columns = cooccurrence.rows.to(device), cooccurrence.columns.to(device)
        generator = torch.Generator().manual_seed(self.seed)
        order, stages = glove_schedule(rows, columns, self.vocabulary_size, self.partitions, generator)
        rows, columns, values = rows[order], columns[order], cooccurrence.values.to(device)[order]
        for _ in range(epochs):
            generator.manual_seed(self.seed + 1_000_003 * (self.epoch + 1))
            turn = torch.randperm(len(stages), generator=generator).to(device)
            cost = glove_epoch(
                self.parameters,
                self.squared_gradients,
                rows,
                columns,
                values,
                stages[turn],
                self.eta,
                self.x_max,
                self.alpha,
                self.grad_clip,
            )
            self.epoch += 1
            if callback is not None:
                callback(self.epoch, float(cost) / len(values))
        return self

    @property
    def vectors(self) -> Tensor:
        """The sum of each word's two vectors: (vocabulary, dim) float32."""
        return self.parameters[0, :, :-1] + self.parameters[1, :, :-1]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to train on as if there had been no interruption."""
        return {
            "parameters": self.parameters.clone(),
            "squared_gradients": self.squared_gradients.clone(),
            "epoch": self.epoch,
            "seed": self.seed,
            "partitions": self.partitions,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result.

        Raises:
            TypeError: the state or an entry is of the wrong type. KeyError: an entry is missing.
            ValueError: the state is of another vocabulary or dim, or holds numbers that no training leaves.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a dict from state_dict, got {shown(state)}")
        wanted = ("parameters", "squared_gradients", "epoch", "seed", "partitions")
        missing = [name for name in wanted if name not in state]
        if missing:
            raise KeyError(f"state: expected {', '.join(wanted)}; missing {', '.join(missing)}")
        for name in ("parameters", "squared_gradients"):
            if not isinstance(state[name], Tensor):
                raise TypeError(f"state[{name!r}]: expected a tensor, got {shown(state[name])}")
            if state[name].shape != self.parameters.shape:
                raise ValueError(
                    f"state[{name!r}]: expected shape {tuple(self.parameters.shape)}, got {tuple(state[name].shape)}"
                )
            if not state[name].isfinite().all():
                raise ValueError(f"state[{name!r}]: expected finite numbers, got others")
        if not (state["squared_gradients"] > 0).all():
            raise ValueError("state['squared_gradients']: expected numbers above 0, got others")
        numbers = {name: state[name].item() if isinstance(state[name], Tensor) else state[name] for name in wanted[2:]}
        check_integer("state['epoch']", numbers["epoch"], 0)
        check_integer("state['seed']", numbers["seed"], 0, MAX_SEED)
        check_integer("state['partitions']", numbers["partitions"], 1, MAX_PARTITIONS)
        self.parameters.copy_(state["parameters"])
        self.squared_gradients.copy_(state["squared_gradients"])
        self.epoch, self.seed, self.partitions = numbers["epoch"], numbers["seed"], numbers["partitions"]
