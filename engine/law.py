"""The law of acceptance: threshold schedule and test, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple


class Terms(NamedTuple):
    """What the law needs to know of a candidate beside its reward."""

    seed: int
    stream: int  # philox.pack_stream(segment, sample)
    attempt: int  # from 1
    tokens: int  # n: response tokens, the candidate's included (what a draft under way will add left out)
    max_tokens: int  # N
    start: float  # r0
    reward_threshold: float
    beta: float


def threshold_start(prompt_reward: float | None, alpha: float, reward_threshold: float) -> float:
    """r0 = (1 - alpha) * r(prompt) + alpha * reward_threshold. With alpha = 1, `prompt_reward` is not read."""
    if alpha == 1.0:
        return reward_threshold
    return (1.0 - alpha) * prompt_reward + alpha * reward_threshold


def threshold(tokens: int, max_tokens: int, start: float, reward_threshold: float) -> float:
    """tau(n) = min(t, r0 + n / N * (t - r0)), `tokens` = n response tokens including the candidate (EOS counts)."""
    if not math.isfinite(reward_threshold):
        return reward_threshold
    return min(reward_threshold, start + tokens / max_tokens * (reward_threshold - start))


def accept_probability(reward: float, tau: float, beta: float) -> float:
    """P(log u < (reward - tau) / beta) = min(1, exp((reward - tau) / beta)); beta = 0: the hard rule reward >= tau."""
    if reward == -math.inf or tau == math.inf:
        return 0.0
    if tau == -math.inf:
        return 1.0
    if beta == 0.0:
        return 1.0 if reward >= tau else 0.0
    return math.exp(min(0.0, (reward - tau) / beta))


def accepts(uniform: float, reward: float, tau: float, beta: float) -> bool:
    """log u < (reward - tau) / beta, with the edges of `accept_probability`; `uniform` is in (0, 1)."""
    if reward == -math.inf or tau == math.inf:
        return False
    if tau == -math.inf:
        return True
    if beta == 0.0:
        return reward >= tau
    return math.log(uniform) < (reward - tau) / beta
