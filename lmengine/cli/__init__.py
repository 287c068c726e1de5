"""The command line: a thin face over the library. Its own needs come with the extra `train`."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run `lmengine ARGUMENTS` and return the exit status: 0, 1 (failed), 2 (wrong input) or 130 (interrupted)."""
    try:
        import rich  # noqa: F401
        import tyro  # noqa: F401
    except ImportError as error:
        print(f"lmengine: the command line needs {error.name}: pip install 'lmengine[train]'", file=sys.stderr)
        return 1
    from lmengine.cli.commands import run

    return run(sys.argv[1:] if arguments is None else arguments)
