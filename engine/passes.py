"""Ragged forward passes through one model, from buffers at fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stars.cache import BlockTable, PagedCache
from stars.kernels.graph import Graphs
from stars.kernels.types import Batch

CHUNK = 256
"""Rows of a prefill pass: enough to be bound by arithmetic, few enough to keep activations in the processor's caches."""


class Span(NamedTuple):
    """The rows of one sequence in a pass: token_ids at positions start .. start + len(token_ids) - 1."""

    table: BlockTable
    token_ids: Sequence[int]
    start: int
    slots: Sequence[int]  # flat row of the slabs or of the pages for each token
    slab_start: int = 0  # flat slab row of the first token, for rows into a slab


class Passes:
    """Prefill and scoring passes of one decoder over one cache. Passes of a shape seen before are replayed."""

    def __init__(self, decoder, cache: PagedCache, max_sequences: int, max_model_len: int):
        self.decoder = decoder
        self.cache = cache
        self.max_rows = max(CHUNK, cache.slab_len)
        self.max_sequences = max_sequences
        decoder.reserve(self.max_rows)
        pages = math.ceil(max_model_len / cache.page_size)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        self._token_ids, self._positions, self._slots = (ints(self.max_rows) for _ in range(3))
        self._row_start, self._last = ints(max_sequences + 1), ints(max_sequences)
        self._seq_group, self._prefix_len, self._slab_start = (ints(max_sequences) for _ in range(3))
        self._slab_used = ints(max_sequences)  # stays 0: a pass fills a slab from its start
        self._block_tables = ints(max_sequences, pages)
        self._done = ints(1)
        self._graphs = Graphs()
        self._scores = torch.zeros(max_sequences)

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
                slots = self.cache.slots(table, start, end).tolist()
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
        rows, sequences = self._fill(spans)
        batch = Batch(
            self._token_ids[:rows], self._positions[:rows], self._slots[:rows], into_slab,
            self._row_start[: sequences + 1], self._seq_group[:sequences], self._block_tables,
            self._prefix_len[:sequences], self._slab_start[:sequences], self._slab_used[:sequences])

        def step() -> None:
            hidden = self.decoder.forward(batch, self.cache, self._last[:sequences])  # [sequences, hidden]
            if into_slab:
                self.decoder.score(hidden, self._scores[:sequences])

        self._graphs.run((rows, sequences, into_slab), step, self._done)

    def _fill(self, spans: Sequence[Span]) -> tuple[int, int]:
        """Writes the spans into the buffers; (rows, sequences)."""
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
        rows, sequences = len(token_ids), len(spans)
        for buffer, values in ((self._token_ids, token_ids), (self._positions, positions), (self._slots, slots),
                               (self._row_start, row_start), (self._seq_group, groups)):
            buffer.numpy()[: len(values)] = values
        self._last.numpy()[:sequences] = np.array(row_start[1:]) - 1
        self._prefix_len.numpy()[:sequences] = [span.start for span in spans]
        self._slab_start.numpy()[:sequences] = [span.slab_start for span in spans]
        self.cache.block_tables(tables, out=self._block_tables)
        return rows, sequences
