"""The laws of what is done where all attempts of a segment are rejected, by enumeration on the toy of law.py.

With p(c) the proposal, a(c) the probability of being accepted, R = sum p (1 - a), K attempts and q = p (1 - a) / R: a
segment is c, accepted, with probability p a (1 + R + … + R^(K-1)); all are rejected with probability R^K, and are then
K independent draws from q. Of these

- the first or the last is kept: q;
- softmax keeps c_i with probability exp(r_i / T) / sum_j exp(r_j / T), given the K draws;
- relax accepts c, after j others, at its k-th lowering with probability p (a_k - a_(k-1)) R_k^j R_(k-1)^(K-1-j): what
  came before it was not accepted at level k, what came after not at level k - 1, each tested with one uniform;
- refuse ends the response;
- back up takes the segment before back: a walk over (committed segments, segments taken back), each step drawn by
  itself, whose end is the response.

False positives: every p-value is compared with FALSE_POSITIVE_RATE / 11, as there are eleven cases: the file fails a
correct engine once in 1e6 choices of its seeds. With each planted error the same test of the same case must fail.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest

import law
import stars
import stars.judge
import stars.proposer
import stars.request
from law import DRAWS, FALSE_POSITIVE_RATE, REWARD, Prefix, candidates, content, p_value
from stars.exhaustions import BackUp, BestSeen, Relax, Softmax
from stars.plan import Lanes, Plan, Sampled, Score, Whole
from stars.rules import Decision, Judged, State, Threshold
from toy import EOS

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LIMIT = FALSE_POSITIVE_RATE / 11
SIZE, ATTEMPTS, ALPHA, BETA, TARGET = 2, 3, 0.2, 0.5, 3.5
TEMPERATURE, BY, TIMES = 0.4, 0.8, 2
GOOD, WARM = 1.3, 2.0  # a threshold and a temperature, of whole responses of at most two tokens
SHORT = 3  # max_tokens of responses of three segments of a token
HALF = DRAWS // 2  # draws of what needs no more


def walked(ids: Sequence[int]) -> float:
    """A segment of a token is accepted with probabilities about 0.7, more after an odd token than after an even one."""
    if not ids:
        return 1.0
    after = 0.0 if len(ids) == 1 else 0.05 if ids[-2] % 2 else -0.05
    return (2.05, 2.65, 3.3)[len(ids) - 1] + after + 0.019 * ids[-1]


class Case:
    """A policy with its exhaustion, what is drawn, and the law of what follows a prefix."""

    def __init__(self, exhaust, law_of: Callable[[Prefix], dict], draws: int, seed: int):
        self.policy = stars.STARS(SIZE, ATTEMPTS, ALPHA, BETA, TARGET, width=2, exhaust=exhaust)
        self.law, self.draws, self.seed = law_of, draws, seed

    def p(self, draws: int | None = None) -> float:
        """Draws, and the chi-square test of (segment, accepted, relaxed, which attempt where all had been rejected)."""
        params = stars.SamplingParams(max_tokens=law.MAX_TOKENS, n=draws or self.draws, seed=self.seed)
        return p_value(outcomes(law.draw(self.policy, params)), self.law)


def outcomes(outputs: Iterable[stars.CompletionOutput]) -> dict[Prefix, Counter]:
    """What followed each prefix; after the last segment of a refused response that it was refused."""
    seen: dict[Prefix, Counter] = defaultdict(Counter)
    for output in outputs:
        prefix: Prefix = ()
        for segment in output.segments:
            seen[prefix][tuple(segment.token_ids), segment.accepted, segment.relaxed,
                         segment.winner if segment.relaxed or not segment.accepted else None] += 1
            prefix += tuple(segment.token_ids)
        assert list(prefix) == output.token_ids
        if output.finish_reason == "refused":
            assert output.error is None
            seen[prefix]["refused"] += 1
    return seen


@functools.cache
def judged(prefix: Prefix, size: int = SIZE, max_tokens: int = law.MAX_TOKENS, levels: int = 0,
           reward: Callable[[Sequence[int]], float] = REWARD) -> list[tuple]:
    """(segment, probability, reward, probability of being accepted at each level) of all that can follow."""
    r0 = (1 - ALPHA) * reward([]) + ALPHA * TARGET
    found = []
    for segment, probability in candidates(prefix, min(size, max_tokens - len(prefix)), stars.SamplingParams()):
        score = reward(content(prefix + segment))
        tau = min(TARGET, r0 + (len(prefix) + len(segment)) / max_tokens * (TARGET - r0))
        found.append((segment, probability, score, [min(1.0, math.exp((score - tau + level * BY) / BETA))
                                                    for level in range(levels + 1)]))
    return found


def accepted_law(known: Sequence[tuple], attempts: int = ATTEMPTS) -> tuple[dict, float, dict]:
    """(law of what is accepted, probability that nothing is, law q of a rejected attempt)."""
    rejected = sum(p * (1 - a[0]) for _, p, _, a in known)
    tries = sum(rejected**k for k in range(attempts))
    return ({(segment, True, 0, None): p * a[0] * tries for segment, p, _, a in known}, rejected**attempts,
            {segment: p * (1 - a[0]) / rejected for segment, p, _, a in known} if rejected else {})


def place_law(winner: int) -> Callable[[Prefix], dict]:
    """First or last: the attempt of that place is kept."""
    def of(prefix: Prefix) -> dict:
        law_of, none, q = accepted_law(judged(prefix))
        return law_of | {(segment, False, 0, winner): none * probability for segment, probability in q.items()}

    return of


@functools.cache
def softmax_law(prefix: Prefix) -> dict:
    """Sums over the two other attempts; the place of what is kept is any with equal probability."""
    law_of, none, q = accepted_law(judged(prefix))
    rewards = {segment: reward for segment, _, reward, _ in judged(prefix)}
    odds, weight = np.array([*q.values()]), np.exp([rewards[segment] / TEMPERATURE for segment in q])
    assert ATTEMPTS == 3
    together = odds[:, None] * odds  # of the two others
    kept = [none * one * float((together * own / (own + weight[:, None] + weight)).sum())
            for one, own in zip(odds, weight, strict=True)]  # the three places, each with a third of this
    return law_of | {(segment, False, 0, place): probability
                     for segment, probability in zip(q, kept, strict=True) for place in range(ATTEMPTS)}


@functools.cache
def relax_law(prefix: Prefix) -> dict:
    """Then, where nothing is accepted at the last level either, the last is kept."""
    known = judged(prefix, levels=TIMES)
    law_of, _, _ = accepted_law(known)
    rejected = [sum(p * (1 - a[level]) for _, p, _, a in known) for level in range(TIMES + 1)]
    for level in range(1, TIMES + 1):
        for place in range(ATTEMPTS):
            others = rejected[level] ** place * rejected[level - 1] ** (ATTEMPTS - 1 - place)
            law_of |= {(segment, True, level, place): p * (a[level] - a[level - 1]) * others
                       for segment, p, _, a in known}
    last = rejected[TIMES] ** (ATTEMPTS - 1)
    return law_of | {(segment, False, TIMES, ATTEMPTS - 1): p * (1 - a[TIMES]) * last for segment, p, _, a in known}


def refuse_law(prefix: Prefix) -> dict:
    law_of, none, _ = accepted_law(judged(prefix))
    return law_of | {"refused": none}


CASES = {
    "first": Case("first", place_law(0), HALF, seed=41), "last": Case("last", place_law(ATTEMPTS - 1), HALF, seed=42),
    "softmax": Case(Softmax(TEMPERATURE), softmax_law, DRAWS, seed=43),
    "relax": Case(Relax(BY, TIMES, "last"), relax_law, HALF, seed=44), "refuse": Case("refuse", refuse_law, HALF, 45),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_follows_its_law(name):
    assert (p := CASES[name].p()) > LIMIT, p


# -- back up ------------------------------------------------------------------------------------------------------


class Walk:
    """Segments of one token, three at most, of which `times` may be taken back; then the best seen is kept."""

    def __init__(self, times: int, attempts: int, draws: int, seed: int):
        self.times, self.attempts, self.draws, self.seed = times, attempts, draws, seed
        self.policy = stars.STARS(1, attempts, ALPHA, BETA, TARGET, attempts, BackUp(times))
        self.known: dict[tuple, dict] = {}

    def p(self, draws: int | None = None) -> float:
        """The chi-square test of whole responses, with what of each was accepted and how often it went back.

        All attempts of a segment are drawn at once: of a response that went back once, two segments more.
        """
        params = stars.SamplingParams(max_tokens=SHORT, n=draws or self.draws, seed=self.seed)
        seen: Counter = Counter()
        for output in law.draw(self.policy, params, walked):
            segments = tuple((segment.token_ids[0], segment.accepted) for segment in output.segments)
            drawn, odd = divmod(output.metrics.attempts, self.attempts)
            assert not odd and output.metrics.segments == len(segments)
            seen[segments, (drawn - len(segments)) / 2] += 1
        return p_value({(): seen}, lambda prefix: self.ends((), 0))

    def ends(self, committed: tuple, back: int) -> dict:
        """The law from here on of (token, accepted) of each segment, and of how often one was taken back."""
        if (committed, back) in self.known:
            return self.known[committed, back]
        tokens = tuple(token for token, _ in committed)
        if len(tokens) == SHORT or EOS in tokens:
            return {(committed, back): 1.0}
        known = judged(tokens, 1, SHORT, reward=walked)
        accepted, none, q = accepted_law(known, self.attempts)
        steps = [(probability, (*committed, (segment[0], True)), back)
                 for (segment, *_), probability in accepted.items()]
        if committed and back < self.times:
            steps.append((none, committed[:-1], back + 1))
        else:  # rewards differ, so that c is the best of K draws from q with P(all at most c) - P(all below c)
            rewards = {segment: reward for segment, _, reward, _ in known}
            for segment in q:
                below = sum(q[other] for other in q if rewards[other] < rewards[segment])
                best = (below + q[segment]) ** self.attempts - below**self.attempts
                steps.append((none * best, (*committed, (segment[0], False)), back))
        total: dict = defaultdict(float)
        for probability, then, taken in steps:
            for end, rest in self.ends(then, taken).items():
                total[end] += probability * rest
        self.known[committed, back] = total
        return total


WALKS = {"back up once": Walk(1, attempts=2, draws=HALF, seed=46),
         "back up twice": Walk(2, attempts=1, draws=HALF, seed=47),
         "back up four times": Walk(4, attempts=1, draws=HALF, seed=49)}


@pytest.mark.parametrize("name", WALKS)
def test_what_is_drawn_anew_follows_its_law(name):
    assert (p := WALKS[name].p()) > LIMIT, p


# -- whole responses ----------------------------------------------------------------------------------------------


class Constant:
    """The first whole response whose reward is at least GOOD."""

    in_order, uniforms = False, 0

    def __call__(self, ones: Sequence[Judged], state: State) -> Decision | None:
        for one in ones:
            if one.reward >= GOOD:
                others = [other.hypothesis for other in ones if other is not one]
                return Decision([stars.rules.whole(one)], others,
                                {(one.hypothesis, 1): stars.rules.Note(GOOD, None, True)})
        return None


class Wholes:
    """Three whole responses, and what is done where none is good enough."""

    def __init__(self, exhaust):
        self.exhaust = exhaust

    def plan(self) -> Plan:
        return Plan(Sampled(), Whole(4), Lanes(1, population=3), Score("end"), Constant(), self.exhaust)


def whole_law(exhaust: str) -> dict:
    """Of responses of at most two tokens."""
    known = [(segment, p, REWARD(content(segment))) for segment, p in candidates((), 2, stars.SamplingParams())]
    rejected = {segment: p for segment, p, reward in known if reward < GOOD}
    bad = sum(rejected.values())
    law_of = {segment: p * (1 + bad + bad**2) for segment, p, reward in known if reward >= GOOD}
    if exhaust == "refuse":
        return law_of | {(): bad**3}
    weight = {segment: math.exp(REWARD(content(segment)) / WARM) for segment in rejected}
    for segment in rejected:
        law_of[segment] = rejected[segment] * bad**2
        if exhaust != "last":
            law_of[segment] = sum(
                3 * rejected[segment] * rejected[one] * rejected[other] * weight[segment] / (
                    weight[segment] + weight[one] + weight[other]) for one in rejected for other in rejected)
    return law_of


def whole_p(exhaust: str, draws: int = HALF) -> float:
    params = stars.SamplingParams(max_tokens=2, n=draws, seed=48)
    outputs = law.draw(Wholes(f"softmax:{WARM}" if exhaust == "softmax" else exhaust), params)
    for output in outputs:
        assert (output.finish_reason == "refused") == (not output.token_ids), "a refused response has a text"
        assert output.finish_reason != "refused" or output.reward is None
    return p_value(law.responses(outputs), lambda prefix: whole_law(exhaust))


@pytest.mark.parametrize("exhaust", ["last", "softmax", "refuse"])
def test_whole_responses_follow_their_law(exhaust):
    assert (p := whole_p(exhaust)) > LIMIT, p


# -- planted errors -----------------------------------------------------------------------------------------------


def best_instead(monkeypatch):
    """The best is kept, whatever the plan says."""
    settle = stars.request.Request.__post_init__

    def settled(self):
        settle(self)
        self.pick = BestSeen()
        self.exhaust = (*self.exhaust[:-1], self.pick)

    monkeypatch.setattr(stars.request.Request, "__post_init__", settled)


def without_temperature(monkeypatch):
    """exp(r) instead of exp(r / T)."""
    key = Softmax.key
    monkeypatch.setattr(Softmax, "key", lambda self, *given: key(Softmax(1.0), *given))


def one_uniform_for_all(monkeypatch):
    """The noise of the first attempt is that of all."""
    uniform = stars.judge.exhaust_uniform
    monkeypatch.setattr(stars.judge, "exhaust_uniform", lambda seed, attempt, *place: uniform(seed, 1, *place))


def not_lowered(monkeypatch):
    """The rule is asked again as it was."""
    call = Threshold.__call__
    monkeypatch.setattr(Threshold, "__call__", lambda self, ones, state: call(self, ones, state._replace(lowered=0.0)))


def lowered_once(monkeypatch):
    """The second time lowers by as much as the first."""
    call = Threshold.__call__
    monkeypatch.setattr(Threshold, "__call__", lambda self, ones, state: call(
        self, ones, state._replace(lowered=min(state.lowered, BY))))


def last_accepted(monkeypatch):
    """Of attempts that a lowered threshold accepts the last is kept."""
    call = Threshold.__call__

    def backwards(self, ones, state):
        return call(self, ones[::-1] if state.relaxed else ones, state)

    monkeypatch.setattr(Threshold, "__call__", backwards)


def relaxed_too_soon(monkeypatch):
    """The threshold is lowered from the first attempt on."""
    shown = stars.judge.shown
    monkeypatch.setattr(stars.judge, "shown", lambda group, *given: (
        lambda judged, state: (judged, state._replace(lowered=max(state.lowered, BY / 2))))(*shown(group, *given)))


def once_less(monkeypatch):
    """max_attempts is one less."""
    settle = stars.request.Request.__post_init__

    def settled(self):
        settle(self)
        self.attempts = tuple(count - 1 for count in self.attempts)

    monkeypatch.setattr(stars.request.Request, "__post_init__", settled)


def draws_repeated(monkeypatch):
    """A segment that is drawn anew draws what it drew."""
    monkeypatch.setattr(stars.request.Hypothesis, "skipped", 0)


def uniforms_repeated(monkeypatch):
    """Its attempts, of which there is one, are tested with the uniforms that they had."""
    uniform = stars.judge.accept_uniform
    monkeypatch.setattr(stars.judge, "accept_uniform", lambda seed, attempt, *place: uniform(
        seed, 1, *place))


def tokens_repeated(monkeypatch):
    """Its attempts, of which there is one, have new uniforms and the old tokens."""
    spec = stars.proposer.LaneSpec
    monkeypatch.setattr(stars.proposer, "LaneSpec", lambda *given, **named: spec(
        *given[:5], 1, *given[6:], **named))


def one_more(monkeypatch):
    """A segment more may be taken back than was said."""
    settle = stars.request.Request.__post_init__

    def settled(self):
        settle(self)
        self.exhaust = tuple(BackUp(step.times + 1, step.then) if isinstance(step, BackUp) else step
                             for step in self.exhaust)

    monkeypatch.setattr(stars.request.Request, "__post_init__", settled)


def two_at_once(monkeypatch):
    """The segment before the newest is taken back, too."""
    take_back = stars.request.Hypothesis.take_back

    def twice(self):
        take_back(self)
        if self.segments:
            take_back(self)
            self.backups -= 1

    monkeypatch.setattr(stars.request.Hypothesis, "take_back", twice)


ERRORS = [
    ("first", best_instead), ("last", best_instead), ("softmax", best_instead), ("softmax", without_temperature),
    ("softmax", one_uniform_for_all), ("relax", best_instead), ("relax", not_lowered), ("relax", lowered_once),
    ("relax", last_accepted), ("relax", relaxed_too_soon), ("refuse", once_less), ("back up once", one_more),
    ("back up once", draws_repeated), ("back up twice", draws_repeated), ("back up twice", tokens_repeated),
    ("back up four times", uniforms_repeated), ("back up twice", two_at_once),
]


SLOW = [("last", best_instead), ("relax", best_instead), ("softmax", best_instead), ("relax", relaxed_too_soon),
        ("back up once", draws_repeated), ("back up twice", two_at_once)]
"""Of which others are enough for every day."""


@pytest.mark.parametrize("name, error", [
    pytest.param(name, error, marks=pytest.mark.slow if (name, error) in SLOW else (),
                 id=f"{name}-{error.__name__}") for name, error in ERRORS])
def test_a_planted_error_is_seen(name, error, monkeypatch):
    """The same case and seed as above, where the engine passes."""
    error(monkeypatch)
    assert (p := (CASES | WALKS)[name].p()) <= LIMIT, p


@pytest.mark.parametrize("error", [law.noise_reused, law.lanes_in_wrong_order])
def test_an_error_of_the_loop_is_seen_by_every_case(error, monkeypatch):
    """In fewer draws. Where a segment has one attempt, repeated noise is that of `tokens_repeated`."""
    error(monkeypatch)
    found = {name: case.p(HALF // 2) for name, case in CASES.items()}
    found |= {"back up": WALKS["back up once"].p(HALF // 2), "wholes": whole_p("softmax", HALF // 2)}
    assert max(found.values()) <= LIMIT, found


@pytest.mark.parametrize("exhaust", ["softmax", "last"])
def test_a_planted_error_is_seen_in_whole_responses(exhaust, monkeypatch):
    best_instead(monkeypatch)
    assert (p := whole_p(exhaust)) <= LIMIT, p
