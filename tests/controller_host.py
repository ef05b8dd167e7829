"""A host of libstars' segment controller in a few lines: a model that says logits, a reward, and no cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from stars.bindings import libstars
from stars.bindings.controller import Controller, Drawn, Fed, Said, Verdict

Logits = Callable[[list[int]], np.ndarray]
"""Of the token after these ones of a response, float [vocab]."""
Noise = Callable[[int, int, int, int, int], np.ndarray]
"""Gumbel noise of (seed, position, attempt, stream, vocab), float [vocab]."""


class Tried(NamedTuple):
    """An attempt, and what the law said of it; None of those after the winner."""

    token_ids: list[int]
    reward: float | None
    said: Said | None


class Kept(NamedTuple):
    """A committed segment."""

    token_ids: list[int]
    attempts: list[Tried]
    winner: int  # from 1
    accepted: bool


class Hosted(NamedTuple):
    """A response."""

    token_ids: list[int]
    segments: list[Kept]
    finish_reason: str | None
    progress: Any  # stars_progress


def noise(seed: int, position: int, attempt: int, stream: int, vocab: int) -> np.ndarray:
    """The library's."""
    return libstars.gumbel(seed, position, attempt, stream, vocab).numpy()


def draw(prefix: list[int], drawn: Drawn, logits: Logits, eos: int, noise: Noise = noise) -> list[int]:
    """The tokens of an attempt: the argmax of logits and noise, until EOS."""
    tokens: list[int] = []
    while len(tokens) < drawn.max_tokens and eos not in tokens:
        row = logits(prefix + tokens)
        tokens.append(int(np.argmax(row + noise(drawn.seed, len(tokens), drawn.attempt, drawn.stream, len(row)))))
    return tokens


def respond(controller: Controller, width: int, logits: Logits, reward: Callable[[Sequence[int]], float], eos: int,
            draw: Callable[..., list[int]] = draw) -> Hosted:
    """A whole response. Rewards are computed in order, up to the winner; `reward` sees no EOS."""
    response: list[int] = []
    segments, tried = [], []
    while attempts := controller.next(width):
        decided = None
        for drawn in attempts:
            tokens = draw(response, drawn, logits, eos)
            ended = tokens[-1] == eos
            if decided is not None and decided.winner:  # drawn beside the winner: its tokens count
                controller.feed([Fed(drawn.attempt, len(tokens), ended, math.nan)])
                tried.append(Tried(tokens, None, None))
                continue
            value = reward([token for token in response + tokens if token != eos])
            decided = controller.feed([Fed(drawn.attempt, len(tokens), ended, value)])
            tried.append(Tried(tokens, value, decided.said[0]))
        if decided.winner:
            controller.commit()
            kept = tried[decided.winner - 1].token_ids
            segments.append(Kept(kept, tried, decided.winner, decided.verdict == Verdict.ACCEPT))
            response, tried = response + kept, []
    return Hosted(response, segments, controller.finish_reason, controller.progress())
