"""One engine, used in turn for requests of every kind and number, over what a GPU captures: see recorded_gpu.py."""

from __future__ import annotations

import random

import pytest

import recorded_gpu
import stars
from building import UNPADDED, work_as
from stars.bindings import libstars
from toy import ids, toy_engine, toy_pair

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")

LM, RM = toy_pair(29, (1, 2), positions=128)
SIZES = dict(cache_tokens=512, page_size=4, max_num_seqs=7, max_num_lanes=21, max_segment_size=16)
PLAIN = dict()
FILTERED = dict(top_k=3)
PENALISED = dict(presence_penalty=1.5, repetition_penalty=1.6)
BOTH = dict(top_p=0.6, min_p=0.05, frequency_penalty=1.2)
STOPS = ([3, 5, 9], [], [7])
KINDS = (PLAIN, FILTERED, PENALISED, BOTH)
POLICY = stars.STARS(segment_size=5, max_attempts=4, beta=0.5, reward_threshold=1.0, width=3)
CUT = stars.CARDS(2.5, 2, 7, 4, reward_threshold=1.0, width=3)


def requests(count: int, kinds, first: int = 0, policy=POLICY, max_tokens: int = 11) -> list[tuple]:
    """`count` requests: (prompt, parameters, policy), kinds in turn, prompts of several lengths."""
    return [({"prompt_token_ids": ids(3 + 7 * (index % 5), 29, first + index)},
             stars.SamplingParams(max_tokens=max_tokens - index % 3, seed=first + index,
                                  stop_token_ids=STOPS[(first + index) % 3], **kinds[index % len(kinds)]), policy)
            for index in range(count)]


def texts(engine: stars.Engine, batch: list[tuple]) -> list:
    outputs = engine.generate(*(list(column) for column in zip(*batch, strict=True)), use_tqdm=False)
    engine.check_integrity()
    assert all(completion.error is None for output in outputs for completion in output.outputs)
    return [[(completion.token_ids, completion.finish_reason, completion.reward, completion.cumulative_logprob,
              [(segment.token_ids, segment.accepted, [attempt.token_ids for attempt in segment.attempts])
               for segment in completion.segments]) for completion in output.outputs] for output in outputs]


class Alone:
    """What each request gives by itself, in an engine on the CPU that is as new."""

    def __init__(self):
        with pytest.MonkeyPatch.context() as patch:
            work_as(patch, UNPADDED)
            self.engine = toy_engine(LM, RM, **SIZES)
        self.known: dict = {}

    def __call__(self, batch: list[tuple]) -> list:
        for request in batch:
            if repr(request) not in self.known:
                self.known[repr(request)] = texts(self.engine, [request])[0]
        return [self.known[repr(request)] for request in batch]


@pytest.fixture(scope="module")
def alone():
    return Alone()


@pytest.fixture
def gpu(alone, monkeypatch):
    gpu = recorded_gpu.install(monkeypatch)
    gpu.engine = recorded_gpu.build(gpu, LM.decoder(), stars.CausalReward(RM.decoder()), **SIZES)
    return gpu


@pytest.fixture(autouse=True, scope="module")
def before_the_gpu(alone):
    """All that is compared with is computed before anything is replaced."""
    for name in BATCHES:
        alone(BATCHES[name])


BATCHES = {
    "one plain": requests(1, [PLAIN]), "one filtered": requests(1, [FILTERED], 20),
    "one penalised": requests(1, [PENALISED], 40), "one of both": requests(1, [BOTH], 60),
    "large and plain": requests(6, [PLAIN], 120), "large and mixed": requests(7, KINDS, 140),
    "all penalised": requests(5, [PENALISED, dict(repetition_penalty=3.0)], 180),
    "narrow": requests(2, KINDS[1::2], 200, stars.STARS(5, 4, 0.5, 0.5, 1.0, 1)),
    "long segments": requests(3, KINDS, 220, stars.STARS(8, 2, 0.5, 0.5, 1.0, 2), 20),
    "samples": requests(5, KINDS, 240, stars.Sample()),
    "blocks": requests(3, KINDS, 280, stars.BlockwiseBestOfK(k=3, segment_size=4)),
    "cut by entropy": requests(3, KINDS, 320, CUT, 20), "one cut, filtered": requests(1, [FILTERED], 340, CUT, 20),
}


def test_filters_and_penalties_in_turn(gpu, alone):
    """Each kind before and behind each other one, so that all of it is captured and then replayed."""
    singles = ["one plain", "one filtered", "one penalised", "one of both"]
    for name in singles:
        for other in singles:
            for each in (name, other):
                assert texts(gpu.engine, BATCHES[each]) == alone(BATCHES[each]), each
    assert gpu.replays > 5 * gpu.captures > 0


def test_large_batches_then_small_ones(gpu, alone):
    """Lanes of a large batch are idle in a small one, whatever was left in them: none of it is written or read."""
    for names in (("large and mixed", "one plain"), ("large and mixed", "one filtered"), ("large and plain", "narrow"),
                  ("large and mixed", "one penalised"), ("large and plain", "all penalised"),
                  ("large and mixed", "narrow")):
        for name in names:
            assert texts(gpu.engine, BATCHES[name]) == alone(BATCHES[name]), (names, name)


def test_any_order(gpu, alone):
    draw = random.Random(5)
    names = [name for name in BATCHES for _ in range(2)]
    draw.shuffle(names)
    for name in names:
        assert texts(gpu.engine, BATCHES[name]) == alone(BATCHES[name]), name


def test_a_decoder_that_grew_for_another_engine(alone, monkeypatch):
    """Its workspaces were replaced by larger ones: what was captured goes on with those it was captured with."""
    gpu, lm, rm = recorded_gpu.install(monkeypatch), LM.decoder(), RM.decoder()
    first = recorded_gpu.build(gpu, lm, stars.CausalReward(rm), **SIZES)
    for _ in range(3):
        assert texts(first, BATCHES["one plain"]) == alone(BATCHES["one plain"])
    second = recorded_gpu.build(gpu, lm, stars.CausalReward(rm), **SIZES | dict(max_num_lanes=200, cache_tokens=256))
    for name in ("narrow", "one plain"):
        for engine in (second, first, second, first):
            assert texts(engine, BATCHES[name]) == alone(BATCHES[name]), name
