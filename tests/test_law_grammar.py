"""The law under a grammar: committed segments against the exact distribution of the constrained proposal.

As in test_law.py, of a language model whose tokens are those that a list of all texts of the language allows, which
knows nothing of llguidance: at an accept rate of about a tenth, so that most candidates are rejected, one attempt at a
time, three and eight of them. Segments end inside a value. A comparison fails a correct engine once in 1e6 choices of
its seed, or less.
"""

from __future__ import annotations

import dataclasses

import pytest

import law
import stars
import stars.grammar
from law import FALSE_POSITIVE_RATE, MODEL, PROMPT, Prefix, followers, p_value
from letters import LETTERS, Constrained, Language
from test_law import Case, segment_law
from test_law_args import Narrow, scores, softmax

pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

WORDS = Language("(a|bc|abb){1,4}c?", 13)  # of MAX_TOKENS tokens with at most two letters each
EVEN = Language("((a|b)(a|b|c))*", 10)


def case(width: int, threshold: float, seed: int, language: Language = WORDS, segment_size: int = 2, attempts: int = 12,
         **params) -> tuple[Case, Language]:
    policy = stars.STARS(segment_size, attempts, 0.2, 0.5, threshold, width)
    asked = stars.SamplingParams(max_tokens=law.MAX_TOKENS, n=law.DRAWS // 4, seed=seed,
                                 structured_outputs={"regex": language.regex}, **params)
    return Case(policy, asked), language


CASES = {
    "width 1": case(1, 5.6, 51),
    "width 3": case(3, 5.6, 52),
    "width 8": case(8, 5.6, 53),
    "width 8, segments of 3": case(8, 5.2, 54, EVEN, 3),
    "filters and penalties": case(3, 5.6, 55, segment_size=3, temperature=0.8, top_p=0.9, presence_penalty=0.5),
    "no cap in reach": case(8, 5.2, 56, attempts=1000),
}


def draw(drawn: Case, policy=None) -> list[stars.CompletionOutput]:
    return law.draw(policy or drawn.policy, drawn.params, drawn.reward, tokenizer=LETTERS)


def p(drawn: Case, language: Language, outputs: list[stars.CompletionOutput]) -> float:
    """p of the committed segments under the law of the constrained proposal."""
    constrained = Constrained(MODEL, language, len(PROMPT))
    return p_value(followers(outputs), lambda prefix: segment_law(prefix, drawn, constrained)[0])


@pytest.mark.parametrize("name", CASES)
def test_committed_segments_follow_the_law_of_the_constrained_proposal(name):
    drawn, language = CASES[name]
    outputs = draw(drawn)
    assert p(drawn, language, outputs) > FALSE_POSITIVE_RATE
    for output in outputs:
        text = LETTERS.decode(output.token_ids)
        assert output.finish_reason in ("stop", "length")
        assert text in (language.texts if output.finish_reason == "stop" else language.beginnings)
    metrics = [output.metrics for output in outputs]
    rate = sum(m.accepted for m in metrics) / sum(m.attempts_counted for m in metrics)
    assert 0.05 < rate < 0.2, rate


def test_the_text_does_not_depend_on_the_width():
    drawn = CASES["width 8"][0]
    drawn = drawn._replace(params=dataclasses.replace(drawn.params, n=128))
    found = []
    for width in (1, 3, 8):
        policy = stars.STARS(2, 12, 0.2, 0.5, 5.6, width)
        found.append([output.token_ids for output in draw(drawn._replace(policy=policy))])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("width", [1, 3])
def test_what_is_enumerated_is_allowed(width, monkeypatch):
    """The most probable of the tokens that the grammar allows, as many as there are."""
    params = stars.SamplingParams(max_tokens=law.MAX_TOKENS, n=512, seed=62, repetition_penalty=1.3,
                                  structured_outputs={"regex": WORDS.regex})
    outputs = law.draw(Narrow(width), params, tokenizer=LETTERS)
    monkeypatch.setattr("test_law_args.MODEL", Constrained(MODEL, WORDS, len(PROMPT)))

    def exact(prefix: Prefix) -> dict:
        return softmax(scores(prefix, params, 4, 1.0), 0.7)

    assert p_value(followers(outputs), exact) > FALSE_POSITIVE_RATE


# -- errors that the law must see -------------------------------------------------------------------------------------


def lanes_share_a_state(monkeypatch):
    """What one lane draws moves the others, and the attempts after it."""
    monkeypatch.setattr(stars.grammar.Matcher, "branch", lambda self: self)


def the_loser_stays(monkeypatch):
    """The state that a response goes on from is that of its last lane, whoever has won."""
    def stale(self, token_ids, lanes):
        trunk = self._last[-1]
        self._last = [trunk, *(trunk.branch() for _ in range(lanes))]
        return self._last[1:]

    monkeypatch.setattr(stars.grammar.Branches, "at", stale)


def draws_are_not_followed(monkeypatch):
    """Each token of a segment gets the mask of the first."""
    monkeypatch.setattr(stars.grammar.Matcher, "accept", lambda self, token: None)


def ends_everywhere(monkeypatch):
    """EOS is allowed wherever anything is."""
    fill = stars.grammar.Matcher.fill

    def ending(self, row):
        fill(self, row)
        if row.any():
            row[0] |= 1

    monkeypatch.setattr(stars.grammar.Matcher, "fill", ending)


def never_ends_early(monkeypatch):
    """EOS is left out where the text may also go on."""
    fill = stars.grammar.Matcher.fill

    def going_on(self, row):
        fill(self, row)
        if (row & ~1).any():
            row &= ~1

    monkeypatch.setattr(stars.grammar.Matcher, "fill", going_on)


@pytest.mark.parametrize("error", [lanes_share_a_state, the_loser_stays, draws_are_not_followed,
                                   ends_everywhere, never_ends_early], ids=lambda error: error.__name__)
def test_the_law_sees_errors(error, monkeypatch):
    """Some of them lead to texts that cannot go on: then responses fail, which is as well seen."""
    drawn, language = CASES["width 8"]
    error(monkeypatch)
    try:
        outputs = draw(drawn)
    except AssertionError:
        return
    assert p(drawn, language, outputs) < FALSE_POSITIVE_RATE
