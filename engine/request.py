"""The state of a request while it runs; what the user sees of it is built from this in `Request.output`."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

import numpy as np

from stars.budget import CUT_SHORT, NO_BUDGET, Budget
from stars.cache import OWN_STORE, BlockTable
from stars.edits import Edited, TokenEdits
from stars.exhaustions import BackUp, BestSeen, Pick, Redraft, Relax, exhaustion, steps
from stars.grammar import Branches, Grammar, Matcher
from stars.logprobs import PromptLogprobs, TokenLogprobs, Tops, forced, joined
from stars.model.tokenizer import Detokenizer
from stars.outputs import Attempt, CompletionOutput, Handed, Logprob, Metrics, RequestOutput, Segment, Times, since
from stars.plan import OWN, Blend, Lanes, Model, Plan, Policy, Prompted, Sampled
from stars.prompt import Prompt
from stars.reward.base import Later, Scored
from stars.rules import Always, Judged, Note, Rule
from stars.sampling import RequestOutputKind, SamplingParams
from stars.shown import ShownText
from stars.sizes import MAX_WORD
from stars.stops import cut_at_stop, stop_of


class Drafts(NamedTuple):
    """What attempts are drawn from: the sum of models' logits, weighted."""

    stores: tuple[int, ...]  # of the models, without doubles, rising
    weights: tuple[float, ...]
    keeps_logits: bool = False  # each lane's are wanted, of all of its steps

    @property
    def apart(self) -> bool:
        """Whether they are drafted by themselves, before those of the engine's own model."""
        return self != OWN_DRAFTS

    @property
    def blends(self) -> bool:
        """Whether it is anything but one model's own distribution."""
        return self.weights != (1.0,)


OWN_DRAFTS = Drafts(OWN_STORE, (1.0,))
FIRST = Always()  # what decides where a Redraft has no rule


class Reading(NamedTuple):
    """What a reader says of one attempt."""

    reward: float | None = None
    per_token: Sequence[float] = ()
    kept: Any = None  # of `Lane.reading`: where the reward is asked too, anything but None says that it was read


class Reader(Protocol):
    """What a language model itself says of attempts that were drafted, before the rule sees them: `Score.reads`."""

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """Attempts of one response worth reading at once, each of `tokens` tokens, besides others'."""

    def read(self, lanes: Sequence[Lane]) -> list[Reading]:
        """One reading an attempt, in order; attempts of one response are adjacent."""


class PromptContext(NamedTuple):
    """What the language model reads a response in: its pages, and the tokens before the response."""

    table: BlockTable
    prompt_ids: list[int]


class Ranking(NamedTuple):
    """The next tokens of a response that were enumerated, in order, with their log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]
    tops: Tops | None = None  # of the one place where they stand


@dataclass(eq=False, slots=True)
class Lane:
    """One candidate of one segment: drafted, perhaps scored, then committed or gone."""

    hypothesis: Hypothesis
    attempt: int  # from 1, over all rounds of the segment; its random numbers are those of attempt + hypothesis.skipped
    slab: int | None  # LM slab that holds its keys and values; None once it was given back
    judge_slab: int | None = None  # the same in its judge's context, where it has one
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None  # if this candidate were committed
    stop_reason: int | str | None = None
    reward: float | None = None
    note: Note | None = None  # what the rule says of it
    judged: Judged | None = None  # what the rule is shown of it, once it may be judged
    score_handle: Any = None  # what the reward keeps of it until it is committed or discarded
    per_token: Sequence[float] = ()  # scores of its tokens, of a reward or a reader that has them
    reading: Any = None  # what the request's reader keeps of it until its slab is given back
    ranking: Ranking | None = None  # where it is one of the tokens that were enumerated: all of them
    tops: Tops | None = None  # what stood beside its tokens, where the request asks for that
    known: TokenLogprobs | None = None  # that with its tokens, once it is asked for
    logits: Any = None  # float32 [steps, vocab] that it was drawn from, where its proposal keeps them
    stores: tuple[int, ...] = OWN_STORE  # of the models whose keys and values of it the slab holds
    matcher: Matcher | None = None  # where its request has a grammar
    fault: str | None = None  # why no further token could be drawn, where its turn to be judged may never come

    def told(self) -> TokenLogprobs:
        """What is known of its tokens, of a lane that has tops; asked once they are as they stay."""
        if self.known is None:
            assert self.tops is not None
            self.known = TokenLogprobs(self.token_ids, self.logprobs, self.tops)
        return self.known


@dataclass(eq=False, slots=True)
class Winner:
    """What becomes history of one hypothesis: drafted tokens of a lane, all of them unless a rule cut them, and what a
    rule put after them."""

    hypothesis: Hypothesis  # the lane's own or a fork of that
    lane: Lane
    token_ids: list[int]
    drafted: int  # how many of them the lane drew
    finish_reason: str | None
    stop_reason: int | str | None
    as_drawn: bool  # whether it is the lane as it was drawn
    reward: float | None = None  # of the response with it, where that is known
    rows: int = 0  # of keys that were committed from the lane's slab
    put: TokenLogprobs | None = None  # what is known of the tokens behind those that were drafted, where it is asked

    @property
    def read_again(self) -> bool:
        """Whether models read it anew where it becomes history: no slab holds all of it, or the reward has no score of
        it."""
        lane = self.lane
        return (not self.as_drawn or lane.slab is None
                or lane.reward is None and self.hypothesis.request.scores_segments)

    @property
    def unscored(self) -> bool:
        """Whether it has no reward yet, where segments are scored: a rule has cut or continued it, or it was redrawn
        and nobody asked for one."""
        return self.hypothesis.request.scores_segments and (not self.as_drawn or self.lane.reward is None)

    @classmethod
    def of(cls, lane: Lane, hypothesis: Hypothesis) -> Winner:
        """All of a lane."""
        return cls(hypothesis, lane, lane.token_ids, len(lane.token_ids), lane.finish_reason, lane.stop_reason, True,
                   lane.reward if hypothesis.request.scores_segments else None)

    @classmethod
    def cut(cls, lane: Lane, hypothesis: Hypothesis, tokens: int, then: Sequence[int]) -> Winner:
        """The first `tokens` of a lane, and `then`, up to where that ends the response."""
        token_ids = lane.token_ids[:tokens] + list(then)
        count, finish_reason, stop_reason = hypothesis.ending(token_ids)
        as_drawn = count == len(token_ids) == tokens == len(lane.token_ids)
        return cls(hypothesis, lane, token_ids[:count], min(tokens, count), finish_reason, stop_reason, as_drawn)

    def told(self) -> list[TokenLogprobs]:
        """What is known of its tokens, part by part, where the lane has tops. Tokens that a rule has put are forced,
        unless it has drawn them."""
        lane = self.lane
        if lane.tops is None:
            return []
        if self.as_drawn:
            return [lane.told()]
        drafted = TokenLogprobs(self.token_ids[: self.drafted], lane.logprobs[: self.drafted], lane.tops)
        rest = self.token_ids[self.drafted :]
        if not rest:
            return [drafted]
        return [drafted, self.put if self.put is not None else forced(rest)]


@dataclass(eq=False, slots=True)
class Wait:
    """Responses that wait for rewards: of candidates of their segment, or of what has won it and ends one of them.

    They are decided together, or it is one of several whole responses. None is drawn for, nothing of them is decided,
    and they keep what they hold, until every reward is there: then the next round takes them up where they were.
    """

    group: Group
    members: list[Hypothesis]
    drawn: dict[Hypothesis, list[Lane]]  # the lanes of the round that could not end, by who drew them
    scores: list[tuple[Lane, Scored]]  # of candidates, each hypothesis' in attempt order; or else
    ends: list[tuple[Winner, Scored]]  # of what ends a response
    winners: list[Winner] = field(default_factory=list)  # what is committed then
    twins: list[tuple[Winner, int]] = field(default_factory=list)  # and kept a second time, for this slot
    since: float = field(default_factory=time.perf_counter)

    @property
    def answered(self) -> bool:
        """Whether every reward is there."""
        return all([future.done() for future in self.futures()])

    def futures(self) -> list[Later]:
        """Those of its rewards that were to come later."""
        scores = [result.reward for _, result in self.scores] + [result.reward for _, result in self.ends]
        return [reward for reward in scores if isinstance(reward, Future)]


class Boundary(NamedTuple):
    """A response as it was when its newest segment began: what an interrupted round goes back to."""

    # They only grow: what takes of one makes a new one.
    lists: tuple[list[int], list[Segment], list[int], list[float], list[list[TokenLogprobs]]]
    tokens: int
    segments: int
    drafts: int
    ends: int
    logprobs: int
    told: int
    cumulative_logprob: float
    reward: float | None
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None
    note: Note | None
    metrics: Metrics
    backups: int
    redrawn: Mapping[int, int]


@dataclass(eq=False, slots=True)
class Prefill:
    """How far both models have read what a response begins with that was admitted: prompt, and committed tokens."""

    published: int = 0  # contexts whose pages hold the prompt and are offered for sharing
    started: bool = False  # the reward's session has read the prompt
    resumed: int = 0  # tokens of the response that the session has taken up


@dataclass(eq=False)
class Hypothesis:
    """One response in the making: its own history in both caches and its own random stream."""

    group: Group
    slot: int
    table: BlockTable | None = None
    judge: BlockTable | None = None  # of the request's second context, where it has two: opened after `table`
    session: Any = None  # the reward's state of this response
    left: Any = None  # the one that was closed, of a response that may lose yet
    prefill: Prefill | None = None  # while what it begins with is being read: it draws nothing yet
    wait: Wait | None = None  # while rewards of it are to come: it draws nothing and keeps what it holds
    token_ids: list[int] = field(default_factory=list)  # committed
    segments: list[Segment] = field(default_factory=list)
    drafts: int = 0  # committed: the number of the next one in the random stream
    ends: list[int] = field(default_factory=list)  # tokens of the response after each pass that wrote committed keys
    attempts: list[Lane] = field(default_factory=list)  # of the segment being decided
    preferred: Lane | None = None  # of the segment being decided, what its exhaustion would keep; keeps its slabs
    logprobs: list[float] = field(default_factory=list)  # of token_ids, while a whole response is drafted
    # What is known of its tokens, where it is asked: of each segment, or of each piece of a whole response.
    told: list[list[TokenLogprobs]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    reward: float | None = None  # of all that is committed; None where it was not asked for
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # of a whole response that is judged in its turn: why it has no reward, until that comes
    note: Note | None = None  # what the rule says of a whole response
    per_token: Sequence[float] = ()  # scores of the tokens of a whole response, where its reward has them
    metrics: Metrics = field(default_factory=Metrics)  # of what was drawn for it and the segments it has
    boundary: Boundary | None = None  # None before its first round
    admitted: bool = False  # whether it ever was, though it may have given way
    backups: int = 0  # segments that were taken back
    redrawn: Mapping[int, int] = field(default_factory=dict)  # how often all attempts at a segment were drawn in vain
    _history: tuple[int, np.ndarray] | None = None  # response tokens it was made for, and the result
    _branches: Branches | None = None  # matchers of its grammar that were moved last; they say nothing that it does not

    def __post_init__(self) -> None:
        self.request = self.group.request
        self.sample = self.group.index * self.request.plan.lanes.population + self.slot  # of its random stream
        segment = self.request.plan.segment
        self.max_segment, self.least_segment, self.entropy_cut = segment.draft, segment.least, segment.cut

    @property
    def begun(self) -> bool:
        """Whether something was drawn for it."""
        return self.drafts > 0 or bool(self.attempts)

    @property
    def proposal(self) -> Drafts:
        """What attempts at the segment being decided are drawn from."""
        return self.request.proposal if self.group.redraft is None else self.request.redrafts

    @property
    def opened(self) -> bool:
        """Whether it has the tables of all of its contexts."""
        return self.table is not None and (self.judge is not None or len(self.request.contexts) == 1)

    @property
    def contexts(self) -> list[PromptContext]:
        """The contexts whose tables are open, as the request has them: whoever holds it has one at least."""
        assert self.table is not None
        prompts = self.request.contexts
        first = PromptContext(self.table, prompts[0])
        return [first] if self.judge is None else [first, PromptContext(self.judge, prompts[1])]

    @property
    def drafting(self) -> PromptContext:
        """The context that attempts at the segment being decided are drawn in."""
        contexts = self.contexts
        return contexts[len(self.segments) % 2 if self.request.alternates else 0]

    @property
    def judging(self) -> PromptContext:
        """Of two contexts the other one."""
        first, second = self.contexts
        return first if self.request.alternates and len(self.segments) % 2 else second

    @property
    def pages(self) -> BlockTable:
        """The table of the context that attempts are drawn in."""
        return self.drafting.table

    @property
    def reading(self) -> Prefill:
        """How far it is read, of a response that is being read."""
        assert self.prefill is not None
        return self.prefill

    def length(self, context: PromptContext) -> int:
        """Positions that its table has between two segments: those of all tokens but the last."""
        return len(context.prompt_ids) + len(self.token_ids) - 1

    @property
    def place(self) -> tuple[int, int]:
        """The number of the segment that the draft which comes next belongs to, and how many of its tokens are
        committed: 0, but where the last draft was a piece of one. Where each is drawn only depends on these two."""
        if self.request.piecewise:
            return divmod(len(self.token_ids), self.max_segment)
        return self.drafts, 0

    @property
    def next_segment(self) -> int:
        """Most tokens of the draft that comes next."""
        return min(self.max_segment - self.place[1], self.request.max_tokens - len(self.token_ids))

    @property
    def next_room(self) -> int:
        """Most tokens of the segment that comes next, with one that may be drawn after the draft."""
        most = self.max_segment - self.place[1] + self.request.drawn_after
        return min(most, self.request.max_tokens - len(self.token_ids))

    @property
    def most_attempts(self) -> int:
        """Attempts at the segment being decided that the plan allows, those included that have been redrawn."""
        return self.own_attempts if self.group.redraft is None else self.own_attempts + self.group.redraft.attempts

    @property
    def own_attempts(self) -> int:
        """Attempts at the segment being decided before the plan's exhaustion."""
        attempts, segment = self.request.attempts, len(self.segments)
        return attempts[segment] if segment < len(attempts) else attempts[-1]

    @property
    def candidates(self) -> list[Lane]:
        """The attempts at the segment being decided that may be kept: where it is redrawn, those alone."""
        return self.attempts if self.group.redraft is None else self.attempts[self.own_attempts :]

    @property
    def attempts_left(self) -> int:
        """Attempts that may still be drawn at the segment being decided, or taken of what was enumerated for it."""
        most, ranking = self.most_attempts, self.ranking
        if ranking is not None:
            most = min(most, len(ranking.token_ids))
        return most - len(self.attempts)

    @property
    def skipped(self) -> int:
        """Attempts at the segment being decided that came before it was begun anew: as many at every width."""
        if not self.backups:
            return 0
        redraft = self.request.redraft
        most = self.own_attempts + (redraft.attempts if redraft is not None else 0)
        return most * self.redrawn.get(len(self.segments), 0)

    @property
    def unsettled(self) -> int:
        """The most committed segments that may be taken back yet."""
        return 0 if self.finish_reason is not None else self.request.max_backups - self.backups

    @property
    def last_token(self) -> int:
        """The token whose keys and values the LM cache does not hold yet, where attempts are drawn."""
        return self.last_in(self.drafting)

    def last_in(self, context: PromptContext) -> int:
        """The same of any context."""
        return self.token_ids[-1] if self.token_ids else context.prompt_ids[-1]

    @property
    def ranking(self) -> Ranking | None:
        """The tokens that were enumerated for the segment being decided, if they were."""
        return self.attempts[0].ranking if self.attempts else None

    def mark_boundary(self) -> None:
        """Notes where the segment that begins now begins. Called before any of its attempts is drawn."""
        lists = self.token_ids, self.segments, self.ends, self.logprobs, self.told
        self.boundary = Boundary(lists, len(self.token_ids), len(self.segments), self.drafts, len(self.ends),
                                 len(self.logprobs), len(self.told), self.cumulative_logprob, self.reward,
                                 self.finish_reason, self.stop_reason, self.error, self.note, _copy(self.metrics),
                                 self.backups, self.redrawn)

    def go_back(self) -> None:
        """Becomes what it was at the boundary: the segment since then was never drawn. May itself be interrupted and
        called again."""
        mark = self.boundary
        self.finish_reason = self.stop_reason = self.error = self.note = None
        self.per_token = ()
        if mark is not None:
            self.token_ids, self.segments, self.ends, self.logprobs, self.told = mark.lists
            self.backups, self.redrawn = mark.backups, mark.redrawn
            del self.token_ids[mark.tokens :]
            del self.segments[mark.segments :]
            del self.ends[mark.ends :]
            del self.logprobs[mark.logprobs :]
            del self.told[mark.told :]
            self.drafts, self.cumulative_logprob, self.reward = mark.drafts, mark.cumulative_logprob, mark.reward
            self.finish_reason, self.stop_reason = mark.finish_reason, mark.stop_reason
            self.error, self.note = mark.error, mark.note
            self.metrics = _copy(mark.metrics)
            self._history = None
        self._branches = None  # an interrupt may have left one half moved

    def count_preemption(self) -> None:
        """It gives its place away. Its boundary counts that, too: its group may go back to theirs while it waits."""
        self.metrics.num_preemptions += 1
        if self.boundary is not None:
            counted = replace(self.boundary.metrics, num_preemptions=self.metrics.num_preemptions)
            self.boundary = self.boundary._replace(metrics=counted)

    def finish(self, reason: str, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """Ends the response; what it holds in the caches is given back once the round is over."""
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error
        self.attempts, self._branches = [], None

    def refuse(self) -> None:
        """Ends the response with what was committed before; a whole one with nothing."""
        if self.request.whole:
            self.token_ids, self.logprobs, self.ends, self.told = [], [], [], []
            self.cumulative_logprob, self.reward = 0.0, None
        self.finish("refused")

    def take_back(self) -> None:
        """The newest segment was never committed. What is drawn in its place, and then after it, is drawn anew."""
        taken, kept = self.segments[-1], self.segments[:-1]
        redrawn, count = dict(self.redrawn), len(kept)
        for index in (count, count + 1):
            redrawn[index] = redrawn.get(index, 0) + 1
        self.redrawn, self.backups = redrawn, self.backups + 1
        tokens = len(self.token_ids) - len(taken.token_ids)
        self.segments, self.token_ids = kept, self.token_ids[:tokens]
        self.ends = [end for end in self.ends if end <= tokens]
        self.told = self.told[:count]
        self.drafts = count
        self.cumulative_logprob = 0.0
        for segment in kept:  # added as they were, to the same bits
            self.cumulative_logprob += segment.logprob
        self.reward = None
        scored = self.request.scores_segments and bool(kept)
        if scored and kept[-1].token_ids == kept[-1].attempts[kept[-1].winner].token_ids:  # else it has none yet
            self.reward = kept[-1].reward
        self.metrics.keep(taken, self.request.plan.decide.in_order, -1)
        self.attempts, self._history = [], None

    def let_go(self) -> None:
        """Forgets its places in caches that were emptied, and the attempts that stood there."""
        self.table = self.judge = self.session = self.preferred = self.prefill = self.wait = self.left = None
        self._branches = None
        self.attempts = []
        if self.request.awaits_prompt:  # which is asked for again, and nothing else was
            self.metrics.rm_calls = 0

    def fork(self, slot: int) -> Hypothesis:
        """A second hypothesis with this one's history, in a slot of its own; without a place in the caches yet."""
        return Hypothesis(
            self.group, slot, token_ids=list(self.token_ids), segments=list(self.segments), drafts=self.drafts,
            ends=list(self.ends), told=list(self.told), cumulative_logprob=self.cumulative_logprob, reward=self.reward,
            finish_reason=self.finish_reason, stop_reason=self.stop_reason, error=self.error,
            metrics=self.metrics.kept(), left=self.left, admitted=True)

    def ending(self, token_ids: list[int]) -> tuple[int, str | None, int | str | None]:
        """If `token_ids` were committed: how many of them, up to a stop string; whether they end the response, and why.
        """
        request, last = self.request, token_ids[-1]
        if request.stop:
            # The token that ends the response is no part of its text, so it cannot complete a stop string either.
            content = token_ids[:-1] if last in request.stop_ids else token_ids
            cut = cut_at_stop(request.detokenizer, self.token_ids, content, request.stop, request.params.min_tokens)
            if cut is not None:
                count, stop = cut
                return count, "stop", stop
        if last in request.stop_ids:
            own = last in request.eos_token_ids
            return len(token_ids), "stop", None if own else request.stop_tokens.get(last, last)
        ends = len(self.token_ids) + len(token_ids) >= request.max_tokens
        return len(token_ids), "length" if ends else None, None

    def take_drafts(self, lanes: Sequence[Lane], seconds: float, drawn: int | None = None) -> bool:
        """Counts what was drawn in the lanes, in so many seconds, and cuts it where it ends the response.

        drawn: tokens that the language model's steps stand for, where they are not all of the lanes'. False where token
        -1 says that the logits were NaN or infinite.
        """
        request, metrics = self.request, self.metrics
        # A whole response is one attempt, in however many pieces it is drafted.
        metrics.attempts += len(lanes) if not request.whole else not self.drafts
        metrics.lm_seconds += seconds
        if drawn is not None:
            metrics.lm_tokens_drawn += drawn
        left = request.max_tokens - len(self.token_ids)
        for lane in lanes:
            token_ids = lane.token_ids
            if drawn is None:
                metrics.lm_tokens_drawn += len(token_ids)
            last = token_ids[-1]
            if last < 0:
                return False
            if last in request.stop_ids or len(token_ids) >= left or request.stop:
                count, lane.finish_reason, lane.stop_reason = self.ending(token_ids)
                lane.token_ids, lane.logprobs = token_ids[:count], lane.logprobs[:count]  # tops may have more
        return True

    def append(self, winner: Winner) -> None:
        """Makes a winner the newest segment of the response, or the newest piece of a whole one."""
        lane, request = winner.lane, self.request
        logprobs = lane.logprobs if winner.as_drawn else lane.logprobs[: winner.drafted]
        logprob = sum(logprobs)
        self.drafts += 1
        first, total = len(self.token_ids), len(winner.token_ids)
        self.ends += [first + stop for stop in (*range(winner.rows, total, self.max_segment), total) if stop]
        self.token_ids += winner.token_ids
        self.cumulative_logprob += logprob
        self.reward = winner.reward
        if lane.tops is not None:
            self.told.append(winner.told())
        if request.whole:
            self.logprobs += logprobs
            return
        attempts = [_record(attempt.token_ids, attempt.reward, attempt.note, sum(attempt.logprobs),
                            attempt.told().entries(request.name) if request.params.attempt_logprobs else None)
                    for attempt in lane.hypothesis.attempts]
        record, redraft = attempts[lane.attempt - 1], self.group.redraft
        redrawn = len(lane.hypothesis.candidates) if redraft is not None else 0
        models = request.models_of(len(attempts) - redrawn, redrawn)
        segment = Segment(winner.token_ids, record.reward, record.threshold, record.accepted, attempts,
                          lane.attempt - 1, logprob, self.group.relaxed, models, redrawn)
        self.segments.append(segment)
        self.metrics.keep(segment, request.plan.decide.in_order)

    def whole_record(self) -> Attempt:
        """The user's view of a whole response that competes with others."""
        asked = self.request.params.attempt_logprobs
        return _record(list(self.token_ids), self.reward, self.note, self.cumulative_logprob,
                       self.entries() if asked else None)

    def entries(self) -> list[dict[int, Logprob]]:
        """What is known of its tokens, as it is shown."""
        return joined([part for parts in self.told for part in parts], self.request.name)

    def history(self) -> np.ndarray:
        """int32 [n, 2]: the distinct tokens of prompt and response, rising, each with its count in the response."""
        if self._history is None or self._history[0] != len(self.token_ids):
            words, counts = np.unique(np.array(self.token_ids, np.int32), return_counts=True)
            tokens = np.union1d(np.array(self.request.prompt.token_ids, np.int32), words)
            entries = np.zeros((len(tokens), 2), np.int32)
            entries[:, 0] = tokens
            entries[np.searchsorted(tokens, words), 1] = counts
            self._history = len(self.token_ids), entries
        return self._history[1]

    def edited(self) -> Edited | None:
        """What lanes are told of it, where the request edits logits."""
        edits = self.request.edits
        if edits is None:
            return None
        return Edited(edits, len(self.token_ids), self.token_ids[1 - MAX_WORD :] if len(edits.words) else ())

    def matchers(self, lanes: int) -> list[Matcher] | list[None]:
        """Of so many lanes that go on from here: what its grammar allows, where it has one."""
        grammar = self.request.grammar
        if grammar is None:
            return [None] * lanes
        if self._branches is None:
            self._branches = Branches(grammar, self.request.stop_ids)
        return self._branches.at(self.token_ids, lanes)

    def content_ids(self, extra: Extra | None = None) -> list[int]:
        """Response ids with `extra` appended, without the EOS or stop token that ended them: what a reward reads."""
        ids = self.token_ids + extra.token_ids if extra is not None else self.token_ids
        if ids and ids[-1] in self.request.stop_ids:
            return ids[:-1]
        return ids

    def contents(self, extras: Sequence[Extra]) -> list[list[int]]:
        """`content_ids` with each of `extras`."""
        return [self.content_ids(extra) for extra in extras]


class Mark(NamedTuple):
    """A group as it was when its newest segment began; its hypotheses' own boundaries are with them."""

    hypotheses: tuple[Hypothesis, ...]
    memory: Any
    dropped: Metrics | None


@dataclass(eq=False)
class Group:
    """The population of one completion, which is decided together and never sees another group."""

    request: Request
    index: int  # of the completion
    hypotheses: list[Hypothesis] = field(default_factory=list)  # by slot; those that were dropped are gone
    round: int = 0  # of the segment being decided
    relaxed: int = 0  # how often its rule was relaxed
    redraft: Redraft | None = None  # what draws the segment being decided anew, once all other attempts were rejected
    memory: Any = None  # what the rule returned last
    dropped: Metrics | None = None  # of what was drawn for hypotheses that are gone; never changed
    queued: int = 0  # of whole responses that are drawn as they are wanted: those that the scheduler was told of
    boundary: Mark | None = None  # None before its first round
    times: list[float] = field(default_factory=list)  # when each segment that is shown was committed
    first_tokens: int = 0  # of what was shown first
    seated: int = 0  # the last round that it took part in

    def __post_init__(self) -> None:
        self.hypotheses = [Hypothesis(self, slot) for slot in range(self.request.plan.lanes.population)]
        self.begin_stage(None)

    def begin_stage(self, redraft: Redraft | None) -> None:
        """From now on attempts are the plan's own, or `redraft` draws them: who decides, who reads them beside the
        reward, whether that is asked of them, and whether they are scored or read before they are judged."""
        request, self.redraft = self.request, redraft
        self.rule: Rule = request.plan.decide if redraft is None else redraft.decide or FIRST
        self.reader = request.reader if redraft is None else None
        self.scores_segments = request.scores_segments and (redraft is None or redraft.decide is not None)
        self.waits_for_scores = self.scores_segments or self.reader is not None

    @property
    def active(self) -> list[Hypothesis]:
        """Those that draw in the next round. Of whole responses some may still wait, for room or rewards, or be read.
        """
        return [h for h in self.hypotheses if h.finish_reason is None and h.table is not None and h.prefill is None
                and h.wait is None]

    @property
    def finished(self) -> bool:
        """True when every hypothesis has a finish reason."""
        for hypothesis in self.hypotheses:  # a loop, as it is asked several times a round
            if hypothesis.finish_reason is None:
                return False
        return True

    def fail(self, message: str) -> None:
        """Ends every unfinished response with an error; other completions of the request go on, as they would at
        another width."""
        for hypothesis in self.hypotheses:
            if hypothesis.finish_reason is None:
                hypothesis.finish("error", error=message)

    @property
    def failed(self) -> bool:
        """Whether the completion has ended without a result."""
        return any(hypothesis.finish_reason in ("error", "abort") for hypothesis in self.hypotheses)

    @property
    def finish_reason(self) -> str | None:
        """Why the completion has ended; None while it runs."""
        if not self.finished:
            return None
        reasons = [hypothesis.finish_reason for hypothesis in self.hypotheses]
        return next((reason for reason in reasons if reason in ("error", "abort")), reasons[0])

    @property
    def judgeable(self) -> list[Hypothesis]:
        """The whole responses that a rule may see: all, or, where it reads in order, those that have ended with a
        reward, up to the first that has not."""
        if not self.request.in_turn:
            return self.hypotheses
        return list(takewhile(lambda one: one.finish_reason is not None and one.error is None, self.hypotheses))

    @property
    def undecided(self) -> bool:
        """Whether a segment goes on: a round of it was drawn, and nothing is kept yet."""
        for hypothesis in self.hypotheses:
            if hypothesis.attempts:
                return True
        return False

    @property
    def waits(self) -> bool:
        """Whether one of them waits for rewards."""
        for hypothesis in self.hypotheses:
            if hypothesis.wait is not None:
                return True
        return False

    @property
    def free_slots(self) -> list[int]:
        """Slots that a fork may take."""
        taken = {hypothesis.slot for hypothesis in self.hypotheses}
        return [slot for slot in range(self.request.plan.lanes.population) if slot not in taken]

    def mark_boundary(self) -> None:
        """As `Hypothesis.mark_boundary`, for the group and all of its hypotheses that were admitted once. Who waits for
        rewards has a round of its own to go back behind."""
        self.round = self.relaxed = 0
        if self.redraft is not None:
            self.begin_stage(None)
        for hypothesis in self.hypotheses:
            if hypothesis.admitted and hypothesis.wait is None or hypothesis.finish_reason is not None:
                hypothesis.mark_boundary()
        self.boundary = Mark(tuple(self.hypotheses), self.memory, self.dropped)

    def go_back(self) -> None:
        """As `Hypothesis.go_back`: who appeared since the boundary is gone, who vanished is there again."""
        if self.boundary is not None:
            self.hypotheses = list(self.boundary.hypotheses)
            self.memory, self.dropped = self.boundary.memory, self.boundary.dropped
        self.round = self.relaxed = 0
        if self.redraft is not None:
            self.begin_stage(None)
        for hypothesis in self.hypotheses:
            hypothesis.go_back()

    def fork(self, parent: Hypothesis, slot: int) -> Hypothesis:
        """A new member with the history of `parent`."""
        fork = parent.fork(slot)
        self.hypotheses = sorted([*self.hypotheses, fork], key=lambda one: one.slot)
        return fork

    def drop(self, hypothesis: Hypothesis) -> None:
        """One that is not kept: what was drawn for it counts, nothing else of it stays."""
        if hypothesis.finish_reason is None:
            hypothesis.finish("abort")
        hypothesis.attempts = []
        self.hypotheses = [other for other in self.hypotheses if other is not hypothesis]
        drawn = hypothesis.metrics.drawn()
        if self.dropped is not None:
            drawn.add(self.dropped)
        self.dropped = drawn

    @property
    def unsettled(self) -> int:
        """The most of its newest segments that may be taken back yet: none of a population."""
        return self.hypotheses[0].unsettled if len(self.hypotheses) == 1 else 0

    def shared(self) -> list[Segment]:
        """The segments from which all of its hypotheses descend, less those that may be taken back: what may be shown.
        """
        shared = []
        for at_once in zip(*(hypothesis.segments for hypothesis in self.hypotheses), strict=False):
            if any(segment is not at_once[0] for segment in at_once):
                break
            shared.append(at_once[0])
        return shared[: max(0, len(shared) - self.unsettled)]

    def metrics(self) -> Metrics:
        """Of all that was drawn for the completion, and of what is kept of it so far."""
        if len(self.hypotheses) == 1 and not self.unsettled:
            metrics = _copy(self.hypotheses[0].metrics)
        else:
            metrics = Metrics()
            for hypothesis in self.hypotheses:
                metrics.add(hypothesis.metrics.drawn())
            for segment in self.shared():
                metrics.keep(segment, self.request.plan.decide.in_order)
        if self.dropped is not None:
            metrics.add(self.dropped)
        return metrics


class Owner:
    """Whoever waits for requests, in `generate` or `stream`: those made for it end once it is gone."""

    __slots__ = ("news", "waits_for", "__weakref__")

    def __init__(self) -> None:
        self.news = False  # whether a request of it has changed since it looked
        self.waits_for: set[str] = set()  # ids of its unfinished requests

    def changed(self, request_id: str, finished: bool) -> None:
        """Told in the turn in which one of them changed."""
        self.news = True
        if finished:
            self.waits_for.discard(request_id)


@dataclass(eq=False)
class Request:
    """A prompt with its parameters and its completions."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    policy: Policy
    plan: Plan
    seed: int
    stop_ids: tuple[int, ...]  # token ids that end a response
    eos_token_ids: tuple[int, ...]
    tokenizer: Any
    stop_tokens: dict[int, str] = field(default_factory=dict)  # stop strings that are special tokens, by id
    proposal: Drafts = OWN_DRAFTS  # what attempts are drawn from
    redrafts: Drafts = OWN_DRAFTS  # what attempts of its Redraft are drawn from, where it has one
    stores: tuple[int, ...] = OWN_STORE  # of all models that read its responses
    reader: Reader | None = None  # what reads attempts beside the reward
    contexts: tuple[list[int], ...] = ()  # what the language model reads responses after; left out: the prompt
    groups: list[Group] = field(default_factory=list)  # one for each completion
    prompt_reward: float | None = None
    budget: Budget = NO_BUDGET
    priority: int = 0  # lower ones come first
    user: str | None = None  # whose tokens are counted together
    arrived: float = field(default_factory=time.monotonic)
    edits: TokenEdits | None = None  # what it asks of single tokens before they are drawn
    grammar: Grammar | None = None  # what its responses must be
    prompt_told: PromptLogprobs | None = None  # of the tokens of its first context, where that is asked
    teller: Hypothesis | None = None  # who reads them for it
    admitted: float | None = None  # when its first response was
    prefilled: float | None = None  # when the first one was read by both models
    cached: int | None = None  # tokens of the prompt that the first one found in the cache
    ended: float | None = None
    trace_context: Any = None  # of the span that its own belongs to
    handed_out: Sequence[Handed] = ()  # of each completion, in outputs so far
    served: int = 0  # tokens drawn and scored for it that its user's counter has
    names: dict[int, str] = field(default_factory=dict)  # of tokens, decoded once for all requests
    owner: weakref.ref[Owner] | None = None  # who waits for it; None: whoever calls step

    def __post_init__(self) -> None:
        params, plan = self.params, self.plan
        assert params.max_tokens is not None  # settled when the request was checked
        self.max_tokens: int = params.max_tokens  # of each response
        self.contexts = self.contexts or (self.prompt.token_ids,)
        if params.prompt_logprobs is not None:
            self.prompt_told = PromptLogprobs(self.contexts[0], params.prompt_logprobs)
        self.alternates = isinstance(plan.propose, Prompted) and plan.propose.alternate
        self.lane_slabs = len(self.contexts)  # that an attempt takes of the language model's cache
        self.drawn_after = plan.drawn_after
        self.stop: Sequence[str] = params.stop or ()
        self.ranks = plan.ranks  # next tokens that are enumerated; 0: attempts are drawn
        self.attempts = plan.lanes.by_segment  # of each segment, the last number from then on
        self.whole, self.in_turn = plan.whole, plan.in_turn
        self.exhaust = steps(exhaustion(plan.exhaust))  # what is tried where the rule decides nothing
        last = self.exhaust[-1]
        self.pick: Pick = last if isinstance(last, Pick) else BestSeen()  # says which attempt keeps its slabs
        self.redraft: Redraft | None = last if isinstance(last, Redraft) else None
        if params.temperature == 0 and self.redraft is not None:
            self.redraft = replace(self.redraft, attempts=1)
        if params.temperature == 0 and not self.ranks and isinstance(last, (Pick, Redraft)):
            # All attempts that are drawn are equal: one is enough, and one more where the last is not tested. Where a
            # response may be refused, it counts how many were rejected.
            few = 1 if getattr(plan.decide, "tests_last", True) else 2
            self.attempts = tuple(min(few, count) for count in self.attempts)
        self.bounded = self.budget.bounds_work  # whether what it draws and scores is counted against something
        self.deadline = self.arrived + self.budget.seconds if self.budget.seconds is not None else math.inf  # monotonic
        # Whether what is drawn of a segment is of use without the rest of it.
        self.divisible = plan.whole or (type(plan.decide) is Always and plan.lanes == Lanes(plan.lanes.width)
                                        and plan.score.when != "segment" and isinstance(plan.propose, (
                                            Sampled, Blend, Model)))
        # Whether it may as well be drawn in smaller pieces: nothing but its place then says what a token is drawn from.
        self.piecewise = (self.divisible and self.proposal == OWN_DRAFTS and isinstance(plan.propose, Sampled)
                          and plan.segment.cut == math.inf and not self.bounded
                          and not params.penalties and params.logprobs is None and self.edits is None
                          and self.grammar is None)
        self.max_backups = sum(step.times for step in self.exhaust if isinstance(step, BackUp))
        self.relaxed_by = sum(step.by for step in self.exhaust if isinstance(step, Relax))  # a threshold, each time
        self.scores_segments = plan.score.when == "segment"
        self._models = ("+".join(name for name, _ in plan.drafts_with), self.redraft.model if self.redraft else OWN)
        # Whether the proposal is the language model's own distribution, and so are its log-probabilities.
        self.proposes_model = (params.temperature == 1.0 and not params.filters and not self.ranks
                               and self.proposal == OWN_DRAFTS)
        self.groups = [Group(self, index) for index in range(params.n)]

    def models_of(self, own: int, redrawn: int) -> tuple[str, ...]:
        """The names of the models that drew so many attempts of the plan's own, and so many that were redrawn; empty
        where all are the engine's own."""
        return () if self._models == (OWN, OWN) else (self._models[0],) * own + (self._models[1],) * redrawn

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """Those of all groups."""
        return [hypothesis for group in self.groups for hypothesis in group.hypotheses]

    @property
    def finished(self) -> bool:
        """True when every hypothesis has a finish reason."""
        return all([group.finished for group in self.groups])

    @property
    def times(self) -> Times:
        """How far it came, and when."""
        shown = [group.times for group in self.groups if group.times]
        first, last = (min(times[0] for times in shown), max(times[-1] for times in shown)) if shown else (None, None)
        return Times(*(None if moment is None else moment - self.arrived
                       for moment in (self.admitted, self.prefilled, first, last, self.ended)))

    def spent(self) -> Metrics:
        """The counts of all that was drawn and scored for it, for what is gone, too."""
        metrics = Metrics()
        for group in self.groups:
            for hypothesis in group.hypotheses:
                metrics.add(hypothesis.metrics)
            if group.dropped is not None:
                metrics.add(group.dropped)
        return metrics

    @property
    def awaits_prompt(self) -> bool:
        """Whether nothing is drawn of it yet for want of the prompt's own reward."""
        return self.plan.score.prompt and self.prompt_reward is None

    @property
    def asked_prompt(self) -> bool:
        """Whether the reward was asked for something. The prompt's own is what it is asked for first."""
        return any([hypothesis.metrics.rm_calls for hypothesis in self.hypotheses])

    def fail(self, message: str) -> None:
        """Ends every unfinished response with an error."""
        for group in self.groups:
            group.fail(message)

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """Decodes responses to this prompt; made when a text is first wanted, so that nothing else pays for it."""
        return Detokenizer(self.tokenizer, self.prompt.token_ids)

    def response_text(self, hypothesis: Hypothesis, extra: Extra | None = None) -> str | None:
        """Text of the response (with `extra` appended), the stop string cut off; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        token_ids = hypothesis.content_ids(extra)
        text = self.detokenizer.decode(token_ids)
        if not isinstance((extra or hypothesis).stop_reason, str):
            return text
        found = stop_of(self.detokenizer, token_ids, text, self.stop, self.params.min_tokens)
        return text[: found[0]] if found else text

    def name(self, token: int) -> str | None:
        """The text of one token by itself, special ones shown; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        found = self.names.get(token)
        if found is None:
            found = self.names[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return found

    @cached_property
    def _shown(self) -> ShownText:
        """What the user is shown of responses. A tokenizer that failed is none: then there is no text."""
        return ShownText(lambda: self.detokenizer, self.tokenizer, self.prompt.token_ids, self.params, self.stop_ids)

    def _shown_text(self, token_ids: list[int], stop_reason: int | str | None, ended: bool) -> str | None:
        return None if self.tokenizer is None else self._shown.of(token_ids, stop_reason, ended)

    @property
    def has_news(self) -> bool:
        """Whether an output of it is wanted now that it has changed."""
        return self.params.output_kind is not RequestOutputKind.FINAL_ONLY or self.finished

    def news(self, output: RequestOutput) -> RequestOutput:
        """What is handed out of `output`: all of it, or what was not handed out before."""
        return since(output, self.handed_out) if self.params.output_kind is RequestOutputKind.DELTA else output

    def hand_out(self, output: RequestOutput) -> None:
        """Notes what of it the user has."""
        self.handed_out = tuple(map(Handed.of, output.outputs))

    def output(self) -> RequestOutput:
        """A snapshot: later rounds do not change it."""
        completions = [self._completion(group) for group in self.groups]
        metrics = _copy(completions[0].metrics)
        for completion in completions[1:]:
            metrics.add(completion.metrics)
        return RequestOutput(self.request_id, self.prompt.asked, list(self.prompt.token_ids), completions,
                             self.finished, self.seed, self.policy, self.prompt_reward, metrics,
                             self.prompt_told.entries(self.name) if self.prompt_told is not None else None, self.times,
                             self.cached)

    def _completion(self, group: Group) -> CompletionOutput:
        """What all hypotheses of the group have in common, and so what may be shown: all of it once one is left."""
        only, tells = group.hypotheses[0], self.params.logprobs is not None
        if len(group.hypotheses) == 1 and not group.unsettled and (
                only.segments or not self.whole or only.finish_reason in ("refused", *CUT_SHORT)):
            text = self._shown_text(only.token_ids, only.stop_reason, only.finish_reason is not None)
            return CompletionOutput(
                group.index, text, list(only.token_ids), only.cumulative_logprob, only.finish_reason, only.stop_reason,
                only.reward, list(only.segments), group.metrics(), only.error, only.entries() if tells else None)
        failed = next((h for h in group.hypotheses if h.finish_reason in ("error", "abort")), None)
        shared = group.shared()
        token_ids = [token for segment in shared for token in segment.token_ids]
        text = self._shown_text(token_ids, None, failed is not None)
        logprob = 0.0
        for segment in shared:
            logprob += segment.logprob
        return CompletionOutput(
            group.index, text, token_ids, logprob, failed.finish_reason if failed is not None else None,
            reward=shared[-1].reward if shared else None, segments=shared, metrics=group.metrics(),
            error=failed.error if failed is not None else None,
            logprobs=joined([part for parts in only.told[: len(shared)] for part in parts], self.name) if tells else
            None)


class Extra(Protocol):
    """What may continue a response: a lane, or what is kept of one."""

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def stop_reason(self) -> int | str | None: ...


def _copy(metrics: Metrics) -> Metrics:
    """A third of what `copy.copy` takes."""
    return Metrics(**vars(metrics))


def _record(token_ids: list[int], reward: float | None, note: Note | None, logprob: float,
            logprobs: list[dict[int, Logprob]] | None) -> Attempt:
    """The user's view of an attempt."""
    threshold, probability, accepted = note if note is not None else (None, None, False)
    return Attempt(token_ids, reward, threshold, probability, accepted, logprob, logprobs)
