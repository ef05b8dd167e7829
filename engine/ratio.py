"""Ratios of probabilities: what the language model says of tokens that another model has drawn."""

from __future__ import annotations

from collections.abc import Sequence

from stars.cache import OWN_STORE, PagedCache
from stars.models import Models
from stars.passes import Span
from stars.request import Lane, Reading


class RatioReader:
    """log p - log q of every token of an attempt: p the language model's, q that of the model that drew it, both at
    temperature 1 and without filters.

    The language model runs an attempt in the slab that it was drawn in, so that it need not read again what is kept.
    Penalties would be in q alone: requests with some are refused.
    """

    def __init__(self, models: Models, cache: PagedCache):
        self._models = models
        self._cache = cache

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """As many as one pass holds."""
        passes = self._models.own.passes
        return max(1, min(passes.max_sequences, passes.max_rows // tokens) // responses)

    def read(self, lanes: Sequence[Lane]) -> list[Reading]:
        """Each token's ratio; no reward."""
        spans = []
        for lane in lanes:
            assert lane.slab is not None
            hypothesis, first = lane.hypothesis, lane.slab * self._cache.slab_len
            inputs = [hypothesis.last_token, *lane.token_ids[:-1]]
            table = hypothesis.pages
            spans.append(Span(table, inputs, table.length, range(first, first + len(inputs))))
        found = self._models.own.passes.logprobs(spans, [lane.token_ids for lane in lanes])
        readings = []
        for lane, logprobs in zip(lanes, found, strict=True):
            lane.stores = tuple(sorted({*lane.stores, *OWN_STORE}))
            ratios = [p - q for p, q in zip(logprobs, lane.logprobs, strict=True)]
            readings.append(Reading(None, ratios, True))
        return readings
