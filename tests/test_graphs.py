"""What is captured when, and that every step runs: the GPU's part of `Graphs`, with a stand-in for CUDA's graphs."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from stars.bindings import libstars
from stars.kernels import graph as graphs
from stars.kernels.graph import Part


class Card:
    """Counts what runs; while a capture is under way, steps are noted instead."""

    def __init__(self):
        self.ran, self.captured, self.replays, self.noted = 0, 0, 0, None
        self.pools, self.broken, self.fault, self.stream, self.waits = [], [], None, None, 0
        self.order: list[str] = []

    def faulty_step(self) -> None:
        """A step that raises once `fault` says where: "run" or "capture"; "begin" is when a capture has just begun."""
        if self.fault == ("run" if self.noted is None else "capture"):
            if self.noted is not None:
                self.broken.append(self.pools[-1][0])
            self.fault = None
            raise KeyboardInterrupt
        self.step()

    def step(self) -> None:
        if self.noted is None:
            self.ran += 1
        else:
            self.noted.steps += 1

    @contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


@pytest.fixture
def card(monkeypatch) -> Card:
    card = Card()

    class Graph:
        steps = 0

        def __init__(self) -> None:
            self.names: list[str] = []

        def capture_begin(self, pool, capture_error_mode) -> None:
            assert pool not in card.broken and card.stream is not None and card.noted is None
            card.noted, card.captured = self, card.captured + 1
            card.pools.append((pool, card.stream))
            if card.fault == "begin":
                card.fault = None
                card.broken.append(pool)
                raise KeyboardInterrupt

        def capture_end(self) -> None:
            assert card.noted is self
            card.noted = None

        def replay(self) -> None:
            assert card.noted is None and card.stream is None
            card.ran += self.steps
            card.order += self.names
            card.replays += 1

    monkeypatch.setattr(graphs, "column", lambda done: "cuda")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", card.on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.noted is not None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(card, "waits", card.waits + 1))
    return card


@pytest.mark.parametrize("times", [1, 3, 9])
def test_every_step_runs_and_a_part_is_captured_once(card, times):
    run, done = graphs.Graphs(), torch.zeros(1, dtype=torch.int32)
    captured = []
    for repeat in range(1, 5):
        assert run.run([Part("a", card.step), Part("b", card.step)], done, times) == times
        assert card.ran == repeat * times * 2
        captured.append(card.captured)
    assert captured[0] == 2 * (times > 1)  # at the first run a library may allocate, and kernels are compiled
    assert captured[1:] == [2, 2, 2]


def test_parts_are_replayed_in_their_order_and_serve_several_steps(card):
    """A forward pass with either of two ways to draw behind it: three captures for two steps."""
    run, done, order = graphs.Graphs(), torch.zeros(1, dtype=torch.int32), []

    def part(key: str) -> Part:
        def call() -> None:
            if card.noted is None:
                order.append(key)
            else:
                card.noted.names.append(key)
        return Part(key, call)

    card.order = order
    for draw in ("plain", "filtered", "plain", "filtered"):
        run.run([part("forward"), part(draw)], done)
    assert order == ["forward", "plain", "forward", "filtered"] * 2
    assert card.captured == 3 and card.replays == 5  # of eight parts, three ran plainly


def test_a_shape_seen_once_and_rare_shapes_are_not_captured(card):
    run, done = graphs.Graphs(), torch.zeros(1, dtype=torch.int32)
    run.run([Part("once", card.step)], done)
    for _ in range(3):
        run.run([Part("rare", card.step)], done, rare=True)
    assert (card.ran, card.captured) == (4, 0)
    run.run([Part("once", card.step)], done)
    assert (card.ran, card.captured) == (5, 1)


def test_the_least_recently_used_shape_makes_room(card):
    """Bounded by the bytes that the driver keeps of captured launches; one that is too large is never captured."""
    run, done = graphs.Graphs(5 * graphs.LAUNCH_BYTES), torch.zeros(1, dtype=torch.int32)
    launches = {"a": 2, "b": 3, "c": 1, "large": 6}
    for key in ("a", "b", "a", "c", "large", "a", "b", "c"):
        run.run([Part(key, card.step, launches[key])], done, 2)
    assert card.captured == 5  # a, b, c in the place of b, b in the place of c, and c in that of a
    assert card.waits == 3  # the one that makes room may be running still
    assert card.ran == 16


def test_what_was_captured_at_start_up_stays(card):
    run, done = graphs.Graphs(graphs.LAUNCH_BYTES), torch.zeros(1, dtype=torch.int32)
    for key in ("a", "b"):
        run.warm_up(Part(key, card.step, 100))
    assert (card.ran, card.captured, card.replays) == (4, 2, 2)  # each ran plainly, and was replayed
    for key in ("c", "d", "a", "b"):
        run.run([Part(key, card.step)], done, 2)
    card.replays = 0
    run.run([Part("a", card.step), Part("b", card.step)], done)
    assert card.captured == 4 and card.replays == 2


def test_an_interrupted_first_step_is_run_plainly_again(card):
    """It may have been compiling kernels, which a capture does not permit."""
    run, done = graphs.Graphs(), torch.zeros(1, dtype=torch.int32)
    card.fault = "run"
    with pytest.raises(KeyboardInterrupt):
        run.run([Part("shape", card.faulty_step)], done)
    run.run([Part("shape", card.faulty_step)], done)
    assert (card.ran, card.captured) == (1, 0)


@pytest.mark.parametrize("fault", ["begin", "capture"])
def test_a_failed_capture_is_ended_and_tried_again_in_new_memory(card, fault):
    run, done = graphs.Graphs(), torch.zeros(1, dtype=torch.int32)
    run.run([Part("other", card.faulty_step)], done, 2)
    run.run([Part("shape", card.faulty_step)], done)
    card.fault = fault
    with pytest.raises(KeyboardInterrupt):
        run.run([Part("shape", card.faulty_step)], done)
    assert card.noted is None, "the stream is left capturing"
    ran = card.ran
    run.run([Part("shape", card.faulty_step)], done)
    run.run([Part("other", card.faulty_step)], done)
    assert card.ran == ran + 2 and len({pool for pool, _ in card.pools}) == 2


def test_graphs_of_one_owner_share_memory_and_those_of_two_do_not(card):
    done = torch.zeros(1, dtype=torch.int32)
    for run in (graphs.Graphs(), graphs.Graphs()):
        for key in ("a", "b"):
            run.run([Part(key, card.step)], done, 2)
    assert card.pools[0] == card.pools[1] and card.pools[2] == card.pools[3]
    assert not set(card.pools[0]) & set(card.pools[2])


@pytest.mark.skipif(not libstars.available(), reason="libstars is not built")
def test_a_step_that_records_nothing_runs_every_time():
    """Such as a copy of a type that libstars has no operation for."""
    ran = []
    run, done = graphs.Graphs(), torch.zeros(1, dtype=torch.int32)
    for times in (1, 3, 2):
        assert run.run([Part("shape", lambda: ran.append(1))], done, times) == times
    assert len(ran) == 6
