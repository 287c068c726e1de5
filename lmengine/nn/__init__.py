"""Drop-in layers."""

from lmengine.nn import functional

__all__ = ["functional"]
