"""What a language model makes of attempts in their judge's context: log p - log q by token, and the token that follows.

p and q are what the sampling parameters draw from, temperature and filters included: p in the judge's context, q in
that of the draft, from the very logits that its tokens were drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stars.config import EngineConfig
from stars.edits import names_of
from stars.errors import ModelError, RequestError
from stars.kernels import philox
from stars.kernels.sample_step import proposal_logprobs
from stars.passes import Passes, Span
from stars.plan import Plan
from stars.proposer import NAN_LOGITS
from stars.request import Lane, Reading
from stars.sampling import SamplingParams


class Rows(NamedTuple):
    """Logits of an attempt of n tokens, float32 and as they come out of the head."""

    judge: Tensor  # [n + 1, vocab], the last after all of it
    draft: Tensor  # [n, vocab]


class FilteredRatio:
    """Reads attempts in the pages of their judge's context, all of them in a pass if they fit one."""

    def __init__(self, passes: Passes):
        self._passes = passes

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """One: the first attempt decides."""
        return 1

    def read(self, lanes: Sequence[Lane]) -> list[Reading]:
        """Each token's log p - log q; what `draw` needs is kept. ModelError where logits are NaN or infinite."""
        logits = self._passes.logits([self._span(lane) for lane in lanes])
        if not bool(torch.isfinite(logits.amax(1)).all()):
            raise ModelError(NAN_LOGITS)
        readings = []
        for lane, judge in zip(lanes, logits.split([len(lane.token_ids) + 1 for lane in lanes]), strict=True):
            rows = Rows(judge, lane.logits[: len(lane.token_ids)])
            lane.logits = None
            p, q = _logprobs(lane, rows.judge[:-1]), _logprobs(lane, rows.draft)
            readings.append(Reading(None, [_ratio(float(p[index, token]), float(q[index, token]))
                                           for index, token in enumerate(lane.token_ids)], rows))
        return readings

    def _span(self, lane: Lane) -> Span:
        """The attempt, after the token before it, in the slab of its judge."""
        hypothesis, cache = lane.hypothesis, self._passes.cache
        assert lane.judge_slab is not None
        context = hypothesis.judging
        token_ids = [hypothesis.last_in(context), *lane.token_ids]
        first = lane.judge_slab * cache.slab_len
        return Span(context.table, token_ids, context.table.length, range(first, first + len(token_ids)))


def check_prompted(name: str, plan: Plan, params: SamplingParams, config: EngineConfig) -> None:
    """RequestError where attempts cannot be drawn in one context and judged in another. name: of the policy."""
    if config.target.own_memory:
        raise RequestError(f'{name} is not available on a GPU yet: device="cpu" runs it, build the engine with that')
    shaping = names_of(params)
    if shaping:
        raise RequestError(f"{name} draws and judges without penalties, biases and bans: leave {', '.join(shaping)} "
                           "out")
    rows = plan.segment.draft + 1
    if rows > config.max_segment_size:
        raise RequestError(f"{name} judges {rows} tokens at a time, one before those that it drafts, and the engine's "
                           f"slabs hold {config.max_segment_size}: build it with a larger max_segment_size")


def draw(lane: Lane, position: int, source: str) -> int:
    """The token after the first `position` tokens of an attempt: from p, or, where source is "residual", from
    max(p - q, 0), normalised. Where rounding leaves nothing of that, p and q are one, and it is from p.

    The argmax of log p + Gumbel noise of its own kind, the lowest id of equals.
    """
    rows: Rows = lane.reading
    [weights] = _logprobs(lane, rows.judge[position : position + 1])
    if source == "residual":
        [q] = _logprobs(lane, rows.draft[position : position + 1])
        left = (weights.exp() - q.exp()).clamp(min=0.0)
        if bool(left.any()):
            weights = left.log()
    hypothesis = lane.hypothesis
    words = philox.token_words(
        hypothesis.request.seed, position, hypothesis.skipped + lane.attempt,
        philox.pack_stream(hypothesis.drafts, hypothesis.sample), len(weights), philox.KIND_DRAW)
    return int((weights.numpy() + philox.gumbel(words)).argmax())


def _logprobs(lane: Lane, logits: Tensor) -> Tensor:
    """log of what the request's parameters draw from, float64 [rows, vocab]."""
    params = lane.hypothesis.request.params
    return proposal_logprobs(logits, params.temperature, params.top_k, params.top_p, params.min_p)


def _ratio(p: float, q: float) -> float:
    """log p - log q. What the judge never draws is never accepted, whatever the rounding of the draft's filters."""
    return p if p == -math.inf else p - q
