"""Rows of populations and of whole responses, as the engine runs them: in any width and batch, interrupted, short of
pages, with rewards that fail; and STARS in step."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

import oracle
import stars
from stars.kernels.philox import MAX_ATTEMPT
from stars.plan import Fixed, Lanes, Plan, Sampled, Score, Whole
from stars.rules import EARLIER, Always, Decision, Judged, State, whole
from test_conservation import nothing_is_held
from test_methods_outside import LM, TABLE, Planned, breeding_engine
from toy import ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ROWS = {
    "rejection": stars.RejectionSampling(2.0, 1.0, 5, width=2),
    "rejection, refused": stars.RejectionSampling(math.inf, 1.0, 3, width=2, exhaust="refuse"),
    "soft best of n": stars.BestOfN(3, 0.8),
    "falling k": stars.BlockwiseBestOfK([4, 2, 1], 3),
    "speculative rejection": stars.SpeculativeRejection(4, 0.4, 3),
    "beam": stars.SegmentBeam(3, 2, 3),
    "particles": stars.ParticleFilter(4, 0.8, 3, final="sample"),
    "systematic": stars.ParticleFilter(4, 0.8, 3, "systematic"),
}
PROMPTS = [{"prompt_token_ids": ids(length, 11, seed=length)} for length in (9, 5, 14)]


def params(max_tokens: int = 17, n: int = 2, seed: int = 7, **given) -> stars.SamplingParams:
    return stars.SamplingParams(max_tokens=max_tokens, n=n, seed=seed, **given)


def facts(output: stars.RequestOutput) -> list[tuple]:
    """What must not depend on how a request was run."""
    return [(one.token_ids, one.finish_reason, None if one.reward is None else round(one.reward, 3),
             [segment.token_ids for segment in one.segments]) for one in output.outputs]


def finish(engine: stars.Engine) -> dict[str, stars.RequestOutput]:
    """Steps to the end, through interrupts."""
    last: dict[str, stars.RequestOutput] = {}
    while engine.has_unfinished_requests():
        try:
            for output in engine.step():
                for old, new in zip(last.get(output.request_id, output).outputs, output.outputs, strict=True):
                    assert new.token_ids[: len(old.token_ids)] == old.token_ids, "text was taken back"
                last[output.request_id] = output
        except KeyboardInterrupt:
            pass
        engine.check_integrity()
    nothing_is_held(engine)
    assert all(one.error is None for output in last.values() for one in output.outputs)
    return last


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("causal", [True, False], ids=["reward model", "function"])
def test_interrupted_short_of_pages_or_in_company_the_text_is_the_same(name, causal):
    """Alone and at once; in caches that hold little more than one of three requests; and where every third commit,
    every other fork and some passes are interrupted."""
    wanted = [facts(breeding_engine(causal).generate(prompt, params(), ROWS[name], use_tqdm=False)[0])
              for prompt in PROMPTS]
    engine = breeding_engine(causal, cache_tokens=192, max_num_lanes=16, page_size=4)
    names = [engine.add_request(prompt, params(), ROWS[name]) for prompt in PROMPTS]
    got = finish(engine)
    assert [facts(got[name]) for name in names] == wanted
    engine = breeding_engine(causal, max_num_lanes=9)
    calls = {}
    for holder, method, every in ((engine._cache, "fork", 2), (engine._cache, "commit", 3),
                                  (engine.reward, "fork", 3), (engine.reward, "score", 7),
                                  (engine._round, "close", 4)):
        def interrupted(*given, right=getattr(holder, method), key=(holder, method), every=every, **named):
            calls[key] = calls.get(key, 0) + 1
            if calls[key] % every == 0 and calls[key] < 12:
                raise KeyboardInterrupt
            return right(*given, **named)

        setattr(holder, method, interrupted)
    names = [engine.add_request(prompt, params(), ROWS[name]) for prompt in PROMPTS]
    got = finish(engine)
    assert sum(calls.values()) > 10
    assert [facts(got[name]) for name in names] == wanted


# -- whole responses that are drawn as they are wanted ------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 8, None])
@pytest.mark.parametrize("seqs", [16, 2])
def test_whole_responses_are_drawn_as_they_are_wanted(width, seqs):
    """At most `width` beyond what is decided; the text and what was judged up to the winner are the same at any."""
    policy = stars.RejectionSampling(2.5, 0.5, 9, width)
    prompt, given = PROMPTS[0], params(max_tokens=40, n=3)
    [one_by_one] = breeding_engine(False).generate(prompt, given, stars.RejectionSampling(2.5, 0.5, 9, 1),
                                                   use_tqdm=False)
    engine = breeding_engine(False, max_num_seqs=seqs)
    engine.add_request(prompt, given, policy)
    launch, most = engine._round.proposer.launch, []

    def counted(active):
        for group in {one.group for one in active}:
            members = [one for one in active if one.group is group]
            most.append(len(members))
            assert width is None or all(one.slot < len(group.judgeable) + width for one in members)
        return launch(active)

    engine._round.proposer.launch = counted
    last = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            last = output
        engine.check_integrity()
    nothing_is_held(engine)
    assert facts(last) == facts(one_by_one)
    for one, other in zip(last.outputs, one_by_one.outputs, strict=True):
        [segment], [alone] = one.segments, other.segments
        assert segment.winner == alone.winner and segment.accepted == alone.accepted
        assert segment.attempts[: segment.winner + 1] == alone.attempts[: segment.winner + 1]
        assert one.metrics.attempts_counted == other.metrics.attempts_counted
        assert other.metrics.attempts == len(alone.attempts) <= one.metrics.attempts
    winners = [segment.winner for one in one_by_one.outputs for segment in one.segments]
    assert max(winners) > 1 and one_by_one.metrics.attempts < 27, "nothing was spared"
    if width is not None:
        assert max(most) == min(width, seqs)


def test_a_reward_that_fails_beyond_the_winner_changes_nothing():
    """It was asked for nothing; before the winner it ends the request, at any width."""
    prompt, given = PROMPTS[0], params(max_tokens=30, n=1)
    [output] = breeding_engine(False).generate(prompt, given, stars.RejectionSampling(2.5, 0.5, 9, 1), use_tqdm=False)
    [segment] = output.outputs[0].segments
    [ahead] = breeding_engine(False).generate(prompt, given, stars.RejectionSampling(math.inf, 0.5, 9, 9),
                                              use_tqdm=False)
    everything = [attempt.token_ids for attempt in ahead.outputs[0].segments[0].attempts]
    winner = segment.winner
    assert 0 < winner < 8 and everything[winner] == output.outputs[0].token_ids
    beyond = next(index for index in range(winner + 1, 9) if everything[index] not in everything[:winner + 1])
    for bad, width in ((beyond, 9), (winner - 1, 1), (winner - 1, 9)):
        def reward(prompt, responses, bad=bad):
            return [math.nan if response == [t for t in everything[bad] if t] else TABLE(response)
                    for response in responses]

        engine = toy_engine(LM, stars.FunctionReward(reward, inputs="ids"))
        engine.add_request(prompt, given, stars.RejectionSampling(2.5, 0.5, 9, width))
        while engine.has_unfinished_requests():
            outputs = engine.step()
        nothing_is_held(engine)
        [got] = outputs[0].outputs
        if bad > winner:
            assert (got.token_ids, got.error) == (output.outputs[0].token_ids, None)
        else:
            assert got.finish_reason == "error" and "nan" in got.error.lower() and not got.token_ids


@pytest.mark.parametrize("exhaust, wanted", [("best_seen", None), ("first", 0), ("last", 3), ("refuse", -1)])
@pytest.mark.parametrize("width", [1, 3])
def test_what_is_kept_of_whole_responses_that_are_all_rejected(exhaust, wanted, width):
    policy = stars.RejectionSampling(math.inf, 0.5, 4, width, exhaust)
    [output] = breeding_engine(False).generate(PROMPTS[0], params(n=1), policy, use_tqdm=False)
    [one] = output.outputs
    if wanted == -1:
        assert one.finish_reason == "refused" and one.token_ids == [] and not one.segments
        return
    [segment] = one.segments
    rewards = [attempt.reward for attempt in segment.attempts]
    assert len(rewards) == 4 and not segment.accepted
    assert segment.winner == (rewards.index(max(rewards)) if wanted is None else wanted)
    assert (one.metrics.fallbacks, one.metrics.attempts_counted) == (1, 4)


def test_a_threshold_that_is_relaxed_takes_the_first_that_passes():
    """By as much as it is relaxed, and with the numbers that each was tested with."""
    [hard] = breeding_engine(False).generate(PROMPTS[0], params(n=1), stars.RejectionSampling(
        math.inf, 0.0, 6, 2), use_tqdm=False)
    rewards = [attempt.reward for attempt in hard.outputs[0].segments[0].attempts]
    top = max(rewards)
    [output] = breeding_engine(False).generate(PROMPTS[0], params(n=1), stars.RejectionSampling(
        top + 0.5, 0.0, 6, 2, stars.exhaustions.Relax(by=1.0, times=3)), use_tqdm=False)
    [segment] = output.outputs[0].segments
    assert segment.winner == next(index for index, reward in enumerate(rewards) if reward >= top - 0.5)
    assert segment.accepted and segment.threshold == top - 0.5


# -- what a rule says in the end ----------------------------------------------------------------------------------


class Chooses(Always):
    """Keeps everything, and of responses that have ended the worst."""

    group_uniforms = 3

    def __init__(self):
        self.seen: list[tuple[Sequence[Judged], State]] = []

    def final(self, judged: Sequence[Judged], state: State) -> Decision:
        self.seen.append((judged, state))
        worst = min(judged, key=lambda one: one.reward)
        return Decision([whole(worst)], [slot for slot in state.live if slot != worst.hypothesis])


@pytest.mark.parametrize("segment", [Fixed(3), Whole(3)])
def test_a_rule_says_which_of_several_responses_is_the_completion(segment):
    rule = Chooses()
    fixed = isinstance(segment, Fixed)
    plan = Plan(Sampled(), segment, Lanes(1, population=4), Score("segment" if fixed else "end"), rule)
    engine = breeding_engine(False)
    [output] = engine.generate(PROMPTS[0], params(n=2), Planned(plan), use_tqdm=False)
    nothing_is_held(engine)
    assert len(rule.seen) == 2
    by_reward = {min(one.reward for one in judged): (judged, state) for judged, state in rule.seen}
    for one in output.outputs:
        judged, state = by_reward[one.reward]
        assert [each.attempt for each in judged] == [EARLIER if fixed else 1] * 4 and len(state.live) == 4
        assert one.error is None and one.metrics.attempts >= 4 and state.segment >= len(one.segments) >= 1
        assert list(state.uniforms) == oracle.uniforms(7, 3, 0, MAX_ATTEMPT, 3, state.segment, 4 * one.index).tolist()


def test_a_final_choice_at_fault_is_named():
    class Naughty(Chooses):
        def final(self, judged: Sequence[Judged], state: State) -> Decision:
            return Decision([whole(judged[0])])

    plan = Plan(Sampled(), Fixed(3), Lanes(1, population=3), Score("segment"), Naughty())
    engine = breeding_engine(False)
    with pytest.warns(UserWarning, match="1 of 2 requests ended with an error"):
        bad, good = engine.generate(PROMPTS[:2], params(n=1), [Planned(plan), ROWS["beam"]], use_tqdm=False)
    assert bad.outputs[0].error == "the rule Naughty leaves hypothesis 1 neither kept nor dropped: mend the rule"
    assert good.outputs[0].error is None
    nothing_is_held(engine)


# -- in step ------------------------------------------------------------------------------------------------------


def test_with_a_barrier_responses_stay_in_step():
    """No response begins a segment while another one is at its own; each text is that of width 1, and a request
    without a barrier goes on meanwhile."""
    policies = [stars.STARS(3, 5, 1.0, 0.5, 2.5, barrier=True)] * 3 + [stars.STARS(3, 5, 1.0, 0.5, 2.5, width=1)]
    prompts = [*PROMPTS, PROMPTS[0]]
    engine = breeding_engine(max_num_lanes=32)
    names = [engine.add_request(prompt, params(30, ignore_eos=True), policy)
             for prompt, policy in zip(prompts, policies, strict=True)]
    groups = {(request.request_id, group.index): group for request in engine._requests.values()
              for group in request.groups}
    in_step = [group for (name, _), group in groups.items() if name != names[-1]]
    last, rounds, ahead, waited = {}, 0, 0, 0
    while engine.has_unfinished_requests():
        before = {id(group): len(group.hypotheses[0].segments) for group in in_step}
        at_work = [group for group in in_step if not group.finished]
        undecided = [group for group in at_work if group.undecided]
        drawn = {id(group): group.hypotheses[0].metrics.attempts for group in in_step}
        for output in engine.step():
            last[output.request_id] = output
        rounds += 1
        for group in at_work:
            new = group.hypotheses[0].metrics.attempts - drawn[id(group)]
            assert new == (1 if not undecided or group in undecided else 0), "one candidate a round, or it waits"
            waited += not new
        assert len({before[id(group)] for group in at_work}) <= 2
        free = groups[names[-1], 0].hypotheses[0]
        ahead += bool(at_work) and len(free.segments) > max(before[id(group)] for group in at_work)
    nothing_is_held(engine)
    assert waited > 10 and ahead > 3
    wanted = breeding_engine(max_num_lanes=32).generate(
        prompts, params(30, ignore_eos=True), stars.STARS(3, 5, 1.0, 0.5, 2.5, width=1), use_tqdm=False)
    assert [facts(last[name]) for name in names] == [facts(output) for output in wanted]
    for name, other in zip(names, wanted, strict=True):
        assert [[len(segment.attempts) for segment in one.segments] for one in last[name].outputs] == [
            [len(segment.attempts) for segment in one.segments] for one in other.outputs]


# -- rewards that come later --------------------------------------------------------------------------------------


class Later(stars.FunctionReward):
    """Answers of its own thread, in another order than they were asked for."""

    def score(self, candidates):
        results = super().score(candidates)
        futures = [Future() for _ in results]
        for future, result in zip(futures, results, strict=True):
            delay = 0.001 * (int(sum(map(ord, repr(result.reward)))) % 5)
            threading.Timer(delay, lambda future=future, result=result: (
                future.set_running_or_notify_cancel() and future.set_result(result.reward))).start()
        return [result._replace(reward=future) for future, result in zip(futures, results, strict=True)]


@pytest.mark.parametrize("name", [*ROWS, "in step"])
def test_rewards_that_come_later_change_nothing(name):
    """Whoever is dropped while its reward is still to come gives everything back."""
    policy = ROWS.get(name, stars.STARS(3, 5, 1.0, 0.5, 2.5, barrier=True))
    wanted = [facts(breeding_engine(False).generate(prompt, params(), policy, use_tqdm=False)[0]) for prompt in PROMPTS]
    engine = toy_engine(LM, Later(lambda prompt, responses: [TABLE(one) for one in responses], inputs="ids"))
    names = [engine.add_request(prompt, params(), policy) for prompt in PROMPTS]
    got = finish(engine)
    assert [facts(got[name]) for name in names] == wanted
