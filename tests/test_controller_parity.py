"""libstars' segment controller decides what the engine's law decides.

First over requests at random: every attempt that is given out, threshold, probability, verdict, winner, best attempt
and count is the oracle's, which asks the engine's own rule (`controller_oracle`). A verdict may differ only where
|log u - (r - tau) / beta| < 1e-9, as two mathematical libraries may; such cases are counted, and here, where both ask
the same library, there is none. Then over whole responses of an engine, beside a host that draws by itself.
"""

from __future__ import annotations

import ctypes
import math

import pytest

import stars
from controller_host import Hosted, respond
from controller_oracle import compare
from stars.bindings import libstars
from stars.bindings.controller import Controller
from stars.bindings.library import loaded
from toy import EOS, ToyModel, table_reward, toy_engine

pytestmark = [pytest.mark.skipif(not libstars.available(), reason="libstars was not built"),
              pytest.mark.usefixtures("one_torch_thread")]

PROMPT = [1, 2, 3]
MODEL = ToyModel(vocab=5, seed=4, layers=1)
REWARD = table_reward(seed=9)
N = 6


def agree(decisions: int, seed: int) -> None:
    """Raises where the controller and the oracle differ; that few requests are easy ones is asserted, too."""
    seen = compare(decisions, seed)
    print(f"{seen.decisions} decisions, {seen.border} differ at the border")
    assert seen.border <= 1e-6 * seen.decisions
    assert 0.1 < seen.accepted / seen.decisions < 0.5
    assert seen.fallbacks > 0.03 * seen.decisions and seen.budgets > 0.005 * seen.decisions


def test_decisions_are_those_of_the_engines_law():
    agree(200_000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_millions_of_decisions_are_those_of_the_engines_law(seed):
    agree(1_000_000, seed)


@pytest.mark.parametrize("field, wrong", [
    ("seed", lambda value: value ^ 1), ("reward_threshold", lambda value: math.nextafter(value, math.inf)),
    ("beta", lambda value: value * 1.001), ("alpha", lambda value: 1.0 - value),
    ("prompt_reward", lambda value: 0.0), ("sample", lambda value: value ^ 1),
    ("attempts_budget", lambda value: value and value + 1), ("tokens_budget", lambda value: value and value + 1),
    ("rewards_budget", lambda value: value and value + 1), ("max_attempts", lambda value: value + 1),
])
def test_a_controller_of_other_parameters_is_told_apart(field, wrong, monkeypatch):
    """What the comparison would say of a controller that had this wrong."""
    opened = loaded().stars_controller_open

    def otherwise(given):
        params = given._obj
        value = getattr(params, field)
        if math.isfinite(value):
            setattr(params, field, wrong(value))
        return opened(ctypes.byref(params))

    monkeypatch.setattr(loaded(), "stars_controller_open", otherwise)
    with pytest.raises(AssertionError):
        compare(10_000, seed=1)


# -- whole responses of an engine -------------------------------------------------------------------------------------

POLICIES = {
    "soft": stars.STARS(4, 6, 0.2, 0.5, 3.5),
    "hard": stars.STARS(3, 5, 0.5, 0.0, 2.5),
    "alpha 1": stars.STARS(5, 20, 1.0, 0.3, 2.0),
    "one attempt": stars.STARS(4, 1, 0.0, 0.5, 4.0),
    "all accepted": stars.STARS(4, 6, 0.5, 0.5, -math.inf),
    "none accepted": stars.STARS(4, 6, 0.5, 0.5, math.inf),
}
BUDGETS = [stars.Budget(), stars.Budget(attempts=5), stars.Budget(lm_tokens=20), stars.Budget(rm_calls=8),
           stars.Budget(attempts=14, lm_tokens=60, rm_calls=14), stars.Budget(rm_calls=1), stars.Budget(lm_tokens=3)]


def hosted(policy: stars.STARS, seed: int, width: int, budget: stars.Budget, sample: int = 0) -> Hosted:
    """What a host makes of the toy model under the controller."""
    controller = Controller(
        max_tokens=N, reward_threshold=policy.reward_threshold, seed=seed, beta=policy.beta, alpha=policy.alpha,
        prompt_reward=REWARD([]), segment_size=policy.segment_size, max_attempts=policy.max_attempts, sample=sample,
        attempts_budget=budget.attempts or 0, tokens_budget=budget.lm_tokens or 0, rewards_budget=budget.rm_calls or 0)
    return respond(controller, width, lambda response: MODEL.logits(PROMPT + response), REWARD, EOS)


def outputs(policy: stars.STARS, seed: int, width: int, budget: stars.Budget, n: int = 1) -> stars.RequestOutput:
    """The engine's."""
    reward = stars.FunctionReward(lambda prompt, responses: [REWARD(ids) for ids in responses], inputs="ids")
    policy = stars.STARS(policy.segment_size, policy.max_attempts, policy.alpha, policy.beta, policy.reward_threshold,
                         width)
    params = stars.SamplingParams(max_tokens=N, n=n, seed=seed)
    [output] = toy_engine(MODEL, reward).generate({"prompt_token_ids": PROMPT}, params, policy, use_tqdm=False,
                                                  budget=budget)
    return output


def same(ours: Hosted, theirs: stars.CompletionOutput) -> None:
    """Tokens, attempts up to the winner, rewards, thresholds, probabilities, verdicts and counts."""
    assert ours.token_ids == theirs.token_ids and ours.finish_reason == theirs.finish_reason
    assert len(ours.segments) == len(theirs.segments)
    for one, other in zip(ours.segments, theirs.segments, strict=True):
        assert (one.winner - 1, one.accepted, one.token_ids) == (other.winner, other.accepted, other.token_ids)
        assert len(one.attempts) == len(other.attempts)
        for tried, attempt in zip(one.attempts, other.attempts, strict=True):
            assert tried.token_ids == attempt.token_ids
            if tried.said is not None:
                assert (tried.reward, *tried.said) == (
                    attempt.reward, attempt.threshold, attempt.accept_probability, attempt.accepted)
    progress, metrics = ours.progress, theirs.metrics
    assert (progress.segments, progress.tokens, progress.accepted, progress.fallbacks, progress.attempts_counted,
            progress.attempts, progress.tokens_drawn) == (
        metrics.segments, metrics.lm_tokens_kept, metrics.accepted, metrics.fallbacks, metrics.attempts_counted,
        metrics.attempts, metrics.lm_tokens_drawn)
    if ours.segments:
        assert progress.reward == theirs.reward


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("name", POLICIES)
def test_the_engines_responses(name, width):
    """Two completions of a seed each, from 0 on and beyond 2^63."""
    for seed in (0, 7, 2**64 - 5):
        output = outputs(POLICIES[name], seed, width, stars.Budget(), n=2)
        for sample, completion in enumerate(output.outputs):
            same(hosted(POLICIES[name], seed, width, stars.Budget(), sample), completion)


@pytest.mark.parametrize("width", [1, 3])
def test_the_engines_responses_under_budgets(width):
    """Calls of the reward are compared at width 1: how many an engine makes after the winner is its own affair."""
    ended = []
    for budget in BUDGETS:
        if budget.rm_calls and width > 1:
            continue
        for name, policy in POLICIES.items():
            for seed in range(4):
                output = outputs(policy, seed, width, budget)
                ours = hosted(policy, seed, width, budget)
                same(ours, output.outputs[0])
                if width == 1 and output.metrics.attempts:  # else an engine has not asked for the prompt's either
                    assert ours.progress.rewards == output.metrics.rm_calls, (name, seed, budget)
                ended.append(ours.finish_reason)
    assert {"budget", "stop", "length"} == set(ended) and ended.count("budget") > 0.2 * len(ended)
