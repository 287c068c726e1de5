"""How a long task shows what it does. This one shows nothing; the command line has one that draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Advance = Callable[..., None]


class View:
    """What a task calls to be seen; a subclass shows it."""

    def heading(self, text: str) -> None:
        """A new stage begins."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Results side by side."""

    @contextlib.contextmanager
    def progress(self, text: str, total: int, unit: str) -> Iterator[Advance]:
        """A bar for as long as the block runs. It gives a function to call with the number of units done so far, a
        `note` to show beside the bar, and `total` where that was not known before (0)."""
        yield lambda done, note="", total=None: None

    def track(self, items: Iterable[Item], text: str, total: int, unit: str) -> Iterator[Item]:
        """The same items, with a bar."""
        with self.progress(text, total, unit) as advance:
            for done, item in enumerate(items, start=1):
                yield item
                advance(done)
