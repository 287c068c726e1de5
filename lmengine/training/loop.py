"""The training loop: AdamW, a warm-up and a cosine, checkpoints from which it goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lmengine.files import written_aside


class Interrupted(Exception):
    """Training was asked to stop, and what is needed to go on has been written."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: batches.
        learning_rate: the highest, reached after `warmup` steps; it falls to a tenth along a cosine.
        weight_decay: of matrices; vectors (biases, norms) have none.
        grad_clip: bound on the norm of all gradients together.
        evaluate_every, checkpoint_every: in steps.
        seed: of the order of the data and of dropout.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    evaluate_every: int = 200
    checkpoint_every: int = 200
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@dataclass
class History:
    """What training has shown so far.

    Attributes:
        losses: (step, mean training loss since the entry before).
        evaluations: (step, what the evaluation gave).
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def fit(
    model: torch.nn.Module,
    loss: Callable[[int], Tensor],
    evaluate: Callable[[], dict[str, float]],
    config: TrainingConfig,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], Any] = lambda step, loss: None,
    on_evaluation: Callable[[int, dict[str, float]], Any] = lambda step, result: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> History:
    """Train a model, going on from `checkpoint` where that file exists.

    The result depends on the model's parameters, the data and the config, not on where training was interrupted.

    Args:
        model: trained in place.
        loss: the loss of a step, counted from 0.
        evaluate: called with the model in evaluation mode and without gradients.
        checkpoint: a file for everything that is needed to go on.
        on_step: called after every step with the number of steps done and the loss.
        on_evaluation: called with the number of steps done and what `evaluate` gave.
        should_stop: asked after every step; when it says so, the checkpoint is written and Interrupted raised.

    Raises:
        Interrupted: see `should_stop`.
        FloatingPointError: the loss is no longer a finite number.
        ValueError: the checkpoint is broken or of another model.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    history, step, running = History(), 0, (0.0, 0)
    if checkpoint is not None and checkpoint.exists():
        history, step, running = _load(checkpoint, model, optimizer)
    model.train()
    while step < config.steps:
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout's, so that a checkpoint need not hold its state
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        number = value.item()
        if not math.isfinite(number):
            raise FloatingPointError(f"the loss of step {step} is {number}; a lower learning_rate may help")
        optimizer.step()
        step += 1
        running = (running[0] + number, running[1] + 1)
        on_step(step, number)
        if step % config.evaluate_every == 0 or step == config.steps:
            history.losses.append((step, running[0] / running[1]))
            running = (0.0, 0)
            model.eval()
            with torch.no_grad():
                history.evaluations.append((step, evaluate()))
            model.train()
            on_evaluation(*history.evaluations[-1])
        stop = step < config.steps and should_stop()
        if checkpoint is not None and (step % config.checkpoint_every == 0 or step == config.steps or stop):
            _save(checkpoint, model, optimizer, history, step, running)
        if stop:
            raise Interrupted(f"stopped after step {step} of {config.steps}")
    model.eval()
    return history


def _save(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    step: int,
    running: tuple[float, int],
) -> None:
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
    numbers = {"step": step, "running": running, "losses": history.losses, "evaluations": history.evaluations}
    with written_aside(path) as aside:
        safetensors.torch.save_file(tensors, aside, {"training": json.dumps(numbers)})


def _load(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[History, int, tuple[float, int]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            numbers = json.loads((file.metadata() or {})["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        of_model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        model.load_state_dict(of_model)
        whole = optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                whole["state"].setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(whole)
        history = History(
            [(int(step), float(value)) for step, value in numbers["losses"]],
            [(int(step), dict(result)) for step, result in numbers["evaluations"]],
        )
        return history, int(numbers["step"]), (float(numbers["running"][0]), int(numbers["running"][1]))
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} does not fit this model and optimizer: {error}") from error
