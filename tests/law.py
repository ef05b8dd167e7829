"""What the tests of laws share: a toy that can be enumerated, the chi-square test, and errors to be planted.

A toy model of five tokens makes every segment countable, so that the exact law of what a method keeps can be written
down. False positives: `p_value` is compared with FALSE_POSITIVE_RATE, divided among the comparisons of a test, so that
a test fails a correct engine once in 1e6 choices of its seed (to the accuracy of the chi-square approximation at cells
of 8 expected counts and more). Seeds are fixed: a test that passes always passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

import oracle
import stars
import stars.proposer
import stars.request
import stars.scores
from stars.bindings import libstars
from stars.kernels.philox import pack_stream
from toy import EOS, ToyModel, table_reward, toy_engine

FALSE_POSITIVE_RATE = 1e-6
MIN_EXPECTED = 8.0  # counts of a cell; smaller cells are pooled
DRAWS = 2048 if libstars.available() else 768  # a draw costs 30 times as much without it
PROMPT = [1, 2, 3]
MODEL = ToyModel(vocab=5, seed=4, layers=1)
REWARD = table_reward(seed=9)
MAX_TOKENS = 5

Prefix = tuple[int, ...]


def draw(policy, params: stars.SamplingParams, reward: Callable[[Sequence[int]], float] = REWARD, requests: int = 1,
         **sizes) -> list[stars.CompletionOutput]:
    """All responses of a policy to PROMPT, in one call; reward: of a response's ids without EOS.

    requests: of `params.n` completions each, with seeds from `params.seed` on: n times a population may be 4096.
    """
    fn = stars.FunctionReward(lambda prompt, responses: [reward(ids) for ids in responses], inputs="ids")
    engine = toy_engine(MODEL, fn, **(dict(max_num_seqs=512, max_num_lanes=4096, max_segment_size=4,
                                           cache_tokens=1 << 14) | sizes))
    each = [dataclasses.replace(params, seed=params.seed + index) for index in range(requests)]
    outputs = engine.generate([{"prompt_token_ids": PROMPT}] * requests, each, policy, use_tqdm=False)
    completions = [completion for output in outputs for completion in output.outputs]
    assert [completion.error for completion in completions] == [None] * (params.n * requests)
    engine.check_integrity()
    return completions


def content(ids: Sequence[int]) -> list[int]:
    """What a reward is given of a response: all but the EOS that ended it."""
    return [token for token in ids if token != EOS]


def candidates(prefix: Prefix, size: int, params, model: ToyModel = MODEL) -> Iterator[tuple[Prefix, float]]:
    """Every segment of at most `size` tokens that can follow `prefix`, with its probability as `model` draws."""
    logits = oracle.penalised(model.logits(PROMPT + list(prefix)), PROMPT, list(prefix), params)
    kept = oracle.log_softmax(oracle.proposal(logits, params))
    for token, logprob in enumerate(kept):
        if logprob == -math.inf:
            continue
        if size == 1 or token == EOS:
            yield (token,), math.exp(logprob)
        else:
            for rest, probability in candidates(prefix + (token,), size - 1, params, model):
                yield (token, *rest), math.exp(logprob) * probability


def followers(outputs: Iterable[stars.CompletionOutput]) -> dict[Prefix, Counter]:
    """How often each segment followed each prefix."""
    seen: dict[Prefix, Counter] = defaultdict(Counter)
    for output in outputs:
        prefix: Prefix = ()
        for segment in output.segments:
            seen[prefix][tuple(segment.token_ids)] += 1
            prefix += tuple(segment.token_ids)
        assert list(prefix) == output.token_ids
    return seen


def responses(outputs: Iterable[stars.CompletionOutput]) -> dict[Prefix, Counter]:
    """How often each whole response came, as what follows the empty prefix."""
    return {(): Counter(tuple(output.token_ids) for output in outputs)}


def p_value(observed: dict[Prefix, Counter], law: Callable[[Prefix], dict]) -> float:
    """Chi-square of what followed each prefix, summed over prefixes: independent given how often each prefix came."""
    statistic, degrees = 0.0, 0
    for prefix, counts in observed.items():
        total = sum(counts.values())
        expected = {outcome: total * probability for outcome, probability in law(prefix).items()}
        assert abs(sum(expected.values()) - total) < 1e-6 * total, "the exact law does not add up"
        if any(expected.get(outcome, 0.0) == 0.0 for outcome in counts):
            return 0.0  # something happened that cannot
        cells: list[tuple[float, int]] = []
        pool_expected, pool_count = 0.0, 0
        for outcome, mean in sorted(expected.items(), key=lambda item: item[1]):
            pool_expected, pool_count = pool_expected + mean, pool_count + counts[outcome]
            if pool_expected >= MIN_EXPECTED:
                cells.append((pool_expected, pool_count))
                pool_expected, pool_count = 0.0, 0
        if len(cells) > 1:  # what is left in the pool is 0, since the largest comes last
            statistic += sum((count - mean) ** 2 / mean for mean, count in cells)
            degrees += len(cells) - 1
    assert degrees >= 4, "hardly anything was compared"
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


# -- errors that every method's test must see ---------------------------------------------------------------------


def noise_reused(monkeypatch):
    """All attempts of a segment, of all hypotheses of a completion, draw the same tokens."""
    spec = stars.proposer.LaneSpec

    def repeating(table, last, slab, max_tokens, seed, attempt, stream, params, *rest, **named):
        population = max(1, repeating.population)
        segment, sample = stream & 0xFFFFF, (stream >> 20 & 0xFFF) // population * population
        return spec(table, last, slab, max_tokens, seed, 1, pack_stream(segment, sample), params, *rest, **named)

    settle = stars.request.Request.__post_init__

    def settle_and_tell(self):
        settle(self)
        repeating.population = self.plan.lanes.population

    repeating.population = 1
    monkeypatch.setattr(stars.request.Request, "__post_init__", settle_and_tell)
    monkeypatch.setattr(stars.proposer, "LaneSpec", repeating)


def lanes_in_wrong_order(monkeypatch):
    """Each candidate of a pass gets the reward of the next one."""
    score = stars.scores.Scores.score

    def rotated(self, hypotheses, candidates):
        results = score(self, hypotheses, candidates)
        rewards = [result.reward for result in results]
        return [result._replace(reward=reward)
                for result, reward in zip(results, rewards[1:] + rewards[:1], strict=True)]

    monkeypatch.setattr(stars.scores.Scores, "score", rotated)


def fork_repeats_its_parent(monkeypatch):
    """A fork draws what its parent draws."""
    fork = stars.request.Hypothesis.fork

    def repeating(self, slot):
        child = fork(self, slot)
        child.sample = self.sample
        return child

    monkeypatch.setattr(stars.request.Hypothesis, "fork", repeating)
