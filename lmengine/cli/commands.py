"""The commands and their arguments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from lmengine import backends
from lmengine.cli.view import RichView
from lmengine.models import LanguageModel, SequenceClassifier, load_model
from lmengine.tasks.classification import classify
from lmengine.tasks.generation import generate
from lmengine.tasks.quickstart import Settings, open_job
from lmengine.tasks.run import OtherSettings
from lmengine.training import Interrupted


@dataclass(frozen=True)
class Quickstart(Settings):
    """From text to word vectors, two language models, a classifier and a report, in one go."""

    restart: bool = False
    """Throw away what the folder `out` holds of an earlier run, and begin anew."""


@dataclass(frozen=True)
class Info:
    """Versions, devices, and which backends are built and usable here, and why not where not."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Generate:
    """Let a language model go on with a text."""

    model: tyro.conf.Positional[Path]
    """A model's folder, such as runs/quickstart/transformer."""
    prompt: tyro.conf.Positional[str]
    """How the text begins."""
    max_tokens: int = 40
    """Stop after so many new tokens, or at the end of the text."""
    temperature: float = 0.8
    """Below 1: likelier tokens more often; 0: the likeliest always."""
    top_k: int = 40
    """Choose among the so many likeliest tokens."""
    seed: int = 0
    """Of the choice."""


@dataclass(frozen=True)
class Classify:
    """Say which class texts are of, with the probability."""

    model: tyro.conf.Positional[Path]
    """A classifier's folder, such as runs/quickstart/classifier."""
    texts: tyro.conf.Positional[tuple[str, ...]]
    """The texts; without any, each line of the standard input is one."""


Command = (
    Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Classify, tyro.conf.subcommand("classify")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def run(arguments: list[str]) -> int:
    try:
        command = tyro.cli(
            Command,
            prog="lmengine",
            description="Fused kernels, layers, word vectors and language models.",
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        forced = backends.forced_backend()
    except ValueError as error:
        return refuse(error)
    if isinstance(command, Info):
        return print_info(command)
    if forced and backends.unusable(forced):
        return refuse(f"LMENGINE_BACKEND: {forced!r} cannot be used here: {backends.unusable(forced)}")
    if isinstance(command, Quickstart):
        return run_quickstart(command)
    try:
        return run_generate(command) if isinstance(command, Generate) else run_classify(command)
    except (OSError, ValueError) as error:
        return refuse(error)


def refuse(error: Exception | str) -> int:
    print(f"lmengine: {error}", file=sys.stderr)
    return 2


def print_info(command: Info) -> int:
    found = backends.info()
    if command.json:
        print(json.dumps(found, indent=1))
        return 0
    view = RichView()
    states: dict[str, str] = found.pop("backends")
    view.table("", ("", ""), [(name, _plain(value)) for name, value in found.items()])
    view.table("", ("backend", ""), list(states.items()))
    return 0


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value or "none")


def run_generate(command: Generate) -> int:
    model, tokenizer = load_model(command.model)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"model: expected a language model, but {command.model} holds a {type(model).__name__}")
    options: dict[str, Any] = dict(temperature=command.temperature, top_k=command.top_k, seed=command.seed)
    print(generate(model, tokenizer, command.prompt, command.max_tokens, **options))
    return 0


def run_classify(command: Classify) -> int:
    model, tokenizer = load_model(command.model)
    if not isinstance(model, SequenceClassifier):
        raise ValueError(f"model: expected a classifier, but {command.model} holds a {type(model).__name__}")
    texts = list(command.texts) or [line.rstrip("\n") for line in sys.stdin]
    for label, probability in classify(model, tokenizer, texts):
        print(f"{label}\t{probability:.3f}")
    return 0


def run_quickstart(command: Quickstart) -> int:
    view = RichView()
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if stop.is_set():  # asked twice: at once, back to the last checkpoint
            raise KeyboardInterrupt
        stop.set()
        # not by way of the view, which may be in the middle of a line
        os.write(sys.stderr.fileno(), b"\nstopping at the next step (Ctrl-C once more: at once)\n")

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            if command.restart:
                forget(command.out)
            job = open_job(command, view, stop.is_set)
        except OtherSettings as error:
            return refuse(f"{error}: give --restart to replace it, or another --out")
        except (OSError, ValueError) as error:
            return refuse(error)
        view.say(f"report: {job.finish()}")
    except (Interrupted, KeyboardInterrupt) as interruption:
        view.say(f"{interruption or 'stopped'}. The same command goes on from there.")
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def forget(folder: Path) -> None:
    """Remove a run, and nothing that is not one.

    Raises:
        ValueError: the folder holds something else.
    """
    if not folder.exists():
        return
    if not (folder / "metrics.json").is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            return
        raise ValueError(f"out: {folder} is not a run of this command (it has no metrics.json): nothing was removed")
    shutil.rmtree(folder)
