"""Requests that come one after the other: what a newcomer waits for its first segment, by a clock that only the work
moves, and what is never changed by it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stars
from stars.fairness import Fairness
from stars.intake import Asked
from stars.seating import LEAST_PIECE, LONGEST, PATIENCE, SHORT
from test_conservation import nothing_is_held
from test_fairness import Clock
from test_waiting import rewards
from toy import Digits, ToyModel, facts, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LM = ToyModel(vocab=50, seed=1, layers=1, positions=512)
PER_ROW, TURN = 0.0008, 0.002  # seconds: of a row of a prompt, and of the host in a round
ALIGNED = stars.STARS(8, 6, 0.5, 0.3, 1.0)
MOST_AHEAD = math.ceil(PATIENCE * LONGEST)  # rounds of one lane that newcomers have before the others do


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


@pytest.mark.parametrize("users", [False, True], ids=["one user", "a user each"])
def test_newcomers_are_read_one_at_a_time_and_have_rounds_of_their_own(users):
    """Of three that come together beside six others, each has its first segment as soon as its own prompt was read and
    its round was run: none waits for the prompts behind its own, and none shares its lanes."""
    made = engine()
    clock = clock_of(made)
    judged = stars.STARS(8, 6, 0.5, 0.0, -1e9)  # all are accepted, and it does not know that before
    policies = dict.fromkeys(range(6), judged)
    for number in policies:
        made.add_request(prompt(number), stars.SamplingParams(max_tokens=96, seed=number, ignore_eos=True), judged,
                         user=f"user {number}" if users else None)
    while not all([hypothesis.token_ids for group in made._scheduler.groups for hypothesis in group.hypotheses]):
        made.step()
    for _ in range(12):
        made.step()
    begin, drafts, firsts = clock.now, len(clock.drafts), []
    names = [made.add_request({"prompt_token_ids": ids(100, seed=number)}, stars.SamplingParams(
        max_tokens=16, seed=number, ignore_eos=True), judged, user=f"user {number}" if users else None)
        for number in (10, 11, 12)]
    while len(firsts) < 3:
        firsts += [clock.now for output in made.step() if output.request_id in names and len(
            output.outputs[0].token_ids) == 8]
    own = 100 * PER_ROW + 8 * step(max(map(len, clock.drafts[drafts:])))
    assert firsts[0] - begin <= own, "nothing was under way as they came"
    assert len({len(draft) for draft in clock.drafts[drafts : drafts + 1]}) == 1 < len(clock.drafts[drafts])
    assert [b - a > 0.9 * 100 * PER_ROW for a, b in zip(firsts, firsts[1:], strict=False)] == [True] * 2


NEVER = stars.STARS(segment_size=8, max_attempts=400, alpha=1.0, beta=0.0, reward_threshold=1000.0, width=1)


@pytest.mark.parametrize("users", [False, True], ids=["one user", "a user each"])
def test_nothing_is_read_while_who_was_read_tries_again(users):
    """Four attempts of a newcomer, one a round, of which none is accepted; two more come with it."""
    made = engine()
    clock = clock_of(made)
    accepted = stars.STARS(8, 1, 0.5, 0.0, -1e9)
    tries = stars.STARS(segment_size=8, max_attempts=4, alpha=1.0, beta=0.0, reward_threshold=1000.0, width=1)

    def add(number: int, length: int, policy: Any) -> str:
        return made.add_request({"prompt_token_ids": ids(length, vocab=50, seed=number)}, stars.SamplingParams(
            max_tokens=96, seed=number, ignore_eos=True), policy, user=f"user {number}" if users else None)

    writes = [add(number, 20, accepted) for number in range(6)]
    while min(len(made._requests[name].hypotheses[0].token_ids) for name in writes) < 8:
        made.step()
    begin, name = clock.now, [add(number, 40, tries) for number in (10, 11, 12)][0]
    rounds_until(made, name)
    assert clock.now - begin == pytest.approx(39 * PER_ROW + 4 * 8 * step(1))


@pytest.mark.parametrize("users", [False, True], ids=["one user", "a user each"])
def test_rounds_of_many_newcomers_are_bounded(users):
    """Twelve that never have a first segment, beside one who writes."""
    made = engine()
    clock = clock_of(made)
    for number in range(13):
        made.add_request(prompt(number), stars.SamplingParams(max_tokens=96, seed=number, ignore_eos=True),
                         NEVER if number else stars.STARS(8, 1, 0.5, 0.0, -1e9),
                         user=f"user {number}" if users else None)
        for _ in range(1 if number else 3):
            made.step()
    for _ in range(12 * (MOST_AHEAD + 2)):
        made.step()
    assert len(made._scheduler.groups) >= 12
    # Of all twelve 2.1 times; a little more than once where somebody had been left without a seat.
    assert max(8 * step(len(draft)) for draft in clock.drafts) <= 1.2 * LONGEST * 8 * step(1)


def rounds_until(made: stars.Engine, name: str) -> int:
    """Steps until a request has its first tokens."""
    for number in range(400):
        if any([output.request_id == name and output.outputs[0].token_ids for output in made.step()]):
            return number
    raise AssertionError(f"{name} is left without its first segment")


@pytest.mark.parametrize(("users", "priorities"), [(False, (0, 0)), (False, (5, -5)), (True, (0, 0))],
                         ids=["one user", "priorities", "a user each"])
@pytest.mark.parametrize("writes", [False, True], ids=["nobody writes", "one writes"])
def test_who_never_has_a_first_segment_keeps_nobody_from_being_read(users, priorities, writes):
    made = engine()
    clock_of(made)

    def add(name: str, policy: Any, tokens: int, priority: int = 0) -> None:
        made.add_request(prompt(len(name)), stars.SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True), policy,
                         request_id=name, priority=priority, user=name if users else None)

    accepted = stars.STARS(16, 1, 0.5, 0.3, -1e9)
    add("writes", accepted, 400 if writes else 64, priorities[0])
    assert rounds_until(made, "writes") < 5
    add("never accepted", NEVER, 16, priorities[0])
    while writes and made._requests["never accepted"].hypotheses[0].metrics.attempts_counted < 6 or (
            not writes and "writes" in made._requests):
        made.step()
    add("waits", accepted, 16, priorities[1])
    assert rounds_until(made, "waits") < MOST_AHEAD + 5


def test_newcomers_that_others_wait_for_do_not_keep_those_from_being_read():
    """From idle a short prompt was read, and a long one in part, with which it begins to draw; then one more comes."""
    made = engine()
    clock_of(made)
    for name, length in (("short", 20), ("long", 450)):
        made.add_request({"prompt_token_ids": ids(length, vocab=50, seed=length)}, stars.SamplingParams(
            max_tokens=32, seed=1, ignore_eos=True), request_id=name)
    made.step()
    assert made._scheduler._gathers
    made.add_request(prompt(3), stars.SamplingParams(max_tokens=32, seed=1, ignore_eos=True), request_id="late")
    assert rounds_until(made, "short") < 5


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
    longest = LONGEST * 8 * step(1)
    side_by_side = max(lanes for lanes in range(1, 12) if 8 * step(lanes) <= longest)
    turn = (PATIENCE + 2) * longest + 200 * PER_ROW + 10 * TURN  # and the last newcomer's prompt and round
    assert rounds < 3000 and max(gaps[12:]) < -(-12 // side_by_side) * turn


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
