"""Low-rank products beside those of a layer: what an adapter adds to its base, whose own weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from stars import kernels
from stars.kernels.limits import MAX_HIDDEN
from stars.kernels.linear import Weight

LAUNCHES = 3  # on a GPU, of one low-rank product


class LowRank(NamedTuple):
    """The two matrices of one product; of several modules in one, as queries, keys and values are, `up` is zero where
    the ranks of one meet the features of another."""

    down: Weight  # [rank, in_features]
    up: Weight  # [out_features, rank], with the adapter's scale in it


class LayerAdapters(NamedTuple):
    """Those of a layer's products; None where a product has none."""

    qkv: LowRank | None = None
    o: LowRank | None = None
    gate_up: LowRank | None = None
    down: LowRank | None = None


NO_ADAPTERS = LayerAdapters()


class AdapterRoom(NamedTuple):
    """What low-rank products are formed in, of up to as many rows as were reserved."""

    low: Tensor  # [rows * the largest rank]
    delta: Tensor  # [rows * the most features]
    ones: Tensor  # float32 [the most features, MAX_HIDDEN at most]


def adapter_room(pairs: Iterable[LowRank], rows: int, dtype: torch.dtype, device: torch.device) -> AdapterRoom:
    """Room for passes of `rows` rows through these products."""
    shapes = [(pair.down.out_features, pair.up.out_features) for pair in pairs]
    rank, width = (max(sizes) for sizes in zip(*shapes, strict=True))
    return AdapterRoom(torch.empty(rows * rank, dtype=dtype, device=device),
                       torch.empty(rows * width, dtype=dtype, device=device),
                       torch.ones(min(width, MAX_HIDDEN), device=device))


def low_rank_products(layers: Iterable[LayerAdapters]) -> Iterator[LowRank]:
    """All that layers have."""
    return (pair for layer in layers for pair in layer if pair is not None)


def add_low_rank(x: Tensor, pair: LowRank | None, out: Tensor, room: AdapterRoom | None) -> None:
    """out [rows, out_features] += x [rows, in_features] @ down.T @ up.T; nothing where there is no pair.

    The sum is that of a residual stream, whose norm is thrown away: so it is made of operations that every device has.
    """
    if pair is None:
        return
    assert room is not None
    rows, width = out.shape
    low = room.low[: rows * pair.down.out_features].view(rows, -1)
    delta = room.delta[: rows * width].view(rows, width)
    kernels.linear(x, pair.down, low)
    kernels.linear(low, pair.up, delta)
    piece = next(width // parts for parts in count(1) if width % parts == 0 and width // parts <= MAX_HIDDEN)
    pieces = delta.view(-1, piece)
    kernels.rms_norm(pieces, room.ones[:piece], 1.0, pieces, out.view(-1, piece))
