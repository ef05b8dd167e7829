"""The published loop of CARDS (arXiv 2406.16306), written out: one candidate at a time, every text read from its start.

It knows nothing of pages, lanes, widths or the engine's rules. What is random is asked of `noise` and `uniform`, so
that it can be given the engine's own draws. With `stop_ids` and `clip` it ends where the engine does, which the
published loop has not: there EOS is a token as any other, and the last segment may run past max_new_token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np


class Candidate(NamedTuple):
    """A segment that was drawn, and what was decided about it."""

    token_ids: list[int]
    reward: float
    threshold: float
    accepted: bool


class Kept(NamedTuple):
    """A segment that became part of the text."""

    token_ids: list[int]
    accepted: bool  # else it is the best that was seen
    candidates: list[Candidate]


def entropy(logits: np.ndarray) -> float:
    """Nats of softmax(logits) over the whole vocabulary, at temperature 1."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def run(lm: Callable[[list[int]], np.ndarray], reward: Callable[[list[int]], float], prompt: list[int],
        noise: Callable[[int, int, int, int], np.ndarray], uniform: Callable[[int, int], float], *,
        option: str = "soft", entropy_threshold: float = 3.0, reward_threshold: float = 8.5, alpha: float = 0.5,
        beta: float = 0.7, topk: int = 40, max_new_token: int = 128, shortest: int = 4, longest: int = 64,
        regenerations: int = 20, stop_ids: Collection[int] = (), clip: bool = False) -> list[Kept]:
    """All segments. lm: float64 logits after ids; reward: of prompt and response, without a stop id at its end.

    noise(segment, attempt, position, vocab) are the Gumbel numbers of a draw, uniform(segment, attempt) that of a test;
    attempts count from 1.
    """
    def content(ids: list[int]) -> list[int]:
        return ids[:-1] if len(ids) > len(prompt) and ids[-1] in stop_ids else ids

    start = (1 - alpha) * reward(prompt) + alpha * reward_threshold
    text, kept = list(prompt), []
    candidates: list[Candidate] = []
    best, best_reward, regenerated = None, -1e34, 0
    while len(text) - len(prompt) < max_new_token and text[-1] not in stop_ids:
        drawn = list(text)
        most = min(longest, max_new_token - (len(text) - len(prompt))) if clip else longest
        while len(drawn) - len(text) < most:
            logits = lm(drawn)
            if len(drawn) - len(text) >= shortest and entropy(logits) >= entropy_threshold:
                break
            largest = np.argsort(-logits, kind="stable")[:topk]
            scores = logits[largest] / beta + noise(len(kept), regenerated + 1, len(drawn) - len(text), len(logits))[
                largest]
            drawn.append(int(largest[np.argmax(scores)]))
            if drawn[-1] in stop_ids:
                break
        value = reward(content(drawn))
        if value > best_reward:
            best, best_reward = drawn, value
        threshold = min(start + (len(drawn) - len(prompt)) * (reward_threshold - start) / max_new_token,
                        reward_threshold)
        accepted = False
        if regenerated < regenerations:  # the last candidate is not tested
            accepted = (value >= threshold if option == "hard" else
                        uniform(len(kept), regenerated + 1) < min(1.0, math.exp((value - threshold) / beta)))
        candidates.append(Candidate(drawn[len(text) :], value, threshold, accepted))
        if not accepted and regenerated < regenerations:
            regenerated += 1
            continue
        winner = drawn if accepted else best
        kept.append(Kept(winner[len(text) :], accepted, candidates))
        text, candidates, best, best_reward, regenerated = winner, [], None, -1e34, 0
    return kept
