"""Weighted sums of rewards: values, forks, pages of every part, faults of one part, and answers that come later."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future

import pytest

import stars
from building import PADDED, work_as
from stars.errors import OutOfPages
from stars.prompt import Prompt
from stars.reward.base import Candidate, ContextFull, Reward, Scored, settled, with_parts
from stars.reward.later import shared, when_all
from test_methods_outside import Breed
from toy import ToyModel, facts, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 2e-4  # of rewards, as in test_oracle.py
LM = ToyModel(vocab=7, seed=1, layers=1, positions=96)
FIRST, SECOND = (ToyModel(vocab=7, seed=seed, layers=1, positions=96, head="reward", sharpness=1.5) for seed in (3, 4))
TABLE = table_reward(seed=3)
WEIGHTS = (0.5, -1.25, 2.0)
PROMPTS = [{"prompt_token_ids": ids(length, 7, seed)} for seed, length in enumerate((9, 3, 14, 9))]
PARAMS = stars.SamplingParams(max_tokens=14, n=2, seed=5, ignore_eos=True)
ENDING = stars.SamplingParams(max_tokens=14, n=3, seed=5)
STARS = stars.STARS(segment_size=4, max_attempts=5, alpha=0.4, beta=0.4, reward_threshold=1.0, width=3)
POLICIES = [STARS, stars.BlockwiseBestOfK(k=3, segment_size=5), stars.BestOfN(n=3), stars.Sample(score=True), Breed()]


def by_table(prompt: list[int], responses: list[list[int]]) -> list[float]:
    return [TABLE(response) for response in responses]


def table_part() -> stars.FunctionReward:
    return stars.FunctionReward(by_table, inputs="ids")


def three(fn=by_table, **options) -> stars.WeightedReward:
    """Two models and a callable, the last two as a sum of their own."""
    inner = stars.WeightedReward([(stars.CausalReward(SECOND.decoder()), WEIGHTS[1]),
                                  (stars.FunctionReward(fn, inputs="ids", **options), WEIGHTS[2])])
    return stars.WeightedReward([(stars.CausalReward(FIRST.decoder()), WEIGHTS[0]), (inner, 1.0)])


def expected(prompt: list[int], response: list[int]) -> float:
    ids_ = prompt + response
    return WEIGHTS[0] * FIRST.reward(ids_) + WEIGHTS[1] * SECOND.reward(ids_) + WEIGHTS[2] * TABLE(response)


def content(response: list[int]) -> list[int]:
    return response[:-1] if response[-1:] == [0] else response


def generate(reward, policy=STARS, prompts=PROMPTS, params=PARAMS, **options) -> list[stars.RequestOutput]:
    engine = toy_engine(LM, reward, **options)
    outputs = engine.generate(prompts, params, policy, use_tqdm=False)
    all_free(engine)
    return outputs


def all_free(engine: stars.Engine) -> None:
    """Nothing is held in the cache of any part."""
    engine.check_integrity()
    caches = [part.cache for part in with_parts(engine.reward) if isinstance(part, stars.CausalReward)]
    for cache in [engine._cache, *caches]:
        assert cache.num_free_pages == cache.num_pages and cache.num_free_slabs == cache.num_slabs and not cache._tables


# -- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("params", [PARAMS, ENDING], ids=["whole length", "ending"])
def test_sums_are_those_of_whole_texts(policy, params):
    """Every reward of a run: through rounds, whole responses, forks, cuts and tokens that were not drafted."""
    compared = 0
    for output in generate(three(), policy, params=params):
        prompt = output.prompt_token_ids
        if output.prompt_reward is not None:
            assert output.prompt_reward == pytest.approx(expected(prompt, []), abs=TOLERANCE)
        for completion in output.outputs:
            assert completion.error is None
            response = content(completion.token_ids) if params is ENDING else completion.token_ids
            assert completion.reward == pytest.approx(expected(prompt, response), abs=TOLERANCE)
            before: list[int] = []
            for segment in completion.segments:
                if segment.reward is not None and policy != Breed():
                    for attempt in segment.attempts:
                        if attempt.reward is not None:
                            response = before + attempt.token_ids
                            wanted = expected(prompt, content(response) if params is ENDING else response)
                            assert attempt.reward == pytest.approx(wanted, abs=TOLERANCE)
                            compared += 1
                before += segment.token_ids
        assert 0 < output.metrics.rm_tokens_scored
    assert compared >= 8 or policy == Breed()


FEW_PAGES = {"cache_tokens": 80, "max_num_seqs": 8}


@pytest.mark.parametrize("policy, options", [
    *((policy, {}) for policy in POLICIES), (STARS, FEW_PAGES),
    (Breed(), FEW_PAGES | {"cache_tokens": 72}), (STARS, {"max_num_batched_tokens": 3})])
def test_halves_are_a_whole(policy, options):
    """One model at weight 1, and two of it at a half each, decode as the model alone, to the bit: also where responses
    give way and are taken up again, and where prompts are read in chunks."""
    def model() -> stars.CausalReward:
        return stars.CausalReward(FIRST.decoder())
    alone = generate(model(), policy, **options)
    assert "cache_tokens" not in options or sum(one.metrics.num_preemptions for one in alone)
    for pairs in ([(model(), 1.0)], [(model(), 0.5), (model(), 0.5)]):
        assert [facts(one) for one in generate(stars.WeightedReward(pairs), policy, **options)] == [
            facts(one) for one in alone]


@pytest.mark.parametrize("policy", [STARS, Breed()], ids=lambda policy: type(policy).__name__)
def test_a_sum_where_a_model_alone_would_score_after_its_draft(policy, monkeypatch):
    """As on a GPU, idle rows and tiles included: the host's way to the same texts."""
    work_as(monkeypatch, PADDED)

    def tokens(reward) -> list:
        return [[one.token_ids for one in output.outputs] for output in generate(reward, policy)]

    def model() -> stars.CausalReward:
        return stars.CausalReward(FIRST.decoder())
    assert tokens(stars.WeightedReward([(model(), 0.5), (model(), 0.5)])) == tokens(model())


def test_deterministic_sums():
    """The same text alone and in a batch, at any width."""
    def run(width: int, prompts) -> list:
        policy = stars.STARS(4, 5, 0.4, 0.4, 1.0, width)
        return [[one.token_ids for one in output.outputs] for output in generate(
            three(), policy, prompts, deterministic=True, max_num_batched_tokens=6)]
    together = run(3, PROMPTS)
    assert together == [run(1, [prompt])[0] for prompt in PROMPTS]


class Says(Reward):
    """A reward that says what it is told to."""

    def __init__(self, *rewards, handle=None):
        self.rewards, self.handle, self.gone = rewards, handle, []

    def open(self, prompt, max_tokens):
        return object()

    def score(self, candidates):
        return [Scored(reward, 2, 3, self.handle) for reward in self.rewards[: len(candidates)]]

    def discard(self, handle):
        self.gone.append(handle)


def sum_of(*pairs) -> float | stars.RewardError:
    reward = stars.WeightedReward([(Says(said), weight) for said, weight in pairs])
    session = reward.open(Prompt("x", [1], "x"), 4)
    [scored] = reward.score([Candidate(session, [1], None)])
    assert scored[1:] == (2 * len(pairs), 3 * len(pairs), None, ())
    return scored.reward


@pytest.mark.parametrize("pairs, total", [
    ([(2.0, 3.0), (-1.0, 0.5)], 5.5), ([(0.1, 1.0)] * 10, 1.0),  # no rounding on the way
    ([(-math.inf, 2.0), (1.0, 1.0)], -math.inf), ([(-math.inf, 0.0), (1.0, 1.0)], -math.inf),
    ([(-math.inf, -1.0), (1.0, 1.0)], -math.inf), ([(5.0, 0.0), (1, 1.0)], 1.0), ([(1e308, 1e-300), (2.0, 1)], 1e8 + 2),
])
def test_what_a_sum_is(pairs, total):
    assert sum_of(*pairs) == total


@pytest.mark.parametrize("pairs, problem", [
    ([(1.0, 1.0), (math.nan, 0.0)], r"^rewards\[1\] \(Says\): the reward is NaN"),
    ([(math.inf, 1.0), (-math.inf, 1.0)], r"^rewards\[0\] \(Says\): the reward is [+]inf"),
    ([(1.0, 1.0), (stars.RewardError("gone"), 0.0)], r"^rewards\[1\] \(Says\): gone$"),
    ([(1e308, 10.0), (1.0, 1.0)], "^the weighted sum of the rewards is too large for a float"),
    ([(1e308, 1.0), (1e308, 1.0)], "too large"), ([(1e308, 10.0), (-1e308, 10.0)], "too large"),
])
def test_what_is_no_sum(pairs, problem):
    error = sum_of(*pairs)
    assert type(error) is stars.RewardError
    with pytest.raises(stars.RewardError, match=problem):
        raise error


def test_a_full_context_comes_before_other_faults():
    """The response ends before the candidate, whatever else is the matter with it."""
    error = sum_of((stars.RewardError("gone"), 1.0), (ContextFull("too long"), 1.0))
    assert type(error) is ContextFull and str(error) == "rewards[1] (Says): too long"


@pytest.mark.parametrize("rewards, problem", [
    ([], "is .., it must be a list of"), (by_table, "it must be a list of"), ([by_table], r"rewards\[0\] is .* a pair"),
    ([(by_table, math.nan)], r"the weight of rewards\[0\] is nan, it must be a finite number"),
    ([(by_table, "1")], "finite number"), ([(by_table, True)], "finite number"), ([(None, 1.0)], "None where a reward"),
    ([(3.0, by_table)], "the weight of"), ([(3.0, 1.0)], "reward is float, it must be"),
    ([("no/such", 1.0)], "no/such is not a directory here"), ([(stars.FunctionReward, 1.0)], "is the class Function"),
])
def test_sums_that_are_none(rewards, problem):
    with pytest.raises(stars.RewardError, match=problem):
        stars.WeightedReward(rewards)


def test_a_reward_is_in_one_sum_once_and_in_one_engine():
    model = stars.CausalReward(FIRST.decoder())
    with pytest.raises(stars.RewardError, match="has one reward twice: give it once"):
        stars.WeightedReward([(model, 1.0), (stars.WeightedReward([(model, 1.0)]), 1.0)])
    first = toy_engine(LM, stars.WeightedReward([(model, 1.0)]))
    with pytest.raises(stars.RewardError, match="this CausalReward belongs to another engine"):
        toy_engine(LM, stars.WeightedReward([(table_part(), 1.0), (model, 1.0)]))
    assert first.generate(PROMPTS[0], PARAMS, STARS, use_tqdm=False)[0].finished
    both = stars.WeightedReward([(table_part(), 1.0)])
    assert [facts(one) for one in generate(both)] == [facts(one) for one in generate(both)]


def test_its_parts_are_shown():
    shown = repr(stars.WeightedReward([(stars.CachedReward(stars.RemoteReward("http://host")), 0.5)]))
    assert shown == ('WeightedReward([(CachedReward(RemoteReward("http://host:80/classify", model=None, '
                     'template="auto"), maxsize=4096; 0 texts, 0 hits, 0 misses), 0.5)])')


# -- faults of one part -------------------------------------------------------------------------------------------


REFUSED = PROMPTS[2]["prompt_token_ids"]


def refusing(told, name: str):
    """A method of a causal reward that refuses what has to do with one prompt."""
    def is_refused(asked) -> bool:
        return REFUSED in (getattr(asked, "token_ids", None), asked.frame.prefix if hasattr(asked, "frame") else None)

    def refuse(first, *args):
        if name == "score":
            return [scored._replace(reward=stars.RewardError("not today")) if is_refused(candidate.session) else scored
                    for candidate, scored in zip(first, told(first), strict=True)]
        if is_refused(first):
            raise stars.RewardError("not today")
        return told(first, *args)
    return refuse


@pytest.mark.rounds_raise
@pytest.mark.parametrize("name", ["check", "open", "score", "fork", "resume_in_chunks"])
def test_a_part_that_refuses_takes_nothing_along(name):
    """What the parts before it took is given back; its request ends, or is refused, with the part's name, and the
    others decode as ever."""
    reward, policy = three(), Breed() if name == "fork" else STARS
    part = reward.parts[1].parts[0]
    options = FEW_PAGES if name == "resume_in_chunks" else {}
    wanted = generate(three(), policy, **options)
    engine = toy_engine(LM, reward, **options)
    setattr(part, name, refusing(getattr(part, name), name))
    message = "rewards[1] (WeightedReward): rewards[0] (CausalReward): not today"
    if name == "check":
        with pytest.raises(stars.RequestError) as caught:
            engine.generate(PROMPTS, PARAMS, policy, use_tqdm=False)
        assert str(caught.value) == f"prompts[2]: {message}"
    else:
        with pytest.warns(UserWarning, match="1 of 4"):
            outputs = engine.generate(PROMPTS, PARAMS, policy, use_tqdm=False)
        assert {one.error for one in outputs.pop(2).outputs} == {message} and wanted.pop(2)
        assert [[one.token_ids for one in output.outputs] for output in outputs] == [
            [one.token_ids for one in output.outputs] for output in wanted]
    all_free(engine)


def test_a_session_that_one_part_cannot_open_is_none():
    """Whatever it raises, and even where another cannot close what it opened."""
    class Unwilling(Says):
        def open(self, prompt, max_tokens):
            raise OutOfPages(3, 2)

    class Stuck(Says):
        closed = 0

        def close(self, session):
            Stuck.closed += 1
            raise RuntimeError("stuck")
    reward = stars.WeightedReward([(Stuck(), 1.0), (Stuck(), 1.0), (Unwilling(), 1.0)])
    with pytest.raises(RuntimeError, match="stuck") as caught:
        reward.open(Prompt("x", [1], "x"), 4)
    assert Stuck.closed == 2 and isinstance(caught.value.__context__.__context__, OutOfPages)


@pytest.mark.parametrize("max_rows", [None, 3])
def test_a_response_is_taken_up_as_often_as_it_is_told(max_rows):
    """Each time by all parts: the pages of each hold it, and a part that was done is not asked again."""
    parts = [stars.CausalReward(model.decoder()) for model in (FIRST, SECOND)]
    engine = toy_engine(LM, stars.WeightedReward([(part, 1.0) for part in parts]), max_num_batched_tokens=max_rows)
    prompt = Prompt(None, PROMPTS[0]["prompt_token_ids"], None)
    session = engine.reward.open(prompt, 20)
    engine.reward.start([session])
    for length in (5, 11):
        response = ids(length, 7, seed=9)
        calls = [engine.reward.resume_in_chunks(session, response, None, max_rows)]
        while not calls[-1].done and len(calls) < 20:
            calls.append(engine.reward.resume_in_chunks(session, response, None, max_rows))
        rows = [one.rows for one in calls]
        lag = engine.config.target.reward_lag
        assert [own.committed for own in session.parts] == [(prompt.token_ids + response)[: 9 + length - lag]] * 2
        assert calls[-1].done and sum(rows) == 2 * (5 if length == 5 else 6)
        assert max(rows) <= (max_rows or 99)
    engine.reward.close(session)
    all_free(engine)


def test_handles_go_to_whom_they_are_from():
    parts = [Says(1.0, 2.0, handle="a"), Says(1.0, 2.0), Says(1.0, 2.0, handle="c")]
    reward = stars.WeightedReward([(part, 1.0) for part in parts])
    session = reward.open(Prompt("x", [1], "x"), 4)
    committed = []
    for part in parts:
        part.commit = lambda winners, part=part: committed.append((part, winners))
    first, second = reward.score([Candidate(session, [1], None)] * 2)
    assert first.handle == ("a", None, "c")
    reward.discard(first.handle)
    reward.discard(None)
    reward.commit([(session, second.handle)])
    assert [part.gone for part in parts] == [["a"], [], ["c"]]
    assert committed == [(parts[0], [(session.parts[0], "a")]), (parts[2], [(session.parts[2], "c")])]


@pytest.mark.parametrize("part, name", [
    *((0, name) for name in ("open", "score", "commit", "fork")),
    *((1, name) for name in ("open", "start_in_chunks", "score", "commit", "close", "reserve", "fork",
                             "resume_in_chunks"))])
def test_an_interrupt_in_a_part_loses_nothing(part, name):
    """The round never happened, in no part: the next call draws the same again."""
    def build() -> stars.Engine:
        rewards = [(stars.CausalReward(model.decoder()), 0.5) for model in (FIRST, SECOND)]
        engine = toy_engine(LM, stars.WeightedReward(rewards))
        for prompt in PROMPTS[:2]:
            engine.add_request(prompt, PARAMS, Breed())
        return engine

    def drain(engine: stars.Engine, done: dict) -> dict:
        while engine.has_unfinished_requests():
            done |= {output.request_id: [one.token_ids for one in output.outputs] for output in engine.step()}
        all_free(engine)
        return done
    wanted, found = drain(build(), {}), {}
    engine = build()
    holder = engine.reward.parts[part]
    told, calls, interrupts = getattr(holder, name), [0], [0]

    def interrupted(*args):
        calls[0] += 1
        if calls[0] in (2, 5):
            interrupts[0] += 1
            raise KeyboardInterrupt
        return told(*args)
    setattr(holder, name, interrupted)
    while engine.has_unfinished_requests():
        try:
            drain(engine, found)
        except KeyboardInterrupt:
            pass
    assert interrupts[0] >= 1 and found == wanted


# -- answers that come later --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [STARS, stars.BestOfN(n=3), Breed()], ids=lambda policy: type(policy).__name__)
def test_a_part_that_answers_later(policy):
    """The same texts, while the models' handles wait for a callable in a thread."""
    wanted = generate(three(), policy)

    def slow(prompt, responses):
        time.sleep(0.001)
        return by_table(prompt, responses)
    found = generate(three(slow, blocking=True), policy)
    assert [[one.token_ids for one in output.outputs] for output in found] == [
        [one.token_ids for one in output.outputs] for output in wanted]
    assert [[one.reward for one in output.outputs] for output in found] == [
        [pytest.approx(one.reward, abs=TOLERANCE) for one in output.outputs] for output in wanted]


def test_who_is_aborted_while_a_part_is_asked_holds_nothing():
    """The models' handles are given back, though their sum is not there yet; what it says later reaches nobody."""
    answer = threading.Event()

    def slow(prompt, responses):
        assert not any(responses) or answer.wait(20)  # r(prompt) is said at once
        return by_table(prompt, responses)
    engine = toy_engine(LM, three(slow, blocking=True))
    request = engine.add_request(PROMPTS[0], PARAMS, STARS)

    def slabs_out() -> list[int]:
        return [part.cache.num_slabs - part.cache.num_free_slabs for part in with_parts(engine.reward)
                if isinstance(part, stars.CausalReward)]
    end = time.monotonic() + 10.0
    while not any(slabs_out()) and time.monotonic() < end:
        engine.step()
    assert slabs_out() == [2 * 3] * 2  # of two responses, three lanes each
    assert engine.abort(request)
    all_free(engine)
    answer.set()
    again = engine.generate(PROMPTS, PARAMS, STARS, use_tqdm=False)
    assert [[one.token_ids for one in output.outputs] for output in again] == [
        [one.token_ids for one in output.outputs] for output in generate(three())]


def test_when_all():
    """There at once, or with the last; a Future's fault is told; to cancel the whole cancels the rest."""
    def total(rewards: list) -> float:
        return sum(rewards)
    there: Future = Future()
    there.set_result(2.0)
    assert when_all([1.0, 3.0], total) == 4.0
    later: Future = Future()
    result = when_all([1.0, there, later], total)
    assert not result.done()
    threading.Thread(target=later.set_result, args=(4.0,)).start()
    assert result.result(timeout=5) == 7.0
    wrong: Future = Future()
    result = when_all([1.0, wrong], total)
    wrong.set_result("good")
    assert "settled with what is no reward (TypeError" in str(result.result(timeout=5))
    raised: Future = Future()
    result = when_all([raised], lambda rewards: rewards[0])
    raised.set_exception(ValueError("no"))
    assert "it raised ValueError: no" in str(result.result(timeout=5))
    waiting = [Future(), Future()]
    result = when_all(waiting, total)
    assert result.cancel() and all(future.cancelled() for future in waiting)
    waiting = [Future(), Future()]
    result = when_all(waiting, lambda rewards: rewards[0])
    waiting[0].cancel()
    waiting[1].set_result(1.0)
    assert "CancelledError" in str(settled(result))


def test_shared():
    """Several are settled as one is; it is cancelled once all of them are."""
    one: Future = Future()
    first, second = shared(one, 2)
    assert first.cancel() and not one.cancelled()
    one.set_result(1.5)
    assert second.result(timeout=5) == 1.5 and first.cancelled()
    one = Future()
    results = shared(one, 2)
    assert all(result.cancel() for result in results) and one.cancelled()
