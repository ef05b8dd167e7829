"""Rows of the embedding table as the residual stream of a fused pass."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import Implementation, operation
from stars.kernels.embedding import embedding_reference, gathered
from stars.kernels.linear import Weight
from stars.kernels.linear_residual import write_stream
from stars.kernels.types import Stream


def embedding_scaled_reference(token_ids: Tensor, weight: Weight, gain: Tensor, stream: Stream) -> None:
    """As `embedding_scaled`."""
    rows = torch.empty(stream.residual.shape, device=stream.residual.device)
    embedding_reference(token_ids, weight, rows)
    write_stream(rows, gain, stream)


@operation(cuda=[Implementation("stars.kernels.triton.skinny:embedding_scaled", gathered)],
           reference=embedding_scaled_reference)
def embedding_scaled(token_ids: Tensor, weight: Weight, gain: Tensor, stream: Stream) -> None:
    """stream.residual[i] = weight[token_ids[i]]; stream.scaled and stream.squares from it.

    token_ids int32 [rows]; weight [vocab, hidden]; gain [hidden], the first norm's weight.
    """
