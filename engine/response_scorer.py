"""Responses that nobody drew are scored, a slice a turn, beside those that are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.errors import IntegrityError, OutOfPages, RewardError
from stars.prompt import Prompt
from stars.reward.base import Candidate, Reward, with_parts
from stars.reward.session import SessionReward
from stars.scheduler import Scheduler
from stars.score_call import Pair, PairParser, ScoreCall, prompts_of

PATIENCE = 16
"""Turns in a row without room, each after a round of the others, before one of those gives way."""
CHARACTERS = 1 << 16
"""Of texts that are read in one turn, but for one that is longer."""


class ResponseScorer:
    """Scores what a ScoreCall asks for, through the reward's contract alone.

    A turn is about as long as a round: as many responses as the reward wants at once, or of a long one a chunk of rows.
    Nothing is held between turns but what prompts have left in published pages, which others take as they need them.
    So nobody waits for a call, and a call that is dropped leaves nothing. Where pages are short it waits for others to
    end; after PATIENCE turns those give way that do so for each other, and go on to the same text afterwards.
    """

    def __init__(self, reward: Reward, parser: PairParser, cache: PagedCache, scheduler: Scheduler,
                 config: EngineConfig):
        self._reward = reward
        self._caches = [part.cache for part in with_parts(reward) if isinstance(part, SessionReward)]
        self._parser = parser
        self._cache = cache
        self._scheduler = scheduler
        self._config = config

    def waits(self, call: ScoreCall) -> bool:
        """Whether `call` has nothing to do before rewards come that were asked for."""
        return call.waits(self._config.max_num_lanes)

    def advance(self, call: ScoreCall, alone: bool = False) -> bool:
        """The next turn of `call`; False where there was no room for it. What stops it in the middle leaves the
        reward's sessions as they are, and `call` as it was. alone: of one response."""
        if call.done or self.waits(call):
            return True
        if len(call.pairs) < len(call.asked):
            self._read(call)
            return True
        done = self._score(call, alone)
        call.tries = 0 if done else call.tries + 1
        return done

    def _read(self, call: ScoreCall) -> None:
        """Checks the next ones: all of them before the first is scored."""
        characters = 0
        while len(call.pairs) < len(call.asked) and characters < CHARACTERS:
            try:
                pair = self._parser.next_of(call)
                self._reward.check(pair.prompt, len(pair.token_ids))
            except IntegrityError:
                raise
            except Exception as error:  # of a user's tokenizer, or reward: nothing was begun
                call.fail(len(call.pairs), error)
                return
            new = not call.pairs or call.pairs[-1].prompt is not pair.prompt
            characters += len(pair.token_ids) * 4 + len(pair.prompt.token_ids) * 4 * new + 256
            call.pairs.append(pair)

    def _score(self, call: ScoreCall, alone: bool) -> bool:
        chosen = self._slice(call, alone or call.next < call.alone)
        if not chosen:
            return self._make_way(call) and self._score(call, alone)
        sessions: dict[int, Any] = {}
        rows, begun = self._config.chunk, False
        for wave in self._waves(chosen):
            opened = self._open_all(call, wave, chosen[0] if self._is_long(chosen[0]) else None, not sessions)
            if not opened:
                break
            begun = True
            started, rows = self._start(call, opened, rows)
            sessions |= started
            if len(started) < len(wave):
                break
        ready = []
        for pair in chosen:
            if id(pair.prompt) not in sessions:
                break
            ready.append(pair)
        if not ready:
            return begun
        if not self._take_up(call, ready[0], sessions):
            return True
        call.read, call.spent = ready[-1].prompt, 0
        needs_text = self._reward.needs_text
        results = self._reward.score([Candidate(
            sessions[id(pair.prompt)], pair.token_ids, pair.text if needs_text else None, self._is_long(pair),
            bool(pair.token_ids) or pair.stopped is not None, pair.stopped) for pair in ready])
        for result in results:
            if result.handle is not None:
                self._reward.discard(result.handle)
        for session in sessions.values():
            self._reward.close(session)
        call.take(results)
        return True

    def _is_long(self, pair: Pair) -> bool:
        """Whether no slab is sure to hold it: then it is scored by itself, in its session's pages."""
        return len(pair.token_ids) > self._config.max_segment_size

    def _slice(self, call: ScoreCall, alone: bool) -> list[Pair]:
        """The next ones, as many as are scored in one turn; none where all slabs are taken."""
        first = call.pairs[call.next]
        slabs = min([self._config.max_num_lanes, *(cache.num_free_slabs for cache in (self._cache, *self._caches))])
        most = min(slabs, max(1, self._reward.lanes_per_pass(max(1, len(first.token_ids)), 1)))
        if alone or self._is_long(first):
            most = min(slabs, 1)
        chosen: list[Pair] = []
        rows, prompts = 0, {id(call.read)}
        for pair in call.pairs[call.next : call.next + most]:
            rows += len(pair.token_ids) + 1
            if id(pair.prompt) not in prompts:
                prompts.add(id(pair.prompt))
                rows += len(pair.prompt.token_ids)
            if chosen and (rows > self._config.chunk or self._is_long(pair)):
                break
            chosen.append(pair)
        return chosen

    def _waves(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[Prompt, int]]]:
        """Their prompts with the longest response to each, those together of which no two begin with the same page."""
        size, waiting = self._config.page_size, list(prompts_of(pairs))
        while waiting:
            wave: dict[tuple[int, ...], tuple[Prompt, int]] = {}
            for prompt, tokens in waiting:
                wave.setdefault(tuple(prompt.token_ids[:size]), (prompt, tokens))
            taken = {id(prompt) for prompt, _ in wave.values()}
            waiting = [one for one in waiting if id(one[0]) not in taken]
            yield list(wave.values())

    def _open_all(self, call: ScoreCall, wave: Sequence[tuple[Prompt, int]], long: Pair | None, first: bool,
                  ) -> list[tuple[Prompt, Any]]:
        """Sessions of the first prompts of a wave, as far as there is room; first: whether nothing else is open."""
        opened: list[tuple[Prompt, Any]] = []
        for prompt, tokens in wave:
            session = self._open(prompt, tokens, long if call.spent else None)
            while session is None and first and not opened and self._make_way(call):
                session = self._open(prompt, tokens, long if call.spent else None)
            if session is None:
                break
            opened.append((prompt, session))
        return opened

    def _open(self, prompt: Prompt, tokens: int, begun: Pair | None) -> Any:
        """A session with room for a response of so many tokens; None where there is none now. begun: the response that
        an earlier turn has read a part of."""
        if not self._reward.can_open(prompt, tokens):
            return None
        try:
            session = self._reward.open(prompt, tokens)
        except OutOfPages:
            return None
        if begun is not None:
            self._reward.recall(session, begun.token_ids, begun.text)
        if self._reward.reserve(session, tokens):
            return session
        self._reward.close(session)
        return None

    def _make_way(self, call: ScoreCall) -> bool:
        """Whether somebody who runs gives way to `call`, which has waited for long enough; RewardError where nobody
        runs, and there will never be more room."""
        if not self._scheduler.running:
            raise RewardError(f"{type(self._reward).__name__} has no room for this response while nothing else is "
                              "open: refuse it in check")
        return call.tries >= PATIENCE and self._scheduler.make_way()

    def _start(self, call: ScoreCall, opened: Sequence[tuple[Prompt, Any]], rows: int) -> tuple[dict[int, Any], int]:
        """Runs prompts of new sessions, in at most so many rows, and closes those that it does not come to the end of;
        (those that have started, by prompt, the rows that are left)."""
        found = self._reward.cached(opened[0][1])
        # Where what the last turn has read is gone again, it is read to its end. Nothing is remembered in deterministic
        # mode.
        gone = call.cached is not None and found <= call.cached
        bound = None if gone or self._config.deterministic else rows
        progress = self._reward.start_in_chunks([session for _, session in opened], bound)
        call.cached = None if progress.done else found
        for _, session in opened[progress.done :]:
            self._leave(session)
        return ({id(prompt): session for prompt, session in opened[: progress.done]}, max(0, rows - progress.rows))

    def _take_up(self, call: ScoreCall, pair: Pair, sessions: dict[int, Any]) -> bool:
        """Whether no more of a long response is to be read before it is scored than one turn may read. If not, what was
        read is left for the next one. Where that does not find it again, and again, all is read at once."""
        tokens, rows = len(pair.token_ids), self._config.chunk
        if tokens <= rows or not self._is_long(pair) or self._config.deterministic or call.spent > 2 * tokens:
            return True
        session = sessions[id(pair.prompt)]
        progress = self._reward.resume_in_chunks(session, pair.token_ids, pair.text, rows)
        if progress.done:
            return True
        call.spent += progress.rows + 1
        self._leave(session)
        return False

    def _leave(self, session: Any) -> None:
        """Closes a session that the next turn opens again, and finds what it has read where nobody took it."""
        self._reward.remember([(session, None)])
        self._reward.close(session)
