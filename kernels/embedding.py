"""Rows of the embedding table."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import Implementation, operation
from stars.kernels.linear import Weight
from stars.kernels.quant import dequantize, rows


def embedding_reference(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]. token_ids int32 [rows]; weight [vocab, hidden]; out [rows, hidden]."""
    if weight.quant is not None:
        out.copy_(dequantize(rows(weight.quant, token_ids.long())))
    else:
        out.copy_(weight.dense()[token_ids.long()])


def _unquantised(token_ids: Tensor, weight: Weight, out: Tensor) -> bool:
    return weight.quant is None


def gathered(token_ids: Tensor, weight: Weight, *others: object) -> bool:
    """What a GPU's kernels look up: numbers, and bytes with a scale a row."""
    return weight.quant is None or weight.quant.scheme == "int8"


@operation(cpu=[Implementation("stars.bindings.libstars:embedding", _unquantised)],
           cuda=[Implementation("stars.kernels.triton.embedding:embedding", gathered)],
           reference=embedding_reference, by="out")
def embedding(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]. token_ids int32 [rows]; weight [vocab, hidden]; out [rows, hidden]."""
