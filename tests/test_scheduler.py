"""The queue under pressure: who gives way, to whom, and that nobody can tell from the outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import stars
from stars.cache import PagedCache
from stars.errors import IntegrityError, OutOfPages
from stars.reward.base import Reward, Scored
from stars.scheduler import Scheduler
from test_conservation import nothing_is_held
from test_faults import IGNORED, Interrupts
from toy import ToyModel, facts, ids, table_reward, toy_engine

LM = ToyModel(vocab=11, seed=1, layers=1, positions=160)
RM = ToyModel(vocab=11, seed=3, layers=1, positions=160, head="reward", sharpness=1.5)
REWARD = table_reward(seed=3)
POLICIES = (stars.STARS(5, 6, 0.5, 0.4, 1.5, 2), stars.Sample(score=True), stars.BestOfN(3),
            stars.BlockwiseBestOfK(3, 4), stars.Sample())
JOBS = [({"prompt_token_ids": ids(5 + 7 * index % 23, 11, index % 7)},
         stars.SamplingParams(max_tokens=20 + 9 * index % 50, n=1 + index % 3, seed=index, ignore_eos=index % 4 > 0),
         POLICIES[index % 5]) for index in range(13)]
LARGE = 8192


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclasses.dataclass(frozen=True)
class Population:
    """Three responses of STARS that are decided together, as nothing that ships is."""

    size: int = 3

    def plan(self) -> Any:
        plan = stars.STARS(4, 6, 0.5, 0.4, 1.5, 2).plan()
        return plan._replace(lanes=dataclasses.replace(plan.lanes, population=self.size))


def function_reward() -> stars.FunctionReward:
    return stars.FunctionReward(lambda prompt, responses: [REWARD(one) for one in responses], inputs="ids")


def causal_reward() -> stars.CausalReward:
    return stars.CausalReward(RM.decoder())


def engine(reward: Any, cache_tokens: int, **options: Any) -> stars.Engine:
    settings = dict(page_size=5, max_num_seqs=14, max_num_lanes=64) | options
    return toy_engine(LM, reward, cache_tokens=cache_tokens, **settings)


def run(made: stars.Engine, jobs: Sequence[tuple] = JOBS, look: Callable[[stars.Engine], None] | None = None
        ) -> list[stars.RequestOutput]:
    """The outputs of `jobs`, queued at once; the oldest unit of every step goes on or ends, and the books balance."""
    names = [made.add_request(*job) for job in jobs]
    done: dict[str, stars.RequestOutput] = {}
    for _ in range(3000):
        if not made.has_unfinished_requests():
            break
        oldest = made._scheduler.running[:1]
        done.update((output.request_id, output) for output in made.step())
        assert not oldest or not oldest[0].unfinished or made._scheduler.running[0] is oldest[0], "the oldest gave way"
        made.check_integrity()
        if look is not None:
            look(made)
    nothing_is_held(made)
    return [done[name] for name in names]


def counts(output: stars.RequestOutput) -> list[dict[str, int]]:
    """What a pre-emption must leave as it is."""
    apart = ("lm_seconds", "rm_seconds", "num_preemptions", "prompt_tokens_cached", "rm_tokens_cached")
    return [{name: value for name, value in vars(completion.metrics).items() if name not in apart}
            for completion in output.outputs]


def text(output: stars.RequestOutput) -> list:
    return [(one.token_ids, one.finish_reason, one.stop_reason, one.reward, one.cumulative_logprob,
             [(segment.token_ids, segment.reward, segment.accepted) for segment in one.segments])
            for one in output.outputs]


def preemptions(outputs: Sequence[stars.RequestOutput]) -> int:
    return sum(output.metrics.num_preemptions for output in outputs)


@pytest.mark.parametrize("cache_tokens, page_size", [(105, 5), (133, 7), (240, 16), (99, 1)])
def test_a_small_cache_gives_the_outputs_of_a_large_one(cache_tokens, page_size):
    large = run(engine(function_reward(), LARGE))
    small = run(engine(function_reward(), cache_tokens, page_size=page_size))
    assert preemptions(large) == 0 and preemptions(small) > 5
    for one, other in zip(small, large, strict=True):
        assert facts(one) == facts(other) and counts(one) == counts(other)
        assert one.metrics.num_preemptions == sum(part.metrics.num_preemptions for part in one.outputs)


@pytest.mark.parametrize("cache_tokens", [105, 140])
def test_a_small_cache_of_a_causal_reward(cache_tokens):
    """What was committed is computed in other passes: rewards may differ in their last bits."""
    large, small = (run(engine(causal_reward(), size)) for size in (LARGE, cache_tokens))
    assert preemptions(small) > 5
    for one, other in zip(small, large, strict=True):
        for part, whole in zip(one.outputs, other.outputs, strict=True):
            assert (part.token_ids, part.finish_reason) == (whole.token_ids, whole.finish_reason)
            assert part.reward == (whole.reward and pytest.approx(whole.reward, abs=1e-4))
            assert part.metrics.accept_rate == whole.metrics.accept_rate


def test_deterministic_mode_keeps_every_bit():
    """What was committed is computed again as it was drafted and scored: only of a first layer it would not show."""
    lm = ToyModel(vocab=11, seed=1, positions=160)
    rm = ToyModel(vocab=11, seed=3, positions=160, head="reward", sharpness=1.5)
    large, small = (run(toy_engine(lm, stars.CausalReward(rm.decoder()), cache_tokens=size, page_size=5,
                                   max_num_seqs=14, deterministic=True)) for size in (LARGE, 120))
    assert preemptions(small) > 5
    assert [text(one) for one in small] == [text(one) for one in large]


def test_the_seconds_of_discarded_attempts_count(monkeypatch):
    """Counts are those of what stands; the clock ran for what was drawn twice, too."""
    before = []
    preempt = Scheduler._preempt

    def noting(self, unit):
        spent = [(one, one.metrics.lm_seconds) for one in unit.unfinished if one.attempts]
        preempt(self, unit)
        before.extend((one.metrics.lm_seconds, seconds, one.boundary.metrics.lm_seconds) for one, seconds in spent)

    monkeypatch.setattr(Scheduler, "_preempt", noting)
    policy = stars.STARS(5, 12, 1.0, 0.0, 4.0, 1)
    jobs = [(prompt, dataclasses.replace(params, ignore_eos=True), policy) for prompt, params, _ in JOBS]
    assert preemptions(run(engine(function_reward(), 105), jobs)) > 5
    assert before and all(kept == spent > mark for kept, spent, mark in before), "in the middle of a segment"


class Ledger(Reward):
    """A reward with a cache of its own: `room` tokens, of which every session holds what it was promised."""

    def __init__(self, room: float):
        self.room, self.sessions, self.opened, self.most = room, [], 0, 0

    @property
    def used(self) -> int:
        return sum(session["held"] for session in self.sessions)

    def can_open(self, prompt, max_tokens):
        return self.used + len(prompt.token_ids) <= self.room

    def open(self, prompt, max_tokens):
        self.sessions.append({"prompt": len(prompt.token_ids), "held": len(prompt.token_ids), "response": 0})
        self.opened += 1
        return self.sessions[-1]

    def reserve(self, session, tokens):
        more = max(0, session["prompt"] + session["response"] + tokens - session["held"])
        if self.used + more > self.room:
            return False
        session["held"] += more
        self.most = max(self.most, self.used)
        return True

    def resume(self, session, token_ids, text):
        session["response"] = len(token_ids)

    def score(self, candidates):
        for session, token_ids, *_ in candidates:
            assert session["prompt"] + len(token_ids) <= session["held"], "more than was promised"
        return [Scored(REWARD(candidate.token_ids), handle=len(candidate.token_ids)) for candidate in candidates]

    def commit(self, winners):
        for session, length in winners:
            session["response"] = length

    def discard(self, handle):
        pass

    def close(self, session):
        self.sessions = [one for one in self.sessions if one is not session]

    def reset(self):
        self.sessions = []


@pytest.mark.parametrize("room", [100, 137, 200])
def test_pages_of_the_reward_run_out_first(room):
    jobs = [job for job in JOBS if job[2] != stars.Sample()]
    reward, wide = Ledger(room), Ledger(math.inf)
    small, large = run(engine(reward, LARGE), jobs), run(engine(wide, LARGE), jobs)
    assert preemptions(small) > 3 and preemptions(large) == 0
    for one, other in zip(small, large, strict=True):
        assert facts(one) == facts(other) and counts(one) == counts(other)
    assert 0.6 * room < reward.most <= room and not reward.sessions


def test_who_gave_way_is_not_tried_again_for_nothing():
    """Every admission but those that the reward had no room for leads to a round: nobody is opened in vain again and
    again while nothing is given back."""
    jobs = [({"prompt_token_ids": ids(9, 11, index)}, stars.SamplingParams(max_tokens=60, seed=index, ignore_eos=True),
             stars.STARS(3, 3, 1.0, 0.4, 0.5, 1)) for index in range(6)]
    reward = Ledger(100)
    outputs = run(engine(reward, LARGE), jobs)
    gave_way = preemptions(outputs)
    assert gave_way >= 4
    assert reward.opened <= len(jobs) + gave_way + len(jobs)  # in vain once for each end, at most


def test_the_youngest_gives_way_and_comes_back_first():
    """Ends come in the order of arrival, where all are of one length."""
    jobs = [({"prompt_token_ids": ids(9, 11, index)}, stars.SamplingParams(max_tokens=50, seed=index, ignore_eos=True),
             stars.Sample()) for index in range(8)]
    made, ended, seen = engine(None, 150), [], set()

    def look(made):
        scheduler = made._scheduler
        numbers = [int(unit.request.request_id) for unit in (*scheduler.running, *scheduler.waiting)]
        assert numbers == sorted(numbers)
        seen.update(numbers)
        ended.extend(number for number in sorted(seen - {*numbers, *ended}))

    outputs = run(made, jobs, look)
    assert ended == list(range(8)) and preemptions(outputs) > 5
    assert outputs[0].metrics.num_preemptions == 0


# -- groups -----------------------------------------------------------------------------------------------------------


def test_a_population_is_admitted_and_gives_way_whole():
    jobs = [({"prompt_token_ids": ids(5 + 6 * index, 11, index)},
             stars.SamplingParams(max_tokens=18, n=1 + index % 2, seed=index, ignore_eos=True),
             Population() if index % 2 else POLICIES[index]) for index in range(6)]
    parts = set()

    def look(made):
        for request in made._requests.values():
            if isinstance(request.policy, Population):
                for group in request.groups:
                    growing = [one for one in group.hypotheses if one.finish_reason is None]
                    parts.add((len(growing), sum(one.table is not None for one in growing)))

    large, small = (run(engine(function_reward(), size), jobs, look) for size in (LARGE, 150))
    assert {(total, held) for total, held in parts if held not in (0, total)} == set()
    assert {(3, 0), (3, 3)} <= parts
    assert sum(output.metrics.num_preemptions for output in small[1::2]) >= 3
    for one, other in zip(small, large, strict=True):
        assert facts(one) == facts(other) and counts(one) == counts(other)


def test_a_population_that_can_never_be_held_is_refused():
    made = engine(function_reward(), 105, max_num_seqs=4)
    prompt = {"prompt_token_ids": ids(11, 11)}
    with pytest.raises(stars.RequestError, match="population is 5 and the engine decodes 4 responses at once"):
        made.add_request(prompt, stars.SamplingParams(max_tokens=4), Population(5))
    # 10 positions are shared, 2 pages: with 35 tokens a response has 9 pages, three have 2 + 3 * 7 = 23 of the 21.
    with pytest.raises(stars.RequestError, match="3 responses of up to 35 tokens together, which do not fit "
                                                 "cache_tokens=105"):
        made.add_request(prompt, stars.SamplingParams(max_tokens=35), Population())
    fits = (prompt, stars.SamplingParams(max_tokens=25, seed=2, ignore_eos=True), Population())
    assert facts(run(made, [fits])[0]) == facts(run(engine(function_reward(), LARGE), [fits])[0])


def test_a_best_of_many_needs_no_room_for_all():
    """Whole responses need not be drafted side by side: as many as there is room for."""
    job = ({"prompt_token_ids": ids(11, 11)}, stars.SamplingParams(max_tokens=40, seed=2), stars.BestOfN(20))
    [one], [other] = run(engine(function_reward(), 105, max_num_seqs=4), [job]), run(engine(
        function_reward(), LARGE, max_num_seqs=20), [job])
    assert facts(one) == facts(other) and len(one.outputs[0].segments[0].attempts) == 20


# -- ends and faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [function_reward, causal_reward])
def test_an_abort_of_who_gave_way(reward):
    made, aborted = engine(reward(), 105), {}
    names = [made.add_request(*job) for job in JOBS]
    done = {}
    while made.has_unfinished_requests():
        done.update((output.request_id, output) for output in made.step())
        for unit in list(made._scheduler.waiting):
            name, kept = unit.request.request_id, [list(one.token_ids) for one in unit.request.hypotheses]
            if len(aborted) < 3 and any(kept) and name not in aborted and unit.request.plan.lanes.population == 1:
                assert all(one.table is None and one.session is None for one in unit.unfinished)
                aborted[name] = kept
                assert made.abort(name)
        made.check_integrity()
    nothing_is_held(made)
    assert len(aborted) == 3
    for name, kept in aborted.items():
        assert [one.token_ids for one in done[name].outputs] == kept
        assert "abort" in {one.finish_reason for one in done[name].outputs}
    for name, whole in zip(names, run(engine(reward(), LARGE)), strict=True):
        if name not in aborted:
            assert [one.token_ids for one in done[name].outputs] == [one.token_ids for one in whole.outputs]


def test_who_is_alone_and_has_no_room_is_a_defect(monkeypatch):
    made = engine(None, 105)
    made.add_request({"prompt_token_ids": ids(9, 11)}, stars.SamplingParams(max_tokens=40, seed=1, ignore_eos=True))

    def none(self, table, tokens):
        raise OutOfPages(1, 0)

    assert made.step()
    monkeypatch.setattr(PagedCache, "reserve", none)
    monkeypatch.setattr(PagedCache, "can_open", lambda *_: False)
    with pytest.raises(IntegrityError, match="does not fit in an empty cache, although it was checked"):
        made.step()


@pytest.mark.parametrize("after", [0, 3])
def test_a_reward_without_room_for_one_ends_its_request(after):
    class Narrow(Ledger):
        def reserve(self, session, tokens):
            return (session["prompt"] != 7 or session["response"] < after) and super().reserve(session, tokens)

    others = [({"prompt_token_ids": ids(9, 11, seed)}, stars.SamplingParams(max_tokens=12, seed=seed),
               stars.STARS(3, 4, 0.5, 0.4, 1.0, 2)) for seed in (1, 2)]
    bad = ({"prompt_token_ids": ids(7, 11)}, stars.SamplingParams(max_tokens=12, seed=3, n=2, ignore_eos=True),
           others[0][2])
    outputs = run(engine(Narrow(math.inf), LARGE), [others[0], bad, others[1]])
    asked = "can_open refuses this prompt" if after == 0 else "reserve has no room for the next segment of this prompt"
    assert {one.error for one in outputs[1].outputs} == {
        f"Narrow.{asked} while nothing else is open: refuse it in check"}
    alone = run(engine(Ledger(math.inf), LARGE), others)
    assert [facts(outputs[0]), facts(outputs[2])] == [facts(one) for one in alone]


# -- interrupts -------------------------------------------------------------------------------------------------------


PRESSED = [({"prompt_token_ids": ids(7 + index, 11, index)},
            stars.SamplingParams(max_tokens=14, n=1 + index % 2, seed=3 + index, ignore_eos=True), policy)
           for index, policy in enumerate((POLICIES[0], POLICIES[1], Population(2)))]


def pressed(made: stars.Engine, jobs: Sequence[tuple] = PRESSED, later: Sequence[tuple] = ()) -> list:
    """Tokens of a few requests that do not fit together, `later` ones added after a step; interrupts are survived."""
    requests = {}

    def add(jobs: Sequence[tuple]) -> None:
        for job in jobs:
            name = str(len(requests))
            while name not in made._requests:
                try:
                    made.add_request(*job, request_id=name)
                except KeyboardInterrupt:
                    made.check_integrity()
            requests[name] = made._requests[name]

    add(jobs)
    left = True
    while left:
        try:
            made.step()
            left = made.has_unfinished_requests()
        except KeyboardInterrupt:
            made.check_integrity()
        if len(requests) < len(jobs) + len(later):
            add(later)
            left = True
    return [([(one.token_ids, one.finish_reason) for one in output.outputs], output.metrics.attempts,
             output.metrics.accept_rate) for output in (request.output() for request in requests.values())]


def interrupt_everywhere(causal: bool, step: int, counts: Callable[[int, int], set[int]],
                         traffic: Callable[[stars.Engine], list] = pressed, **options: Any) -> None:
    """Before every `step`-th bytecode of the queue, of going back and of the ledger: at those of its runs that
    counts(number of the place, how often it runs) names."""
    made = engine(causal_reward() if causal else function_reward(), 42, max_num_seqs=6, page_size=3, **options)
    wanted = traffic(made)
    with Interrupts() as seen:
        traffic(made)
    functions = ("go_back", "let_go", "reserve", "open", "close", "can_open", "_replace", "resume_in_chunks",
                 "start_in_chunks")
    places = sorted(place for place in seen.seen if place[0].endswith(("scheduler.py", "prefilling.py"))
                    or place[0].endswith(("request.py", "cache.py", "scoring.py", "session.py"))
                    and place[2] in functions)
    assert {place[2] for place in places} >= {"_preempt", "_give_up", "_open", "advance", "reserve", "release"}
    for number, place in enumerate(places[3::step]):
        for count in sorted(counts(number, seen.seen[place])):
            with Interrupts(place, count):
                got = traffic(made)
            nothing_is_held(made)
            assert got == wanted, f"after an interrupt at {place}"


@IGNORED
@pytest.mark.parametrize("causal", [False, True], ids=["function", "causal"])
def test_an_interrupt_in_the_queue_loses_nothing(causal):
    """At their first and their last runs in turn; all of them are for the slow test."""
    interrupt_everywhere(causal, 11, lambda number, runs: {1 if number % 2 else runs})


@pytest.mark.slow
@IGNORED
@pytest.mark.parametrize("causal", [False, True], ids=["function", "causal"])
def test_an_interrupt_anywhere_in_the_queue_loses_nothing(causal):
    interrupt_everywhere(causal, 1, lambda number, runs: {1, runs})


def test_there_is_room_for_who_is_kept_twice_in_the_place_of_who_has_ended():
    """A beam that ended has given its pages back, and others have them by the time that another one is forked into its
    place: no round lacks a page then, and the texts are those of each alone."""
    def made(cache_tokens: int) -> stars.Engine:
        longest = stars.FunctionReward(lambda prompt, responses: [float(len(one)) for one in responses], inputs="ids")
        return engine(longest, cache_tokens, page_size=4, max_num_seqs=8, max_segment_size=16)

    given = 0
    for seed in range(12):
        jobs = [({"prompt_token_ids": ids(5 + index, 5, index)},
                 stars.SamplingParams(max_tokens=24, seed=6 * seed + index, ignore_eos=index % 2 > 0,
                                      stop_token_ids=[4] if index % 2 == 0 else None),
                 stars.SegmentBeam(3, 2, 3) if index % 2 == 0 else stars.Sample()) for index in range(8)]
        outputs = run(made(96), jobs)
        given += sum(output.metrics.num_preemptions for output in outputs)
        assert list(map(facts, outputs)) == list(map(facts, run(made(LARGE), jobs)))
    assert given > 0, "the run has not what it is to test"
