"""Selected rows of a matrix."""

from __future__ import annotations

from torch import Tensor


def take_rows_reference(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[i] = x[index[i]]. x [rows, width]; index int32 [n]; out [n, width]."""
    out.copy_(x[index.long()])
