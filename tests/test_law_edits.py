"""The law under biases and bans: committed segments against the exact distribution of the edited proposal.

As in test_law.py, of a proposal whose logits an oracle edits before penalties, at an accept rate of about a tenth, one
attempt at a time and eight of them. A comparison fails a correct engine once in 1e6 choices of its seed, or less.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

import law
import oracle
import stars
import stars.draft
from law import FALSE_POSITIVE_RATE, MAX_TOKENS, MODEL, PROMPT, Prefix, followers, p_value
from stars.bindings import libstars
from stars.kernels import edit_logits
from test_law import Case, segment_law
from test_law_args import Narrow, scores, softmax
from test_law_guidance import GUIDE
from toy import EOS, Digits, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Spaced(Digits):
    """Digits with spaces between them, which are no tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.replace(" ", ""))


BAD_WORDS = ("14", "222", "33", "4 1")
EDITS = dict(logit_bias={1: 0.8, 3: -1.3, EOS: 0.5}, min_tokens=2, bad_words=BAD_WORDS)
FEW = dict(allowed_token_ids=(EOS, 2, 4), bad_words=("222", "44"), frequency_penalty=0.4)


class Edited:
    """A model whose logits are edited as a request asks."""

    def __init__(self, params: stars.SamplingParams, model=MODEL):
        self.params, self.model = params, model
        self.bad_words = [Spaced().encode(word) for word in params.bad_words]

    def logits(self, ids: list[int]) -> np.ndarray:
        return oracle.edited(self.model.logits(ids), ids[len(PROMPT) :], self.params, {EOS}, self.bad_words)


def case(width: int, threshold: float, seed: int, segment_size: int = 2, **params) -> Case:
    policy = stars.STARS(segment_size, 12, 0.2, 0.5, threshold, width)
    return Case(policy, stars.SamplingParams(max_tokens=MAX_TOKENS, n=law.DRAWS // 2, seed=seed, **params))


CASES = {
    "width 1": case(1, 5.6, 31, **EDITS),
    "width 8": case(8, 5.6, 32, **EDITS),
    "few allowed, width 8": case(8, 5.8, 33, 3, **FEW),
    "penalties": case(8, 5.6, 35, repetition_penalty=0.6, presence_penalty=0.5, logit_bias={1: 2.0, 2: -1.0, 3: 1.0}),
    "filters": case(8, 5.6, 34, 3, temperature=0.8, top_p=0.9, **EDITS),
}


def draw(drawn: Case) -> list[stars.CompletionOutput]:
    return law.draw(drawn.policy, drawn.params, drawn.reward, tokenizer=Spaced())


def p(drawn: Case, outputs: list[stars.CompletionOutput]) -> float:
    """p of the committed segments under the law of the edited proposal."""
    edited = Edited(drawn.params)
    return p_value(followers(outputs), lambda prefix: segment_law(prefix, drawn, edited)[0])


@pytest.mark.parametrize("name", CASES)
def test_committed_segments_follow_the_law_of_the_edited_proposal(name):
    drawn = CASES[name]
    outputs = draw(drawn)
    assert p(drawn, outputs) > FALSE_POSITIVE_RATE
    metrics = [output.metrics for output in outputs]
    rate = sum(m.accepted for m in metrics) / sum(m.attempts_counted for m in metrics)
    assert 0.05 < rate < 0.2, rate


ERRORS = {
    "biases are left out": ("width 8", lambda edits: edits._replace(
        entries=edits.entries * torch.tensor([1, 1, 0], dtype=torch.int32))),
    "min_tokens is one less": ("width 8", lambda edits: edits._replace(base=edits.base + 1)),
    "bad words end with the segment": ("width 8", lambda edits: edits._replace(
        tail=torch.full_like(edits.tail, -1))),
    "bad words are left out": ("few allowed, width 8", lambda edits: edits._replace(
        word_count=torch.zeros_like(edits.word_count))),
    "all tokens are allowed": ("few allowed, width 8", lambda edits: edits._replace(
        mask_row=torch.full_like(edits.mask_row, -1))),
}


@pytest.mark.parametrize("error", ERRORS)
def test_the_law_sees_errors(error, monkeypatch):
    name, change = ERRORS[error]

    def changed(logits, lanes, edits):
        if libstars.available():
            libstars.leave_out()  # what is changed is changed at every step
        edit_logits(logits, lanes, change(edits))

    monkeypatch.setattr(stars.draft, "edit_logits", changed)
    assert p(CASES[name], draw(CASES[name])) < FALSE_POSITIVE_RATE


def test_penalties_come_after_edits(monkeypatch):
    """Where a bias changes the sign of a logit, which decides what a repetition penalty does."""
    given = []
    penalise = stars.draft.apply_penalties

    def earlier(logits, lanes, edits):
        given.append(edits)
        if libstars.available():
            libstars.leave_out()

    def later(logits, lanes, penalties):
        penalise(logits, lanes, penalties)
        edit_logits(logits, lanes, given[-1])

    drawn = CASES["penalties"]
    with monkeypatch.context() as patch:
        patch.setattr(stars.draft, "edit_logits", earlier)
        patch.setattr(stars.draft, "apply_penalties", later)
        outputs = draw(drawn)
    assert p(drawn, outputs) < FALSE_POSITIVE_RATE


def tokens(outputs: list[stars.CompletionOutput]) -> dict[Prefix, Counter]:
    """How often each token followed each prefix."""
    seen: dict[Prefix, Counter] = defaultdict(Counter)
    for output in outputs:
        for place, token in enumerate(output.token_ids):
            seen[tuple(output.token_ids[:place])][token] += 1
    return seen


def proposal(logits: np.ndarray, prefix: Prefix, params: stars.SamplingParams) -> dict[int, float]:
    kept = oracle.log_softmax(oracle.proposal(oracle.penalised(logits, PROMPT, list(prefix), params), params))
    return {token: math.exp(logprob) for token, logprob in enumerate(kept)}


def test_a_blend_is_edited_as_one_model_is():
    params = stars.SamplingParams(max_tokens=MAX_TOKENS, n=512, seed=41, presence_penalty=0.5, **EDITS)
    engine = toy_engine(MODEL, models={"guide": GUIDE.decoder()}, tokenizer=Spaced(), max_num_seqs=512,
                        max_num_lanes=512, cache_tokens=1 << 14)
    [output] = engine.generate({"prompt_token_ids": PROMPT}, params, stars.TokenGuidance(weight=0.6), use_tqdm=False)

    class Blend:
        def logits(self, ids):
            return 0.4 * MODEL.logits(ids) + 0.6 * GUIDE.logits(ids)

    edited = Edited(params, Blend())
    assert p_value(tokens(output.outputs), lambda prefix: proposal(edited.logits(PROMPT + list(prefix)), prefix, params)
                   ) > FALSE_POSITIVE_RATE


@pytest.mark.parametrize("width", [1, 3])
def test_what_is_enumerated_is_edited(width, monkeypatch):
    """Of the tokens that edits leave, the most probable ones, with biases in their scores."""
    params = stars.SamplingParams(max_tokens=MAX_TOKENS, n=512, seed=42, repetition_penalty=1.3, **EDITS)
    outputs = law.draw(Narrow(width), params, tokenizer=Spaced())
    monkeypatch.setattr("test_law_args.MODEL", Edited(params))
    assert p_value(followers(outputs), lambda prefix: softmax(scores(prefix, params, 4, 1.0), 0.7)
                   ) > FALSE_POSITIVE_RATE
