"""Rows of the embedding table as the residual stream of a fused pass."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.linear import Weight
from stars.kernels.linear_residual import write_stream
from stars.kernels.types import Stream


def embedding_scaled_reference(token_ids: Tensor, weight: Weight, gain: Tensor, stream: Stream) -> None:
    """As `embedding_scaled`."""
    write_stream(weight.dense()[token_ids.long()], gain, stream)


@operation(cuda="stars.kernels.triton.skinny:embedding_scaled", reference=embedding_scaled_reference)
def embedding_scaled(token_ids: Tensor, weight: Weight, gain: Tensor, stream: Stream) -> None:
    """stream.residual[i] = weight[token_ids[i]]; stream.scaled and stream.squares from it.

    token_ids int32 [rows]; weight [vocab, hidden]; gain [hidden], the first norm's weight.
    """
