"""The loop that adapters share: a stack drafts, a reward scores, libstars' controller decides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from stars.adapters.law import Law
from stars.adapters.scoring import Scoring, usable
from stars.bindings.controller import Controller, Drawn, Fed, Said, Verdict
from stars.errors import RequestError, RewardError, StarsError
from stars.outputs import Attempt, CompletionOutput, Metrics, Segment
from stars.prompt import Prompt
from stars.reward.base import Candidate, Scored


class Draft(NamedTuple):
    """An attempt as a stack drew it."""

    token_ids: list[int]  # at least one; the EOS or stop token that ended it included
    ended: bool  # whether the response ends with it
    logprob: float = 0.0  # of its tokens at temperature 1 and before filters, nats; NaN where the stack cannot tell
    content: int | None = None  # tokens of it that a reward reads; None: all, but for a stop token at its end
    text: str | None = None  # of the whole response with it, where the stack knows it; None: the loop decodes


class Drafted(NamedTuple):
    """An attempt at the segment that is being made, with what is known of it by now."""

    draft: Draft
    reward: float | None = None
    said: Said | None = None
    handle: Any = None  # the reward's, of what it has read of the attempt


class Asked(NamedTuple):
    """What is to be drafted for one response in a round."""

    response: Response
    attempts: list[Drawn]


class Settled(NamedTuple):
    """What becomes of the attempts of one response after a round, and of the one that was held.

    kept: its attempt's number, if one has become history; it may be the one that was held. held: else, the attempt that
    may still win, which stays as it is; 0: none. All others are gone.
    """

    response: Response
    kept: int
    held: int


class Stack(Protocol):
    """What another runtime does for the loop. It never decides."""

    def open(self, responses: Sequence[Response]) -> None:
        """Reads the prompts of responses that begin; `response.sequence` is the stack's own."""

    def draft(self, asked: Sequence[Asked]) -> Sequence[list[Draft] | StarsError]:
        """Draws the attempts of a round, all from what was committed; one list a response, in the attempts' order, or
        the error that ends that response."""

    def settle(self, settled: Sequence[Settled]) -> None:
        """Keeps winners as history, holds what may still win, and forgets the rest."""

    def close(self, response: Response) -> None:
        """The response has ended: what is held of it is given back."""


class Detokenizes(Protocol):
    """What makes text of a response's token ids."""

    def __call__(self, token_ids: list[int]) -> str: ...


class Response:
    """One response while it is made. Stacks read what is committed here and keep their own in `sequence`."""

    def __init__(self, prompt: Prompt, seed: int, sample: int, max_tokens: int, greedy: bool = False):
        self.prompt = prompt
        self.seed = seed
        self.sample = sample  # which of the responses to this prompt
        self.max_tokens = max_tokens
        self.greedy = greedy  # whether its proposal has temperature 0: one attempt of each segment is drawn then
        self.token_ids: list[int] = []  # committed, the EOS included
        self.text: str | None = None
        self.segments: list[Segment] = []
        self.metrics = Metrics()
        self.prompt_reward: float | None = None
        self.decode: Detokenizes | None = None  # of this one, as its text may depend on its prompt; None: the loop's
        self.stop_ids: frozenset[int] | None = None  # of this one; None: the loop's
        self.finish_reason: str | None = None
        self.error: StarsError | None = None
        self.sequence: Any = None  # the stack's
        self.session: Any = None  # the reward's
        self.controller: Controller | None = None
        self.drafts: dict[int, Drafted] = {}  # of the segment, by attempt

    def output(self) -> CompletionOutput:
        """What the user gets of it so far."""
        last = self.segments[-1] if self.segments else None
        return CompletionOutput(
            self.sample, self.text, list(self.token_ids), math.fsum(one.logprob for one in self.segments),
            self.finish_reason, reward=last.reward if last else None, segments=list(self.segments),
            metrics=replace(self.metrics), error=None if self.error is None else str(self.error))


class Loop:
    """Runs responses together, each by a controller of its own; any width gives the same text.

    decode: text of response tokens, where the reward reads text or texts are wanted; None: no text. reserve: takes what
    the stack needs for a response and tells whether there was room; None: there always is. What is not there for one
    that would run alone is an error of that response.
    """

    def __init__(self, stack: Stack, scoring: Scoring | None, law: Law, decode: Detokenizes | None,
                 stop_ids: frozenset[int] = frozenset(), width: int | None = None,
                 reserve: Callable[[Response], bool] | None = None):
        self._stack = stack
        self._scoring = scoring
        self._law = law
        self._decode = decode
        self._stop_ids = stop_ids
        self._width = width or law.width
        self._reserve = reserve

    def run(self, responses: Sequence[Response]) -> Generator[list[Response], None, None]:
        """Yields after each round those of `responses` that have a new segment or have ended, until all have.

        A response whose reward fails ends with finish_reason "error". Who stops early calls `close` of the generator:
        then all that was held is given back.
        """
        waiting = list(responses)
        running: list[Response] = []
        try:
            while waiting or running:
                begun = self._admit(waiting, running)
                ended = [one for one in begun if one.finish_reason is not None]
                running += [one for one in begun if one.finish_reason is None]
                changed = ended + (self._round(running) if running else [])
                for one in running:
                    if one.finish_reason is not None:
                        self._close(one)
                running = [one for one in running if one.finish_reason is None]
                yield changed
        finally:
            for one in responses:  # those that were being opened, too
                self._close(one)

    def _admit(self, waiting: list[Response], running: Sequence[Response]) -> list[Response]:
        """Opens as many of `waiting` as there is room for, and takes them from it."""
        begun: list[Response] = []
        while waiting:
            one = waiting[0]
            alone = not running and all(other.finish_reason is not None for other in begun)
            try:
                if self._scoring is not None:
                    one.session = self._scoring.open(one.prompt, one.max_tokens)
                    if one.session is None:
                        if not alone:
                            break
                        raise RewardError("the reward model's cache is too small for this prompt and max_tokens: raise "
                                          "cache_tokens")
                if self._reserve is not None and not self._reserve(one):
                    if alone:
                        raise RequestError("there is no room for this prompt and max_tokens: shorten one of them")
                    self._close(one)
                    break
            except (RequestError, RewardError) as error:
                self._fail(one, error)
            begun.append(waiting.pop(0))
        opened = [one for one in begun if one.finish_reason is None]
        if self._scoring is not None:
            for one in opened:
                self._start(self._scoring, one)
        opened = [one for one in opened if one.finish_reason is None]
        for one in opened:
            one.controller = self._law.controller(seed=one.seed, sample=one.sample, max_tokens=one.max_tokens,
                                                  prompt_reward=one.prompt_reward, greedy=one.greedy)
        if opened:
            self._stack.open(opened)
        return begun

    def _start(self, scoring: Scoring, one: Response) -> None:
        """The reward reads its prompt, and scores that alone where the law asks for it."""
        try:
            scoring.start(one.session)
            if self._law.reads_prompt:
                one.metrics.rm_calls += 1
                one.prompt_reward = scoring.prompt_reward(one.session)
        except RewardError as error:
            self._fail(one, error)

    def _round(self, running: Sequence[Response]) -> list[Response]:
        """Drafts, scores and decides once; returns those that have a new segment or have ended."""
        asked = []
        for one in running:
            assert one.controller is not None
            asked.append(Asked(one, one.controller.next(self._width)))
        begin = time.perf_counter()
        drafted = self._stack.draft(asked)
        seconds = (time.perf_counter() - begin) / len(asked)
        for (one, attempts), drafts in zip(asked, drafted, strict=True):
            one.metrics.lm_seconds += seconds
            if isinstance(drafts, StarsError):
                self._fail(one, drafts)
                continue
            one.metrics.width = max(one.metrics.width, len(attempts))
            one.metrics.attempts += len(attempts)
            one.metrics.lm_tokens_drawn += sum(len(draft.token_ids) for draft in drafts)
            for attempt, draft in zip(attempts, drafts, strict=True):
                one.drafts[attempt.attempt] = Drafted(draft)
        drawn = [one for one in asked if one.response.finish_reason is None]
        verdicts = self._decide(drawn)
        settled = []
        for one, _ in drawn:
            if one.finish_reason is None:
                verdict, winner, best = verdicts[one]
                decided = verdict in (Verdict.ACCEPT, Verdict.FALLBACK)
                settled.append(Settled(one, winner if decided else 0, 0 if decided else best))
        self._stack.settle(settled)
        changed = [one for one, _ in asked if one.finish_reason is not None]
        for one, kept, held in settled:
            if kept:
                self._commit(one, kept, self._law.best or verdicts[one][0] == Verdict.ACCEPT)
                changed.append(one)
            else:
                self._forget(one, besides=held)
        return changed

    def _decide(self, asked: Sequence[Asked]) -> dict[Response, tuple[Any, int, int]]:
        """Scores attempts in order, a few of each response at a time, until each is decided or wants more."""
        verdicts: dict[Response, tuple[Any, int, int]] = {}
        left = {one: [attempt.attempt for attempt in attempts] for one, attempts in asked}
        while left:
            batch: list[tuple[Response, list[int]]] = []
            for one, numbers in left.items():
                count = len(numbers)
                if self._scoring is not None:
                    tokens = len(one.drafts[numbers[0]].draft.token_ids)
                    count = min(count, self._scoring.lanes_per_pass(tokens, len(left)))
                batch.append((one, numbers[:count]))
                del numbers[:count]
            rewards = self._rewards(batch)
            for (one, numbers), found in zip(batch, rewards, strict=True):
                assert one.controller is not None
                fault = None
                results = []
                for number, reward in zip(numbers, found, strict=True):
                    if isinstance(reward, RewardError):
                        fault = reward  # an error, unless one before it is accepted
                        break
                    draft = one.drafts[number].draft
                    results.append(Fed(number, len(draft.token_ids), draft.ended, reward))
                decided = one.controller.feed(results)
                for result, said in zip(results, decided.said, strict=False):
                    one.drafts[result.attempt] = one.drafts[result.attempt]._replace(reward=result.reward, said=said)
                verdicts[one] = decided.verdict, decided.winner, decided.best
                if decided.verdict in (Verdict.ACCEPT, Verdict.FALLBACK):
                    left.pop(one)
                elif fault is not None:
                    self._fail(one, fault)
                    left.pop(one)
                elif not left[one]:
                    left.pop(one)
        return verdicts

    def _rewards(self, batch: Sequence[tuple[Response, list[int]]]) -> list[list[float | RewardError]]:
        if self._scoring is None:  # a policy that asks for none: what is drawn is accepted
            return [[0.0] * len(numbers) for _, numbers in batch]
        candidates = [self._candidate(one, one.drafts[number].draft) for one, numbers in batch for number in numbers]
        begin = time.perf_counter()
        results = self._scoring.score(candidates)
        settled = iter([(result, _reward_of(result)) for result in results])  # waits for those that come later
        seconds = (time.perf_counter() - begin) / len(candidates)
        rewards: list[list[float | RewardError]] = []
        for one, numbers in batch:
            found: list[float | RewardError] = []
            for number in numbers:
                result, reward = next(settled)
                one.drafts[number] = one.drafts[number]._replace(handle=result.handle)
                one.metrics.rm_calls += 1
                one.metrics.rm_seconds += seconds
                one.metrics.rm_tokens_scored += result.tokens_run
                one.metrics.rm_tokens_full_rescore += result.tokens_full
                found.append(reward)
            rewards.append(found)
        return rewards

    def _candidate(self, one: Response, draft: Draft) -> Candidate:
        """The whole response with a draft, as a reward reads it."""
        assert self._scoring is not None
        token_ids = one.token_ids + draft.token_ids
        stopped = token_ids[-1] if draft.ended and token_ids[-1] in self._stops(one) else None
        if draft.content is not None:
            token_ids = one.token_ids + draft.token_ids[: draft.content]
        elif stopped is not None:
            token_ids = token_ids[:-1]
        if not self._scoring.needs_text:
            return Candidate(one.session, token_ids, None, stopped=stopped)
        return Candidate(one.session, token_ids, self._text(one, token_ids, draft), False, draft.ended, stopped)

    def _text(self, one: Response, token_ids: list[int], draft: Draft) -> str | None:
        if draft.text is not None:
            return draft.text
        decode = one.decode or self._decode
        return None if decode is None else decode(token_ids)

    def _stops(self, one: Response) -> frozenset[int]:
        return self._stop_ids if one.stop_ids is None else one.stop_ids

    def _commit(self, one: Response, winner: int, accepted: bool) -> None:
        """The winner becomes history, in the reward's session and in what the user gets."""
        assert one.controller is not None
        draft = one.drafts[winner].draft
        if self._law.best or self._scoring is None:  # then no threshold is behind it
            attempts = [Attempt(found.draft.token_ids, found.reward if self._scoring else None, None, None,
                                number == winner, found.draft.logprob) for number, found in one.drafts.items()]
        else:
            attempts = [_attempt(found) for found in one.drafts.values()]
        place = list(one.drafts).index(winner)
        segment = Segment(draft.token_ids, attempts[place].reward, attempts[place].threshold, accepted, attempts, place,
                          draft.logprob)
        if self._scoring is not None:
            self._scoring.commit(one.session, one.drafts[winner].handle)
            one.drafts[winner] = one.drafts[winner]._replace(handle=None)
        self._forget(one)
        one.controller.commit()
        content = len(one.token_ids) + (len(draft.token_ids) if draft.content is None else draft.content)
        one.token_ids += draft.token_ids
        shown = one.token_ids[:content]
        if draft.content is None and draft.ended and shown[-1] in self._stops(one):
            shown = shown[:-1]
        one.text = self._text(one, shown, draft)
        one.segments.append(segment)
        one.metrics.keep(segment, in_order=not self._law.best)
        one.finish_reason = one.controller.finish_reason

    def _forget(self, one: Response, besides: int = 0) -> None:
        """What the reward holds of attempts is given back, but for one that may still win."""
        for number, drafted in one.drafts.items():
            if drafted.handle is not None and number != besides:
                assert self._scoring is not None
                self._scoring.discard(drafted.handle)
                one.drafts[number] = drafted._replace(handle=None)
        if one.controller is not None and not besides:
            one.drafts = {}

    def _fail(self, one: Response, error: StarsError) -> None:
        """Ends a response with an error; what was committed stays."""
        one.error, one.finish_reason = error, "error"
        self._close(one)

    def _close(self, one: Response) -> None:
        """Gives back what is held for a response; once."""
        self._forget(one)
        if one.sequence is not None:
            self._stack.close(one)
            one.sequence = None
        if one.session is not None:
            assert self._scoring is not None
            session, one.session = one.session, None
            self._scoring.close(session)
        if one.controller is not None:
            one.controller.close()
            one.controller = None


def _reward_of(result: Scored) -> float | RewardError:
    try:
        return usable(result)
    except RewardError as error:
        return error


def _attempt(drafted: Drafted) -> Attempt:
    draft, said = drafted.draft, drafted.said
    if said is None:
        return Attempt(draft.token_ids, None, None, None, False, draft.logprob)
    return Attempt(draft.token_ids, drafted.reward, said.threshold, said.probability, said.accepted, draft.logprob)
