"""A cache of rewards by the exact text that was scored."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from stars.errors import RewardError
from stars.prompt import Prompt
from stars.reward.base import Candidate, Reward, Scored, checked_integer, reward_problem, settled
from stars.reward.composite import CompositeReward
from stars.reward.later import Ready, shared
from stars.reward.resolve import resolve_reward
from stars.sources import checked_reward


class CachedReward(CompositeReward):
    """What `reward` said of the last `maxsize` distinct texts, and `reward` itself of others.

    reward: a callable, or a Reward that reads whole texts anew: `FunctionReward`, `RemoteReward`, `EncoderReward`. It
    must say the same of the same text each time. One that keeps what it has read, as `CausalReward` does, is refused.

    A text is the prompt as it was given and the response: its text where the reward reads text, else its token ids.
    Equal texts of one call are asked for once. Errors, NaN and +inf are not kept. `hits` and `misses` count candidates
    that the cache answered, or an equal one of the same call, and candidates that the reward was asked for. Engines may
    share one cache, as far as they may share the reward.
    """

    def __init__(self, reward: Any, maxsize: int = 4096):
        inner = resolve_reward(checked_reward(reward))
        if inner is None:
            raise RewardError("CachedReward needs a reward: a callable or a stars.Reward")
        if type(inner).commit is not Reward.commit and not isinstance(inner, CachedReward):
            raise RewardError(f"CachedReward needs a reward that reads whole texts anew, and {type(inner).__name__} "
                              "keeps what it has read: use it as it is, and cache the callables beside it")
        super().__init__([inner])
        self.maxsize = checked_integer("CachedReward.maxsize", maxsize, 1)
        self.hits = self.misses = 0
        self._known: OrderedDict[Hashable, Scored] = OrderedDict()  # the one used last at the end
        self._lock = threading.Lock()  # Futures are settled by other threads, and engines may share it
        self._newest: tuple[Prompt, Hashable] | None = None

    def __repr__(self) -> str:
        return (f"CachedReward({self.parts[0]!r}, maxsize={self.maxsize}; {len(self._known)} texts, {self.hits} hits, "
                f"{self.misses} misses)")

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """Asks the reward for the texts that are not known, each once."""
        results: dict[int, Scored] = {}
        missing: list[tuple[Hashable | None, list[int]]] = []  # texts, with the places of the candidates that are it
        places_of: dict[Hashable, list[int]] = {}
        with self._lock:
            for index, candidate in enumerate(candidates):
                key = self._key(candidate)
                if key in self._known:
                    self._known.move_to_end(key)
                    results[index] = self._known[key]
                elif key in places_of:
                    places_of[key].append(index)
                else:
                    missing.append((key, [index]))
                    if key is not None:
                        places_of[key] = missing[-1][1]
            self.misses += len(missing)
            self.hits += len(candidates) - len(missing)
        if missing:
            [scores] = self.score_parts([candidates[places[0]] for _, places in missing])
            for (key, places), scored in zip(missing, scores, strict=True):
                results |= self._taken(key, places, scored)
        return [results[index] for index in range(len(candidates))]

    def _taken(self, key: Hashable | None, places: list[int], scored: Scored) -> dict[int, Scored]:
        """The scores of equal candidates, of whom the first was asked for; what is there is kept."""
        reward = scored.reward
        if not isinstance(reward, Future):
            self._keep(key, reward, scored.per_token)
            return {place: scored if place == places[0] else Scored(reward, per_token=scored.per_token)
                    for place in places}
        reward.add_done_callback(lambda future: self._keep(key, settled(future), scored.per_token))
        futures = shared(reward, len(places))
        return {place: scored._replace(reward=future) if place == places[0] else Scored(
            future, per_token=scored.per_token) for place, future in zip(places, futures, strict=True)}

    def _keep(self, key: Hashable | None, reward: Ready, per_token: Sequence[float]) -> None:
        if key is None or isinstance(reward, RewardError) or reward_problem(reward) is not None:
            return
        with self._lock:
            self._known[key] = Scored(reward, per_token=per_token)
            self._known.move_to_end(key)
            while len(self._known) > self.maxsize:
                self._known.popitem(last=False)

    def _key(self, candidate: Candidate) -> Hashable | None:
        """What a text is known by; None where the prompt has parts that cannot be compared."""
        prompt = candidate.session.prompt
        if self._newest is None or self._newest[0] is not prompt:
            self._newest = prompt, _prompt_key(prompt)
        begin = self._newest[1]
        if begin is None:
            return None
        if self.needs_text:
            return begin, candidate.text
        return begin, tuple(prompt.token_ids), tuple(candidate.token_ids)


def _prompt_key(prompt: Prompt) -> Hashable | None:
    """A prompt as it was given; of messages, which may hold whatever, their JSON."""
    if prompt.given is None:
        return tuple(prompt.token_ids), prompt.text
    if isinstance(prompt.given, str):
        return (prompt.given, "literal") if prompt.literal else prompt.given
    try:
        return "messages", json.dumps([prompt.given, prompt.rendering, prompt.literal])
    except (TypeError, ValueError, RecursionError):
        return None
