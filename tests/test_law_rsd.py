"""Reward-guided speculation (RSD, GSI) and what is redrawn by another model: the laws, and the written-out loops.

With P_S and P_L the laws of a segment under the small and the large model and a(s) the probability of being accepted:

- RSD: s with probability P_S(s) a(s) as drafted, and (1 - sum P_S a) P_L(s) redrawn;
- GSI: a sum over all n-tuples of drafts, of which one is drawn by softmax(beta * v), v = r + log(P_L / P_S) / beta, and
  kept if v >= t; else a sum over all n-tuples of the large model, one drawn by softmax(beta * r);
- STARS whose exhaustion redraws: accepted as ever, and (sum p (1 - a))^K P_S(s), where the small model redraws.

False positives: every p-value is compared with FALSE_POSITIVE_RATE / 6, as there are six cases: the file fails a
correct engine once in 1e6 choices of its seeds. With each planted error the same test of the same case must fail.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

import law
import stars
import stars.judge
import stars.models
import stars.proposer
import stars.ratio
import stars.request
import stars.rules
from law import DRAWS, FALSE_POSITIVE_RATE, MODEL, REWARD, Prefix, candidates, content, p_value
from stars.exhaustions import Redraft
from stars.kv_store import KVStore
from stars.rules import Decision
from toy import ToyModel

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LIMIT = FALSE_POSITIVE_RATE / 6
SMALL = ToyModel(vocab=5, seed=21, layers=2, hidden=8, heads=1, head_dim=8)
SIZE, LENGTH = 2, 4
TARGET, HIGH = 0.7, 1.6


def reward(ids: Sequence[int]) -> float:
    """As likely to pass in the second segment as in the first."""
    return REWARD(ids) - 0.7 * len(ids)


class Case:
    """A policy, what is drawn, and the law of what follows a prefix."""

    def __init__(self, policy, law_of: Callable[[Prefix], dict], seed: int, draws: int = DRAWS // 2, **params):
        self.policy, self.law = policy, law_of
        self.params = stars.SamplingParams(max_tokens=LENGTH, n=draws, seed=seed, **params)

    def p(self) -> float:
        """Draws, and the chi-square test of (segment, whether it was accepted)."""
        seen: dict[Prefix, Counter] = defaultdict(Counter)
        for output in law.draw(self.policy, self.params, reward, models={"small": SMALL.decoder()}):
            prefix: Prefix = ()
            for segment in output.segments:
                seen[prefix][tuple(segment.token_ids), segment.accepted] += 1
                prefix += tuple(segment.token_ids)
            assert list(prefix) == output.token_ids
        return p_value(seen, self.law)


# -- the exact laws -----------------------------------------------------------------------------------------------


@functools.cache
def known(prefix: Prefix, params: stars.SamplingParams) -> list[tuple[Prefix, float, float, float]]:
    """(segment, P_S, P_L, reward) of all that can follow."""
    size = min(SIZE, LENGTH - len(prefix))
    small, large = (dict(candidates(prefix, size, params, model)) for model in (SMALL, MODEL))
    return [(segment, small.get(segment, 0.0), large.get(segment, 0.0), reward(content(prefix + segment)))
            for segment in sorted({*small, *large})]


def rsd_law(beta: float, **params) -> Callable[[Prefix], dict]:
    def of(prefix: Prefix) -> dict:
        given = known(prefix, stars.SamplingParams(**params))
        accept = [float(r >= TARGET) if beta == 0 else min(1.0, math.exp((r - TARGET) / beta)) for *_, r in given]
        rejected = sum(p * (1 - a) for (_, p, _, _), a in zip(given, accept, strict=True))
        return ({(segment, True): p * a for (segment, p, _, _), a in zip(given, accept, strict=True)}
                | {(segment, False): rejected * q for segment, _, q, _ in given})

    return of


def drawn_of(odds: np.ndarray, values: np.ndarray, n: int, beta: float) -> np.ndarray:
    """The probability that a segment is drawn of n drafts, by softmax(beta * value): a sum over all of the others."""
    weight = np.exp(beta * (values - values.max()))
    others, total = np.ones(1), np.zeros(1)
    for _ in range(n - 1):
        others, total = np.multiply.outer(others, odds).ravel(), np.add.outer(total, weight).ravel()
    return np.array([n * p * (others * w / (w + total)).sum() for p, w in zip(odds, weight, strict=True)])


def gsi_law(beta: float, n: int, target: float) -> Callable[[Prefix], dict]:
    @functools.cache
    def of(prefix: Prefix) -> dict:
        segments, small, large, rewards = zip(*known(prefix, stars.SamplingParams()), strict=True)
        p, q, r = np.array(small), np.array(large), np.array(rewards)
        tilted = r + np.log(q / p) / beta
        drafted = np.where(tilted >= target, drawn_of(p, tilted, n, beta), 0.0)
        redrawn = (1.0 - drafted.sum()) * drawn_of(q, r, n, beta)
        return ({(segment, True): float(one) for segment, one in zip(segments, drafted, strict=True)}
                | {(segment, False): float(one) for segment, one in zip(segments, redrawn, strict=True)})

    return of


def stars_law(prefix: Prefix) -> dict:
    """Of three attempts by the engine's own model none is accepted: the small one redraws."""
    given = known(prefix, stars.SamplingParams())
    accept = [min(1.0, math.exp((r - HIGH) / 0.8)) for *_, r in given]
    rejected = sum(p * (1 - a) for (_, _, p, _), a in zip(given, accept, strict=True))
    tries = sum(rejected**attempt for attempt in range(3))
    return ({(segment, True): p * a * tries for (segment, _, p, _), a in zip(given, accept, strict=True)}
            | {(segment, False): rejected**3 * p for segment, p, _, _ in given})


RSD = functools.partial(stars.RewardGuidedSpeculation, "small", segment_size=SIZE)
CASES = {
    "hard": Case(RSD(TARGET), rsd_law(0.0), seed=71, draws=DRAWS),
    "soft": Case(RSD(TARGET, beta=0.8), rsd_law(0.8), seed=72),
    "filters": Case(RSD(TARGET, beta=0.8), rsd_law(0.8, temperature=0.8, top_k=4, presence_penalty=0.5), seed=73,
                    temperature=0.8, top_k=4, presence_penalty=0.5),
    "gsi, two": Case(RSD(0.3, beta=1.5, variant="gsi", n=2), gsi_law(1.5, 2, 0.3), seed=74, draws=DRAWS // 4),
    "gsi, three": Case(RSD(0.9, beta=0.7, variant="gsi", n=3), gsi_law(0.7, 3, 0.9), seed=75),
    "exhaustion": Case(stars.STARS(SIZE, 3, 1.0, 0.8, HIGH, 2, Redraft("small")), stars_law, seed=76),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_follows_its_law(name):
    assert (p := CASES[name].p()) > LIMIT, p


def test_both_models_have_their_share():
    """And they differ: no case is all of one, and the laws of the two are far apart."""
    for name, case in CASES.items():
        accepted = sum(probability for (_, ok), probability in case.law(()).items() if ok)
        assert 0.15 < accepted < 0.85, (name, accepted)
    given = known((), stars.SamplingParams())
    assert 0.5 * sum(abs(p - q) for _, p, q, _ in given) > 0.3


# -- planted errors -----------------------------------------------------------------------------------------------


def redraft_repeats_the_draft(monkeypatch):
    """Redrawn attempts have the noise of the first ones."""
    spec = stars.proposer.LaneSpec
    monkeypatch.setattr(stars.proposer, "LaneSpec",
                        lambda *given, **named: spec(*given, **named)._replace(attempt=1))


def redrawn_by_the_drafter(monkeypatch):
    """The model of the drafts redraws, too."""
    monkeypatch.setattr(stars.request.Hypothesis, "proposal", property(lambda self: self.request.proposal))


def never_caught_up(monkeypatch, which: tuple[int, ...] = (0, 1)):
    """A model that is behind reads what its rows held before where others have drawn."""
    catch_up = stars.models.Models.catch_up

    def told(self, hypotheses, stores):
        for store in stores:
            if store not in which:
                catch_up(self, hypotheses, (store,))
                continue
            for hypothesis in hypotheses:
                self._cache.catch_up(hypothesis.pages, store, hypothesis.pages.length)

    init = KVStore.__init__

    def filled(self, *given):
        init(self, *given)
        for tensor in (self.k_pages, self.v_pages):
            tensor.copy_(30.0 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))

    monkeypatch.setattr(KVStore, "__init__", filled)
    monkeypatch.setattr(stars.models.Models, "catch_up", told)


def large_never_caught_up(monkeypatch):
    never_caught_up(monkeypatch, (0,))


def small_never_caught_up(monkeypatch):
    never_caught_up(monkeypatch, (1,))


def ratio_of(monkeypatch, change: Callable[[list[float]], list[float]]) -> None:
    read = stars.ratio.RatioReader.read
    monkeypatch.setattr(stars.ratio.RatioReader, "read", lambda self, lanes: [
        one._replace(per_token=change(one.per_token)) for one in read(self, lanes)])


def ratio_turned_round(monkeypatch):
    """log p_small - log p_large."""
    ratio_of(monkeypatch, lambda ratios: [-ratio for ratio in ratios])


def small_judged_as_large(monkeypatch):
    """Both probabilities are the small model's."""
    ratio_of(monkeypatch, lambda ratios: [0.0] * len(ratios))


def last_token_forgotten(monkeypatch):
    """The ratio of a segment leaves its last token out."""
    ratio_of(monkeypatch, lambda ratios: ratios[:-1])


def changed_rule(monkeypatch, change: Callable) -> None:
    call = stars.rules.GuidedDraft.__call__
    monkeypatch.setattr(stars.rules.GuidedDraft, "__call__", lambda self, judged, state: change(
        self, call, judged, state))


def threshold_of_plain_rewards(monkeypatch):
    """Kept if r >= t, whatever the ratio."""
    def change(self, call, judged, state):
        if state.left:
            return None
        free = call(type(self)(self.beta, -math.inf), judged, state)
        winner = judged[free.keep[0].attempt - 1]
        return free if winner.reward >= self.reward_threshold else Decision([], [], free.notes)

    changed_rule(monkeypatch, change)


def best_instead_of_drawn(monkeypatch):
    """The highest tilted reward, not a draw."""
    changed_rule(monkeypatch, lambda self, call, judged, state: call(
        self, [one._replace(uniforms=(0.5,)) for one in judged], state))


PLANTED = [
    (redraft_repeats_the_draft, "hard"), (redrawn_by_the_drafter, "hard"), (large_never_caught_up, "filters"),
    (law.noise_reused, "hard"), (law.lanes_in_wrong_order, "soft"),
    (ratio_turned_round, "gsi, two"), (small_judged_as_large, "gsi, two"), (last_token_forgotten, "gsi, two"),
    (threshold_of_plain_rewards, "gsi, two"), (best_instead_of_drawn, "gsi, three"),
    (redraft_repeats_the_draft, "gsi, two"), (redrawn_by_the_drafter, "filters"),
    (redrawn_by_the_drafter, "exhaustion"),
]


@pytest.mark.parametrize("error, name", PLANTED, ids=[f"{error.__name__}, {name}" for error, name in PLANTED])
def test_a_planted_error_is_seen(error, name, monkeypatch):
    """In a case of these, where the engine passes."""
    error(monkeypatch)
    assert (p := CASES[name].p()) < LIMIT, p
