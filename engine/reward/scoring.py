"""Candidates of a causal reward model become spans of a pass: those the host knows, and those still being drafted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stars.cache import BlockTable, CommitMove
from stars.errors import OutOfPages, RewardError
from stars.kernels.types import Draft
from stars.model.tokenizer import REPLACEMENT
from stars.passes import DraftedPart, Span
from stars.prompt import Prompt
from stars.reward.base import Candidate, ContextFull, Progress, Scored, TrailingCandidate
from stars.reward.framing import Text
from stars.reward.session import NO_SCORES, Handle, Session, SessionReward, outside
from stars.sizes import MAX_CLOSING


class CandidatePlan(NamedTuple):
    """How a candidate is scored: `ids` from `start` on are run into a slab, after the keys of `table`."""

    session: Session
    table: BlockTable  # the session's, or one of the candidate's own
    ids: list[int]
    content: int  # of the ids without the closing
    start: int
    run: int  # tokens that the model runs in all
    drafted: DraftedPart | None = None  # what of the ids the device fills in
    known: Mapping[int, float] = NO_SCORES  # by position, the scores of step tags before `start`
    tags: Sequence[int] = ()  # positions of those from there on; without any tag the last token is read

    @property
    def own(self) -> bool:
        """Whether the candidate has pages of its own, for as long as it is scored."""
        return self.table is not self.session.table


class SlabReward(SessionReward):
    """A reward whose sessions grow by what was run into slabs."""

    def could_hold(self, prompt: Prompt, max_tokens: int, responses: int) -> bool:
        """Whether `reserve` could give each of them all it may ask for."""
        history = len(self.framing.frame(prompt).prefix) - self.target.reward_lag
        return self.cache.could_hold(history, [self._room(history + max_tokens)] * responses)

    def reserve(self, session: Session, tokens: int) -> bool:
        """Pages for so many tokens more, and some for a response that re-encodes to more."""
        stop = self._room(len(session.committed) + tokens)
        try:
            self.cache.reserve(session.table, max(0, stop - session.table.length))
        except OutOfPages:
            return False
        return True

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """As many candidates as fill one pass over the weights; where a pass is padded, as many as fit the rows it is
        made for."""
        ridge = self.target.ridge_rows
        if not self.target.padded:
            return max(1, math.ceil(ridge / max(1, tokens * responses)))
        rows = responses * (self.target.reward_lag + tokens + self.framing.longest_closing)
        return max(1, ridge // max(1, rows))

    def discard(self, handle: Handle | None) -> None:
        """Frees the slab."""
        if handle is not None and handle.slab is not None:
            self.cache.return_slab(handle.slab)

    def remember(self, responses: Sequence[tuple[Any, Any]]) -> None:
        """What slabs hold of their ends goes into pages, as far as there are any, and full pages stay when they are
        closed."""
        moves = []
        for session, handle in responses:
            if handle is not None and handle.slab is not None:
                at, stop = self._span_of(handle)
                rows = min(stop - at, self.cache.try_reserve(session.table, at, stop - at))
                if rows > 0:
                    moves.append(CommitMove(session.table, handle.slab * self.cache.slab_len, rows, at))
                    session.committed = handle.ids[: at + rows]
        if moves:
            self.cache.commit(moves)
        for _, handle in responses:
            self.discard(handle)
        super().remember(responses)

    def _span_of(self, handle: Any) -> tuple[int, int]:
        """The first position that its slab holds, and where what pages may take of it ends."""
        raise NotImplementedError

    def _room(self, positions: int) -> int:
        """Positions of pages for a response of so many, as far as context and cache go."""
        return min(positions + self.slack, self.max_model_len, self.cache.num_pages * self.cache.page_size)

    def _make_room(self, session: Session, stop: int) -> None:
        """Room for `stop` positions, where a text is longer than was reserved; raises OutOfPages."""
        if stop > len(session.table.pages) * self.cache.page_size:
            self.cache.reserve(session.table, stop - session.table.length)

    def _no_room(self, tokens: int, error: OutOfPages) -> RewardError:
        """Why a response cannot be scored; raised where others hold pages, so that it is tried again by itself."""
        problem = RewardError(f"the response re-encodes to {tokens} tokens for the reward model and {error}")
        if self.cache.num_tables > 1:
            raise problem from error
        return problem


class ScoringReward(SlabReward):
    """Scores every candidate the same way: what its session's pages lack is run into a slab, and the reward is read at
    the end, or is made of what is read at step tags; the scores of those in pages are the session's. What a slab does
    not hold is run into pages first, in chunks: a finished response's into its session's, a candidate's into pages of
    its own. What is still being drafted is filled in on the device.

    Whoever binds it sets what follows, besides what sessions need.
    """

    deterministic: bool

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """One ragged forward over the new tokens of all candidates."""
        results: dict[int, Scored] = {}
        plans: dict[int, CandidatePlan] = {}
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
        if self.framing.encoder is not None:
            return None
        plans = [self._trailing_plan(candidate) for candidate in candidates]
        rows = [len(plan.ids) - plan.start for plan in plans]
        if max(rows) > self.cache.slab_len or not self._passes.fits(rows) or any(
                len(plan.session.frame.closing) > MAX_CLOSING for plan in plans):
            return None
        slabs = [self.cache.take_slab() for _ in plans]
        self._passes.prepare_trailing(draft, list(map(self._span, plans, slabs)))
        return TrailingScores(self, plans, slabs)

    def launch_trailing(self) -> int:
        """Starts the pass that was prepared to trail a draft; returns the number of its rewards."""
        return self._passes.launch_prepared()

    def score_ahead(self, candidates: list[Candidate]) -> AheadScores | None:
        """One pass, of candidates that all fit a slab and of which none is scored in pages of its own."""
        plans, rows = [], []
        for candidate in candidates:
            session = candidate.session
            try:
                text = self._read(session, candidate.token_ids, candidate.text)
                if candidate.final or self._problem(text.ids) is not None or self._lacks(candidate) is not None:
                    return None
                self._make_room(session, text.content - self.target.reward_lag)
            except (OutOfPages, RewardError):  # who is to end for that is found where they are scored
                return None
            start = _valid(session, text, _last(text))
            rows.append(len(text.ids) - start)
            plans.append(_planned(session, session.table, text, start, rows[-1], session.scores))
        # What is longer is run in passes of captured shapes, one after the other.
        if (max(rows) > self.cache.slab_len or not self._passes.fits(rows, sum(map(_readings, plans)))
                or sum(rows) > self.target.captured_score):
            return None
        slabs = [self.cache.take_slab() for _ in plans]
        ahead = AheadScores(self, plans, slabs)
        self._passes.prepare(ahead.spans)
        return ahead

    def launch_ahead(self, spans: Sequence[Span]) -> int:
        """Starts the pass that was prepared, whatever was run in between; returns the number of its rewards."""
        if not self._passes.prepared:
            self._passes.prepare(spans)
        return self._passes.launch_prepared()

    def ahead_results(self, plans: Sequence[CandidatePlan], slabs: Sequence[int], block: int) -> list[Scored]:
        """Waits for the pass whose rewards have this number."""
        return self._all_scored(plans, slabs, self._passes.rewards(sum(map(_readings, plans)), block))

    def trailing_results(self, plans: Sequence[CandidatePlan], slabs: Sequence[int], token_ids: Sequence[list[int]],
                         block: int) -> list[Scored]:
        """Waits for a pass that trailed a draft, by which the responses became `token_ids`."""
        rewards = self._passes.rewards(len(plans), block)
        drawn: list[CandidatePlan] = []
        unread: list[int] = []
        for plan, response in zip(plans, token_ids, strict=True):
            ids, content, _ = self._read(plan.session, response, None)
            start = min(plan.start, len(ids) - 1)
            if start < plan.start:  # nothing was drawn, so that the pass had no row to read the reward at
                unread.append(len(drawn))
            drawn.append(plan._replace(ids=ids, content=content, start=start, run=len(ids) - start, drafted=None))
        if unread:
            again = self._passes.score([self._span(drawn[index], slabs[index]) for index in unread])
            for index, reward in zip(unread, again, strict=True):
                rewards[index] = reward
        problems = [self._problem(plan.ids) for plan in drawn]
        return [self._scored(plan, slab, [reward], problem)
                for plan, slab, reward, problem in zip(drawn, slabs, rewards, problems, strict=True)]

    def resume(self, session: Session, token_ids: list[int], text: str | None) -> None:
        """Writes the response into the session's pages; in deterministic mode as it was scored and committed, so that
        every key has the bits that it had."""
        self.resume_in_chunks(session, token_ids, text, None)

    def resume_in_chunks(self, session: Session, token_ids: list[int], text: str | None,
                         max_rows: int | None) -> Progress:
        """As `resume`, in whole chunks; in deterministic mode all of what is missing, or nothing."""
        whole = self._read(session, token_ids, text)
        stop = whole.content - self.target.reward_lag
        if self.deterministic and not _common(session, whole.ids, stop) == stop < session.table.length:
            rows = len(whole.ids) - _valid(session, whole, _last(whole))
            if max_rows is not None and rows > max_rows:
                return Progress(0, 0)
            [scored] = self.score([Candidate(session, token_ids, text)])
            if isinstance(scored.reward, RewardError):
                raise scored.reward
            self.commit([(session, scored.handle)])
            return Progress(1, rows)
        self._make_room(session, stop)
        if len(session.recalled) > len(session.committed):
            session.committed, session.recalled = session.recalled, []
        rows = self._write(session, whole, stop, max_rows)
        return Progress(int(session.table.length == stop), rows)

    def _span_of(self, handle: Handle) -> tuple[int, int]:
        stop = handle.content - self.target.reward_lag
        return min(handle.valid, stop), stop

    def recall(self, session: Session, token_ids: list[int], text: str | None) -> None:
        """Shares the full pages that are left of it, up to a tag whose score would have to be read again."""
        whole, history = self._read(session, token_ids, text), session.committed
        stop = min(whole.content - self.target.reward_lag, _unread(session, whole, len(whole.ids)))
        if whole.ids[: len(history)] == history and self.cache.adopt(session.table, whole.ids[:stop]):
            session.recalled = whole.ids[: session.table.length]

    def commit(self, winners: list[tuple[Session, Handle]]) -> None:
        """The winners' slabs go into pages up to the end of the response; the closing tokens are dropped.

        Raises OutOfPages for a fork that nothing was reserved for.
        """
        lag = self.target.reward_lag
        for session, handle in winners:
            self._make_room(session, handle.content - lag)
        moves, slabs = [], []
        for session, (ids, content, valid, slab, scores) in winners:
            keep = content - lag
            if slab is None:
                self._write(session, Text(ids, content), keep)
            else:
                at = min(valid, keep)
                moves.append(CommitMove(session.table, slab * self.cache.slab_len, keep - at, at))
                slabs.append(slab)
                session.committed = ids[:keep]
            session.scores = scores
        if moves:
            self.cache.commit(moves)
            for slab in slabs:
                self.cache.return_slab(slab)

    def _write(self, session: Session, text: Text, stop: int, max_rows: int | None = None) -> int:
        """ids[:stop] into the session's pages, which then end there, or, after at most `max_rows` rows, before; returns
        the rows run. The scores of the tags among them are the session's afterwards."""
        valid = _valid(session, text, stop)
        self.cache.truncate(session.table, valid)
        rows, scores = self._into_pages(session.table, text, stop, session.scores, max_rows)
        session.committed, session.scores = text.ids[: session.table.length], scores
        return rows

    def _into_pages(self, table: BlockTable, text: Text, stop: int, scores: Mapping[int, float],
                    max_rows: int | None = None) -> tuple[int, dict[int, float]]:
        """Runs what `table` lacks of ids[:stop]; (rows run, the scores of the tags in it now), `scores` known before.
        """
        known = {tag: scores[tag] for tag in text.tags if tag < table.length}
        tags = [tag for tag in text.tags if table.length <= tag < stop]
        if not tags:
            return self._passes.prefill([(table, text.ids, stop)], max_rows), known
        rows, rewards = self._passes.read(table, text.ids, stop, tags, max_rows)
        return rows, known | dict(zip(tags, rewards, strict=False))

    def _read(self, session: Session, token_ids: list[int], text: str | None) -> Text:
        """What the model reads of a response as in `Candidate`; RewardError where it cannot be read as it should."""
        prefix, prompt, special, closing, marked = session.frame
        if self.framing.encoder is None:
            content = prefix + token_ids
        elif text:
            # A character cut in two at the segment's end would be scored as a replacement sign: leave it out.
            content = self.framing.encode(prompt + text.rstrip(REPLACEMENT), special, marked)
        else:
            content = prefix
        return Text(content + closing, len(content))

    def _plan(self, candidate: Candidate) -> CandidatePlan | RewardError:
        """Runs what a slab will not hold; an error for a text that cannot be scored."""
        session = candidate.session
        try:
            text = self._read(session, candidate.token_ids, candidate.text)
        except RewardError as error:
            return error
        ids, content, _ = text
        problem = self._problem(ids) or self._lacks(candidate)
        if problem is not None:
            return problem
        table, last = session.table, _last(text)
        try:
            self._make_room(session, content - (1 if candidate.final else self.target.reward_lag))
            start = _valid(session, text, last)  # the last reading is at a row
            run = len(ids) - start
            scores: Mapping[int, float] = session.scores
            end = min(content - 1, last)  # the last row that is neither kept nor read anywhere but in the slab
            if candidate.final and start < end:
                start = end
                self._write(session, text, start)
                scores = session.scores
            if len(ids) - start > self.cache.slab_len:
                start = last
                table = self.cache.open(ids[:start])  # shared with the prompt where it can be
                self.cache.truncate(table, min(table.length, _unread(session, text, _common(session, ids, start))))
                run = len(ids) - table.length
                _, scores = self._into_pages(table, text, start, session.scores)
        except OutOfPages as error:
            return self._no_room(content, error)
        return _planned(session, table, text, start, run, scores)

    def _trailing_plan(self, candidate: TrailingCandidate) -> CandidatePlan:
        session, token_ids, lane, max_tokens = candidate
        frame = session.frame
        known = len(frame.prefix) + len(token_ids)
        ids = frame.prefix + token_ids + [0] * (max_tokens + len(frame.closing))
        start = _common(session, ids, known - self.target.reward_lag)
        return CandidatePlan(session, session.table, ids, known + max_tokens, start, len(ids) - start,
                             DraftedPart(lane, known - start, frame.closing))

    def _run(self, plans: dict[int, CandidatePlan]) -> dict[int, Scored]:
        """Scores the plans in one call; closes tables of their own."""
        first: dict[BlockTable, int] = {}
        for index, plan in plans.items():
            first.setdefault(plan.table, index)
        # Spans of one table are made adjacent, so that its pages are read once for all of them.
        order = sorted(plans, key=lambda index: first[plans[index].table])
        slabs = [self.cache.take_slab() for _ in order]
        ordered = [plans[index] for index in order]
        rewards = self._passes.score(list(map(self._span, ordered, slabs)))
        return dict(zip(order, self._all_scored(ordered, slabs, rewards), strict=True))

    def _span(self, plan: CandidatePlan, slab: int) -> Span:
        first, rows = slab * self.cache.slab_len, len(plan.ids) - plan.start
        return Span(plan.table, plan.ids[plan.start :], plan.start, range(first, first + rows), plan.drafted,
                    [tag - plan.start for tag in plan.tags], plan.session.gate)

    def _all_scored(self, plans: Sequence[CandidatePlan], slabs: Sequence[int], rewards: Sequence[float],
                    ) -> list[Scored]:
        """What was read of all plans, one's after the other's."""
        scored, first = [], 0
        for plan, slab in zip(plans, slabs, strict=True):
            read = _readings(plan)
            scored.append(self._scored(plan, slab, rewards[first : first + read]))
            first += read
        return scored

    def _scored(self, plan: CandidatePlan, slab: int, readings: Sequence[float],
                problem: RewardError | None = None) -> Scored:
        if plan.own:
            self.cache.return_slab(slab)
            self.cache.close(plan.table)
        scores = NO_SCORES
        reward: float | RewardError = readings[0]
        if plan.tags:
            scores = {**plan.known, **dict(zip(plan.tags, readings, strict=True))}
            reward = self.aggregate_of(list(scores.values()))
            scores = {tag: score for tag, score in scores.items() if tag < plan.content}
        handle = Handle(plan.ids, plan.content, plan.start, None if plan.own else slab, scores)
        return Scored(reward if problem is None else problem, plan.run, len(plan.ids), handle)

    def aggregate_of(self, scores: Sequence[float]) -> float:
        """The reward that the scores of all step tags of a text make, in their order."""
        return scores[-1]

    def _problem(self, ids: list[int]) -> RewardError | None:
        """Why this text is never scored."""
        if max(ids) >= self.vocab_size:
            return RewardError(outside(ids, self.vocab_size))
        if len(ids) > self.max_model_len:
            return ContextFull(f"the response re-encodes to {len(ids)} tokens for the reward model, whose context is "
                               f"{self.max_model_len}: lower max_tokens")
        return None

    def _lacks(self, candidate: Candidate) -> RewardError | None:
        """What a response that has ended should have had, for a reward that asks for something."""
        return None


class TrailingScores:
    """Scores that trail their draft: `stars.reward.base.Trailing`."""

    def __init__(self, scoring: ScoringReward, plans: Sequence[CandidatePlan], slabs: Sequence[int]):
        self._scoring, self._plans, self._slabs = scoring, plans, slabs
        self._block = 0  # the number of its rewards, once it was launched

    def launch(self) -> None:
        """Starts the pass, behind the draft."""
        self._block = self._scoring.launch_trailing()

    def results(self, token_ids: Sequence[list[int]]) -> list[Scored]:
        """Waits for the pass; the same results as `ScoringReward.score` gives."""
        return self._scoring.trailing_results(self._plans, self._slabs, token_ids, self._block)


class AheadScores:
    """Scores of candidates that the host knows: `stars.reward.base.Ahead`."""

    def __init__(self, scoring: ScoringReward, plans: Sequence[CandidatePlan], slabs: Sequence[int]):
        self._scoring, self._plans, self._slabs = scoring, plans, slabs
        self._block = 0  # the number of its rewards, once it was launched
        self.spans = list(map(scoring._span, plans, slabs))

    def launch(self) -> None:
        """Starts the pass."""
        self._block = self._scoring.launch_ahead(self.spans)

    def results(self) -> list[Scored]:
        """Waits for the pass; the same results as `ScoringReward.score` gives."""
        return self._scoring.ahead_results(self._plans, self._slabs, self._block)

    def drop(self) -> None:
        """Frees the slabs: should the pass run, then before whatever is put there next."""
        for slab in self._slabs:
            self._scoring.cache.return_slab(slab)


def _common(session: Session, ids: list[int], stop: int) -> int:
    """How many of ids[:stop] are in the session's pages already, from the first on."""
    stop = min(stop, len(ids), session.table.length)
    if ids[:stop] == session.committed[:stop]:
        return stop
    return next(i for i in range(stop) if ids[i] != session.committed[i])


def _last(text: Text) -> int:
    """Where the last reading of a text is."""
    return text.tags[-1] if text.tags else len(text.ids) - 1


def _unread(session: Session, text: Text, common: int) -> int:
    """The first step tag whose score the session lacks, of whose pages the text has `common`; else the text's end."""
    return next((tag for tag in text.tags if tag >= common or tag not in session.scores), len(text.ids))


def _valid(session: Session, text: Text, stop: int) -> int:
    """How many of ids[:stop] need not be run: they are in the session's pages, and their tags' scores are known."""
    common = _common(session, text.ids, stop)
    return min(common, _unread(session, text, common)) if text.tags else common


def _planned(session: Session, table: BlockTable, text: Text, start: int, run: int, scores: Mapping[int, float],
             ) -> CandidatePlan:
    """scores: of all its tags before `start`, and perhaps of others."""
    known = {tag: scores[tag] for tag in text.tags if tag < start} if text.tags else NO_SCORES
    return CandidatePlan(session, table, text.ids, text.content, start, run, None, known, text.tags[len(known) :])


def _readings(plan: CandidatePlan) -> int:
    """Rewards that a pass reads of it."""
    return len(plan.tags) or 1
