"""The gate of the MLP."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stars.kernels.dispatch import operation

Activation = Literal["silu", "gelu_tanh"]


def swiglu_reference(gate_up: Tensor, out: Tensor, activation: Activation = "silu") -> None:
    """out = activation(gate) * up. gate_up [rows, 2 * intermediate], gate first; out [rows, intermediate].

    "gelu_tanh" is x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) (Hendrycks and Gimpel, arXiv 1606.08415).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    silu = activation == "silu"
    gate = torch.nn.functional.silu(gate) if silu else torch.nn.functional.gelu(gate, approximate="tanh")
    out.copy_(gate * up)


@operation(cpu="stars.bindings.libstars:swiglu", cuda="stars.kernels.triton.swiglu:swiglu",
           reference=swiglu_reference)
def swiglu(gate_up: Tensor, out: Tensor, activation: Activation = "silu") -> None:
    """out = activation(gate) * up. gate_up [rows, 2 * intermediate], gate first; out [rows, intermediate]."""
