"""Prompt tokens into pages."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.cache import BlockTable, PagedCache
from stars.kernels.types import Batch

CHUNK = 256  # rows of one pass: enough to be bound by arithmetic, few enough to keep activations in the caches


def prefill(decoder, cache: PagedCache, table: BlockTable, token_ids: list[int], stop: int,
            want_last: bool = False) -> Tensor | None:
    """Writes keys and values of token_ids[table.length:stop] into the table's pages, in chunks.

    token_ids: the tokens from position 0 on. Returns the hidden state after the final norm of position stop - 1,
    float32 [1, hidden], if `want_last`. Afterwards table.length == stop.
    """
    hidden = None
    block_tables = None
    while table.length < stop:
        start, end = table.length, min(stop, table.length + CHUNK)
        slots = cache.slots(table, start, end)  # may replace shared pages: before block_tables
        block_tables = cache.block_tables([table])
        rows = end - start
        one = torch.tensor([start], dtype=torch.int32)
        zero = torch.zeros(1, dtype=torch.int32)
        batch = Batch(
            token_ids=torch.tensor(token_ids[start:end], dtype=torch.int32),
            positions=torch.arange(start, end, dtype=torch.int32),
            slots=slots, into_slab=False,
            row_start=torch.tensor([0, rows], dtype=torch.int32),
            seq_group=zero, block_tables=block_tables, prefix_len=one, slab_start=zero, slab_used=zero)
        last = torch.tensor([rows - 1]) if want_last and end == stop else None
        hidden = decoder.forward(batch, cache, last)
        table.length = end
    return hidden
