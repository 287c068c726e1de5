"""Files of text: which ones a folder holds, and writing that never leaves half a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmengine.checks import shown

PathLike = str | os.PathLike[str]


def text_files(paths: PathLike | Iterable[PathLike]) -> list[str]:
    """The files of one path or several; a folder stands for all files in it and below, sorted, hidden ones left out.

    Raises:
        FileNotFoundError: a path does not exist, or there is no file at all.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else _listed(paths)
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


def _listed(paths: Iterable[PathLike]) -> list[PathLike]:
    if not isinstance(paths, Iterable) or isinstance(paths, bytes):
        raise TypeError(f"paths: expected a path or several, got {shown(paths)}")
    listed = list(paths)
    for path in listed:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"paths: expected strings or pathlib paths, got {shown(path)}")
    return listed


@contextlib.contextmanager
def written_aside(path: PathLike) -> Iterator[Path]:
    """A path to write to, moved to `path` when the block ends well and removed when it does not.

    Raises:
        TypeError: `path` is no path. OSError: it is a folder, or cannot be written; the message names it.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a string or a pathlib path, got {shown(path)}")
    target = Path(path)
    if target.is_dir() or not target.name:
        raise IsADirectoryError(f"path: expected a file to write, got the folder {str(target)!r}")
    aside = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
    except OSError as error:
        raise OSError(error.errno, f"path: cannot write there: {error.strerror}", str(target)) from error
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
