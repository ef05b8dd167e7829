"""Which implementation of an operation runs: chosen by where its tensors live, never by the caller.

CUDA tensors go to Triton. CPU tensors go to libstars where it was built, and otherwise to the torch reference that
stands beside every operation; `references_only()` sends everything of a thread there, which is how the two are
compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import Tensor

from stars.bindings import libstars

_references_only: set[int] = set()
"""Threads inside `references_only`; empty outside of comparisons, so that an operation asks no more than that."""


def on_libstars(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs in libstars."""
    return not _on_references() and tensor.device.type == "cpu" and libstars.available()


def on_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs as a Triton kernel."""
    return not _on_references() and tensor.is_cuda


@contextmanager
def references_only() -> Iterator[None]:
    """Inside, every operation of this thread runs as its torch reference; those of other threads do not.

    So an engine in another thread is not taken from one implementation to the other in the midst of a recording.
    """
    thread = get_ident()
    outermost = thread not in _references_only
    try:
        _references_only.add(thread)
        yield
    finally:
        if outermost:
            _references_only.discard(thread)


def _on_references() -> bool:
    return bool(_references_only) and get_ident() in _references_only
