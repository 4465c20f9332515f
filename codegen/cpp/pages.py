"""Large packs in large pages: tensors in, the same memory under fewer entries of the processor's table of pages.

A weight of 16 MB is 4096 pages of 4 KiB, more than any such table holds, and on a virtual machine each miss walks two
tables. Linux gives pages of 2 MiB to who asks (``madvise``, transparent huge pages); nothing else changes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGE = 1 << 21
# From <linux/mman.h>: give large pages from now on; make large pages now of what is there (since Linux 6.1).
_HUGEPAGE, _COLLAPSE = 14, 25


def in_large_pages(tensors: Sequence[torch.Tensor]) -> int:
    """Ask for large pages wherever a tensor fills one; the bytes for which the system granted it, now or in time.

    Tensors that are mapped from a file should not be given: they would be read as a whole.
    """
    advise = _madvise()
    if advise is None:
        return 0
    granted = 0
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        begin = -(-tensor.data_ptr() // PAGE) * PAGE
        size = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE - begin
        if size > 0 and advise(begin, size, _HUGEPAGE) == 0:
            advise(begin, size, _COLLAPSE)
            granted += size
    return granted


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found  # type: ignore[no-any-return]
