"""`python -m lmengine`, the same as the command `lmengine`."""

from lmengine.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
