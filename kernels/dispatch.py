"""Which implementation of an operation runs: chosen by where its tensors live, never by the caller.

CUDA tensors go to Triton. CPU tensors go to libstars where it was built, and otherwise to the torch reference that
stands beside every operation; `references_only()` sends everything there, which is how the two are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from stars.bindings import libstars

_references_only = False


def on_libstars(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs in libstars."""
    return not _references_only and tensor.device.type == "cpu" and libstars.available()


def on_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs as a Triton kernel."""
    return not _references_only and tensor.is_cuda


@contextmanager
def references_only() -> Iterator[None]:
    """Inside, every operation runs as its torch reference."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before
