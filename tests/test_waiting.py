"""Rewards that come later: who waits for one stands still with what it holds, everybody else goes on, and the texts are
those of a reward that answers at once, at any timing."""

from __future__ import annotations

import gc
import math
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future

import pytest

import stars
import stars.engine
from stars.errors import RewardError
from test_conservation import nothing_is_held
from test_methods_outside import Breed
from toy import ToyModel, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LM = ToyModel(vocab=5, seed=1, layers=1, positions=96)
RM = ToyModel(vocab=5, seed=3, layers=1, positions=96, head="reward", sharpness=1.5)
REWARD = table_reward(seed=3)
NARROW = stars.STARS(4, 6, 0.5, 0.3, 1.0, width=1)
WIDE = stars.STARS(4, 9, 0.5, 0.3, 1.0, width=8)
POLICIES = [
    NARROW, WIDE, stars.Sample(score=True), stars.BestOfN(3), stars.BlockwiseBestOfK(4, 5), stars.Sample(), Breed(),
    stars.RejectionSampling(4.0, 0.3, 5, width=3), stars.STARS(4, 2, 0.5, 0.0, 3.0, width=2, exhaust="back_up:2"),
    stars.SpeculativeRejection(3, 0.4, 4), stars.SegmentBeam(2, 2, 4), stars.ParticleFilter(3, 0.5, 4),
    stars.STARS(4, 3, 0.5, 0.3, 2.0, barrier=True, exhaust="softmax:0.5")]
COUNT = 26
PROMPTS = [{"prompt_token_ids": ids(5 + index % 4, seed=index)} for index in range(COUNT)]
PARAMS = [stars.SamplingParams(max_tokens=18, seed=index, n=1 + index // 2 % 3, ignore_eos=index % 3 == 0)
          for index in range(COUNT)]
EACH = [POLICIES[index % len(POLICIES)] for index in range(COUNT)]


def rewards(prompt, responses):
    return [REWARD(response) for response in responses]


def called(fn=rewards, **options) -> stars.FunctionReward:
    return stars.FunctionReward(fn, inputs="ids", **options)


class Late:
    """Mixed into a reward: what it says comes when `settle` is called, in an order of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pending: list[tuple[Future, float | RewardError]] = []
        self.random = random.Random(0)

    def score(self, candidates):
        results = super().score(candidates)
        futures = [Future() for _ in results]
        self.pending += [(future, result.reward) for future, result in zip(futures, results, strict=True)]
        return [result._replace(reward=future) for result, future in zip(results, futures, strict=True)]

    def score_trailing(self, draft, candidates):
        return None

    def score_ahead(self, candidates):
        return None

    def settle(self, *awaited):
        """One answer that somebody waits for, and perhaps a few that nobody does any more."""
        while self.pending:
            future, reward = self.pending.pop(self.random.randrange(len(self.pending)))
            if future.set_running_or_notify_cancel():
                future.set_result(reward)
                return


class LateCausal(Late, stars.CausalReward):
    pass


class LateFunction(Late, stars.FunctionReward):
    pass


def late_engine(monkeypatch, reward, **options) -> stars.Engine:
    """An engine whose rewards come where it has nothing else to do, and at random besides."""
    engine = toy_engine(LM, reward, **options)
    run = engine._round.run

    def running(groups):
        if reward.random.random() < 0.5:
            reward.settle()
        return run(groups)

    engine._round.run = running
    monkeypatch.setattr(stars.engine, "pause", reward.settle)
    return engine


def kept(output) -> tuple:
    """What must not depend on when a reward comes: all but the attempts after a winner, and last bits of sums."""
    def near(reward):
        return None if reward is None else round(reward, 3)

    free = isinstance(output.policy, (stars.STARS, stars.RejectionSampling))  # draws more where there is room
    return near(output.prompt_reward), None if free else output.metrics.lm_tokens_drawn, [
        (one.token_ids, one.finish_reason, one.error, near(one.reward),
         [(segment.token_ids, near(segment.reward), segment.accepted, segment.winner,
           [attempt.token_ids for attempt in segment.attempts[: segment.winner + 1]]) for segment in one.segments])
        for one in output.outputs]


def texts(engine, prompts=PROMPTS, params=PARAMS, policies=EACH) -> list:
    outputs = engine.generate(prompts, params, policies, use_tqdm=False)
    nothing_is_held(engine)
    return [kept(output) for output in outputs]


@pytest.fixture(scope="module")
def whole() -> dict[str, list]:
    """The texts under rewards that answer at once."""
    return {"function": texts(toy_engine(LM, called())),
            "causal": texts(toy_engine(LM, stars.CausalReward(RM.decoder())))}


@pytest.mark.parametrize("sizes", [{}, {"max_num_lanes": 8, "max_num_seqs": 8}, {"max_num_lanes": 3, "max_num_seqs": 3},
                                   {"cache_tokens": 88, "max_num_seqs": 8, "max_num_lanes": 8}])
@pytest.mark.parametrize("kind", ["function", "causal"])
def test_the_texts_are_the_same(monkeypatch, whole, kind, sizes):
    """With room, with too few slabs for all lanes, and where pages run out while responses wait."""
    reward = LateFunction(rewards, "ids") if kind == "function" else LateCausal(RM.decoder())
    engine = late_engine(monkeypatch, reward, **sizes)
    pre_empted = []
    preempt = engine._scheduler._preempt

    def noting(unit):
        pre_empted.append(any(one.wait is not None for one in unit.unfinished))
        preempt(unit)

    engine._scheduler._preempt = noting
    assert texts(engine) == whole[kind]
    assert ("cache_tokens" in sizes) == any(pre_empted)


def test_the_texts_are_the_same_from_threads(whole):
    """Of callables that take up to 3 ms, many at once."""
    delays = random.Random(4)

    def slow(prompt, responses):
        time.sleep(delays.random() * 3e-3)
        return rewards(prompt, responses)

    assert texts(toy_engine(LM, called(slow, blocking=True, max_workers=5))) == whole["function"]
    assert texts(toy_engine(LM, called(blocking=True, batch_size=2))) == whole["function"]


class Gate:
    """A callable that makes one prompt wait."""

    def __init__(self, prompt):
        self.prompt = prompt
        self.open = threading.Event()
        self.calls: list[int] = []  # tokens of the responses that were asked about, of the slow prompt

    def __call__(self, prompt, responses):
        if prompt == self.prompt:
            self.calls.append(max(map(len, responses)))
            assert self.open.wait(30)
        return rewards(prompt, responses)


SLOW, QUICK = {"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [2, 2, 2, 3]}


@pytest.mark.parametrize("policy", [
    NARROW, WIDE, stars.STARS(4, 9, 1.0, 0.3, 1.0, width=8), stars.Sample(score=True), stars.BestOfN(3),
    stars.BlockwiseBestOfK(4, 5)], ids=["r(prompt)", "wide", "alpha=1", "sample", "best-of-n", "blockwise"])
def test_others_finish_while_one_waits(policy):
    """Whole responses of others are done before the first answer for the slow prompt, whatever it is asked for."""
    params = stars.SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    expected = [kept(output) for output in toy_engine(LM, called()).generate([SLOW, QUICK], params, policy,
                                                                             use_tqdm=False)]
    gate = Gate([1, 2, 3])
    engine = toy_engine(LM, called(gate, blocking=True))
    slow, quick = (engine.add_request(prompt, params, policy) for prompt in (SLOW, QUICK))
    done = {}
    while quick not in done:
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
        assert slow not in done
    waiting = len(gate.calls)
    assert waiting == (3 if policy == stars.BestOfN(3) else 1), "it is asked for once, and nothing of it goes on"
    for _ in range(3):  # all that runs waits
        assert engine.step() == [] and len(gate.calls) == waiting
        engine.check_integrity()
    gate.open.set()
    while slow not in done:
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert [kept(done[one]) for one in (slow, quick)] == expected
    nothing_is_held(engine)


def test_newcomers_draw_while_a_wide_one_holds_its_lanes():
    """As many lanes as there are wait. What is left is a slab for each response that may come. These keep their best,
    so that one of three draws at a time and the others wait for slabs: all of them end."""
    gate = Gate([1, 2, 3])
    engine = toy_engine(LM, called(gate, blocking=True), max_num_lanes=4, max_num_seqs=4)
    policy = stars.STARS(4, 6, 1.0, 0.0, 90.0, width=8)  # all are rejected
    params = stars.SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    slow = engine.add_request(SLOW, params, policy)
    engine.step()
    assert engine._cache.num_free_slabs == 4
    others = [engine.add_request(QUICK, params, policy) for _ in range(3)]
    done, fewest = {}, 4
    while len(done) < 3:
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
        fewest = min(fewest, engine._cache.num_free_slabs)
    assert fewest == 0 and len(gate.calls) == 1 and set(done) == set(others)
    assert all(len(segment.attempts) == 6 for output in done.values() for segment in output.outputs[0].segments)
    assert engine._cache.num_free_slabs == 4 and engine.abort(slow)
    gate.open.set()
    engine.step()
    nothing_is_held(engine)


def test_one_abort_while_it_waits_and_one_that_never_gets_an_answer():
    asked = []

    class Never(stars.FunctionReward):
        def score(self, candidates):
            results = [result._replace(reward=Future()) for result in super().score(candidates)]
            asked.extend(result.reward for result in results)
            return results

    for policy in POLICIES:
        if policy == stars.Sample():
            continue
        engine = toy_engine(LM, Never(rewards, "ids"))
        asked.clear()
        request = engine.add_request(SLOW, stars.SamplingParams(max_tokens=8, n=2, seed=1, ignore_eos=True), policy)
        for _ in range(3):
            assert not any(output.finished for output in engine.step())
            engine.check_integrity()
        assert asked and not any(future.cancelled() for future in asked)
        assert engine.abort(request) and all(future.cancelled() for future in asked)
        [output] = engine.step()
        assert {one.finish_reason for one in output.outputs} == {"abort"} and not engine._round.awaited()
        nothing_is_held(engine)


@pytest.mark.parametrize("kind", ["function", "causal"])
def test_interrupts_while_others_wait(monkeypatch, whole, kind):
    """What they waited for is forgotten and asked for again; late answers touch nothing."""
    reward = LateFunction(rewards, "ids") if kind == "function" else LateCausal(RM.decoder())
    engine = late_engine(monkeypatch, reward)
    order = [engine.add_request(*each) for each in zip(PROMPTS[:13], PARAMS, EACH, strict=False)]
    chance, done, interrupts, waited = random.Random(7), {}, 0, 0
    holders = [(engine._round.drafter, "launch"), (engine._cache, "commit"), (engine._round._judge, "decide"),
               (engine._round._judge, "take_ended"), (engine._scheduler, "reserve")]
    while engine.has_unfinished_requests():
        holder, name = chance.choice(holders)
        if chance.random() < 0.12:
            def interrupted(*args):
                raise KeyboardInterrupt
            setattr(holder, name, interrupted)
        before = [future for future, _ in reward.pending if not future.done()] if name in vars(holder) else []
        try:
            done |= {output.request_id: output for output in engine.step() if output.finished}
        except KeyboardInterrupt:
            interrupts += 1
            engine.check_integrity()
            waited += len(before)
            assert all(future.done() for future in before), "they are cancelled"
        vars(holder).pop(name, None)
        engine.check_integrity()
    assert [kept(done[request]) for request in order] == whole[kind][:13] and interrupts >= 5 and waited >= 5
    nothing_is_held(engine)


def test_generate_waits_without_spinning_and_can_be_interrupted(monkeypatch):
    gate = Gate([1, 2, 3])
    engine = toy_engine(LM, called(gate, blocking=True))
    advances = []
    advance = engine._advance
    monkeypatch.setattr(engine, "_advance", lambda: advances.append(1) or advance())
    timer = threading.Timer(0.4, gate.open.set)
    timer.start()
    [output] = engine.generate([SLOW], stars.SamplingParams(max_tokens=4, seed=1, ignore_eos=True),
                               stars.Sample(score=True), use_tqdm=False)
    assert output.outputs[0].reward is not None and 3 <= len(advances) <= 14
    gate.open.clear()

    def pause(awaited, until):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stars.engine, "pause", pause)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([SLOW], stars.SamplingParams(max_tokens=4, seed=1), stars.Sample(score=True),
                            use_tqdm=False)
    nothing_is_held(engine)
    gate.open.set()


def test_other_threads_get_their_turn_while_one_waits():
    """A request of another thread is done, and one is aborted by another, while `generate` waits in this one."""
    gate = Gate([1, 2, 3])
    engine = toy_engine(LM, called(gate, blocking=True))
    params = stars.SamplingParams(max_tokens=8, seed=2, ignore_eos=True)
    results = {}

    def slow():
        results["slow"] = engine.generate([SLOW], params, NARROW, use_tqdm=False)[0]

    thread = threading.Thread(target=slow, daemon=True)
    thread.start()
    while not gate.calls:
        time.sleep(1e-3)
    [quick] = engine.generate([QUICK], params, NARROW, use_tqdm=False)
    [streamed] = list(engine.stream(QUICK, params, NARROW))[-1:]
    assert quick.outputs[0].token_ids == streamed.outputs[0].token_ids and "slow" not in results
    [request] = engine._requests
    assert engine.abort(request)
    thread.join(20)
    assert results["slow"].outputs[0].finish_reason == "abort" and not gate.open.is_set()
    nothing_is_held(engine)
    gate.open.set()


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [NARROW, stars.Sample(score=True), stars.BestOfN(3), stars.BlockwiseBestOfK(4, 4)])
def test_a_fault_that_comes_later_ends_its_request_and_no_other(policy):
    """With the text that is committed, as a fault that comes at once does."""
    def broken(prompt, responses):
        if prompt == [1, 2, 3] and max(map(len, responses)) > 8:
            raise OSError("the line is dead")
        return rewards(prompt, responses)

    params = stars.SamplingParams(max_tokens=16, seed=3, ignore_eos=True)
    runs = [toy_engine(LM, called(broken, **options)).generate([SLOW, QUICK], params, policy, use_tqdm=False)
            for options in ({}, {"blocking": True})]
    (slow, quick), (late, other) = runs
    assert kept(late) == kept(slow) and kept(other) == kept(quick)
    [one] = late.outputs
    assert one.finish_reason == "error" and "the line is dead" in one.error
    assert (len(one.token_ids) == 8) == (policy in (NARROW, stars.BlockwiseBestOfK(4, 4)))
    assert other.outputs[0].finish_reason == "length"


def test_faults_after_the_winner_are_discarded():
    """Which lane wins must not depend on the width, nor on what could not be scored behind it."""
    policy = stars.STARS(4, 8, 1.0, 0.0, -50.0, width=8)  # the first is always accepted

    def second_is_broken(prompt, responses):
        return [REWARD(responses[0]), *[float("nan")] * (len(responses) - 1)]

    params = stars.SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    engine = toy_engine(LM, called(second_is_broken, blocking=True))
    [output] = engine.generate([SLOW], params, policy, use_tqdm=False)
    assert output.outputs[0].finish_reason == "length" and output.outputs[0].error is None
    nothing_is_held(engine)


def test_a_prompt_whose_reward_is_late_and_bad():
    def bad(prompt, responses):
        return [float("-inf") if prompt == [1, 2, 3] and not response else REWARD(response) for response in responses]

    engine = toy_engine(LM, called(bad, blocking=True))
    slow, quick = engine.generate([SLOW, QUICK], stars.SamplingParams(max_tokens=8, seed=1, n=2, ignore_eos=True),
                                  NARROW, use_tqdm=False)
    assert {one.finish_reason for one in slow.outputs} == {"error"} and "alpha=1" in slow.outputs[0].error
    assert {one.finish_reason for one in quick.outputs} == {"length"}
    nothing_is_held(engine)


def test_a_future_that_breaks_its_word_is_an_error():
    class Liar(stars.FunctionReward):
        def score(self, candidates):
            results = []
            for candidate, result in zip(candidates, super().score(candidates), strict=True):
                future = Future()
                if candidate.session.prompt != [1, 2, 3]:
                    future.set_result(result.reward)
                elif lie == "raise":
                    future.set_exception(SystemExit(3))
                elif lie == "cancel":
                    future.cancel()
                else:
                    future.set_result(float("nan"))
                results.append(result._replace(reward=future))
            return results

    for lie, word in (("raise", "SystemExit"), ("cancel", "CancelledError"), ("nan", "NaN")):
        engine = toy_engine(LM, Liar(rewards, "ids"))
        slow, quick = engine.generate([SLOW, QUICK], stars.SamplingParams(max_tokens=8, seed=1, ignore_eos=True),
                                      stars.Sample(score=True), use_tqdm=False)
        assert slow.outputs[0].finish_reason == "error" and word in slow.outputs[0].error
        assert quick.outputs[0].finish_reason == "length"
        nothing_is_held(engine)


@pytest.mark.rounds_raise
def test_a_round_that_raises_while_others_wait(monkeypatch):
    """Each completion is run by itself, and who fails alone ends; who waits is asked about again."""
    reward = LateFunction(rewards, "ids")
    engine = late_engine(monkeypatch, reward)
    params = stars.SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    order = [engine.add_request(prompt, params, policy) for prompt, policy in
             ((SLOW, WIDE), (QUICK, stars.BlockwiseBestOfK(4, 5)), (PROMPTS[5], stars.BestOfN(2)))]
    decide, rounds, done = engine._round._judge.decide, [], {}

    def deciding(groups, drawn, answered=()):
        rounds.append(1)
        if len(rounds) > 2 and any(group.request.request_id == order[1] for group in groups):
            raise RuntimeError("a defect")
        return decide(groups, drawn, answered)

    engine._round._judge.decide = deciding
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
    assert [done[one].outputs[0].finish_reason for one in order] == ["length", "error", "length"]
    nothing_is_held(engine)


@pytest.mark.rounds_raise
def test_rounds_that_always_raise_together_still_end(monkeypatch):
    """Whoever is run by itself gets its answers, or the same rewards would be asked for again for ever."""
    reward = LateFunction(rewards, "ids")
    engine = late_engine(monkeypatch, reward)
    commit, policies = engine._round._commit, [WIDE, stars.BlockwiseBestOfK(4, 5), NARROW, stars.BestOfN(2)]
    expected = texts(toy_engine(LM, called()), PROMPTS[:4], PARAMS[:4], policies)
    raised = []

    def committing(groups, *others):
        if len(groups) > 1:
            raised.append(1)
            raise RuntimeError("no two of them fit")
        commit(groups, *others)

    engine._round._commit = committing
    assert texts(engine, PROMPTS[:4], PARAMS[:4], policies) == expected and len(raised) >= 2


# -- the threads --------------------------------------------------------------------------------------------------


def test_bad_arguments():
    for options, sentence in (({"blocking": "yes"}, "FunctionReward.blocking"), ({"max_workers": 0}, "max_workers"),
                              ({"max_workers": 2.5}, "max_workers")):
        with pytest.raises(RewardError, match=sentence):
            called(**options)


def test_no_more_calls_at_once_than_workers():
    lock, at_once, most = threading.Lock(), [0], [0]

    def counting(prompt, responses):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(2e-3)
        with lock:
            at_once[0] -= 1
        return rewards(prompt, responses)

    engine = toy_engine(LM, called(counting, blocking=True, max_workers=3))
    engine.generate([QUICK] * 8, stars.SamplingParams(max_tokens=8, seed=1), NARROW, use_tqdm=False)
    assert most == [3]


def test_threads_end_with_the_engine():
    def threads() -> int:
        return sum(thread.name == "stars-reward" for thread in threading.enumerate())

    def watched(prompt, responses):
        return rewards(prompt, responses)

    gc.collect()
    before = threads()
    engine = toy_engine(LM, called(watched, blocking=True))
    engine.generate([QUICK] * 3, stars.SamplingParams(max_tokens=8, seed=1), NARROW, use_tqdm=False)
    assert threads() > before
    gone = weakref.ref(watched)
    del engine, watched
    end = time.monotonic() + 10
    while time.monotonic() < end and (threads() > before or gone() is not None):
        gc.collect()
        time.sleep(0.01)
    assert threads() <= before and gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_has_threads_of_its_own():
    reward = called(blocking=True)
    engine = toy_engine(LM, reward)
    params = stars.SamplingParams(max_tokens=8, seed=1)
    [before] = engine.generate([QUICK], params, NARROW, use_tqdm=False)
    child = os.fork()
    if not child:
        [output] = engine.generate([QUICK], params, NARROW, use_tqdm=False)
        os._exit(0 if output.outputs[0].token_ids == before.outputs[0].token_ids else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_exits_while_a_call_is_under_way():
    """With an engine that waits, and a callable that would take a minute."""
    code = """
import sys, time
sys.path.insert(0, "tests")
import stars
from toy import ToyModel, toy_engine
def slow(prompt, responses):
    time.sleep(60)
    return [0.0] * len(responses)
engine = toy_engine(ToyModel(vocab=5, seed=1, layers=1), stars.FunctionReward(slow, inputs="ids", blocking=True))
engine.add_request({"prompt_token_ids": [1, 2]}, stars.SamplingParams(max_tokens=4), stars.STARS(reward_threshold=1.0))
engine.step()
engine.step()
print("done", flush=True)
"""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                          capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
    assert time.monotonic() - begin < 50


def test_a_request_that_fails_holds_nothing_of_its_completions_that_wait():
    """Both completions keep an attempt of their undecided segments; one's next reward is an error while the other's is
    to come, and in its round the other has no part."""
    reward = LateFunction(rewards, inputs="ids")
    engine = toy_engine(LM, reward)
    params = stars.SamplingParams(max_tokens=8, n=2, seed=1, ignore_eos=True)
    engine.add_request(PROMPTS[0], params, stars.STARS(4, 9, 1.0, 0.0, math.inf, width=1))
    while len(reward.pending) < 2:
        engine.step()
    reward.settle()
    reward.settle()
    while len(reward.pending) < 2:
        engine.step()
    members = [hypothesis for request in engine._requests.values() for hypothesis in request.hypotheses]
    assert all([one.preferred is not None and one.wait is not None for one in members])
    reward.pending[0][0].set_result(RewardError("no"))
    done = [output for output in engine.step() if output.finished]
    assert [one.finish_reason for one in done[0].outputs] == ["error"] * 2
    nothing_is_held(engine)
