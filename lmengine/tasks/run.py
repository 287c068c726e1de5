"""A task of several stages, each of which is done once: what is done stands in the run folder's metrics.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmengine.files import written_aside
from lmengine.tasks.view import View
from lmengine.training import Interrupted


class OtherSettings(ValueError):
    """The run folder holds a run with other settings."""


class Run:
    """A run folder and what its stages have given.

    Args:
        folder: made if it is not there.
        settings: what the results depend on, JSON values.
        view: shows the stages.
        should_stop: asked between the stages.

    Attributes:
        stages: name -> the stage's result, each with its "seconds".

    Raises:
        OtherSettings: the folder holds a run with other settings; the message names them.
        ValueError: the folder's metrics.json is something else.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], view: View, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.folder, self.settings, self.view, self.should_stop = folder, settings, view, should_stop
        self.stages: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}  # what an interrupted stage has taken already
        if self._file.exists():
            self._read()

    @property
    def _file(self) -> Path:
        return self.folder / "metrics.json"

    def _read(self) -> None:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            before, self.stages, self._seconds = content["settings"], content["stages"], content["unfinished_seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: {self._file} is not the record of a run: {error!r}") from error
        other = [name for name in self.settings if before.get(name) != self.settings[name]]
        if other:
            told = ", ".join(f"{name} {before.get(name)!r} and not {self.settings[name]!r}" for name in other)
            raise OtherSettings(f"out: {self.folder} holds a run with {told}")

    def stage(self, name: str, heading: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a stage, unless it was done before, and return its result.

        Raises:
            Interrupted: should_stop says so, or the stage itself raised it.
        """
        self.view.heading(heading)
        if name in self.stages:
            self.view.say(f"done before, in {self.stages[name]['seconds']:.1f} s")
            return self.stages[name]
        if self.should_stop():
            raise Interrupted(f"stopped before {name!r}")
        start = time.monotonic()
        try:
            result = work()
        except Interrupted:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start
            self._write()
            raise
        seconds = self._seconds.pop(name, 0.0) + time.monotonic() - start
        self.stages[name] = {**result, "seconds": round(seconds, 2)}
        self._write()
        # as it will be read the next time, so that later stages see the same either way
        self.stages[name] = json.loads(json.dumps(self.stages[name]))
        return self.stages[name]

    def _write(self) -> None:
        content = {"settings": self.settings, "stages": self.stages, "unfinished_seconds": self._seconds}
        with written_aside(self._file) as aside:
            aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
