"""Candidates of a causal reward model become spans of a pass: those the host knows, and those still being drafted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stars.cache import BlockTable, PagedCache
from stars.errors import OutOfPages, RewardError
from stars.kernels.types import Draft
from stars.passes import MOST_CLOSING, Drafted, Passes, Span
from stars.reward.base import Candidate, ContextFull, Scored, TrailingCandidate
from stars.reward.framing import Framing
from stars.reward.session import Handle, Session, Sessions


class Plan(NamedTuple):
    """How a candidate is scored: `ids` from `start` on are run into a slab, after the keys of `table`."""

    session: Session
    table: BlockTable  # the session's, or one of the candidate's own
    ids: list[int]
    content: int  # of the ids without the closing
    start: int
    run: int  # tokens that the model runs in all
    drafted: Drafted | None = None  # what of the ids the device fills in

    @property
    def own(self) -> bool:
        """Whether the candidate has pages of its own, for as long as it is scored."""
        return self.table is not self.session.table


class Scoring:
    """Scores every candidate the same way: what its session's pages lack is run into a slab, and the reward is read at
    the end. What a slab does not hold is run into pages first, in chunks: a finished response's into its session's, a
    candidate's into pages of its own. What is still being drafted is filled in on the device.

    max_model_len: tokens of the longest text that is scored.
    """

    def __init__(self, framing: Framing, sessions: Sessions, cache: PagedCache, passes: Passes, max_model_len: int):
        self._framing = framing
        self._sessions = sessions
        self._cache = cache
        self._passes = passes
        self._max_model_len = max_model_len

    def score(self, candidates: Sequence[Candidate]) -> list[Scored]:
        """One ragged forward over the new tokens of all candidates."""
        results: dict[int, Scored] = {}
        plans: dict[int, Plan] = {}
        for index, candidate in enumerate(candidates):
            plan = self._plan(candidate)
            if isinstance(plan, RewardError):
                results[index] = Scored(plan)
                continue
            plans[index] = plan
            if plan.own:  # one candidate's pages at a time
                results |= self._run(plans)
                plans = {}
        results |= self._run(plans)
        return [results[index] for index in range(len(candidates))]

    def score_trailing(self, draft: Draft, candidates: Sequence[TrailingCandidate]) -> TrailingScores | None:
        """A pass that trails the draft, where the LM's ids are passed through and all fit a slab and a pass."""
        if not self._framing.same_vocabulary:
            return None
        plans = [self._trailing_plan(candidate) for candidate in candidates]
        rows = [len(plan.ids) - plan.start for plan in plans]
        if max(rows) > self._cache.slab_len or not self._passes.fits(rows) or any(
                len(plan.session.frame.closing) > MOST_CLOSING for plan in plans):
            return None
        slabs = [self._cache.take_slab() for _ in plans]
        self._passes.score_trailing(draft, list(map(self._span, plans, slabs)))
        return TrailingScores(self, plans, slabs)

    def trailing_results(self, plans: Sequence[Plan], slabs: Sequence[int],
                         token_ids: Sequence[list[int]]) -> list[Scored]:
        """Waits for a pass that trailed a draft, by which the responses became `token_ids`."""
        results = []
        rewards = self._passes.rewards(len(plans))
        for plan, slab, response, reward in zip(plans, slabs, token_ids, rewards, strict=True):
            ids, content = self._framing.ids(plan.session.frame, response, None)
            plan = plan._replace(ids=ids, content=content, run=len(ids) - plan.start)
            problem = self._problem(ids)
            results.append(self._scored(plan, slab, reward if problem is None else problem))
        return results

    def _plan(self, candidate: Candidate) -> Plan | RewardError:
        """Runs what a slab will not hold; an error for a text that cannot be scored."""
        session = candidate.session
        ids, content = self._framing.ids(session.frame, candidate.token_ids, candidate.text)
        problem = self._problem(ids)
        if problem is not None:
            return problem
        table = session.table
        try:
            self._sessions.make_room(session, content - 1)
            start = session.common(ids, len(ids) - 1)
            run = len(ids) - start
            if candidate.final and start < content - 1:
                start = content - 1
                self._sessions.write(session, ids, start)
            if len(ids) - start > self._cache.slab_len:
                start = len(ids) - 1
                table = self._cache.open(ids[:start])  # shared with the prompt where it can be
                run = len(ids) - table.length
                self._passes.prefill([(table, ids, start)])
        except OutOfPages as error:
            return self._no_room(content, error)
        return Plan(session, table, ids, content, start, run)

    def _trailing_plan(self, candidate: TrailingCandidate) -> Plan:
        session, token_ids, lane, max_tokens = candidate
        frame = session.frame
        known = len(frame.prefix) + len(token_ids)
        ids = frame.prefix + token_ids + [0] * (max_tokens + len(frame.closing))
        start = session.common(ids, known - 1)
        return Plan(session, session.table, ids, known + max_tokens, start, len(ids) - start,
                    Drafted(lane, known - start, frame.closing))

    def _run(self, plans: dict[int, Plan]) -> dict[int, Scored]:
        """Scores the plans in one call; closes tables of their own."""
        first: dict[BlockTable, int] = {}
        for index, plan in plans.items():
            first.setdefault(plan.table, index)
        # Spans of one table are made adjacent, so that its pages are read once for all of them.
        order = sorted(plans, key=lambda index: first[plans[index].table])
        slabs = [self._cache.take_slab() for _ in order]
        rewards = self._passes.score([self._span(plans[index], slab) for index, slab in zip(order, slabs, strict=True)])
        return {index: self._scored(plans[index], slab, reward)
                for index, slab, reward in zip(order, slabs, rewards, strict=True)}

    def _span(self, plan: Plan, slab: int) -> Span:
        first, rows = slab * self._cache.slab_len, len(plan.ids) - plan.start
        return Span(plan.table, plan.ids[plan.start :], plan.start, range(first, first + rows), plan.drafted)

    def _scored(self, plan: Plan, slab: int, reward: float | RewardError) -> Scored:
        if plan.own:
            self._cache.return_slab(slab)
            self._cache.close(plan.table)
        handle = Handle(plan.ids, plan.content, plan.start, None if plan.own else slab)
        return Scored(reward, plan.run, len(plan.ids), handle)

    def _problem(self, ids: list[int]) -> RewardError | None:
        """Why this text is never scored."""
        outside = self._framing.outside(ids)
        if outside is not None:
            return RewardError(outside)
        if len(ids) > self._max_model_len:
            return ContextFull(f"the response re-encodes to {len(ids)} tokens for the reward model, whose context is "
                               f"{self._max_model_len}: lower max_tokens")
        return None

    def _no_room(self, tokens: int, error: OutOfPages) -> RewardError:
        """Why a response cannot be scored; raised where others hold pages, so that it is tried again by itself."""
        problem = RewardError(f"the response re-encodes to {tokens} tokens for the reward model and {error}")
        if self._cache.num_tables > 1:
            raise problem from error
        return problem


class TrailingScores:
    """Scores that trail their draft: `stars.reward.base.Trailing`."""

    def __init__(self, scoring: Scoring, plans: Sequence[Plan], slabs: Sequence[int]):
        self._scoring, self._plans, self._slabs = scoring, plans, slabs

    def results(self, token_ids: Sequence[list[int]]) -> list[Scored]:
        """Waits for the pass; the same results as `Scoring.score` gives."""
        return self._scoring.trailing_results(self._plans, self._slabs, token_ids)
