"""The floor under a pass: its matrix products alone, and what passes a generation ran."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from stars import kernels
from stars.kernels.graph import Graphs, Part


class Pass(NamedTuple):
    """`times` passes of one shape: all layers at `rows` rows, what follows the last attention at `wanted` of them."""

    model: str  # "lm" or "rm"
    rows: int
    wanted: int
    times: int


class Products:
    """The products of one decoder's passes: its own packed weights, the same shapes in the same order, nothing between.

    Recorded and replayed like a pass of the engine, over buffers of the same sizes, by the same threads.
    """

    def __init__(self, decoder, max_rows: int = 256):
        self.decoder = decoder
        self._graphs = Graphs()
        self._done = torch.zeros(1, dtype=torch.int32)
        layer, hidden = decoder.layers[0], decoder.config.hidden_size
        head = decoder.head if decoder.head is not None else decoder.score_head

        def buffer(width: int) -> torch.Tensor:
            return torch.randn(max_rows, width)

        self._hidden, self._branch = buffer(hidden), buffer(hidden)
        self._attended, self._gated = buffer(layer.o.in_features), buffer(layer.down.in_features)
        self._qkv, self._gate_up = buffer(layer.qkv.out_features), buffer(layer.gate_up.out_features)
        self._out = buffer(head.out_features)
        self._head = head

    def run(self, rows: int, wanted: int, times: int = 1) -> None:
        """Runs the products of one pass `times` times."""
        self._graphs.run([Part((rows, wanted), lambda: self._step(rows, wanted))], self._done, times)

    def _step(self, rows: int, wanted: int) -> None:
        last = self.decoder.layers[-1]
        for layer in self.decoder.layers:
            kernels.linear(self._hidden[:rows], layer.qkv, self._qkv[:rows])
            after = wanted if layer is last else rows
            kernels.linear(self._attended[:after], layer.o, self._branch[:after])
            kernels.linear(self._hidden[:after], layer.gate_up, self._gate_up[:after])
            kernels.linear(self._gated[:after], layer.down, self._branch[:after])
        out = self._out.view(-1)[: wanted * self._head.out_features].view(wanted, self._head.out_features)
        kernels.linear(self._hidden[:wanted], self._head, out)


class Floor:
    """The products of both models of an engine."""

    def __init__(self, engine):
        self._products = {"lm": Products(engine._models.own.passes.decoder)}
        if engine.reward is not None:
            self._products["rm"] = Products(engine.reward.decoder)

    def run(self, passes: Sequence[Pass]) -> float:
        """Runs the products of `passes` in their order; seconds."""
        for one in set(passes):  # recorded beforehand
            self._products[one.model].run(one.rows, one.wanted)
        begin = time.perf_counter()
        for one in passes:
            self._products[one.model].run(one.rows, one.wanted, one.times)
        return time.perf_counter() - begin


class Record:
    """What an engine ran between `recorded(engine)` and its end: seconds of its rounds, and their passes in order."""

    def __init__(self):
        self.rounds = 0
        self.seconds = 0.0
        self.lm_seconds = 0.0
        self.rm_seconds = 0.0
        self.passes: list[Pass] = []
        self.rm_rows = 0


@contextmanager
def recorded(engine) -> Iterator[Record]:
    """Times the rounds of `engine` and notes each drafting call and each scoring call inside them.

    A scoring call is one pass as long as its rows fit one, which those of a single request do.
    """
    record = Record()
    round_, drafter, reward = engine._round, engine._round.drafter, engine.reward
    run, launch, drafted = round_.run, drafter.launch, drafter.drafted
    score = reward.score if reward is not None else None

    inside, begun = False, 0.0

    def timed_run(active):
        nonlocal inside
        inside = True
        begin = time.perf_counter()
        try:
            return run(active)
        finally:
            record.seconds += time.perf_counter() - begin
            record.rounds += 1
            inside = False

    def noted_launch(lanes):
        nonlocal begun
        begun = time.perf_counter()
        launch(lanes)

    def noted_drafted(count):
        results = drafted(count)
        record.lm_seconds += time.perf_counter() - begun
        record.passes.append(Pass("lm", count, count, max(len(one.token_ids) for one in results)))
        return results

    def noted_score(candidates):
        begin = time.perf_counter()
        results = score(candidates)
        if not inside:  # r(prompt), before the first round
            return results
        record.rm_seconds += time.perf_counter() - begin
        rows = sum(result.tokens_run for result in results)
        record.rm_rows += rows
        record.passes.append(Pass("rm", rows, len(candidates), 1))
        return results

    round_.run, drafter.launch, drafter.drafted = timed_run, noted_launch, noted_drafted
    if reward is not None:
        reward.score = noted_score
    try:
        yield record
    finally:
        del round_.run, drafter.launch, drafter.drafted
        if reward is not None:
            del reward.score
