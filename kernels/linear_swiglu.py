"""The way up of a gated MLP in one launch: norm, product and gate."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.linear import Weight
from stars.kernels.linear_normed import normed_product
from stars.kernels.types import SplitSpace, Stream


def linear_swiglu_reference(stream: Stream, weight: Weight, eps: float, out: Tensor, space: SplitSpace) -> None:
    """As `linear_swiglu`, in float32 and rounded once."""
    gate, up = normed_product(stream, weight, eps).chunk(2, dim=1)
    out.copy_(torch.nn.functional.silu(gate) * up)


@operation(cuda="stars.kernels.triton.skinny:linear_swiglu", reference=linear_swiglu_reference, by="out")
def linear_swiglu(stream: Stream, weight: Weight, eps: float, out: Tensor, space: SplitSpace) -> None:
    """out = silu(gate) * up, (gate, up) = rstd * (stream.scaled @ weight.T) + bias, rstd as in `linear_normed`.

    weight [2 * intermediate, hidden], the gate's rows first; out [rows, intermediate].
    """
