"""A product of the normed residual stream, where a norm is no launch of its own: the head of a fused pass."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.linear import Weight
from stars.kernels.types import SplitSpace, Stream


def normed_product(stream: Stream, weight: Weight, eps: float) -> Tensor:
    """float32 [rows, out_features]: 1 / rms of each row times (scaled @ weight.T), plus the bias."""
    rstd = torch.rsqrt(stream.squares.sum(1, keepdim=True) / stream.residual.shape[1] + eps)
    product = rstd * (stream.scaled.float() @ weight.dense().float().T)
    return product if weight.bias is None else product + weight.bias.float()


def linear_normed_reference(stream: Stream, weight: Weight, eps: float, out: Tensor, space: SplitSpace) -> None:
    """As `linear_normed`, in float32 and rounded once."""
    out.copy_(normed_product(stream, weight, eps))


@operation(cuda="stars.kernels.triton.skinny:linear_normed", reference=linear_normed_reference, by="out")
def linear_normed(stream: Stream, weight: Weight, eps: float, out: Tensor, space: SplitSpace) -> None:
    """out = rstd * (stream.scaled @ weight.T) + bias, rstd = 1 / sqrt(sum(stream.squares) / hidden + eps).

    stream of `rows` rows; weight [features, hidden]; out [rows, features] of any floating type, float32 for logits.
    """
