"""Rows of the embedding table."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.linear import Weight


def embedding_reference(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]. token_ids int32 [rows]; weight [vocab, hidden]; out [rows, hidden]."""
    out.copy_(weight.dense()[token_ids.long()])


@operation(cpu="stars.bindings.libstars:embedding", cuda="stars.kernels.triton.embedding:embedding",
           reference=embedding_reference, by="out")
def embedding(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]. token_ids int32 [rows]; weight [vocab, hidden]; out [rows, hidden]."""
