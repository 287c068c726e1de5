"""Text to learn from: the corpus that every Python carries, or a file or folder of the user's."""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmengine.files import text_files

PASSAGE = 1200  # characters: a document of a user's file is as many whole lines as make so many
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "turtledemo"}
TABLES = {"encodings", "pydoc_data"}  # character tables, and the topics once more


@dataclass(frozen=True)
class Document:
    """A piece of text that is learned from, or held out, as a whole.

    Attributes:
        name: where it comes from.
        text: what it says.
        label: what a classifier is to say of it, or None.
        prose: whether language models learn from it; word vectors learn from every document.
    """

    name: str
    text: str
    label: str | None = None
    prose: bool = True


def python_corpus(on_file: Callable[[int, int], Any] = lambda done, total: None) -> list[Document]:
    """The documents of this Python: its language reference (`pydoc_data.topics`), the docstrings of its standard
    library, labelled with the module or package that they come from, and the library's sources without docstrings.

    A text that occurs twice is taken once. `on_file` is called with the number of files read so far, and of all.
    """
    from pydoc_data.topics import topics

    found = [Document(f"topic {name}", text) for name, text in sorted(topics.items())]
    library = Path(sysconfig.get_paths()["stdlib"])
    inside = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    chosen = [p for p in inside if not any(part in LEFT_OUT | TABLES or part.startswith("config-") for part in p.parts)]
    for done, path in enumerate(chosen, start=1):
        found += _documents_of_source(library / path, str(path), path.parts[0].removesuffix(".py"))
        on_file(done, len(chosen))
    return list({document.text: document for document in reversed(found)}.values())[::-1]


def _documents_of_source(path: Path, name: str, module: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, OSError):
        return  # samples of broken code, or a file that this user may not read
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        first = node.body[0]
        lines[first.lineno - 1 : first.end_lineno] = [""] * ((first.end_lineno or first.lineno) - first.lineno + 1)
        if len(docstring.split()) >= 4:
            yield Document(f"{name} {getattr(node, 'name', '')}".rstrip(), inspect.cleandoc(docstring), module)
    yield Document(name, "\n".join(lines), prose=False)


def read_corpus(
    path: Path, errors: str = "strict", on_file: Callable[[int, int], Any] = lambda done, total: None
) -> list[Document]:
    """The documents of a UTF-8 text file, or of all files in a folder and below it (hidden ones left out).

    A document is as many whole lines as make some 1200 characters. In a folder it is labelled with the subfolder, or
    the file, that it comes from.

    Args:
        path: a file or a folder.
        errors: "strict", or "replace" to read what is not UTF-8 as U+FFFD.
        on_file: called with the number of files read so far, and of all.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file is not UTF-8 (the message names it and the byte), or there is no text at all.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors: expected strict or replace, got {errors!r}")
    documents = []
    files = text_files(path)
    for done, file in enumerate(map(Path, files), start=1):
        inside = file.relative_to(path) if path.is_dir() else Path(file.name)
        label = Path(inside.parts[0]).stem if path.is_dir() else None
        for number, text in enumerate(passages(_read(file, errors)), start=1):
            documents.append(Document(f"{inside} {number}", text, label))
        on_file(done, len(files))
    if not documents:
        raise ValueError(f"corpus: there is no text in {str(path)!r}")
    return documents


def _read(path: Path, errors: str) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus: {path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start} ({error.reason})"
        ) from error


def passages(text: str) -> Iterator[str]:
    """The text in pieces of at least 1200 characters (the last may be shorter), cut at line ends; blank pieces are
    left out. A line much longer than that is cut at blanks, or where there are none, anywhere."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines():
        for part in _short_parts(line):
            piece.append(part)
            length += len(part) + 1
            if length >= PASSAGE:
                yield "\n".join(piece)
                piece, length = [], 0
    if "".join(piece).strip():
        yield "\n".join(piece)


def _short_parts(line: str) -> Iterator[str]:
    while len(line) > 2 * PASSAGE:
        cut = line.rfind(" ", 1, PASSAGE) + 1 or PASSAGE
        yield line[:cut]
        line = line[cut:]
    yield line


def held_out(count: int, seed: int, share: int = 10) -> list[bool]:
    """Which of so many documents are held out of training: one in `share` (one at least, if there are two), at
    random but for the seed."""
    import torch

    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = set(order[: max(1, count // share)].tolist()) if count > 1 else set()
    return [number in chosen for number in range(count)]
