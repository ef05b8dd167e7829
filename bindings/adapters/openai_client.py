"""Any server of OpenAI's completions API as the proposer: it draws candidates, the law and the reward are ours."""

from __future__ import annotations

import hashlib
import secrets
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from stars.adapters.asked import checked_params, paired, refuse_settings
from stars.adapters.completions import CompletionsServer, Piece, Told, Wanted
from stars.adapters.law import law_of
from stars.adapters.loop import Asked, Draft, Loop, Response, Settled
from stars.adapters.scoring import Scoring, TextOnly
from stars.arguments import flag, integer, refuse_bare_prompt, shown
from stars.bindings.controller import Drawn
from stars.errors import RequestError, ServerError, StarsError, warn
from stars.model.tokenizer import REPLACEMENT, Detokenizer
from stars.outputs import Metrics, RequestOutput, warn_of_errors
from stars.plan import Policy
from stars.prompt import PROMPT_KEYS, Prompt, parse_prompt, prompt_kind
from stars.reward.http_calls import FORM, VISIBLE, Limits, Poster, address_of, extra_of, headers_of, seconds_of
from stars.sampling import RequestOutputKind, SamplingParams
from stars.sources import checked_reward, resolve_tokenizer

RESERVED = ("model", "prompt", "n", "best_of", "logprobs", "max_tokens", "seed", "stream", "echo", "temperature",
            "top_p", "return_token_ids", "stop", "stop_token_ids", "ignore_eos")
"""Fields of a body that are not the user's."""
PASSED = ("temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "n", "seed", "max_tokens",
          "output_kind")
"""Parameters that a server's own sampler can be asked for, or that are the loop's."""
ANY_VOCABULARY = 1 << 31  # the server knows its own
PROBE = "The quick brown fox"
"""What the given tokenizer and the server's must read alike, where no prompt is a text."""
ALIKE, LONG = 3, 4  # rounds whose candidates, of so many tokens, are all equal, before that is worth a warning
SEEDS = 1 << 31  # llama.cpp has 32 bits, and one of those numbers means that there is none


class Traffic(NamedTuple):
    """Tokens of all requests so far, as the server counts them."""

    requests: int = 0  # rounds of responses; with parallel=True one is several
    prompt_tokens: int = 0
    cached_tokens: int | None = None  # of them found in its cache; None where it does not say
    completion_tokens: int = 0

    @property
    def forward_tokens(self) -> int | None:
        """Tokens that the server ran; None where it does not say what it found in its cache."""
        return None if self.cached_tokens is None else (
            self.prompt_tokens - self.cached_tokens + self.completion_tokens)

    def with_answer(self, told: Told) -> Traffic:
        """These and one more."""
        cached = self.cached_tokens
        if told.cached_tokens is not None:
            cached = (cached or 0) + told.cached_tokens
        return Traffic(self.requests + 1, self.prompt_tokens + told.prompt_tokens, cached,
                       self.completion_tokens + told.completion_tokens)


def openai(base_url: str, model: str | None = None, *, policy: Policy, reward: Any = None, tokenizer: Any = None,
           api_key: str | None = None, headers: Mapping[str, str] | None = None,
           extra_body: Mapping[str, Any] | None = None, parallel: bool = False, max_num_seqs: int = 16,
           max_model_len: int = 4096, timeout: float = 120.0, retries: int = 3, total_timeout: float = 600.0,
           device: str = "cpu", cache_tokens: int | None = None) -> OpenAIProposer:
    """What completes prompts by a server of OpenAI's completions API: its model drafts, the reward and the law decide.

    base_url: as OpenAI's clients have it, such as "http://127.0.0.1:8000/v1". model: the name it is served by; None
        leaves it out. policy: STARS, BlockwiseBestOfK or Sample; its width is the n of a request.
    reward: as the Engine's. With the vocabulary of `tokenizer` it gets token ids, where the server tells them, else the
        text.
    tokenizer: the served model's (a directory, a GGUF file), for messages, whose chat template it has, exact texts and
        prompts as token ids. None: prompts are texts, or ids, and responses the texts that the server sends.
    api_key: sent as "Authorization: Bearer". headers, extra_body: further ones, and further fields of every body.
    parallel: sends a request for each candidate, for a server that has no n.
    max_num_seqs: responses at once, whose requests are in flight together. max_model_len: most tokens of a prompt and
        its response, for the reward's cache, which cache_tokens sizes on `device`.
    timeout: seconds of one try. retries: further ones after a connection that fails, a try that takes too long, status
        429 or 5xx. total_timeout: seconds of all of them.

    The server is first asked by the first call. ServerError there: it cannot be reached, takes no n, tells neither
    token ids nor how many tokens a candidate has, or reads the probe otherwise than `tokenizer` does.
    """
    return OpenAIProposer(
        "stars.adapters.openai", base_url, model, policy=policy, reward=reward, tokenizer=tokenizer, api_key=api_key,
        headers=headers, extra_body=extra_body, parallel=parallel, max_num_seqs=max_num_seqs,
        max_model_len=max_model_len, timeout=timeout, retries=retries, total_timeout=total_timeout, device=device,
        cache_tokens=cache_tokens)


class OpenAIProposer:
    """See `openai`. One call at a time; give it many prompts."""

    def __init__(self, name: str, base_url: str, model: str | None, *, policy: Policy, reward: Any, tokenizer: Any,
                 api_key: str | None, headers: Mapping[str, str] | None, extra_body: Mapping[str, Any] | None,
                 parallel: bool, max_num_seqs: int, max_model_len: int, timeout: float, retries: int,
                 total_timeout: float, device: str, cache_tokens: int | None, needs_ids: bool = False,
                 priority: bool = False):
        self._name, self._policy, self._law = name, policy, law_of(policy, name)
        self._reward = checked_reward(reward)
        if self._law.scores and reward is None:
            raise RequestError(f"reward is None, and {type(policy).__name__} asks for rewards: give one")
        self._tokenizer = None if tokenizer is None else resolve_tokenizer(tokenizer, None)
        self._max_num_seqs = integer("max_num_seqs", max_num_seqs, 1, 1024)
        self._max_model_len = integer("max_model_len", max_model_len, 2)
        self._device, self._cache_tokens = device, cache_tokens
        self._needs_ids, self._priority = needs_ids, flag("priority", priority)
        if model is not None and not isinstance(model, str):
            raise RequestError(f"model is {shown(model)}, it must be the name that the model is served by")
        if api_key is not None and not (isinstance(api_key, str) and VISIBLE.fullmatch(api_key)):
            raise RequestError("api_key must be a text that can be sent in a header")
        parallel = flag("parallel", parallel) or self._law.width == 1
        limits = Limits(seconds_of("timeout", timeout), integer("retries", retries, 0),
                        seconds_of("total_timeout", total_timeout))
        given = headers_of("headers", headers, api_key)
        place = isinstance(base_url, str) and VISIBLE.fullmatch(base_url) and _has_path(base_url)
        address = address_of("base_url", base_url, "completions" if place else "v1/completions", "api_key")
        fields = extra_of("extra_body", extra_body, RESERVED) | ({} if model is None else {"model": model})
        self.server = CompletionsServer(
            Poster(address, FORM | given, limits), str(address), fields=fields,
            secrets=[*given.values(), *([] if api_key is None else [api_key])], total_timeout=limits.total_timeout,
            max_concurrency=self._max_num_seqs * (self._law.width if parallel else 1), parallel=parallel)
        self.traffic = Traffic()
        self.rounds_alike: int | None = 0  # first rounds of which all candidates were equal; None once some were not
        self._scoring: Scoring | None = None
        self._busy = threading.Lock()

    def __repr__(self) -> str:
        return f"{self._name}({self.server.address!r}, policy={self._policy!r})"

    def generate(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
                 ) -> list[RequestOutput]:
        """Completes every prompt; one RequestOutput a prompt, in order.

        prompts: a text, {"prompt": text}, {"prompt_token_ids": [...]}, {"messages": [...]}, or a list of those.
        sampling_params: one for all, or a list with one for each. Every input is checked before any work
        (RequestError, ServerError). What fails later ends that response with finish_reason "error", and one warning
        says of how many.
        """
        refuse_bare_prompt(prompts)
        requests = [self._request(*one) for one in paired(prompts, sampling_params)]
        for _ in self._run(requests):
            pass
        outputs = [self._output(one, number) for number, one in enumerate(requests)]
        warn_of_errors(outputs, stacklevel=2)
        return outputs

    def chat(self, messages: Any, sampling_params: SamplingParams | None = None) -> RequestOutput:
        """Answers a conversation, rendered by the chat template of `tokenizer`."""
        return self.generate([{"messages": messages}], sampling_params)[0]

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yields the output of one prompt each time a segment was committed; each output is cumulative. Closing the
        iterator early ends the response."""
        refuse_bare_prompt(prompt)
        if isinstance(prompt, (list, tuple)):
            raise RequestError("stream takes one prompt: call it for each, or give the list to generate")
        return self._stream(self._request(prompt, sampling_params))

    def _stream(self, request: _Request) -> Iterator[RequestOutput]:
        for changed in self._run([request]):
            if changed:
                yield self._output(request, 0)

    def note(self, texts: Sequence[str]) -> None:
        """Warns, once, of a server whose candidates are all equal, as of one that is greedy unless told otherwise."""
        if self.rounds_alike is None or len(set(texts)) > 1:
            self.rounds_alike = None
            return
        self.rounds_alike += 1
        if self.rounds_alike == ALIKE:
            warn(f"all candidates of the first {ALIKE} rounds were equal, as if the server at {self.server.address} "
                 "did not sample: give what it needs for that in extra_body", stacklevel=2)

    # -- what is asked -------------------------------------------------------------------------------------------

    def _request(self, given: Any, params: SamplingParams | None) -> _Request:
        """A checked request; RequestError."""
        params = checked_params(params)
        refuse_settings(params, PASSED, self._name)
        if params.output_kind != RequestOutputKind.CUMULATIVE:
            raise RequestError(f"{self._name} has cumulative outputs alone: leave output_kind out")
        prompt = self._prompt(given)
        if prompt.token_ids:
            params = params.settle(len(prompt.token_ids), self._max_model_len, ANY_VOCABULARY)
        if params.max_tokens is None:
            raise RequestError("max_tokens is None, and how many tokens the prompt has is the server's to know: give "
                               "a number")
        if len(prompt.token_ids) + params.max_tokens > self._max_model_len:
            raise RequestError(f"the prompt of {len(prompt.token_ids)} tokens and max_tokens={params.max_tokens} are "
                               f"more than max_model_len={self._max_model_len}: shorten the prompt, lower max_tokens "
                               "or raise max_model_len")
        fields: dict[str, Any] = {"temperature": params.temperature, "top_p": params.top_p}
        for name, unused in (("top_k", 0), ("min_p", 0.0), ("ignore_eos", False), ("stop_token_ids", ())):
            if getattr(params, name) != unused:
                fields[name] = getattr(params, name)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return _Request(prompt, params, fields, seed, [
            Response(prompt, seed, sample, params.max_tokens, params.temperature == 0.0) for sample in range(params.n)])

    def _prompt(self, given: Any) -> Prompt:
        if self._tokenizer is not None:
            return parse_prompt(given, self._tokenizer, ANY_VOCABULARY)
        given = {"prompt": given} if isinstance(given, str) else given
        if not isinstance(given, dict):
            raise RequestError(f"a prompt is {shown(given)}, it must be a text or a dictionary")
        kind = prompt_kind(given, "a prompt dictionary")
        if kind == "messages":
            raise RequestError("messages are rendered by a chat template: give the tokenizer of the served model")
        beside = next((key for key in given if key not in PROMPT_KEYS), None)
        if beside is not None:
            raise RequestError(f"{shown(beside)} beside a prompt is for a tokenizer: give that of the served model, or "
                               "leave it out")
        if kind == "prompt_token_ids":
            return parse_prompt(given, None, ANY_VOCABULARY)
        text = given["prompt"]
        if not isinstance(text, str) or not text:
            raise RequestError(f"prompt is {shown(text)}, it must be a text of at least one character")
        return Prompt(text, [], text)

    # -- the loop ------------------------------------------------------------------------------------------------

    def _run(self, requests: Sequence[_Request]) -> Iterator[list[Response]]:
        if not self._busy.acquire(blocking=False):
            raise RequestError(f"this {self._name} is at work with another call: give it all prompts at once, or make "
                               "one for each thread")
        try:
            if requests:
                self._meet(requests[0])
                yield from self._loops(requests)
        finally:
            self._busy.release()

    def _meet(self, request: _Request) -> None:
        """What has to be known of the server, and the reward as that allows; ServerError, RewardError."""
        tokenizer = self._tokenizer
        prompt = request.prompt
        pieces = _pieces(prompt, True, tokenizer)
        text, ids = PROBE, prompt.token_ids
        if tokenizer is not None:  # a text is sent whose ids are known
            if isinstance(prompt.given, str) and prompt.special and not prompt.literal:
                text = prompt.given
            else:
                ids = tokenizer.encode(PROBE)
            pieces = [text]
        ways, told = self.server.ways(pieces, request.fields)
        if told is not None:
            self.traffic = self.traffic.with_answer(told)
        if not ways.tells_ids:
            if self._needs_ids:
                raise ServerError(f"the server at {self.server.address} tells no token ids, which {self._name} needs: "
                                  "use stars.adapters.openai")
            if request.params.stop_token_ids:
                raise RequestError(f"stop_token_ids need token ids, and the server at {self.server.address} tells "
                                   "none: leave them out")
        if told is not None and tokenizer is not None and (told.prompt_token_ids not in (None, ids) or
                                         told.prompt_tokens not in (0, len(ids))):
            raise ServerError(f"the server at {self.server.address} reads {shown(text)} as "
                              f"{shown(told.prompt_token_ids or told.prompt_tokens)} and the tokenizer as "
                              f"{shown(ids)}: give the tokenizer of the model that is served")
        if self._scoring is None and self._law.scores:
            scoring = Scoring(
                self._reward, tokenizer if tokenizer is not None and ways.tells_ids else TextOnly(), ANY_VOCABULARY,
                max_model_len=self._max_model_len, segment_size=self._law.segment_size,
                max_num_seqs=self._max_num_seqs, max_num_lanes=self._max_num_seqs * self._law.width,
                device=self._device, cache_tokens=self._cache_tokens)
            if not scoring.needs_text and not ways.tells_ids:
                raise ServerError(f"the server at {self.server.address} tells no token ids, and the reward reads "
                                  "those: give one that reads text")
            self._scoring = scoring

    def _loops(self, requests: Sequence[_Request]) -> Iterator[list[Response]]:
        stack = _Drafts(self, requests)
        loop = Loop(stack, self._scoring, self._law, None, reserve=stack.reserve)
        yield from loop.run([response for one in requests for response in one.responses])

    def _output(self, request: _Request, number: int) -> RequestOutput:
        prompt, responses = request.prompt, request.responses
        metrics = Metrics()
        for one in responses:
            metrics.add(one.metrics)
        ids = next((one.prompt.token_ids for one in responses if one.prompt.token_ids), [])
        return RequestOutput(
            str(number), prompt.asked, ids, [one.output() for one in responses],
            all(one.finish_reason is not None for one in responses), request.seed, self._policy,
            responses[0].prompt_reward, metrics)


class _Request(NamedTuple):
    prompt: Prompt
    params: SamplingParams
    fields: dict[str, Any]  # of every body
    seed: int
    responses: list[Response]


class _Sequence:
    """What the next request of a response is made of."""

    def __init__(self, number: int, request: _Request, pieces: list[Piece]):
        self.number, self.request, self.pieces = number, request, pieces
        self.text = ""  # committed, as the server sent it
        self.cut = False  # whether what is committed ends within a character, whose first bytes are sent as token ids
        self.drafted: dict[int, tuple[Sequence[Piece], str, bool]] = {}  # by attempt: of those that may still win


class _Drafts:
    """The loop's stack: all requests of a round are in flight together."""

    def __init__(self, proposer: OpenAIProposer, requests: Sequence[_Request]):
        self._proposer, self._server = proposer, proposer.server
        self._ways, _ = self._server.ways([], {})
        self._requests = {response: one for one in requests for response in one.responses}
        self._numbers = {response: number for number, response in enumerate(self._requests)}
        self._open = 0

    def reserve(self, response: Response) -> bool:
        """Takes one of `max_num_seqs` places, if one is free."""
        if self._open >= self._proposer._max_num_seqs:
            return False
        self._open += 1
        pieces = _pieces(response.prompt, self._ways.takes_ids, self._proposer._tokenizer)
        response.sequence = _Sequence(self._numbers[response], self._requests[response], pieces)
        return True

    def open(self, responses: Sequence[Response]) -> None:
        """Nothing is read before the first candidates are asked for."""
        for one in responses:
            one.stop_ids = frozenset(self._requests[one].params.stop_token_ids or ())
            self._decodes(one)

    def draft(self, asked: Sequence[Asked]) -> Sequence[list[Draft] | StarsError]:
        """One request a response, or one a candidate."""
        wanted = []
        for one, attempts in asked:
            sequence = one.sequence
            seeds = [_seed(attempt) for attempt in (attempts[:1] if self._ways.several else attempts)]
            fields = sequence.request.fields
            if self._proposer._priority:  # who began first is served first: a round is a request of its own
                fields = {**fields, "priority": sequence.number}
            wanted.append(Wanted(sequence.pieces, seeds, len(attempts), attempts[0].max_tokens, fields))
        found: list[list[Draft] | StarsError] = []
        for (one, attempts), told in zip(asked, self._server.ask(wanted), strict=True):
            found.append(told if isinstance(told, ServerError) else self._drafts(one, attempts, told))
        return found

    def settle(self, settled: Sequence[Settled]) -> None:
        """What was kept is sent with the next request."""
        for one, kept, held in settled:
            sequence = one.sequence
            if kept:
                pieces, text, sequence.cut = sequence.drafted[kept]
                sequence.pieces += pieces
                sequence.text += text
            sequence.drafted = {held: sequence.drafted[held]} if held else {}

    def close(self, response: Response) -> None:
        """Gives its place to another one."""
        self._open -= 1

    def _drafts(self, one: Response, attempts: Sequence[Drawn], told: Told) -> list[Draft] | StarsError:
        proposer, sequence = self._proposer, one.sequence
        proposer.traffic = proposer.traffic.with_answer(told)
        params = sequence.request.params
        if told.prompt_token_ids is not None and not one.prompt.token_ids:
            sequence.pieces = list(told.prompt_token_ids)
            one.prompt = one.prompt._replace(token_ids=sequence.pieces[:])
            self._decodes(one)
        if params.temperature > 0.0 and len(told.choices) > 1 and len(told.choices[0].token_ids) >= LONG:
            proposer.note([choice.text for choice in told.choices])
        if sequence.cut and one.decode is None:
            return ServerError(f"a segment ended within a character, and what the server at {self._server.address} "
                               "shows after that is not the text: give the tokenizer of the served model")
        drafts = []
        for attempt, choice in zip(attempts, told.choices, strict=True):
            assert one.stop_ids is not None
            if one.stop_ids.intersection(choice.token_ids[:-1] if choice.ended else choice.token_ids):
                fault = "stop_token_ids"
            elif choice.ended and params.ignore_eos and choice.token_ids[-1] not in one.stop_ids:
                fault = "ignore_eos"
            else:
                fault = ""
            if fault:
                return ServerError(f"the server at {self._server.address} does not heed {fault}: leave it out")
            if choice.ended and choice.told:  # its EOS, which nobody else names
                one.stop_ids |= {choice.token_ids[-1]}
            # A character that the segment cuts in two is not shown before it is whole.
            text = choice.text if choice.ended else choice.text.rstrip(REPLACEMENT)
            sequence.drafted[attempt.attempt] = choice.pieces, text, self._ways.tells_ids and text != choice.text
            drafts.append(Draft(choice.token_ids, choice.ended, choice.logprob,
                                text=None if one.decode is not None and choice.told else sequence.text + text))
        return drafts

    def _decodes(self, one: Response) -> None:
        """Texts are the tokenizer's where ids and prompt are known: then no character is cut at a seam."""
        tokenizer = self._proposer._tokenizer
        if tokenizer is not None and self._ways.tells_ids and one.prompt.token_ids:
            one.decode = Detokenizer(tokenizer, one.prompt.token_ids).decode


def _pieces(prompt: Prompt, ids: bool, tokenizer: Any) -> list[Piece]:
    """What is sent of a prompt: its ids where the server takes those, else the text."""
    if prompt.token_ids and (ids or prompt.text is None):
        return list(prompt.token_ids)
    text = prompt.given if isinstance(prompt.given, str) else prompt.text
    assert text is not None  # it has no ids
    bos = getattr(tokenizer, "bos_token", None)
    if bos and prompt.chat is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)  # which the template has, and the server puts there too
    return [text]


def _seed(attempt: Drawn) -> int:
    """The seed of a request: of its own for every round, so that retries draw anew, and the same in every run."""
    packed = struct.pack("<QII", attempt.seed & (1 << 64) - 1, attempt.stream, attempt.attempt)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") % SEEDS


def _has_path(url: str) -> bool:
    try:
        return bool(urlsplit(url).path.strip("/"))
    except ValueError:
        return False
