"""The most probable tokens of every lane, in order: what is enumerated where nothing is drawn.

Of a lane that wants k tokens, those k of the largest logits, of equal logits the lowest ids first. What the filters of
`sample_step` would not keep is left out, and so is a token whose logit is -inf: the columns that are left get -1 with
log-probability -inf. The filters see z = logits / temperature in float32, and keep everything where the temperature is
0, or so small that z overflows. The log-probability is log_softmax(logits) of the logits given.

A lane whose logits contain NaN or +inf, or nothing but -inf, gets -1 in every column.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stars.kernels.dispatch import Implementation, operation
from stars.kernels.sample_step import sampling_threshold
from stars.kernels.types import Ranking

GROUP = 64  # tokens, of which the largest bounds what can be among the most probable
SELECTED = 1 << 22  # logits of which a GPU selects at a time, with 12 bytes of scratch memory for each
TORCH_LAUNCHES, KERNELS = 24, 4
"""Launches of a GPU's at most: torch's for each selection, by a count of its operations, which may be several each; and
ours."""

def top_tokens_reference(logits: Tensor, ranking: Ranking, filters: bool = True) -> None:
    """As `top_tokens`; any device, one lane at a time. ValueError if filters=False and a lane has a filter."""
    _check(logits, ranking)
    if not filters and bool((_filtered(ranking) & (ranking.ranks > 0)).any()):
        raise ValueError("top_tokens: a lane has top_k, top_p or min_p: call it with filters=True")
    for lane, row in enumerate(logits):  # row [vocab]
        wanted = int(ranking.ranks[lane])
        if not wanted:
            continue
        ranking.token_ids[lane], ranking.logprobs[lane] = -1, -math.inf
        if not math.isfinite(row.max().item()):  # max propagates NaN
            continue
        order = torch.sort(row, descending=True, stable=True).indices[:wanted]  # the lowest of equals comes first
        order = order[row[order] > -torch.inf]
        scaled = row / ranking.temperature[lane]
        if math.isfinite(scaled.max().item()):
            threshold = sampling_threshold(scaled, int(ranking.top_k[lane]), float(ranking.top_p[lane]),
                                           float(ranking.min_p[lane]))
            order = order[scaled[order] >= threshold]
        ranking.token_ids[lane, : len(order)] = order.to(torch.int32)
        # In float64: a float32 sum of a large vocabulary's flat tail errs by 3e-4 of it.
        ranking.logprobs[lane, : len(order)] = torch.log_softmax(row.double(), dim=0)[order].float()


def _on_the_host(logits: Tensor, ranking: Ranking, filters: bool = True) -> None:
    """By numpy, without a sort of the vocabulary: one lane takes a few passes over its logits."""
    from stars.bindings.libstars import leave_out

    leave_out()
    _check(logits, ranking)
    token_ids, logprobs = ranking.token_ids.numpy(), ranking.logprobs.numpy()
    for lane in np.flatnonzero(ranking.ranks.numpy()).tolist():
        values = logits[lane].numpy()  # [vocab]
        token_ids[lane], logprobs[lane] = -1, -np.inf
        highest = values.max()  # NaN where one is
        if not math.isfinite(highest):
            continue
        order = _largest(values, int(ranking.ranks[lane]))
        order = order[values[order] > -np.inf]
        if filters:
            order = order[_kept(values, order, ranking, lane)]
        token_ids[lane, : len(order)] = order
        with np.errstate(over="ignore"):  # of logits that lie further apart than a float32 can say
            mass = np.exp(values - highest).sum(dtype=np.float64)
            logprobs[lane, : len(order)] = values[order].astype(np.float64) - float(highest) - math.log(mass)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest, in order, the lowest of equal ones first."""
    count = min(count, len(values))
    bounds = values
    if len(values) >= 4 * GROUP * count:  # at least `count` reach what as many maxima of groups reach, and few more
        bounds = values[: len(values) // GROUP * GROUP].reshape(-1, GROUP).max(axis=1)
    there = np.flatnonzero(values >= -np.partition(-bounds, count - 1)[count - 1])
    return there[np.argsort(-values[there], kind="stable")[:count]]


def _kept(values: np.ndarray, order: np.ndarray, ranking: Ranking, lane: int) -> np.ndarray:
    """Which of `order`, the first tokens of the vocabulary in order, the lane's filters keep.

    They keep a token by what is strictly more probable, all of which is in `order` before it; top_p besides by the sum
    of what the other filters keep.
    """
    top_k, top_p, min_p = int(ranking.top_k[lane]), float(ranking.top_p[lane]), float(ranking.min_p[lane])
    temperature = np.float32(ranking.temperature[lane])
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        z = values[order] / temperature
    if not np.isfinite(z[0]):
        return np.ones(len(order), dtype=bool)
    more_probable = np.searchsorted(-z, -z)  # how many, of each
    least = np.float32(-np.inf)
    if min_p > 0.0:
        least = z[0] + np.float32(math.log(min_p))
    kept: np.ndarray = z >= least
    if 0 < top_k < len(values):
        kept &= more_probable < top_k
    if top_p < 1.0:
        if 0 < top_k < len(values):
            least = max(least, values[_largest(values, top_k)[-1]] / temperature)
        with np.errstate(over="ignore"):
            everything = values / temperature
        total = np.exp(everything[everything >= least] - z[0]).sum(dtype=np.float64)
        mass = np.exp(z.astype(np.float64) - float(z[0]))
        above = (np.cumsum(mass) - mass)[more_probable]
        kept &= (above < top_p * total) | (more_probable == 0)
    return kept


@operation(cpu=[Implementation(_on_the_host)], cuda="stars.kernels.triton.top_tokens:top_tokens",
           reference=top_tokens_reference)
def top_tokens(logits: Tensor, ranking: Ranking, filters: bool = True) -> None:
    """Ranks the tokens of `logits` float32 [lanes, vocab] for the lanes of `ranking` that want some.

    With filters=False the caller knows that no lane has top_k, top_p or min_p. On a GPU filters find their thresholds
    as `sample_step` does, so that the two differ from the reference in the same rare cases.
    """


def selection_rows(vocab: int) -> int:
    """Lanes of one selection on a GPU."""
    return max(1, SELECTED // vocab)


def scratch_bytes(lanes: int, vocab: int) -> int:
    """Of a GPU's memory that is kept for rankings of up to so many lanes."""
    return 12 * min(lanes, selection_rows(vocab)) * vocab + 8 * vocab


def launches(lanes: int, vocab: int) -> int:
    """Of a ranking on a GPU, at most."""
    return KERNELS + TORCH_LAUNCHES * -(-lanes // selection_rows(vocab))


def _filtered(ranking: Ranking) -> Tensor:
    return (ranking.top_k > 0) | (ranking.top_p < 1.0) | (ranking.min_p > 0.0)


def _check(logits: Tensor, ranking: Ranking) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[0] != ranking.ranks.shape[0]:
        raise ValueError(f"top_tokens: logits are {logits.dtype} {list(logits.shape)}, expected float32 "
                         f"[{ranking.ranks.shape[0]}, vocab]")
    most = int(ranking.ranks.max()) if len(ranking.ranks) else 0
    if most > ranking.token_ids.shape[1]:
        raise ValueError(f"top_tokens: a lane wants {most} tokens and there are columns for "
                         f"{ranking.token_ids.shape[1]}")
