"""The child of tests.cuda_host.run: calls one function of a library that is built with sanitizers.

It uses ctypes alone, and every array gets its own allocation of exactly its size, so that AddressSanitizer sees the
first byte past its end.
"""

import ctypes
import os
import pickle
import sys
from pathlib import Path


def main(request: str, answer: str) -> None:
    path, function, pointers, numbers, orders = pickle.loads(Path(request).read_bytes())
    call = getattr(ctypes.CDLL(path), function)
    call.restype = None
    memories = []
    for order in orders:
        os.environ["LMENGINE_EMULATION_ORDER"] = order
        addresses = [allocate(value) for _, value in pointers]
        call(*addresses, *(ctypes.c_float(n) if isinstance(n, float) else ctypes.c_int64(n) for n in numbers))
        sizes = [value if isinstance(value, int) else len(value or b"") for _, value in pointers]
        memories.append(
            [None if a is None else ctypes.string_at(a, size) for a, size in zip(addresses, sizes, strict=True)]
        )
    Path(answer).write_bytes(pickle.dumps(memories))


def allocate(value: "bytes | int | None") -> "ctypes.c_void_p | None":
    """Memory that holds these bytes, or so many bytes of 0xff; aligned as PyTorch aligns CUDA memory."""
    if value is None:
        return None
    size = value if isinstance(value, int) else len(value)
    address = ctypes.c_void_p()
    if ctypes.CDLL(None).posix_memalign(ctypes.byref(address), ctypes.c_size_t(512), ctypes.c_size_t(size)):
        raise MemoryError(f"no memory for {size} bytes")
    if isinstance(value, int):
        ctypes.memset(address, 0xFF, size)
    else:
        ctypes.memmove(address, value, size)
    return address


main(sys.argv[1], sys.argv[2])
