"""The page cache of files: have it dropped, and see what of a file is in it. Imports no torch."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_PAGE = mmap.PAGESIZE
_MAP_FAILED = ctypes.c_void_p(-1).value


def drop(paths: Iterable[Path]) -> None:
    """Ask the kernel to forget what it caches of these files; pages someone maps stay."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(paths: Iterable[Path]) -> int | None:
    """Bytes of these files in the page cache, about; None where the system does not tell."""
    total = 0
    for path in paths:
        with path.open("rb") as file:
            found = _cached(file.fileno(), os.fstat(file.fileno()).st_size)
        if found is None:
            return None
        total += found
    return total


def _cached(descriptor: int, size: int) -> int | None:
    """Ask `mincore` about a mapping; no page of it is touched, so none is read."""
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        return None
    try:
        flags = (ctypes.c_ubyte * (-(-size // _PAGE)))()
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags):
            return None
        return min(size, sum(flag & 1 for flag in bytes(flags)) * _PAGE)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
