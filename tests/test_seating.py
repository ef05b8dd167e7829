"""Requests that come one after the other: what a newcomer waits for its first segment, by a clock that only the work
moves, and what is never changed by it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stars
from stars.fairness import Fairness
from stars.intake import Asked
from stars.seating import LEAST_PIECE, PATIENCE, SHORT
from test_conservation import nothing_is_held
from test_fairness import Clock
from test_waiting import rewards
from toy import Digits, ToyModel, facts, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LM = ToyModel(vocab=50, seed=1, layers=1, positions=512)
PER_ROW, TURN = 0.0008, 0.002  # seconds: of a row of a prompt, and of the host in a round
ALIGNED = stars.STARS(8, 6, 0.5, 0.3, 1.0)


def step(lanes: int) -> float:
    """Seconds of a step of a model of 135M parameters on two cores, about: wide ones cost nearly in proportion."""
    return 0.0016 + 0.00101 * lanes + 0.0001 * min(lanes, 4)


def flat(lanes: int) -> float:
    """As a GPU has them."""
    return 0.006 + 0.00001 * lanes


def clock_of(made: stars.Engine, seconds: Callable[[int], float] = step) -> Clock:
    return Clock(made, seconds, PER_ROW)


def engine(**options: Any) -> stars.Engine:
    return toy_engine(LM, stars.FunctionReward(rewards, inputs="ids"), tokenizer=Digits(),
                      **(dict(max_num_seqs=64, max_num_lanes=64, cache_tokens=32768) | options))


def prompt(number: int) -> dict[str, list[int]]:
    """20 to 60 tokens, none of which begin alike."""
    chance = np.random.default_rng(number)
    return {"prompt_token_ids": chance.integers(1, 50, chance.integers(20, 61)).tolist()}


def waits(made: stars.Engine, clock: Clock, arrivals: list[float], tokens: int, policy: Any,
          users: bool) -> tuple[list[float], list[float]]:
    """Seconds to the first segment of requests that come at these times, in order, and to their ends."""
    due: dict[str, float] = {}
    first: dict[str, float] = {}
    ends: dict[str, float] = {}
    begin, sent = clock.now, 0
    while len(ends) < len(arrivals):
        while sent < len(arrivals) and begin + arrivals[sent] <= clock.now:
            name = made.add_request(prompt(sent), stars.SamplingParams(max_tokens=tokens, seed=sent, ignore_eos=True),
                                    policy, user=f"user {sent}" if users else None)
            due[name], sent = begin + arrivals[sent], sent + 1
        if not made.has_unfinished_requests():
            clock.now = begin + arrivals[sent]
            continue
        clock.now += TURN
        for output in made.step():
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, clock.now - due[output.request_id])
            if output.finished:
                ends[output.request_id] = clock.now - due[output.request_id]
    nothing_is_held(made)
    return [first[name] for name in due], [ends[name] for name in due]


def poisson(count: int, rate: float, seed: int) -> list[float]:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


def p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1) + 0.5)]


@pytest.mark.parametrize("users", [False, True], ids=["one user", "a user each"])
def test_the_first_segment_at_seventy_percent_of_capacity(users):
    """Answers of 128 tokens, at 70 % of what 16 clients in a closed loop draw: the p99 of the time to the first segment
    is at most 3 times the idle median, and requests end as they did."""
    made = engine()
    clock = clock_of(made)
    idle, _ = waits(made, clock, [10.0 * index for index in range(20)], 128, stars.Sample(), users)
    begin = clock.now
    waits(made, clock, [0.0] * 16, 128, stars.Sample(), users)
    capacity = 16 / (clock.now - begin)
    first, ends = waits(made, clock, poisson(250, 0.7 * capacity, 3), 128, stars.Sample(), users)
    assert p99(first) <= 3.0 * float(np.median(idle)), (p99(first), float(np.median(idle)))
    assert p99(ends) < 8.0


@pytest.mark.parametrize("users", [False, True], ids=["one user", "a user each"])
def test_newcomers_with_rewards_go_first(users):
    """Segments that are scored are not drawn in pieces: who lacks its first waits for a bounded round of the others."""
    made = engine()
    clock = clock_of(made)
    arrivals = [0.0] * 12 + [0.3 + 0.2 * index for index in range(12)]
    first, _ = waits(made, clock, arrivals, 96, ALIGNED, users)
    late = first[12:]
    made = engine()
    made._scheduler._seating._cheap = lambda groups: True  # as if wide rounds took no longer than narrow ones
    as_before, _ = waits(made, clock_of(made), arrivals, 96, ALIGNED, users)
    assert p99(late) < 0.8 * p99(as_before[12:]), (p99(late), p99(as_before[12:]))


@pytest.mark.parametrize("mixed", [False, True])
def test_pieces_have_the_numbers_of_whole_segments(mixed):
    """Texts and log-probabilities, whatever the others do: of plain samples and of whole responses that are judged at
    their ends. mixed: beside some with penalties, biases or log-probabilities, who are not cut, and then nobody is."""
    chance = random.Random(3)
    jobs = []
    for index in range(24):
        params = dict(max_tokens=chance.randint(1, 70), seed=index, n=chance.choice([1, 1, 2]),
                      temperature=chance.choice([0.0, 0.7, 1.0]), top_p=chance.choice([1.0, 0.8]))
        if mixed and index % 2:
            params |= chance.choice([dict(presence_penalty=0.5), dict(logit_bias={7: 2.0}), dict(logprobs=2)])
        jobs.append((prompt(index), stars.SamplingParams(**params), chance.choice(
            [stars.Sample(), stars.Sample(), stars.Sample(score=True), stars.BestOfN(3),
             stars.RejectionSampling(2.0, 0.3, 4)])))
    whole = [facts(made) for job in jobs for made in engine().generate(*job, use_tqdm=False)]
    made, done = engine(), {}
    clock, cut = clock_of(made), 0
    for index, job in enumerate(jobs):
        made.add_request(*job, request_id=str(index))
        for _ in range(3):
            done |= {output.request_id: output for output in made.step()}
            cut += made._round.proposer.piece is not None
            made.check_integrity()
    while made.has_unfinished_requests():
        done |= {output.request_id: output for output in made.step()}
        cut += made._round.proposer.piece is not None
    nothing_is_held(made)
    assert mixed or cut > 30 and sum(max(draft) == LEAST_PIECE for draft in clock.drafts) > 10
    for index, (job, before) in enumerate(zip(jobs, whole, strict=True)):
        after = facts(done[str(index)])
        assert [one[:3] for one in after] == [one[:3] for one in before], job


def test_deterministic_mode_cuts_nothing():
    made = engine(deterministic=True)
    clock = clock_of(made)
    waits(made, clock, [0.05 * index for index in range(10)], 48, stars.Sample(), False)
    assert {tokens for draft in clock.drafts for tokens in draft} == {16}


def test_where_wide_rounds_are_cheap_nothing_is_cut_and_nobody_waits():
    """On a GPU a round of all lanes takes hardly longer than one of a single one; and where all rounds are short nobody
    minds them."""
    for seconds in (flat, lambda lanes: SHORT / 16 / 64 * lanes):
        made = engine()
        clock = clock_of(made, seconds)
        waits(made, clock, [0.05 * index for index in range(10)], 48, stars.Sample(), False)
        assert {tokens for draft in clock.drafts for tokens in draft} == {16}
        assert max(map(len, clock.drafts)) > 1


def test_who_comes_together_draws_together():
    """As `generate` has them: one round of all, whole segments, though the rounds are long."""
    made = engine()
    clock = clock_of(made)
    waits(made, clock, [0.0] * 20, 48, stars.Sample(), False)
    assert clock.drafts == [[16] * 20] * 3


def test_newcomers_without_end_leave_the_others_their_rounds():
    """Twelve long answers beside short ones that always come anew: each goes on in about what newcomers may take, and a
    few rounds of the others."""
    made = engine(max_num_seqs=16, max_num_lanes=32)
    clock = clock_of(made)
    names = [made.add_request(prompt(number), stars.SamplingParams(max_tokens=48, seed=number, ignore_eos=True),
                              stars.STARS(8, 1, 0.5, 0.3, 1.0)) for number in range(12)]
    length, grew, gaps, number, rounds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0), [], 0, 0
    running: set[str] = set()
    while set(names) & set(made._requests) and rounds < 3000:
        rounds += 1
        while rounds > 2 and len(running) < 2:
            number += 1
            running.add(made.add_request({"prompt_token_ids": ids(200, seed=number)}, stars.SamplingParams(
                max_tokens=4, seed=number, ignore_eos=True), stars.STARS(8, 1, 0.5, 0.3, 1.0)))
        clock.now += TURN
        for output in made.step():
            name = output.request_id
            if name in grew and len(output.outputs[0].token_ids) > length[name]:
                length[name] = len(output.outputs[0].token_ids)
                gaps.append(clock.now - grew[name])
                grew[name] = clock.now
            if output.finished:
                running.discard(name)
    longest = 4.0 * 8 * step(1)
    assert rounds < 3000 and max(gaps[12:]) < 2 * (PATIENCE + 4.0) * longest


def test_a_prompt_longer_than_a_share_is_read_beside_drafts():
    """Whole chunks are read or nothing: what a long one takes of another user's time is owed, and not refused."""
    made = engine()
    clock = clock_of(made)
    made.add_request(prompt(0), stars.SamplingParams(max_tokens=400, seed=0, ignore_eos=True), ALIGNED, user="writes")
    for _ in range(4):
        made.step()
    reads = [made.add_request({"prompt_token_ids": ids(200, seed=seed)}, stars.SamplingParams(
        max_tokens=4, seed=seed, ignore_eos=True), ALIGNED, user="reads") for seed in range(2)]
    read_by: dict[str, int] = {}
    for number in range(40):
        for output in made.step():
            if output.request_id in reads and output.finished:
                read_by[output.request_id] = number
    assert len(read_by) == 2, "not only once nobody drafts"
    assert clock.now > 0 and made.has_unfinished_requests()


def test_who_goes_first_and_for_how_long():
    """A user who comes from idle and was not served more than the others, with its first request, until that has a
    segment; and they are read in the order in which they came, however long their prompts are."""
    made, fairness = engine(), Fairness()

    def asked(user: str):
        request = made._parse(Asked(prompt(1), stars.SamplingParams(max_tokens=4), user=user))
        fairness.enter(request)
        return request

    busy = asked("busy")
    assert fairness.goes_first(busy), "it is alone"
    fairness.read(busy, 100)
    busy.hypotheses[0].token_ids.append(3)
    fairness.ran(busy.groups)
    new, late = asked("new"), asked("late")
    assert not fairness.goes_first(busy) and fairness.goes_first(new) and fairness.goes_first(late)
    assert not fairness.goes_first(asked("new")), "its first alone"
    fairness.read(busy, 50)
    fairness.read(new, 300)
    fairness.read(late, 10)
    assert fairness.order([*busy.hypotheses, *new.hypotheses, *late.hypotheses]) == [
        *new.hypotheses, *late.hypotheses, *busy.hypotheses]
    for request in (new, late):
        request.hypotheses[0].token_ids.append(3)
        fairness.ran(request.groups)
        assert not fairness.goes_first(request)
    for request in (new, late):
        request.hypotheses[0].finish("stop")
        fairness.leave(request)
    assert not fairness.goes_first(asked("new")), "it was served more than who is there"
    assert len(fairness._fresh) == 0
