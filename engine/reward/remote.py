"""A reward model that runs elsewhere, behind a server such as vLLM's."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from stars.arguments import as_float, flag, shown
from stars.config import EngineConfig
from stars.errors import RequestError, RewardError
from stars.model.tokenizer import REPLACEMENT, Tokenizer
from stars.prompt import Prompt, message_text
from stars.reward.base import Candidate, ContextFull, Reward, Scored, by_session, checked_batch_size, checked_integer
from stars.reward.http_calls import (
    FORM,
    MAX_SAID,
    VISIBLE,
    Answer,
    Failed,
    Limits,
    Poster,
    address_of,
    extra_of,
    headers_of,
    message_of,
    seconds_of,
)
from stars.reward.later import Ready
from stars.reward.pool import Pool

FIELDS = {"classify": "probs", "pooling": "data"}
"""What an API's answers call the numbers of a text."""
OF_THE_TEXT = (400, 413, 422)
"""Statuses by which a server refuses what it was sent: of several texts, some may be taken."""
TOO_LONG = re.compile("context length|max_model_len|maximum model length")
"""What servers say of a text that is longer than their model reads."""
RESERVED = ("input", "messages", "model", "use_activation")  # of a body
Given = TypeVar("Given")


class RemoteReward(Reward):
    """The reward that a model of a vLLM server gives to whole texts, asked over HTTP while other requests go on.

    url: the server's address, http or https, such as "http://127.0.0.1:8000"; api is put behind it. It is fixed here:
        of a request nothing but texts is sent. model: the name it is served by; None leaves it out.
    api: "classify", for sequence-classification models (data[].probs), or "pooling" (data[].data: the numbers of a
        text, or of each token, of which the last one's count). label: which of several numbers is the reward.
        use_activation: False asks for raw logits, where a server would give probabilities.
    template: "raw" sends prompt and response as one text, "chat" as messages, the response being the assistant's turn
        (a plain prompt becomes one user turn), "auto" is "chat" for messages and "raw" for text. Of messages, roles and
        texts are sent; one that has more is refused.
    batch_size: candidates of one response that are asked for together, the rest not once one is accepted. Texts go in
        one call, messages in a call each.
    timeout: seconds of one try. retries: further tries after a connection that fails, a try that took too long, status
        429 or 5xx, with growing pauses (and those that the server asks for). total_timeout: seconds from the
        score to its end: tries, pauses and the wait for others' calls. max_concurrency: calls at once.
    api_key_env: name of the environment variable that holds the key, read here and sent as "Authorization: Bearer".
        headers: further ones. extra_body: further fields of every body, such as {"truncate_prompt_tokens": 4096}.

    Redirects are not followed, proxies of the environment not used, answers of more than 16 MiB not read. What a server
    refuses, fails at or answers wrongly ends the request that asked, by a RewardError that names the address, and no
    other. A text that is too long for its model (by what the server says, with status 400) ends the response before it,
    as with other rewards.

    A server's arithmetic may depend on what it runs at the same time: `deterministic` promises nothing for it.
    """

    needs_text = True

    def __init__(self, url: str, model: str | None = None, *, api: Literal["classify", "pooling"] = "classify",
                 label: int | None = None, use_activation: bool = False,
                 template: Literal["auto", "chat", "raw"] = "auto", batch_size: int = 8, timeout: float = 60.0,
                 retries: int = 3, total_timeout: float = 180.0, max_concurrency: int = 8,
                 api_key_env: str | None = None, headers: Mapping[str, str] | None = None,
                 extra_body: Mapping[str, Any] | None = None):
        if not isinstance(api, str) or api not in FIELDS:
            raise RewardError(f'RemoteReward.api is {shown(api)}, it must be "classify" or "pooling"')
        if not isinstance(template, str) or template not in ("auto", "chat", "raw"):
            raise RewardError(f'RemoteReward.template is {shown(template)}, it must be "auto", "chat" or "raw"')
        if model is not None and not isinstance(model, str):
            raise RewardError(f"RemoteReward.model is {shown(model)}, it must be the name the model is served by")
        self.address = _given(address_of, "RemoteReward.url", url, api, "api_key_env, the name of an environment "
                              "variable that holds it")
        self.model, self.api, self.template = model, api, template
        self.label = None if label is None else checked_integer("RemoteReward.label", label, 0)
        self.batch_size = checked_batch_size("RemoteReward", batch_size)
        self._total_timeout = _given(seconds_of, "RemoteReward.total_timeout", total_timeout)
        limits = Limits(_given(seconds_of, "RemoteReward.timeout", timeout),
                        checked_integer("RemoteReward.retries", retries, 0), self._total_timeout)
        self._pool = Pool(checked_integer("RemoteReward.max_concurrency", max_concurrency, 1))
        key = _key(api_key_env)
        self._body = _given(extra_of, "RemoteReward.extra_body", extra_body, RESERVED)
        self._body["use_activation"] = _given(flag, "RemoteReward.use_activation", use_activation)
        if model is not None:
            self._body["model"] = model
        given = _given(headers_of, "RemoteReward.headers", headers, key)
        self._secrets = [*given.values()] if key is None else [key, *given.values()]
        self._poster = Poster(self.address, FORM | given, limits)
        self._newest: tuple[Prompt, _Session] | None = None

    def __repr__(self) -> str:
        return f'RemoteReward("{self.address}", model={self.model!r}, template="{self.template}")'

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """Needs the language model's tokenizer. The server is not asked: it may come up later."""
        if tokenizer is None:
            raise RewardError("the model has no tokenizer.json, so the remote reward cannot be given text: "
                              "add the tokenizer")

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Refuses prompts that are not all text."""
        self._session(prompt)

    def open(self, prompt: Prompt, max_tokens: int) -> _Session:
        """The session is the prompt as it is sent."""
        return self._session(prompt)._replace()

    def fork(self, session: _Session) -> _Session:
        """The same prompt: there is no other history."""
        return session._replace()

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """`batch_size`."""
        return self.batch_size

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """Asks, a response's candidates together; the rewards come later."""
        results: dict[int, Scored] = {}
        for places in by_session(candidates):
            session = candidates[places[0]].session
            size = 1 if session.messages is not None else self.batch_size
            for start in range(0, len(places), size):
                chosen = places[start : start + size]
                # A character cut in two at the segment's end would be scored as a replacement sign: leave it out.
                responses = [(candidates[place].text or "").rstrip(REPLACEMENT) for place in chosen]
                call = partial(self._ask, session, responses, time.monotonic() + self._total_timeout)
                for place, future in zip(chosen, self._pool.submit(call, len(chosen)), strict=True):
                    results[place] = Scored(future)
        return [results[index] for index in range(len(candidates))]

    def _session(self, prompt: Prompt) -> _Session:
        """How a prompt is sent; the newest one's is kept. RequestError for one that is not all text."""
        if self._newest is None or self._newest[0] is not prompt:
            self._newest = prompt, _session(prompt, self.template)
        return self._newest[1]

    def _ask(self, session: _Session, responses: list[str], deadline: float) -> list[Ready]:
        """The rewards of responses, in one call; of a batch that is refused, text by text. In a thread of the pool."""
        body = dict(self._body)
        if session.messages is not None:
            [response] = responses
            turn = session.continued or {"role": "assistant", "content": ""}
            body["messages"] = [*session.messages, {**turn, "content": turn["content"] + response}]
        else:
            body["input"] = [session.text + response for response in responses]
            if not session.special:
                body["add_special_tokens"] = False
        outcome = self._poster.post(json.dumps(body).encode(), deadline)
        if isinstance(outcome, Answer) and outcome.status in OF_THE_TEXT and len(responses) > 1:
            return [reward for response in responses for reward in self._ask(session, [response], deadline)]
        return self._read(outcome, len(responses))

    def _read(self, outcome: Answer | Failed, count: int) -> list[Ready]:
        """The rewards that an answer for `count` texts holds, in their order, or an error for all."""
        if isinstance(outcome, Failed):
            return [self._error(outcome.problem)] * count
        if outcome.status != 200:
            return [self._refusal(outcome)] * count
        try:
            data = json.loads(outcome.body)["data"]
            numbers = {item["index"]: item[FIELDS[self.api]] for item in data}
            found = len(data)
        except (ValueError, TypeError, KeyError, RecursionError):
            return [self._error(f'answered without data[].{FIELDS[self.api]}: is it a server of the {self.api} API?'
                                )] * count
        if found != count or set(numbers) != set(range(count)):
            return [self._error(f"answered with {found} rewards of indices {shown(list(numbers))} for {count} texts"
                                )] * count
        return [self._number(numbers[index]) for index in range(count)]

    def _number(self, values: Any) -> Ready:
        """The reward among the numbers of a text."""
        if isinstance(values, list) and values and isinstance(values[-1], list):
            values = values[-1]  # of each token: the last one's
        if not isinstance(values, list) or not values:
            return self._error(f"answered with {type(values).__name__} where the numbers of a text are expected")
        if self.label is None and len(values) != 1:
            return self._error(f"answered with {len(values)} numbers for a text: choose the one that is the reward "
                               "with label=..., or serve the model with its reward head")
        label = self.label or 0
        if label >= len(values):
            return self._error(f"answered with {len(values)} numbers for a text, and label is {label}")
        number = as_float(values[label])
        if number is None or not math.isfinite(number):
            return self._error(f"answered with {shown(values[label])} where a finite number is expected")
        return number

    def _refusal(self, answer: Answer) -> RewardError:
        """Why a server gave no rewards, as far as it says so."""
        said = message_of(answer.body)
        problem = f"answered with status {answer.status}" + (f": {said[:MAX_SAID]}" if said else "")
        if 300 <= answer.status < 400:
            return self._error(f"{problem}: redirects are not followed, give the address that is meant")
        if answer.status == 400 and TOO_LONG.search(said):
            return self._error(f"{problem}: lower max_tokens", ContextFull)
        return self._error(problem)

    def _error(self, problem: str, kind: type[RewardError] = RewardError) -> RewardError:
        for secret in self._secrets:  # which a server may repeat
            problem = problem.replace(secret, "***")
        return kind(f"the reward server at {self.address} {problem}")


class _Session(NamedTuple):
    """A prompt as it is sent."""

    messages: list[dict[str, str]] | None  # None: as `text`
    text: str
    special: bool  # whether the server adds special tokens to the text
    continued: dict[str, str] | None = None  # the final message, which responses continue


def _session(prompt: Prompt, template: str) -> _Session:
    if prompt.literal:
        raise RequestError('special_tokens is "text", and the reward server reads control tokens in a text as tokens: '
                           "leave it out")
    chat = prompt.chat
    messages = chat.messages if chat is not None else None
    if template == "raw" or (template == "auto" and messages is None):
        if prompt.text is None:
            raise RequestError("the reward reads text and these prompt ids cannot be decoded: give the prompt as text")
        # A rendered template holds its special tokens.
        return _Session(None, prompt.text, messages is None and prompt.special)
    if messages is None:
        if prompt.text is None:
            raise RequestError("the reward reads text and these prompt ids cannot be decoded: give the prompt as text")
        messages = [{"role": "user", "content": prompt.text}]
    if chat is not None and chat.tools is not None:
        raise RequestError("the prompt has tools, and the reward server is sent text alone: leave them out, or build "
                           'the reward with template="raw"')
    turns = [_turn(message) for message in messages]
    if chat is not None and chat.continue_final_message:
        return _Session(turns[:-1], "", False, turns[-1])
    return _Session(turns, "", False)


def _turn(message: dict[str, Any]) -> dict[str, str]:
    """A message's role and text; RequestError where it has more, which could make a server fetch something."""
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"a message's role is {shown(role)}, for the reward server it must be text")
    if message.get("tool_calls"):
        raise RequestError("a message has tool_calls, and the reward server is sent text alone: leave it out")
    return {"role": role, "content": message_text(message)}


def _given(make: Callable[..., Given], *arguments: Any) -> Given:
    """What `make` makes of something that was typed; RewardError where that cannot be used."""
    try:
        return make(*arguments)
    except RequestError as error:
        raise RewardError(str(error)) from None


def _key(variable: Any) -> str | None:
    """The key that an environment variable holds; RewardError, without it, where it cannot be used."""
    if variable is None:
        return None
    if not isinstance(variable, str):
        raise RewardError(f"RemoteReward.api_key_env is {type(variable).__name__}, it must be the name of an "
                          "environment variable")
    key = os.environ.get(variable, "").strip()
    if not VISIBLE.fullmatch(key):
        raise RewardError("RemoteReward.api_key_env must name an environment variable that holds a key, and "
                          f"{'what it names cannot be sent' if key else 'there is none of that name'}")
    return key
