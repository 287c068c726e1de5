"""Benchmarks: every kernel beside the PyTorch operator that it replaces."""
