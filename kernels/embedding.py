"""Rows of the embedding table."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import Implementation, operation
from stars.kernels.linear import Weight
from stars.kernels.quant import dequantize, rows


def embedding_reference(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]. token_ids int32 [rows]; weight [vocab, hidden]; out [rows, hidden]."""
    if weight.quant is not None and weight.values.is_cpu:
        out.copy_(dequantize(rows(weight.quant, token_ids.long())))
        return
    out.copy_(looked_up(weight)[token_ids.long()])


def looked_up(weight: Weight) -> Tensor:
    """The matrix, whose rows are wanted one by one. Raises ValueError for a quantised weight on a GPU."""
    if weight.quant is not None:
        raise ValueError(f"embedding: the weight is in {weight.quant.name}, give it unquantised: its rows are "
                         "looked up, not multiplied")
    return weight.dense()


def _unquantised(token_ids: Tensor, weight: Weight, out: Tensor) -> bool:
    return weight.quant is None


@operation(cpu=[Implementation("stars.bindings.libstars:embedding", _unquantised)],
           cuda=[Implementation("stars.kernels.triton.embedding:embedding", _unquantised)],
           reference=embedding_reference, by="out")
def embedding(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """out[i] = weight[token_ids[i]]. token_ids int32 [rows]; weight [vocab, hidden]; out [rows, hidden].

    Raises ValueError for a quantised weight on a GPU.
    """
