"""Drafting: all lanes of all requests decode one segment together, in slabs.

The step is one fixed list of operations over buffers at fixed addresses: lengths, positions and tokens are read and
advanced in memory. It is recorded once per number of lanes, and a whole segment is then one call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stars.buffers import Buffers
from stars.cache import BlockTable, PagedCache
from stars.config import EngineConfig
from stars.edit_buffers import EditBuffers
from stars.edits import Edited, Matcher
from stars.kernels import apply_penalties, blend_logits, edit_logits, sample_step, top_logprobs, top_tokens
from stars.kernels.graph import Graphs, Part
from stars.kernels.philox import signed_seed, signed_stream
from stars.kernels.top_tokens import launches
from stars.kernels.types import Batch, Draft, LaneState, Penalties, Ranking, Tiles, TopLogprobs
from stars.kv_store import KVStore
from stars.logprobs import Tops
from stars.model.decoder import Decoder
from stars.pacing import Pacing
from stars.plan import MAX_RANKS
from stars.sampling import MAX_LOGPROBS, SamplingParams
from stars.sizes import (
    EDIT_LAUNCHES,
    TELL_LAUNCHES,
    history_entries,
    language_model,
    later_bytes,
    ranked_rows,
    table_width,
)
from stars.tiling import Tiling, shape

MAX_STOP_IDS = 16
SAMPLE_LAUNCHES = 7  # on a GPU, at most: penalties and the draw

PENALTIES = ("history_start", "history_count", "repetition", "frequency", "presence")
"""The buffers of the entries of a Penalties, in its order."""


class LaneSpec(NamedTuple):
    """One lane of a draft. Lanes that share a table must be adjacent."""

    table: BlockTable
    last_token: int  # first input: the committed token whose keys and values the pages lack
    slab: int
    max_tokens: int  # that it may draw
    seed: int
    attempt: int
    stream: int  # philox.pack_stream(segment, sample)
    params: SamplingParams
    stop_ids: tuple[int, ...]
    history: np.ndarray | None = None  # as of Hypothesis.history; needed where params have penalties
    entropy_cut: float = math.inf  # nats at which it ends before the next token is drawn
    least_tokens: int = 0  # that it draws before that
    weights: tuple[float, ...] = (1.0,)  # of the drafter's models, in their order
    ranks: int = 0  # above 0: nothing is drawn, so many of the most probable next tokens are found instead
    edits: Edited | None = None  # biases, bans and masks of single tokens
    matcher: Matcher | None = None  # says before each draw which tokens are allowed, and is told what was drawn
    begun: int = 0  # tokens of its segment that are committed: none beside penalties, edits, ranks and logprobs


class Drafted(NamedTuple):
    """What one lane drew, or the tokens that were found, the most probable first, fewer where its filters keep fewer.

    Token -1 stands for logits that were NaN or infinite.
    """

    token_ids: list[int]
    logprobs: list[float]
    logits: Tensor | None = None  # float32 [steps, vocab] that its tokens were drawn from, where they were asked for
    tops: Tops | None = None  # what stood beside the tokens that were drawn, where the lane's parameters ask for that


class Source(NamedTuple):
    """One of the models that a drafter draws from."""

    decoder: Decoder
    kv: KVStore
    logits: Tensor  # float32 [rows, vocab]
    tiling: Tiling | None  # on a padded target
    launches: int  # of its pass on a GPU, at most


class Drafter:
    """Owns the lane buffers of one language model, or of several whose logits are blended.

    store: where the keys and values of `decoder` are. beside: other models and their stores, whose logits are weighted
    and added to its own, by each lane's weights; None where nothing is weighted, which costs nothing then. All models
    read the same tokens in the same rows, so that one set of buffers serves their passes.

    On a padded target, lanes are filled up to a bucket with idle ones, so that few captured shapes serve every number,
    and attention gets its tiles.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, config: EngineConfig, store: int = 0,
                 beside: Sequence[tuple[Decoder, int]] | None = None):
        self.decoder = decoder
        self.cache = cache
        self.target = target = config.target
        sizes, max_segment_size = language_model(config), config.max_segment_size
        rows = target.rows(sizes.max_lanes, "draft")
        one, flag = (torch.int32, (rows,)), (torch.float32, (rows,))
        weights = {} if beside is None else {"weights": (torch.float32, (1 + len(beside), rows))}
        self._buffers = Buffers(
            target, True, 1,
            token_ids=one, positions=one, slots=one, slab_used=one, steps=one, max_tokens=one, done=one,
            out_tokens=(torch.int32, (rows, max_segment_size)), out_logprobs=(torch.float32, (rows, max_segment_size)),
            seeds=(torch.int64, (rows,)), attempts=one, streams=one, temperature=flag, top_k=one, top_p=flag,
            min_p=flag, stop_ids=(torch.int32, (rows, MAX_STOP_IDS)), entropy_cut=flag, least_tokens=one,
            seq_group=one, prefix_len=one, slab_start=one,
            history_start=one, history_count=one, repetition=flag, frequency=flag, presence=flag, **weights)
        # Apart, as it is long and seldom needed: sent as far as it is filled, and read no further.
        entries = history_entries(config, decoder.config.vocab_size)
        self._history = Buffers(target, zeroed=False, entries=(torch.int32, (entries, 2)))
        ranked = rows, min(MAX_RANKS, decoder.config.vocab_size)
        self._ranking = Buffers(  # apart, as few drafts need it
            target, ranks=one, temperature=flag, top_k=one, top_p=flag, min_p=flag,
            token_ids=(torch.int32, ranked), logprobs=(torch.float32, ranked))
        self._ranked_rows = ranked_rows(config, sizes)
        self._ranks: list[int] = []  # of the lanes of the last draft, where some have any
        told = rows, max_segment_size
        tops = *told, min(MAX_LOGPROBS, decoder.config.vocab_size)
        self._telling = Buffers(target, zeroed=False, wanted=one, told=one)  # apart, as few drafts ask for these
        self._told = Buffers(target, zeroed=False, ranks=(torch.int32, told), token_ids=(torch.int32, tops),
                             logprobs=(torch.float32, tops))
        self._wanted: list[int] = []  # of the lanes of the last draft, where some want to be told
        self._state = LaneState(*(self._buffers[name] for name in LaneState._fields))
        self._host = SimpleNamespace(**{name: self._buffers.host(name) for name in (
            *LaneState._fields, "seq_group", "prefix_len", "slab_start", *PENALTIES)})
        self._done = [self._state.done[:count] for count in range(rows + 1)]  # by lanes
        self._row_start = torch.arange(rows + 1, dtype=torch.int32, device=cache.device)  # one row a lane
        self._block_tables = torch.zeros(rows, table_width(config, sizes), dtype=torch.int32, device=cache.device)
        self._host_tables = None if target.own_memory else self._block_tables.numpy()
        self._stacked: Tensor | None = None  # [models, rows, vocab] where they are blended, into the first one's place
        if beside is not None:
            self._stacked = torch.empty(1 + len(beside), rows, decoder.config.vocab_size, device=cache.device)
            self._host.weights = self._buffers.host("weights")
        self._sources: list[Source] = []
        capacity = self._block_tables.shape[1] * cache.page_size
        for index, (model, its_store) in enumerate([(decoder, store), *(beside or ())]):
            model.reserve(rows)
            model.reserve_positions(sizes.max_positions)
            # Between the parts of a step, which are recorded apart: the decoder's own may grow for another engine.
            logits = model.reserve_logits(rows) if self._stacked is None else self._stacked[index]
            tiling = Tiling(model.config, config, rows, capacity) if target.padded else None
            self._sources.append(Source(model, cache.stores[its_store], logits, tiling,
                                        1 + max(model.launches(count) for count in (1, rows))))  # with the head
        self._logits, self._tiling = self._sources[0].logits, self._sources[0].tiling
        self._graphs = Graphs(sum(later_bytes(source.decoder.config, source.decoder.adapter_launches)
                                  for source in self._sources))
        self._pacing = Pacing(rows) if target.own_memory else None
        self._edits = EditBuffers(config, rows, decoder.config.vocab_size)
        self._begun: list[int] = []  # of the lanes of the last draft: tokens that their segments had before
        self._matched = False  # whether lanes of the last draft have a matcher
        self._under_way: Callable[[], object] | None = None  # launches what is left of a draft

    @property
    def device_draft(self) -> Draft:
        """What a pass that is run after a draft reads of it."""
        return Draft(self._state.out_tokens, self._state.steps, self._state.stop_ids)

    def draft(self, lanes: list[LaneSpec]) -> list[Drafted]:
        """Draws up to `max_tokens` tokens for every lane; keys and values of their inputs are left in the slabs."""
        self.launch(lanes)
        return self.drafted(len(lanes))

    def draft_with_logits(self, lanes: list[LaneSpec]) -> list[Drafted]:
        """As `draft`, of lanes without penalties and edits, with the logits that each token was drawn from."""
        assert not self.target.own_memory, "drafts on a GPU do not keep their logits"
        filters, cuts = any([lane.params.filters for lane in lanes]), any([lane.entropy_cut < math.inf
                                                                           for lane in lanes])
        rows, tiles = self._fill(lanes)
        self._ranks, self._matched = [], False
        self._wanted = self._fill_telling(lanes)
        self._buffers.upload()
        parts = [self._forward(rows, each, index) for index, each in enumerate(tiles)]
        parts.append(self._sample(rows, filters or cuts, False, cuts))
        if self._wanted:
            parts.append(self._tell(rows))
        steps = max([lane.max_tokens for lane in lanes])
        kept = torch.empty(steps, len(lanes), self._logits.shape[1])
        for step in range(steps):  # a lane that has ended leaves its row as it may be
            self._graphs.run(parts, self._done[rows])
            kept[step] = self._logits[: len(lanes)]
        return [drafted._replace(logits=kept[: len(drafted.token_ids), index])
                for index, drafted in enumerate(self.drafted(len(lanes)))]

    def launch(self, lanes: list[LaneSpec]) -> None:
        """Starts a draft, without waiting for a GPU; its results must be taken before the next.

        A GPU gets the first steps, which it is busy with while the host does something else. The others it gets by
        `pace`. On the CPU the draft is then over.
        """
        filters = penalties = cuts = ranked = edits = tells = False
        longest = 0
        for lane in lanes:
            filters |= lane.params.filters
            penalties |= lane.params.penalties
            cuts |= lane.entropy_cut < math.inf
            ranked |= lane.ranks > 0
            edits |= lane.edits is not None or lane.matcher is not None
            tells |= lane.params.logprobs is not None
            longest = max(longest, lane.max_tokens)
        filled = self._fill(lanes)
        if penalties:
            self._fill_penalties(lanes)
        self._ranks = self._fill_ranking(lanes) if ranked else []
        self._wanted = self._fill_telling(lanes) if tells else []
        self._matched = edits and self._edits.fill(lanes)
        self._start(filled, len(lanes), longest, filters, penalties, cuts, edits)

    def pace(self) -> None:
        """Launches the rest of the draft that was started, as the device gets on with it, and the transfer of its
        results. Ends where all lanes have ended; does nothing where no draft was started."""
        if self._pacing is None or self._under_way is None:
            return
        rest, self._under_way = self._under_way, None
        rest()
        self._buffers.fetch()
        if self._ranks:
            self._ranking.fetch()
        if self._wanted:
            self._told.fetch()
        self._pacing.end()

    def drafted(self, count: int) -> list[Drafted]:
        """The results of the draft of `count` lanes that was started, once they are there."""
        self.pace()
        self._buffers.wait()
        steps = self._host.steps[:count].tolist()
        longest = max(steps)
        tokens = self._host.out_tokens[:count, :longest].tolist()
        logprobs = self._host.out_logprobs[:count, :longest].tolist()
        begun = self._begun
        drafted = [Drafted(tokens[i][begun[i] : steps[i]], logprobs[i][begun[i] : steps[i]]) for i in range(count)]
        if self._ranks:
            self._ranking.wait()
            for i, ranks in enumerate(self._ranks):
                if ranks and drafted[i].token_ids[0] >= 0:  # else its logits are no numbers
                    drafted[i] = self._ranked(i, ranks)
        if self._wanted:
            self._told.wait()
            ranks_of, token_ids, values = (self._told.host(name) for name in Tops._fields)
            for i, wanted in enumerate(self._wanted):
                if wanted >= 0:
                    drafted[i] = drafted[i]._replace(tops=Tops(
                        ranks_of[i, : steps[i]].copy(), token_ids[i, : steps[i], :wanted].copy(),
                        values[i, : steps[i], :wanted].copy()))
        return drafted

    def _ranked(self, lane: int, ranks: int) -> Drafted:
        """What was found for a lane."""
        token_ids: list[int] = self._ranking.host("token_ids")[lane, :ranks].tolist()
        found = token_ids.index(-1) if -1 in token_ids else len(token_ids)
        return Drafted(token_ids[:found], self._ranking.host("logprobs")[lane, :found].tolist())

    def warm_up(self) -> None:
        """Runs and captures every shape of a step on a GPU, on lanes that are all idle."""
        for rows in self.target.shapes("draft", len(self._state.done)):  # workspaces that grow later are held twice
            self._buffers.wait()
            self._idle(slice(0, rows), 0)
            self._buffers.upload()
            for index, source in enumerate(self._sources):
                assert source.tiling is not None
                for tiles in source.tiling.shapes(rows, "draft"):
                    self._graphs.warm_up(self._forward(rows, tiles, index))
            for filters, cuts in ((True, False), (False, False), (True, True)):
                for penalties in (True, False):
                    self._graphs.warm_up(self._sample(rows, filters, penalties, cuts))
            self._edits.idle(rows)
            for penalties in (True, False):
                self._graphs.warm_up(self._shape(rows, True, penalties))
            self._telling.wait()
            self._telling.host("wanted")[:], self._telling.host("told")[:] = -1, 0
            self._telling.upload()
            self._graphs.warm_up(self._tell(rows))
        for rows in reversed(self._ranked_rows):
            for filters in (True, False):
                self._graphs.warm_up(self._rank(rows, filters))

    def step_seconds(self, lanes: int, repeats: int = 5) -> float:
        """Measured time of one step at this many lanes, the smallest of `repeats`, on an empty context."""
        table = self.cache.open([])
        slabs = [self.cache.take_slab() for _ in range(lanes)]
        try:
            spec = LaneSpec(table, last_token=0, slab=0, max_tokens=1, seed=0, attempt=1, stream=0,
                            params=SamplingParams(), stop_ids=())
            seconds = math.inf
            self._ranks, self._wanted, self._matched = [], [], False  # of a draft that is over
            for _ in range(repeats + 1):  # the first one also records
                filled = self._fill([spec._replace(slab=slab) for slab in slabs])
                begin = time.perf_counter()
                self._start(filled, lanes, 1, False)
                self.pace()
                self._buffers.wait()
                seconds = min(seconds, time.perf_counter() - begin)
            if self._pacing is not None:
                self._pacing.measured(seconds)
            return seconds
        finally:
            for slab in slabs:
                self.cache.return_slab(slab)
            self.cache.close(table)

    def _start(self, filled: tuple[int, Sequence[Tiles | None]], lanes: int, times: int, filters: bool,
               penalties: bool = False, cuts: bool = False, edits: bool = False) -> None:
        """Sends the buffers and launches the first steps, in stream order. Tokens are ranked after the first.

        A step is the forward passes of all models, and what is done with their logits: shaped and drawn from in one
        part, or, where lanes have edits, shaped in a part of its own. So edits add parts, and double none.
        """
        self._buffers.upload()
        rows, tiles = filled
        forward = [self._forward(rows, each, index) for index, each in enumerate(tiles)]
        if edits:
            draw = [self._shape(rows, edits, penalties), self._sample(rows, filters or cuts, False, cuts, shaped=True)]
        else:
            draw = [self._sample(rows, filters or cuts, penalties, cuts)]
        if self._wanted:
            draw.append(self._tell(rows))
        rank = None
        if self._ranks:
            self._ranking.upload()
            rank = self._rank(rows, filters)
        if self._matched:
            self._start_matched(forward, draw, rank, rows, lanes, times)
            return
        parts = [*forward, *draw]
        if rank is not None:
            self._start_ranked(parts, rank, rows, lanes, times)
            return
        if self._pacing is None:
            self._graphs.run(parts, self._done[rows], times)
            return
        step = partial(self._graphs.run, parts, self._done[rows])
        self._pacing.begin(lanes)
        self._under_way = partial(self._pacing.launch, step, self._pacing.launch(step, times, wait=False), wait=True)

    def _start_ranked(self, parts: list[Part], rank: Part, rows: int, lanes: int, times: int) -> None:
        """As `_start`. What ranks is no part of a step that is run again: those lanes have ended, and their logits are
        of nothing."""
        step = partial(self._graphs.run, parts, self._done[rows])
        if self._pacing is None:
            step()
            rank.call()  # by itself: libstars replays what is made of its own operations
            if times > 1:
                step(times=times - 1)
            return
        self._pacing.begin(lanes)
        self._pacing.launch(partial(self._graphs.run, [*parts, rank], self._done[rows]), 1, wait=False)
        self._under_way = partial(self._pacing.launch, step, self._pacing.launch(step, times - 1, wait=False),
                                  wait=True)

    def _start_matched(self, forward: list[Part], draw: list[Part], rank: Part | None, rows: int, lanes: int,
                       times: int) -> None:
        """As `_start`, of a draft that needs the host between any two draws: a GPU's is run by `pace`."""
        run = partial(self._run_matched, forward, draw, rank, rows, lanes, times)
        if self._pacing is None:
            run()
            return
        self._pacing.begin(lanes)
        self._under_way = run

    def _run_matched(self, forward: list[Part], draw: list[Part], rank: Part | None, rows: int, lanes: int,
                     times: int) -> None:
        """Runs up to `times` steps, one by one: masks are filled while the models run, and matchers are told of every
        draw before the next masks are. The host waits for the draw alone, by the event of a transfer."""
        host, done = self._host, self._done[rows]
        for _ in range(times):
            self._edits.begin_masks(host.done, host.steps)
            self._graphs.run(forward, done)
            self._edits.send_masks()
            drawn = host.steps[:lanes].copy()
            self._graphs.run(draw, done)
            if rank is not None:
                if self._pacing is None:
                    rank.call()
                else:
                    self._graphs.run([rank], done)
                rank = None
            self._buffers.fetch()
            self._buffers.wait()
            self._edits.accept(drawn, host.steps, host.out_tokens)
            if host.done[:lanes].all():
                return

    def _forward(self, rows: int, tiles: Tiles | None, index: int = 0) -> Part:
        """The first part of a step, up to the logits, of one of the models. What it runs is made where it is recorded,
        not where replayed."""
        decoder, kv, logits, _, launched = self._sources[index]

        def run() -> None:
            lanes = self._lanes(rows)
            batch = Batch(
                lanes.token_ids, lanes.positions, lanes.slots, True, self._row_start[: rows + 1],
                self._buffers["seq_group"][:rows], self._block_tables, self._buffers["prefix_len"][:rows],
                self._buffers["slab_start"][:rows], lanes.slab_used, tiles)
            decoder.draft_logits(batch, kv, logits[:rows])

        return Part(("forward", index, rows, *(shape(tiles) if tiles is not None else ())), run, launched)

    def _shape(self, rows: int, edits: bool, penalties: bool) -> Part:
        """What comes between the forward passes and the draw where it is a part of its own: the blend, edits and
        penalties, so that others may read the logits that are drawn from."""
        def run() -> None:
            self._blend_logits(rows)
            if edits:
                edit_logits(self._logits[:rows], self._lanes(rows), self._edits.edits(rows))
            if penalties:
                self._penalise(rows)

        return Part(("shape", rows, edits, penalties), run, EDIT_LAUNCHES)

    def _sample(self, rows: int, filters: bool, penalties: bool, cuts: bool, shaped: bool = False) -> Part:
        """The last part: what is drawn from the logits, and the step to the next. Where lanes may be cut, filters are
        looked for too, so that two shapes serve them and not four: where there are none, a launch leaves at once.

        shaped: `_shape` came before, and has blended and penalised.
        """
        blends = self._stacked is not None and not shaped

        def run() -> None:
            if blends:
                self._blend_logits(rows)
            if penalties:
                self._penalise(rows)
            sample_step(self._logits[:rows], self._lanes(rows), filters=filters,
                        ended=None if self._pacing is None else self._pacing.ended[:rows], cuts=cuts)

        return Part(("sample", blends, rows, filters, penalties, cuts), run, SAMPLE_LAUNCHES + blends)

    def _blend_logits(self, rows: int) -> None:
        """Where models are blended."""
        if self._stacked is not None:
            blend_logits(self._stacked, self._buffers["weights"], self._state.done[:rows], self._logits[:rows])

    def _penalise(self, rows: int) -> None:
        apply_penalties(self._logits[:rows], self._lanes(rows), Penalties(self._history["entries"], *(
            self._buffers[name][:rows] for name in PENALTIES)))

    def _rank(self, rows: int, filters: bool) -> Part:
        """What follows the second part of the first step, where lanes have ranks: their most probable tokens. Rows
        beyond the draft's, which fill it up to a captured shape, want none."""
        if self.target.padded:
            rows = next(size for size in self._ranked_rows if size >= rows)

        def run() -> None:
            top_tokens(self._logits[:rows], Ranking(*(self._ranking[name][:rows] for name in Ranking._fields)), filters)

        return Part(("rank", rows, filters), run, launches(rows, self.decoder.config.vocab_size))

    def _tell(self, rows: int) -> Part:
        """What follows a draw where lanes want to be told what stood beside it."""
        def run() -> None:
            top_logprobs(self._logits[:rows], self._state.steps[:rows], self._state.out_tokens[:rows], TopLogprobs(
                self._telling["wanted"][:rows], self._telling["told"][:rows],
                *(self._told[name][:rows] for name in Tops._fields)))

        return Part(("tell", rows), run, TELL_LAUNCHES)

    def _lanes(self, rows: int) -> LaneState:
        return LaneState(*(tensor[:rows] for tensor in self._state))

    def _fill(self, lanes: list[LaneSpec]) -> tuple[int, list[Tiles | None]]:
        """Writes the lanes into the buffers; rows of a step, idle ones included, and tiles by model."""
        self._buffers.wait()
        host, slab_len = self._host, self.cache.slab_len
        self._begun = [lane.begun for lane in lanes]
        tables: list[BlockTable] = []
        # Entry by entry: after a draft all of this code has left the caches, and numpy's conversions of whole lists
        # touch several times as much of it.
        for row, lane in enumerate(lanes):
            table, params = lane.table, lane.params
            if not tables or tables[-1] is not table:
                tables.append(table)
            host.seq_group[row] = len(tables) - 1
            host.prefix_len[row] = host.positions[row] = table.length
            host.slab_start[row] = host.slots[row] = lane.slab * slab_len
            host.token_ids[row] = lane.last_token
            host.max_tokens[row] = lane.begun + lane.max_tokens
            host.steps[row] = lane.begun
            host.slab_used[row] = host.done[row] = 0
            host.seeds[row] = signed_seed(lane.seed)
            host.streams[row] = signed_stream(lane.stream)
            host.attempts[row] = lane.attempt
            host.temperature[row] = params.temperature
            host.top_k[row] = params.top_k
            host.top_p[row] = params.top_p
            host.min_p[row] = params.min_p
            host.entropy_cut[row], host.least_tokens[row] = lane.entropy_cut, lane.least_tokens
            host.stop_ids[row] = lane.stop_ids + (-1,) * (MAX_STOP_IDS - len(lane.stop_ids))
        if self._stacked is not None:
            for row, lane in enumerate(lanes):
                host.weights[:, row] = lane.weights
        self.cache.write_block_tables(tables, self._block_tables, self._host_tables)
        count = len(lanes)
        if self._tiling is None:
            return count, [None] * len(self._sources)
        rows = self.target.rows(count, "draft")
        self._idle(slice(count, rows), len(tables) - 1)
        groups = host.seq_group[:count].tolist()
        keys = [lane.table.length for lane in lanes]
        return rows, [source.tiling.fill(rows, range(count + 1), groups, "draft", keys) for source in self._sources
                      if source.tiling is not None]

    def _fill_penalties(self, lanes: list[LaneSpec]) -> None:
        """Writes every lane's penalties, and the history of each response that has some."""
        self._history.wait()
        entries = self._history.host("entries")
        host = self._host
        first = stop = 0
        table = None
        for row, lane in enumerate(lanes):
            if lane.table is not table:
                table, first = lane.table, stop
                if lane.history is not None:
                    stop += len(lane.history)
                    entries[first:stop] = lane.history
            host.history_start[row], host.history_count[row] = first, stop - first
            host.repetition[row] = lane.params.repetition_penalty
            host.frequency[row], host.presence[row] = lane.params.frequency_penalty, lane.params.presence_penalty
        self._history.upload(stop * entries.strides[0])

    def _fill_telling(self, lanes: list[LaneSpec]) -> list[int]:
        """Writes and sends how many tokens beside its own each lane wants to be told of; returns it, -1 of none, and
        nothing where no lane wants any."""
        most = self._told["token_ids"].shape[2]
        wanted = [-1 if lane.params.logprobs is None else min(lane.params.logprobs, most) for lane in lanes]
        if max(wanted) < 0:
            return []
        self._telling.wait()
        into = self._telling.host("wanted")
        into[: len(wanted)], into[len(wanted) :] = wanted, -1
        self._telling.host("told")[:] = 0
        self._telling.upload()
        return wanted

    def _fill_ranking(self, lanes: list[LaneSpec]) -> list[int]:
        """Writes what is to be found for each lane, and has those draw that are ranked what costs least: one token,
        without noise and filters. Returns the ranks of every lane."""
        self._ranking.wait()
        host, into = self._host, {name: self._ranking.host(name) for name in Ranking._fields}
        most = into["token_ids"].shape[1]  # a small vocabulary's words
        ranks = [min(lane.ranks, most) for lane in lanes]
        into["ranks"][: len(ranks)], into["ranks"][len(ranks) :] = ranks, 0
        for row, lane in enumerate(lanes):
            params = lane.params
            into["temperature"][row] = params.temperature or 1.0
            into["top_k"][row], into["top_p"][row], into["min_p"][row] = params.top_k, params.top_p, params.min_p
            if lane.ranks:
                host.max_tokens[row], host.temperature[row] = 1, 0.0
                host.top_k[row], host.top_p[row], host.min_p[row] = 0, 1.0, 0.0
        return ranks

    def _idle(self, rows: slice, group: int) -> None:
        """Lanes that are done before they start: they write nothing, and nobody reads what they compute."""
        host = self._host
        for column in (host.token_ids, host.positions, host.slab_used, host.prefix_len, host.slab_start, host.steps):
            column[rows] = 0
        host.seq_group[rows] = group
        host.slots[rows] = -1
        host.done[rows] = 1
