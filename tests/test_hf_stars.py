"""The loop on transformers that benchmarks compare with: the same law as ours, token for token."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import stars
from stars.kernels.philox import accept_uniform, gumbel_noise

PROMPT = [5, 17, 41, 8, 90, 33]
VOCAB = 97
FORMS = {
    "dynamic": {"cache": "dynamic"}, "preallocated": {"cache": "preallocated"}, "no cache": {"no_cache": True},
    "captured": {"cache": "captured"},
}


def benchmark(name: str) -> ModuleType:
    """A module of benchmarks/, which lies on no path."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    benchmark("hf_captured")
    return benchmark("hf_stars")


@pytest.fixture(scope="module")
def directories(tiny_model) -> tuple[Path, Path]:
    return tiny_model(family="llama", seed=1), tiny_model(family="qwen3", head="reward", seed=2)


@pytest.fixture(scope="module")
def pair(hf, directories):
    return hf.load_pair(*directories)


@pytest.fixture(scope="module")
def engine(directories) -> stars.Engine:
    return stars.Engine(*directories)


@pytest.fixture(scope="module")
def threshold(engine) -> float:
    """Low enough to be accepted now and then, high enough to be rejected more often."""
    params = stars.SamplingParams(max_tokens=22, ignore_eos=True, seed=3)
    return engine.calibrate({"prompt_token_ids": PROMPT}, params, quantile=0.8)


def our_draws(params):
    """The engine's own random numbers as a draw of the loop: argmax of logits / temperature + Gumbel noise."""

    def draw(logits, segment, attempt, position):
        noise = [gumbel_noise(params.seed, position, attempt + row, segment, 0, VOCAB) for row in range(len(logits))]
        return (logits / params.temperature + torch.from_numpy(np.stack(noise))).argmax(dim=1)

    return draw


def our_uniforms(params):
    return lambda segment, attempt: accept_uniform(params.seed, attempt, segment, 0)


def sampling(seed: int, **options) -> stars.SamplingParams:
    return stars.SamplingParams(max_tokens=22, ignore_eos=True, seed=seed, **options)


def run_both(engine, loop, params, policy, accept_rate=None):
    ours = engine.generate({"prompt_token_ids": PROMPT}, params, policy, use_tqdm=False)[0].outputs[0]
    theirs = loop.generate(PROMPT, params, policy, accept_rate=accept_rate, draw=our_draws(params),
                           uniform=our_uniforms(params))
    return ours, theirs


def assert_same(ours, theirs) -> None:
    assert ours.error is None
    assert theirs.token_ids == ours.token_ids
    assert [segment.token_ids for segment in theirs.segments] == [segment.token_ids for segment in ours.segments]
    assert [segment.accepted for segment in theirs.segments] == [segment.accepted for segment in ours.segments]
    counted = [segment.winner + 1 if segment.accepted else len(segment.attempts) for segment in ours.segments]
    assert [segment.attempts for segment in theirs.segments] == counted
    rewards = [segment.reward for segment in ours.segments]
    assert [segment.reward for segment in theirs.segments] == pytest.approx(rewards, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width, beta", [(1, 0.1), (3, 0.0), (8, 0.1)])
def test_with_the_same_random_numbers_it_is_our_engine(hf, pair, engine, threshold, form, width, beta):
    policy = stars.STARS(segment_size=5, max_attempts=5, beta=beta, reward_threshold=threshold, width=width)
    loop = hf.HFStars(*pair, width=width, rm_lanes=2, **FORMS[form])
    seen = []
    for seed in range(4):
        ours, theirs = run_both(engine, loop, sampling(seed), policy)
        assert_same(ours, theirs)
        seen += theirs.segments
    assert any(segment.accepted and segment.attempts > 1 for segment in seen)
    assert any(not segment.accepted for segment in seen)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("accept_rate", [0.0, 0.3, 1.0])
def test_a_forced_accept_rate_means_the_same_in_both_loops(hf, pair, engine, form, accept_rate):
    policy = stars.STARS(segment_size=5, max_attempts=6, reward_threshold=0.0, width=4)
    loop = hf.HFStars(*pair, width=4, **FORMS[form])
    for seed in range(3):
        with benchmark("common").forced_accept(accept_rate):
            ours, theirs = run_both(engine, loop, sampling(seed), policy, accept_rate)
        assert_same(ours, theirs)
        if accept_rate == 1.0:
            assert theirs.attempts_counted == len(theirs.segments) and theirs.fallbacks == 0
        if accept_rate == 0.0:
            assert theirs.fallbacks == len(theirs.segments)


def test_a_threshold_of_minus_infinity_is_plain_sampling(hf, pair, engine):
    params = stars.SamplingParams(max_tokens=40, ignore_eos=True, seed=7, temperature=0.9)
    plain = engine.generate({"prompt_token_ids": PROMPT}, params, stars.Sample(), use_tqdm=False)[0].outputs[0]
    policy = stars.STARS(reward_threshold=-math.inf)
    theirs = hf.HFStars(*pair).generate(PROMPT, params, policy, draw=our_draws(params), uniform=our_uniforms(params))
    assert theirs.token_ids == plain.token_ids
    assert theirs.attempts_counted == len(theirs.segments) == 3


def test_a_prompt_of_one_token_and_an_infinite_threshold(hf, pair):
    policy = stars.STARS(segment_size=4, max_attempts=3, reward_threshold=math.inf, width=2)
    for form in FORMS.values():
        output = hf.HFStars(*pair, width=2, **form).generate([5], sampling(0, top_k=10), policy)
        assert len(output.token_ids) == 22
        assert output.fallbacks == len(output.segments) == 6


@pytest.mark.parametrize("cache", ["dynamic", "preallocated"])
def test_cached_logits_and_rewards_are_those_without_a_cache(hf, pair, threshold, cache):
    policy = stars.STARS(segment_size=5, max_attempts=5, reward_threshold=threshold)
    params = sampling(11)

    def collect(loop):
        seen, draw = [], our_draws(params)

        def spy(logits, *where):
            seen.append(logits.clone())
            return draw(logits, *where)

        return loop.generate(PROMPT, params, policy, draw=spy, uniform=our_uniforms(params)), torch.cat(seen)

    cached, cached_logits = collect(hf.HFStars(*pair, width=3, cache=cache))
    plain, plain_logits = collect(hf.HFStars(*pair, width=3, no_cache=True))
    assert cached.token_ids == plain.token_ids
    torch.testing.assert_close(cached_logits, plain_logits, rtol=0, atol=1e-4)
    assert [s.reward for s in cached.segments] == pytest.approx([s.reward for s in plain.segments], abs=1e-4)


@pytest.mark.parametrize("top_k", [0, 3])
def test_its_own_sampler_draws_from_the_filtered_softmax(hf, top_k):
    logits = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.3])
    params = sampling(5, temperature=0.8, top_k=top_k)
    draw = hf._sampler(params, params.seed)
    count = 20000
    drawn = draw(logits.expand(count, -1), 0, 1, 0)
    scaled = logits / 0.8
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -math.inf)
    expected = scaled.softmax(dim=0)
    found = torch.bincount(drawn, minlength=5) / count
    tolerance = 5 * (expected * (1 - expected) / count).sqrt()
    assert bool(((found - expected).abs() <= tolerance).all())
