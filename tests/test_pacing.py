"""Steps are launched a bounded number ahead of the device, and none once every lane has ended: `stars.pacing`."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recorded_gpu
import stars
from building import UNPADDED, work_as
from stars import pacing
from stars.bindings import libstars
from toy import ids, toy_engine, toy_pair

needs_libstars = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")


class Device:
    """Does the steps it is given in order: those that are waited for, and, of the others, as many as `quick` says."""

    def __init__(self, ends: list[int], quick: list[int]):
        self.ends, self.quick = ends, quick  # of each lane: the step that ends it
        self.given = self.done = self.furthest = 0
        self.pacing = pacing.Pacing(len(ends) + 3)

    def step(self) -> None:
        self.given += 1
        self.furthest = max(self.furthest, self.given - self.done)
        self.wait(self.done + self.quick[self.given % len(self.quick)])

    def wait(self, step: int) -> None:
        while self.done < min(step, self.given):
            self.done += 1
            for lane, end in enumerate(self.ends):
                if end == self.done:
                    self.pacing.ended[lane] = 1


def install(patch: pytest.MonkeyPatch):
    """Makes devices, of which `torch.cuda.Event` tells the last one's steps."""
    made: list[Device] = []

    class Event:
        def record(self) -> None:
            self.step = made[-1].given

        def synchronize(self) -> None:
            made[-1].wait(self.step)

    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "synchronize", lambda: made[-1].wait(made[-1].given))
    patch.setattr(pacing, "mapped", recorded_gpu.mapped)

    def make(ends, quick=(0,)) -> Device:
        made.append(Device(list(ends), list(quick)))
        return made[-1]

    return make


@pytest.fixture
def device(monkeypatch):
    return install(monkeypatch)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.lists(st.integers(0, 3), min_size=1, max_size=7),
       st.integers(2, 9), st.integers(1, 32))
@settings(deadline=None, max_examples=200)
def test_never_further_ahead_and_no_step_too_few(ends, quick, ahead, times):
    """Whatever the device's speed: `ahead` steps in flight at most, all that some lane needs, and fewer than `ahead`
    more."""
    with pytest.MonkeyPatch.context() as patch:
        one = install(patch)(ends, quick)
        one.pacing.ahead = ahead
        for _ in range(2):  # the second draft finds the flags of the first
            one.given = one.done = one.furthest = 0
            one.pacing.begin(len(ends))
            left = one.pacing.launch(one.step, times, wait=False)
            assert left == max(0, times - ahead)
            assert one.pacing.launch(one.step, left, wait=True) == 0
            needed = min(times, max(ends))
            assert needed <= one.given <= min(times, max(needed + ahead - 1, ahead))
            assert one.furthest <= ahead
            one.wait(one.given)
            one.pacing.end()


def test_lanes_that_all_end_at_the_first_step(device):
    one = device([1, 1])
    one.pacing.ahead = 2
    one.pacing.begin(2)
    assert one.pacing.launch(one.step, one.pacing.launch(one.step, 32, wait=False), wait=True) == 0
    assert one.given == 2


def test_a_draft_that_was_interrupted_does_not_end_the_next(device):
    """Its steps are still running when the next begins: their flags must not be taken for the next one's."""
    one = device([3, 4])
    one.pacing.begin(2)
    one.pacing.launch(one.step, 6, wait=False)
    one.pacing.begin(2)
    assert one.done == 6 and not one.pacing.ended.any()
    one.ends = [20, 20]
    assert one.pacing.launch(one.step, 14, wait=True) == 0 and one.given == 20


@pytest.mark.parametrize("seconds, ahead", [(6e-3, 2), (2e-3, 2), (1.9e-3, 3), (1e-3, 3), (1e-4, 21), (math.inf, 2)])
def test_two_steps_at_least_and_two_milliseconds_behind_the_one_that_runs(device, seconds, ahead):
    one = device([1])
    one.pacing.measured(seconds)
    assert one.pacing.ahead == ahead


# -- in the engine ----------------------------------------------------------------------------------------------------

LM, RM = toy_pair(29, (1, 2), positions=128)
SIZES = dict(cache_tokens=512, page_size=4, max_num_seqs=7, max_num_lanes=21, max_segment_size=32)
POLICY = stars.STARS(segment_size=32, max_attempts=4, beta=0.5, reward_threshold=1.0, width=4)
STOPS = list(range(0, 29, 2))  # half of the vocabulary: lanes end soon


def ended_soon(engine: stars.Engine, seed: int) -> list:
    """[(token ids, reward) of each attempt, lanes' order] of a response of one segment that a stop token ends."""
    params = stars.SamplingParams(max_tokens=40, seed=seed, stop_token_ids=STOPS)
    [output] = engine.generate({"prompt_token_ids": ids(9, 29, seed)}, params, POLICY, use_tqdm=False)
    engine.check_integrity()
    [completion] = output.outputs
    assert completion.finish_reason == "stop" and len(completion.segments) == 1
    return [(attempt.token_ids, attempt.reward) for attempt in completion.segments[0].attempts]


@needs_libstars
@pytest.mark.parametrize("quick", [lambda works: 0, lambda works: works - 1, None], ids=["slow", "quick", "any"])
def test_a_draft_whose_lanes_have_ended_launches_no_more(monkeypatch, quick):
    """The CPU's attempts; of 32 steps those of the longest lane run, and fewer than `ahead` more."""
    work_as(monkeypatch, UNPADDED)
    plain = toy_engine(LM, RM, **SIZES)
    wanted = {seed: ended_soon(plain, seed) for seed in range(12)}
    gpu = recorded_gpu.install(monkeypatch)
    if quick is not None:
        gpu.stream.quick = quick
    engine = recorded_gpu.build(gpu, LM.decoder(), stars.CausalReward(RM.decoder()), **SIZES)
    drafter, run, steps = engine._round.drafter, engine._round.drafter._graphs.run, []
    monkeypatch.setattr(drafter._graphs, "run", lambda *given: steps.append(run(*given)))
    drafter._pacing.ahead = 3
    for _ in range(3):  # launched, captured, replayed
        for seed, attempts in wanted.items():
            steps.clear()
            assert ended_soon(engine, seed) == attempts
            longest = max(len(token_ids) for token_ids, _ in attempts)
            if len(attempts) == 4:  # of a decision before the last nothing more is known
                assert longest <= len(steps) <= max(3, longest + 2)
            assert len(steps) < 32
    assert gpu.replays > 100 and {len(attempts) for attempts in wanted.values()} >= {4}


@needs_libstars
@pytest.mark.parametrize("given", [True, False], ids=["behind a replay", "before a replay"])
def test_an_interrupt_between_two_launches_loses_nothing(monkeypatch, given):
    """The round is drawn again, whatever of it is still under way on the device."""
    work_as(monkeypatch, UNPADDED)
    plain = toy_engine(LM, RM, **SIZES)
    wanted = {seed: ended_soon(plain, seed) for seed in range(4)}
    gpu = recorded_gpu.install(monkeypatch)
    gpu.stream.quick = lambda works: 0
    engine = recorded_gpu.build(gpu, LM.decoder(), stars.CausalReward(RM.decoder()), **SIZES)
    for _ in range(3):
        assert {seed: ended_soon(engine, seed) for seed in wanted} == wanted
    engine._round.drafter._pacing.ahead = 3
    replay, left, behind = recorded_gpu.Graph.replay, 0, []

    def interrupted(graph) -> None:
        nonlocal left
        left -= 1
        if given or left:
            replay(graph)
        if not left:
            behind.append(len(gpu.stream.works))
            raise KeyboardInterrupt

    monkeypatch.setattr(recorded_gpu.Graph, "replay", interrupted)
    for count in range(1, 40, 2):
        left, seed = count, count // 2 % 4
        try:
            ended_soon(engine, seed)
        except KeyboardInterrupt:
            assert ended_soon(engine, seed) == wanted[seed]
        else:
            assert left > 0
            break
    assert max(behind) > 3 and len(behind) > 4  # the device had steps to do


def test_flags_are_nobody_elses_once_their_engine_has_gone(monkeypatch):
    """Steps of a draft that nobody waited for may be under way, and torch does not know that they store to them."""
    monkeypatch.setattr(pacing, "mapped", recorded_gpu.mapped)
    monkeypatch.setattr(pacing, "_kept", [])
    pacer = pacing.Pacing(3)
    flags = weakref.ref(pacer.ended)
    del pacer
    gc.collect()
    assert flags() is not None and pacing._kept[0] is flags()
