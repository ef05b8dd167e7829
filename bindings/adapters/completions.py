"""What a server answers at /v1/completions, as candidates of segments, and what it has to be asked for that."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from stars.arguments import shown
from stars.errors import ServerError
from stars.model.tokenizer import REPLACEMENT
from stars.reward.http_calls import MAX_SAID, Answer, Failed, Poster, message_of
from stars.reward.pool import Pool

UNKNOWN = -1
"""In the place of a token id that the server does not tell."""
MAX_IDS = 1 << 31
UNUSED_EXTENSIONS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Filters switched off, which some servers have on unless they are told: llama.cpp's top_k is 40, vLLM reads the
model's generation_config.json."""
OF_THE_FIELDS = (400, 422, 500)
"""Statuses by which servers refuse a body for a field that it has."""
Piece = int | str
"""Of what is sent as a prompt: a token id, or text that the server tokenises."""


class Wanted(NamedTuple):
    """The candidates of one response's round."""

    pieces: Sequence[Piece]  # prompt and committed response
    seeds: list[int]  # one for all, or, where each is asked for by itself, one each
    candidates: int
    max_tokens: int
    fields: dict[str, Any]  # of the body: how tokens are drawn


class Choice(NamedTuple):
    """One candidate, as the server tells it."""

    text: str
    token_ids: list[int]  # UNKNOWN ones where the server tells their number alone; what ended the response included
    pieces: Sequence[Piece]  # what is sent for it once it is history
    logprob: float  # of its tokens, nats; NaN where the server tells none
    ended: bool

    @property
    def told(self) -> bool:
        """Whether its token ids are known."""
        return UNKNOWN not in self.token_ids


class Told(NamedTuple):
    """What came back for one `Wanted`."""

    choices: list[Choice]
    prompt_token_ids: list[int] | None  # of all that was sent, where the server tells them
    prompt_tokens: int  # as the server counts what it was sent; 0 where it does not
    cached_tokens: int | None  # of them found in its cache; None where it does not say
    completion_tokens: int


class Ways(NamedTuple):
    """How a server is asked, found out by its first answer."""

    several: bool  # by n, or by a request for each candidate
    logprobs: int | None
    extensions: bool  # whether it takes fields that OpenAI's API has not
    takes_ids: bool = False  # as prompts
    tells_ids: bool = False  # of every choice, all of them


def _own_policy(raw: dict[str, Any]) -> str | None:
    """The policy by which `stars serve` says that it made an answer; None of other servers."""
    said = raw.get("stars")
    policy = said.get("policy") if isinstance(said, dict) else None
    name = policy.get("name") if isinstance(policy, dict) else None
    return name if isinstance(name, str) else None


class CompletionsServer:
    """A server's /v1/completions. Any thread may ask.

    fields: of every body, such as "model". secrets: what no error repeats. max_concurrency: requests at once.
    parallel: a request for each candidate, in place of one with n.
    """

    def __init__(self, poster: Poster, address: str, *, fields: Mapping[str, Any], secrets: Sequence[str],
                 total_timeout: float, max_concurrency: int, parallel: bool):
        self.address = address
        self._poster, self._fields, self._secrets = poster, dict(fields), secrets
        self._seconds = total_timeout
        self._pool = Pool(max_concurrency)
        self._parallel = parallel
        self._ways: Ways | None = None
        self.seconds_waited = 0.0  # for answers, of all calls of `ask`

    def ways(self, pieces: Sequence[Piece], fields: dict[str, Any]) -> tuple[Ways, Told | None]:
        """How the server is asked, and its answer, if it was asked now: one token after `pieces`, drawn by `fields`.

        ServerError where it refuses, and where it has no n and nobody wants a request for each candidate.
        """
        if self._ways is not None:
            return self._ways, None
        count = 1 if self._parallel else 2
        tried = [Ways(count > 1, logprobs, extensions) for logprobs in (1, None) for extensions in (True, False)]
        if count > 1:
            tried.append(Ways(False, None, False))
        first: ServerError | None = None
        for ways in tried:
            wanted = Wanted(pieces, [1], count if ways.several else 1, 1, fields)
            body = self._body(wanted, ways, 1)
            outcome = self._post(body)
            if isinstance(outcome, Answer) and outcome.status in OF_THE_FIELDS:
                first = first or self._refusal(outcome)
                continue
            raw = self._parsed(outcome)
            if isinstance(raw, ServerError):
                raise raw
            found = len(raw["choices"])
            if not self._parallel and found != 2:
                raise self._error(f"takes no n: asked for 2 choices it answered with {found}; give parallel=True, "
                                  "which sends a request for each candidate")
            told = self._read(raw, wanted)
            if isinstance(told, ServerError):
                raise told
            own = _own_policy(raw)
            if own not in (None, "sample"):
                raise self._error(f"aligns by itself (its policy is {shown(own)}), so that its texts would be aligned "
                                  "twice: ask for the model as NAME:plain")
            takes = any(choice.told for choice in told.choices)
            tells = bool(raw["choices"][0].get("token_ids"))
            logprobs = ways.logprobs if math.isfinite(told.choices[0].logprob) else None
            if tells and logprobs is not None:
                logprobs = 0  # the drawn token's own are enough where they need not tell how many there are
            self._ways = ways._replace(logprobs=logprobs, takes_ids=takes, tells_ids=tells)
            return self._ways, told
        assert first is not None
        raise first

    def ask(self, wanted: Sequence[Wanted]) -> list[Told | ServerError]:
        """Asks for all of them at once."""
        assert self._ways is not None, "ways() comes first"
        ways = self._ways
        bodies: list[bytes] = []
        for one in wanted:
            bodies += [self._body(one, ways, seed) for seed in one.seeds]
        begin = time.perf_counter()
        outcomes = iter(self._all(bodies))
        self.seconds_waited += time.perf_counter() - begin
        found: list[Told | ServerError] = []
        for one in wanted:
            each = one._replace(candidates=one.candidates // len(one.seeds))
            found.append(_joined([self._told(next(outcomes), each) for _ in one.seeds]))
        return found

    def _all(self, bodies: Sequence[bytes]) -> list[Answer | Failed]:
        if len(bodies) == 1:
            return [self._post(bodies[0])]
        futures = [self._pool.submit(partial(self._posted, body), 1)[0] for body in bodies]
        return [future.result() for future in futures]

    def _posted(self, body: bytes) -> list[Answer | Failed]:
        return [self._post(body)]

    def _post(self, body: bytes) -> Answer | Failed:
        return self._poster.post(body, time.monotonic() + self._seconds)

    def _body(self, wanted: Wanted, ways: Ways, seed: int) -> bytes:
        body = {"prompt": _prompt(wanted.pieces), "max_tokens": wanted.max_tokens, "seed": seed}
        if ways.extensions:
            body |= UNUSED_EXTENSIONS | {"return_token_ids": True}
        if ways.several:
            body["n"] = wanted.candidates
        if ways.logprobs is not None:
            body["logprobs"] = ways.logprobs
        return json.dumps(body | wanted.fields | self._fields).encode()

    def _told(self, outcome: Answer | Failed, wanted: Wanted) -> Told | ServerError:
        raw = self._parsed(outcome)
        if isinstance(raw, ServerError):
            return raw
        if len(raw["choices"]) != wanted.candidates:
            return self._error(f"answered with {len(raw['choices'])} choices where {wanted.candidates} were asked for")
        return self._read(raw, wanted)

    def _parsed(self, outcome: Answer | Failed) -> dict[str, Any] | ServerError:
        """The JSON of an answer that has choices, each with a text."""
        if isinstance(outcome, Failed):
            return self._error(outcome.problem)
        if outcome.status != 200:
            return self._refusal(outcome)
        try:
            raw: dict[str, Any] = json.loads(outcome.body)
            if all(isinstance(one["text"], str) for one in raw["choices"]):
                return raw
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        return self._error("answered without choices[].text: is it a server of OpenAI's completions API?")

    def _read(self, raw: dict[str, Any], wanted: Wanted) -> Told | ServerError:
        try:
            usage = raw.get("usage") or {}
            single = usage.get("completion_tokens") if len(raw["choices"]) == 1 else None
            choices = [_choice(one, wanted.max_tokens, single)
                       for one in sorted(raw["choices"], key=lambda one: one.get("index", 0))]
            prompt_ids = _ids("prompt_token_ids", raw["choices"][0].get("prompt_token_ids"))
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            return Told(choices, prompt_ids, int(usage.get("prompt_tokens") or 0),
                        None if cached is None else int(cached), sum(len(choice.token_ids) for choice in choices))
        except _Untold as error:
            return self._error(str(error))
        except (TypeError, LookupError, ValueError, AttributeError, OverflowError) as error:
            return self._error(f"answered with a choice that cannot be read ({type(error).__name__}: {shown(error)})")

    def _refusal(self, answer: Answer) -> ServerError:
        said = message_of(answer.body)
        return self._error(f"answered with status {answer.status}" + (f": {said[:MAX_SAID]}" if said else ""))

    def _error(self, problem: str) -> ServerError:
        for secret in self._secrets:  # which a server may repeat
            problem = problem.replace(secret, "***")
        return ServerError(f"the server at {self.address} {problem}")


class _Untold(Exception):
    """What is needed of a choice and not in it."""


def _prompt(pieces: Sequence[Piece]) -> Any:
    """What "prompt" is: a text, token ids, or, as llama.cpp's server takes them, both in a list."""
    if all(isinstance(one, str) for one in pieces):
        return "".join(pieces)  # type: ignore[arg-type]
    joined: list[Piece] = []
    for one in pieces:
        if isinstance(one, str) and joined and isinstance(joined[-1], str):
            joined[-1] += one
        elif one != "":
            joined.append(one)
    return joined


def _ids(name: str, given: Any) -> list[int] | None:
    """Token ids that a server tells; None for none of them."""
    if not given:
        return None
    if not isinstance(given, list) or not all(type(one) is int and 0 <= one < MAX_IDS for one in given):
        raise _Untold(f"answered with {name}={shown(given)}, where a list of token ids is expected")
    return given


def _choice(raw: dict[str, Any], max_tokens: int, single: int | None) -> Choice:
    """single: the tokens that the answer counts, if this is its only choice."""
    text, reason, logprobs = raw["text"], raw.get("finish_reason"), raw.get("logprobs") or {}
    if reason not in ("stop", "length"):
        raise _Untold(f"ended a choice with finish_reason {shown(reason)}, where \"stop\" or \"length\" is expected")
    ended = reason == "stop"
    entries = logprobs.get("content")  # llama.cpp's: tokens of one character are one entry, with the last one's id
    values = logprobs.get("token_logprobs") if entries is None else [entry.get("logprob") for entry in entries]
    logprob = math.fsum(values) if values and None not in values else math.nan
    ids = _ids("token_ids", raw.get("token_ids"))
    if ids is None and entries and not ended and len(entries) == max_tokens:
        ids = _ids("logprobs.content[].id", [entry["id"] for entry in entries])
    if ids is not None:
        if len(ids) > max_tokens:
            raise _Untold(f"answered with {len(ids)} tokens where max_tokens is {max_tokens}")
        return Choice(text, ids, ids, logprob, ended)
    if not ended:
        count = max_tokens  # that is what "length" means
    elif single is not None:
        count = single
    elif values is not None:
        count = len(values)
    else:
        raise _Untold("tells neither token ids nor logprobs, so the tokens of a choice that has ended are not known: "
                      "give parallel=True, where it counts each candidate's")
    # Bytes of an unfinished character are lost with it: the next segment draws them anew, after the text before.
    text = text if ended else text.rstrip(REPLACEMENT)
    return Choice(text, [UNKNOWN] * min(max(1, count), max_tokens), [text], logprob, ended)


def _joined(parts: Sequence[Told | ServerError]) -> Told | ServerError:
    """One answer of several requests for the same."""
    found: list[Told] = []
    for part in parts:
        if isinstance(part, ServerError):
            return part
        found.append(part)
    if len(found) == 1:
        return found[0]
    cached = [one.cached_tokens for one in found if one.cached_tokens is not None]
    return Told([choice for one in found for choice in one.choices], found[0].prompt_token_ids,
                sum(one.prompt_tokens for one in found), sum(cached) if cached else None,
                sum(one.completion_tokens for one in found))
