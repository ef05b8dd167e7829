"""Ragged forward passes through one model, from buffers at fixed addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from stars.buffers import Buffers
from stars.cache import BlockTable, PagedCache
from stars.config import EngineConfig
from stars.errors import ModelError
from stars.kernels import append_draft, prefill_attention
from stars.kernels.graph import Graphs, Part
from stars.kernels.triton.tiles import Kind
from stars.kernels.types import Batch, Draft, Prefill, Tiles, TrailingRows
from stars.logit_reads import LogitReads
from stars.logprobs import PromptLogprobs
from stars.model.decoder import Decoder
from stars.model.heads import RewardHead
from stars.prefill import choose_prefill
from stars.sizes import MAX_CLOSING, ModelSizes, later_bytes, padded_rows, pass_rows, score_rows, table_width
from stars.tiling import Tiling, shape

GATHERED_ROWS = 128
"""Rows of a sequence, on average, from which on a library may run a prefill pass: it has the keys gathered first, a
shared beginning once for every sequence."""

KINDS: tuple[Kind, ...] = ("prefill", "score")
BESIDE = 2
"""Passes that were launched and whose rewards the host has not taken, at most: one that runs, and one behind it."""

READ_LAUNCHES = 12  # of a head that is more than a row: few products, with what torch does between and behind them
PICKED_LAUNCHES = 2  # of a pass whose last layer goes on for few rows: to pick them


class DraftedPart(NamedTuple):
    """What the device fills in of a span that trails a draft: the segment of a lane, and closing tokens after it."""

    lane: int
    at: int  # of the span's tokens, the first that is filled in
    closing: Sequence[int]


class Span(NamedTuple):
    """The rows of one sequence in a pass: token_ids at positions start .. start + len(token_ids) - 1.

    Those of a span into a slab lie there from the slab's first row on. What is `drafted` stands as zeros in token_ids.
    Where a pass ends with rewards, they are read at the offsets `reads` of token_ids, which rise; empty: at the last.
    """

    table: BlockTable
    token_ids: Sequence[int]
    start: int
    slots: Sequence[int]  # flat row of the slabs or of the pages for each token
    drafted: DraftedPart | None = None
    reads: Sequence[int] = ()
    gate: Sequence[float] | None = None  # what a gated head weights the objectives with


class Prepared(NamedTuple):
    """A pass whose buffers were filled and sent."""

    parts: list[Part]
    rare: bool  # whether it is too long to capture
    scored: bool  # whether it ends with rewards
    read: Part | None  # what makes rewards of its hidden states, where the head is more than a row


class Passes:
    """Prefill and scoring passes of one decoder over one cache, whose `store` has its keys and values. Passes of a
    shape seen before are replayed.

    On a padded target, rows and sequences are filled up with idle ones, so that few captured shapes serve all, and
    attention gets its tiles. How many sequences there are follows from the rows, and so does how many rewards are read:
    one a sequence, or where the model's sizes say so some more, of which a pass holds `max_readings` at most.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, config: EngineConfig, sizes: ModelSizes, store: int = 0):
        self.decoder = decoder
        self.cache = cache
        self.store = store
        self._kv = cache.stores[store]
        self.target = target = config.target
        # Of passes that are too long to capture.
        self.prefill_backend = choose_prefill(decoder.config, decoder.dtype, target, config.prefill_backend,
                                              config.deterministic)
        self.max_rows = pass_rows(config, sizes)
        self.chunk = config.chunk
        self.max_sequences = sizes.max_sequences
        self.max_readings = sizes.max_sequences * sizes.readings
        self._longest = sizes.max_positions  # tokens of a text
        rows, sequences = padded_rows(config, sizes), target.rows(self.max_sequences, "draft")
        readings = sequences * sizes.readings
        decoder.reserve(rows)
        decoder.reserve_positions(sizes.max_positions)
        row, sequence = (torch.int32, (rows,)), (torch.int32, (sequences,))
        start = torch.int32, (sequences + 1,)
        columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict(
            token_ids=row, positions=row, slots=row, row_start=start, last=(torch.int32, (readings,)),
            seq_group=sequence, prefix_len=sequence, slab_start=sequence,
            slab_used=sequence,  # stays 0: a pass fills a slab from its start
            lanes=sequence, segment_start=start, closing=(torch.int32, (sequences, MAX_CLOSING)))
        self._head = decoder.score_head if isinstance(decoder.score_head, RewardHead) else None
        self._gated = self._head is not None and self._head.gate is not None
        if self._head is not None:  # its hidden states, for what is not recorded with the pass
            self._states = torch.zeros(readings, decoder.config.hidden_size, device=cache.device)
            self._room = self._head.room(readings, cache.device)
            if self._head.gate is not None:
                columns["gates"] = torch.float32, (readings, self._head.gate.objectives)
        self._buffers = Buffers(target, True, 1, **columns)
        self._host = {name: self._buffers.host(name) for name in columns}
        # On the host, a block for what is taken at once, and one for each pass that is not.
        self._rewards = Buffers(target, hosts=1 + BESIDE, rewards=(torch.float32, (readings,)))
        self._block = 0  # of the last pass whose rewards were not taken at once
        self._block_tables = torch.zeros(sequences, table_width(config, sizes), dtype=torch.int32, device=cache.device)
        self._host_tables = None if target.own_memory else self._block_tables.numpy()
        self._never_done = torch.zeros(1, dtype=torch.int32, device=cache.device)
        capacity = self._block_tables.shape[1] * cache.page_size
        self._tiling = Tiling(decoder.config, config, rows, capacity) if target.padded else None
        self._graphs = Graphs(later_bytes(decoder.config, decoder.adapter_launches))
        self._most: dict[Kind, int] = {"prefill": self.max_rows, "score": score_rows(config, sizes)}  # rows
        self._captured = {kind: target.captured(kind) for kind in KINDS}  # rows
        self._launches = decoder.launches(rows) + PICKED_LAUNCHES  # at most: longer passes are not fused
        self._logit_reads: LogitReads | None = None
        self._prepared: Prepared | None = None  # a pass whose buffers are filled, until it is launched or another comes

    def prefill(self, tables: Sequence[tuple[BlockTable, Sequence[int], int]], max_rows: int | None = None,
                advance: bool = True) -> int:
        """For each (table, token_ids, stop): writes keys and values of token_ids[table.length:stop] into the pages.

        token_ids are the tokens from position 0 on. Afterwards table.length == stop, of the first tables only where
        `max_rows` did not suffice: whole chunks are run, in order, and no more rows than that. Returns the rows run.
        A store that is behind is written from where it is. advance: False leaves the tables' lengths as they are.
        """
        spans, rows = self._page_spans(tables, max_rows)
        for batch in self._batches(spans, self.max_rows, into_slab=False):
            self._run(batch, into_slab=False)
            if advance:
                _written(batch)
        return rows

    def read(self, table: BlockTable, token_ids: Sequence[int], stop: int, positions: Sequence[int],
             max_rows: int | None = None) -> tuple[int, list[float]]:
        """As `prefill`, of one table; (rows run, the rewards at those of `positions`, which rise, that were run)."""
        spans, rows = self._page_spans([(table, token_ids, stop)], max_rows)
        spans = [span._replace(reads=[position - span.start for position in positions
                                      if span.start <= position < span.start + len(span.token_ids)]) for span in spans]
        rewards: list[float] = []
        for batch in self._batches(spans, self.max_rows, into_slab=False):
            read = sum(len(span.reads) for span in batch)
            self._run(batch, into_slab=False, scored=read > 0)
            _written(batch)
            if read:
                rewards += self.rewards(read)
        return rows, rewards

    def _page_spans(self, tables: Sequence[tuple[BlockTable, Sequence[int], int]], max_rows: int | None
                    ) -> tuple[list[Span], int]:
        """The spans into pages that `prefill` runs, and their rows."""
        spans, rows = [], 0
        for table, token_ids, start, end in self._chunks(tables):
            if max_rows is not None and rows + end - start > max_rows:
                break
            # Making shared pages private comes before any pass reads the block table.
            slots = self.cache.rows(table, start, end, shared=end <= table.length)
            spans.append(Span(table, token_ids[start:end], start, slots))
            rows += end - start
        return spans, rows

    def _chunks(self, tables: Sequence[tuple[BlockTable, Sequence[int], int]]
                ) -> Iterator[tuple[BlockTable, Sequence[int], int, int]]:
        """(table, token_ids, start, end) of each chunk. Boundaries are fixed by position, not by what else is in the
        batch, nor by how many chunks are run at a time. Where a store that is behind has caught up is one."""
        for table, token_ids, stop in tables:
            held, length = table.held(self.store), table.length
            if held < length < stop:
                yield from self._chunks([(table, token_ids, length)])
                held = length
            for start in range(held, stop, self.chunk):
                yield table, token_ids, start, min(stop, start + self.chunk)

    def score(self, spans: Sequence[Span]) -> list[float]:
        """Runs the spans into their slabs; the rewards at what is to be read of each, one span's after the other's.

        Spans of one table should be adjacent, so that its pages are read once for all of them.
        """
        rewards: list[float] = []
        for batch in self._batches(spans, min(self.max_rows, self.target.captured_score), into_slab=True):
            self._run(batch, into_slab=True)
            rewards += self.rewards(sum(len(span.reads) or 1 for span in batch))
        return rewards

    def states(self, spans: Sequence[Span]) -> Tensor:
        """Runs the spans into their slabs; what a RewardHead gets of the last token of each, float32 [spans, hidden].
        """
        found = []
        for batch in self._batches(spans, min(self.max_rows, self.target.captured_score), into_slab=True):
            self._prepared = None
            self._launch(self._prepare(batch, into_slab=True)._replace(scored=False, read=None))
            found.append(self._states[: len(batch)].clone())
        return torch.cat(found)

    def logits(self, spans: Sequence[Span]) -> Tensor:
        """Runs the spans into their slabs; the logits at every row of each, float32 [rows of all spans, vocab]: of few
        rows. ModelError for a model without a language model head."""
        reads = self.logit_reads()
        return torch.cat([reads.logits(_rows(batch)) for batch in self._run_whole(spans, into_slab=True)])

    def hidden(self, spans: Sequence[Span]) -> Tensor:
        """Runs the spans into their slabs; the hidden states behind the last norm at every row of each, [rows of all
        spans, hidden]. ModelError for a model without a language model head."""
        states = self.logit_reads().states
        return torch.cat([states[: _rows(batch)].clone() for batch in self._run_whole(spans, into_slab=True)])

    def logprobs(self, spans: Sequence[Span], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        """Runs the spans into their slabs; log softmax(logits)[target] at every row of each, at temperature 1 and
        without filters. targets: as many tokens for each span as it has rows; for one of a single row any number. Few
        rows have logits at a time. ModelError for a model without a language model head."""
        if any([len(span.token_ids) not in (1, len(those)) for span, those in zip(spans, targets, strict=True)]):
            raise ValueError("logprobs: a target is needed for every row of every span, and for no more")
        wanted, found = iter(targets), []
        for batch in self._run_whole(spans, into_slab=True):
            those = list(islice(wanted, len(batch)))
            flat = [target for tokens in those for target in tokens]
            if len(flat) == _rows(batch):
                values = iter(self._logprobs(flat, "score"))
                found += [list(islice(values, len(tokens))) for tokens in those]
            else:
                by_row = self.logit_reads().several([row for span, tokens in zip(batch, those, strict=True) for row in (
                    [tokens] if len(span.token_ids) == 1 else [[token] for token in tokens])])
                rows = iter(by_row)
                found += [[value for row in islice(rows, len(span.token_ids)) for value in row] for span in batch]
        return found

    def read_logprobs(self, table: BlockTable, token_ids: Sequence[int], stop: int, max_rows: int | None = None
                      ) -> tuple[int, list[float]]:
        """As `prefill`, of one table; (rows run, of each of them the log-probability of the token after it, which
        token_ids have, as of `logprobs`)."""
        spans, rows = self._page_spans([(table, token_ids, stop)], max_rows)
        logprobs: list[float] = []
        for [span] in self._run_whole(spans, into_slab=False):
            first = span.start + 1
            logprobs += self._logprobs(token_ids[first : first + len(span.token_ids)], "prefill")
            _written([span])
        return rows, logprobs

    def tell(self, table: BlockTable, token_ids: Sequence[int], stop: int, told: PromptLogprobs,
             max_rows: int | None = None, advance: bool = True) -> int:
        """As `prefill`, of one table, whose beginning `told` is of: what it lacks of the rows that are run is put
        there. Few rows have logits at a time."""
        spans, rows = self._page_spans([(table, token_ids, stop)], max_rows)
        for [span] in self._run_whole(spans, into_slab=False):
            lacking = told.lacking(span.start, span.start + len(span.token_ids))
            if lacking:
                told.take(lacking, *self.logit_reads().tops(
                    lacking.start - span.start, told.targets(lacking), told.wanted))
            if advance:
                _written([span])
        return rows

    def logit_reads(self) -> LogitReads:
        """What reads logits at every row of a pass, made where it is first asked for."""
        if self.decoder.head is None:
            raise ModelError("this model has no language model head: load it with head='lm'")
        if self._logit_reads is None:
            rows = max(self.target.rows(most, kind) for kind, most in self._most.items())
            self._logit_reads = LogitReads(self.decoder, self.target, rows, self._graphs)
        return self._logit_reads

    def _run_whole(self, spans: Sequence[Span], into_slab: bool) -> Iterator[list[Span]]:
        """Runs the spans and keeps the hidden states of every row; the spans of each pass, once it was launched."""
        most = min(self.max_rows, self.target.captured_score) if into_slab else self.max_rows
        for batch in self._batches(spans, most, into_slab):
            self._prepared = None
            self._launch(self._prepare(batch, into_slab, scored=False, states=self.logit_reads().states))
            yield batch

    def _logprobs(self, targets: Sequence[int], kind: Kind) -> list[float]:
        """Of the tokens that are wanted at the rows of the pass that was launched last."""
        rows = self.target.rows(len(targets), kind)
        return self.logit_reads().logprobs(targets, rows, rare=rows > self._captured[kind])

    def recompute(self, spans: Sequence[Span]) -> None:
        """Runs the spans into their slabs, as drafts had done it token by token."""
        for batch in self._batches(spans, self.max_rows, into_slab=True):
            self._run(batch, into_slab=True, scored=False)

    def fits(self, rows: Sequence[int], readings: int = 0) -> bool:
        """Whether one pass holds spans of so many rows each, with so many readings where it is not one each."""
        return len(rows) <= self.max_sequences and sum(rows) <= self.max_rows and readings <= self.max_readings

    def prepare_trailing(self, draft: Draft, spans: Sequence[Span]) -> None:
        """The host's part of a scoring pass of spans that trail a draft and fit one pass: what it reads is sent.

        It runs with `launch_prepared`, once all steps of the draft were launched, unless another pass came before.
        """
        self._prepared = None  # not before it is whole
        self._prepared = self._prepare(spans, True, draft)

    def prepare(self, spans: Sequence[Span]) -> None:
        """As `prepare_trailing`, for spans that the host knows; it may be called while the pass before runs, whose
        rewards are still to be taken. What is sent is read in stream order, so one set of buffers serves both."""
        self._prepared = None
        self._prepared = self._prepare(spans, True)

    @property
    def prepared(self) -> bool:
        """Whether a pass waits to be launched: none does where another one came between."""
        return self._prepared is not None

    def launch_prepared(self) -> int:
        """Launches the pass that was prepared, without waiting for the draft or for the pass before.

        Returns by what number `rewards` has its results, until BESIDE passes more were launched so."""
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        self._block = self._block % BESIDE + 1
        self._launch(prepared, self._block)
        return self._block

    def rewards(self, count: int, block: int = 0) -> list[float]:
        """So many, once they are there, in the order of the spans and of their reads: of the pass that was given that
        number, or of the last that was run by `score` or `read`."""
        self._rewards.wait(block)
        rewards: list[float] = self._rewards.host("rewards", block)[:count].tolist()
        return rewards

    def warm_up(self, draft: Draft | None = None, logprobs: bool = False) -> None:
        """Runs and captures the shapes of passes on a GPU, on rows that are all idle, as far as they are captured.

        Of a reward model, whose passes trail `draft`, scoring passes too; of one that is read by `logprobs`, those that
        end so. Passes of more rows run the kernels of the longest, which runs here: their numbers of rows are multiples
        of STEP, which no kernel is compiled for one by one, and tables of products end far below them. A library's
        attention and what is recomputed, which have kernels of their own, run once.
        """
        assert self._tiling is not None
        self.cache.warm_up()
        self._warm_up_library()
        reads = self.logit_reads() if logprobs else None
        for kind in KINDS if draft is not None or reads is not None else KINDS[:1]:
            scored = kind == "score" and reads is None
            states = reads.states if kind == "score" and reads is not None else None
            longest = self.target.rows(self._most[kind], kind)
            for rows in dict.fromkeys((longest, *self.target.shapes(kind, longest))):
                sequences = self._sequences(rows)
                self._fill_idle(rows, sequences)
                for tiles in self._tiling.shapes(rows, kind):
                    forward = self._forward(rows, sequences, tiles, None, kind == "score", scored, states=states)
                    if rows <= self._captured[kind]:
                        self._graphs.warm_up(forward)
                    else:
                        forward.call()
                if kind == "prefill" or rows > self._captured[kind]:
                    continue
                if reads is not None:
                    self._graphs.warm_up(reads.part(rows))
                elif draft is not None:
                    self._graphs.warm_up(self._append(draft, rows, sequences))
                    if self._head is not None:
                        self._graphs.warm_up(self._read(self._head, self._reads(rows)))
        if draft is None and not logprobs and self._tiling.deterministic:
            self._run_idle(self.target.rows(1, "score"), "score")

    def _run_idle(self, rows: int, kind: Kind, prefill: Prefill | None = None) -> None:
        """Runs a pass of idle rows, without a reward, in every width of attention's tiles unless those are a library's.
        """
        assert self._tiling is not None
        sequences = self._sequences(rows)
        self._fill_idle(rows, sequences)
        for tiles in self._tiling.shapes(rows, kind)[: None if prefill is None else 1]:
            self._forward(rows, sequences, tiles, prefill, kind == "score", False).call()

    def _warm_up_library(self) -> None:
        """Runs a chunk of a prompt through the library, if one is chosen, and where layers have windows, one beyond
        those: its first call of a kind loads kernels, or compiles them for seconds. It reads one page over and over."""
        most = min(self.cache.num_pages * self.cache.page_size, self._longest)
        for start in sorted({window or 0 for window in (None, *self.decoder.config.sliding_window)}):
            rows = min(self.chunk, most - start)
            if self.prefill_backend != "triton" and rows > self._captured["prefill"]:
                pages = [0] * -(-(start + rows) // self.cache.page_size)
                self._run_idle(self.target.rows(rows, "prefill"), "prefill", prefill_attention.build(
                    self.prefill_backend, [pages], [start], [rows], self.cache.page_size, self.cache.device))

    def _batches(self, spans: Sequence[Span], max_rows: int, into_slab: bool) -> list[list[Span]]:
        """Splits into passes of up to `max_rows` rows, or one longer span; a later chunk of a table comes in a later
        pass than the chunks it attends to. A span with more to be read than a pass holds is run again for the rest."""
        batches: list[list[Span]] = []
        batch: list[Span] = []
        rows = reads = 0
        for span in self._readable(spans):
            full = rows + len(span.token_ids) > max_rows or len(batch) == self.max_sequences
            full = full or reads + (len(span.reads) or 1) > self.max_readings
            if batch and (full or (batch[-1].table is span.table and not into_slab)):
                batches.append(batch)
                batch, rows, reads = [], 0, 0
            batch.append(span)
            rows += len(span.token_ids)
            reads += len(span.reads) or 1
        if batch:
            batches.append(batch)
        return batches

    def _readable(self, spans: Sequence[Span]) -> Iterator[Span]:
        """The spans, one with more to be read than a pass holds several times over: it writes the same rows again."""
        most = self.max_readings
        for span in spans:
            for first in range(0, max(1, len(span.reads)), most):
                yield span if len(span.reads) <= most else span._replace(reads=span.reads[first : first + most])

    def _run(self, spans: Sequence[Span], into_slab: bool, scored: bool | None = None) -> None:
        """scored: whether it ends with rewards; left out, a pass into slabs does."""
        self._prepared = None
        self._launch(self._prepare(spans, into_slab, scored=into_slab if scored is None else scored))

    def _prepare(self, spans: Sequence[Span], into_slab: bool, draft: Draft | None = None,
                 scored: bool = True, states: Tensor | None = None) -> Prepared:
        """Fills the buffers and sends them; what is then to be run. states: where those of every row are to be."""
        rows, sequences, reads, tiles = self._fill(spans, into_slab)
        # What is recomputed, where a response gave way or no slab holds it, has no shapes of its own.
        captured = rows <= self._captured["score" if into_slab else "prefill"] and (
            scored == into_slab or states is not None)
        prefill = None
        if not captured and not into_slab and self._gathers(spans):
            prefill = prefill_attention.build(
                self.prefill_backend, [span.table.pages for span in spans], [span.start for span in spans],
                [len(span.token_ids) for span in spans], self.cache.page_size, self.cache.device)
        self._buffers.upload()
        parts = [self._forward(rows, sequences, tiles, prefill, into_slab, scored, reads, states)]
        if draft is not None:  # the device fills in what was drawn
            parts.insert(0, self._append(draft, rows, sequences))
        read = self._read(self._head, reads) if scored and self._head is not None else None
        return Prepared(parts, not captured, scored, read)

    def _launch(self, prepared: Prepared, block: int = 0) -> None:
        """block: of the host's, for the rewards."""
        self._graphs.run(prepared.parts, self._never_done, rare=prepared.rare)
        if prepared.read is not None:
            self._graphs.run_beside(prepared.read, self._never_done, prepared.rare)
        if prepared.scored:
            self._rewards.fetch(block)

    def _forward(self, rows: int, sequences: int, tiles: Tiles | None, prefill: Prefill | None, into_slab: bool,
                 scored: bool, reads: int | None = None, states: Tensor | None = None) -> Part:
        """The model's part of a pass. What it runs is made where it is recorded, not where replayed."""
        buffers = self._buffers
        reads = self._reads(rows) if reads is None else reads  # of a padded one

        def first(name: str) -> Tensor:
            return buffers[name][:sequences]

        def run() -> None:
            last = buffers["last"][:reads]
            batch = Batch(buffers["token_ids"][:rows], buffers["positions"][:rows], buffers["slots"][:rows], into_slab,
                          buffers["row_start"][: sequences + 1], first("seq_group"), self._block_tables,
                          first("prefix_len"), first("slab_start"), first("slab_used"), tiles, prefill)
            if states is not None:
                self.decoder.forward(batch, self._kv, out=states[:rows])
            elif scored and self._head is not None:
                self.decoder.forward(batch, self._kv, last, self._states[:reads])
            elif scored:
                self.decoder.score(batch, self._kv, last, self._rewards["rewards"][:reads])
            else:
                self.decoder.forward(batch, self._kv, last)

        what = (scored, reads) if states is None else ("states",)
        key = "forward", rows, sequences, into_slab, *what, *(shape(tiles) if tiles is not None else ())
        return Part(key, run, self._launches)

    def _read(self, head: RewardHead, reads: int) -> Part:
        """What a head that is more than a row makes of the hidden states of a pass."""

        def run() -> None:
            head.read(self._states[:reads], self._room, self._rewards["rewards"][:reads],
                      self._buffers["gates"][:reads] if self._gated else None)

        return Part(("read", reads), run, READ_LAUNCHES)

    def _append(self, draft: Draft, rows: int, sequences: int) -> Part:
        """What a draft drew, into the rows of a pass that trails it."""
        buffers = self._buffers

        def run() -> None:
            append_draft(draft, TrailingRows(
                buffers["lanes"][:sequences], buffers["segment_start"][: sequences + 1],
                buffers["closing"][:sequences], buffers["token_ids"][:rows], buffers["last"][:sequences]),
                self.decoder.config.vocab_size)

        return Part(("append", rows, sequences), run)

    def _sequences(self, rows: int) -> int:
        """Sequences of a padded pass of `rows` rows, each of which has one at least, idle ones included."""
        return min(rows, len(self._buffers["lanes"]))

    def _reads(self, rows: int) -> int:
        """Rewards of a padded pass of `rows` rows: no row is read twice, but for idle readings."""
        return min(rows, len(self._buffers["last"]))

    def _gathers(self, spans: Sequence[Span]) -> bool:
        """Whether a library runs this prefill: few long sequences, with no more keys than the memory check counted."""
        rows, keys = sum(len(span.token_ids) for span in spans), sum(span.start + len(span.token_ids) for span in spans)
        return (self.prefill_backend != "triton" and rows >= GATHERED_ROWS * len(spans)
                and keys <= self.cache.num_pages * self.cache.page_size)

    def _fill(self, spans: Sequence[Span], into_slab: bool) -> tuple[int, int, int, Tiles | None]:
        """Writes the spans into the buffers; rows, sequences and readings, idle ones included, and attention's tiles.
        """
        self._buffers.wait()
        tables: list[BlockTable] = []
        groups: list[int] = []
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        row_start = [0]
        last: list[int] = []
        for span in spans:
            if not tables or tables[-1] is not span.table:
                tables.append(span.table)
            groups.append(len(tables) - 1)
            token_ids += span.token_ids
            positions += range(span.start, span.start + len(span.token_ids))
            slots += span.slots
            if span.reads:
                last += [row_start[-1] + offset for offset in span.reads]
            else:
                last.append(len(token_ids) - 1)
            row_start.append(len(token_ids))
        rows, sequences, reads, tiles = len(token_ids), len(spans), len(last), None
        if self._tiling is not None:
            kind: Kind = "score" if into_slab else "prefill"
            rows = self.target.rows(rows, kind)
            sequences, reads = self._sequences(rows), self._reads(rows)
            keys = [span.start + (0 if into_slab else len(span.token_ids)) for span in spans]
            tiles = self._tiling.fill(rows, row_start, groups, kind, keys)
        # Idle rows write nothing and belong to no sequence; idle sequences have no rows; idle readings are of row 0.
        self._write(rows, 0, token_ids=token_ids, positions=positions)
        self._write(rows, -1, slots=slots)
        self._write(sequences + 1, row_start[-1], row_start=row_start)
        self._write(sequences, groups[-1], seq_group=groups)
        self._write(reads, 0, last=last)
        self._write(sequences, 0, prefix_len=[span.start for span in spans],
                    slab_start=[span.slots[0] for span in spans])
        drafted = [span.drafted for span in spans if span.drafted is not None]
        if drafted:
            self._write(sequences, -1, lanes=[one.lane for one in drafted])
            # To the draft, a sequence begins with the row before its segment, though it be another sequence's, or -1.
            self._write(sequences + 1, 0, segment_start=[
                start + one.at - 1 for start, one in zip(row_start, drafted, strict=False)])
            closing = self._host["closing"]
            closing[:sequences] = -1
            for row, one in zip(closing, drafted, strict=False):
                row[: len(one.closing)] = one.closing
        if self._gated:
            weights = [span.gate for span in spans for _ in span.reads or (0,)]
            for row, gate in zip(self._host["gates"], weights, strict=False):
                row[:] = 0.0 if gate is None else gate  # the gate itself is read without, and so are prompts
        self.cache.write_block_tables(tables, self._block_tables, self._host_tables)
        return rows, sequences, reads, tiles

    def _fill_idle(self, rows: int, sequences: int) -> None:
        """A pass without spans, sent: nothing of it is written or read."""
        self._buffers.wait()
        self._write(rows, 0, token_ids=(), positions=())
        self._write(rows, -1, slots=())
        self._write(sequences + 1, 0, row_start=(), segment_start=())
        self._write(sequences, 0, seq_group=(), prefix_len=(), slab_start=())
        self._write(self._reads(rows), 0, last=())
        self._write(sequences, -1, lanes=())
        self._buffers.upload()

    def _write(self, count: int, idle: int, **columns: Sequence[int]) -> None:
        """Writes the columns of the host's block, and `idle` into what is left of their first `count` entries."""
        for name, values in columns.items():
            column = self._host[name]
            column[: len(values)] = values
            if len(values) < count:
                column[len(values) : count] = idle


def _rows(spans: Sequence[Span]) -> int:
    """Rows of a pass of these spans, idle ones apart."""
    return sum([len(span.token_ids) for span in spans])


def _written(spans: Sequence[Span]) -> None:
    """The pages of these spans hold them now."""
    for span in spans:
        span.table.length = span.start + len(span.token_ids)
