"""Rows of the embedding table: `take_rows` over the matrix, whose docstring holds the formula and the figures."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.linear import Weight
from stars.kernels.triton.take_rows import take_rows
from stars.kernels.triton.variant import Variant


def embedding(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """As `stars.kernels.embedding`; a token outside the vocabulary becomes NaN."""
    take_rows(weight.dense(), token_ids, out)


def variants() -> list[Variant]:
    """None of its own."""
    return []
