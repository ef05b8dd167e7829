"""What the language models themselves say of attempts: the readers of an engine, one for all that a plan may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from stars.arguments import shown
from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.errors import RequestError
from stars.filtered_ratio import FilteredRatio
from stars.hidden_states import HiddenReader
from stars.model.action_head import ActionHead
from stars.models import Models
from stars.plan import Hidden, Plan, Ratio
from stars.ratio import RatioReader
from stars.request import Reader


class Parts(NamedTuple):
    """What readers are made of: an engine's own."""

    models: Models
    cache: PagedCache
    config: EngineConfig
    heads: Mapping[str, ActionHead]  # of Engine(heads=…), by name


def _ratio(reads: Ratio, parts: Parts) -> Reader:
    if reads.filtered:
        return FilteredRatio(parts.models.own.passes)
    return RatioReader(parts.models, parts.cache)


def _hidden(reads: Hidden, parts: Parts) -> Reader:
    if parts.config.target.own_memory:
        raise RequestError('MARA is not available on a GPU yet: device="cpu" runs it, build the engine with that')
    if reads.head not in parts.heads:
        given = ", ".join(map(repr, parts.heads)) or "none"
        raise RequestError(f"there is no head named {shown(reads.head)} (those given: {given}): build the engine with "
                           f"Engine(model, heads={{{shown(reads.head)}: FILE}})")
    return HiddenReader(parts.heads[reads.head], parts.models.own.passes, parts.cache)


MAKERS: dict[type[Hidden] | type[Ratio], Callable[[Any, Parts], Reader]] = {Hidden: _hidden, Ratio: _ratio}
"""What makes the reader of a plan's `score.reads`, by its kind. It raises RequestError where the engine lacks what the
reader needs."""


class Readers:
    """The readers of an engine. One serves all requests that ask for the same: what differs between them is on the
    lanes."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._made: dict[Hidden | Ratio, Reader] = {}

    def reader_of(self, plan: Plan) -> Reader | None:
        """The reader of a plan, None where it asks for none; RequestError where there can be none."""
        reads = plan.score.reads
        if reads is None:
            return None
        if reads not in self._made:
            maker = MAKERS.get(type(reads))
            if maker is None:
                raise RequestError(f"score.reads={reads} has no reader: use another policy")
            self._made[reads] = maker(reads, self._parts)
        return self._made[reads]
