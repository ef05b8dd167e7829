"""Guidance at every token, written out over transformers' models: all texts are read from their start, one at a time.

It knows nothing of pages, lanes, drafts or blends on a device. The filters are transformers' own processors, in the
order in which the engine's apply; presence and frequency, which those have not, are written out. What is random is
asked of `noise`, so that it can be given the engine's own draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Settings(NamedTuple):
    """What transformers calls by these names, and the two penalties that it has not."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@torch.no_grad()
def run(models: Sequence[tuple[torch.nn.Module, float]], prompt: list[int], max_new_tokens: int, settings: Settings,
        noise: Callable[[int, int], np.ndarray], stop_ids: Collection[int] = ()) -> tuple[list[int], float]:
    """The new tokens, and the log-probability of them all before temperature and filters.

    models: with the weights of their logits. noise(place, vocab): the Gumbel numbers of the token at a place.
    """
    ids, total = list(prompt), 0.0
    for place in range(max_new_tokens):
        read = torch.tensor([ids])
        scores = sum(weight * model(read).logits[:, -1].double() for model, weight in models)
        scores = _penalised(scores, read, Counter(ids[len(prompt) :]), settings)
        before = scores.log_softmax(-1)
        if settings.temperature == 0:
            token = int(scores.argmax())
        else:
            for filtered in _filters(settings):
                scores = filtered(read, scores)
            token = int((scores[0] + torch.tensor(noise(place, scores.shape[1]))).argmax())
        total += float(before[0, token])
        ids.append(token)
        if token in stop_ids:
            break
    return ids[len(prompt) :], total


def _penalised(scores: Tensor, read: Tensor, said: Counter[int], settings: Settings) -> Tensor:
    if settings.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(read, scores)
    scores = scores.clone()
    for token, count in said.items():
        scores[0, token] -= settings.frequency_penalty * count + settings.presence_penalty
    return scores


def _filters(settings: Settings) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.min_p:
        found.append(MinPLogitsWarper(settings.min_p))
    if settings.top_k:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        found.append(TopPLogitsWarper(settings.top_p))
    return found
