"""The command line: a thin face over the library."""


def main() -> int:
    raise SystemExit("not yet")
