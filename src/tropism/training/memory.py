"""Freed memory is kept for the next tensor instead of being returned to the system."""

from __future__ import annotations

import ctypes
import platform

TRIM, PAD, MAPPED = -1, -2, -3
"""M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD of glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Ask the C library to, for up to 32 MiB at a time; whether it could be asked (glibc alone).

    On a CPU every tensor of more than a few hundred KiB is otherwise new pages, which the system clears at their first
    touch: writing one takes up to five times as long, and an update a tenth longer. Still larger ones are left to the
    system, for between holes of that size the heap would grow without end.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = {MAPPED: 1 << 25, TRIM: (1 << 31) - 1, PAD: 1 << 26}
    return all(library.mallopt(name, value) == 1 for name, value in settings.items())
