"""Triton kernels, one file a family. Each file lists in `static_configurations()` what may ever be launched."""
