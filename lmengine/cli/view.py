"""Stages, bars and tables on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from lmengine.tasks.view import Advance, View


class Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{speed:,.{0 if speed >= 10 else 1}f} {task.fields['unit']}/s" if speed else "")


class TimeLeft(ProgressColumn):
    """The time that is left, and the time that it took at the end."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"{task.finished_time or 0.0:.1f} s")
        return Text("" if task.time_remaining is None else f"{task.time_remaining:.0f} s left")


class RichView(View):
    """Draws with rich; where the output is no terminal, a bar becomes one line when it ends."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{escape(text)}[/bold]")

    def say(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, show_header=any(columns))
        for number, column in enumerate(columns):
            table.add_column(escape(column), no_wrap=number == 0)
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.console.print(table)

    @contextlib.contextmanager
    def progress(self, text: str, total: int, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            Rate(),
            TimeLeft(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(escape(text), total=total or None, unit=unit, note="")

            def advance(done: int, note: str = "", total: int | None = None) -> None:
                bars.update(task, completed=done, note=note)
                if total is not None:
                    bars.update(task, total=total)

            yield advance
