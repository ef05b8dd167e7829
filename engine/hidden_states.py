"""What a head says of the language model's hidden state at tokens that were enumerated: a row of a pass for each."""

from __future__ import annotations

from collections.abc import Sequence

from stars.cache import CommitMove, PagedCache
from stars.errors import RequestError
from stars.model.action_head import ActionHead
from stars.passes import Passes, Span
from stars.request import Hypothesis, Lane, Reading


class HiddenReader:
    """Reads attempts of one token as lanes over their response's pages, all responses' together.

    The pages lack the token before, whose keys the slab of the attempts has: they are put into the row where a commit
    puts them, beyond what the table's length says is valid. It says the same again afterwards, so that to everything
    else, a commit, a fork or an interrupt, nothing has happened. What the attempts themselves write goes to the slab's
    other rows, which nobody reads.
    """

    def __init__(self, head: ActionHead, passes: Passes, cache: PagedCache):
        if cache.slab_len < 2:
            raise RequestError("a head reads tokens in slabs of 2 tokens at least, and this engine's hold 1: build it "
                               "with a larger max_segment_size")
        self._head, self._passes, self._cache = head, passes, cache

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """As many as a pass is made for."""
        return max(1, self._passes.target.ridge_rows // responses)

    def read(self, lanes: Sequence[Lane]) -> list[Reading]:
        """P(accept) of each; None of one that has no other beside it."""
        asked: dict[Hypothesis, list[Lane]] = {}
        for lane in lanes:
            if not _alone(lane):
                asked.setdefault(lane.hypothesis, []).append(lane)
        if not asked:
            return [Reading() for _ in lanes]
        cache, room = self._cache, self._cache.slab_len - 1
        tables = {hypothesis: hypothesis.drafting.table for hypothesis in asked}
        lengths = {table: table.length for table in tables.values()}
        cache.commit([CommitMove(tables[hypothesis], _slab(those[0]) * cache.slab_len, 1, tables[hypothesis].length)
                      for hypothesis, those in asked.items()])
        accepted: dict[Lane, float] = {}
        while len(accepted) < sum(map(len, asked.values())):  # once, but for slabs shorter than there are attempts
            batch = [(place, lane) for those in asked.values()
                     for place, lane in enumerate([one for one in those if one not in accepted][:room])]
            spans = []
            for place, lane in batch:
                row = _slab(lane) * cache.slab_len + 1 + place
                table = tables[lane.hypothesis]
                spans.append(Span(table, lane.token_ids, table.length, range(row, row + 1)))
            probabilities = self._head.accept(self._passes.hidden(spans))
            accepted |= {lane: one for (_, lane), one in zip(batch, probabilities, strict=True)}
        for table, length in lengths.items():
            cache.truncate(table, length)
        return [Reading(accepted.get(lane)) for lane in lanes]


def _alone(lane: Lane) -> bool:
    """Whether it is the only attempt that there can be."""
    assert lane.ranking is not None
    return min(len(lane.ranking.token_ids), lane.hypothesis.most_attempts) == 1


def _slab(lane: Lane) -> int:
    """Its slab, which all attempts at a token share."""
    assert lane.slab is not None
    return lane.slab
