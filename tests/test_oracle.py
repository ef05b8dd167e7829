"""The engine equals the oracle: token for token, attempt for attempt.

The oracle knows no cache, batch or width and scores everything from scratch in float64; the engine runs in float32. A
draw could differ only where rounding (1e-6 of a logit of order 1) meets a tie of that size, which fixed seeds exclude.
Rewards and log-probabilities agree within 2e-4: 24 float32 products of sums of at most 96 terms, values of order 1 to
10, that is 24 * 96 * 6e-8 at worst, and far less as errors cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

import oracle
import stars
from toy import EOS, ToyModel, ids, table_reward, toy_engine

TOLERANCE = 2e-4
WIDTHS = (1, 2, 3, 5, 8)
LM = ToyModel(vocab=5, seed=1)
LARGER = ToyModel(vocab=37, seed=2, hidden=24, layers=3, heads=4, kv_heads=2, head_dim=6, eos=(0, 3), sharpness=2.0)
RM = ToyModel(vocab=5, seed=3, head="reward", sharpness=1.5)
RM_LARGER = ToyModel(vocab=37, seed=4, head="reward", heads=3, kv_heads=3, layers=1, sharpness=1.5)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def equals_oracle(output: stars.RequestOutput, model: ToyModel, reward: Callable, policy: stars.STARS,
                  params: stars.SamplingParams) -> None:
    """Compares every completion of `output` with the oracle's."""
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(model.config.eos_token_ids))
    for completion in output.outputs:
        assert completion.error is None
        expected = oracle.run(model.logits, reward, output.prompt_token_ids, params, policy, output.seed,
                              completion.index, model.config.eos_token_ids)
        assert [s.token_ids for s in completion.segments] == [s.token_ids for s in expected]
        for segment, wanted in zip(completion.segments, expected, strict=True):
            assert segment.accepted == wanted.accepted and segment.relaxed == wanted.relaxed
            assert near(segment.reward, wanted.reward)
            # Behind the winner a round holds what was drawn with it, which the oracle never drew.
            compared, behind = segment.attempts[: len(wanted.attempts)], segment.attempts[len(wanted.attempts) :]
            assert len(compared) == len(wanted.attempts)
            assert not any(attempt.accepted for attempt in behind)
            assert len(behind) < (policy.width or policy.max_attempts)
            for attempt, right in zip(compared, wanted.attempts, strict=True):
                assert attempt.token_ids == right.token_ids
                assert attempt.accepted == right.accepted
                assert near(attempt.reward, right.reward)
                assert near(attempt.threshold, right.threshold)
                assert attempt.logprob == pytest.approx(right.logprob, abs=TOLERANCE)
                assert attempt.accept_probability == pytest.approx(
                    probability(right.reward, right.threshold, policy.beta), abs=TOLERANCE / max(policy.beta, 0.1))
        logprobs = [s.attempts[s.winner].logprob for s in completion.segments]
        assert completion.cumulative_logprob == pytest.approx(sum(logprobs), abs=1e-9)
        response = completion.token_ids
        assert response == [token for s in expected for token in s.token_ids]
        ended = bool(response) and response[-1] in stop_ids
        refused = not ended and len(response) < params.max_tokens  # as the oracle's is, which ends early then
        assert completion.finish_reason == ("stop" if ended else "refused" if refused else "length")
        assert not refused or "Refuse" in [name for name, _ in oracle.exhausted(policy.exhaust)]
        assert near(completion.reward, expected[-1].reward) if expected else completion.reward is None
        metrics = completion.metrics
        assert (metrics.segments, metrics.lm_tokens_kept) == (len(expected), len(response))
        assert (metrics.accepted, metrics.fallbacks) == tuple(sum(s.accepted is is_so for s in expected)
                                                              for is_so in (True, False))
        assert metrics.attempts_counted == sum(len(s.attempts) for s in expected)
        own = () if params.ignore_eos else model.config.eos_token_ids
        assert completion.stop_reason == (response[-1] if ended and response[-1] not in own else None)


def near(value: float, wanted: float) -> bool:
    return value == wanted or abs(value - wanted) < TOLERANCE


def probability(reward: float, tau: float, beta: float) -> float:
    """min(1, exp((reward - tau) / beta)) with its edges, written again."""
    if reward == -math.inf or tau == math.inf:
        return 0.0
    if beta == 0 or tau == -math.inf:
        return float(reward >= tau)
    return min(1.0, math.exp((reward - tau) / beta))


FUNCTION = table_reward(seed=3)


def rejecting(response) -> float:
    """-inf for half of the responses, among them some of every attempt in a segment."""
    return -math.inf if sum(response) % 2 else FUNCTION(response)


def always_rejecting(response) -> float:
    """The worst there is for everything but the prompt."""
    return -math.inf if response else 0.5


CASES = {
    "middle": (dict(segment_size=3, max_attempts=4, alpha=0.3, beta=0.6, reward_threshold=1.5), {}, FUNCTION),
    "short last segment": (dict(segment_size=5, max_attempts=3, reward_threshold=1.0), dict(max_tokens=13), FUNCTION),
    "segments of one": (dict(segment_size=1, max_attempts=6, beta=0.3, reward_threshold=2.0), {}, FUNCTION),
    "fallback across rounds": (dict(segment_size=3, max_attempts=7, beta=0.1, reward_threshold=9.0), {}, FUNCTION),
    "threshold +inf": (dict(segment_size=2, max_attempts=7, reward_threshold=math.inf), {}, FUNCTION),
    "threshold -inf": (dict(segment_size=4, max_attempts=7, reward_threshold=-math.inf), {}, rejecting),
    "hard rule": (dict(segment_size=3, max_attempts=6, beta=0.0, reward_threshold=1.2), {}, FUNCTION),
    "alpha 0": (dict(segment_size=3, max_attempts=6, alpha=0.0, reward_threshold=1.5), {}, FUNCTION),
    "alpha 1": (dict(segment_size=3, max_attempts=6, alpha=1.0, reward_threshold=1.5), {}, FUNCTION),
    "temperature 0": (dict(segment_size=3, max_attempts=6, reward_threshold=3.0), dict(temperature=0.0), FUNCTION),
    "filters": (dict(segment_size=3, max_attempts=5, reward_threshold=1.5),
                dict(temperature=0.7, top_k=4, top_p=0.9, min_p=0.02), FUNCTION),
    "stop token ids": (dict(segment_size=4, max_attempts=5, reward_threshold=1.0), dict(stop_token_ids=[2]), FUNCTION),
    "ignore EOS": (dict(segment_size=4, max_attempts=5, reward_threshold=1.0), dict(ignore_eos=True), FUNCTION),
    "ignore EOS with stop": (dict(segment_size=4, max_attempts=5, reward_threshold=1.0),
                             dict(ignore_eos=True, stop_token_ids=[4]), FUNCTION),
    "some -inf": (dict(segment_size=2, max_attempts=5, reward_threshold=1.5), {}, rejecting),
    "all -inf": (dict(segment_size=2, max_attempts=5, reward_threshold=1.5), {}, always_rejecting),
    "ties": (dict(segment_size=2, max_attempts=7, beta=0.2, reward_threshold=2.5), {},
             lambda response: float(round(FUNCTION(response)))),
    "penalties": (dict(segment_size=3, max_attempts=5, reward_threshold=1.5),
                  dict(presence_penalty=0.7, frequency_penalty=-0.4, repetition_penalty=1.3), FUNCTION),
    "penalties and filters": (dict(segment_size=5, max_attempts=5, reward_threshold=1.5),
                              dict(temperature=0.7, top_k=3, frequency_penalty=1.1), FUNCTION),
    "penalties at temperature 0": (dict(segment_size=4, max_attempts=3, reward_threshold=1.5),
                                   dict(temperature=0.0, repetition_penalty=0.8, presence_penalty=2.0), FUNCTION),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_function_reward_on_ids(width, operations):
    """The loop alone: order, cap, fallback, thresholds, edges, at every width. All cases run in one batch."""
    names, prompts, params, policies = [], [], [], []
    for index, (name, (policy, sampling, _)) in enumerate(CASES.items()):
        names.append(name)
        prompts.append({"prompt_token_ids": ids(6 + index % 7, seed=index)})
        params.append(stars.SamplingParams(**(dict(max_tokens=12, n=3, seed=50 + index) | sampling)))
        policies.append(stars.STARS(**policy, width=width))
    rewards = {tuple(prompt["prompt_token_ids"]): CASES[name][2] for name, prompt in zip(names, prompts, strict=True)}
    assert len(rewards) == len(prompts)

    def fn(prompt, responses):
        return [rewards[tuple(prompt)](response) for response in responses]

    engine = toy_engine(LM, stars.FunctionReward(fn, inputs="ids"), max_num_seqs=64, max_num_lanes=512)
    outputs = engine.generate(prompts, params, policies, use_tqdm=False)
    for name, output, policy, sampling in zip(names, outputs, policies, params, strict=True):
        equals_oracle(output, LM, CASES[name][2], policy, sampling)
    reached = {name: output for name, output in zip(names, outputs, strict=True)}
    assert any(o.token_ids[-1] == EOS for o in reached["middle"].outputs), "EOS never came"
    assert all(not s.accepted for o in reached["fallback across rounds"].outputs for s in o.segments)
    assert all(len(s.attempts) == 7 for o in reached["threshold +inf"].outputs for s in o.segments)
    assert all(len(s.attempts) == 1 for o in reached["temperature 0"].outputs for s in o.segments)
    assert all(s.winner == 0 for o in reached["all -inf"].outputs for s in o.segments)


@pytest.mark.parametrize("width", WIDTHS)
def test_causal_reward(width, operations):
    """The reward model's own cache: incremental scores, commits of the winner, best seen of an earlier round."""
    prompts = [{"prompt_token_ids": ids(length, seed=length)} for length in (1, 2, 4, 5, 9, 23)]
    policies = [stars.STARS(3, 7, 0.4, 0.5, 0.8, width), stars.STARS(4, 3, 0.5, 0.7, 9.0, width),
                stars.STARS(2, 5, 0.5, 0.2, 0.3, width), stars.STARS(5, 4, 1.0, 0.0, 0.9, width),
                stars.STARS(1, 4, 0.0, 0.4, 1.5, width), stars.STARS(3, 6, 0.5, 0.3, math.inf, width)]
    params = [stars.SamplingParams(max_tokens=11 + index, n=2, seed=70 + index) for index in range(len(prompts))]
    engine = toy_engine(LM, RM)
    outputs = engine.generate(prompts, params, policies, use_tqdm=False)
    for output, policy, sampling in zip(outputs, policies, params, strict=True):
        prompt = output.prompt_token_ids
        equals_oracle(output, LM, lambda response, prompt=prompt: RM.reward(prompt + response), policy, sampling)
    assert any(not segment.accepted for o in outputs for c in o.outputs for segment in c.segments)


def test_larger_models_of_other_shapes(operations):
    """Two EOS ids, grouped heads, prompts beyond a prefill chunk; LM and RM of different shapes."""
    prompts = [{"prompt_token_ids": ids(length, vocab=37, seed=length)} for length in (7, 65, 200)]
    for prompt in prompts:
        prompt["prompt_token_ids"] = [token if token != 3 else 4 for token in prompt["prompt_token_ids"]]
    policy = stars.STARS(6, 5, 0.5, 0.5, 1.0, 4)
    params = stars.SamplingParams(max_tokens=20, n=2, seed=9)
    engine = toy_engine(LARGER, RM_LARGER, page_size=16)
    for output in engine.generate(prompts, params, policy, use_tqdm=False):
        prompt = output.prompt_token_ids
        equals_oracle(output, LARGER, lambda response, prompt=prompt: RM_LARGER.reward(prompt + response), policy,
                      params)


def test_eos_closing_is_scored_and_dropped():
    """close="eos": every score reads an EOS behind the response, r(prompt) too, and no score sees an earlier one."""
    policy = stars.STARS(3, 5, 0.5, 0.4, 0.8, 3)
    params = stars.SamplingParams(max_tokens=11, n=4, seed=12)
    engine = toy_engine(LM, stars.CausalReward(RM.decoder(), close="eos"))
    prompt = ids(6, seed=8)
    [output] = engine.generate({"prompt_token_ids": prompt}, params, policy, use_tqdm=False)
    equals_oracle(output, LM, lambda response: RM.reward(prompt + response + [EOS]), policy, params)
    assert output.prompt_reward == pytest.approx(RM.reward(prompt + [EOS]), abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_seeds(seed):
    """A sweep over random policies, prompts and widths."""
    import random

    rng = random.Random(seed)
    prompts, params, policies = [], [], []
    for _ in range(12):
        # Not one token repeated: to such a text every model gives the same score at every length, up to rounding.
        prompts.append({"prompt_token_ids": [1, 2, *ids(rng.randint(1, 20), seed=rng.randint(0, 999))]})
        params.append(stars.SamplingParams(
            max_tokens=rng.randint(1, 25), n=rng.randint(1, 3), seed=rng.getrandbits(63), ignore_eos=rng.random() < 0.3,
            temperature=rng.choice([0.0, 0.5, 1.0, 1.5]), stop_token_ids=rng.choice([None, [2], [3, 4]]),
            top_k=rng.choice([0, 0, 3]), top_p=rng.choice([1.0, 1.0, 0.8]), min_p=rng.choice([0.0, 0.0, 0.1]),
            presence_penalty=rng.choice([0.0, 0.0, 0.9]), frequency_penalty=rng.choice([0.0, 0.0, -0.7]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.4])))
        policies.append(stars.STARS(
            rng.randint(1, 8), rng.randint(1, 9), rng.choice([0.0, 0.3, 1.0]), rng.choice([0.0, 0.2, 1.0]),
            rng.choice([-math.inf, 0.0, 1.0, 3.0, math.inf]), rng.choice([None, 1, 2, 3, 5, 8])))
    engine = toy_engine(LM, RM)
    outputs = engine.generate(prompts, params, policies, use_tqdm=False)
    for output, policy, sampling in zip(outputs, policies, params, strict=True):
        prompt = output.prompt_token_ids
        equals_oracle(output, LM, lambda response, prompt=prompt: RM.reward(prompt + response), policy, sampling)
