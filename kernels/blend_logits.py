"""Logits of several models as one row of logits: their weighted sum, by which a token is drawn from a blend of them.

softmax(sum over models m of weight_m * logits_m) is the normalised product of p_m ** weight_m: log-probabilities differ
from logits by a constant of each row, which a softmax does not see. Each lane has weights of its own.

A model whose weight is 0 for a lane is not read there; where all are, every token is as probable as any other. A token
that a weighted model forbids (its logit is -inf) is forbidden, whatever the sign of the weight. Logits of a weighted
model that are NaN or +inf give NaN.

Each logit is formed in float64, in the order of the models, and rounded once, so every implementation gives the same
bits: a product of two float32 is exact in float64, whether or not a compiler fuses it with the sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stars.kernels.dispatch import operation


def blend_logits_reference(logits: Tensor, weights: Tensor, done: Tensor, out: Tensor) -> None:
    """As `blend_logits`, one lane at a time."""
    _check(logits, weights, done, out)
    for lane in range(out.shape[0]):
        if done[lane]:
            continue
        total = torch.zeros(out.shape[1], dtype=torch.float64, device=out.device)  # [vocab]
        forbidden = torch.zeros_like(total, dtype=torch.bool)
        for model in range(logits.shape[0]):
            weight = float(weights[model, lane])
            if weight:
                row = logits[model, lane].double()
                forbidden |= row == -math.inf
                total = total + weight * row.masked_fill(row == -math.inf, 0.0).masked_fill(row == math.inf, math.nan)
        out[lane] = total.masked_fill(forbidden & ~total.isnan(), -math.inf).float()


@operation(cpu="stars.bindings.libstars:blend_logits", cuda="stars.kernels.triton.blend_logits:blend_logits",
           reference=blend_logits_reference)
def blend_logits(logits: Tensor, weights: Tensor, done: Tensor, out: Tensor) -> None:
    """out[i] = sum over models m of weights[m, i] * logits[m, i], of the lanes i that are not done.

    logits float32 [models, room, vocab]; weights float32 [models, room]; done int32 [lanes]; out float32 [lanes,
    vocab], lanes <= room, which may be the first lanes of one of the models' own logits.
    """


def _check(logits: Tensor, weights: Tensor, done: Tensor, out: Tensor) -> None:
    models, room, vocab = logits.shape
    if weights.shape != (models, room) or out.shape[1] != vocab or out.shape[0] > room or done.shape != out.shape[:1]:
        raise ValueError(f"blend_logits: logits {list(logits.shape)}, weights {list(weights.shape)} and done "
                         f"{list(done.shape)} do not fit out {list(out.shape)}")
