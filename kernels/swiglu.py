"""The gate of the MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars, on_triton


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up. gate_up [rows, 2 * intermediate], gate first; out [rows, intermediate]."""
    if on_libstars(gate_up):
        libstars.swiglu(gate_up, out)
    elif on_triton(gate_up):
        from stars.kernels.triton.swiglu import swiglu as launch

        launch(gate_up, out)
    else:
        swiglu_reference(gate_up, out)


def swiglu_reference(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up. gate_up [rows, 2 * intermediate], gate first; out [rows, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)
