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


Command = Annotated[Quickstart, tyro.conf.subcommand("quickstart")] | Annotated[Info, tyro.conf.subcommand("info")]


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
    if isinstance(command, Quickstart) and forced and backends.unusable(forced):
        return refuse(f"LMENGINE_BACKEND: {forced!r} cannot be used here: {backends.unusable(forced)}")
    return print_info(command) if isinstance(command, Info) else run_quickstart(command)


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
