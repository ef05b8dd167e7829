"""The loops of RSD (arXiv 2501.19324) and GSI (arXiv 2506.04118), written out: every text read from its start, by every
model.

They know nothing of pages, lanes, stores or the engine's rules. What is random is asked of `noise` and `uniform`, so
that they can be given the engine's own draws; attempts count from 1, the redrawn ones on from the drafts. Segments are
of a fixed length and rewards of the response so far, where the published code has steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

Logits = Callable[[list[int]], np.ndarray]


class Candidate(NamedTuple):
    """A segment that was drawn, and what was found out about it."""

    token_ids: list[int]
    reward: float | None  # None where nobody asks
    tilted: float | None  # the reward with the log-ratio of the models, where that counts


class Kept(NamedTuple):
    """A segment that became part of the text."""

    token_ids: list[int]
    drafted: bool  # else the large model has drawn it
    winner: int  # among all candidates
    candidates: list[Candidate]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities at temperature 1."""
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def run(small: Logits, large: Logits, reward: Callable[[list[int]], float], prompt: list[int],
        noise: Callable[[int, int, int, int], np.ndarray], uniform: Callable[[int, int], float], *, variant: str,
        threshold: float, beta: float, n: int, size: int, max_tokens: int, temperature: float = 1.0, top_k: int = 0,
        stop_ids: Collection[int] = ()) -> list[Kept]:
    """All segments. small, large: float64 logits after ids; reward: of prompt and response, without a stop id at its
    end. noise(segment, attempt, position, vocab): Gumbel numbers of a draw; uniform(segment, attempt): of a decision."""
    def content(ids: list[int]) -> list[int]:
        return ids[:-1] if len(ids) > len(prompt) and ids[-1] in stop_ids else ids

    def draw(model: Logits, attempt: int) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < min(size, max_tokens - (len(text) - len(prompt))):
            logits = model(text + drawn)
            largest = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
            scores = logits[largest] / temperature + noise(len(kept), attempt, len(drawn), len(logits))[largest]
            drawn.append(int(largest[np.argmax(scores)]))
            if drawn[-1] in stop_ids:
                break
        return drawn

    def logprob(model: Logits, segment: list[int]) -> float:
        return float(sum(log_softmax(model(text + segment[:place]))[token] for place, token in enumerate(segment)))

    def chosen(values: list[float], first: int) -> int:
        """By the largest of beta * value - log(-log u): a draw from softmax(beta * value)."""
        return int(np.argmax([beta * value - math.log(-math.log(uniform(len(kept), first + place)))
                              for place, value in enumerate(values)]))

    text, kept = list(prompt), []
    while len(text) - len(prompt) < max_tokens and text[-1] not in stop_ids:
        candidates = []
        for attempt in range(1, (n if variant == "gsi" else 1) + 1):
            segment = draw(small, attempt)
            value = reward(content(text + segment))
            tilted = value + (logprob(large, segment) - logprob(small, segment)) / beta if variant == "gsi" else None
            candidates.append(Candidate(segment, value, tilted))
        if variant == "gsi":
            winner = chosen([one.tilted for one in candidates], 1)
            drafted = candidates[winner].tilted >= threshold
        else:
            winner, value = 0, candidates[0].reward
            drafted = value >= threshold if beta == 0 else uniform(len(kept), 1) < min(
                1.0, math.exp((value - threshold) / beta))
        if not drafted:
            first = len(candidates) + 1
            for attempt in range(first, first + (n if variant == "gsi" else 1)):
                segment = draw(large, attempt)
                value = reward(content(text + segment)) if variant == "gsi" else None
                candidates.append(Candidate(segment, value, None))
            winner = first - 1
            if variant == "gsi":
                winner += chosen([one.reward for one in candidates[first - 1 :]], first)
        kept.append(Kept(candidates[winner].token_ids, drafted, winner, candidates))
        text = text + candidates[winner].token_ids
    return kept
