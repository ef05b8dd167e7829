"""Where a pass goes: each kind of operation of one recorded pass, replayed alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from weakref import ref

import torch
from common import Figure

from stars.bindings import libstars, recording
from stars.bindings.layouts import OPERATIONS
from stars.cache import BlockTable
from stars.draft import LaneSpec
from stars.kernels.graph import Part
from stars.passes import Span

NAMES = {number: name for name, number in OPERATIONS.items()}
TIMES = 16  # passes of one timing: as many draws as a segment has


class _Split:
    """Stands in for the program of a recording and sorts its operations by kind."""

    def __init__(self):
        self.programs: dict[str, libstars.Program] = {}

    def add(self, op: int, params, kept: object) -> None:
        for name in (NAMES[op], "whole pass"):
            self.programs.setdefault(name, libstars.Program()).add(op, params, kept)


class _Catch:
    """Stands in for the graphs of a runner and records the pass in parts instead of running it."""

    def __init__(self):
        self.split = _Split()

    def run(self, parts: Sequence[Part], done, times: int = 1, rare: bool = False) -> int:
        recording._recordings[get_ident()] = ref(self.split)
        try:
            for part in parts:
                part.call()
        finally:
            del recording._recordings[get_ident()]
        return times


def operations(setup) -> Iterator[Figure]:
    """Time of every kind of operation in a draft step at 1 and 8 lanes and in a scoring pass of 1 and 2 candidates."""
    if not libstars.available():
        return
    engine = setup.engine
    history = 64
    for lanes in (1, 8):
        drafter = engine._round.drafter
        table = engine._cache.open(range(history))
        table.length = history
        slabs = [engine._cache.take_slab() for _ in range(lanes)]
        params = setup.params(0)
        specs = [LaneSpec(table, 5, slab, 10 ** 6, 1, 1 + i, 0, params, ()) for i, slab in enumerate(slabs)]

        def fill(drafter=drafter, specs=specs) -> None:
            drafter._fill(specs)

        yield from _timed(f"draft step, {lanes} lane{'s' * (lanes > 1)}", drafter, lambda: drafter.draft(specs), fill,
                          setup.repeats)
        for slab in slabs:
            engine._cache.return_slab(slab)
        engine._cache.close(table)
    for count in (1, 2):
        passes, cache = engine.reward._passes, engine.reward.cache
        table = cache.open(range(history))
        table.length = history
        slabs = [cache.take_slab() for _ in range(count)]
        spans = [_span(table, slab * cache.slab_len, history) for slab in slabs]
        title = f"scoring pass, {count} x {len(spans[0].token_ids)} rows"
        yield from _timed(title, passes, lambda: passes.score(spans), lambda: None, setup.repeats)
        for slab in slabs:
            cache.return_slab(slab)
        cache.close(table)


def _span(table: BlockTable, start: int, history: int) -> Span:
    rows = 17  # a segment, and the committed token before it
    return Span(table, list(range(5, 5 + rows)), history, list(range(start, start + rows)))


def _timed(title: str, runner, call: Callable[[], object], fill: Callable[[], None], repeats: int) -> Iterator[Figure]:
    graphs, catch = runner._graphs, _Catch()
    runner._graphs = catch
    try:
        call()
    finally:
        runner._graphs = graphs
    seconds: dict[str, list[float]] = {}
    done = torch.zeros(1, dtype=torch.int32)
    for _ in range(repeats + 1):
        for name, program in catch.split.programs.items():
            fill()
            begin = time.perf_counter()
            program.run(TIMES, done)
            seconds.setdefault(name, []).append((time.perf_counter() - begin) / TIMES)
    whole = 1e3 * statistics.median(seconds["whole pass"][1:])
    for name, values in sorted(seconds.items(), key=lambda item: -statistics.median(item[1][1:])):
        own = 1e3 * statistics.median(values[1:])
        yield Figure(f"{title}: {name}", own, "ms", "the whole pass", whole, own / whole,
                     detail={"fastest_ms": 1e3 * min(values)})
