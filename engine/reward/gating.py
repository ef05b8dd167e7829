"""The weights that a gated reward head gives a prompt's objectives: one row of the model, once for each prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from stars.cache import BlockTable, PagedCache
from stars.errors import RequestError
from stars.model.heads import Gate
from stars.passes import Passes, Span

KEPT = 64
"""Prompts whose weights are kept: siblings, and responses that give way and come back, ask again."""


class Gating:
    """Reads a head's gate in slabs. What it gives depends on the tokens up to where it is read and on nothing else:
    shared pages, chunks of a prompt and other requests leave its bits alone in deterministic mode."""

    def __init__(self, gate: Gate, passes: Passes, cache: PagedCache):
        self._gate, self._passes, self._cache = gate, passes, cache
        self._kept: OrderedDict[tuple[int, ...], list[float]] = OrderedDict()

    def check(self, prefix: Sequence[int]) -> None:
        """RequestError for a prompt without the tokens at which the gate is read."""
        self._position(prefix)

    def weights(self, texts: Sequence[tuple[BlockTable, list[int]]]) -> list[list[float]]:
        """For each prompt the weights of its objectives; given are the pages that hold it, but for its last token, and
        its ids."""
        keys = [tuple(prefix[: self._position(prefix) + 1]) for _, prefix in texts]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: table for key, (table, _) in zip(keys, texts, strict=True) if key not in found}
        waiting = list(missing.items())
        most = max(1, self._cache.num_free_slabs)
        for first in range(0, len(waiting), most):
            found |= self._read(waiting[first : first + most])
        for key in found:
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return [found[key] for key in keys]

    def _read(self, wanted: Sequence[tuple[tuple[int, ...], BlockTable]]) -> dict[tuple[int, ...], list[float]]:
        """One pass, of a row each. It sees the pages before it, whatever else they hold."""
        slabs = [self._cache.take_slab() for _ in wanted]
        firsts = [slab * self._cache.slab_len for slab in slabs]
        spans = [Span(table, key[-1:], len(key) - 1, range(first, first + 1))
                 for (key, table), first in zip(wanted, firsts, strict=True)]
        weights: list[list[float]] = self._gate.weights(self._passes.states(spans)).tolist()
        for slab in slabs:
            self._cache.return_slab(slab)
        return {key: one for (key, _), one in zip(wanted, weights, strict=True)}

    def _position(self, prefix: Sequence[int]) -> int:
        position = self._gate.position(prefix)
        if position is None:
            raise RequestError(f"the prompt for the reward model lacks the token ids {list(self._gate.pattern)} at "
                               "which its gate is read: give the prompt as messages, or say other ones with "
                               'CausalReward(head={"prompt_pattern": [ids]})')
        return position
