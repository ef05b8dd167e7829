"""Matrix product with a weight in its device's best layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """A matrix [out_features, in_features] and its bias, as `pack` made them for one device.

    `values` is the matrix itself, or, where `packed`, libstars' layout of it: the matrix is then not stored twice, and
    `dense()` rebuilds it.
    """

    values: Tensor
    bias: Tensor | None  # float32 or the values' dtype [out_features]
    out_features: int
    in_features: int
    packed: bool = False

    def dense(self) -> Tensor:
        """The matrix [out_features, in_features]."""
        return self.values


def pack(matrix: Tensor, bias: Tensor | None = None) -> Weight:
    """A Weight of `matrix` [out_features, in_features]."""
    return Weight(matrix, bias, matrix.shape[0], matrix.shape[1])


def linear_reference(x: Tensor, weight: Weight, out: Tensor) -> None:
    """out = x @ weight.T + bias. x [rows, in_features]; out [rows, out_features]."""
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    out.copy_(torch.nn.functional.linear(x, weight.dense().to(x.dtype), bias))
