"""Ragged forward passes through one model, from buffers at fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from stars.buffers import Buffers, bucket
from stars.cache import BlockTable, PagedCache
from stars.kernels.graph import Graphs
from stars.kernels.types import Batch, Tiles
from stars.tiling import Tiling, shape

CHUNK = 256
"""Rows of a prefill pass: enough to be bound by arithmetic, few enough to keep activations in a processor's caches."""


class Span(NamedTuple):
    """The rows of one sequence in a pass: token_ids at positions start .. start + len(token_ids) - 1."""

    table: BlockTable
    token_ids: Sequence[int]
    start: int
    slots: Sequence[int]  # flat row of the slabs or of the pages for each token
    slab_start: int = 0  # flat slab row of the first token, for rows into a slab


class Passes:
    """Prefill and scoring passes of one decoder over one cache. Passes of a shape seen before are replayed.

    With `padded`, rows and sequences are filled up to buckets with idle ones, so that few captured shapes serve all,
    and attention gets its tiles.
    """

    def __init__(self, decoder, cache: PagedCache, max_sequences: int, max_model_len: int, padded: bool = False,
                 deterministic: bool = False):
        self.decoder = decoder
        self.cache = cache
        self.padded = padded
        self.max_rows = max(CHUNK, cache.slab_len)
        self.max_sequences = max_sequences
        rows = bucket(self.max_rows) if padded else self.max_rows
        sequences = bucket(max_sequences) if padded else max_sequences
        decoder.reserve(rows)
        row, sequence = (torch.int32, (rows,)), (torch.int32, (sequences,))
        self._buffers = Buffers(
            cache.device, token_ids=row, positions=row, slots=row, row_start=(torch.int32, (sequences + 1,)),
            last=sequence, seq_group=sequence, prefix_len=sequence, slab_start=sequence,
            slab_used=sequence)  # slab_used stays 0: a pass fills a slab from its start
        self._block_tables = torch.zeros(sequences, math.ceil(max_model_len / cache.page_size), dtype=torch.int32,
                                         device=cache.device)
        self._scores = torch.zeros(sequences, device=cache.device)
        self._never_done = torch.zeros(1, dtype=torch.int32, device=cache.device)
        self._tiling = None
        if padded:
            config = decoder.config
            self._tiling = Tiling(cache.device, rows, config.num_heads, config.num_kv_heads, config.head_dim,
                                  self._block_tables.shape[1] * cache.page_size, deterministic)
        self._graphs = Graphs()

    def prefill(self, tables: Sequence[tuple[BlockTable, Sequence[int], int]]) -> None:
        """For each (table, token_ids, stop): writes keys and values of token_ids[table.length:stop] into the pages.

        token_ids are the tokens from position 0 on. Afterwards table.length == stop.
        """
        spans = []
        for table, token_ids, stop in tables:
            # Chunk boundaries are fixed by position, not by what else is in the batch.
            for start in range(table.length, stop, CHUNK):
                end = min(stop, start + CHUNK)
                # Making shared pages private comes before any pass reads the block table.
                slots = self.cache.rows(table, start, end)
                spans.append(Span(table, token_ids[start:end], start, slots))
        for batch in self._batches(spans, into_slab=False):
            self._run(batch, into_slab=False)
            for span in batch:
                span.table.length = span.start + len(span.token_ids)

    def score(self, spans: Sequence[Span]) -> list[float]:
        """Runs the spans into their slabs and returns the reward at the last row of each.

        Spans of one table should be adjacent, so that its pages are read once for all of them.
        """
        rewards: list[float] = []
        for batch in self._batches(spans, into_slab=True):
            self._run(batch, into_slab=True)
            rewards += self._scores[: len(batch)].tolist()
        return rewards

    def _batches(self, spans: Sequence[Span], into_slab: bool) -> Iterator[list[Span]]:
        """Splits into passes; a later chunk of a table comes in a later pass than the chunks it attends to."""
        batch: list[Span] = []
        rows = 0
        for span in spans:
            follows = bool(batch) and batch[-1].table is span.table and not into_slab
            full = rows + len(span.token_ids) > self.max_rows or len(batch) == self.max_sequences
            if batch and (full or follows):
                yield batch
                batch, rows = [], 0
            batch.append(span)
            rows += len(span.token_ids)
        if batch:
            yield batch

    def _run(self, spans: Sequence[Span], into_slab: bool) -> None:
        rows, sequences, tiles = self._fill(spans, into_slab)
        buffers = self._buffers

        def step() -> None:  # not called where a recorded pass is replayed: the views are made here
            batch = Batch(
                buffers["token_ids"][:rows], buffers["positions"][:rows], buffers["slots"][:rows], into_slab,
                buffers["row_start"][: sequences + 1], buffers["seq_group"][:sequences], self._block_tables,
                buffers["prefix_len"][:sequences], buffers["slab_start"][:sequences],
                buffers["slab_used"][:sequences], tiles)
            hidden = self.decoder.forward(batch, self.cache, buffers["last"][:sequences])  # [sequences, hidden]
            if into_slab:
                self.decoder.score(hidden, self._scores[:sequences])

        buffers.upload()
        # Shapes of scoring passes come again and again, those of prompts hardly do.
        self._graphs.run((rows, sequences, into_slab, *shape(tiles)), step, self._never_done, rare=not into_slab)

    def _fill(self, spans: Sequence[Span], into_slab: bool) -> tuple[int, int, Tiles | None]:
        """Writes the spans into the buffers; rows and sequences, idle ones included, and attention's tiles."""
        self._buffers.wait()
        tables: list[BlockTable] = []
        groups, token_ids, positions, slots, row_start = [], [], [], [], [0]
        for span in spans:
            if not tables or tables[-1] is not span.table:
                tables.append(span.table)
            groups.append(len(tables) - 1)
            token_ids += span.token_ids
            positions += range(span.start, span.start + len(span.token_ids))
            slots += span.slots
            row_start.append(len(token_ids))
        last = [stop - 1 for stop in row_start[1:]]
        prefix_len, slab_start = [span.start for span in spans], [span.slab_start for span in spans]
        tiles = None
        if self.padded:
            most_keys = max(span.start + (0 if into_slab else len(span.token_ids)) for span in spans)
            tiles = self._tiling.fill(bucket(len(token_ids)), row_start, groups, into_slab, most_keys)
            # Idle rows write nothing and belong to no sequence; idle sequences have no rows, and row 0 as their last.
            idle = bucket(len(token_ids)) - len(token_ids)
            token_ids, positions, slots = token_ids + [0] * idle, positions + [0] * idle, slots + [-1] * idle
            idle = bucket(len(spans)) - len(spans)
            row_start += row_start[-1:] * idle
            groups, last = groups + groups[-1:] * idle, last + [0] * idle
            prefix_len, slab_start = prefix_len + [0] * idle, slab_start + [0] * idle
        for name, values in (("token_ids", token_ids), ("positions", positions), ("slots", slots),
                             ("row_start", row_start), ("last", last), ("seq_group", groups),
                             ("prefix_len", prefix_len), ("slab_start", slab_start)):
            self._buffers.host(name)[: len(values)] = values
        self.cache.block_tables(tables, out=self._block_tables)
        return len(token_ids), len(prefix_len), tiles
