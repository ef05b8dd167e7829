"""Rows of the embedding table."""

from __future__ import annotations

from torch import Tensor

from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars, on_triton
from stars.kernels.linear import Weight


def embedding(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]. token_ids int32 [rows]; weight [vocab, hidden]; out [rows, hidden]."""
    if on_libstars(out):
        libstars.embedding(token_ids, weight, out)
    elif on_triton(out):
        from stars.kernels.triton.embedding import embedding as launch

        launch(token_ids, weight, out)
    else:
        embedding_reference(token_ids, weight, out)


def embedding_reference(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]. token_ids int32 [rows]; weight [vocab, hidden]; out [rows, hidden]."""
    out.copy_(weight.dense()[token_ids.long()])
