"""MARA's loop written out, over numpy's toy or transformers: all is computed anew for every candidate, one by one.

Nothing of the engine is used but the oracle's filters; the head is written out as its authors describe it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import oracle


class Choice(NamedTuple):
    """One token: the candidates in order, P(accept) of those that were asked about, and which was taken."""

    candidates: list[int]
    accepted: list[float]
    taken: int


def head_tensors(hidden: int, h: int, seed: int, bias: float = 0.0) -> dict[str, Tensor]:
    """A random head; bias: of accepting."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "ln.weight": 1 + normal(hidden, scale=0.2), "ln.bias": normal(hidden, scale=0.2),
        "linear1.weight": normal(h, hidden, scale=hidden**-0.5), "linear1.bias": normal(h, scale=0.3),
        "linear2.weight": normal(h // 4, h, scale=2 * h**-0.5), "linear2.bias": normal(h // 4, scale=0.3),
        "output_linear.weight": normal(2, h // 4, scale=4 * (h // 4) ** -0.5),
        "output_linear.bias": torch.tensor([0.0, bias])}


def accept_probability(tensors: Mapping[str, Tensor], state: np.ndarray) -> float:
    """LayerNorm, two layers with ReLU, softmax of two; float64."""
    weights = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    x = (state - state.mean()) / math.sqrt(state.var() + 1e-5) * weights["ln.weight"] + weights["ln.bias"]
    for part in ("linear1", "linear2"):
        x = np.maximum(weights[f"{part}.weight"] @ x + weights[f"{part}.bias"], 0.0)
    reject, accept = weights["output_linear.weight"] @ x + weights["output_linear.bias"]
    return 1 / (1 + math.exp(reject - accept))


def decide(logits: Callable[[Sequence[int]], np.ndarray], state: Callable[[Sequence[int]], np.ndarray],
           tensors: Mapping[str, Tensor], prompt: list[int], params, topk: int, eos: int) -> list[Choice]:
    """The whole response. logits: of the token after some; state: the hidden state of the last of some."""
    response: list[int] = []
    choices = []
    while len(response) < params.max_tokens and eos not in response[-1:]:
        scores = oracle.penalised(logits(prompt + response), prompt, response, params)
        kept = oracle.proposal(scores, params)
        candidates = [int(token) for token in np.argsort(-scores, kind="stable") if kept[token] > -math.inf][:topk]
        accepted: list[float] = []
        taken = 0
        for place, token in enumerate(candidates if len(candidates) > 1 else []):
            accepted.append(accept_probability(tensors, state(prompt + response + [token])))
            if accepted[-1] > 0.5:
                taken = place
                break
        response.append(candidates[taken])
        choices.append(Choice(candidates, accepted, taken))
    return choices
