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

from stars.cache import BlockTable, PagedCache
from stars.kernels import sample_step
from stars.kernels.graph import Graphs
from stars.kernels.types import Batch, LaneState
from stars.sampling import SamplingParams

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
    """Owns the lane buffers of one language model."""

    def __init__(self, decoder, cache: PagedCache, max_lanes: int, max_segment_size: int, max_model_len: int):
        self.decoder = decoder
        self.cache = cache
        decoder.reserve(max_lanes)

        def ints(*shape: int, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int32)

        self._state = LaneState(
            token_ids=ints(max_lanes), positions=ints(max_lanes), slots=ints(max_lanes), slab_used=ints(max_lanes),
            steps=ints(max_lanes), limits=ints(max_lanes), done=ints(max_lanes),
            out_tokens=ints(max_lanes, max_segment_size), out_logprobs=torch.zeros(max_lanes, max_segment_size),
            seeds=torch.zeros(max_lanes, dtype=torch.int64), attempts=ints(max_lanes), streams=ints(max_lanes),
            temperature=torch.zeros(max_lanes), top_k=ints(max_lanes), top_p=torch.zeros(max_lanes),
            min_p=torch.zeros(max_lanes), stop_ids=ints(max_lanes, MAX_STOP_IDS, fill=-1))
        self._host = LaneState(*(tensor.numpy() for tensor in self._state))  # views of the same memory
        self._row_start = torch.arange(max_lanes + 1, dtype=torch.int32)  # one row a lane
        self._seq_group, self._prefix_len, self._slab_start = (ints(max_lanes) for _ in range(3))
        self._block_tables = ints(max_lanes, math.ceil(max_model_len / cache.page_size))
        self._graphs = Graphs()

    def draft(self, lanes: list[LaneSpec]) -> list[Drafted]:
        """Draws up to `limit` tokens for every lane; keys and values of their inputs are left in the slabs."""
        count = len(lanes)
        self._fill(lanes)
        self._run(count, max(lane.limit for lane in lanes))
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
                self._fill([spec._replace(slab=slab) for slab in slabs])
                begin = time.perf_counter()
                self._run(lanes, 1)
                seconds = min(seconds, time.perf_counter() - begin)
            return seconds
        finally:
            for slab in slabs:
                self.cache.return_slab(slab)
            self.cache.close(table)

    def _run(self, count: int, times: int) -> None:
        state = LaneState(*(tensor[:count] for tensor in self._state))
        batch = Batch(
            state.token_ids, state.positions, state.slots, True, self._row_start[: count + 1], self._seq_group[:count],
            self._block_tables, self._prefix_len[:count], self._slab_start[:count], state.slab_used)

        def step() -> None:
            hidden = self.decoder.forward(batch, self.cache)  # [lanes, hidden]
            sample_step(self.decoder.logits(hidden), state)

        self._graphs.run(count, step, state.done, times)

    def _fill(self, lanes: list[LaneSpec]) -> None:
        count = len(lanes)
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
        self._seq_group.numpy()[:count] = groups
        self._prefix_len.numpy()[:count] = lengths
        self._slab_start.numpy()[:count] = slab_start
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
