"""Any Python callable as a reward."""

from __future__ import annotations

import copy
import inspect
import itertools
import numbers
from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any, Literal

from stars.arguments import bare, flag, shown
from stars.config import EngineConfig
from stars.errors import RequestError, RewardError, describe, log
from stars.model.tokenizer import Tokenizer
from stars.prompt import Prompt
from stars.reward.base import Candidate, Later, Reward, Scored, by_session, checked_batch_size, checked_integer
from stars.reward.pool import Pool


class FunctionReward(Reward):
    """`fn(prompt, responses) -> list of floats`, each response whole so far (an empty one for r(prompt)).

    inputs="text": prompt is the prompt as given (text or messages; decoded where ids were given), responses are texts.
    inputs="ids": prompt and responses are lists of LM token ids, the EOS that ended a response left out.
    batch_size: candidates of one response scored per call; the rest are skipped once one is accepted. None asks for
    all candidates of a round in one call.
    blocking: it is slow: it asks another machine, or computes for longer than a round. It is then called in threads of
    its own, up to `max_workers` calls at once, and must be fit for that. Only requests that wait for it stand still.
    Texts are the same as without, where the same responses get the same rewards.
    An exception, a wrong count or a value that is not a number ends the request it happened in and no other.
    """

    def __init__(self, fn: Callable[[Any, list[Any]], Any], inputs: Literal["text", "ids"] = "text",
                 batch_size: int | None = None, blocking: bool = False, max_workers: int = 16):
        if not callable(fn):
            raise RewardError(f"FunctionReward needs a callable fn(prompt, responses), not {type(fn).__name__}")
        if isinstance(fn, type) and issubclass(fn, Reward):
            raise RewardError(f"FunctionReward needs a callable fn(prompt, responses), not the class {fn.__name__}: "
                              "give a reward of that class to the engine")
        if any(map(inspect.iscoroutinefunction, (fn, getattr(fn, "__call__", None)))):
            raise RewardError("FunctionReward needs a callable that returns floats, and this one is async: give one "
                              "that waits for its result, such as by asyncio.run")
        if not isinstance(inputs, str) or inputs not in ("text", "ids"):
            raise RewardError(f'FunctionReward.inputs is {shown(inputs)}, it must be "text" or "ids"')
        if batch_size is not None:
            batch_size = checked_batch_size("FunctionReward", batch_size)
        max_workers = checked_integer("FunctionReward.max_workers", max_workers, 1)
        try:
            self.blocking = flag("FunctionReward.blocking", blocking)
        except RequestError as error:
            raise RewardError(str(error)) from None
        self._pool = Pool(max_workers) if self.blocking else None
        self.fn: Callable[[Any, list[Any]], Any] = fn
        self.inputs = inputs
        self.batch_size = batch_size
        self.needs_text = inputs == "text"
        self.whole_text = "response"

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """A text reward needs the LM's tokenizer."""
        if self.needs_text and tokenizer is None:
            raise RewardError('the model has no tokenizer.json, so the reward cannot be given text: '
                              'use FunctionReward(fn, inputs="ids")')

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Texts need a prompt that can be shown as text."""
        if self.needs_text and prompt.given is None and prompt.text is None:
            raise RequestError("the reward reads text and these prompt ids cannot be decoded: give the prompt as text")

    def open(self, prompt: Prompt, max_tokens: int) -> _Session:
        """The session is what the callable gets as its prompt."""
        if self.inputs == "ids":
            return _Session(list(prompt.token_ids))
        return _Session(prompt.given if prompt.given is not None else prompt.text)

    def fork(self, session: _Session) -> _Session:
        """The same prompt: there is no other history."""
        return _Session(session.prompt)

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """`batch_size`, or all."""
        return self.batch_size or 1 << 30

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """One call per response, so that a failing call fails one response. With `blocking`, its answers come later."""
        results: dict[int, Scored] = {}
        for indices in by_session(candidates):
            session = candidates[indices[0]].session
            responses = [candidates[i].text if self.needs_text else list(candidates[i].token_ids) for i in indices]
            call = partial(self._call, session.prompt, responses)
            rewards: Sequence[float | RewardError | Later] = (
                self._pool.submit(call, len(indices)) if self._pool is not None else call())
            for index, reward in zip(indices, rewards, strict=True):
                results[index] = Scored(reward)
        return [results[index] for index in range(len(candidates))]

    def _call(self, prompt: Any, responses: list[Any]) -> list[float | RewardError]:
        count = len(responses)
        try:
            # It gets copies: what it does to them must not reach the next call.
            own = list(prompt) if self.inputs == "ids" else copy.deepcopy(prompt)
            rewards: Any = bare(self.fn(own, responses))
            if rewards is None or isinstance(rewards, (numbers.Number, str, bytes)):
                return [RewardError(f"the reward function returned {shown(rewards)} where a list of {count} float"
                                    f"{'s' if count > 1 else ''} is expected")] * count
            returned = len(rewards) if isinstance(rewards, Sized) else None
            rewards = list(itertools.islice(rewards, count + 1))  # a generator may never end
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever else a user's callable raises, sys.exit too, is that request's error
            failure = RewardError(f"the reward function raised {describe(error)}")
            failure.__cause__ = error
            log(str(failure), error)  # with the place in the user's code, which a sentence has no room for
            return [failure] * count
        if len(rewards) != count:
            failure = RewardError(f"the reward function returned {returned or len(rewards)} values for {count} "
                                  "responses: it must return one float for each")
            return [failure] * count
        return [_number(reward) for reward in rewards]


class _Session:
    def __init__(self, prompt: Any):
        self.prompt = prompt


def _number(value: Any) -> float | RewardError:
    try:
        if hasattr(value, "item"):
            try:
                value = value.item()
            except (ValueError, RuntimeError):
                return RewardError("the reward function returned an array where one number per response is expected")
        if isinstance(value, numbers.Real):
            return float(value)
        return RewardError(f"the reward function returned {type(value).__name__} where a float is expected")
    except Exception as error:  # a number too large for a float, or an object that does what it likes
        return RewardError("the reward function returned a value that is no float for each response "
                           f"({describe(error)}): it must return one float for each")
