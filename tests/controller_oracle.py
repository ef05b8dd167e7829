"""What libstars' segment controller must say, from the engine's own rule and a plan of its, and requests at random."""

from __future__ import annotations

import ctypes
import math
import random
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import stars
from stars import rules
from stars.bindings.layouts import HEADER, STRUCTURES
from stars.bindings.library import last_error, loaded
from stars.kernels.philox import KIND_ACCEPT, accept_uniform_reference, philox4x32, uniform

UNDECIDED, RETRY, ACCEPT, FALLBACK = (HEADER.constants[f"STARS_{name}"]
                                      for name in ("UNDECIDED", "RETRY", "ACCEPT", "FALLBACK"))
RUNNING, STOP, LENGTH, BUDGET = (HEADER.constants[f"STARS_{name}"] for name in ("RUNNING", "STOP", "LENGTH", "BUDGET"))
BORDER = 1e-9  # |log u - (r - tau) / beta| below which two libraries' logarithms may disagree
PROGRESS = struct.Struct("=d8q4i")  # stars_progress after its size
SEGMENTS, ATTEMPTS = 16, 20  # of a request whose uniforms are made beforehand


def sized(name: str, **values: Any) -> Any:
    """A struct of stars.h with its size, and these fields."""
    structure = STRUCTURES[name]
    return structure(size=ctypes.sizeof(structure), **values)


class Case(NamedTuple):
    """The parameters of a request, by the names of stars_controller_params."""

    seed: int
    reward_threshold: float
    beta: float
    alpha: float
    prompt_reward: float
    max_tokens: int
    segment_size: int
    max_attempts: int
    sample: int
    attempts_budget: int = 0
    tokens_budget: int = 0
    rewards_budget: int = 0


class Result(NamedTuple):
    """What a host says of an attempt."""

    reward: float
    attempt: int
    tokens: int
    ended: int


class Oracle:
    """A request, decided by the engine's rule for `stars.STARS`, with the budgets of DESIGN's words.

    `uniforms`: of the attempts of the first segments, float64 [SEGMENTS, ATTEMPTS], or None.
    """

    def __init__(self, case: Case, uniforms: np.ndarray | None = None):
        self.case = case
        plan = stars.STARS(case.segment_size, case.max_attempts, case.alpha, case.beta, case.reward_threshold).plan()
        assert isinstance(plan.decide, rules.Threshold)
        self.rule, self.uniforms = plan.decide, uniforms
        self.prompt_reward = case.prompt_reward if plan.score.prompt else None
        self.tokens = self.segments = self.accepted = self.fallbacks = self.counted = 0
        self.attempts = self.tokens_drawn = 0
        self.rewards = int(plan.score.prompt)
        self.reward, self.finish = 0.0, RUNNING
        self._begin()

    def _begin(self) -> None:
        self.drawn = 0
        self.fed: list[tuple[rules.Judged, Result]] = []
        self.scored = 0
        self.paid = 0
        self.verdict, self.winner = UNDECIDED, 0

    @property
    def length(self) -> int:
        """Most tokens of an attempt."""
        return min(self.case.segment_size, self.case.max_tokens - self.tokens)

    def next(self, capacity: int) -> list[tuple[int, int, int]]:
        """(attempt, stream, max_tokens) of each attempt of the round."""
        if self.finish != RUNNING:
            return []
        case = self.case
        count = min(capacity, case.max_attempts - self.drawn)
        if case.attempts_budget:
            count = min(count, case.attempts_budget - self.attempts)
        if case.rewards_budget:
            count = min(count, case.rewards_budget - self.rewards)
        if case.tokens_budget:
            count = min(count, (case.tokens_budget - self.tokens_drawn) // self.length)
        if count < 1:
            self.finish = BUDGET
            self._begin()
            return []
        first, self.drawn = self.drawn, self.drawn + count
        self.attempts += count
        self.verdict = UNDECIDED
        return [(first + i + 1, self.segments | case.sample << 20, self.length) for i in range(count)]

    def uniform(self, attempt: int) -> float:
        """Of the accept test."""
        if self.uniforms is not None and self.segments < SEGMENTS and attempt <= ATTEMPTS:
            return float(self.uniforms[self.segments, attempt - 1])
        return accept_uniform_reference(self.case.seed, attempt, self.segments, self.case.sample)

    def feed(self, results: Sequence[Result]) -> list[rules.Note]:
        """Notes of those that the rule has read."""
        read: list[rules.Note] = []
        state = rules.State(self.segments, 0, 0, self.case.max_attempts - self.drawn, self.case.max_tokens,
                            self.prompt_reward, 0, (0,), (), None)
        for result in results:
            if self.verdict not in (ACCEPT, FALLBACK):
                judged = rules.Judged(0, result.attempt, self.tokens + result.tokens, bool(result.ended), (), (), (),
                                      result.reward, None, (self.uniform(result.attempt),))
                decision = self.rule([judged], state)  # it reads every attempt by itself
                read.append(decision.notes[0, result.attempt])
                self.fed.append((judged, result))
                self.scored += 1
                if decision.keep:
                    self.verdict, self.winner = ACCEPT, decision.keep[0].attempt
                elif result.attempt == self.case.max_attempts:
                    self.verdict, self.winner = FALLBACK, self.best
            else:
                self.fed.append((self.fed[-1][0], result))
                self.scored += not math.isnan(result.reward)
        if self.verdict == UNDECIDED and self.drawn and len(self.fed) == self.drawn:
            self.verdict = RETRY
        if self.verdict == RETRY:
            self._pay()
        return read

    def _pay(self) -> None:
        self.tokens_drawn += sum(result.tokens for _, result in self.fed[self.paid:])
        self.tokens_drawn += (self.drawn - len(self.fed)) * self.length
        self.rewards += self.scored
        self.paid, self.scored = len(self.fed), 0

    @property
    def decided(self) -> bool:
        """Whether there is a winner."""
        return self.verdict in (ACCEPT, FALLBACK)

    @property
    def best(self) -> int:
        """The attempt of the best reward that the rule has read; 0: none."""
        return rules.best([judged for judged, _ in self.fed]).attempt if self.fed else 0

    def commit(self) -> None:
        """The winner becomes history."""
        self._pay()
        [result] = [result for _, result in self.fed if result.attempt == self.winner]
        accepted = self.verdict == ACCEPT
        self.segments += 1
        self.tokens += result.tokens
        self.accepted += accepted
        self.fallbacks += not accepted
        self.counted += self.winner if accepted else self.drawn
        self.reward = result.reward
        if result.ended:
            self.finish = STOP
        elif self.tokens >= self.case.max_tokens:
            self.finish = LENGTH
        self._begin()

    def progress(self) -> tuple:
        """The fields of stars_progress after its size."""
        return (self.reward, self.segments, self.tokens, self.accepted, self.fallbacks, self.counted, self.attempts,
                self.tokens_drawn, self.rewards, len(self.fed), self.verdict, self.finish, 0)


# -- requests at random -----------------------------------------------------------------------------------------------

REWARDS = (-math.inf, -math.inf, -0.0, 0.0, 1.0, 1.0, -1.0, -1.0, -2.0, -2.0, 2.0, 1e308, -1e308, -1.7e308, -1e15,
           5e-324, -5e-324, 1e-300)
THRESHOLDS = (math.inf, -math.inf, 0.0, -0.0, 1.0, 1.7e308, -1.7e308, 1e-300, 5e-324)
BETAS = (0.0, 0.0, 0.1, 0.7, 3.0, 1e-300, 5e-324, 1e300)
WIDTHS = (1, 2, 3, 4, 5, 8, 16, 24)
ALPHAS = (0.0, 1.0, 0.5, 0.2, 1e-17, 1.0 - 2.0**-53)


def any_case(chance: random.Random) -> Case:
    """Usual parameters and all edges mixed."""
    def mixed(edges: Sequence[float], usual: float) -> float:
        return chance.choice(edges) if chance.random() < 0.3 else usual

    threshold = mixed(THRESHOLDS, round(chance.gauss(1.2, 0.6), chance.choice((1, 15))))
    alpha = mixed(ALPHAS, chance.random())
    prompt_reward = mixed((0.0, 1.0, -1e308, 1.7e308, 5e-324), chance.gauss(0.0, 1.0))
    if alpha == 1.0 or math.isinf(threshold):  # not read
        prompt_reward = mixed((math.nan, math.inf, -math.inf), prompt_reward)
    max_tokens = chance.choice((1, 7, 20, 50, 128, 1000))
    segment_size = max(1, max_tokens // chance.choice((1, 2, 5, 12, 14, 14))) + chance.choice((0, 0, 1, 3))
    budgets = [chance.randint(1, most) if chance.random() < 0.1 else 0 for most in (100, 5 * max_tokens, 100)]
    return Case(chance.choice((0, 2**64 - 1, chance.getrandbits(64))), threshold, mixed(BETAS, chance.expovariate(4.0)),
                alpha, prompt_reward, max_tokens, segment_size, chance.choice((1, 2, 5, 8, 20, 20, 20, 20)),
                chance.choice((0, 4095, chance.randrange(4096))), *budgets)


def all_uniforms(cases: Sequence[Case]) -> np.ndarray:
    """float64 [cases, SEGMENTS, ATTEMPTS], of the generator that is written in numpy."""
    seeds, samples = (np.array([getattr(case, name) for case in cases], dtype=np.uint64)[:, None, None]
                      for name in ("seed", "sample"))
    segments = np.arange(SEGMENTS, dtype=np.uint64)[:, None]
    attempts = np.arange(1, ATTEMPTS + 1, dtype=np.uint64)
    counter = (0, 0, attempts | np.uint64(KIND_ACCEPT << 24), segments | samples << np.uint64(20))
    return uniform(philox4x32(counter, (seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)))[0])


class Compared(NamedTuple):
    """What a comparison has seen."""

    decisions: int  # attempts that the law has read
    accepted: int
    fallbacks: int
    budgets: int  # requests that a budget has ended
    border: int  # verdicts that differ within BORDER; the request is not followed further


class Driver:
    """Runs requests through the C interface beside the oracle, with structs that are used again and again."""

    ROOM = 32

    def __init__(self) -> None:
        self.library = loaded()
        self.attempts = (STRUCTURES["stars_attempt"] * self.ROOM)()
        self.scored = (STRUCTURES["stars_scored"] * self.ROOM)()
        self.notes = (STRUCTURES["stars_note"] * self.ROOM)()
        self.decision, self.progress = sized("stars_decision"), sized("stars_progress")

    def compare(self, case: Case, chance: random.Random, uniforms: np.ndarray | None = None) -> Compared:
        """One request, of which everything must be the same after each call; AssertionError says what is not."""
        library, oracle = self.library, Oracle(case, uniforms)
        handle = library.stars_controller_open(ctypes.byref(sized("stars_controller_params", **case._asdict())))
        assert handle, last_error()
        decisions, border = 0, 0
        while not border:
            width = WIDTHS[int(len(WIDTHS) * chance.random())]
            drawn = oracle.next(width)
            count = library.stars_controller_next(handle, self.attempts, width)
            assert [(one.seed, one.attempt, one.stream & 0xFFFFFFFF, one.max_tokens, one.reserved)
                    for one in self.attempts[:max(0, count)]] == [(case.seed, *one, 0) for one in drawn], case
            if not drawn:
                break
            while drawn and not border and not (oracle.decided and chance.random() < 0.8):
                count = len(drawn) if chance.random() < 0.6 else int((len(drawn) + 1) * chance.random())
                part = [self._result(oracle, attempt, length, chance) for attempt, _, length in drawn[:count]]
                drawn = drawn[count:]
                read, border = self._feed(handle, oracle, part)
                decisions += read
            if oracle.decided and not border:
                oracle.commit()
                assert library.stars_controller_commit(handle) == 0, last_error()
            assert border or self._progress(handle) == oracle.progress(), case
        assert library.stars_controller_close(handle) == 0
        return Compared(decisions, oracle.accepted, oracle.fallbacks, oracle.finish == BUDGET, border)

    def _result(self, oracle: Oracle, attempt: int, length: int, chance: random.Random) -> Result:
        tokens = length if chance.random() < 0.8 else 1 + int(length * chance.random())
        ended = chance.random() < 0.02
        kind = chance.random()
        if kind < 0.6:
            reward = 3.0 * chance.random() - 2.0
        elif kind < 0.8:
            reward = REWARDS[int(len(REWARDS) * chance.random())]
        else:  # at tau, or where log u is (r - tau) / beta, or a rounding beside it
            rule = oracle.rule
            start = rules.threshold_start(oracle.prompt_reward, rule.alpha, rule.reward_threshold)
            reward = rules.threshold(oracle.tokens + tokens, oracle.case.max_tokens, start, rule.reward_threshold)
            if kind < 0.9:
                reward += rule.beta * math.log(oracle.uniform(attempt))
            for towards in (-math.inf, math.inf, -math.inf)[int(4 * chance.random()):]:
                reward = math.nextafter(reward, towards)
            reward = min(reward, 1.7976931348623157e308)
        return Result(reward, attempt, tokens, int(ended))

    def _feed(self, handle: int, oracle: Oracle, part: list[Result]) -> tuple[int, int]:
        """(attempts that the law has read, whether a verdict differs at the border)."""
        if oracle.decided:
            part = [result._replace(reward=(math.nan, math.inf, result.reward)[result.attempt % 3]) for result in part]
        scored, notes = self.scored, self.notes
        for place, result in enumerate(part):
            scored[place] = result
        decision = self.decision
        status = self.library.stars_controller_feed(handle, scored, len(part), notes, ctypes.byref(decision))
        expected = oracle.feed(part)
        assert status == 0, (last_error(), oracle.case, part)
        for place, (note, result) in enumerate(zip(expected, part, strict=False)):
            ours = notes[place]
            if bool(ours.accepted) != note.accepted:
                assert self._at_the_border(oracle, note, result), (oracle.case, result, note)
                return place, 1
            assert (ours.threshold, ours.probability) == (note.threshold, note.probability), (oracle.case, result)
        assert (decision.verdict, decision.winner, decision.best, decision.read) == (
            oracle.verdict, oracle.winner, oracle.best, len(expected)), oracle.case
        for ours in notes[len(expected):len(part)]:
            assert (ours.threshold, ours.probability, ours.accepted, ours.reserved) == (0.0, 0.0, 0, 0)
        return len(expected), 0

    @staticmethod
    def _at_the_border(oracle: Oracle, note: rules.Note, result: Result) -> bool:
        beta, logarithm = oracle.case.beta, math.log(oracle.uniform(result.attempt))
        return beta > 0 and abs(logarithm - (result.reward - note.threshold) / beta) < BORDER

    def _progress(self, handle: int) -> tuple:
        out = self.progress
        assert self.library.stars_controller_progress(handle, ctypes.byref(out)) == 0
        return PROGRESS.unpack_from(out, 8)


def compare(decisions: int, seed: int) -> Compared:
    """Random requests until the law has read so many attempts."""
    chance, driver = random.Random(seed), Driver()
    totals = Compared(0, 0, 0, 0, 0)
    while totals.decisions < decisions:
        cases = [any_case(chance) for _ in range(100)]
        for case, uniforms in zip(cases, all_uniforms(cases), strict=True):
            seen = driver.compare(case, chance, uniforms)
            totals = Compared(*(one + other for one, other in zip(totals, seen, strict=True)))
    return totals
