"""Ragged forward passes through one model, from buffers at fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from stars.buffers import Buffers, bucket
from stars.cache import BlockTable, PagedCache
from stars.kernels import append_draft, prefill_attention
from stars.kernels.graph import Graphs
from stars.kernels.philox import signed_seed, signed_stream
from stars.kernels.types import Batch, DecideState, Draft, Tiles, TrailingRows
from stars.prefill import choose_prefill
from stars.tiling import Tiling, shape

CHUNK, CAPTURED_CHUNK = 256, 2048
"""Rows of a prefill pass: enough to be bound by arithmetic, few enough to keep activations in a processor's caches; and
on a GPU, whose products need more rows to be bound by arithmetic."""

CAPTURED_PREFILL = 256
"""Rows up to which a GPU's prefill passes are captured: prompts of a few hundred tokens, whose passes would otherwise
take the host longer to launch than the GPU to run. Longer ones are launched one by one, and may use a library."""

GATHERED_ROWS = 128
"""Rows of a sequence, on average, from which on a library may run a prefill pass: it has the keys gathered first, a
shared beginning once for every sequence, which takes as long as the arithmetic of some 90 rows. Computed, not measured
(8 key heads of 128 in bfloat16: 12 KB moved a key, 16 KFLOP a row and key, 4.3 TB/s and 500 TFLOP/s)."""

MOST_CLOSING = 32
"""Closing tokens that a span which trails a draft may have."""

NO_VERDICT = (0, 0, 1, 0, 1, 0.0, 0.0, 0.0)
"""Terms under which the kernel's verdict means nothing: nobody reads it."""

TERMS, VERDICT = DecideState._fields[: len(NO_VERDICT)], DecideState._fields[len(NO_VERDICT) :]
"""What the host fills of a DecideState, and what it reads."""


class Span(NamedTuple):
    """The rows of one sequence in a pass: token_ids at positions start .. start + len(token_ids) - 1.

    A span that trails lane `lane` of a draft has the token before the segment in token_ids, and zeros in the place of
    the segment and of the `closing` tokens.
    """

    table: BlockTable
    token_ids: Sequence[int]
    start: int
    slots: Sequence[int]  # flat row of the slabs or of the pages for each token
    slab_start: int = 0  # flat slab row of the first token, for rows into a slab
    lane: int = -1
    closing: Sequence[int] = ()


class Verdict(NamedTuple):
    """The reward at a span's last token, and whether the law accepts it under the span's terms."""

    reward: float
    accepted: bool


class Passes:
    """Prefill and scoring passes of one decoder over one cache. Passes of a shape seen before are replayed.

    With `padded`, rows and sequences are filled up to buckets with idle ones, so that few captured shapes serve all,
    and attention gets its tiles. prefill_backend: of passes that are too long to capture, as in `EngineConfig`.
    """

    def __init__(self, decoder, cache: PagedCache, max_sequences: int, max_model_len: int, padded: bool = False,
                 deterministic: bool = False, prefill_backend: str = "auto"):
        self.decoder = decoder
        self.cache = cache
        self.padded = padded
        self.prefill_backend = choose_prefill(decoder.config, decoder.dtype, cache.device.type, prefill_backend,
                                              deterministic)
        self.chunk = CAPTURED_CHUNK if padded else CHUNK
        self.max_rows = max(self.chunk, cache.slab_len)
        self.max_sequences = max_sequences
        rows = bucket(self.max_rows) if padded else self.max_rows
        sequences = bucket(max_sequences) if padded else max_sequences
        decoder.reserve(rows)
        decoder.reserve_positions(max_model_len)
        row, sequence, real = (torch.int32, (rows,)), (torch.int32, (sequences,)), (torch.float64, (sequences,))
        self._buffers = Buffers(
            cache.device, token_ids=row, positions=row, slots=row, row_start=(torch.int32, (sequences + 1,)),
            last=sequence, seq_group=sequence, prefix_len=sequence, slab_start=sequence,
            slab_used=sequence,  # stays 0: a pass fills a slab from its start
            seeds=(torch.int64, (sequences,)), streams=sequence, attempts=sequence, tokens=sequence,
            max_tokens=sequence, start=real, reward_threshold=real, beta=real,
            lanes=sequence, closing=(torch.int32, (sequences, MOST_CLOSING)))
        self._terms = [self._buffers.host(name) for name in TERMS]
        self._verdicts = Buffers(cache.device, rewards=(torch.float32, (sequences,)), accepted=sequence)
        self._block_tables = torch.zeros(sequences, math.ceil(max_model_len / cache.page_size), dtype=torch.int32,
                                         device=cache.device)
        self._never_done = torch.zeros(1, dtype=torch.int32, device=cache.device)
        capacity = self._block_tables.shape[1] * cache.page_size
        self._tiling = Tiling(decoder.config, cache.device, rows, capacity, deterministic) if padded else None
        self._graphs = Graphs()

    def prefill(self, tables: Sequence[tuple[BlockTable, Sequence[int], int]]) -> None:
        """For each (table, token_ids, stop): writes keys and values of token_ids[table.length:stop] into the pages.

        token_ids are the tokens from position 0 on. Afterwards table.length == stop.
        """
        spans = []
        for table, token_ids, stop in tables:
            # Chunk boundaries are fixed by position, not by what else is in the batch.
            for start in range(table.length, stop, self.chunk):
                end = min(stop, start + self.chunk)
                # Making shared pages private comes before any pass reads the block table.
                slots = self.cache.rows(table, start, end)
                spans.append(Span(table, token_ids[start:end], start, slots))
        for batch in self._batches(spans, into_slab=False):
            self._run(batch, into_slab=False)
            for span in batch:
                span.table.length = span.start + len(span.token_ids)

    def score(self, spans: Sequence[Span]) -> list[Verdict]:
        """Runs the spans into their slabs; the verdict on each.

        Spans of one table should be adjacent, so that its pages are read once for all of them.
        """
        verdicts: list[Verdict] = []
        for batch in self._batches(spans, into_slab=True):
            self._run(batch, into_slab=True)
            verdicts += self.verdicts(len(batch))
        return verdicts

    def fits(self, rows: Sequence[int]) -> bool:
        """Whether one pass holds spans of so many rows each."""
        return len(rows) <= self.max_sequences and sum(rows) <= self.max_rows

    def score_trailing(self, draft: Draft, spans: Sequence[Span]) -> None:
        """As `score`, for spans that trail a draft and fit one pass, without waiting for that draft.

        Their results are taken with `verdicts`, before the next pass.
        """
        self._run(spans, into_slab=True, draft=draft)

    def verdicts(self, count: int) -> list[Verdict]:
        """Those of the last scoring pass, of `count` spans, once they are there."""
        self._verdicts.wait()
        rewards, accepted = self._verdicts.host("rewards"), self._verdicts.host("accepted")
        return [Verdict(reward, bool(yes)) for reward, yes in
                zip(rewards[:count].tolist(), accepted[:count].tolist(), strict=True)]

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

    def _run(self, spans: Sequence[Span], into_slab: bool, draft: Draft | None = None) -> None:
        rows, sequences, tiles = self._fill(spans, into_slab)
        captured = into_slab or rows <= CAPTURED_PREFILL
        prefill = None
        if not captured and self._gathers(spans):
            prefill = prefill_attention.build(
                self.prefill_backend, [span.table.pages for span in spans], [span.start for span in spans],
                [len(span.token_ids) for span in spans], self.cache.page_size, self.cache.device)
        if into_slab:
            self._fill_terms(spans, sequences)
        if draft is not None:
            self._fill_trailing(spans, sequences)
        buffers = self._buffers

        def step() -> None:  # not called where a recorded pass is replayed: the views are made here
            def first(name: str) -> torch.Tensor:
                return buffers[name][:sequences]

            token_ids, row_start = buffers["token_ids"][:rows], buffers["row_start"][: sequences + 1]
            last = first("last")
            if draft is not None:
                append_draft(draft, TrailingRows(first("lanes"), row_start, first("closing"), token_ids, last,
                                              first("tokens")), self.decoder.config.vocab_size)
            batch = Batch(token_ids, buffers["positions"][:rows], buffers["slots"][:rows], into_slab, row_start,
                          first("seq_group"), self._block_tables, first("prefix_len"), first("slab_start"),
                          first("slab_used"), tiles, prefill)
            if into_slab:
                state = DecideState(*(first(name) for name in TERMS),
                                    *(self._verdicts[name][:sequences] for name in VERDICT))
                self.decoder.score_and_decide(batch, self.cache, last, state)
            else:
                self.decoder.forward(batch, self.cache, last)

        buffers.upload()
        self._graphs.run((rows, sequences, into_slab, draft is not None, *shape(tiles)), step, self._never_done,
                         rare=not captured)
        if into_slab:
            self._verdicts.fetch()

    def _gathers(self, spans: Sequence[Span]) -> bool:
        """Whether a library runs this prefill: few long sequences, with no more keys than the memory check counted."""
        rows, keys = sum(len(span.token_ids) for span in spans), sum(span.start + len(span.token_ids) for span in spans)
        return (self.padded and self.prefill_backend != "triton" and rows >= GATHERED_ROWS * len(spans)
                and keys <= self.cache.num_pages * self.cache.page_size)

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
            keys = [span.start + (0 if into_slab else len(span.token_ids)) for span in spans]
            tiles = self._tiling.fill(bucket(len(token_ids)), row_start, groups, "score" if into_slab else "prefill",
                                      keys)
            # Idle rows write nothing and belong to no sequence; idle sequences have no rows, and row 0 as their last.
            idle = bucket(len(token_ids)) - len(token_ids)
            token_ids, positions, slots = token_ids + [0] * idle, positions + [0] * idle, slots + [-1] * idle
            idle = bucket(len(spans)) - len(spans)
            row_start += row_start[-1:] * idle
            groups, last = groups + groups[-1:] * idle, last + [0] * idle
            prefix_len, slab_start = prefix_len + [0] * idle, slab_start + [0] * idle
        self._write(token_ids=token_ids, positions=positions, slots=slots, row_start=row_start, last=last,
                    seq_group=groups, prefix_len=prefix_len, slab_start=slab_start)
        self.cache.block_tables(tables, out=self._block_tables)
        return len(token_ids), len(prefix_len), tiles

    def _fill_terms(self, spans: Sequence[Span], sequences: int) -> None:
        # Entry by entry, as in a draft: few values, and numpy's conversions of lists are not in the caches any more.
        seeds, streams, *others = self._terms
        for row in range(sequences):
            seed, stream, *values = NO_VERDICT
            seeds[row], streams[row] = signed_seed(seed), signed_stream(stream)
            for column, value in zip(others, values, strict=True):
                column[row] = value

    def _fill_trailing(self, spans: Sequence[Span], sequences: int) -> None:
        self._write(lanes=[span.lane for span in spans] + [-1] * (sequences - len(spans)))
        closing = self._buffers.host("closing")
        closing[: len(spans)] = -1
        for row, span in zip(closing, spans, strict=False):
            row[: len(span.closing)] = span.closing

    def _write(self, **columns: Sequence[int | float]) -> None:
        for name, values in columns.items():
            self._buffers.host(name)[: len(values)] = values
