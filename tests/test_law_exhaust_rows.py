"""What CARDS and RejectionSampling keep where all attempts are rejected, by enumeration on the toy of law.py.

With p(c) the proposal, a(c) the probability of being accepted and R = sum p (1 - a), the tested attempts are all
rejected with probability R^tested: each is then a draw from p (1 - a) / R, and the last attempt of CARDS, which is not
tested, one from p. Of these the first, the last, or one by softmax is kept; refuse ends the response. Relax accepts
attempt j at its k-th lowering where those before it are not accepted at level k and those after it not at level k - 1;
the attempt that was not tested has no level 0.

False positives: ten p-values are compared with FALSE_POSITIVE_RATE / 10, so that the file fails a correct engine once
in 1e6 choices of its seeds. With each planted error the same test of the same case must fail.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict

import numpy as np
import pytest

import law
import stars
import test_law_cards
import test_law_exhaust
from law import DRAWS, FALSE_POSITIVE_RATE, MAX_TOKENS, REWARD, Prefix, content, p_value
from stars.exhaustions import Relax, Softmax

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.filterwarnings("ignore:reward_threshold")]

LIMIT = FALSE_POSITIVE_RATE / 10
ATTEMPTS, BETA, TEMPERATURE, BY = 3, 0.5, 0.4, 0.8
EXHAUST = {"first": "first", "last": "last", "softmax": Softmax(TEMPERATURE), "relax": Relax(BY, 2, "last"),
           "refuse": "refuse"}
Known = list[tuple[Prefix, float, float, list[float]]]  # segment, probability, reward, accepted with at each level


def levels(reward: float, tau: float) -> list[float]:
    return [min(1.0, math.exp((reward - tau + level * BY) / BETA)) for level in range(3)]


def exact(known: Known, exhaust: str, untested: int) -> dict:
    """Of (segment, accepted, relaxed, which attempt where all had been rejected). untested: how many, 0 or 1."""
    tested, found = ATTEMPTS - untested, defaultdict(float)
    rejected = [sum(p * (1 - a[level]) for _, p, _, a in known) for level in range(3)]
    for segment, p, _, a in known:
        found[segment, True, 0, None] = p * a[0] * sum(rejected[0] ** place for place in range(tested))
    q = np.array([p * (1 - a[0]) for _, p, _, a in known])  # times the chance R of each
    odds = [q] * tested + [np.array([p for _, p, _, _ in known])] * untested
    if exhaust == "refuse":
        found["refused"] = rejected[0] ** tested
    elif exhaust == "relax":
        for level, place in ((level, place) for level in (1, 2) for place in range(ATTEMPTS)):
            for segment, p, _, a in known:
                def not_before(which: int, level=level) -> float:  # not accepted at the level before
                    return 1.0 if level == 1 and which >= tested else rejected[level - 1]

                had = 0.0 if level == 1 and place >= tested else a[level - 1]
                found[segment, True, level, place] = p * (a[level] - had) * rejected[level] ** place * math.prod(
                    not_before(which) for which in range(place + 1, ATTEMPTS))
        for segment, p, _, a in known:
            found[segment, False, 2, ATTEMPTS - 1] = p * (1 - a[2]) * rejected[2] ** (ATTEMPTS - 1)
    else:
        weight = np.exp([reward / TEMPERATURE for _, _, reward, _ in known])
        together = odds[0][:, None, None] * odds[1][:, None] * odds[2]
        total = weight[:, None, None] + weight[:, None] + weight
        for place in range(ATTEMPTS):
            own = weight.reshape([-1 if axis == place else 1 for axis in range(ATTEMPTS)]) / total
            chosen = {"first": place == 0, "last": place == ATTEMPTS - 1}.get(exhaust, own)
            kept = (together * chosen).sum(axis=tuple(axis for axis in range(ATTEMPTS) if axis != place))
            for (segment, *_), chance in zip(known, kept, strict=True):
                found[segment, False, 0, place] += float(chance)
    return found


def p_of(row: str, exhaust: str) -> float:
    how = EXHAUST[exhaust]
    if row == "rejection":
        threshold = 4.0
        policy: stars.plan.Policy = stars.RejectionSampling(threshold, BETA, ATTEMPTS, 2, how)
        params = stars.SamplingParams(max_tokens=3, n=DRAWS // 4, seed=72)
        known = [(text, p, REWARD(content(text)), levels(REWARD(content(text)), threshold))
                 for text, p in law.candidates((), 3, params)]
        return p_value(test_law_exhaust.outcomes(law.draw(policy, params, max_segment_size=16)),
                       lambda prefix: exact(known, exhaust, 0))
    case = test_law_cards.case(max_attempts=ATTEMPTS, width=2, seed=71)
    policy = stars.CARDS(test_law_cards.CUT, 1, 3, ATTEMPTS, 0.2, BETA, 3.5, "soft", 2, how)
    params = stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS // 4, seed=71)
    start = 0.8 * REWARD([]) + 0.2 * 3.5

    @functools.cache
    def exact_at(prefix: Prefix) -> dict:
        known = []
        for segment, p in test_law_cards.candidates(prefix, case):
            tau = min(3.5, start + (len(prefix) + len(segment)) / MAX_TOKENS * (3.5 - start))
            reward = REWARD(content(prefix + segment))
            known.append((segment, p, reward, levels(reward, tau)))
        return exact(known, exhaust, 1)

    return p_value(test_law_exhaust.outcomes(law.draw(policy, params)), exact_at)


@pytest.mark.parametrize("exhaust", EXHAUST)
@pytest.mark.parametrize("row", ["cards", "rejection"])
def test_what_is_kept_follows_its_law(row, exhaust):
    assert (p := p_of(row, exhaust)) > LIMIT, p


@pytest.mark.parametrize("row, exhaust, error", [
    ("cards", "first", test_law_exhaust.best_instead), ("cards", "last", test_law_exhaust.best_instead),
    ("cards", "softmax", law.lanes_in_wrong_order), ("cards", "refuse", test_law_cards.last_attempt_tested),
    ("cards", "relax", test_law_exhaust.not_lowered), ("rejection", "relax", law.lanes_in_wrong_order),
    ("rejection", "first", law.lanes_in_wrong_order), ("rejection", "last", test_law_exhaust.best_instead),
    ("rejection", "softmax", law.noise_reused), ("rejection", "refuse", law.lanes_in_wrong_order),
])
def test_a_planted_error_is_seen(row, exhaust, error, monkeypatch):
    error(monkeypatch)
    assert (p := p_of(row, exhaust)) <= LIMIT, p
