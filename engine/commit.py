"""Committing: what a decision keeps becomes history, in both caches and in the responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stars.cache import CommitMove, PagedCache
from stars.filtered_ratio import draw, told
from stars.models import Models, Piece
from stars.outputs import Segment
from stars.request import Group, Hypothesis, Lane, PromptContext, Winner
from stars.reward.base import Reward
from stars.rules import EARLIER, Decision, Draw, Keep


class Arranged(NamedTuple):
    """What is to be done about the decisions of a round."""

    winners: list[Winner]
    twins: list[tuple[Winner, int]]  # kept a second time, for this slot: a fork of what is committed
    dropped: list[Hypothesis]  # they have left their groups, and still hold what they held


class Committer:
    """Writes winners into both caches, and forks what is kept twice."""

    def __init__(self, cache: PagedCache, models: Models, reward: Reward | None, deterministic: bool):
        self._cache = cache
        self._models = models
        self._reward = reward
        self._exact = deterministic

    @property
    def _scorer(self) -> Reward:
        """The reward: whoever needs one was refused where there is none."""
        assert self._reward is not None
        return self._reward

    def arrange(self, groups: Sequence[Group], decisions: dict[Group, Decision],
                drawn: dict[Hypothesis, list[Lane]]) -> Arranged:
        """Drops and forks as the decisions say, and lists what is to be committed. Of whole responses every piece is.

        A fork has the history of its parent before this round, or, where both keep the same, after its commit.
        """
        arranged = Arranged([], [], [])
        for group in groups:
            if group.request.whole:
                arranged.winners.extend([Winner.of(lane, hypothesis) for hypothesis in group.active
                                         for lane in drawn.get(hypothesis, ())])
            elif group in decisions and not group.finished:
                self._arrange(group, decisions[group], arranged)
        return arranged

    def discard_others(self, winners: Sequence[Winner]) -> None:
        """Gives back the scores of a decided segment that are not committed: what a rule cut or continued, or took of
        attempts that hold nothing any more, is read again, and there is a slab for that only once those of the
        segment's attempts are free."""
        if not any([winner.read_again for winner in winners]):
            return
        kept = {winner.lane for winner in winners if winner.as_drawn and winner.finish_reason is None}
        for winner in winners:
            for lane in winner.lane.hypothesis.attempts:
                if lane.score_handle is not None and lane not in kept:
                    self._scorer.discard(lane.score_handle)
                    lane.score_handle = None

    def commit(self, winners: Sequence[Winner], ended: Sequence[Winner] = ()) -> None:
        """Winners that go on are history in both caches afterwards. Of what has `ended` its response the slabs' rows
        become so, too, for a later turn to find: nothing is run for that, and what there is no page for is left out."""
        ended = [winner for winner in ended if winner.hypothesis.table is not None and not self._exact]
        self._commit_rows(winners, ended)
        scored = [winner for winner in winners if winner.hypothesis.request.scores_segments]
        if scored:
            self._commit_scored(scored)
        if ended:
            self._remember_scored(ended)

    def take_back(self, hypothesis: Hypothesis) -> None:
        """The newest segment of a hypothesis is history no longer, in neither cache; its attempts hold nothing."""
        hypothesis.take_back()
        for context in hypothesis.contexts:
            self._cache.truncate(context.table, hypothesis.length(context))
        request, session = hypothesis.request, hypothesis.session
        if session is None or not request.scores_segments:
            return
        if self._exact and self._scorer.needs_text:  # read again as it was: of its text less may be left
            self._scorer.resume(session, [], "")
            for end in hypothesis.ends:
                token_ids = hypothesis.token_ids[:end]
                self._scorer.resume(session, token_ids, request.detokenizer.decode(token_ids))
        else:
            text = request.response_text(hypothesis) if self._scorer.needs_text else None
            self._scorer.resume(session, hypothesis.content_ids(), text)

    def fork(self, hypothesis: Hypothesis, slot: int) -> Hypothesis:
        """A second hypothesis with the history that this one has now."""
        fork = hypothesis.group.fork(hypothesis, slot)
        if hypothesis.finish_reason is None:
            assert hypothesis.table is not None
            fork.table = self._cache.fork(hypothesis.table)
            if hypothesis.judge is not None:
                fork.judge = self._cache.fork(hypothesis.judge)
            if hypothesis.session is not None:
                fork.session = self._scorer.fork(hypothesis.session)
        fork.mark_boundary()
        return fork

    def _arrange(self, group: Group, decision: Decision, arranged: Arranged) -> None:
        members = {hypothesis.slot: hypothesis for hypothesis in group.hypotheses}
        for slot in decision.drop:
            group.drop(members[slot])
            arranged.dropped.append(members[slot])
        slots = iter(group.free_slots) if len(decision.keep) > 1 else iter(())
        seen: dict[int, list[tuple[Keep, Winner]]] = {}
        for keep in decision.keep:
            parent = members[keep.hypothesis]
            first, kept = keep.hypothesis not in seen, seen.setdefault(keep.hypothesis, [])
            if keep.attempt == EARLIER:
                if not first:
                    self.fork(parent, next(slots))
                continue
            twin = next((winner for other, winner in kept if _same(other, keep)), None) if kept else None
            if twin is not None:
                arranged.twins.append((twin, next(slots)))
                continue
            hypothesis = parent if first else self.fork(parent, next(slots))
            lane, then, put = parent.attempts[keep.attempt - 1], keep.then, None
            if isinstance(then, Draw):
                token = draw(lane, keep.tokens, then.source)
                then, put = [token], told(lane, keep.tokens, token) if lane.tops is not None else None
            winner = (Winner.of(lane, hypothesis) if not then and keep.tokens == len(lane.token_ids) else
                      Winner.cut(lane, hypothesis, keep.tokens, then))
            winner.put = put
            arranged.winners.append(winner)
            kept.append((keep, winner))

    def _commit_rows(self, winners: Sequence[Winner], ended: Sequence[Winner]) -> None:
        """The language model's pages hold all but the last token of each response afterwards; of those that have ended
        what slabs hold of that, as far as there are pages."""
        written = self._written(winners)
        for winner, context, _, _ in written:
            # A fork has no room yet, and a rule's own tokens come on top of a segment.
            self._cache.reserve(context.table, len(winner.token_ids))
        # A slab holds the token before the segment and all of the segment but its last token.
        moves, lacking, apart = [], [], list[tuple[Piece, int]]()
        for winner, (table, prompt_ids), slab, held in [*written, *self._written(ended)]:
            rows = min(len(winner.token_ids), winner.drafted + 1, held) if slab is not None else 0
            if winner.finish_reason is not None:
                rows = min(rows, self._cache.try_reserve(table, table.length, rows))
            elif slab == winner.lane.slab:
                winner.rows = rows
            if slab is not None and rows:
                moves.append(CommitMove(table, slab * self._cache.slab_len, rows, table.length, winner.lane.stores))
            if rows < len(winner.token_ids) and winner.finish_reason is None:
                token_ids = prompt_ids + winner.hypothesis.token_ids + winner.token_ids
                holder = slab if slab is not None else _free_slab(winner) if self._exact else None
                if self._exact and holder is not None:
                    apart.append((Piece(table, token_ids[:-1], holder, winner.lane.stores),
                                  winner.hypothesis.max_segment))
                else:
                    if table.behind:  # all of its models read on from here
                        self._models.catch_up([winner.hypothesis], table.stores)
                    lacking.append((table, token_ids, len(token_ids) - 1))
        self._cache.commit(moves)
        if lacking:
            self._models.prefill(lacking)
        while apart:
            apart = self._run_apart(apart)

    def _written(self, winners: Sequence[Winner]) -> list[tuple[Winner, PromptContext, int | None, int]]:
        """Each winner in each of its contexts: its slab there, and the rows that this may hold."""
        drafting = [winner.hypothesis.drafting for winner in winners]
        written = [(winner, context, winner.lane.slab, len(winner.lane.token_ids))
                   for winner, context in zip(winners, drafting, strict=True)]
        # The judge has read the last drafted token, too. What is run in one pass must be so again to the same bits.
        return written + [
            (winner, hypothesis.judging, winner.lane.judge_slab, len(winner.lane.token_ids) + (not self._exact))
            for winner in winners if (hypothesis := winner.hypothesis).judge is not None]

    def _run_apart(self, wanted: Sequence[tuple[Piece, int]]) -> list[tuple[Piece, int]]:
        """Runs the next of all tokens that tables lack, so many at most of each, in slabs whose rows are history by
        now; returns those that lack more. So they will be run again, should a response give way: `Hypothesis.ends`."""
        pieces: dict[int, Piece] = {}
        for piece, most in wanted:  # of two forks of one attempt the second waits for the slab
            first = piece.table.length
            pieces.setdefault(piece.slab, piece._replace(token_ids=piece.token_ids[first : first + most]))
        self._models.recompute(list(pieces.values()))
        return [one for one in wanted if one[0].table.length < len(one[0].token_ids)]

    def _remember_scored(self, ended: Sequence[Winner]) -> None:
        """The reward's sessions get what it has kept of the scores of what ended their responses."""
        scored = [winner for winner in ended if winner.as_drawn and winner.lane.score_handle is not None
                  and winner.hypothesis.request.scores_segments and winner.hypothesis.session is not None]
        if scored:
            self._scorer.remember([(winner.hypothesis.session, winner.lane.score_handle) for winner in scored])
            for winner in scored:
                winner.lane.score_handle = None

    def _commit_scored(self, winners: Sequence[Winner]) -> None:
        """The reward's sessions hold what the responses hold afterwards."""
        drawn = [winner for winner in winners if winner.as_drawn and winner.lane.score_handle is not None]
        if drawn:
            self._scorer.commit([(winner.hypothesis.session, winner.lane.score_handle) for winner in drawn])
            for winner in drawn:
                winner.lane.score_handle = None
        for winner in winners:
            if winner.read_again:
                hypothesis = winner.hypothesis
                text = hypothesis.request.response_text(hypothesis, winner) if self._scorer.needs_text else None
                self._scorer.resume(hypothesis.session, hypothesis.content_ids(winner), text)


def keep_whole(group: Group, decision: Decision) -> list[Hypothesis]:
    """Makes the whole responses that a decision keeps segments, with all that were judged as attempts; drops the
    others, which are returned."""
    members = group.hypotheses
    attempts = [hypothesis.whole_record() for hypothesis in group.judgeable]
    kept, dropped = {keep.hypothesis for keep in decision.keep}, []
    for index, hypothesis in enumerate(members):
        if hypothesis.slot not in kept:
            group.drop(hypothesis)
            dropped.append(hypothesis)
            continue
        record = attempts[index]
        segment = Segment(list(hypothesis.token_ids), record.reward, record.threshold, record.accepted, attempts, index,
                          hypothesis.cumulative_logprob, group.relaxed)
        hypothesis.segments.append(segment)
        hypothesis.metrics.keep(segment, group.request.plan.decide.in_order)
    return dropped


def _same(one: Keep, other: Keep) -> bool:
    """Whether two hypotheses that are kept so have the same history."""
    return (one.attempt, one.tokens, list(one.then)) == (other.attempt, other.tokens, list(other.then))


def _free_slab(winner: Winner) -> int | None:
    """The slab of another attempt, of a winner that has none any more."""
    kept = winner.lane.hypothesis.preferred
    return kept.slab if kept is not None else None
