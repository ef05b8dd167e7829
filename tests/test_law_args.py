"""The laws of ARGS and RAD: of the tokens that are enumerated the highest score wins, or each by the softmax of scores.

A toy model of five tokens, so that the law of the next token after every prefix is written out: its logit under the
penalties, which tokens the filters keep, the topk of them, and the reward with each. Greedy texts are compared with an
oracle that recomputes everything; draws by chi-square, which fails a correct engine once in 1e6 choices of the seed
(see law.py). Errors are planted, with each of which the same test must fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

import law
import oracle
import stars
import stars.judge
import stars.policies
import stars.proposer
import stars.rules
from law import FALSE_POSITIVE_RATE, MAX_TOKENS, MODEL, PROMPT, REWARD, Prefix, content, followers, p_value
from stars.plan import Enumerate, Fixed, Lanes, Plan, Score
from stars.rules import RewardGuided
from toy import EOS, toy_engine

DRAWS = 512
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class Narrow:
    """ARGS whose tokens are scored `width` at a time, in rounds."""

    width: int
    topk: int = 4
    weight: float = 1.0
    temperature: float = 0.7

    def plan(self) -> Plan:
        return Plan(Enumerate(self.topk), Fixed(1), Lanes(self.width, self.topk), Score("segment"),
                    RewardGuided(self.weight, self.temperature))


# -- the exact law ------------------------------------------------------------------------------------------------


def ranked(prefix: Prefix, params: stars.SamplingParams, topk: int) -> list[tuple[int, float]]:
    """(token, log-probability) of the first topk that the filters keep; no two are equal."""
    logits = oracle.penalised(MODEL.logits(PROMPT + list(prefix)), PROMPT, list(prefix), params)
    kept = oracle.proposal(logits, params)
    logprobs = oracle.log_softmax(logits)
    order = [int(token) for token in np.argsort(-logits) if kept[token] > -math.inf]
    return [(token, float(logprobs[token])) for token in order[:topk]]


def scores(prefix: Prefix, params: stars.SamplingParams, topk: int, weight: float,
           shaped: Callable[[float], float] = lambda reward: reward) -> dict[Prefix, float]:
    """logit + weight * r of each candidate, but for a constant."""
    return {(token,): logprob + weight * shaped(REWARD(content((*prefix, token))))
            for token, logprob in ranked(prefix, params, topk)}


def softmax(values: dict[Prefix, float], temperature: float) -> dict[Prefix, float]:
    """The law of a draw by scores."""
    highest = max(values.values())
    powers = {token: math.exp((value - highest) / temperature) for token, value in values.items()}
    return {token: power / sum(powers.values()) for token, power in powers.items()}


def clamped(reward: float) -> float:
    return min(max(reward, 0.0), 1.0)


PLAIN = stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS, seed=51)
FILTERED = stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS, seed=52, temperature=0.8, top_p=0.9, min_p=0.04,
                                presence_penalty=0.6, repetition_penalty=1.3)
GREEDY = stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS, seed=53, temperature=0.0, top_k=4)
CASES: dict[str, tuple[stars.plan.Policy, stars.SamplingParams, Callable[[Prefix], dict]]] = {
    "stochastic": (stars.ARGS(4, 1.0, "stochastic", 0.9), PLAIN,
                   lambda prefix: softmax(scores(prefix, PLAIN, 4, 1.0), 0.9)),
    "stochastic, filters and penalties": (
        stars.ARGS(4, 0.4, "stochastic", 0.7), FILTERED,
        lambda prefix: softmax(scores(prefix, FILTERED, 4, 0.4), 0.7)),
    "stochastic, sampled at temperature 0": (
        stars.ARGS(5, 0.8, "stochastic"), GREEDY,
        lambda prefix: softmax(scores(prefix, GREEDY, 4, 0.8), 0.7)),
    "rounds of one": (Narrow(1), PLAIN, lambda prefix: softmax(scores(prefix, PLAIN, 4, 1.0), 0.7)),
    "rounds of three, filters": (
        Narrow(3), FILTERED, lambda prefix: softmax(scores(prefix, FILTERED, 4, 1.0), 0.7)),
    "RAD": (stars.RAD(topk=3, beta=2.0), PLAIN, lambda prefix: softmax(scores(prefix, PLAIN, 3, 2.0, clamped), 1.0)),
    "RAD, inverse": (stars.RAD(4, 2.0, inverse=True), PLAIN,
                     lambda prefix: softmax(scores(prefix, PLAIN, 4, 2.0, lambda r: 1 - clamped(r)), 1.0)),
    "RAD, not clamped": (stars.RAD(4, 0.5, clamp=False, temperature=1.4), PLAIN,
                         lambda prefix: softmax(scores(prefix, PLAIN, 4, 0.5), 1.4)),
}
kept_at_temperature_0 = stars.SamplingParams(top_k=4)  # what filters see there is what they see at temperature 1


@pytest.fixture(autouse=True)
def filters_at_temperature_0(monkeypatch):
    """The oracle divides by the temperature."""
    proposal = oracle.proposal
    monkeypatch.setattr(oracle, "proposal", lambda logits, params: proposal(
        logits, params if params.temperature else kept_at_temperature_0))


def p_of(name: str) -> float:
    policy, params, exact = CASES[name]
    return p_value(followers(law.draw(policy, params)), exact)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_softmax_of_scores(name):
    p = p_of(name)
    assert p > FALSE_POSITIVE_RATE, p


def greedy_oracle(params: stars.SamplingParams, topk: int, weight: float) -> list[tuple[list[int], float, float]]:
    """(tokens of the response so far, its reward, log-probability of the newest), token by token."""
    prefix: Prefix = ()
    steps = []
    while len(prefix) < params.max_tokens and EOS not in prefix:
        values = scores(prefix, params, topk, weight)
        best = max(values, key=lambda token: values[token])
        logprob = dict(ranked(prefix, params, topk))[best[0]]
        prefix += best
        steps.append((list(prefix), REWARD(content(prefix)), logprob))
    return steps


@pytest.mark.parametrize("width", [None, 1, 2, 5])
@pytest.mark.parametrize("params", [
    stars.SamplingParams(max_tokens=12, seed=1), stars.SamplingParams(max_tokens=12, seed=2, temperature=0.0, top_k=4),
    stars.SamplingParams(max_tokens=12, seed=3, top_p=0.6, frequency_penalty=0.4),
], ids=["plain", "temperature 0", "filters"])
def test_the_greedy_text_is_the_oracles(params, width):
    """At every weight and width; one step of the language model finds all tokens of a place, however many rounds."""
    fn = stars.FunctionReward(lambda prompt, responses: [REWARD(ids) for ids in responses], inputs="ids")
    engine = toy_engine(MODEL, fn)
    for topk, weight in ((1, 1.0), (3, 0.0), (4, 0.5), (5, 1.0), (5, -1.0), (30, 2.0)):
        policy = stars.ARGS(topk, weight) if width is None else Narrow(width, topk, weight, 0.0)
        [output] = engine.generate({"prompt_token_ids": PROMPT}, params, policy, use_tqdm=False)
        [completion], steps = output.outputs, greedy_oracle(params, topk, weight)
        assert completion.token_ids == steps[-1][0] and len(completion.segments) == len(steps)
        for segment, (tokens, reward, logprob) in zip(completion.segments, steps, strict=True):
            assert segment.token_ids == tokens[-1:] and segment.accepted and segment.threshold is None
            assert segment.reward == pytest.approx(reward) and segment.logprob == pytest.approx(logprob, abs=2e-5)
            expected = ranked(tuple(tokens[:-1]), params, topk)
            assert [attempt.token_ids for attempt in segment.attempts] == [[token] for token, _ in expected]
            assert [attempt.logprob for attempt in segment.attempts] == pytest.approx(
                [logprob for _, logprob in expected], abs=2e-5)
        assert completion.finish_reason == ("stop" if EOS in completion.token_ids else "length")
        assert completion.metrics.lm_tokens_drawn == len(steps)
        assert completion.metrics.attempts == sum(len(segment.attempts) for segment in completion.segments)
    engine.check_integrity()


def test_the_cases_have_power():
    """EOS comes and does not, filters keep fewer than topk of some prefixes, and the most probable often loses."""
    outputs = law.draw(*CASES["rounds of three, filters"][:2])
    ends = [EOS in output.token_ids for output in outputs]
    assert 0.1 < sum(ends) / len(ends) < 0.97
    segments = [segment for output in outputs for segment in output.segments]
    assert 0.1 < sum(len(segment.attempts) < 4 for segment in segments) / len(segments) < 0.95
    assert 0.2 < sum(segment.winner > 0 for segment in segments) / len(segments) < 0.9


# -- planted errors -----------------------------------------------------------------------------------------------


def noise_of_the_place_before(monkeypatch):
    """Every token is drawn with the noise of the first."""
    uniform = stars.judge.accept_uniform
    monkeypatch.setattr(stars.judge, "accept_uniform",
                        lambda seed, attempt, segment, sample: uniform(seed, attempt, 0, sample))


def one_uniform_for_all(monkeypatch):
    """All tokens of a place have the same noise: the argmax always wins."""
    uniform = stars.judge.accept_uniform
    monkeypatch.setattr(stars.judge, "accept_uniform",
                        lambda seed, attempt, segment, sample: uniform(seed, 1, segment, sample))


def completions_alike(monkeypatch):
    """All completions of a request draw the same."""
    uniform = stars.judge.accept_uniform
    monkeypatch.setattr(stars.judge, "accept_uniform",
                        lambda seed, attempt, segment, sample: uniform(seed, attempt, segment, 0))


def a_rank_is_skipped(monkeypatch):
    """The second most probable token is never tried."""
    find = stars.proposer.Ranking
    monkeypatch.setattr(stars.proposer, "Ranking", lambda tokens, logprobs, *others: find(
        tokens[:1] + tokens[2:] or tokens, logprobs[:1] + logprobs[2:] or logprobs, *others))


def _scored_as(monkeypatch, score: Callable) -> None:
    monkeypatch.setattr(RewardGuided, "_score", lambda self, one: score(self, one, one.reward, one.raw_logprobs[0]) /
                        self.temperature - math.log(-math.log(one.uniforms[0])))


def weight_on_the_other_side(monkeypatch):
    """The log-probability is weighted, and the reward is not."""
    _scored_as(monkeypatch, lambda rule, one, reward, logprob: reward + rule.weight * logprob)


def weight_forgotten(monkeypatch):
    _scored_as(monkeypatch, lambda rule, one, reward, logprob: reward + logprob)


def probability_instead_of_its_logarithm(monkeypatch):
    _scored_as(monkeypatch, lambda rule, one, reward, logprob: rule.weight * reward + math.exp(logprob))


def temperature_forgotten(monkeypatch):
    monkeypatch.setattr(RewardGuided, "_score", lambda self, one: (
        self.weight * one.reward + one.raw_logprobs[0] - math.log(-math.log(one.uniforms[0]))))


def bounds_forgotten(monkeypatch):
    """The reward is not clamped."""
    monkeypatch.setattr(stars.policies, "RewardGuided", lambda weight, temperature, *bounds: RewardGuided(
        weight, temperature))


def filters_forgotten(monkeypatch):
    rank = stars.draft.top_tokens
    monkeypatch.setattr(stars.draft, "top_tokens", lambda logits, ranking, filters: rank(logits, ranking._replace(
        top_k=ranking.top_k * 0, top_p=ranking.top_p * 0 + 1, min_p=ranking.min_p * 0), False))


def ranks_of_the_first_round_again(monkeypatch):
    """Later rounds begin at the first rank."""
    hand_out = stars.proposer.Proposer._hand_out

    def again(self, lanes: Sequence, ranking) -> None:
        hand_out(self, lanes, ranking)
        for place, lane in enumerate(lanes):
            lane.token_ids, lane.logprobs = ranking.token_ids[place : place + 1], ranking.logprobs[place : place + 1]

    monkeypatch.setattr(stars.proposer.Proposer, "_hand_out", again)


PLANTED = {
    law.lanes_in_wrong_order: "stochastic", noise_of_the_place_before: "stochastic", one_uniform_for_all: "stochastic",
    completions_alike: "stochastic", a_rank_is_skipped: "stochastic",
    weight_on_the_other_side: "stochastic, filters and penalties",
    weight_forgotten: "stochastic, filters and penalties", probability_instead_of_its_logarithm: "stochastic",
    temperature_forgotten: "stochastic, filters and penalties",
    filters_forgotten: "stochastic, filters and penalties", ranks_of_the_first_round_again: "rounds of three, filters",
}


OF_RAD = [("RAD", law.lanes_in_wrong_order), ("RAD", one_uniform_for_all), ("RAD", bounds_forgotten),
          ("RAD, inverse", law.lanes_in_wrong_order), ("RAD, inverse", weight_forgotten)]


@pytest.mark.parametrize("name, error", [*((name, error) for error, name in PLANTED.items()), *OF_RAD],
                         ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_planted_error_is_seen(name, error, monkeypatch):
    """The same cases and seeds as above, where the engine passes."""
    error(monkeypatch)
    p = p_of(name)
    assert p <= FALSE_POSITIVE_RATE, p


@pytest.mark.parametrize("error", [law.lanes_in_wrong_order, a_rank_is_skipped])
def test_a_planted_error_changes_the_greedy_text(error, monkeypatch):
    error(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_greedy_text_is_the_oracles(stars.SamplingParams(max_tokens=12, seed=1), None)
