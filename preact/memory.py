"""What the C allocator does with freed memory."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1  # from glibc's malloc.h
_M_MMAP_MAX = -4
_LARGEST_INT = 2**31 - 1


def retain_freed_memory() -> None:
    """Make the C allocator of this process keep freed memory, for training on a CPU.

    By default glibc gives memory back to the system where large tensors are freed, at the end of a
    training step for one, and gets it again page by page in the next, which the kernel clears
    first. After this call it stays with the process, whose resident memory remains at its
    peak; there is no way back. It is the process's setting, for whatever allocates in it.

    Raises:
        RuntimeError: the C library has no ``mallopt``, as those of macOS and Windows, or refuses.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError) as error:
        raise RuntimeError("this C library has no mallopt") from error
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)):
        raise RuntimeError("mallopt refused the setting")
