"""A product that is added to the residual stream, and what the next norm needs of the sum."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.linear import Weight
from stars.kernels.types import SplitSpace, Stream


def write_stream(residual: Tensor, gain: Tensor, stream: Stream) -> None:
    """Stores the residual [rows, hidden] in the stream's dtype; `scaled` and `squares` come from what was stored."""
    stream.residual.copy_(residual)
    stored = stream.residual.float()
    stream.scaled.copy_(stored * gain.float())
    rows, blocks = stream.squares.shape
    stream.squares.copy_(stored.square().view(rows, blocks, -1).sum(2))


def linear_residual_reference(x: Tensor, weight: Weight, gain: Tensor, stream: Stream, space: SplitSpace) -> None:
    """As `linear_residual`; the sum is formed in float32."""
    product = x.float() @ weight.dense().float().T
    if weight.bias is not None:
        product = product + weight.bias.float()
    write_stream(stream.residual.float() + product, gain, stream)


@operation(cuda="stars.kernels.triton.skinny:linear_residual", reference=linear_residual_reference)
def linear_residual(x: Tensor, weight: Weight, gain: Tensor, stream: Stream, space: SplitSpace) -> None:
    """stream.residual += x @ weight.T + bias; stream.scaled and stream.squares from the residual as stored.

    x [rows, in_features]; weight [hidden, in_features]; gain [hidden], the next norm's weight.
    """
