"""libstars' controller and drafts: the law's verdict in C, and drafted segments as the input of a scoring pass.

The engine takes its verdicts on the host, in Python; `stars_decide` is for hosts without Python, and held to it here.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch

from stars import rules as law
from stars.bindings import libstars
from stars.bindings.operations import Operation
from stars.kernels import philox
from stars.kernels.append_draft import append_draft_reference
from stars.kernels.types import Draft, TrailingRows

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")

EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e300, -1e300, 1e-300)
VOCAB = 50


class DecideState(NamedTuple):
    """stars_decide_params: the law's terms and its verdict, one entry a lane."""

    seeds: torch.Tensor  # int64 [lanes] the Philox key (bits of an unsigned 64-bit seed)
    streams: torch.Tensor  # int32 [lanes] segment index and sample index: counter word 3
    attempts: torch.Tensor  # int32 [lanes] attempt number, from 1
    tokens: torch.Tensor  # int32 [lanes] n of the threshold schedule: response tokens, the candidate's included
    max_tokens: torch.Tensor  # int32 [lanes] N of the threshold schedule
    start: torch.Tensor  # float64 [lanes] r0, where the threshold starts
    reward_threshold: torch.Tensor  # float64 [lanes]
    beta: torch.Tensor  # float64 [lanes]; 0 is the hard rule
    rewards: torch.Tensor  # float32 [lanes]
    accepted: torch.Tensor  # int32 [lanes] out: 0 or 1; 0 for a reward of NaN or +inf, which is an error


def decide(state: DecideState) -> None:
    """`stars_decide`, of contiguous tensors on the CPU."""
    each = state.rewards.shape
    Operation("decide")(**{name: (tensor, each) for name, tensor in state._asdict().items()}, lanes=len(state.rewards))


def decide_reference(state: DecideState) -> None:
    """Writes state.accepted as the law has it."""
    columns = [tensor.tolist() for tensor in state[: DecideState._fields.index("accepted")]]
    for lane, (seed, stream, attempt, tokens, max_tokens, start, reward_threshold, beta, reward) in enumerate(
            zip(*columns, strict=True)):
        tau = law.threshold(tokens, max_tokens, start, reward_threshold)
        uniform = philox.accept_uniform(seed, attempt, stream & philox.MAX_SEGMENT, (stream & 0xFFFFFFFF) >> 20)
        state.accepted[lane] = int(reward < math.inf and law.accepts(uniform, reward, tau, beta))


def copy_of(given):
    """The same values in memory of their own."""
    return type(given)(*(tensor.clone() for tensor in given))


def stream(segment: int, sample: int) -> int:
    """Counter word 3 as an int32 holds it."""
    return int(np.uint32(philox.pack_stream(segment, sample)).view(np.int32))


def make_state(lanes: int) -> DecideState:
    """Lanes under the hard rule that halfway to their threshold of 1 have tau = 0.5, and a reward of 0."""
    def full(value, dtype=torch.int32):
        return torch.full((lanes,), value, dtype=dtype)

    return DecideState(
        torch.arange(lanes) * 7919 - 3, full(stream(3, 4001)), full(1), full(5), full(10), full(0.0, torch.float64),
        full(1.0, torch.float64), full(0.0, torch.float64), full(0.0, torch.float32), full(-9))


def random_state(draw: np.random.Generator, lanes: int) -> DecideState:
    """Common values and all edges mixed, so that equal rewards and bounds occur."""
    def pick(values, edges, chance):
        return np.where(draw.random(lanes) < chance, draw.choice(np.array(edges), lanes), draw.choice(values, lanes))

    common = np.concatenate((draw.normal(size=20), [0.0, 1.0, 1.0]))
    max_tokens = draw.integers(1, 200, lanes)
    streams = [stream(int(draw.integers(1 << 20)), int(draw.integers(1 << 12))) for _ in range(lanes)]
    return DecideState(
        seeds=torch.tensor(draw.integers(-2**63, 2**63, lanes)), streams=torch.tensor(streams, dtype=torch.int32),
        attempts=torch.tensor(draw.integers(1, philox.MAX_ATTEMPT + 1, lanes), dtype=torch.int32),
        tokens=torch.tensor(draw.integers(1, max_tokens + 1), dtype=torch.int32),
        max_tokens=torch.tensor(max_tokens, dtype=torch.int32),
        start=torch.tensor(pick(common, (*EDGES, math.inf, math.nan), 0.2)),
        reward_threshold=torch.tensor(pick(common, (*EDGES, math.inf, -math.inf, math.nan), 0.4)),
        beta=torch.tensor(pick(np.array([0.1, 1.0, 3.0]), (0.0, 1e-300, 1e300, math.inf), 0.4)),
        rewards=torch.tensor(pick(common, (math.nan, math.inf, -math.inf, 0.0, 3e38), 0.25), dtype=torch.float32),
        accepted=torch.full((lanes,), -9, dtype=torch.int32))


def assert_verdicts_of_the_law(state: DecideState) -> list[int]:
    """Compares both, and that nothing but the verdicts is written; the verdicts."""
    ours, expected = copy_of(state), copy_of(state)
    decide(ours)
    decide_reference(expected)
    assert torch.equal(ours.accepted, expected.accepted)
    for name, got, given in zip(DecideState._fields, ours, state, strict=True):
        assert name == "accepted" or torch.equal(got.view(torch.uint8), given.view(torch.uint8)), name
    return ours.accepted.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_are_those_of_the_law(seed):
    verdicts = assert_verdicts_of_the_law(random_state(np.random.default_rng(seed), 2000))
    assert 200 < sum(verdicts) < 1800


def test_a_reward_that_is_the_threshold():
    """The hard rule accepts tau itself, as float64 forms it from the schedule, and nothing below."""
    draw = np.random.default_rng(3)
    state = make_state(600)
    for lane in range(600):
        tokens, start, end = int(draw.integers(1, 128)), int(draw.integers(-9, 9)), int(draw.integers(-9, 9))
        tau = np.float32(law.threshold(tokens, 128, start, end))  # exact: 128 is a power of two
        state.tokens[lane], state.max_tokens[lane], state.start[lane], state.reward_threshold[lane] = (
            tokens, 128, start, end)
        below, above = np.nextafter(tau, np.float32(-99)), np.nextafter(tau, np.float32(99))
        state.rewards[lane] = float((tau, below, above)[lane % 3])
    assert assert_verdicts_of_the_law(state) == [1, 0, 1] * 200


def test_a_reward_at_the_logarithm_of_the_uniform():
    """log u < (reward - tau) / beta is false where both are the same float64, and true one step further."""
    state = make_state(300)
    state.beta[:] = 1.0
    for lane in range(300):
        uniform = philox.accept_uniform(int(state.seeds[lane]), 1, 3, 4001)
        tau = -math.log(uniform)  # reward 0
        tau = (tau, math.nextafter(tau, 0.0), math.nextafter(tau, 99.0))[lane % 3]
        state.start[lane] = state.reward_threshold[lane] = tau
    assert assert_verdicts_of_the_law(state) == [0, 1, 0] * 100


def test_no_sum_of_the_threshold_is_fused():
    """Schedules that pass through 0 once every operation is rounded, and miss it where a product is not."""
    draw = np.random.default_rng(5)
    cases = []
    while len(cases) < 50:
        tokens, max_tokens, start = int(draw.integers(1, 100)), int(draw.integers(100, 200)), -float(draw.random())
        end = -start * max_tokens / tokens + start
        exact = Fraction(start) + Fraction(tokens / max_tokens) * Fraction(end - start)
        if law.threshold(tokens, max_tokens, start, end) == 0.0 and exact > 0:
            cases.append((tokens, max_tokens, start, end))
    state = make_state(50)
    for lane, case in enumerate(cases):
        state.tokens[lane], state.max_tokens[lane], state.start[lane], state.reward_threshold[lane] = case
    assert assert_verdicts_of_the_law(state) == [1] * 50


@pytest.mark.parametrize("changed, verdict", [
    ({"rewards": math.nan}, 0), ({"rewards": math.inf}, 0), ({"rewards": -math.inf}, 0),
    ({"rewards": math.inf, "reward_threshold": -math.inf}, 0),
    ({"rewards": math.nan, "reward_threshold": -math.inf}, 0),
    ({"rewards": -math.inf, "reward_threshold": -math.inf}, 0), ({"rewards": -3e38, "reward_threshold": -math.inf}, 1),
    ({"rewards": 3e38, "reward_threshold": math.inf}, 0), ({"rewards": 3e38, "reward_threshold": math.nan}, 0),
    ({"rewards": 1.0, "start": math.nan}, 1), ({"rewards": 0.99, "start": math.nan}, 0),  # tau is the threshold
    ({"rewards": 0.6, "beta": -0.0}, 1), ({"rewards": 0.6, "beta": 1e-300}, 1), ({"rewards": 0.4, "beta": 1e-300}, 0),
    ({"rewards": -9.0, "beta": math.inf}, 1), ({"rewards": 9.0, "beta": math.nan}, 0),
])
def test_edges_of_the_law(changed, verdict):
    state = make_state(3)
    for name, value in changed.items():
        getattr(state, name)[:] = value
    assert assert_verdicts_of_the_law(state) == [verdict] * 3


def make_draft(draw: np.random.Generator, lanes: int, max_steps: int, stop_ids: int) -> Draft:
    """Segments of every length, that end with a stop token or not; some ids are no tokens of the model."""
    out_tokens = draw.integers(-2, VOCAB + 3, (lanes, max_steps))
    steps = draw.integers(0, max_steps + 1, lanes)
    stops = np.where(np.arange(stop_ids) < draw.integers(0, stop_ids + 1, (lanes, 1)),
                     draw.integers(0, VOCAB + 3, (lanes, stop_ids)), -1)
    for lane in np.flatnonzero((draw.random(lanes) < 0.5) & (steps > 0)) if stop_ids else ():
        out_tokens[lane, steps[lane] - 1] = stops[lane, draw.integers(stop_ids)]  # -1 among them
    return Draft(*(torch.tensor(values, dtype=torch.int32) for values in (out_tokens, steps, stops)))


def make_trailing(draw: np.random.Generator, draft: Draft, sequences: int, max_closing: int) -> TrailingRows:
    """Sequences of lanes in any order, or of none, with room for what they may get; the first begins in row 0 or 1."""
    lanes, max_steps = draft.out_tokens.shape
    room = 1 + max_steps + max_closing + draw.integers(0, 3, sequences)
    starts = np.concatenate(([0], np.cumsum(room))) - draw.integers(0, 2)
    closing = np.where(np.arange(max_closing) < draw.integers(0, max_closing + 1, (sequences, 1)),
                       draw.integers(0, 2 * VOCAB, (sequences, max_closing)), -1)
    return TrailingRows(*(torch.tensor(values, dtype=torch.int32) for values in (
        draw.integers(-1, lanes, sequences), starts, closing, draw.integers(0, VOCAB, 1 + starts[-1]),
        np.full(sequences, -9))))


@pytest.mark.parametrize("lanes, max_steps, stop_ids, sequences, max_closing", [
    (1, 1, 1, 1, 0), (1, 7, 2, 1, 1), (8, 16, 16, 8, 4), (5, 3, 0, 40, 2), (200, 5, 3, 200, 3), (3, 0, 2, 4, 2),
    (4, 6, 2, 0, 1),
])
def test_drafts_are_appended_as_the_reference_does(lanes, max_steps, stop_ids, sequences, max_closing):
    for seed in range(4):
        draw = np.random.default_rng(seed)
        draft = make_draft(draw, lanes, max_steps, stop_ids)
        trailing = make_trailing(draw, draft, sequences, max_closing)
        ours, expected, given = copy_of(trailing), copy_of(trailing), copy_of(draft)
        libstars.append_draft(draft, ours, VOCAB)
        append_draft_reference(draft, expected, VOCAB)
        for name, got, wanted in zip(TrailingRows._fields, ours, expected, strict=True):
            assert torch.equal(got, wanted), name
        assert all(torch.equal(a, b) for a, b in zip(draft, given, strict=True))


def test_both_in_a_recorded_program():
    draw = np.random.default_rng(7)
    draft, state = make_draft(draw, 6, 4, 2), random_state(draw, 6)
    trailing = make_trailing(draw, draft, 6, 2)
    done = torch.zeros(1, dtype=torch.int32)
    with libstars.record() as program:
        libstars.append_draft(draft, trailing, VOCAB)
        decide(state)
    verdicts = set()
    for _ in range(20):
        new_draft, new_state = make_draft(draw, 6, 4, 2), random_state(draw, 6)
        new_trailing = make_trailing(draw, new_draft, 6, 2)
        new_trailing = new_trailing._replace(row_start=trailing.row_start.clone(),
                                               token_ids=torch.zeros_like(trailing.token_ids))
        for held, new in ((draft, new_draft), (trailing, new_trailing), (state, new_state)):
            for to, value in zip(held, new, strict=True):
                to.copy_(value)
        append_draft_reference(new_draft, new_trailing, VOCAB)
        decide_reference(new_state)
        assert program.run(1, done) == 1
        assert all(torch.equal(a, b) for a, b in zip(trailing, new_trailing, strict=True))
        assert torch.equal(state.accepted, new_state.accepted)
        verdicts.update(state.accepted.tolist())
    assert verdicts == {0, 1}


@pytest.mark.parametrize("name", Draft._fields + TrailingRows._fields)
def test_a_wrong_tensor_of_a_draft_is_named(name):
    draw = np.random.default_rng(1)
    draft = make_draft(draw, 3, 4, 2)
    trailing = make_trailing(draw, draft, 5, 2)
    of = draft if name in Draft._fields else trailing
    tensor = getattr(of, name)
    wrong = [tensor.long(), torch.zeros(2 * tensor.numel(), dtype=torch.int32)[::2].view(tensor.shape)]
    if name not in ("out_tokens", "closing", "token_ids"):  # they say how many there are
        wrong.append(tensor[:-1])
    for value in wrong:
        changed = of._replace(**{name: value})
        with pytest.raises(ValueError, match=f"append_draft: {name} is"):
            libstars.append_draft(*((changed, trailing) if of is draft else (draft, changed)), VOCAB)


def test_a_vocabulary_of_nothing_is_refused():
    draw = np.random.default_rng(1)
    draft = make_draft(draw, 1, 1, 1)
    with pytest.raises(ValueError, match="append_draft: .* vocab positive"):
        libstars.append_draft(draft, make_trailing(draw, draft, 1, 0), 0)
