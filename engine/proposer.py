"""Proposing: how many lanes each hypothesis gets in a round, and what the language model drafts in them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from stars.cache import OWN_STORE, PagedCache
from stars.config import EngineConfig
from stars.draft import Drafted, LaneSpec
from stars.edits import NOTHING_LEFT
from stars.kernels.philox import pack_stream
from stars.models import Models
from stars.request import Drafts, Hypothesis, Lane, Ranking, Request
from stars.spending import Grant, grants
from stars.width import WidthChooser

NAN_LOGITS = "the language model's logits are NaN or infinite: check its weights, or load it with dtype=\"float32\""
NAN_BLEND = ("the blend of the models' logits is NaN or infinite: check the weights of the policy and of the models, "
             "or load them with dtype=\"float32\"")


Key = tuple[tuple[int, ...], bool, bool]
"""What lanes are drafted together by: the stores of the models, whether they are blended, whether logits are kept."""


class Rows(NamedTuple):
    """What another drafter than the engine's own has drawn, row by row, and the seconds of a row."""

    drafted: Iterator[Drafted]
    seconds: float


class Proposer:
    """Draws attempts at the next segment of every hypothesis, all lanes of all that draw from the same models together.
    """

    def __init__(self, models: Models, cache: PagedCache, chooser: WidthChooser, config: EngineConfig):
        self._models = models
        self.drafter = models.drafter(OWN_STORE)
        self.chooser = chooser
        self._cache = cache
        self._trails = config.target.trailing
        self._max_num_lanes = config.max_num_lanes
        self._max_num_seqs = config.max_num_seqs
        self._max_responses = min(config.max_num_lanes, config.max_num_seqs)
        self._launched = 0.0  # when the draft that is under way was started
        self._rows = 0  # that it has: a lane each, or one for all that are enumerated of a response
        self._others: dict[Key, Rows] = {}  # what was drawn from other models beside it
        self.lanes: Mapping[str | None, int] | None = None  # of each user in the next round; None: they share all
        self.piece: int | None = None  # most tokens that the next round draws of what may be drawn in pieces

    def launch(self, active: Sequence[Hypothesis]) -> dict[Hypothesis, list[Lane]]:
        """Starts the draft of the lanes that are returned, without waiting for it. Those that draw from other models
        than the engine's own alone are drafted first, to their end."""
        self._catch_up(active)
        drawn: dict[Hypothesis, list[Lane]] = {}
        own: list[LaneSpec] = []
        others: dict[Key, list[LaneSpec]] = {}
        for hypothesis, (width, max_tokens) in zip(active, self._grants(active), strict=True):
            request, lanes = hypothesis.request, drawn.setdefault(hypothesis, [])
            table, last = hypothesis.pages, hypothesis.last_token
            segment, begun = hypothesis.place
            stream = pack_stream(segment, hypothesis.sample)
            history = hypothesis.history() if request.params.penalties else None
            drafts, edits = hypothesis.proposal, hypothesis.edited()
            specs = others.setdefault(_key(drafts), []) if drafts.apart else own
            first, skipped = len(hypothesis.attempts) + 1, hypothesis.skipped
            if request.ranks and width:
                slab, drafted = self._enumerate(hypothesis, first, width, lanes)
                if not drafted:
                    [matcher] = hypothesis.matchers(1)
                    specs.append(LaneSpec(table, last, slab, max_tokens, request.seed, first, stream, request.params,
                                          request.stop_ids, history, ranks=request.ranks, edits=edits,
                                          matcher=matcher))
                    for lane in lanes:
                        lane.matcher = matcher
            else:
                for attempt, matcher in enumerate(hypothesis.matchers(width), first):
                    slab = self._cache.take_slab()
                    judge_slab = self._cache.take_slab() if request.lane_slabs > 1 else None
                    lanes.append(Lane(hypothesis, attempt, slab, judge_slab, stores=drafts.stores, matcher=matcher))
                    specs.append(LaneSpec(table, last, slab, max_tokens, request.seed, skipped + attempt, stream,
                                          request.params, request.stop_ids, history, hypothesis.entropy_cut,
                                          hypothesis.least_segment, drafts.weights, edits=edits, matcher=matcher,
                                          begun=begun))
            hypothesis.metrics.width = max(hypothesis.metrics.width, width)
        self._others = {key: self._draft(key, specs) for key, specs in others.items()} if others else {}
        self._launched = time.perf_counter()
        self._rows = len(own)
        if own:
            self.drafter.launch(own)
        return drawn

    def _catch_up(self, active: Sequence[Hypothesis]) -> None:
        """Models that draft now, or then read that, take up what others have drawn since they did last, all responses
        of one together."""
        lacking: dict[tuple[int, ...], list[Hypothesis]] = {}
        for hypothesis in active:
            table = hypothesis.table
            if table is not None and table.behind:
                stores = hypothesis.proposal.stores + (OWN_STORE if hypothesis.group.reader is not None else ())
                lacking.setdefault(stores, []).append(hypothesis)
        for stores, hypotheses in lacking.items():
            begin = time.perf_counter()
            self._models.catch_up(hypotheses, stores)
            for hypothesis in hypotheses:
                hypothesis.metrics.lm_seconds += (time.perf_counter() - begin) / len(hypotheses)

    def _draft(self, key: Key, specs: list[LaneSpec]) -> Rows:
        """Drafts lanes that draw from other models."""
        begin = time.perf_counter()
        stores, blends, keeps_logits = key
        drafter = self._models.drafter(stores, blends)
        drafted = drafter.draft_with_logits(specs) if keeps_logits else drafter.draft(specs)
        return Rows(iter(drafted), (time.perf_counter() - begin) / len(specs))

    def collect(self, drawn: dict[Hypothesis, list[Lane]]) -> None:
        """Takes what was drafted in the lanes. Without a token to draw a completion fails; of whole responses that
        are judged in order, where it is that one's turn."""
        if not drawn:
            return
        own = iter(self.drafter.drafted(self._rows) if self._rows else ())
        seconds_own = (time.perf_counter() - self._launched) / max(1, self._rows)
        for hypothesis, lanes in drawn.items():
            drafted, seconds = self._others.get(_key(hypothesis.proposal), (own, seconds_own)) if self._others else (
                own, seconds_own)
            if hypothesis.request.ranks and lanes:
                rows = int(lanes[0].ranking is None)
                self._hand_out(lanes, _ranking(next(drafted)) if rows else lanes[0].ranking)
                taken = hypothesis.take_drafts(lanes, seconds * rows, rows)
            else:
                for lane in lanes:
                    lane.token_ids, lane.logprobs, lane.logits, lane.tops = next(drafted)
                if hypothesis.request.edits is not None:
                    self._note_dead_ends(hypothesis, lanes)
                taken = hypothesis.take_drafts(lanes, seconds * len(lanes))
            if not taken:
                why = self._no_token(hypothesis, lanes)
                if hypothesis.request.in_turn:  # one before it may be accepted, and then nobody has asked for it
                    hypothesis.finish("stop", error=why)
                else:
                    hypothesis.group.fail(why)

    def _note_dead_ends(self, hypothesis: Hypothesis, lanes: Sequence[Lane]) -> None:
        """Of attempts that no token could be drawn for in the middle: they are at fault where it is their turn to be
        judged. At the first token all attempts fail, and so does the request."""
        judged = hypothesis.group.waits_for_scores and not hypothesis.request.whole and not self._trails
        for lane in lanes:
            if judged and len(lane.token_ids) > 1 and _forbidden(lane):
                lane.fault = _why_forbidden(lane)
                del lane.token_ids[-1], lane.logprobs[-1]

    def _no_token(self, hypothesis: Hypothesis, lanes: Sequence[Lane]) -> str:
        """What is said where one of these lanes could draw no token."""
        forbidden = next((lane for lane in lanes if _forbidden(lane)), None)
        if forbidden is not None and hypothesis.request.edits is not None:
            return _why_forbidden(forbidden)
        return self._nan(hypothesis.proposal)

    def _nan(self, proposal: Drafts) -> str:
        """What is said of logits that are no numbers: whose they are."""
        if proposal.blends:
            return NAN_BLEND
        if proposal.stores == OWN_STORE:
            return NAN_LOGITS
        whose = self._models.names_of(proposal.stores)
        return NAN_LOGITS.replace("the language model's logits", f"the logits of {whose}")

    def _enumerate(self, hypothesis: Hypothesis, first: int, width: int, lanes: list[Lane]) -> tuple[int, bool]:
        """Adds the next `width` tokens that are enumerated to `lanes`; their slab, and whether it was drafted.

        All of a segment share it: it holds the token before them. One step finds all of them, and later rounds go on
        where the one before ended, as long as some attempt has kept the slab.
        """
        ranking = hypothesis.ranking
        slab = next((lane.slab for lane in hypothesis.attempts if lane.slab is not None), None)
        if slab is None or ranking is None:
            slab, ranking = self._cache.take_slab(width), None
        else:
            self._cache.share_slab(slab, width)
        lanes += [Lane(hypothesis, attempt, slab, ranking=ranking) for attempt in range(first, first + width)]
        return slab, ranking is not None

    def _hand_out(self, lanes: list[Lane], ranking: Ranking | None) -> None:
        """Gives each lane its token, and back what lanes held for which there is none."""
        assert ranking is not None
        found = [lane for lane in lanes if lane.attempt <= len(ranking.token_ids)]
        for lane in lanes[len(found) :]:
            assert lane.slab is not None
            self._cache.return_slab(lane.slab)
        lanes[:] = found
        for lane in lanes:
            place = lane.attempt - 1
            lane.ranking = ranking
            lane.token_ids, lane.logprobs = [ranking.token_ids[place]], [ranking.logprobs[place]]
            if ranking.tops is not None:  # the ranks are those of all tokens: filters keep the first ones
                lane.tops = ranking.tops._replace(ranks=np.array([lane.attempt], np.int32))

    def window(self, request: Request, groups: int) -> int:
        """Whole responses of a completion that may be under way beyond what is decided, where the rule reads in order
        and `groups` completions decode side by side."""
        width = request.plan.lanes.width
        if width is not None:
            return width
        open_groups = [group for group in request.groups if not group.finished]
        if not open_groups:
            return 1
        kept = [hypothesis.metrics for hypothesis in request.hypotheses]
        rejected = sum(hypothesis.note is not None for group in open_groups for hypothesis in group.hypotheses)
        side_by_side = max(groups, len(open_groups))
        return self.chooser.choose(
            sum(metrics.accepted for metrics in kept), sum(metrics.attempts_counted for metrics in kept) + rejected,
            side_by_side, max(1, self._max_responses // side_by_side))

    def _grants(self, active: Sequence[Hypothesis]) -> list[Grant]:
        widths = self._widths(active) if self.lanes is None else self._widths_of_users(active, self.lanes)
        if any([hypothesis.request.bounded for hypothesis in active]):
            granted = grants(active, widths)
        else:
            granted = [Grant(width, hypothesis.next_segment) for hypothesis, width in zip(active, widths, strict=True)]
        if self.piece is None:
            return granted
        return [grant._replace(tokens=min(grant.tokens, self.piece)) if hypothesis.request.piecewise else grant
                for hypothesis, grant in zip(active, granted, strict=True)]

    def widths_alone(self, active: Sequence[Hypothesis]) -> list[int]:
        """The lanes that responses would get in a round of their own."""
        return self._widths(active)

    def _widths_of_users(self, active: Sequence[Hypothesis], lanes: Mapping[str | None, int]) -> list[int]:
        """The lanes of each response where each user has so many at most, as if it were alone with them."""
        users: dict[str | None, list[Hypothesis]] = {}
        for hypothesis in active:
            users.setdefault(hypothesis.request.user, []).append(hypothesis)
        widths: dict[Hypothesis, int] = {}
        # Each has its own, as long as there are lanes for one of each response besides.
        left, others = self._lanes(active), len(active)
        for user in sorted(users, key=lambda user: len(users[user])):
            members = users[user]
            others -= len(members)
            most = max(len(members), min(lanes.get(user, len(members)), left - others))
            widths |= zip(members, self._widths(members, most), strict=True)
            left -= sum([max(1, widths[hypothesis]) for hypothesis in members])
        return [widths[hypothesis] for hypothesis in active]

    def _lanes(self, active: Sequence[Hypothesis]) -> int:
        """Lanes that there are for a round of `active`."""
        # Who waits for rewards keeps its lanes meanwhile: one slab is left to each response that may come besides.
        lanes = min(self._max_num_lanes, self._cache.num_free_slabs - (self._max_num_seqs - len(active)))
        return lanes - sum([hypothesis.request.lane_slabs - 1 for hypothesis in active])

    def _widths(self, active: Sequence[Hypothesis], lanes: int | None = None) -> list[int]:
        lanes = self._lanes(active) if lanes is None else lanes
        share = max(1, lanes // len(active)) if active else 1
        widths = []
        for hypothesis in active:
            request = hypothesis.request
            width = request.plan.lanes.width
            max_width = min(share, hypothesis.attempts_left)
            if hypothesis.group.redraft is not None:
                widths.append(max_width)
            elif width is not None:
                widths.append(min(width, max_width))
            elif request.ranks:  # which cost one row, however many they are
                widths.append(max_width)
            elif max_width <= 1:  # none, where it has drawn all of its own and another one of its group has not
                widths.append(max_width)
            else:
                seen = [h.metrics for h in request.hypotheses]
                widths.append(self.chooser.choose(sum(m.accepted for m in seen), sum(m.attempts_counted for m in seen),
                                                  len(active), max_width))
        return widths


def _ranking(found: Drafted) -> Ranking:
    """What was enumerated of a response."""
    return Ranking(found.token_ids, found.logprobs, found.tops)


def _forbidden(lane: Lane) -> bool:
    """Whether a lane has ended because all tokens were forbidden."""
    return lane.token_ids[-1] < 0 and lane.logprobs[-1] == -math.inf


def _why_forbidden(lane: Lane) -> str:
    return (lane.matcher.error if lane.matcher is not None else None) or NOTHING_LEFT


def _key(drafts: Drafts) -> Key:
    """Of a proposal: lanes of other weights are drafted with it."""
    return drafts.stores, drafts.blends, drafts.keeps_logits
