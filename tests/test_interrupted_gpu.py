"""An interrupt before any bytecode of what launches work on a GPU: the round is drawn again, whatever is under way."""

from __future__ import annotations

import os

import pytest

import recorded_gpu
import stars
from building import work_as
from stars.bindings import libstars
from test_conservation import nothing_is_held
from test_faults import Interrupts
from test_scheduler import IGNORED, pressed
from toy import ToyModel, ids

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), IGNORED,
              pytest.mark.skipif(not libstars.available(), reason="libstars is not built")]

TARGET = recorded_gpu.TARGET._replace(ridge_rows=16)  # passes of two candidates, of which the next is prepared ahead
LM = ToyModel(vocab=29, seed=1, positions=192)
RM = ToyModel(vocab=29, seed=3, positions=192, head="reward", sharpness=1.5)
SIZES = dict(cache_tokens=1024, page_size=4, max_num_seqs=7, max_num_lanes=21, max_segment_size=8,
             max_num_batched_tokens=16)
ROOMS = ("draft.py", "graph.py", "judge.py", "pacing.py", "passes.py", "prefilling.py", "scores.py",
         "scoring.py", "streams.py", "tiling.py")
JOBS = [({"prompt_token_ids": ids(length, 29, length)}, stars.SamplingParams(
    max_tokens=17, seed=length, stop_token_ids=[3], **params), policy) for length, params, policy in (
    (9, {}, stars.STARS(8, 4, 0.5, 0.4, 1.0, 2)), (40, dict(presence_penalty=0.5), stars.BlockwiseBestOfK(8, 8)),
    (21, dict(top_k=9), stars.STARS(8, 8, 1.0, 0.0, 2.5, 8)))]


def interrupt(monkeypatch, step: int, quick) -> int:
    """At every `step`-th place, at its first or its last run in turn; returns how many of them were reached."""
    gpu = recorded_gpu.install(monkeypatch)
    work_as(monkeypatch, TARGET)
    if quick is not None:
        gpu.stream.quick = quick

    def made() -> stars.Engine:
        engine = recorded_gpu.build(gpu, LM.decoder(), stars.CausalReward(RM.decoder()), **SIZES)
        engine._round.drafter._pacing.ahead = 2
        engine._round._scores._idle = 1e9
        return engine

    engine = made()
    wanted = pressed(engine, JOBS[:1], JOBS[1:])
    for _ in range(2):  # what is launched and captured first, then what is replayed
        with Interrupts() as seen:
            assert pressed(engine, JOBS[:1], JOBS[1:]) == wanted
    places = sorted(place for place in seen.seen if os.path.basename(place[0]) in ROOMS)
    assert {place[2] for place in places} >= {"pace", "launch_prepared", "prepare", "prepare_trailing", "side_by_side"}
    reached = 0
    for number, place in enumerate(places[3::step]):
        if number % 8 == 0:
            engine = made()
        interrupts = Interrupts(place, 1 if number % 2 else seen.seen[place])
        with interrupts:
            got = pressed(engine, JOBS[:1], JOBS[1:])
        reached += interrupts.left == 0
        nothing_is_held(engine)
        assert got == wanted, f"after an interrupt at {place}"
    return reached


@pytest.mark.parametrize("quick", [lambda works: 0, None], ids=["slow", "any"])
def test_an_interrupt_of_what_a_gpu_is_given_loses_nothing(monkeypatch, quick):
    assert interrupt(monkeypatch, 127, quick) > 12


@pytest.mark.slow
@pytest.mark.parametrize("quick", [lambda works: 0, lambda works: works - 1, None], ids=["slow", "quick", "any"])
def test_an_interrupt_anywhere_in_what_a_gpu_is_given_loses_nothing(monkeypatch, quick):
    assert interrupt(monkeypatch, 3, quick) > 500
