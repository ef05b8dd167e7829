"""The published loop of Persona-Judge (arXiv 2504.12663), written out, with the right residual: every text is read from
its start, one distribution at a time.

It knows nothing of pages, lanes or the engine's rules. What is random is asked of `noise`, `uniform` and `again`, so
that it can be given the engine's own draws. With `stop_ids` and `max_tokens` it ends where the engine does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np


class Round(NamedTuple):
    """What one round added."""

    token_ids: list[int]
    drafted: list[int]
    accepted: int  # of the drafted tokens
    chance: float  # that all of them are


def run(draft: list[int], judge: list[int], lm: Callable[[list[int]], np.ndarray],
        noise: Callable[[int, int], np.ndarray], uniform: Callable[[int, int], float],
        again: Callable[[int, int], np.ndarray], *, gamma: int, alternate: bool, max_tokens: int,
        stop_ids: Collection[int] = ()) -> list[Round]:
    """All rounds of a response after the contexts `draft` and `judge`. lm: log-probabilities of what is drawn from
    after ids, -inf where filtered. noise(round, place), uniform(round, place) and again(round, place): of a drafted
    token, of its test, and of the token that is drawn after the accepted ones."""
    response: list[int] = []
    rounds: list[Round] = []
    while len(response) < max_tokens and not (response and response[-1] in stop_ids):
        number = len(rounds)
        writes, reads = (judge, draft) if alternate and number % 2 else (draft, judge)
        drafted: list[int] = []
        q, p = [], []
        while len(drafted) < min(gamma, max_tokens - len(response)) and not (drafted and drafted[-1] in stop_ids):
            q.append(lm(writes + response + drafted))
            p.append(lm(reads + response + drafted))
            drafted.append(int(np.argmax(q[-1] + noise(number, len(drafted)))))
        p.append(lm(reads + response + drafted))
        kept: list[int] = []
        for place, token in enumerate(drafted):
            ratio = math.exp(p[place][token] - q[place][token])
            if not uniform(number, place) < min(1.0, ratio):
                break
            kept.append(token)
        accepted = len(kept)
        if accepted < len(drafted):
            residual = np.maximum(np.exp(p[accepted]) - np.exp(q[accepted]), 0.0)
            with np.errstate(divide="ignore"):
                kept.append(int(np.argmax(np.log(residual / residual.sum()) + again(number, accepted))))
        elif kept[-1] not in stop_ids and len(response) + len(kept) < max_tokens:
            kept.append(int(np.argmax(p[accepted] + again(number, accepted))))
        chance = math.prod(min(1.0, math.exp(p[place][token] - q[place][token]))
                           for place, token in enumerate(drafted))
        rounds.append(Round(kept, drafted, accepted, chance))
        response += kept
    return rounds
