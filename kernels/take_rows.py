"""Selected rows of a matrix."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import operation


def take_rows_reference(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[i] = x[index[i]]. x [rows, width]; index int32 [n]; out [n, width]."""
    out.copy_(x[index.long()])


@operation(cpu="stars.bindings.libstars:take_rows", cuda="stars.kernels.triton.take_rows:take_rows",
           reference=take_rows_reference)
def take_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[i] = x[index[i]]. x [rows, width]; index int32 [n]; out [n, width]."""
