"""Persona-Judge: what is committed against the exact law, and round by round against the published loop.

The law by enumeration: a token is accepted with the mass min(p, q), or drawn in place of a rejected one with the mass
max(p - q, 0), after which the round ends. So every token has the law p, of fixed roles the judge's throughout. A test
compares two p-values with 5e-7 each (see `law`); that the draws are enough is shown by planting errors.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch

import oracle
import persona_loop
import stars
import stars.commit
import stars.filtered_ratio
from law import DRAWS, FALSE_POSITIVE_RATE, PROMPT, Prefix, p_value
from stars.draft import Drafter
from stars.filtered_ratio import FilteredRatio, draw
from stars.kernels import philox
from stars.request import Hypothesis, Request
from stars.rules import AcceptPrefix
from toy import EOS, Digits, ToyModel, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MODEL = ToyModel(vocab=4, seed=28, layers=1, sharpness=1.6)
TEXTS = {"draft": "332", "judge": "1111"}  # after which a third of a distribution's mass differs
MAX_TOKENS = 3


class Case(NamedTuple):
    """What is drawn, and how."""

    policy: stars.PersonaJudge
    params: stars.SamplingParams


def case(alternate: bool, gamma: int = 2, seed: int = 71, draft: str = TEXTS["draft"], judge: str = TEXTS["judge"],
         n: int = DRAWS // 2, **params) -> Case:
    """Few tokens, so that many responses share their beginning."""
    return Case(stars.PersonaJudge(draft, judge, gamma, alternate),
                stars.SamplingParams(max_tokens=MAX_TOKENS, n=n, seed=seed, **params))


# -- the exact law ------------------------------------------------------------------------------------------------


def distribution(text: str, response: Prefix, params) -> np.ndarray:
    """What is drawn from after a text, the prompt and a response."""
    logits = MODEL.logits([int(digit) for digit in text] + PROMPT + list(response))
    return np.exp(oracle.log_softmax(oracle.proposal(logits, params)))


def segment_law(key: tuple[int, Prefix], drawn: Case) -> dict[Prefix, float]:
    """Probability of each segment that can follow a prefix in a round whose roles are exchanged (1) or not (0)."""
    exchanged, prefix = key
    policy, texts = drawn.policy, (drawn.policy.draft, drawn.policy.judge)
    most = min(policy.gamma, MAX_TOKENS - len(prefix))
    exact: dict[Prefix, float] = defaultdict(float)

    def grow(kept: Prefix, weight: float) -> None:
        q, p = (distribution(texts[index ^ exchanged], prefix + kept, drawn.params) for index in (0, 1))
        if kept and (kept[-1] == EOS or len(prefix + kept) == MAX_TOKENS):
            exact[kept] += weight
            return
        for token in range(len(p)):
            if len(kept) == most:
                exact[(*kept, token)] += weight * p[token]
                continue
            exact[(*kept, token)] += weight * max(p[token] - q[token], 0.0)
            if min(p[token], q[token]) > 0.0:
                grow((*kept, token), weight * min(p[token], q[token]))

    grow((), 1.0)
    return exact


def p_values(drawn: Case) -> tuple[float, float]:
    """p of the committed segments, and p of the tokens by what comes before and whose turn it was to judge."""
    engine = toy_engine(MODEL, tokenizer=Digits(), max_num_seqs=512, max_num_lanes=512, cache_tokens=1 << 14)
    [output] = engine.generate({"prompt_token_ids": PROMPT}, drawn.params, drawn.policy, use_tqdm=False)
    engine.check_integrity()
    segments: dict[tuple[int, Prefix], Counter] = defaultdict(Counter)
    tokens: dict[tuple[int, Prefix], Counter] = defaultdict(Counter)
    for completion in output.outputs:
        prefix: Prefix = ()
        for number, segment in enumerate(completion.segments):
            exchanged = number % 2 if drawn.policy.alternate else 0
            segments[exchanged, prefix][tuple(segment.token_ids)] += 1
            for token in segment.token_ids:
                tokens[exchanged, prefix][token] += 1
                prefix += (token,)
        assert completion.error is None and list(prefix) == completion.token_ids
    known: dict[tuple[int, Prefix], dict] = {}

    def of_segment(key: tuple[int, Prefix]) -> dict:
        if key not in known:
            known[key] = segment_law(key, drawn)
        return known[key]

    def of_token(key: tuple[int, Prefix]) -> dict:
        judge = (drawn.policy.draft, drawn.policy.judge)[1 - key[0]]
        return dict(enumerate(distribution(judge, key[1], drawn.params)))

    return p_value(segments, of_segment), p_value(tokens, of_token)


CASES = {
    "fixed roles": case(False),
    "alternating": case(True, 1, seed=72),
    "filters and temperature": case(True, 3, seed=73, temperature=1.6, top_k=3, top_p=0.9),
    "a token at a time": case(False, 1, seed=76, draft="1", judge="332", n=DRAWS * 5 // 4),
    "a judge of the prompt alone": case(False, 1, seed=74, judge=""),
    "min_p": case(False, 4, seed=75, temperature=1.5, min_p=0.15),
}
SLOW = ("a judge of the prompt alone", "min_p")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_committed_tokens_follow_the_law(name):
    """Where a round ends, and that every token is its judge's."""
    assert min(found := p_values(CASES[name])) > FALSE_POSITIVE_RATE / 2, found


def test_filters_keep_tokens_that_the_other_leaves_out():
    """Both differences are there to be seen: of what p keeps q lacks some, and the reverse."""
    drawn = CASES["filters and temperature"]
    p, q = (distribution(TEXTS[name], (), drawn.params) for name in ("judge", "draft"))
    assert ((p > 0) & (q == 0)).any() and ((q > 0) & (p == 0)).any()


# -- planted errors -----------------------------------------------------------------------------------------------


def the_published_slip(monkeypatch):
    """The residual is max(p - q, 0) only where the sum of p - q comes out positive, else max(q - p, 0)."""
    def slipping(lane, position, source):
        if source == "residual":
            p, q = (stars.filtered_ratio._logprobs(lane, rows[position : position + 1])[0].exp().float()
                    for rows in lane.reading)
            if not float((p - q).sum()) > 0:
                rows = lane.reading
                try:
                    lane.reading = stars.filtered_ratio.Rows(
                        torch.cat([rows.draft, rows.draft[:1]]), rows.judge[: len(rows.draft)])
                    return draw(lane, position, source)
                finally:
                    lane.reading = rows
        return draw(lane, position, source)

    monkeypatch.setattr(stars.commit, "draw", slipping)


def noise_of_the_draft(monkeypatch):
    """The token after the accepted ones is drawn with the noise that drew the rejected one."""
    monkeypatch.setattr(philox, "KIND_DRAW", philox.KIND_TOKEN_NOISE)


def one_uniform_for_all_tokens(monkeypatch):
    call = AcceptPrefix.__call__
    monkeypatch.setattr(AcceptPrefix, "__call__", lambda self, judged, state: call(
        self, [one._replace(uniforms=one.uniforms[:1] * len(one.uniforms)) for one in judged], state))


def uniforms_of_the_first_round(monkeypatch):
    """The tests of every round of a response are those of its first."""
    monkeypatch.setattr(stars.judge, "accept_uniform", lambda seed, attempt, segment, sample: philox.accept_uniform(
        seed, attempt, 0, sample))
    monkeypatch.setattr(stars.judge, "rule_uniforms", lambda seed, kind, attempt, segment, sample, count: (
        philox.rule_uniforms(seed, kind, attempt, 0, sample, count)))
    monkeypatch.setattr(stars.filtered_ratio.philox, "pack_stream", lambda segment, sample: sample << 20)


def judged_in_the_context_of_the_draft(monkeypatch):
    monkeypatch.setattr(Hypothesis, "judging", Hypothesis.drafting)


def readings_of_the_next_response(monkeypatch):
    read = FilteredRatio.read

    def rotated(self, lanes):
        found = read(self, lanes)
        return [one if len(one.per_token) != len(other.per_token) else other
                for one, other in zip(found, found[1:] + found[:1], strict=True)]

    monkeypatch.setattr(FilteredRatio, "read", rotated)


def logits_of_another_step(monkeypatch):
    drafted = Drafter.draft_with_logits
    monkeypatch.setattr(Drafter, "draft_with_logits", lambda self, lanes: [
        one._replace(logits=one.logits.roll(1, 0)) for one in drafted(self, lanes)])


def the_residual_is_the_judge(monkeypatch):
    monkeypatch.setattr(stars.commit, "draw", lambda lane, position, source: draw(lane, position, "judge"))


def roles_never_exchanged(monkeypatch):
    settle = Request.__post_init__

    def fixed(self):
        settle(self)
        self.alternates = False

    monkeypatch.setattr(Request, "__post_init__", fixed)


@pytest.mark.parametrize(("error", "name"), [
    (the_published_slip, "fixed roles"), (noise_of_the_draft, "a token at a time"),
    (one_uniform_for_all_tokens, "fixed roles"), (judged_in_the_context_of_the_draft, "fixed roles"),
    (readings_of_the_next_response, "fixed roles"), (the_residual_is_the_judge, "fixed roles"),
    (logits_of_another_step, "fixed roles"), (roles_never_exchanged, "alternating"),
    (uniforms_of_the_first_round, "alternating"),
])
def test_planted_errors_are_seen(monkeypatch, error, name):
    error(monkeypatch)
    assert min(found := p_values(CASES[name])) < FALSE_POSITIVE_RATE / 2, found


# -- the published loop -------------------------------------------------------------------------------------------

LARGER = ToyModel(vocab=9, seed=11, layers=2, sharpness=1.3)


@pytest.mark.parametrize(("alternate", "gamma", "settings"), [
    (True, 4, dict(temperature=0.9, top_k=6, top_p=0.9)), (False, 3, {}), (True, 1, dict(min_p=0.1, ignore_eos=True)),
])
def test_rounds_are_those_of_the_published_loop(alternate, gamma, settings):
    prompt, n = ids(7, 9, seed=3), 6
    params = stars.SamplingParams(max_tokens=17, n=n, seed=5, **settings)
    engine = toy_engine(LARGER, tokenizer=Digits())
    [output] = engine.generate({"prompt_token_ids": prompt}, params, stars.PersonaJudge("8127", "54", gamma, alternate),
                               use_tqdm=False)
    engine.check_integrity()

    def lm(token_ids: list[int]) -> np.ndarray:
        logits = LARGER.logits(token_ids)
        if params.temperature:
            return oracle.log_softmax(oracle.proposal(logits, params))
        return np.where(np.arange(9) == logits.argmax(), 0.0, -np.inf)

    kinds = Counter()
    for sample, completion in enumerate(output.outputs):
        def numbers(count: int, place: int, kind: int, round_: int, sample: int = sample) -> np.ndarray:
            return oracle.uniforms(5, count, place, 1, kind, round_, sample)

        def uniform(round_: int, place: int) -> float:
            return float(numbers(1, 0, 1, round_)[0] if not place else numbers(place, 0, 2, round_)[-1])

        rounds = persona_loop.run(
            [8, 1, 2, 7, *prompt], [5, 4, *prompt], lm, lambda round_, place: -np.log(-np.log(numbers(9, place, 0,
                                                                                                      round_))),
            uniform, lambda round_, place: -np.log(-np.log(numbers(9, place, 4, round_))), gamma=gamma,
            alternate=alternate, max_tokens=17, stop_ids=() if params.ignore_eos else (EOS,))
        assert [segment.token_ids for segment in completion.segments] == [one.token_ids for one in rounds]
        assert [segment.attempts[0].token_ids for segment in completion.segments] == [one.drafted for one in rounds]
        for segment, one in zip(completion.segments, rounds, strict=True):
            assert segment.accepted == (one.accepted == len(one.drafted))
            assert math.isclose(segment.attempts[0].accept_probability, one.chance, abs_tol=1e-4)
            kinds[segment.accepted] += 1
    assert min(kinds.values()) >= 4 and len(kinds) == 2, "hardly anything was accepted or rejected"
