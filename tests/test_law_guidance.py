"""The law of TokenGuidance: every token from the softmax of the models' weighted logits, filters and penalties on that.

Three toy models of five tokens, so that the law of the next token after every prefix is written out. What followed each
prefix is compared by chi-square, which fails a correct engine once in 1e6 choices of the seed (see law.py). Drafts are
of two tokens, so that what was drawn is committed in every model. Errors are planted, with each of which the same test
must fail.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch

import law
import oracle
import stars
import stars.draft
import stars.models
import stars.policies
import stars.proposer
from law import FALSE_POSITIVE_RATE, MAX_TOKENS, MODEL, PROMPT, Prefix, p_value
from stars.bindings import libstars
from stars.kernels.philox import pack_stream
from stars.kernels.sample_step import sampling_threshold
from stars.kv_store import KVStore
from toy import EOS, ToyModel

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DRAWS = 512
GUIDE = ToyModel(vocab=5, seed=26, layers=2, sharpness=2.0)
REFERENCE = ToyModel(vocab=5, seed=7, layers=1, kv_heads=2, head_dim=4)
PLAIN = stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS, seed=71)
FILTERED = dataclasses.replace(PLAIN, seed=72, temperature=0.8, top_p=0.9, min_p=0.04, presence_penalty=0.6,
                               repetition_penalty=1.3)
FEW = dataclasses.replace(PLAIN, seed=73, top_k=3)
CASES: dict[str, tuple[stars.TokenGuidance, stars.SamplingParams, tuple[float, float, float]]] = {
    "the released form": (stars.TokenGuidance(), PLAIN, (0.7, 0.3, 0.0)),
    "the released form, filters and penalties": (stars.TokenGuidance(weight=0.6), FILTERED, (0.4, 0.6, 0.0)),
    "a reference": (stars.TokenGuidance(reference="reference", weight=0.8), PLAIN, (1.0, 0.8, -0.8)),
    "a reference, few tokens": (stars.TokenGuidance(reference="reference"), FEW, (1.0, 1.0, -1.0)),
    "the reference is the engine's": (stars.TokenGuidance(reference="lm", weight=1.7), PLAIN, (-0.7, 1.7, 0.0)),
    "the guide alone": (stars.TokenGuidance(reference="lm"), FILTERED, (0.0, 1.0, 0.0)),
    "GenARM": (stars.TokenGuidance(weight=0.5, lm_weight=1.0), FEW, (1.0, 0.5, 0.0)),
    "one model, weighted": (stars.TokenGuidance("lm", weight=0.6, lm_weight=1.0), PLAIN, (1.6, 0.0, 0.0)),
}
"""A policy, its parameters, and the weights of the engine's model, the guide and the reference that it stands for."""


@pytest.fixture(autouse=True)
def drafts_of_two_tokens(monkeypatch):
    monkeypatch.setattr(stars.policies, "DRAFT_SIZE", 2)


def blended(ids: list[int], weights: tuple[float, float, float]) -> np.ndarray:
    """The formula, of log-probabilities."""
    models = zip((MODEL, GUIDE, REFERENCE), weights, strict=True)
    return sum(weight * oracle.log_softmax(model.logits(ids)) for model, weight in models)


def exact(name: str) -> Callable[[Prefix], dict[int, float]]:
    """The law of the token after a prefix."""
    _, params, weights = CASES[name]

    def law_of(prefix: Prefix) -> dict[int, float]:
        # Penalties tell logits from log-probabilities: those of the engine are on the blend of logits.
        logits = sum(weight * model.logits(PROMPT + list(prefix))
                     for model, weight in zip((MODEL, GUIDE, REFERENCE), weights, strict=True))
        if not params.penalties:
            logits = blended(PROMPT + list(prefix), weights)
        kept = oracle.log_softmax(oracle.proposal(oracle.penalised(logits, PROMPT, list(prefix), params), params))
        return {token: math.exp(logprob) for token, logprob in enumerate(kept)}

    return law_of


def next_tokens(outputs: list[stars.CompletionOutput]) -> dict[Prefix, Counter]:
    """How often each token followed each prefix."""
    seen: dict[Prefix, Counter] = defaultdict(Counter)
    for output in outputs:
        for place, token in enumerate(output.token_ids):
            seen[tuple(output.token_ids[:place])][token] += 1
    return seen


def drawn(name: str) -> list[stars.CompletionOutput]:
    policy, params, _ = CASES[name]
    return law.draw(policy, params, models={"guide": GUIDE.decoder(), "reference": REFERENCE.decoder()})


@pytest.mark.parametrize("name", CASES)
def test_every_token_follows_the_blend(name):
    p = p_value(next_tokens(drawn(name)), exact(name))
    assert p > FALSE_POSITIVE_RATE, p


def test_the_cases_have_power():
    """No two cases have one law, EOS comes and does not, and the guide's favourite is often another."""
    prefixes: list[Prefix] = [(), (1,), (2, 3), (4, 4, 1)]
    laws = {name: [exact(name)(prefix) for prefix in prefixes] for name in CASES}
    for name in CASES:
        for other in CASES:
            if other != name:
                assert max(abs(mine[token] - its[token]) for mine, its in zip(laws[name], laws[other], strict=True)
                           for token in range(5)) > 0.05, (name, other)
    ends = [EOS in output.token_ids for output in drawn("the released form")]
    assert 0.1 < sum(ends) / len(ends) < 0.97
    assert any(np.argmax(MODEL.logits(PROMPT + list(prefix))) != np.argmax(GUIDE.logits(PROMPT + list(prefix)))
               for prefix in prefixes)


def test_log_probabilities_are_those_of_the_blend():
    _, params, weights = CASES["a reference"]
    for output in drawn("a reference")[:40]:
        expected = sum(blended_logprobs(PROMPT + output.token_ids[:place], weights)[token]
                       for place, token in enumerate(output.token_ids))
        assert output.cumulative_logprob == pytest.approx(expected, abs=5e-5)


def blended_logprobs(ids: list[int], weights: tuple[float, float, float]) -> np.ndarray:
    return oracle.log_softmax(blended(ids, weights))


# -- planted errors -----------------------------------------------------------------------------------------------


def _blends_as(monkeypatch, change: Callable[..., tuple]) -> None:
    """Arguments of the blend are changed: (logits, weights, lanes that are done, out)."""
    blend = stars.draft.blend_logits

    def changed(*given) -> None:
        libstars.leave_out()
        blend(*change(*given))

    monkeypatch.setattr(stars.draft, "blend_logits", changed)


def weights_forgotten(monkeypatch):
    """Every model counts alike."""
    _blends_as(monkeypatch, lambda logits, weights, done, out: (logits, torch.ones_like(weights), done, out))


def reference_on_the_other_side(monkeypatch):
    """What the reference likes is favoured."""
    _blends_as(monkeypatch, lambda logits, weights, done, out: (logits, weights.abs(), done, out))


def reference_forgotten(monkeypatch):
    """What the guide learnt and what it was made from count alike."""
    _blends_as(monkeypatch, lambda logits, weights, done, out: (logits, weights.clamp(min=0.0), done, out))


def guide_forgotten(monkeypatch):
    """The first model's logits are drawn from."""
    monkeypatch.setattr(stars.draft, "blend_logits", lambda *given: None)


def probabilities_blended(monkeypatch):
    """A mixture of the distributions."""
    def mixed(logits, weights, done, out) -> None:
        libstars.leave_out()
        rows = len(out)
        mixture = (weights[:, :rows, None] * logits[:, :rows].softmax(-1)).sum(0)
        out.copy_(mixture.clamp(min=1e-30).log())

    monkeypatch.setattr(stars.draft, "blend_logits", mixed)


def blended_after_filters(monkeypatch):
    """The filters have looked at the engine's own model already."""
    def filtered(logits, weights, done, out):
        for row in logits[0, : len(out)]:
            row[row < sampling_threshold(row, 2, 1.0, 0.0)] = -1e4
        return logits, weights, done, out

    _blends_as(monkeypatch, filtered)


def penalties_before_the_blend(monkeypatch):
    """Only the engine's own model is penalised."""
    given: list[tuple] = []
    blend, penalise = stars.draft.blend_logits, stars.draft.apply_penalties
    monkeypatch.setattr(stars.draft, "blend_logits", lambda *those: given.append(those))
    monkeypatch.setattr(stars.draft, "apply_penalties", lambda *those: (penalise(*those), blend(*given[-1])))


def arbitrary_pages(monkeypatch):
    """Rows that nothing wrote hold finite numbers, whatever the memory held before."""
    fill = KVStore.__init__

    def arbitrary(self, *given) -> None:
        fill(self, *given)
        for tensor in (self.k_pages, self.v_pages):
            tensor.normal_(std=3.0, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(KVStore, "__init__", arbitrary)


def guide_is_not_committed(monkeypatch):
    """The pages of the other models lack what was drawn."""
    commit, first = KVStore.commit_rows, []

    def only_the_first(self, source, target) -> None:
        first.append(self)
        if self is first[0]:
            commit(self, source, target)

    monkeypatch.setattr(KVStore, "commit_rows", only_the_first)
    arbitrary_pages(monkeypatch)


def guide_has_not_read_the_prompt(monkeypatch):
    """Only the last of a table's models is prefilled."""
    prefill = stars.models.Passes.prefill
    monkeypatch.setattr(stars.models.Passes, "prefill", lambda self, jobs, left=None, advance=True: (
        prefill(self, jobs, left) if advance else 0))
    arbitrary_pages(monkeypatch)


def completions_alike(monkeypatch):
    """A completion draws what another one of its request does."""
    monkeypatch.setattr(stars.proposer, "pack_stream", lambda segment, sample: pack_stream(segment, sample % 32))


def weights_of_the_own_model(monkeypatch):
    """One model that is weighted draws as if it were not."""
    drafter = stars.models.Models.drafter
    monkeypatch.setattr(stars.models.Models, "drafter", lambda self, stores, blends=False: drafter(
        self, stores, blends and len(stores) > 1))


PLANTED = [
    (weights_forgotten, "the released form"), (weights_forgotten, "one model, weighted"),
    (reference_on_the_other_side, "a reference"), (reference_on_the_other_side, "the reference is the engine's"),
    (reference_forgotten, "a reference"), (guide_forgotten, "the released form"), (guide_forgotten, "GenARM"),
    (probabilities_blended, "the released form"), (blended_after_filters, "a reference, few tokens"),
    (penalties_before_the_blend, "the released form, filters and penalties"),
    (guide_is_not_committed, "the reference is the engine's"), (guide_has_not_read_the_prompt, "a reference"),
    (completions_alike, "the guide alone"), (weights_of_the_own_model, "one model, weighted"),
]


@pytest.mark.skipif(not libstars.available(), reason="the errors are those of its programs")
@pytest.mark.parametrize("error, name", PLANTED, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_planted_error_is_seen(error, name, monkeypatch):
    """The same cases and seeds as above, where the engine passes."""
    error(monkeypatch)
    p = p_value(next_tokens(drawn(name)), exact(name))
    assert p <= FALSE_POSITIVE_RATE, p
