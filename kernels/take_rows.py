"""Selected rows of a matrix."""

from __future__ import annotations

from torch import Tensor

from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars, on_triton


def take_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[i] = x[index[i]]. x [rows, width]; index int32 [n]; out [n, width]."""
    if on_libstars(x):
        libstars.take_rows(x, index, out)
    elif on_triton(x):
        from stars.kernels.triton.take_rows import take_rows as launch

        launch(x, index, out)
    else:
        take_rows_reference(x, index, out)


def take_rows_reference(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[i] = x[index[i]]. x [rows, width]; index int32 [n]; out [n, width]."""
    out.copy_(x[index.long()])
