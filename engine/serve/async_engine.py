"""AsyncEngine: one engine for the tasks of any event loops."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from stars.arguments import integer, refuse_others, request_ids
from stars.budget import Budget
from stars.engine import Engine
from stars.errors import RequestError
from stars.intake import Asked
from stars.metrics import EngineMetrics
from stars.outputs import RequestOutput, Rewards
from stars.plan import Policy
from stars.sampling import SamplingParams
from stars.serve.feed import Feed
from stars.serve.loop import Loop
from stars.spans import parent_of
from stars.vllm_names import CALL

REQUEST = ("prompt", "sampling_params", "policy", "request_id", "budget", "priority", "user", "trace_headers")


class AsyncEngine:
    """An engine that a thread of its own runs for tasks, which await outputs.

    model: an Engine, which it takes over, or what Engine is given, which builds one: that takes its time, in the thread
        that calls, and so does measuring what a step takes, by which widths and the lengths of rounds are chosen.
    max_waiting: requests that may wait to be admitted; None: any number. Beyond, `generate` and `add` wait in line,
        first come first served, and `add_nowait` raises QueueFullError.

    Any event loop of any thread may call, and so may any thread call the `engine` itself: they take turns, round by
    round. Nothing here blocks an event loop: the loop thread checks requests and builds outputs, between rounds.
    Grammars that are new are compiled in another one, one after the other, so that nobody without one waits for them.

    A task that reads a stream and is cancelled, a stream that is closed, and one that is simply no longer held end
    their request before the next round. Who is slow holds up nobody: of cumulative outputs some are left out, and
    deltas grow.

    What raises out of a round, and is not a request's own error, ends the loop: everybody who waits, and whoever calls
    afterwards, gets an EngineDeadError that names it, and `is_running` is False. The engine is free then for another
    AsyncEngine. So it is after a `shutdown`. An AsyncEngine that is no longer held ends by itself; the interpreter's
    exit aborts what runs and waits for the end of a round, for 10 s at most.
    """

    def __init__(self, model: Any, reward: Any = None, *, max_waiting: int | None = None, **options: Any):
        if max_waiting is not None:
            max_waiting = integer("max_waiting", max_waiting, 1)
        if isinstance(model, Engine):
            given = [*(["reward"] if reward is not None else []), *options]
            if given:
                raise RequestError(f"AsyncEngine takes over an Engine as it is: give {', '.join(given)} to Engine")
        self.engine = model if isinstance(model, Engine) else Engine(model, reward, **options)
        self.engine._measure_widths()
        self._loop = Loop(self.engine, max_waiting)
        weakref.finalize(self, self._loop.forget).atexit = False  # the loop looks after exits itself

    def __repr__(self) -> str:
        if "_loop" not in vars(self):
            return "AsyncEngine(not built)"
        return f"AsyncEngine({'running' if self.is_running else 'ended'}; {self.engine!r})"

    @property
    def metrics(self) -> EngineMetrics:
        """The engine's."""
        return self.engine.metrics

    @property
    def max_requests(self) -> int | None:
        """Requests that may run and wait at once before `add_nowait` raises; None: any number."""
        waiting = self._loop.max_waiting
        return None if waiting is None else self.engine.config.max_num_seqs + waiting

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: False after a fault, and from the moment that `shutdown` is called."""
        return not self._loop.closed

    @property
    def num_in_line(self) -> int:
        """Requests that were asked for and that the engine does not have yet: those in line, and those that are being
        checked or have their grammar compiled."""
        return self._loop.in_line

    def generate(self, prompt: Any = None, sampling_params: SamplingParams | None = None,
                 policy: Policy | None = None, *, request_id: str | None = None, budget: Budget | None = None,
                 priority: int = 0, user: str | None = None,
                 trace_headers: Mapping[str, str] | None = None, **others: Any) -> RequestStream:
        """`async for output in engine.generate(…)`: the outputs of one prompt, as `Engine.stream` yields them, or as
        `sampling_params.output_kind` says; the last one is finished.

        The request is made when the first output is asked for, and waits in line then, if there is one. Bad input
        raises there, before anything is queued: RequestError, RewardError. EngineDeadError after a fault or shutdown.

        trace_headers: W3C's traceparent and tracestate of the span that its own belongs to; None: the caller's.
        """
        refuse_others("generate", others, CALL, REQUEST)
        asked = Asked(prompt, sampling_params, policy, budget, priority, user,
                      trace_context=parent_of(self.engine.spans, trace_headers))
        return RequestStream(self, self._loop.feed(asked, request_id, acknowledged=False))

    async def add(self, prompt: Any = None, sampling_params: SamplingParams | None = None,
                  policy: Policy | None = None, *, request_id: str | None = None, budget: Budget | None = None,
                  priority: int = 0, user: str | None = None,
                  trace_headers: Mapping[str, str] | None = None, **others: Any) -> RequestStream:
        """As `generate`, of a request that is queued when this returns: its `request_id` is known."""
        refuse_others("add", others, CALL, REQUEST)
        asked = Asked(prompt, sampling_params, policy, budget, priority, user,
                      trace_context=parent_of(self.engine.spans, trace_headers))
        return await self._added(asked, request_id, at_once=False)

    async def add_nowait(self, prompt: Any = None, sampling_params: SamplingParams | None = None,
                         policy: Policy | None = None, *, request_id: str | None = None, budget: Budget | None = None,
                         priority: int = 0, user: str | None = None,
                         trace_headers: Mapping[str, str] | None = None, **others: Any) -> RequestStream:
        """As `add`, and QueueFullError at once where `max_waiting` requests wait."""
        refuse_others("add_nowait", others, CALL, REQUEST)
        asked = Asked(prompt, sampling_params, policy, budget, priority, user,
                      trace_context=parent_of(self.engine.spans, trace_headers))
        return await self._added(asked, request_id, at_once=True)

    async def _added(self, asked: Asked, request_id: str | None, at_once: bool) -> RequestStream:
        feed = self._loop.feed(asked, request_id, acknowledged=True)
        stream = RequestStream(self, feed)
        try:
            stream._begin(at_once)
            await feed.accepted()
        except BaseException:  # whose traceback may hold the stream for long
            stream._end()
            raise
        return stream

    async def score(self, prompts: Any = None, responses: Any = None, **others: Any) -> Rewards:
        """As `Engine.score`, a slice at a time between the rounds of others. Cancelled, it ends before the next one."""
        refuse_others("score", others, CALL, ("prompts", "responses"))
        return await asyncio.wrap_future(self._loop.score(self.engine._score_call(prompts, responses)))

    async def abort(self, request_id: str | Iterable[str]) -> bool:
        """Ends a request, or several, with finish_reason "abort", keeping what was committed; whether there was one.

        Who awaits their outputs gets the last.
        """
        found = [asyncio.wrap_future(self._loop.abort(one)) for one in request_ids(request_id)]
        return any([await one for one in found])

    async def shutdown(self, drain: bool = True) -> None:
        """Takes no more requests and ends the loop thread once those that were asked for are finished, which with
        drain=False are aborted now: everybody gets a last output.

        A second call may end what the first one drains. The engine itself can be used afterwards.
        """
        self._loop.close(drain)
        await asyncio.shield(asyncio.wrap_future(self._loop.ended))

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        """Shuts down: what runs is finished, or aborted where an exception left the block."""
        await self.shutdown(drain=error is None)


class RequestStream:
    """The outputs of one request, for one task at a time: `async for`, in any event loop.

    Closed by `aclose`, by leaving it, or where the task that reads it is cancelled.
    """

    def __init__(self, engine: AsyncEngine, feed: Feed):
        self._engine = engine  # which lives as long as somebody awaits it
        self._feed = feed
        self._begun = self._ended = False
        self._reader: weakref.ref[asyncio.Task[Any]] | None = None
        self._watch: Callable[[asyncio.Task[Any]], None] | None = None  # what its reader calls where it ends

    @property
    def request_id(self) -> str | None:
        """Of a request without an id of its user's own None before it was queued."""
        return self._feed.request_id

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        self._feed.refuse_second()
        self._note_reader()
        try:
            if not self._begun:
                self._begin()
            output = await self._feed.next()
        except BaseException:
            self._end()
            self._unwatch()
            raise
        self._ended = output is None or output.finished
        if self._ended:
            self._unwatch()
        if output is None:
            raise StopAsyncIteration
        return output

    async def aclose(self) -> None:
        """Ends the request, if it is not finished; there are no more outputs, for a task that awaits one neither."""
        self._end()
        self._feed.close()

    def _note_reader(self) -> None:
        """A task that reads and is cancelled elsewhere than here ends the request too, even where the error that holds
        its frame is kept."""
        task = asyncio.current_task()
        if task is None or self._reader is not None and self._reader() is task:
            return
        stream = weakref.ref(self)

        def done(task: asyncio.Task[Any]) -> None:
            held = stream()
            if held is not None and task.cancelled() and held._reader is not None and held._reader() is task:
                held._end()

        self._reader, self._watch = weakref.ref(task), done
        task.add_done_callback(done)

    def _unwatch(self) -> None:
        """A task that reads one stream after the other keeps nothing of them."""
        task = self._reader() if self._reader is not None else None
        if task is not None and self._watch is not None:
            task.remove_done_callback(self._watch)
        self._reader = self._watch = None

    def _begin(self, at_once: bool = False) -> None:
        """Asks for the request."""
        self._engine._loop.add(self._feed, at_once)
        self._begun = True

    def _end(self) -> None:
        if self._begun and not self._ended:
            self._engine._loop.drop(self._feed)
        self._ended = True

    def __del__(self) -> None:
        if "_ended" in vars(self):  # else it was not built
            self._end()
