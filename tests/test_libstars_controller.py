"""What libstars refuses around controllers and handles: a status, a text that says what to do, and nothing changed."""

from __future__ import annotations

import ctypes
import itertools
import math
import threading

import pytest

from controller_oracle import ACCEPT, BUDGET, FALLBACK, LENGTH, RETRY, STOP, UNDECIDED, sized
from stars.bindings import libstars
from stars.bindings.controller import Controller, Drawn, Fed, Verdict
from stars.bindings.layouts import HEADER, STRUCTURES
from stars.bindings.library import last_error, last_status, loaded

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")

OK, INVALID, CLOSED, BUSY = (HEADER.constants[f"STARS_{name}"] for name in ("OK", "INVALID", "CLOSED", "BUSY"))
ABORTED = HEADER.constants["STARS_ABORTED"]
VERSION = HEADER.constants["STARS_ABI_VERSION"]
ROOM = 8
GOOD = dict(seed=1, reward_threshold=1.0, beta=0.0, alpha=0.5, prompt_reward=0.0, max_tokens=8, segment_size=4,
            max_attempts=5)
PATTERN = b"\xa5"


class Raw:
    """A controller through the C functions, with buffers that show what was written."""

    def __init__(self, **changes):
        self.library = loaded()
        self.handle = self.library.stars_controller_open(ctypes.byref(params(**changes)))
        assert self.handle, last_error()
        self.attempts, self.scored, self.notes = (
            (STRUCTURES[name] * ROOM)() for name in ("stars_attempt", "stars_scored", "stars_note"))

    def next(self, capacity=3):
        return self.library.stars_controller_next(self.handle, self.attempts, capacity)

    def feed(self, *rewards, first=1, tokens=4, ended=0, decision=None):
        """Results of the attempts from `first` on; the decision."""
        for place, reward in enumerate(rewards):
            self.scored[place] = (reward, first + place, tokens, ended)
        return self.feed_scored(len(rewards), decision)

    def feed_scored(self, count, decision=None):
        self.decision = sized("stars_decision") if decision is None else decision
        return self.library.stars_controller_feed(self.handle, self.scored, count, self.notes,
                                                  ctypes.byref(self.decision))

    def commit(self):
        return self.library.stars_controller_commit(self.handle)

    def progress(self):
        out = sized("stars_progress")
        assert self.library.stars_controller_progress(self.handle, ctypes.byref(out)) == OK
        return out

    def state(self):
        """All that can be seen of it."""
        return bytes(self.progress())

    def refused(self, call, words, status=INVALID):
        """That `call` is refused so, and changes neither the controller nor what it is given to write into."""
        before = self.state()
        for buffer in (self.attempts, self.notes):
            ctypes.memset(buffer, PATTERN[0], ctypes.sizeof(buffer))
        returned = call()
        assert abs(returned) == status and words in last_error(), (returned, last_error())
        assert last_status() == status and last_error().startswith("stars_controller_") and len(last_error()) < 200
        assert self.state() == before
        for buffer in (self.attempts, self.notes):
            assert bytes(buffer) == PATTERN * ctypes.sizeof(buffer)


def params(**changes):
    return sized("stars_controller_params", **(GOOD | changes))


@pytest.fixture
def raw():
    """One that has given out three attempts of its first segment."""
    made = Raw()
    assert made.next(3) == 3
    yield made
    made.library.stars_controller_close(made.handle)


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    ({"max_tokens": 0}, "max_tokens must be between 1 and 2^31 - 1"), ({"max_tokens": 2**31}, "max_tokens must"),
    ({"max_tokens": -(2**63)}, "max_tokens must"), ({"segment_size": 0}, "segment_size must be between"),
    ({"segment_size": 2**31}, "segment_size must"), ({"segment_size": -1}, "segment_size must"),
    ({"max_tokens": 2**20 + 1, "segment_size": 1}, "make segments longer"),
    ({"max_tokens": 2**31 - 1, "segment_size": 2047}, "make segments longer"),
    ({"max_attempts": 0}, "max_attempts must be between 1 and 2^24 - 1"), ({"max_attempts": 2**24}, "max_attempts"),
    ({"sample": -1}, "sample must be between 0 and 4095"), ({"sample": 4096}, "sample must"),
    ({"beta": -1e-9}, "beta must be a finite number"), ({"beta": math.nan}, "beta must"), ({"beta": math.inf}, "beta"),
    ({"alpha": -1e-9}, "alpha must be between 0 and 1"), ({"alpha": 1.0000001}, "alpha must"),
    ({"alpha": math.nan}, "alpha must"), ({"reward_threshold": math.nan}, "reward_threshold must be a number"),
    ({"prompt_reward": math.nan}, "prompt_reward must be finite"), ({"prompt_reward": math.inf}, "prompt_reward must"),
    ({"prompt_reward": -math.inf}, "prompt_reward must"), ({"attempts_budget": -1}, "must be >= 0 (0: none)"),
    ({"tokens_budget": -1}, "must be >= 0 (0: none)"), ({"rewards_budget": -(2**63)}, "must be >= 0 (0: none)"),
    ({"size": 0}, "size must be the sizeof"), ({"size": -1}, "size must be"),
    ({"size": ctypes.sizeof(STRUCTURES["stars_controller_params"]) + 8}, "size must be"),
    ({"size": ctypes.sizeof(STRUCTURES["stars_controller_params"]) - 8}, "size must be"),
])
def test_parameters_are_refused(changes, words):
    given = params(**{name: value for name, value in changes.items() if name != "size"})
    given.size = changes.get("size", given.size)
    assert loaded().stars_controller_open(ctypes.byref(given)) is None
    assert last_status() == INVALID and words in last_error() and last_error().startswith("stars_controller_open: ")


def test_no_parameters():
    assert loaded().stars_controller_open(None) is None
    assert last_status() == INVALID and "params must not be null" in last_error()


@pytest.mark.parametrize("changes", [
    {"alpha": 1.0, "prompt_reward": math.nan}, {"reward_threshold": math.inf, "prompt_reward": math.inf},
    {"reward_threshold": -math.inf, "prompt_reward": math.nan}, {"max_tokens": 2**20, "segment_size": 1},
    {"max_tokens": 2**31 - 1, "segment_size": 2**31 - 1}, {"max_tokens": 1, "segment_size": 2**31 - 1},
    {"max_attempts": 2**24 - 1}, {"sample": 4095}, {"beta": -0.0}, {"beta": 1e308}, {"seed": 2**64 - 1},
    {"attempts_budget": 2**63 - 1, "tokens_budget": 2**63 - 1, "rewards_budget": 2**63 - 1},
])
def test_parameters_at_their_bounds(changes):
    made = Raw(**changes)
    assert made.next(1) == 1 and made.feed(1.0, tokens=made.attempts[0].max_tokens) == OK
    assert made.library.stars_controller_close(made.handle) == OK


# -- calls out of order, and what they are given ----------------------------------------------------------------------


def test_next_is_refused(raw):
    library, handle, attempts = raw.library, raw.handle, raw.attempts
    raw.refused(lambda: raw.next(1), "feed those first")
    for capacity in (0, -1, -(2**63)):
        raw.refused(lambda: raw.next(capacity), "capacity at least 1")  # noqa: B023
    raw.refused(lambda: library.stars_controller_next(handle, None, 3), "attempts must not be null")
    assert raw.feed(0.0) == OK
    raw.refused(lambda: raw.next(1), "feed those first")
    assert raw.feed(5.0, first=2) == OK and raw.decision.verdict == ACCEPT
    raw.refused(lambda: raw.next(1), "commit it first")
    assert library.stars_controller_next(handle, attempts, 3) < 0


def test_feed_is_refused(raw):
    library, handle = raw.library, raw.handle
    good = ctypes.byref(sized("stars_decision"))
    raw.refused(lambda: raw.feed(math.nan), "a reward is NaN")
    raw.refused(lambda: raw.feed(math.inf), "a reward is +inf")
    raw.refused(lambda: raw.feed(0.0, 0.1, math.nan), "a reward is NaN")
    raw.refused(lambda: raw.feed(0.0, math.inf, math.nan), "a reward is +inf")
    raw.refused(lambda: raw.feed(0.0, 0.0, 0.0, 0.0), "more rewards than attempts")
    raw.refused(lambda: raw.feed(0.0, first=2), "rewards are out of order")
    raw.refused(lambda: raw.feed(0.0, first=0), "rewards are out of order")
    raw.refused(lambda: raw.feed(0.0, first=-(2**31)), "rewards are out of order")
    for tokens in (0, -1, 5, 2**31 - 1):
        raw.refused(lambda: raw.feed(0.0, tokens=tokens), "tokens must be between 1 and")  # noqa: B023
    raw.scored[0], raw.scored[1] = (0.0, 1, 4, 0), (0.0, 1, 4, 0)
    raw.refused(lambda: raw.feed_scored(2), "rewards are out of order")
    raw.scored[0], raw.scored[1] = (0.0, 2, 4, 0), (0.0, 1, 4, 0)
    raw.refused(lambda: raw.feed_scored(2), "rewards are out of order")
    raw.refused(lambda: raw.feed_scored(-1), "count must be >= 0")
    raw.refused(lambda: raw.feed_scored(2**62), "more rewards than attempts")
    raw.refused(lambda: library.stars_controller_feed(handle, None, 1, raw.notes, good), "scored not null")
    raw.refused(lambda: library.stars_controller_feed(handle, raw.scored, 1, raw.notes, None), "decision must not")
    for size in (0, -1, ctypes.sizeof(STRUCTURES["stars_decision"]) + 4):
        decision = STRUCTURES["stars_decision"](size=size, winner=77)
        raw.refused(lambda: raw.feed(0.0, decision=decision), "size must be the sizeof")  # noqa: B023
        assert decision.winner == 77
    refused = sized("stars_decision", verdict=77, winner=77, best=77, read=77)
    raw.refused(lambda: raw.feed(0.0, math.nan, decision=refused), "a reward is NaN")
    assert (refused.verdict, refused.winner, refused.best, refused.read) == (77,) * 4
    assert raw.feed(0.5, 0.6, 0.0) == OK and (raw.decision.verdict, raw.decision.best) == (RETRY, 2)
    raw.refused(lambda: raw.feed(0.0, first=4), "more rewards than attempts")


def test_rewards_after_the_winner_may_be_anything(raw):
    """They were not computed, or are somebody's error; what they are in order and length is checked all the same."""
    assert raw.feed(5.0, math.nan) == OK
    assert (raw.decision.verdict, raw.decision.winner, raw.decision.read) == (ACCEPT, 1, 1)
    assert bytes(raw.notes[1]) == bytes(ctypes.sizeof(raw.notes[1])) and raw.notes[0].accepted
    raw.refused(lambda: raw.feed(0.0, first=4), "rewards are out of order")
    raw.refused(lambda: raw.feed(math.nan, first=3, tokens=5), "tokens must be between")
    assert raw.feed(math.inf, first=3) == OK and raw.decision.read == 0
    raw.refused(lambda: raw.feed(0.0, first=4), "more rewards than attempts")
    assert raw.commit() == OK
    out = raw.progress()
    assert (out.rewards, out.tokens_drawn, out.attempts_counted) == (3, 12, 1)  # the prompt's, 5.0 and +inf


def test_commit_is_refused(raw):
    raw.refused(raw.commit, "is not decided")
    assert raw.feed(0.0, 0.1, 0.2) == OK and raw.decision.verdict == RETRY
    raw.refused(raw.commit, "is not decided")
    assert raw.next(8) == 2 and raw.feed(0.0, first=4) == OK
    raw.refused(raw.commit, "is not decided")
    assert raw.feed(0.1, first=5) == OK and (raw.decision.verdict, raw.decision.winner) == (FALLBACK, 3)
    assert raw.commit() == OK
    raw.refused(raw.commit, "is not decided")
    assert Raw().commit() == INVALID


def test_progress_is_refused(raw):
    library, handle = raw.library, raw.handle
    raw.refused(lambda: library.stars_controller_progress(handle, None), "out must not be null")
    for size in (0, -8, ctypes.sizeof(STRUCTURES["stars_progress"]) + 8):
        out = STRUCTURES["stars_progress"](size=size, tokens=77)
        raw.refused(lambda: library.stars_controller_progress(handle, ctypes.byref(out)), "size must be")  # noqa: B023
        assert out.tokens == 77


@pytest.mark.parametrize("end", ["stop", "length", "budget", "abort"])
def test_after_the_end(end):
    """Of every kind: nothing is drawn, fed or committed any more, and what was committed stays."""
    made = Raw(attempts_budget=2 if end == "budget" else 0)
    made.next(1)
    assert made.feed(9.0, ended=end == "stop") == OK and made.commit() == OK
    if end != "stop":
        assert made.next(1) == 1
        assert made.feed(9.0 if end == "length" else -9.0) == OK
        assert made.commit() == (OK if end == "length" else INVALID)
    if end == "abort":
        assert made.library.stars_controller_abort(made.handle) == OK
    assert made.next(1) == 0
    reason = {"stop": STOP, "length": LENGTH, "budget": BUDGET, "abort": ABORTED}[end]
    before, out = made.state(), made.progress()
    assert out.finish_reason == reason and out.tokens == (8 if end == "length" else 4)
    made.refused(lambda: made.feed(0.0, first=2), "the request has ended")
    made.refused(lambda: made.feed(), "the request has ended")
    made.refused(made.commit, "is not decided")
    for _ in range(2):
        assert made.next(8) == 0 and made.library.stars_controller_abort(made.handle) == OK
    assert made.state() == before


@pytest.mark.parametrize("fed", range(4))
def test_an_abort_counts_what_was_drawn(fed):
    """With the tokens that were said, or at most could be."""
    made = Raw()
    made.next(3)
    assert made.feed(*[0.0] * fed, tokens=2) == OK
    assert made.library.stars_controller_abort(made.handle) == OK
    out = made.progress()
    assert (out.attempts, out.tokens_drawn, out.rewards, out.tokens) == (3, 2 * fed + 4 * (3 - fed), 1 + fed, 0)
    assert (out.tried, out.verdict, out.finish_reason) == (0, UNDECIDED, ABORTED)


@pytest.mark.parametrize("budget, attempts", [
    ({"attempts_budget": 1}, 1), ({"attempts_budget": 4}, 4), ({"tokens_budget": 3}, 0), ({"tokens_budget": 4}, 1),
    ({"tokens_budget": 15}, 3), ({"rewards_budget": 1}, 0), ({"rewards_budget": 3}, 2),
    ({"rewards_budget": 2, "alpha": 1.0}, 2), ({"attempts_budget": 3, "tokens_budget": 8, "rewards_budget": 9}, 2),
])
@pytest.mark.parametrize("width", [1, 2, 8])
def test_a_budget_ends_the_request(budget, attempts, width):
    """Before a segment that is dear, and in the midst of one: what was drawn of that is dropped."""
    made = Raw(**budget)
    given = 0
    while (count := made.next(width)) > 0:
        assert made.feed(*[0.0] * count, first=given + 1) == OK
        given += count
    out = made.progress()
    assert (count, given, out.finish_reason, out.verdict, out.segments) == (0, attempts, BUDGET, UNDECIDED, 0)
    assert (out.attempts, out.tokens_drawn) == (attempts, 4 * attempts)


# -- handles ----------------------------------------------------------------------------------------------------------

CALLS = {
    "next": lambda library, handle: -library.stars_controller_next(handle, (STRUCTURES["stars_attempt"] * 1)(), 1),
    "feed": lambda library, handle: library.stars_controller_feed(handle, None, 0, None,
                                                                  ctypes.byref(sized("stars_decision"))),
    "commit": lambda library, handle: library.stars_controller_commit(handle),
    "abort": lambda library, handle: library.stars_controller_abort(handle),
    "progress": lambda library, handle: library.stars_controller_progress(handle,
                                                                          ctypes.byref(sized("stars_progress"))),
    "close": lambda library, handle: library.stars_controller_close(handle),
}
PROGRAM_CALLS = {
    "add": lambda library, handle: library.stars_program_add(handle, 0, None),
    "run": lambda library, handle: -library.stars_program_run(handle, 1, None, 0),
    "destroy": lambda library, handle: library.stars_program_destroy(handle),
}
KIND, INDEX, USES = 0xF, 0xFFFFF0, ~0xFFFFFF  # of a handle's bits


def told(call, handle, status, words):
    assert call(loaded(), handle) == status, last_error()
    assert words in last_error() and last_status() == status


@pytest.mark.parametrize("name", CALLS)
def test_a_handle_that_is_none(name):
    """NULL, closed, of a program, and such as nobody was given; one that is open is none the worse for it."""
    library, call = loaded(), CALLS[name]
    made = Raw()
    before = made.state()
    program = library.stars_program_create()
    closed = library.stars_controller_open(ctypes.byref(params()))
    assert library.stars_controller_close(closed) == OK
    told(call, None, INVALID, "must not be null")
    told(call, closed, CLOSED, "was closed before")
    told(call, program, CLOSED, "no handle of such an object")
    own = made.handle
    forged = [own + (1 << 24), own - (1 << 24), own ^ 1 << 63, own ^ 15 << 20, (own & ~KIND) | 15, own & ~KIND,
              (1 << 24) | INDEX | (own & KIND), 2, 2**64 - 1, own & KIND, own & ~USES]
    for handle in forged:
        told(call, handle, CLOSED, "handle")
    for index in range(64):  # of slots that are open, free, and were never used, with uses past and to come
        for uses in range(1, 5):
            handle = uses << 24 | (own >> 4 & 0xFFC00 | 512 + index) << 4 | own & KIND
            told(call, handle, CLOSED, "was closed before")
    reopened = library.stars_controller_open(ctypes.byref(params()))
    assert reopened != closed
    told(call, closed, CLOSED, "was closed before")
    assert made.state() == before
    for handle in (made.handle, reopened):
        assert library.stars_controller_close(handle) == OK
    assert library.stars_program_destroy(program) == OK


@pytest.mark.parametrize("name", PROGRAM_CALLS)
def test_a_handle_that_is_no_program(name):
    library, call = loaded(), PROGRAM_CALLS[name]
    made, program = Raw(), library.stars_program_create()
    assert library.stars_program_destroy(program) == OK
    told(call, program, CLOSED, "was closed before")
    told(call, made.handle, CLOSED, "no handle of such an object")
    told(call, (program + (1 << 24)), CLOSED, "was closed before")
    if name == "destroy":
        assert call(library, None) == OK  # as free
    else:
        told(call, None, INVALID, "must not be null")
    assert made.next(1) == 1 and library.stars_controller_close(made.handle) == OK


def test_no_handle_comes_twice():
    """Slots are used again, handles are not."""
    library, seen = loaded(), set()
    for _ in range(300):
        some = [library.stars_controller_open(ctypes.byref(params())) for _ in range(7)]
        assert len(set(some)) == 7 and not seen & set(some)
        seen.update(some)
        for handle in reversed(some):
            assert library.stars_controller_close(handle) == OK
        told(CALLS["close"], some[0], CLOSED, "was closed before")


def test_many_are_open_at_once():
    """More than the table begins with; all of them find their own."""
    library = loaded()
    handles = [library.stars_controller_open(ctypes.byref(params(seed=seed))) for seed in range(3000)]
    attempts = (STRUCTURES["stars_attempt"] * 1)()
    for seed, handle in enumerate(handles):
        assert library.stars_controller_next(handle, attempts, 1) == 1 and attempts[0].seed == seed
    assert [library.stars_controller_close(handle) for handle in handles] == [OK] * len(handles)


def test_a_program_at_work_is_busy():
    """While another thread runs it: it can be neither run, nor filled, nor destroyed. It works on undisturbed."""
    library = loaded()
    program = library.stars_program_create()
    x = (ctypes.c_float * 4096)()
    scale = STRUCTURES["stars_rescale_params"](size=ctypes.sizeof(STRUCTURES["stars_rescale_params"]),
                                               x=ctypes.addressof(x), rows=1, width=4096, scale=1.0, softcap=0.0)
    rescale = HEADER.constants["STARS_OP_RESCALE"]
    assert library.stars_program_add(program, rescale, ctypes.byref(scale)) == OK
    ran = []
    done = (ctypes.c_int32 * 1)()  # runs until this is set
    worker = threading.Thread(
        target=lambda: ran.append(library.stars_program_run(program, 2**31 - 1, done, 1)))
    worker.start()
    try:
        while (status := library.stars_program_add(program, 99, None)) != BUSY:
            assert status == INVALID
        told(PROGRAM_CALLS["run"], program, BUSY, "another thread is at work")
        told(PROGRAM_CALLS["destroy"], program, BUSY, "another thread is at work")
    finally:
        done[0] = 1
        worker.join()
    assert ran[0] > 0 and library.stars_program_destroy(program) == OK


def test_errors_belong_to_threads():
    library = loaded()
    library.stars_controller_close(None)
    said = []
    worker = threading.Thread(target=lambda: said.append((last_error(), last_status())))
    worker.start()
    worker.join()
    assert said == [("", OK)] and "stars_controller_close" in last_error()


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, 0, -1, 2**31 - 1, -(2**31)])
def test_another_version_is_refused(version):
    assert loaded().stars_check_version(VERSION) == OK
    assert loaded().stars_check_version(version) == INVALID
    assert str(version) in last_error() and str(VERSION) in last_error() and "compile the program again" in last_error()


# -- the binding ------------------------------------------------------------------------------------------------------


def test_the_binding_says_what_is_wrong():
    with pytest.raises(ValueError, match="beta must be a finite number"):
        Controller(max_tokens=8, reward_threshold=0.0, beta=-1.0)
    for name, value in itertools.product(("max_tokens", "sample", "tokens_budget"), (2**64 + 5, -(2**63) - 1)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            Controller(**{"max_tokens": 8, "reward_threshold": 0.0, name: value})
    made = Controller(max_tokens=8, reward_threshold=math.inf, segment_size=4, seed=-1, max_attempts=3)
    assert made.feed([]).verdict == Verdict.UNDECIDED and made.finish_reason is None
    for most in (0, -1):
        with pytest.raises(ValueError, match="capacity at least 1"):
            made.next(most)
    assert made.next(2**40) == [Drawn(2**64 - 1, attempt, 0, 4) for attempt in (1, 2, 3)]
    for wrong in (Fed(2**32 + 1, 4, False, 0.0), Fed(1, 2**32 + 4, False, 0.0)):
        with pytest.raises(ValueError, match="it must be a whole number of at most 32 bits"):
            made.feed([wrong])
    with pytest.raises(ValueError, match="a reward is NaN"):
        made.feed([Fed(1, 4, False, math.nan)])
    decided = made.feed([Fed(attempt, 4, False, float(attempt)) for attempt in (1, 2, 3)])
    assert (decided.verdict, decided.winner, len(decided.said)) == (Verdict.FALLBACK, 3, 3)
    made.commit()
    made.abort()
    assert made.finish_reason == "abort" and made.next(1) == []
    made.close()
    made.close()
    for call in (made.progress, made.commit, made.abort, lambda: made.next(1), lambda: made.feed([])):
        with pytest.raises(ValueError, match="was closed before"):
            call()
