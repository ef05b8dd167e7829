"""A cache of rewards by exact text: the same results with fewer calls, and nothing kept that should not be."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import Future

import pytest

import stars
from reward_server import classify, hangs_up, reward_of, serving
from stars.prompt import Prompt, parse_prompt
from stars.reward.base import Candidate, Reward, Scored
from toy import ToyModel, facts, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LM = ToyModel(vocab=5, seed=1, layers=1, positions=96)
TABLE = table_reward(seed=3)
POLICY = stars.STARS(segment_size=2, max_attempts=8, alpha=0.4, beta=0.4, reward_threshold=1.0, width=4)


class Counting:
    """A callable that notes what it is asked for."""

    def __init__(self):
        self.texts: list = []

    def __call__(self, prompt, responses):
        self.texts += [(str(prompt), tuple(response)) for response in responses]
        return [TABLE(response) for response in responses]


def score(reward: Reward, prompt: Prompt, *texts: str) -> list:
    session = reward.open(prompt, 8)
    return [scored.reward for scored in reward.score([Candidate(session, list(map(ord, text)), text)
                                                      for text in texts])]


def given(prompt) -> Prompt:
    """A prompt as it was given; ids of its letters."""
    text = prompt if isinstance(prompt, str) else "rendered"
    return Prompt(prompt, list(map(ord, text)), text)


def lengths(maxsize: int = 99, needs_text: bool = True) -> tuple[stars.CachedReward, list]:
    """A cached length, and what it was asked for."""
    asked: list = []

    def length(prompt, responses):
        asked.append((prompt, list(responses)))
        return [float(len(response)) if response != "bad" else math.nan for response in responses]
    reward = stars.CachedReward(stars.FunctionReward(length, inputs="text" if needs_text else "ids"), maxsize)
    reward.needs_text = needs_text  # as `bind` says
    return reward, asked


@pytest.mark.parametrize("blocking", [False, True])
def test_the_same_results_of_fewer_calls(blocking):
    """Candidates of one token or two are often equal: each text is asked for once, by two engines together."""
    prompts = [{"prompt_token_ids": ids(6, seed=seed)} for seed in range(2)]
    params = stars.SamplingParams(max_tokens=4, n=8, seed=2)
    plain, counted = Counting(), Counting()
    reward = stars.FunctionReward(plain, inputs="ids")
    wanted = [facts(one) for one in toy_engine(LM, reward).generate(prompts, params, POLICY, use_tqdm=False)]
    cached = stars.CachedReward(stars.FunctionReward(counted, inputs="ids", blocking=blocking))
    for _ in range(2):
        engine = toy_engine(LM, cached)
        assert [facts(one) for one in engine.generate(prompts, params, POLICY, use_tqdm=False)] == wanted
        engine.check_integrity()
    if not blocking:  # else two may ask for one text side by side
        assert set(Counter(counted.texts).values()) == {1}
        assert cached.misses == len(counted.texts) and cached.hits == 2 * len(plain.texts) - cached.misses
    assert set(counted.texts) == set(plain.texts) and len(counted.texts) < len(plain.texts)
    assert repr(cached).endswith(f"{cached.misses} texts, {cached.hits} hits, {cached.misses} misses)") or blocking


def test_only_what_is_missing_is_asked_for():
    """In one call, each text once, in their order; the one used longest ago leaves first."""
    reward, asked = lengths(maxsize=3)
    prompt = given("p")
    assert score(reward, prompt, "a", "bb", "a") == [1.0, 2.0, 1.0]
    assert score(reward, prompt, "ccc", "a", "dddd", "ccc") == [3.0, 1.0, 4.0, 3.0]
    assert [responses for _, responses in asked] == [["a", "bb"], ["ccc", "dddd"]]
    assert (reward.hits, reward.misses) == (3, 4)
    assert score(reward, prompt, "a", "ccc", "dddd") == [1.0, 3.0, 4.0] and len(asked) == 2
    assert score(reward, prompt, "bb", "a") == [2.0, 1.0] and asked[2:] == [("p", ["bb"])]
    assert score(reward, prompt, "ccc") == [3.0] and len(asked) == 4


def test_what_is_no_reward_is_not_kept():
    reward, asked = lengths()
    prompt = given("p")
    for _ in range(2):
        [bad, good, again] = score(reward, prompt, "bad", "good", "bad")
        assert math.isnan(bad) and math.isnan(again) and good == 4.0
    assert [responses for _, responses in asked] == [["bad", "good"], ["bad"]]


def test_an_error_is_asked_about_again(lm):
    """A server that comes back is asked for what it could not say, and for nothing else."""
    with serving() as server, pytest.warns(UserWarning, match="1 of 1"):
        cached = stars.CachedReward(stars.RemoteReward(server.url, retries=0))
        engine = stars.Engine(lm, cached, cache_tokens=1024)
        params = stars.SamplingParams(max_tokens=8, seed=1)
        server.script = [classify, *[hangs_up] * 9]  # of the prompt, and of attempts
        [down] = engine.generate("A dog", params, POLICY, use_tqdm=False)
        assert down.outputs[0].finish_reason == "error" and down.prompt_reward == reward_of("A dog")
        server.script.clear()
        [back] = engine.generate("A dog", params, POLICY, use_tqdm=False)
        calls = len(server.bodies)
        assert calls > 3
        [again] = engine.generate("A dog", params, POLICY, use_tqdm=False)
        assert facts(again) == facts(back) and back.outputs[0].error is None and len(server.bodies) == calls
        assert sum(body["input"] == ["A dog"] for body in server.bodies) == 1


def test_prompts_are_told_apart():
    """As they were given: text, messages and ids, of equal words too."""
    reward, asked = lengths()
    messages = [{"role": "user", "content": "p"}]
    prompts = [given("p"), given("q"), given(messages), given([{"role": "user", "content": "q"}]),
               Prompt(None, [112], "p"), Prompt(None, [113], "p")]
    for prompt in prompts:
        score(reward, prompt, "a")
    assert len(asked) == 6 and (reward.hits, reward.misses) == (0, 6)
    for prompt in prompts:
        assert score(reward, prompt._replace(), "a") == [1.0]
    assert len(asked) == 6 and reward.hits == 6


def test_prompts_that_cannot_be_compared_are_not_kept():
    reward, asked = lengths()
    prompt = given([{"role": "user", "content": "p", "extra": {1, 2}}])
    assert [score(reward, prompt, "a", "a") for _ in range(2)] == [[1.0, 1.0]] * 2
    assert [responses for _, responses in asked] == [["a", "a"]] * 2 and not reward._known


def test_ids_are_told_apart_where_ids_are_read():
    reward, asked = lengths(needs_text=False)
    session = reward.open(given("p"), 8)
    found = reward.score([Candidate(session, [1, 2], None), Candidate(session, [12], None)])
    assert [one.reward for one in found] == [2.0, 1.0] and len(asked[0][1]) == 2


class Later(Reward):
    """A reward that answers when it is told to."""

    def __init__(self):
        self.futures: list[Future] = []

    def open(self, prompt, max_tokens):
        return object()

    def score(self, candidates):
        made = [Future() for _ in candidates]
        self.futures += made
        return [Scored(future, 2, 3) for future in made]


def test_answers_that_come_later():
    """Equal candidates wait for one answer, each by a Future of its own: who cancels it takes nothing from others."""
    later = Later()
    reward = stars.CachedReward(later)
    session = reward.open(given("p"), 8)
    first, second, other = reward.score([Candidate(session, ids_, None) for ids_ in ([1], [1], [2])])
    assert len(later.futures) == 2 and first.tokens_run == 2 and second.tokens_run == 0
    assert first.reward.cancel() and not later.futures[0].cancelled()
    later.futures[0].set_result(1.5)
    later.futures[1].set_result(stars.RewardError("gone"))
    assert second.reward.result(timeout=5) == 1.5 and str(other.reward.result(timeout=5)) == "gone"
    known, unknown = reward.score([Candidate(session, ids_, None) for ids_ in ([1], [2])])
    assert known == Scored(1.5) and len(later.futures) == 3
    assert unknown.reward.cancel() and later.futures[2].cancelled()


@pytest.mark.parametrize("reward, maxsize, problem", [
    (stars.CausalReward(ToyModel(vocab=5, seed=3, head="reward").decoder()), 9, "CausalReward keeps what it has read"),
    (stars.WeightedReward([(len, 1.0)]), 9, "WeightedReward keeps what it has read"), (None, 9, "needs a reward"),
    (len, 0, "CachedReward.maxsize is 0, it must be an integer of at least 1"), (3, 9, "reward is int, it must be"),
])
def test_what_cannot_be_cached(reward, maxsize, problem):
    with pytest.raises(stars.RewardError, match=problem):
        stars.CachedReward(reward, maxsize)


def test_a_prompt_given_twice_is_one(lm):
    """Through an engine: the same prompt in two requests, as text and as a dictionary."""
    asked = []

    def fn(prompt, responses):
        asked.append(list(responses))
        return [float(len(response)) for response in responses]
    engine = stars.Engine(lm, stars.CachedReward(fn), cache_tokens=1024)
    params = stars.SamplingParams(max_tokens=5, seed=4)
    one, two = engine.generate(["A dog", {"prompt": "A dog"}], params, stars.Sample(score=True), use_tqdm=False)
    assert one.outputs[0].reward == two.outputs[0].reward == len(one.outputs[0].text)
    assert engine.reward.hits + engine.reward.misses == 2 and parse_prompt("A", engine.tokenizer, 10**6).given == "A"
