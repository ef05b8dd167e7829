"""What was asked of `score`: prompts and responses as a user has them, and how far their rewards have come."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from stars.arguments import refuse_bare_prompt, shown
from stars.errors import RequestError, RewardError, StarsError, sentence
from stars.model.control_tokens import ControlTokens
from stars.model.tokenizer import Detokenizer
from stars.outputs import Rewards
from stars.prompt import Prompt, message_text, parse_prompt
from stars.reward.base import ContextFull, Later, Reward, Scored, reward_problem, settled

ANCHOR = 64
"""Characters of a prompt before a response that its tokens are found with: many tokenizers treat the first token of a
text in their own way, and some merge what stands on both sides of the seam."""
APART = ("the reward reads the response alone, and this is one text: give prompts and responses apart, or messages "
         "whose last one is the assistant's")


class Pair(NamedTuple):
    """A response to be scored, and what it answers."""

    prompt: Prompt
    token_ids: list[int]  # the language model's, without the EOS that ended them
    text: str | None  # None unless the reward reads text
    stopped: int | None = None  # that EOS


class ScoreCall:
    """One call of `score`. Between turns it holds nothing of the engine's: what is to come is numbers, or Futures.

    asked: (prompt, response) pairs as they were typed; without a response what is to be divided, or scored whole.
    """

    def __init__(self, asked: Sequence[tuple[Any, Any]], name: str):
        self.asked = asked
        self.pairs: list[Pair] = []  # what was checked of it, the first ones
        self.next = 0  # the first that was not scored
        self.alone = 0  # those before this one are scored by themselves: together they have raised
        self.tries = 0  # turns in a row in which there was no room
        self.cached: int | None = None  # tokens found of the next one's prompt, where it is read in several turns
        self.spent = 0  # rows of the next one's response that were run in turns that did not come to its end
        self.read: Prompt | None = None  # whose pages the last turn has read
        self.num_tokens = 0
        self._name = name
        self._rewards: dict[int, float] = {}
        self._late: dict[int, Later] = {}
        self._error: StarsError | None = None

    @property
    def done(self) -> bool:
        """Whether all rewards are there, or it is known that there are none."""
        self._collect()
        return self._error is not None or len(self._rewards) == len(self.asked)

    def waits(self, most: int) -> bool:
        """Whether nothing can be done before a Future is settled, of which there are `most` at a time."""
        return bool(self._late) and (len(self._late) >= most or self.next == len(self.asked)) and not self.done

    def awaited(self) -> list[Later]:
        """What is still to come of what was asked for."""
        return [future for future in self._late.values() if not future.done()]

    def result(self) -> Rewards:
        """The rewards, of a call that is done; what is wrong with it is raised."""
        if self._error is not None:
            raise self._error
        return Rewards([self._rewards[index] for index in range(len(self.asked))], self.num_tokens)

    def take(self, results: Sequence[Scored]) -> None:
        """The scores of the next ones."""
        for result in results:
            self.num_tokens += result.tokens_full
            index, self.next = self.next, self.next + 1
            if isinstance(result.reward, (float, RewardError)):
                self._take(index, result.reward)
            else:
                self._late[index] = result.reward

    def fail(self, index: int, error: Exception) -> None:
        """There are no rewards, for what is wrong with this one."""
        if self._error is None:
            self._error = self._named(index, error)
        self.cancel()

    def cancel(self) -> None:
        """Nobody wants them any more."""
        for future in self._late.values():
            future.cancel()
        self._late = {}

    def _collect(self) -> None:
        for index in [index for index, future in self._late.items() if future.done()]:
            if index in self._late:  # else another one was an error
                self._take(index, settled(self._late.pop(index)))

    def _take(self, index: int, reward: float | RewardError) -> None:
        problem = reward_problem(reward)
        if isinstance(reward, RewardError):
            self.fail(index, reward)
        elif problem is not None:
            self.fail(index, RewardError(problem))
        else:
            self._rewards[index] = float(reward)

    def _named(self, index: int, error: Exception) -> StarsError:
        """The same, with the place of what it is about, where there are several."""
        kind = next((kind for kind in (ContextFull, RequestError) if isinstance(error, kind)), RewardError)
        place = f"{self._name}[{index}]: " if len(self.asked) > 1 else ""
        named = kind(place + sentence(error))
        named.__cause__ = error
        return named


def score_call(prompts: Any, responses: Any) -> ScoreCall:
    """What `Engine.score` was given; RequestError where the two do not belong together. Nothing is read yet."""
    refuse_bare_prompt(prompts)
    own = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    if responses is None:
        return ScoreCall([(one, None) for one in own], "prompts")
    several = isinstance(responses, (list, tuple)) and not (responses and _is_ids(responses))
    given = list(responses) if several else [responses]
    if len(own) == 1:
        own = own * len(given)
    if len(own) != len(given):
        raise RequestError(f"there are {len(own)} prompts and {len(given)} responses: give one prompt for all, or one "
                           "for each")
    return ScoreCall(list(zip(own, given, strict=True)), "responses")


class PairParser:
    """Brings what was typed into one form, as the loop has prompts and responses. RequestError for what cannot be."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int], reward: Reward):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._reward = reward

    def next_of(self, call: ScoreCall) -> Pair:
        """The next one of `call`; a prompt that is the one before is read once."""
        given, response = call.asked[len(call.pairs)]
        if response is None:
            return self._undivided(given)
        before = call.asked[len(call.pairs) - 1][0] if call.pairs else None
        same = call.pairs and (before is given or isinstance(given, str) and before == given)
        prompt = call.pairs[-1].prompt if same else parse_prompt(given, self._tokenizer, self._vocab_size)
        return self._pair(prompt, response)

    def _pair(self, prompt: Prompt, response: Any) -> Pair:
        reads = self._reward.needs_text
        if isinstance(response, str):
            return Pair(prompt, self._encoded(prompt, response), response if reads else None)
        token_ids, stopped = self._ids(response), None
        if token_ids and token_ids[-1] in self._eos:
            *token_ids, stopped = token_ids
        text = Detokenizer(self._tokenizer, prompt.token_ids).decode(token_ids) if reads else None
        return Pair(prompt, token_ids, text, stopped)

    def _undivided(self, given: Any) -> Pair:
        """Of messages the assistant's last turn; a text as the reward reads texts that nobody has divided."""
        if isinstance(given, dict) and given.get("messages") is not None:
            messages = given["messages"]
            last = messages[-1] if isinstance(messages, (list, tuple)) and messages else None
            if not isinstance(last, dict) or last.get("role") != "assistant" or len(messages) < 2:
                raise RequestError("the last of the messages must be the assistant's turn that is to be scored, after "
                                   "those that it answers: give prompts and responses apart, or add it")
            response = message_text(last)
            return self._pair(parse_prompt({**given, "messages": messages[:-1]}, self._tokenizer, self._vocab_size),
                              response)
        if self._reward.whole_text is None:
            raise RequestError(APART)
        whole = parse_prompt(given, self._tokenizer, self._vocab_size)
        if self._reward.whole_text == "prompt":
            return Pair(whole, [], "" if self._reward.needs_text else None)
        return Pair(Prompt("", [], ""), whole.token_ids, whole.text if self._reward.needs_text else None)

    def _encoded(self, prompt: Prompt, text: str) -> list[int]:
        """The tokens of a response, as they stand behind the prompt."""
        if not text:
            return []
        if self._tokenizer is None:
            raise RequestError("the model has no tokenizer.json: give the response as a list of token ids")
        if prompt.literal:
            control: ControlTokens = self._tokenizer.control_tokens
            return self._checked(control.encode(control.mark(text), False))
        before = (prompt.text or "")[-ANCHOR:]
        anchor = self._tokenizer.encode(before, add_special_tokens=False) if before else []
        token_ids = self._tokenizer.encode(before + text, add_special_tokens=False)
        if token_ids[: len(anchor)] != anchor:  # the seam is within a token
            return self._checked(self._tokenizer.encode(text, add_special_tokens=False))
        return self._checked(token_ids[len(anchor) :])

    def _ids(self, given: Any) -> list[int]:
        if not isinstance(given, (list, tuple)) or not _is_ids(given):
            raise RequestError(f"a response is {shown(given)}, it must be a text or a list of token ids")
        return self._checked([int(token) for token in given])

    def _checked(self, token_ids: list[int]) -> list[int]:
        wrong = next((token for token in token_ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token id {shown(wrong)} of the response is outside the model's vocabulary of "
                               f"{self._vocab_size}: use the tokenizer that belongs to the model")
        return token_ids


def prompts_of(pairs: Sequence[Pair]) -> Iterator[tuple[Prompt, int]]:
    """The distinct prompts of `pairs`, in order, each with the tokens of the longest response to it."""
    longest: dict[int, tuple[Prompt, int]] = {}
    for pair in pairs:
        before = longest.get(id(pair.prompt), (pair.prompt, 0))[1]
        longest[id(pair.prompt)] = pair.prompt, max(before, len(pair.token_ids))
    return iter(longest.values())


def _is_ids(given: Sequence[Any]) -> bool:
    return all(isinstance(token, numbers.Integral) and not isinstance(token, bool) for token in given)
