"""Rows of the embedding table as the residual stream of a fused pass."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import Implementation, operation
from stars.kernels.embedding import looked_up
from stars.kernels.linear import Weight
from stars.kernels.linear_residual import write_stream
from stars.kernels.types import Stream


def embedding_scaled_reference(token_ids: Tensor, weight: Weight, gain: Tensor, stream: Stream) -> None:
    """As `embedding_scaled`."""
    write_stream(looked_up(weight)[token_ids.long()], gain, stream)


def _unquantised(token_ids: Tensor, weight: Weight, gain: Tensor, stream: Stream) -> bool:
    return weight.quant is None


@operation(cuda=[Implementation("stars.kernels.triton.skinny:embedding_scaled", _unquantised)],
           reference=embedding_scaled_reference)
def embedding_scaled(token_ids: Tensor, weight: Weight, gain: Tensor, stream: Stream) -> None:
    """stream.residual[i] = weight[token_ids[i]]; stream.scaled and stream.squares from it.

    token_ids int32 [rows]; weight [vocab, hidden]; gain [hidden], the first norm's weight. Raises ValueError for a
    quantised weight.
    """
