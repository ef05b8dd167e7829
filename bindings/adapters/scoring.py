"""Any of our rewards, outside an Engine: bound to a vocabulary, and asked in attempt order."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stars.config import DEFAULT_CACHE_TOKENS, EngineConfig
from stars.errors import IntegrityError, RewardError, describe, log
from stars.model.sharing import SharedWeights
from stars.prompt import Prompt
from stars.reward.base import Candidate, Reward, Scored, by_session, reward_problem, settled, with_parts
from stars.reward.resolve import resolve_reward
from stars.sources import checked_reward
from stars.target import target_of


class TextOnly:
    """Stands for the tokenizer of a model of which nothing is known: a reward model with a tokenizer of its own reads
    the text."""

    vocab_size = 1 << 31

    def same_vocabulary(self, other: Any) -> bool:
        """Never: nobody can tell."""
        return False


class Scoring:
    """A reward with pages and slabs of its own, for responses that another stack drafts.

    reward: as the Engine takes it. tokenizer: of the drafting model, ours (`stars.model.tokenizer`), or None where
    there is none: then the reward gets token ids alone; `TextOnly()` where it is to get the text. vocab_size: of the
    drafting model. max_model_len: most tokens of a prompt and its response. max_num_seqs, max_num_lanes: responses and
    attempts at once. segment_size: most tokens of an attempt. cache_tokens: of the reward model's cache; None: 32768,
    or one whole response where that is more. own: the drafting model's directory or GGUF file, for an adapter that is
    one of it. RewardError and ModelError as from the Engine.
    """

    def __init__(self, reward: Any, tokenizer: Any, vocab_size: int, *, max_model_len: int, segment_size: int,
                 max_num_seqs: int = 64, max_num_lanes: int = 64, device: str = "cpu",
                 cache_tokens: int | None = None, own: Path | None = None):
        scope = SharedWeights(own)
        with scope:
            found = resolve_reward(checked_reward(reward))
        if found is None:
            raise RewardError("reward is None, and the policy asks for rewards: give a model directory, a callable or "
                              "a stars.Reward")
        self.reward: Reward = found
        self.tokenizer = tokenizer
        page = 16
        # A vocabulary of its own, or a template, may make more tokens of a text than the drafting model has.
        least = 2 * max_model_len + 4 * segment_size
        tokens = max(DEFAULT_CACHE_TOKENS, least) if cache_tokens is None else cache_tokens
        tokens = -(-tokens // page) * page
        config = EngineConfig(
            device=device, dtype="auto" if device == "cpu" else "bfloat16", deterministic=False, cache_tokens=tokens,
            least_cache_tokens=tokens, gpu_memory_utilization=0.9, page_size=page, max_model_len=max_model_len,
            max_model_len_from="the model's context", max_num_seqs=min(max_num_seqs, max_num_lanes),
            max_num_lanes=max_num_lanes, max_segment_size=segment_size, prefill_backend="auto",
            target=target_of(device))
        for part in with_parts(self.reward):
            if part.exclusive:
                if part.engine is not None and part.engine() is not None:
                    raise RewardError(f"this {type(part).__name__} belongs to another engine: make one for each")
                part.engine = weakref.ref(self)
        try:
            with scope:
                self.reward.bind(tokenizer, vocab_size, config)
        except RewardError as error:
            if tokenizer is None and "tokenizer" in str(error):
                raise RewardError(f"{error} (that of the model that drafts is given to the adapter, as tokenizer=)"
                                  ) from error
            raise
        self.calls = self.tokens_run = self.tokens_full = 0  # candidates scored, what that ran, from scratch would run

    @property
    def needs_text(self) -> bool:
        """Whether candidates must come with their text."""
        return self.reward.needs_text

    def open(self, prompt: Prompt, max_tokens: int) -> Any:
        """A session that has room for all of a response; None where others must end first.

        RequestError or RewardError where there never will be.
        """
        self.reward.check(prompt, max_tokens)
        if not self.reward.can_open(prompt, max_tokens):
            return None
        session = self.reward.open(prompt, max_tokens)
        if not self.reward.reserve(session, max_tokens):
            self.reward.close(session)
            return None
        return session

    def start(self, session: Any) -> None:
        """Reads the prompt of a session that was opened: one at a time, so that equal prompts share pages. RewardError
        for whatever the reward raises."""
        try:
            with self._alone():
                self.reward.start([session])
        except (RewardError, IntegrityError):
            raise
        except Exception as error:
            raise _raised(error) from error

    def prompt_reward(self, session: Any) -> float:
        """r(x): of the prompt with an empty response; RewardError where it is not finite."""
        [result] = self.score([Candidate(session, [], "")])
        if result.handle is not None:
            self.reward.discard(result.handle)
        reward = usable(result)
        if reward == -math.inf:
            raise RewardError("the reward of the prompt alone is -inf: it must be finite, or set alpha=1")
        return reward

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """Attempts of one response worth scoring at once, each of so many new tokens."""
        return max(1, self.reward.lanes_per_pass(tokens, responses))

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """One score a candidate, in order; a handle is for `commit` or `discard`. Where the reward raises, those of one
        response at a time are asked for, so that who raises then is a RewardError of that response alone."""
        try:
            return self._score(candidates)
        except IntegrityError:
            raise
        except Exception as error:
            groups = by_session(candidates)
            if len(groups) == 1:
                return [Scored(_raised(error))] * len(candidates)
        results: dict[int, Scored] = {}
        for places in groups:
            results.update(zip(places, self.score([candidates[place] for place in places]), strict=True))
        return [results[place] for place in range(len(candidates))]

    def _score(self, candidates: list[Candidate]) -> list[Scored]:
        with self._alone():
            results = self.reward.score(candidates)
        self.calls += len(candidates)
        self.tokens_run += sum([result.tokens_run for result in results])
        self.tokens_full += sum([result.tokens_full for result in results])
        return results

    def commit(self, session: Any, handle: Any) -> None:
        """What was scored becomes the session's history."""
        if handle is not None:
            with self._alone():
                self.reward.commit([(session, handle)])

    def discard(self, handle: Any) -> None:
        """What was scored is gone."""
        if handle is not None:
            self.reward.discard(handle)

    def close(self, session: Any) -> None:
        """The response has ended."""
        self.reward.close(session)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, nobody else runs the reward's models."""
        with ExitStack() as stack:
            for lock in self.reward.locks:
                stack.enter_context(lock)
            yield


def _raised(error: Exception) -> RewardError:
    """What a reward raised, as the error of the response that it was asked for."""
    if isinstance(error, RewardError):
        return error
    failure = RewardError(f"the reward raised {describe(error)}")
    log(str(failure), error)  # with the place in the user's code
    return failure


def usable(result: Scored) -> float:
    """The reward of a score, waited for where it comes later; RewardError where it cannot be used."""
    reward = settled(result.reward)
    problem = reward_problem(reward)
    if problem is not None:
        raise reward if isinstance(reward, RewardError) else RewardError(problem)
    assert isinstance(reward, float)
    return reward
