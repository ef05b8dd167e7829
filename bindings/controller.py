"""The segment controller of libstars: one request of the law, for hosts that draft and score by themselves."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from stars.bindings.layouts import HEADER, STRUCTURES
from stars.bindings.library import check_status, last_status, loaded

_BITS_64 = 2**64 - 1
_ATTEMPT, _SCORED, _NOTE = (STRUCTURES[name] for name in ("stars_attempt", "stars_scored", "stars_note"))


def _enum(name: str, members: Sequence[str]) -> Any:
    return IntEnum(name, {member: HEADER.constants[f"STARS_{member}"] for member in members})


Verdict = _enum("Verdict", ("UNDECIDED", "RETRY", "ACCEPT", "FALLBACK"))
"""On a segment, as `stars_verdict`: feed more, ask for more, or commit the winner."""
FINISH_REASONS = {
    HEADER.constants["STARS_RUNNING"]: None, HEADER.constants["STARS_STOP"]: "stop",
    HEADER.constants["STARS_LENGTH"]: "length", HEADER.constants["STARS_BUDGET"]: "budget",
    HEADER.constants["STARS_ABORTED"]: "abort"}
"""What the engine calls a `stars_finish_reason`; None while the request runs."""


class Drawn(NamedTuple):
    """One attempt that is to be drawn, and its random numbers."""

    seed: int
    attempt: int  # from 1, over all rounds of the segment
    stream: int  # segment index | sample << 20, as counter word 3
    max_tokens: int


class Fed(NamedTuple):
    """What became of an attempt."""

    attempt: int
    tokens: int  # drawn for it, at least 1; an EOS counts
    ended: bool  # whether the response ends with it
    reward: float  # finite or -inf; of one after the winner NaN where it was not computed


class Said(NamedTuple):
    """What the law says of an attempt."""

    threshold: float
    probability: float
    accepted: bool


class Decided(NamedTuple):
    """What is known once results were fed."""

    verdict: Any  # Verdict
    winner: int  # its attempt; 0: none yet
    best: int  # the attempt of the best reward so far; 0: none
    said: list[Said]  # of the attempts that the law has read, the first of those that were fed


class Controller:
    """Attempts, rewards and decisions of one response, in the order: `next`, `feed`, and where it is decided `commit`.

    seed: any 64-bit number. reward_threshold, beta: in the reward's units. alpha: 0 to 1; prompt_reward: r(x), read
    unless alpha is 1 or the threshold infinite. sample: which of the responses to a prompt that share a seed. Budgets:
    of attempts, of tokens drawn and of rewards; 0: none. See "The segment controller" in stars.h.

    ValueError names what is out of range, what comes out of order, and a reward of NaN or +inf: nothing has changed
    then. RuntimeError where libstars was not built, or another thread is at work with it: it has one caller at a time.
    """

    def __init__(self, *, max_tokens: int, reward_threshold: float, seed: int = 0, beta: float = 0.7,
                 alpha: float = 0.5, prompt_reward: float = 0.0, segment_size: int = 16, max_attempts: int = 20,
                 sample: int = 0, attempts_budget: int = 0, tokens_budget: int = 0, rewards_budget: int = 0):
        self._open = False
        given = _sized("stars_controller_params")
        given.seed, given.reward_threshold, given.beta = seed & _BITS_64, reward_threshold, beta
        given.alpha, given.prompt_reward = alpha, prompt_reward
        for name, value in (("max_tokens", max_tokens), ("segment_size", segment_size), ("max_attempts", max_attempts),
                            ("sample", sample), ("attempts_budget", attempts_budget), ("tokens_budget", tokens_budget),
                            ("rewards_budget", rewards_budget)):
            setattr(given, name, _whole(name, value, 63))
        self._library = loaded()
        self._handle = self._library.stars_controller_open(ctypes.byref(given))
        if not self._handle:
            check_status(last_status())
        self._open = True
        self._max_attempts = max_attempts
        self._decision = _sized("stars_decision")
        self._room = -1
        self._make_room(0)

    def next(self, most: int) -> list[Drawn]:
        """Up to `most` attempts of the round that begins; none where the request has ended (`finish_reason`)."""
        most = min(most, self._max_attempts)
        self._make_room(most)
        count = self._library.stars_controller_next(self._handle, self._attempts, most)
        if count < 0:
            check_status(-count)
        return [Drawn(one.seed, one.attempt, one.stream & 0xFFFFFFFF, one.max_tokens)
                for one in self._attempts[:count]]

    def feed(self, results: Sequence[Fed]) -> Decided:
        """Takes the results of the next attempts, in their order."""
        count = len(results)
        self._make_room(count)
        for place, one in enumerate(results):
            self._scored[place] = _SCORED(one.reward, _whole("attempt", one.attempt, 31),
                                          _whole("tokens", one.tokens, 31), bool(one.ended))
        decision = self._decision
        status = self._library.stars_controller_feed(self._handle, self._scored, count, self._notes,
                                                     ctypes.byref(decision))
        if status:
            check_status(status)
        return Decided(Verdict(decision.verdict), decision.winner, decision.best,
                       [Said(one.threshold, one.probability, bool(one.accepted))
                        for one in self._notes[:decision.read]])

    def commit(self) -> None:
        """The winner becomes history."""
        check_status(self._library.stars_controller_commit(self._handle))

    def abort(self) -> None:
        """Drops what was drawn of the segment; the request ends with what was committed."""
        check_status(self._library.stars_controller_abort(self._handle))

    def progress(self) -> Any:
        """The `stars_progress` of stars.h, as a structure of these fields."""
        out = _sized("stars_progress")
        check_status(self._library.stars_controller_progress(self._handle, ctypes.byref(out)))
        return out

    @property
    def finish_reason(self) -> str | None:
        """"stop", "length", "budget" or "abort"; None while the request runs."""
        return FINISH_REASONS[self.progress().finish_reason]

    def close(self) -> None:
        """Ends it; nothing else may be called then. A second call does nothing."""
        if self._open:
            check_status(self._library.stars_controller_close(self._handle))
            self._open = False

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self._library.stars_controller_close(self._handle)

    def _make_room(self, count: int) -> None:
        if count > self._room:
            self._attempts, self._scored, self._notes = ((kind * count)() for kind in (_ATTEMPT, _SCORED, _NOTE))
            self._room = count


def _whole(name: str, value: int, bits: int) -> int:
    """`value`, where it can be handed over: ctypes would cut off what is beyond."""
    if not -(1 << bits) <= value < 1 << bits:
        raise ValueError(f"{name} is {value}, it must be a whole number of at most {bits + 1} bits")
    return value


def _sized(name: str) -> Any:
    return STRUCTURES[name](ctypes.sizeof(STRUCTURES[name]))
