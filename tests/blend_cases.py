"""Logits of several models with weights, for tests of what blends them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def make_blend(seed: int, models: int, room: int, lanes: int, vocab: int,
               unread: float = float("nan")) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, weights, done, out): weights of both signs and zeros, beside which lies `unread`; tokens that are
    forbidden; a lane in five is done, and `out` is no model's."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(models, room, vocab)).astype(np.float32) * 3
    logits[draw.random(logits.shape) < 0.05] = -np.inf
    weights = draw.choice(np.array([0.0, 0.3, 0.7, 1.0, -0.4, 2.5, -1.0], np.float32), (models, room))
    logits[weights == 0.0] = unread
    done = draw.random(lanes) < 0.2
    return (torch.tensor(logits), torch.tensor(weights), torch.tensor(done, dtype=torch.int32),
            torch.full((lanes, vocab), 7.0))


def make_strange_blend() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six lanes of two models and three tokens, of which the second has logits that are no numbers, or infinite."""
    inf, nan = float("inf"), float("nan")
    second = [(-inf, 1.0), (1.0, -inf), (nan, -inf), (inf, 1.0), (1.0, inf), (3e38, 3e38)]
    weights = [(1.0, 1.0), (1.0, -1.0), (0.5, 0.5), (1.0, 1.0), (1.0, -1.0), (2.0, 2.0)]
    logits = torch.tensor([[(1.0, lane[model], -2.0) for lane in second] for model in range(2)])
    return logits, torch.tensor(weights).T.contiguous(), torch.zeros(6, dtype=torch.int32), torch.zeros(6, 3)


STRANGE = ["-inf", "-inf", "nan", "nan", "nan", "inf"]
"""What becomes of the second token of each lane of `make_strange_blend`."""
