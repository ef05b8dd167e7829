"""The thread that runs an engine for tasks of any event loops: who may come in, whose turn it is, who is told."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import queue
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple, TypeAlias

from stars.engine import Engine
from stars.errors import EngineDeadError, IntegrityError, QueueFullError, RequestError, describe, log
from stars.intake import Asked
from stars.outputs import Rewards
from stars.request import Request
from stars.reward.base import Later
from stars.score_call import ScoreCall
from stars.serve.aside import Aside
from stars.serve.feed import Feed, Waiter, wake_all
from stars.serve.score_line import ScoreLine, settle
from stars.waiting import PATIENCE

EXIT_SECONDS = 10.0
"""How long an interpreter that exits waits for a round to end."""
GATHERING, MOST_GATHERING = 0.0005, 0.005
"""Seconds that an idle loop waits for a further request, each time, and in all: an event loop makes those of its tasks
one after the other, and a round that begins with the first alone holds up the others."""
LONGEST_NAP = 3600.0  # seconds; waits are not longer, whatever a deadline is


class Add(NamedTuple):
    """A request is to be checked and queued."""

    feed: Feed
    placed: bool  # whether it need not stand in line


class Prepared(NamedTuple):
    """The grammar of a request is compiled, or none."""

    feed: Feed
    asked: Future[Asked]


class Abort(NamedTuple):
    """A request is to end, with its last output."""

    request_id: str
    found: Future[bool]


class Drop(NamedTuple):
    """Nobody wants a request any more."""

    feed: Feed


class Score(NamedTuple):
    """Responses are to be scored."""

    call: ScoreCall
    rewards: Future[Rewards]


class Close(NamedTuple):
    """No requests come any more: what is there is finished, or aborted."""

    drain: bool


Message: TypeAlias = Add | Prepared | Abort | Drop | Score | Close | None
"""What the loop thread is told; None: to look again."""


class Loop:
    """The requests of one engine that tasks wait for, and the thread that runs them.

    All that is changed is changed by that thread, in the engine's turn, between two rounds: others leave messages in
    its inbox, and find outputs in feeds. The inbox takes messages from finalisers too, which may run anywhere.
    Whether a request has a place, or must stand in line, is decided where it is asked, so that it is known at once.
    """

    def __init__(self, engine: Engine, max_waiting: int | None):
        self.engine = engine
        self.max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._aside = Aside("stars-grammars")
        self._lock = threading.Lock()  # of the next six; nobody takes it who may be a finaliser
        # Requests that may come before they stand in line, where max_waiting is a number.
        self._room = engine.config.max_num_seqs + (max_waiting or 0)
        self._passed = 0  # those that have, and are in the inbox or being prepared
        self._in_line = 0  # those that stand in line, or will
        self.closed = False  # whether requests are taken no more
        self._ended = False  # whether the thread has done its last
        self._fault: BaseException | None = None  # why, if nobody asked it to
        # What only the thread uses.
        self._told: deque[Message] = deque()  # what it was told and has not dealt with
        self._answers: list[tuple[Future[bool], bool]] = []  # to aborts, given once outputs are built
        self._preparing: dict[str, Feed] = {}  # checked but for their grammars, which are being compiled
        self._line: dict[str, Feed] = {}  # checked, in order
        self._queued: dict[str, Feed] = {}  # the engine has them
        self._scores = ScoreLine(engine, self._inbox)
        self._closing = False
        self._crowded = False  # whether some were left waiting by the last round
        self._awaited: list[Later] = []  # rewards without which there is no round
        self._watched: set[Later] = set()  # rewards that leave a message
        self._wakes: dict[asyncio.AbstractEventLoop, list[tuple[Feed, Waiter]]] = {}
        # What is used in turns of the engine.
        self._changed: dict[Feed, None] = {}  # what outputs are to be built of, in order
        self.ended: Future[None] = Future()
        self.thread = _Thread(target=self._run, name="stars-engine", daemon=True)
        _ALL.add(self)
        self.thread.start()

    # -- for any thread -----------------------------------------------------------------------------------------------

    def feed(self, asked: Asked, request_id: str | None, acknowledged: bool) -> Feed:
        """The feed of a request that is not asked for yet."""
        return Feed(asked, request_id, self._note, self.wake, acknowledged)

    def add(self, feed: Feed, at_once: bool = False) -> None:
        """Asks for a request; with `at_once`, QueueFullError where it would have to stand in line."""
        self.engine._turns.refuse_reentry()
        if feed.asked.arrived is None:
            feed.asked = feed.asked._replace(arrived=time.monotonic())
        with self._lock:
            if self.closed:
                raise self._dead()
            placed = self.max_waiting is None or not self._in_line and self._room > 0
            if placed:
                self._room -= 1
                self._passed += 1
            elif at_once:
                raise QueueFullError(f"{self.max_waiting} requests wait already, as many as max_waiting allows: try "
                                     "again later, or await add")
            else:
                self._in_line += 1
            self._inbox.put(Add(feed, placed))

    @property
    def in_line(self) -> int:
        """Requests that the engine does not have yet."""
        return self._in_line + self._passed

    def abort(self, request_id: str) -> Future[bool]:
        """Asks for a request's end; whether there was one comes later."""
        self.engine._turns.refuse_reentry()
        found: Future[bool] = Future()
        with self._lock:
            if self._fault is not None:
                raise self._dead()
            if self._ended:
                found.set_result(False)
            else:
                self._inbox.put(Abort(request_id, found))
        return found

    def score(self, call: ScoreCall) -> Future[Rewards]:
        """Asks for rewards; whoever cancels the Future has them no longer wanted."""
        self.engine._turns.refuse_reentry()
        rewards: Future[Rewards] = Future()
        with self._lock:
            if self.closed:
                raise self._dead()
            self._inbox.put(Score(call, rewards))
        return rewards

    def drop(self, feed: Feed) -> None:
        """Nobody awaits `feed` any more. For finalisers, too: it takes no lock."""
        self._inbox.put(Drop(feed))

    def wake(self) -> None:
        """Has the thread look again."""
        self._inbox.put(None)

    def close(self, drain: bool) -> None:
        """From now on requests are refused."""
        self.engine._turns.refuse_reentry()
        with self._lock:
            self.closed = True
        self._inbox.put(Close(drain))

    def forget(self) -> None:
        """Ends the thread once nobody can call it any more. A finaliser: it takes no lock."""
        self._inbox.put(Close(False))

    def _note(self, feed: Feed) -> None:
        """What `feed` is of has changed; called in a turn."""
        self._changed[feed] = None
        if threading.current_thread() is not self.thread:  # a round that another one ran
            self.wake()

    def _dead(self) -> EngineDeadError:
        """What callers are told: each its own, as it is given the traceback of who is told."""
        if self._fault is None:
            return EngineDeadError("this AsyncEngine was shut down: make another one, AsyncEngine(engine)")
        error = EngineDeadError(f"the engine's loop ended by {describe(self._fault)}: make another one, "
                                "AsyncEngine(engine), and see the log")
        error.__cause__ = self._fault
        return error

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not (self._closing and not self._queued and not self._line and not self._preparing
                       and not self._scores):
                self._listen()
                if self._told or self._late(self._preparing):
                    self.engine._turns.take(self._hear)
                    self._deliver()
                if self._queued:
                    self._awaited = self.engine._turns.take(self._advance)
                    self._watch()
                    self._deliver()
                if self._scores:
                    self._scores.turn()
        except BaseException as error:  # in this thread there is nobody else to take it
            self._end(error)
        else:
            self._end(None)

    def _listen(self) -> None:
        """Takes what has come, and where nothing can be done before, what comes."""
        with contextlib.suppress(queue.Empty):
            idle = not self._queued and not self._scores.able
            if (not self._queued or self._awaited) and (not self._scores.able or self._scores.cramped):
                self._told.append(self._inbox.get(timeout=self._nap()))
            until = time.monotonic() + MOST_GATHERING
            while idle and time.monotonic() < until:  # who comes together begins together
                self._told.append(self._inbox.get(timeout=GATHERING))
            while True:
                self._told.append(self._inbox.get_nowait())

    def _nap(self) -> float | None:
        """Seconds until a deadline passes, None where there is none: rewards and messages wake the thread."""
        deadlines = [feed.deadline for feeds in (self._queued, self._line, self._preparing)
                     for feed in feeds.values() if feed.deadline is not None]
        if self._scores.cramped:
            deadlines.append(time.monotonic() + PATIENCE)
        return max(0.0, min(min(deadlines) - time.monotonic(), LONGEST_NAP)) if deadlines else None

    def _watch(self) -> None:
        """Rewards that are waited for wake the thread."""
        inbox = self._inbox  # a user who keeps a reward does not keep the engine
        for reward in self._awaited:
            if reward not in self._watched:
                reward.add_done_callback(lambda _: inbox.put(None))
        self._watched = set(self._awaited)

    def _advance(self) -> list[Later]:
        self._let_late_in()
        awaited = self.engine._advance(self._tell_ended)
        self._build()
        self._let_in(after_round=True)
        return awaited

    def _tell_ended(self) -> None:
        """What ends as a round is planned, by a deadline for one, does not wait for the end of that round."""
        if self._changed:
            self._build()
            self._deliver()

    def _hear(self) -> None:
        while self._told:  # a message stays until it is dealt with: after a fault somebody waits for its answer
            message = self._told[0]
            if isinstance(message, Add):
                self._add(message.feed, message.placed)
            elif isinstance(message, Prepared):
                self._prepared(message.feed, message.asked)
            elif isinstance(message, Abort):
                self._answers.append((message.found, self._abort(message.request_id)))
            elif isinstance(message, Drop):
                self._drop(message.feed)
            elif isinstance(message, Score):
                self._scores.add(message.call, message.rewards)
            elif isinstance(message, Close):
                self._close(message.drain)
            self._told.popleft()
        self._awaited = []  # there may be something to do again
        self._let_late_in()
        self._build()
        self._let_in(after_round=False)
        while self._answers:
            settle(*self._answers.pop())

    def _add(self, feed: Feed, placed: bool) -> None:
        """Checks a request, which stands in line then, is queued, or has its grammar compiled meanwhile."""
        feed.placed = placed
        try:
            bare = self.engine._intake.without_grammar(feed.asked)
            feed.request = self._checked(feed, bare or feed.asked)
        except IntegrityError:
            raise
        except Exception as error:
            self._refuse(feed, error)
            return
        feed.request_id = feed.request.request_id
        feed.seats = feed.request.params.n * feed.request.plan.lanes.population
        if feed.request.budget.seconds is not None:
            feed.deadline = feed.request.arrived + feed.request.budget.seconds
        if bare is None:
            self._place(feed)
        else:
            self._preparing[feed.request_id] = feed
            intake, inbox, asked = self.engine._intake, self._inbox, feed.asked
            feed.compiled = self._aside.submit(lambda: intake.compiled(asked))
            feed.compiled.add_done_callback(lambda done: inbox.put(Prepared(feed, done)))

    def _prepared(self, feed: Feed, compiled: Future[Asked]) -> None:
        """A grammar is there, or cannot be: perhaps of a request that has ended meanwhile."""
        if self._preparing.get(str(feed.request_id)) is not feed:
            return
        del self._preparing[str(feed.request_id)]
        try:
            feed.asked = compiled.result()
            feed.request = self._checked(feed, feed.asked)
        except IntegrityError:
            raise
        except Exception as error:
            self._refuse(feed, error)
        else:
            self._place(feed)

    def _refuse(self, feed: Feed, error: Exception) -> None:
        self._leave_place(feed)
        self._tell(feed, feed.fail(error))

    def _place(self, feed: Feed) -> None:
        """Queues a request that need not stand in line; the others do from now on."""
        assert feed.request is not None
        if feed.placed:
            self._leave_place(feed)
            self._enqueue(feed, feed.request)
        else:
            self._line[feed.request.request_id] = feed

    def _leave_place(self, feed: Feed) -> None:
        """Who was counted as about to come is not any more."""
        if feed.compiled is not None:
            feed.compiled.cancel()  # unless it is under way, or done
        with self._lock:
            if feed.placed:
                self._passed -= 1
            else:
                self._in_line -= 1

    def _checked(self, feed: Feed, asked: Asked) -> Request:
        request_id = feed.request_id
        if request_id is None:
            request_id = self.engine._new_id()
            while request_id in self._line or request_id in self._preparing:
                request_id = self.engine._new_id()
        elif request_id in self._line or request_id in self._preparing:
            raise RequestError(f"request id {request_id!r} is in use: choose another")
        return self.engine._parse(asked, request_id)

    def _enqueue(self, feed: Feed, request: Request) -> None:
        if self.engine._in_use(request.request_id):  # by somebody who called the engine since it was checked
            if feed.chosen:
                error = RequestError(f"request id {request.request_id!r} is in use: choose another")
                self._tell(feed, feed.fail(error))
                return
            feed.request_id = request.request_id = self.engine._new_id()
        self.engine._enqueue(request, feed)
        self._queued[request.request_id] = feed
        self._tell(feed, feed.accept())

    def _abort(self, request_id: str) -> bool:
        if request_id in self._line or request_id in self._preparing:
            self._leave_line(request_id)
        request = self.engine._requests.get(request_id)
        if request is not None:
            self.engine._abort([request])
        return request is not None

    def _drop(self, feed: Feed) -> None:
        request, feed.dropped = feed.request, True
        if request is None or feed.complete:
            return
        if self._line.pop(request.request_id, None) or self._preparing.pop(request.request_id, None):
            self._leave_place(feed)
        elif self._queued.pop(request.request_id, None) is not None:
            self.engine._drop([request])

    def _close(self, drain: bool) -> None:
        self._closing = True
        with self._lock:
            self.closed = True
        if not drain:
            for request_id in [*self._line, *self._preparing]:
                self._leave_line(request_id)
            self._scores.end(self._dead)
            self.engine._abort([feed.request for feed in self._queued.values() if feed.request is not None])

    def _build(self) -> None:
        """Outputs of what has changed, as far as they are wanted now."""
        later: dict[Feed, None] = {}
        while self._changed:
            feed = next(iter(self._changed))
            del self._changed[feed]
            request = feed.request
            if request is None or feed.dropped or feed.complete:
                continue
            if not request.finished and feed.falls_behind():
                later[feed] = None
                continue
            output = self.engine._output(request)  # which ends the request where it has no text
            if output.finished:
                self._queued.pop(request.request_id, None)
                request.owner = None  # there is nothing to end once the feed is gone
            news = request.news(output)
            request.hand_out(output)
            self._tell(feed, feed.put(news))
        self._changed = later

    # -- the line -----------------------------------------------------------------------------------------------------

    def _let_in(self, after_round: bool) -> None:
        """Counts who waits, and queues as many of those in line as may wait besides, the first."""
        if self.max_waiting is None:
            return
        waiting = running = 0
        for feed in self._queued.values():
            if feed.begun or feed.has_begun():
                running += feed.seats
            else:
                waiting += 1
        if after_round or not waiting:
            # Who waits for a beginning that is being read leaves seats free.
            self._crowded = waiting > 0 and not self.engine._scheduler.reads
        # What is queued now and was not there in the last round takes a free seat in the next, so far as is known.
        free = 0 if self._crowded else max(self.engine.config.max_num_seqs - running, 0)
        with self._lock:
            room = self.max_waiting + free - waiting - self._passed
            count = min(max(room, 0), len(self._line))
            self._room = room - count
        for request_id in list(itertools.islice(self._line, count)):
            self._leave_line(request_id)

    def _let_late_in(self) -> None:
        """Queues those in line, or being prepared, whose time is up: the engine ends them."""
        for request_id in [*self._late(self._line), *self._late(self._preparing)]:
            self._leave_line(request_id)

    @staticmethod
    def _late(feeds: dict[str, Feed]) -> list[str]:
        """Of those the ids whose time is up."""
        if not feeds:
            return []
        now = time.monotonic()
        return [name for name, feed in feeds.items() if feed.deadline is not None and feed.deadline <= now]

    def _leave_line(self, request_id: str) -> None:
        """Queues the one in line of this id; one that is still prepared, to be ended before it draws."""
        feed = self._line.pop(request_id, None) or self._preparing.pop(request_id)
        self._leave_place(feed)
        if feed.request is not None:
            self._enqueue(feed, feed.request)

    # -- who is told --------------------------------------------------------------------------------------------------

    def _tell(self, feed: Feed, waiter: Waiter | None) -> None:
        """Whoever awaits `feed` is woken with the others of its event loop."""
        if waiter is not None:
            self._wakes.setdefault(waiter.loop, []).append((feed, waiter))

    def _deliver(self) -> None:
        """Wakes whom something was found for: one call an event loop."""
        wakes, self._wakes = self._wakes, {}
        for loop, told in wakes.items():
            try:
                loop.call_soon_threadsafe(wake_all, [waiter for _, waiter in told])
            except RuntimeError:  # it was closed, with all who waited there
                for feed, _ in told:
                    self.drop(feed)

    def _end(self, fault: BaseException | None) -> None:
        """Nobody who asked, or asks from now on, is left without an answer."""
        with self._lock:
            self.closed = self._ended = True
            self._fault = fault
        with contextlib.suppress(queue.Empty):
            while True:
                self._told.append(self._inbox.get_nowait())
        queued = [feed.request for feed in self._queued.values() if feed.request is not None]
        if fault is not None:
            log(f"the engine's loop ended by {describe(fault)}", fault)
            with contextlib.suppress(BaseException):  # its books may be what is wrong
                self.engine._turns.take(lambda: self.engine._drop(queued))
        added = [message.feed for message in self._told if isinstance(message, Add)]
        for feed in (*self._queued.values(), *self._line.values(), *self._preparing.values(), *added):
            self._tell(feed, feed.fail(self._dead()))
        for found in (*(found for found, _ in self._answers),
                      *(message.found for message in self._told if isinstance(message, Abort))):
            settle(found, False if fault is None else self._dead())
        for message in self._told:
            if isinstance(message, Score):
                self._scores.add(message.call, message.rewards)
        self._scores.end(self._dead)
        for held in (self._told, self._answers, self._queued, self._line, self._preparing, self._changed,
                     self._awaited):
            held.clear()
        self._deliver()
        settle(self.ended, None)

    def _left_behind(self) -> None:
        """After a fork, in the child, which has no such thread."""
        self._lock = threading.Lock()
        self.closed = self._ended = True
        self._fault = RuntimeError("the process was forked, and the thread is its parent's")
        for feed in (*self._queued.values(), *self._line.values(), *self._preparing.values()):
            feed.left_behind(self._dead())
        self._scores.end(self._dead)
        self.engine._orphans.extend(self._queued)  # whose next call ends them


class _Thread(threading.Thread):
    """A daemon, as a thread that is not would keep the interpreter from its exit; that waits for it all the same."""


_ALL: weakref.WeakSet[Loop] = weakref.WeakSet()


def _end_all() -> None:
    """At the interpreter's exit, when threads that are not daemons have ended: a thread must not be in the midst of a
    round when it goes, nor freeing an engine that nobody holds any more, whose loop is gone (beside.py says why)."""
    for loop in list(_ALL):
        loop.forget()
    until = time.monotonic() + EXIT_SECONDS
    for thread in threading.enumerate():
        if isinstance(thread, _Thread):
            thread.join(max(0.0, until - time.monotonic()))


def _after_fork() -> None:
    for loop in list(_ALL):
        loop._left_behind()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
