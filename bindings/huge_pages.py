"""Memory for weights in large pages, where the system has them for who asks: a step reads all weights once, and every
page of 4 KB costs it a walk through the page tables. benchmarks/README.md has what that made of a step.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

PAGE = 2 << 20
"""Bytes of a large page on x86-64, and on AArch64 with pages of 4 KB."""
BLOCK = 16 * PAGE
"""Bytes that are mapped at once: matrices of a layer are smaller than a page, and share them."""
LEAST = 64 << 10
"""Smaller ones are read out of a cache anyway."""
ALIGNMENT = 64  # of vectors, and of cache lines

_lock = threading.Lock()
_block: Tensor | None = None  # what is left of the newest one; older ones live as long as tensors of theirs


def empty(size: int) -> Tensor:
    """uint8 [size], not initialised, aligned to 64 bytes; in large pages where it is worth it and the system has them.

    Memory is taken as it is written, and given back once all tensors of a block of 32 MB are gone.
    """
    global _block
    if size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    with _lock:
        if _block is None or _block.numel() < size:
            mapped = _map(size)
            if mapped is None:
                return torch.empty(size, dtype=torch.uint8)
            if mapped.numel() > BLOCK:  # what is left of the block before may hold others still
                return mapped[:size]
            _block = mapped
        taken, _block = _block[:size], _block[-(-size // ALIGNMENT) * ALIGNMENT :]
        return taken


def _map(size: int) -> Tensor | None:
    """A new block, of whole pages; None where the system has no such memory."""
    length = max(BLOCK, -(-size // PAGE) * PAGE)
    with contextlib.suppress(OSError):
        memory = mmap.mmap(-1, length + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)  # which holds `memory`
        first = -whole.data_ptr() % PAGE
        return whole[first : first + length]
    return None
