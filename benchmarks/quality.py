"""Quality at equal cost, and how often a text depends on the schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
from common import Figure
from speed import Setup

import stars


def rewards_at_equal_tokens(setup: Setup, seeds: int = 3, prompts: int = 16) -> Iterator[Figure]:
    """h. Final rewards of STARS, of best-of-N over as many LM tokens, and of plain samples; EOS ends a response."""
    texts = [setup.prompt(index) for index in range(prompts)]
    policy = setup.policy(None)

    def final(policy, seed: int) -> tuple[np.ndarray, int]:
        params = dataclasses.replace(setup.params(seed), ignore_eos=False)
        outputs = setup.engine.generate(texts, params, policy, use_tqdm=False)
        rewards = np.array([output.outputs[0].reward for output in outputs])  # [prompts]
        return rewards, sum(output.metrics.lm_tokens_drawn for output in outputs)

    def all_seeds(policy) -> tuple[np.ndarray, int]:
        runs = [final(policy, seed) for seed in range(seeds)]
        return np.stack([rewards for rewards, _ in runs], axis=1), sum(tokens for _, tokens in runs)  # [prompts, seeds]

    aligned, aligned_tokens = all_seeds(policy)
    plain, plain_tokens = all_seeds(stars.Sample(score=True))
    n = max(1, round(aligned_tokens / plain_tokens))
    best, best_tokens = all_seeds(stars.BestOfN(n))
    for name, rewards, tokens, other_name, others in (
            ("STARS", aligned, aligned_tokens, "plain samples", plain),
            ("STARS", aligned, aligned_tokens, f"best of {n}", best),
            (f"best of {n}", best, best_tokens, "plain samples", plain)):
        low, high = bootstrap(rewards - others)
        own = bootstrap(rewards)
        yield Figure(f"mean final reward, {name}", float(rewards.mean()), "raw", other_name, float(others.mean()),
                     detail={"difference": float((rewards - others).mean()), "difference_95": (low, high),
                             "mean_95": own, "lm_tokens_drawn": tokens, "plain_lm_tokens_drawn": plain_tokens,
                             "n": n, "threshold": setup.threshold, "beta": setup.beta})


def bootstrap(values: np.ndarray, draws: int = 5000) -> tuple[float, float]:
    """95 % interval of the mean of values [prompts, seeds], prompts drawn with replacement."""
    generator = np.random.default_rng(0)
    means = values.mean(axis=1)  # [prompts]
    sampled = means[generator.integers(0, len(means), (draws, len(means)))].mean(axis=1)  # [draws]
    low, high = np.quantile(sampled, [0.025, 0.975])
    return float(low), float(high)


def texts_by_schedule(setup: Setup, seeds: int = 4, prompts: int = 8) -> Iterator[Figure]:
    """i. Share of texts that differ from width 1, alone, by width and by batch; the seeds are the same."""
    def texts(width: int, together: bool, seed: int) -> list[list[int]]:
        chosen = [setup.prompt(index) for index in range(prompts)]
        batches = [chosen] if together else [[text] for text in chosen]
        outputs = [setup.engine.generate(batch, setup.params(seed), setup.policy(width), use_tqdm=False)
                   for batch in batches]
        return [output.outputs[0].token_ids for batch in outputs for output in batch]

    alone = {seed: texts(1, False, seed) for seed in range(seeds)}
    for width, together in product((1, 3, 8), (False, True)):
        if width == 1 and not together:
            continue
        different = sum(one != other for seed in range(seeds)
                        for one, other in zip(alone[seed], texts(width, together, seed), strict=True))
        count = seeds * prompts
        yield Figure(f"texts that differ, width {width}, {'in a batch' if together else 'alone'}",
                     100 * different / count, "%", "width 1, alone", detail={"texts": count, "different": different,
                                                                            "tokens": setup.tokens})


QUALITY: dict[str, Callable[[Setup], Iterator[Figure]]] = {
    "rewards": rewards_at_equal_tokens, "rates": texts_by_schedule,
}
