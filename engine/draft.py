"""Drafting: all lanes of all requests decode one segment together, in slabs.

The step is one fixed list of operations over buffers at fixed addresses: lengths, positions and tokens are read and
advanced in memory. It is recorded once per number of lanes, and a whole segment is then one call.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import torch

from stars.buffers import Buffers, bucket
from stars.cache import BlockTable, PagedCache
from stars.kernels import sample_step
from stars.kernels.graph import Graphs
from stars.kernels.types import Batch, LaneState, Tiles
from stars.sampling import SamplingParams
from stars.tiling import Tiling, shape

MAX_STOP_IDS = 16


class LaneSpec(NamedTuple):
    """One lane of a draft. Lanes that share a table must be adjacent."""

    table: BlockTable
    last_token: int  # first input: the committed token whose keys and values the pages lack
    slab: int
    limit: int  # tokens to draw at most
    seed: int
    attempt: int
    stream: int  # philox.pack_stream(segment, sample)
    params: SamplingParams
    stop_ids: tuple[int, ...]


class Drafted(NamedTuple):
    """What one lane drew; token -1 stands for logits that were NaN or infinite."""

    token_ids: list[int]
    logprobs: list[float]


class Drafter:
    """Owns the lane buffers of one language model.

    With `padded`, lanes are filled up to a bucket with idle ones, so that few captured shapes serve every number, and
    attention gets its tiles.
    """

    def __init__(self, decoder, cache: PagedCache, max_lanes: int, max_segment_size: int, max_model_len: int,
                 padded: bool = False, deterministic: bool = False):
        self.decoder = decoder
        self.cache = cache
        self.padded = padded
        rows = bucket(max_lanes) if padded else max_lanes
        decoder.reserve(rows)
        one, flag = (torch.int32, (rows,)), (torch.float32, (rows,))
        self._buffers = Buffers(
            cache.device,
            token_ids=one, positions=one, slots=one, slab_used=one, steps=one, limits=one, done=one,
            out_tokens=(torch.int32, (rows, max_segment_size)), out_logprobs=(torch.float32, (rows, max_segment_size)),
            seeds=(torch.int64, (rows,)), attempts=one, streams=one, temperature=flag, top_k=one, top_p=flag,
            min_p=flag, stop_ids=(torch.int32, (rows, MAX_STOP_IDS)), seq_group=one, prefix_len=one, slab_start=one)
        self._state = LaneState(*(self._buffers[name] for name in LaneState._fields))
        self._host = LaneState(*(self._buffers.host(name) for name in LaneState._fields))
        self._row_start = torch.arange(rows + 1, dtype=torch.int32, device=cache.device)  # one row a lane
        self._block_tables = torch.zeros(rows, math.ceil(max_model_len / cache.page_size), dtype=torch.int32,
                                         device=cache.device)
        self._tiling = None
        if padded:
            config = decoder.config
            self._tiling = Tiling(cache.device, rows, config.num_heads, config.num_kv_heads, config.head_dim,
                                  self._block_tables.shape[1] * cache.page_size, deterministic)
        self._graphs = Graphs()

    def draft(self, lanes: list[LaneSpec]) -> list[Drafted]:
        """Draws up to `limit` tokens for every lane; keys and values of their inputs are left in the slabs."""
        count = len(lanes)
        self._run(self._fill(lanes), max(lane.limit for lane in lanes))
        steps = self._host.steps[:count].tolist()
        tokens = self._host.out_tokens[:count].tolist()
        logprobs = self._host.out_logprobs[:count].tolist()
        return [Drafted(tokens[i][: steps[i]], logprobs[i][: steps[i]]) for i in range(count)]

    def step_seconds(self, lanes: int, repeats: int = 5) -> float:
        """Measured time of one step at this many lanes, the smallest of `repeats`, on an empty context."""
        table = self.cache.open([], 0)
        slabs = [self.cache.take_slab() for _ in range(lanes)]
        try:
            spec = LaneSpec(table, 0, 0, 1, 0, 1, 0, SamplingParams(), ())
            seconds = math.inf
            for _ in range(repeats + 1):  # the first one also records
                filled = self._fill([spec._replace(slab=slab) for slab in slabs])
                begin = time.perf_counter()
                self._run(filled, 1)
                seconds = min(seconds, time.perf_counter() - begin)
            return seconds
        finally:
            for slab in slabs:
                self.cache.return_slab(slab)
            self.cache.close(table)

    def _run(self, filled: tuple[int, Tiles | None], times: int) -> None:
        """Sends the buffers, runs the steps, and fetches the buffers back."""
        rows, tiles = filled

        def step() -> None:  # not called where a recorded step is replayed: the views are made here
            state = LaneState(*(tensor[:rows] for tensor in self._state))
            batch = Batch(
                state.token_ids, state.positions, state.slots, True, self._row_start[: rows + 1],
                self._buffers["seq_group"][:rows], self._block_tables, self._buffers["prefix_len"][:rows],
                self._buffers["slab_start"][:rows], state.slab_used, tiles)
            hidden = self.decoder.forward(batch, self.cache)  # [rows, hidden]
            sample_step(self.decoder.logits(hidden), state)

        self._buffers.upload()
        self._graphs.run((rows, *shape(tiles)), step, self._state.done[:rows], times)
        self._buffers.download()

    def _fill(self, lanes: list[LaneSpec]) -> tuple[int, Tiles | None]:
        """Writes the lanes into the buffers; rows of a step, idle ones included, and attention's tiles."""
        count = len(lanes)
        self._buffers.wait()
        host = self._host
        tables: list[BlockTable] = []
        groups = []
        for lane in lanes:
            if not tables or tables[-1] is not lane.table:
                tables.append(lane.table)
            groups.append(len(tables) - 1)
        self.cache.block_tables(tables, out=self._block_tables)
        lengths = np.array([lane.table.length for lane in lanes], dtype=np.int32)
        slab_start = np.array([lane.slab for lane in lanes], dtype=np.int32) * self.cache.slab_len
        self._buffers.host("seq_group")[:count] = groups
        self._buffers.host("prefix_len")[:count] = lengths
        self._buffers.host("slab_start")[:count] = slab_start
        host.token_ids[:count] = [lane.last_token for lane in lanes]
        host.positions[:count] = lengths
        host.slots[:count] = slab_start
        host.slab_used[:count] = 0
        host.steps[:count] = 0
        host.limits[:count] = [lane.limit for lane in lanes]
        host.done[:count] = 0
        host.seeds[:count] = np.array([lane.seed & (1 << 64) - 1 for lane in lanes], dtype=np.uint64).view(np.int64)
        host.attempts[:count] = [lane.attempt for lane in lanes]
        host.streams[:count] = np.array([lane.stream for lane in lanes], dtype=np.uint32).view(np.int32)
        host.temperature[:count] = [lane.params.temperature for lane in lanes]
        host.top_k[:count] = [lane.params.top_k for lane in lanes]
        host.top_p[:count] = [lane.params.top_p for lane in lanes]
        host.min_p[:count] = [lane.params.min_p for lane in lanes]
        host.stop_ids[:count] = -1
        for index, lane in enumerate(lanes):
            host.stop_ids[index, : len(lane.stop_ids)] = lane.stop_ids
        if not self.padded:
            return count, None
        rows = bucket(count)
        self._idle(slice(count, rows), groups[-1])
        return rows, self._tiling.fill(rows, range(count + 1), groups, True, int(lengths.max()))

    def _idle(self, rows: slice, group: int) -> None:
        """Lanes that are done before they start: they write nothing, and nobody reads what they compute."""
        for name in ("token_ids", "positions", "slab_used", "prefix_len", "slab_start", "steps"):
            self._buffers.host(name)[rows] = 0
        self._buffers.host("seq_group")[rows] = group
        self._host.slots[rows] = -1
        self._host.done[rows] = 1
