"""The gate of the MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import operation


def swiglu_reference(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up. gate_up [rows, 2 * intermediate], gate first; out [rows, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


@operation(cpu="stars.bindings.libstars:swiglu", cuda="stars.kernels.triton.swiglu:swiglu",
           reference=swiglu_reference)
def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up. gate_up [rows, 2 * intermediate], gate first; out [rows, intermediate]."""
