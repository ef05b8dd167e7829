"""The laws of methods that keep several responses alive, and of whole responses, by exact enumeration on the toy.

A population's law is enumerated jointly: every draw of every hypothesis, what the method makes of them, and so on to
the end, with responses of two to four tokens. What is compared is the completion, or, where each segment has a law of
its own, what followed each prefix. The enumeration is written from the methods' formulas and knows no slots, lanes or
random numbers; only systematic resampling depends on the order of particles, and so names the slot that a fork takes.

False positives: each test compares at most two p-values, with FALSE_POSITIVE_RATE / 2: it fails a correct engine once
in 1e6 choices of its seed. With each planted error below, the same case and the same seed must fail.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import pytest

import law
import stars
import stars.judge
from law import DRAWS, FALSE_POSITIVE_RATE, REWARD, Prefix, candidates, content, p_value
from stars import exhaustions, rules
from stars.bindings import libstars
from toy import EOS

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Law = dict[Prefix, float]
State = tuple[Prefix, ...]


def score(text: Prefix) -> float:
    """r of a response so far."""
    return REWARD(content(text))


def ended(text: Prefix, max_tokens: int) -> bool:
    return len(text) == max_tokens or EOS in text


# -- a population, enumerated -------------------------------------------------------------------------------------


class Grown(NamedTuple):
    """A hypothesis with one attempt at its next segment, or as it ended before."""

    text: Prefix
    parent: Prefix  # without the attempt; itself where it had ended before


@cache
def grown(text: Prefix, size: int, max_tokens: int) -> list[tuple[Grown, float]]:
    """Every attempt at its next segment with its probability, drawn from the model as it is."""
    if ended(text, max_tokens):
        return [(Grown(text, text), 1.0)]
    return [(Grown(text + segment, text), probability)
            for segment, probability in candidates(text, min(size, max_tokens - len(text)), stars.SamplingParams())]


def in_order(state: State, size: int, max_tokens: int, attempts: int) -> Iterator[tuple[list[Grown], float]]:
    """Everything that may be drawn, one attempt of each hypothesis, with its probability."""
    for drawn in itertools.product(*(grown(text, size, max_tokens) for text in state)):
        yield [one for one, _ in drawn], math.prod(p for _, p in drawn)


def in_any_order(state: State, size: int, max_tokens: int, attempts: int) -> Iterator[tuple[list[Grown], float]]:
    """The same of `attempts` of each, where neither the order of hypotheses nor that of attempts matters."""
    each = []
    for text, times in Counter(state).items():
        draws = times if ended(text, max_tokens) else times * attempts
        each.append([([one for one, _ in drawn], permutations(drawn) * math.prod(p for _, p in drawn))
                     for drawn in itertools.combinations_with_replacement(grown(text, size, max_tokens), draws)])
    for parts in itertools.product(*each):
        yield [one for drawn, _ in parts for one in drawn], math.prod(p for _, p in parts)


def permutations(chosen: Sequence) -> int:
    """In how many orders these may come."""
    return math.factorial(len(chosen)) // math.prod(math.factorial(n) for n in Counter(chosen).values())


def population_law(count: int, size: int, max_tokens: int, step: Callable[[list[Grown]], Iterator[tuple[State, float]]],
                   final: Callable[[State], Iterator[tuple[Prefix, float]]], attempts: int = 1,
                   ordered: bool = False, last: Callable | None = None) -> Law:
    """The law of the completion. step: what becomes of the population, with its probability, once all is drawn; final:
    the completion of responses that have all ended; last: both at once, where that is simpler. ordered: whether `step`
    depends on the order of hypotheses."""
    states: dict[State, float] = {((),) * count: 1.0}
    law_: Law = defaultdict(float)
    while any(not ended(text, max_tokens) for state in states for text in state):
        after: dict[State, float] = defaultdict(float)
        for state, chance in states.items():
            if all(ended(text, max_tokens) for text in state):
                after[state] += chance
                continue
            for drawn, probability in (in_order if ordered else in_any_order)(state, size, max_tokens, attempts):
                if last is not None and all(ended(one.text, max_tokens) for one in drawn):
                    for text, share in last(drawn):
                        law_[text] += chance * probability * share
                    continue
                for kept, share in step(drawn):
                    after[kept if ordered else tuple(sorted(kept))] += chance * probability * share
        states = after
    for state, chance in states.items():
        for text, share in final(state):
            law_[text] += chance * share
    return law_


def highest(state: Sequence[Prefix]) -> Iterator[tuple[Prefix, float]]:
    """The best of a population is its completion."""
    yield max(state, key=score), 1.0


def any_of(state: Sequence[Prefix]) -> Iterator[tuple[Prefix, float]]:
    """Each alike."""
    for text in state:
        yield text, 1 / len(state)


def best_of(count: Callable[[int], int]) -> Callable:
    """The best `count(m)` of m stay."""
    def step(drawn: list[Grown]) -> Iterator[tuple[State, float]]:
        texts = sorted((one.text for one in drawn), key=score, reverse=True)
        yield tuple(texts[: count(len(texts))]), 1.0

    return step


def shares(drawn: list[Grown], beta: float) -> list[float]:
    weights = [math.exp((score(one.text) - score(one.parent)) / beta) for one in drawn]
    return [weight / sum(weights) for weight in weights]


def any_drawn(beta: float) -> Callable:
    """One of the particles at random after both ways of resampling: each way draws each, on average, by its share."""
    def last(drawn: list[Grown]) -> Iterator[tuple[Prefix, float]]:
        yield from zip((one.text for one in drawn), shares(drawn, beta), strict=True)

    return last


def multinomial(beta: float) -> Callable:
    """As many particles as there are, each drawn by itself."""
    def step(drawn: list[Grown]) -> Iterator[tuple[State, float]]:
        merged: dict[Prefix, float] = defaultdict(float)
        for one, share in zip(drawn, shares(drawn, beta), strict=True):
            merged[one.text] += share
        for chosen in itertools.combinations_with_replacement(sorted(merged), len(drawn)):
            yield chosen, permutations(chosen) * math.prod(merged[text] for text in chosen)

    return step


def systematic(beta: float) -> Callable:
    """Particle i is drawn as often as a point of (u + j) / N lies in its stretch of [0, 1)."""
    def step(drawn: list[Grown]) -> Iterator[tuple[State, float]]:
        count = len(drawn)
        edges = [0.0, *itertools.accumulate(shares(drawn, beta))]
        breaks = sorted({0.0, 1.0, *((edge * count) % 1.0 for edge in edges[1:-1])})
        for low, high in itertools.pairwise(breaks):
            u = (low + high) / 2
            copies = [sum(edges[index] <= (u + j) / count < edges[index + 1] for j in range(count))
                      for index in range(count)]
            copies[-1] += count - sum(copies)  # edges[-1] is 1 but for rounding
            slots = [one.text if n else None for one, n in zip(drawn, copies, strict=True)]
            for one, n in zip(drawn, copies, strict=True):  # a fork takes the first free slot
                for _ in range(n - 1):
                    slots[slots.index(None)] = one.text
            yield tuple(slots), high - low

    return step


# -- whole responses and single segments --------------------------------------------------------------------------


def capped(options: dict[Prefix, float], accept: Callable[[Prefix], float], most: int) -> tuple[Law, dict[int, float]]:
    """(law of what is kept, law of the attempt that wins, 0 for none): the first accepted, or the best of `most`."""
    once = {text: p * accept(text) for text, p in options.items()}
    rejected = {text: p - once[text] for text, p in options.items()}
    again = sum(rejected.values())
    law_ = {text: p * sum(again**tried for tried in range(most)) for text, p in once.items()}
    for text, p in best_rewarded(rejected, most).items():
        law_[text] += p
    return law_, {tried: sum(once.values()) * again ** (tried - 1) for tried in range(1, most + 1)} | {0: again**most}


def best_rewarded(options: dict[Prefix, float], most: int) -> Law:
    """The best of `most` independent draws from `options`, whose sum may be below 1; no two have one reward."""
    law_, below = {}, 0.0
    for text in sorted(options, key=score):
        law_[text] = (below + options[text]) ** most - below**most
        below += options[text]
    return law_


def responses(max_tokens: int) -> dict[Prefix, float]:
    """Every whole response with its probability."""
    options = dict(candidates((), max_tokens, stars.SamplingParams()))
    assert len({score(text) for text in options}) == len(options)
    return options


# -- the cases ----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is drawn, and the law of each prefix' followers, or of the whole response."""

    policy: object
    max_tokens: int
    exact: Callable[[Prefix], Law]
    whole: bool = True  # whether `exact` is of whole responses, as what follows the empty prefix
    tries: Callable[[], dict[int, float]] | None = None  # law of the attempt that wins
    share: float = 0.25  # of DRAWS


def soft_best_of(n: int, temperature: float, max_tokens: int) -> Case:
    def exact(prefix: Prefix) -> Law:
        options = responses(max_tokens)
        weights = {text: math.exp(score(text) / temperature) for text in options}
        law_: Law = defaultdict(float)
        for texts in itertools.combinations_with_replacement(options, n):
            chance = permutations(texts) * math.prod(options[text] for text in texts)
            chance /= sum(weights[text] for text in texts)
            for text in texts:
                law_[text] += chance * weights[text]
        return law_

    return Case(stars.BestOfN(n, temperature), max_tokens, exact)


def rejection(width: int | None, beta: float = 0.5, threshold: float = 2.5, most: int = 4, max_tokens: int = 4,
              ) -> Case:
    def accept(text: Prefix) -> float:
        return (float(score(text) >= threshold) if beta == 0.0 else
                min(1.0, math.exp((score(text) - threshold) / beta)))

    def both() -> tuple[Law, dict[int, float]]:
        return capped(responses(max_tokens), accept, most)

    return Case(stars.RejectionSampling(threshold, beta, most, width), max_tokens, lambda prefix: both()[0],
                tries=lambda: both()[1])


def falling(k: tuple[int, ...], max_tokens: int = 5) -> Case:
    def exact(prefix: Prefix) -> Law:
        options = {text: p for (text, _), p in grown(prefix, 2, max_tokens)}
        best = best_rewarded(options, k[min(len(prefix) // 2, len(k) - 1)])
        return {text[len(prefix) :]: p for text, p in best.items()}

    return Case(stars.BlockwiseBestOfK(k, 2), max_tokens, exact, whole=False)


def particles(resampling: str, final: str, max_tokens: int, count: int = 3, beta: float = 0.6) -> Case:
    step = multinomial(beta) if resampling == "multinomial" else systematic(beta)
    end, last = (any_of, any_drawn(beta)) if final == "sample" else (highest, None)
    return Case(stars.ParticleFilter(count, beta, 1, resampling, final), max_tokens, lambda prefix: population_law(
        count, 1, max_tokens, step, end, ordered=resampling == "systematic", last=last))


CASES = {
    "soft best of 3": soft_best_of(3, 0.7, 3),
    "falling k": falling((5, 2, 1)),
    "rejection, width 1": rejection(1),
    "rejection, width 3": rejection(3, beta=1.5, threshold=3.5),
    "rejection, free width": rejection(None),
    "rejection, hard": rejection(2, beta=0.0, threshold=2.0),
    "speculative rejection": Case(
        stars.SpeculativeRejection(4, 0.4, 1), 4, lambda prefix: population_law(
            4, 1, 4, best_of(lambda m: max(1, round(0.6 * m))), highest), share=0.5),
    "speculative rejection, segments of 2": Case(
        stars.SpeculativeRejection(3, 0.5, 2), 4, lambda prefix: population_law(
            3, 2, 4, best_of(lambda m: max(1, round(0.5 * m))), highest)),
    "beam": Case(stars.SegmentBeam(2, 3, 1), 3, lambda prefix: population_law(
        2, 1, 3, best_of(lambda m: 2), highest, attempts=3)),
    "particles, sample": particles("multinomial", "sample", 2, count=4, beta=0.4),
    "particles, best": particles("multinomial", "best", 3, count=2),
    "systematic, sample": particles("systematic", "sample", 2),
    "systematic, best": particles("systematic", "best", 2),
}
CASES |= {f"{name}, many draws": CASES[case]._replace(share=share) for name, case, share in (
    ("beam", "beam", 1.0), ("particles", "particles, sample", 1.0), ("systematic", "systematic, sample", 1.0))}
CASES |= {"best of 3": Case(stars.BestOfN(3), 3, lambda prefix: best_rewarded(responses(3), 3)),
          "constant k": falling((3,))._replace(policy=stars.BlockwiseBestOfK(3, 2))}
"""`round` in the laws is that of the formula, halves to even, as the rows' docstrings have it."""


def parameters(name: str) -> stars.SamplingParams:
    return stars.SamplingParams(max_tokens=CASES[name].max_tokens, n=1, seed=300 + 7 * list(CASES).index(name))


@cache
def exact_law(name: str, prefix: Prefix) -> Law:
    return CASES[name].exact(prefix)


def p_values(name: str) -> list[float]:
    case = CASES[name]
    count = int(DRAWS * case.share)
    population = case.policy.plan().lanes.population
    requests = math.ceil(count * population / 4096)
    params = dataclasses.replace(parameters(name), n=count // requests)
    outputs = law.draw(case.policy, params, requests=requests, max_segment_size=16)
    observed = law.responses(outputs) if case.whole else law.followers(outputs)
    p = [p_value(observed, lambda prefix: exact_law(name, prefix))]
    if case.tries is not None:
        won = Counter(segment.winner + 1 if segment.accepted else 0 for one in outputs for segment in one.segments)
        p.append(p_value({(): won}, lambda prefix: case.tries()))
    return p


# -- planted errors -----------------------------------------------------------------------------------------------


def replaced(rule: type, answer: Callable) -> Callable:
    """Plants `answer(rule, judged, state)` in place of what the rule says once it may decide."""
    def plant(monkeypatch):
        call = rule.__call__
        monkeypatch.setattr(rule, "__call__", lambda self, judged, state: (
            answer(self, judged, state) if not state.left or self.in_order else call(self, judged, state)))

    plant.__name__ = answer.__name__
    return plant


def changed(rule: type, **fields) -> Callable:
    """Plants other numbers than the policy's."""
    def plant(monkeypatch):
        call = rule.__call__
        monkeypatch.setattr(rule, "__call__", lambda self, judged, state: call(
            dataclasses.replace(self, **{name: change(getattr(self, name)) for name, change in fields.items()}),
            judged, state))

    plant.__name__ = f"another {', '.join(fields)}"
    return plant


def kept(judged: Sequence[rules.Judged], state: rules.State) -> rules.Decision:
    """A decision that keeps these attempts, of the group that `state` is of."""
    slots = {one.hypothesis for one in judged}
    return rules.Decision([rules.whole(one) for one in judged], [slot for slot in state.live if slot not in slots])


def by_reward(judged: Sequence[rules.Judged]) -> list[rules.Judged]:
    return sorted(judged, key=lambda one: -one.reward)


def the_best(rule, judged, state) -> rules.Decision:
    """The highest reward wins."""
    return kept(by_reward(judged)[:1], state)


def the_worst(rule, judged, state) -> rules.Decision:
    """The best are dropped."""
    return kept(by_reward(judged)[-2:], state)


def one_each(rule, judged, state) -> rules.Decision:
    """Every hypothesis' own best attempt."""
    groups = defaultdict(list)
    for one in judged:
        groups[one.hypothesis].append(one)
    return kept([rules.best(ones) for ones in groups.values()], state)


def finished_stay(rule, judged, state) -> rules.Decision:
    """Responses that have ended are not ranked."""
    over, others = ([one for one in by_reward(judged) if one.finished == finished] for finished in (True, False))
    if isinstance(rule, rules.Highest):
        return kept([*over, *others][: rule.count], state)
    return kept([*over, *others[: max(1, round((1 - rule.alpha) * len(others)))]], state)


def without_parents(monkeypatch):
    """Particles weigh exp(r / beta)."""
    call = rules.Resample.__call__
    monkeypatch.setattr(rules.Resample, "__call__", lambda self, judged, state: call(
        self, [one._replace(parent_reward=None) for one in judged], state))


def finished_vanish(monkeypatch):
    """What had ended is never drawn again, if anything else can be."""
    call = rules.Resample.__call__
    monkeypatch.setattr(rules.Resample, "__call__", lambda self, judged, state: call(self, [
        one._replace(parent_reward=1e6) if one.attempt == rules.EARLIER else one for one in judged], state))


def best_at_the_end(monkeypatch):
    """The best particle is the completion, not one at random."""
    monkeypatch.setattr(rules.Resample, "final", lambda self, judged, state: kept([rules.best(judged)], state))


def best_ended(rule, judged, state) -> rules.Decision:
    """The best of the accepted wins, not the first: those that ended later are waited for."""
    if state.left:
        return rules.Decision([])
    accepted = [one for one in judged if rules.accepts(one.uniforms[0], one.reward, rule.reward_threshold, rule.beta)]
    return kept([rules.best(accepted)], state) if accepted else rules.Decision([])


def one_uniform(monkeypatch):
    """All responses of a completion are tested with one random number."""
    uniform = stars.judge.accept_uniform
    monkeypatch.setattr(stars.judge, "accept_uniform", lambda seed, attempt, segment, sample: uniform(
        seed, attempt, segment, sample // 4 * 4))


def first_on_exhaustion(monkeypatch):
    """The first response is kept where all are rejected."""
    monkeypatch.setattr(exhaustions.BestSeen, "key", exhaustions.First.key)


def last_attempts_everywhere(monkeypatch):
    """Every segment has as many attempts as the first."""
    monkeypatch.setattr(stars.request.Hypothesis, "attempts_left", property(
        lambda self: self.request.attempts[0] - len(self.attempts)))


PLANTED = [
    ("best of 3", law.noise_reused), ("best of 3", law.lanes_in_wrong_order),
    ("soft best of 3", law.noise_reused), ("soft best of 3", law.lanes_in_wrong_order),
    ("soft best of 3", replaced(rules.SoftArgmax, the_best)),
    ("falling k", law.noise_reused), ("falling k", law.lanes_in_wrong_order), ("falling k", last_attempts_everywhere),
    ("rejection, width 3", law.noise_reused), ("rejection, width 3", law.lanes_in_wrong_order),
    ("rejection, width 3", replaced(rules.FirstAccepted, best_ended)), ("rejection, width 3", one_uniform),
    ("rejection, hard", first_on_exhaustion),
    ("speculative rejection", law.noise_reused), ("speculative rejection", law.lanes_in_wrong_order),
    ("speculative rejection", replaced(rules.DropWorst, finished_stay)),
    ("beam", law.noise_reused), ("beam", law.lanes_in_wrong_order), ("beam", law.fork_repeats_its_parent),
    ("particles, sample", law.noise_reused), ("particles, sample", law.lanes_in_wrong_order),
    ("particles, sample", best_at_the_end), ("particles, best", law.fork_repeats_its_parent),
    ("systematic, best", changed(rules.Resample, systematic=lambda value: False)),
    ("systematic, best", law.noise_reused), ("systematic, best", law.lanes_in_wrong_order),
    ("systematic, best", law.fork_repeats_its_parent),
    ("constant k", law.noise_reused), ("constant k", law.lanes_in_wrong_order),
]
SLOWER = [
    ("soft best of 3", changed(rules.SoftArgmax, temperature=lambda value: 4.0 * value)),
    ("rejection, width 3", changed(rules.FirstAccepted, beta=lambda value: 2.0 * value)),
    ("speculative rejection", changed(rules.DropWorst, alpha=lambda value: 0.8)),
    ("speculative rejection", replaced(rules.DropWorst, the_worst)),
    ("beam, many draws", replaced(rules.Highest, one_each)), ("beam", replaced(rules.Highest, finished_stay)),
    ("particles, many draws", without_parents), ("systematic, many draws", finished_vanish),
    ("particles, sample", changed(rules.Resample, beta=lambda value: 3.0 * value)),
]


@pytest.mark.parametrize("name, error", [
    *PLANTED, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOWER)],
    ids=lambda value: value if isinstance(value, str) else value.__name__)
@pytest.mark.filterwarnings("ignore:reward_threshold")
@pytest.mark.skipif(not libstars.available(), reason="so many draws take minutes without libstars")
def test_a_planted_error_is_seen(name, error, monkeypatch):
    error(monkeypatch)
    p = p_values(name)
    assert min(p) < FALSE_POSITIVE_RATE / 2, p


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if "many draws" in name else name for name in CASES])
def test_the_law(name):
    p = p_values(name)
    assert min(p) > FALSE_POSITIVE_RATE / 2, p
