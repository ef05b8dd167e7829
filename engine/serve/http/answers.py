"""One HTTP request under way: the engine's requests that it makes, and the answer that grows of their outputs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any, NamedTuple

from fastapi import Request
from starlette.responses import Response

from stars.errors import StarsError
from stars.outputs import CompletionOutput, RequestOutput
from stars.serve.async_engine import RequestStream
from stars.serve.http import draws
from stars.serve.http.asked import Wanted
from stars.serve.http.errors import ApiError, api_error
from stars.serve.http.logprobs_field import TokenPlaces
from stars.serve.http.service import Service, user_of
from stars.serve.http.stars_field import SegmentRecords, choice_record, number, policy_record, together, trace_text
from stars.serve.http.streaming import DONE, EventStream, client_closed, dumped, event, merged, unless_gone

logger = logging.getLogger(__name__)

FINISH = {"refused": "content_filter", "budget": "length", "deadline": "length"}
"""OpenAI's words for the engine's finish reasons that it has not; the others are called alike."""
TRACE_HEADERS = ("traceparent", "tracestate")


class Piece(NamedTuple):
    """What is new of one choice; of an answer that is not streamed all of it."""

    number: int  # of the choice
    text: str
    completion: CompletionOutput
    output: RequestOutput
    first: bool  # whether nothing of it was told before
    finish_reason: str | None
    places: TokenPlaces | None  # where its tokens begin, where somebody asks


class Shape(NamedTuple):
    """What differs between the two addresses."""

    prefix: str  # of ids
    whole: str  # what an answer says that it is
    chunk: str  # and an event
    choice: Callable[[Wanted, Any, Piece], dict[str, Any]]  # of an answer
    delta: Callable[[Wanted, Any, Piece], dict[str, Any]]  # of an event
    beside: Callable[[Wanted, RequestOutput], Mapping[str, Any]]  # what a whole answer has besides


class _Choice:
    """What is known of a choice between its events."""

    def __init__(self, wanted: Wanted, tokenizer: Any, output: RequestOutput, number: int):
        self.number = number
        self.told = self.ended = False  # whether there was an event, and the last one
        self.tokens = 0
        before = () if wanted.echo else output.prompt_token_ids
        self.places = None if wanted.logprobs is None else TokenPlaces(tokenizer, before)
        self.segments = None if not wanted.guided.return_segments else SegmentRecords(
            tokenizer, output.prompt_token_ids, wanted.params[0], wanted.return_token_ids)


class Answer:
    """The answer to one HTTP request. What can be refused is refused by `begin`, before anything is sent."""

    def __init__(self, service: Service, wanted: Wanted, shape: Shape, headers: Mapping[str, str]):
        self.wanted = wanted
        self.tokenizer = service.engine.engine.tokenizer
        self._engine = service.engine
        self._shape = shape
        self._trace_headers = {name: headers[name] for name in TRACE_HEADERS if name in headers} or None
        self._id = f"{shape.prefix}{draws.name()}"
        self._created = int(time.time())
        self._streams: list[RequestStream] = []
        self._choices: dict[int, _Choice] = {}
        self._last: dict[int, RequestOutput] = {}  # the newest output of each prompt
        self._kept: dict[int, list[RequestOutput]] = {}  # all of them, for a trace

    def counts(self) -> dict[str, Any]:
        """What is told of it in a log."""
        usage = self._usage()
        return {"id": self._id} | {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}

    async def whole(self) -> dict[str, Any]:
        """All of it, once it is there."""
        await self._begin()
        try:
            async for index, output in merged(self._streams):
                self._note(index, output)
        finally:
            await self._end()
        for output in self._last.values():
            self._raise_error(output)
        # In a thread where it takes a while.
        decodes = self.wanted.guided.return_segments or self.wanted.logprobs is not None
        choices = await asyncio.to_thread(self._whole_choices) if decodes else self._whole_choices()
        return {**self._head(self._shape.whole), "choices": choices, "usage": self._usage(),
                "stars": await self._of_answer(), **self._shape.beside(self.wanted, self._last[0])}

    def _whole_choices(self) -> list[dict[str, Any]]:
        pieces = [self._piece(index, self._last[index], completion) for index in sorted(self._last)
                  for completion in self._last[index].outputs]
        return [{**self._shape.choice(self.wanted, self.tokenizer, piece), "stars": self._of_choice(piece)}
                for piece in pieces]

    async def stream(self) -> AsyncGenerator[bytes]:
        """Events, once the first output is there: until then an error has a status of its own."""
        await self._begin()
        outputs = merged(self._streams)
        try:
            first = await anext(outputs)
            self._raise_error(first[1])
        except BaseException:
            await self._end()
            raise
        return self._events(first, outputs)

    async def _events(self, first: tuple[int, RequestOutput],
                      outputs: AsyncGenerator[tuple[int, RequestOutput]]) -> AsyncGenerator[bytes]:
        try:
            async with contextlib.aclosing(outputs):
                for chunk in self._chunks(*first):
                    yield event(chunk if not self._closes() else {**chunk, "stars": await self._of_answer()})
                async for index, output in outputs:
                    for chunk in self._chunks(index, output):
                        yield event(chunk if not self._closes() else {**chunk, "stars": await self._of_answer()})
            if self.wanted.include_usage:
                yield event({**self._head(self._shape.chunk), "choices": [], "usage": self._usage(),
                             "stars": await self._of_answer()})
        except Exception as error:
            if not isinstance(error, (ApiError, StarsError)):
                logger.error("a stream failed", exc_info=error)
            yield event(api_error(error).body())
        finally:
            await self._end()
        yield DONE

    def _chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """The events of an output, one a choice that has grown or ended."""
        self._note(index, output)
        self._raise_error(output)
        for completion in output.outputs:
            choice = self._choice(index, output, completion)
            ends = completion.finish_reason is not None
            if not choice.ended and (completion.segments or completion.text or ends):
                choice.ended = ends
                yield self._chunk(index, output, completion)

    def _chunk(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        piece = self._piece(index, output, completion)
        choice = self._shape.delta(self.wanted, self.tokenizer, piece)
        if completion.finish_reason is not None or self.wanted.guided.return_segments:
            choice["stars"] = self._of_choice(piece)
        chunk = {**self._head(self._shape.chunk), "choices": [choice]}
        if self.wanted.continuous_usage:
            chunk["usage"] = self._usage()
        elif self.wanted.include_usage:
            chunk["usage"] = None
        return chunk

    async def _begin(self) -> None:
        """Queues a request for each prompt, all of them or none."""
        wanted = self.wanted
        streams = await asyncio.gather(*(self._add(index) for index in range(len(wanted.prompts))),
                                       return_exceptions=True)
        self._streams = [stream for stream in streams if isinstance(stream, RequestStream)]
        for index, error in enumerate(streams):
            if isinstance(error, Exception):
                await self._end()
                raise wanted.refused(error, index if len(streams) > 1 else None) from error
            if isinstance(error, BaseException):
                raise error

    async def _add(self, index: int) -> RequestStream:
        try:
            return await self._added(index)
        except Exception as error:
            if not self.wanted.could_be_shorter(error):
                raise
            return await self._added(index, max_tokens=None)

    async def _added(self, index: int, **changes: Any) -> RequestStream:
        wanted = self.wanted
        params = wanted.params[index]
        request_id = self._id if len(wanted.prompts) == 1 else f"{self._id}-{index}"
        return await self._engine.add_nowait(
            wanted.prompts[index], dataclasses.replace(params, **changes) if changes else params, wanted.guided.policy,
            request_id=request_id, budget=wanted.guided.budget, priority=wanted.priority, user=wanted.user,
            trace_headers=self._trace_headers)

    async def _end(self) -> None:
        """Ends what is not finished."""
        for stream in self._streams:
            await stream.aclose()

    def _note(self, index: int, output: RequestOutput) -> None:
        self._last[index] = output
        if self.wanted.guided.return_trace:
            self._kept.setdefault(index, []).append(output)
        for completion in output.outputs:
            self._choice(index, output, completion).tokens += len(completion.token_ids)

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> _Choice:
        number = index * self.wanted.params[0].n + completion.index
        if number not in self._choices:
            self._choices[number] = _Choice(self.wanted, self.tokenizer, output, number)
        return self._choices[number]

    def _closes(self) -> bool:
        """Whether the event that was made last is the last of all, so that it has the answer's `stars`."""
        count = len(self.wanted.prompts) * self.wanted.params[0].n
        return (not self.wanted.include_usage and len(self._choices) == count
                and all(choice.ended for choice in self._choices.values()))

    def _piece(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Piece:
        choice = self._choice(index, output, completion)
        first, choice.told = not choice.told, True
        reason = completion.finish_reason
        return Piece(choice.number, completion.text or "", completion, output, first,
                     None if reason is None else FINISH.get(reason, reason), choice.places)

    def _of_choice(self, piece: Piece) -> dict[str, Any]:
        """A choice's `stars`."""
        record = choice_record(piece.completion)
        if len(self.wanted.prompts) > 1:
            record |= {"seed": piece.output.seed, "prompt_reward": number(piece.output.prompt_reward)}
        segments = self._choices[piece.number].segments
        return record if segments is None else record | {"segments": segments.new(piece.completion)}

    async def _of_answer(self) -> dict[str, Any]:
        """The answer's `stars`. What differs between prompts is said of their choices."""
        outputs = [self._last[index] for index in sorted(self._last)]
        seeds = {output.seed for output in outputs}
        record: dict[str, Any] = {
            "policy": policy_record(self.wanted.guided.policy), "seed": seeds.pop() if len(seeds) == 1 else None,
            "prompt_reward": number(outputs[0].prompt_reward) if len(outputs) == 1 else None}
        if self.wanted.guided.return_trace:
            cumulative = [together(self._kept[index]) for index in sorted(self._kept)]
            record["trace"] = await asyncio.to_thread(trace_text, cumulative, self.tokenizer, self.wanted.params)
        return record

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.wanted.guided.model}

    def _usage(self) -> dict[str, Any]:
        """What was read and written so far: of a prompt with several choices once."""
        read = sum(len(output.prompt_token_ids) for output in self._last.values())
        written = 0 if self.wanted.prompt_only else sum(choice.tokens for choice in self._choices.values())
        cached = sum(output.num_cached_tokens or 0 for output in self._last.values())
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
                "prompt_tokens_details": {"cached_tokens": cached}}

    @staticmethod
    def _raise_error(output: RequestOutput) -> None:
        """ApiError where the request has ended by one."""
        for completion in output.outputs:
            if completion.finish_reason == "error":
                raise ApiError(500, completion.error or "the request ended with an error")


async def answered(service: Service, request: Request, wanted: Wanted, shape: Shape) -> Response:
    """The response to a request, of which no more than its checks is done where its client goes away."""
    service.check_open()
    answer = Answer(service, wanted._replace(user=user_of(request, wanted.user)), shape, request.headers)
    request.state.counts = answer.counts
    if wanted.stream:
        events = await unless_gone(request.receive, answer.stream())
        if events is not None:
            return EventStream(events)
    else:
        whole = await unless_gone(request.receive, answer.whole())
        if whole is not None:
            return Response(dumped(whole), media_type="application/json")
    raise client_closed()
