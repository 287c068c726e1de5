"""Files of text: which ones a folder holds, and writing that never leaves half a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

PathLike = str | os.PathLike[str]


def text_files(paths: PathLike | Iterable[PathLike]) -> list[str]:
    """The files of one path or several; a folder stands for all files in it and below, sorted, hidden ones left out.

    Raises:
        FileNotFoundError: a path does not exist, or there is no file at all.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[str] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
            found += sorted(str(path / file) for file in inside if not any(part.startswith(".") for part in file.parts))
        elif path.exists():
            found.append(str(path))
        else:
            raise FileNotFoundError(f"paths: there is no file or folder {str(path)!r}")
    if not found:
        raise FileNotFoundError(f"paths: there is no file in {', '.join(repr(str(path)) for path in given) or '[]'}")
    return found


@contextlib.contextmanager
def written_aside(path: PathLike) -> Iterator[Path]:
    """A path to write to, moved to `path` when the block ends well and removed when it does not."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
