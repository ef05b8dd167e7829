"""Rules as pure functions: what they keep, drop and note, and that the cut of the prefix they see changes nothing."""

from __future__ import annotations

import ast
import math
import re
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stars import rules
from stars.decision_check import problem
from stars.exhaustions import BackUp, BestSeen, First, Last, Refuse, Relax, Softmax, exhaustion, steps
from stars.rules import (
    EARLIER,
    AcceptPrefix,
    Always,
    Argmax,
    Decision,
    DropWorst,
    FirstAbove,
    FirstAccepted,
    GuidedDraft,
    Highest,
    Judged,
    Keep,
    Note,
    Resample,
    RewardGuided,
    SoftArgmax,
    State,
    Threshold,
    accept_probability,
    accepts,
    decides,
    threshold,
    threshold_start,
)

LOGPROBS = (-1.0, -2.0, -0.5)


def judged(hypothesis: int = 0, attempt: int = 1, reward: float | None = 0.0, uniform: float = 0.5, tokens: int = 3,
           finished: bool = False) -> Judged:
    return Judged(hypothesis, attempt, tokens, finished, (), LOGPROBS, (), reward, None, (uniform,))


def earlier(hypothesis: int, reward: float | None = 0.0) -> Judged:
    return Judged(hypothesis, EARLIER, 9, True, (), (), (), reward, reward, ())


def state(live: tuple[int, ...] = (0,), left: int = 0, prompt_reward: float | None = 0.25, max_tokens: int = 12,
          unscored: int = 0) -> State:
    return State(0, 0, unscored, left, max_tokens, prompt_reward, 0, live, (), None)


def test_rules_import_nothing_but_the_standard_library():
    tree = ast.parse(Path(rules.__file__).read_text(encoding="utf8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert names and all(name.split(".")[0] in sys.stdlib_module_names for name in names), names


# -- the threshold ------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.floats(-4.0, 4.0), st.just(-math.inf))
THRESHOLDS = st.builds(Threshold, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.4, 1.5]),
                       st.sampled_from([-math.inf, -1.0, 0.5, 2.0, math.inf]))
ATTEMPTS = st.lists(st.tuples(NUMBERS, st.floats(1e-6, 1.0 - 1e-6), st.integers(1, 12)), min_size=1, max_size=9)


@settings(max_examples=300)
@given(THRESHOLDS, st.lists(ATTEMPTS, min_size=1, max_size=3), st.data())
def test_what_the_threshold_keeps_does_not_depend_on_where_the_prefix_was_cut(rule, population, data):
    """In-order rules: any prefixes that hold each winner give the same decision; any that miss one give none."""
    everything = [[judged(slot, attempt, reward, uniform, tokens) for attempt, (reward, uniform, tokens)
                   in enumerate(attempts, 1)] for slot, attempts in enumerate(population)]
    live = tuple(range(len(population)))
    start = threshold_start(0.25, rule.alpha, rule.reward_threshold) if math.isfinite(rule.reward_threshold) else 0.0
    winners = [next((one.attempt for one in ones if accepts(one.uniforms[0], one.reward, threshold(
        one.tokens, 12, start, rule.reward_threshold), rule.beta)), None) for ones in everything]
    cuts = [data.draw(st.integers(0, len(ones)), label="cut") for ones in everything]
    seen = [one for ones, cut in zip(everything, cuts, strict=True) for one in ones[:cut]]
    decision = rule(seen, state(live, left=3, unscored=sum(map(len, everything)) - len(seen)))
    if all(winner is not None and winner <= cut for winner, cut in zip(winners, cuts, strict=True)):
        assert decision.keep == [Keep(slot, winner, 3) for slot, winner in enumerate(winners)]
    else:
        assert decision.keep == []
    assert decision.drop == []
    for one in seen:  # whatever is decided, every attempt that was seen is noted, and only winners as accepted
        note = decision.notes[one.hypothesis, one.attempt]
        tau = threshold(one.tokens, 12, start, rule.reward_threshold)
        assert note == Note(tau, accept_probability(one.reward, tau, rule.beta),
                            one.attempt == winners[one.hypothesis])


def test_a_group_is_decided_when_all_of_it_is():
    rule = Threshold(1.0, 0.0, 1.0)
    ones = [judged(0, 1, 2.0), judged(1, 1, 0.5), judged(1, 2, 1.5)]
    assert rule(ones[:2], state((0, 1))).keep == []
    assert rule(ones, state((0, 1))).keep == [Keep(0, 1, 3), Keep(1, 2, 3)]
    assert rule([*ones, earlier(2)], state((0, 1, 2))).keep == [Keep(0, 1, 3), Keep(1, 2, 3), Keep(2, EARLIER, 0)]


def test_the_last_attempt_may_be_left_untested():
    """It is the one after which none may be drawn, whether it was scored with others or alone."""
    rule = Threshold(1.0, 0.0, 1.0, tests_last=False)
    ones = [judged(0, 1, 0.5), judged(0, 2, 1.5)]
    assert rule(ones, state(left=1)).keep == rule(ones, state(unscored=1)).keep == [Keep(0, 2, 3)]
    decision = rule(ones, state())
    assert decision.keep == [] and decision.notes[0, 2] == Note(1.0, 0.0, False)
    assert rule([judged(0, 1, 1.5), judged(0, 2, 1.5)], state()).keep == [Keep(0, 1, 3)]
    assert rule(ones[1:], state()).keep == [] and rule([], state()).keep == []
    assert rule(ones, state()._replace(relaxed=1)).keep == [Keep(0, 2, 3)]
    assert Threshold(1.0, 0.0, 1.0)(ones, state()).keep == [Keep(0, 2, 3)]


def test_a_threshold_that_starts_from_the_prompt_needs_its_reward():
    with pytest.raises(ValueError, match="alpha=0.5 needs the prompt's reward"):
        threshold_start(None, 0.5, 1.0)
    assert threshold_start(None, 1.0, 3.0) == 3.0 and threshold_start(1.0, 0.25, 3.0) == 1.5


# -- argmax, always, best seen ------------------------------------------------------------------------------------


def test_argmax_is_of_all_hypotheses_and_attempts():
    ones = [judged(0, 1, 1.0), judged(0, 2, 3.0), judged(2, 1, 3.0), judged(2, 2, -math.inf)]
    assert Argmax()(ones, state((0, 2), left=1)) is None
    decision = Argmax()(ones, state((0, 2)))
    assert decision.keep == [Keep(0, 2, 3)] and decision.drop == [2]  # the earliest of equals
    assert {key for key, note in decision.notes.items() if note.accepted} == {(0, 2)} and len(decision.notes) == 4
    assert Argmax()([earlier(0, 9.0), *ones[2:]], state((0, 2))).keep == [Keep(0, EARLIER, 0)]
    assert Argmax()([judged(reward=-math.inf)], state()).keep == [Keep(0, 1, 3)]


def test_always_keeps_the_first_attempt_without_a_reward():
    decision = Always()([judged(0, 1, None), judged(0, 2, None), judged(1, 1, None)], state((0, 1), left=5))
    assert decision.keep == [Keep(0, 1, 3), Keep(1, 1, 3)] and decision.drop == []
    assert decision.notes == {(0, 1): Note(None, None, True), (1, 1): Note(None, None, True)}


def kept(pick, rewards, uniforms=None) -> int:
    """The attempt that an exhaustion keeps, from 1."""
    keys = [pick.key(attempt, reward, 0.5 if uniforms is None else uniforms[attempt - 1])
            for attempt, reward in enumerate(rewards, 1)]
    return keys.index(max(keys)) + 1


def test_what_is_kept_of_attempts_that_were_all_rejected():
    assert kept(BestSeen(), [-math.inf, -math.inf]) == kept(BestSeen(), [None, None]) == 1
    assert kept(BestSeen(), [0.5, 0.75, 0.75]) == 2  # the earliest of equals
    assert kept(First(), [0.5, 0.75, 0.75]) == 1 and kept(Last(), [0.5, 0.75, -math.inf]) == 3
    for first in (0.1, 0.4, 0.9):  # two of equal reward: the argmax of the noise, which rises with the uniform
        assert kept(Softmax(0.7), [1.0, 1.0], [first, 0.5]) == (1 if first > 0.5 else 2)
    assert kept(Softmax(0.7), [-math.inf, -9.0], [1 - 2**-25, 2**-25]) == 2
    assert kept(Softmax(0.7), [-math.inf, -math.inf], [0.1, 0.9]) == 1
    assert kept(Softmax(1e-9), [0.0, 1e-3], [0.99, 0.01]) == 2 and kept(Softmax(1e9), [0.0, 1e3], [0.99, 0.01]) == 1


def test_exhaustions_have_names_and_arguments():
    assert exhaustion("best_seen") == BestSeen() and exhaustion("first") == First() and exhaustion("last") == Last()
    assert exhaustion("softmax") == Softmax(1.0) and exhaustion("softmax:0.7") == Softmax(0.7)
    assert exhaustion("relax:0.5") == Relax(0.5, 1, BestSeen()) and exhaustion("refuse") == Refuse()
    assert exhaustion("back_up") == BackUp(1, BestSeen()) and exhaustion("back_up:2") == BackUp(2, BestSeen())
    chain = exhaustion(Relax(2, 3, BackUp(2, "softmax:0.7")))
    assert steps(chain) == (chain, BackUp(2, Softmax(0.7)), Softmax(0.7)) and type(chain.by) is float


@pytest.mark.parametrize("given, must", [
    ("worst",
     "it must be one of best_seen, first, last, softmax, relax, back_up, refuse, redraft, or an object such as"),
    (None, "it must be one of best_seen"), (Softmax, "it must be one of best_seen"), ("last:2", "must be one of best_"),
    ("relax", 'it must say by how much, as "relax:0.5" does'), ("softmax:", "it must have a number after the colon"),
    ("softmax:0", "its temperature must be a finite number above 0"), ("relax:nan", "its by must be a finite number"),
    ("back_up:0", "its times must be an integer from 1 to 1048576"), ("back_up:1.5", "must have a number after"),
    (Relax(True), "its by must be"), (Relax(0.5, 0), "its times must be an integer from 1 to 1024"),
    (BackUp(1, Relax(0.5, 1, BackUp())), "it must hold BackUp once"), (BackUp(then="no"), "it must be one of best"),
])
def test_what_is_no_exhaustion(given, must):
    with pytest.raises(ValueError, match=f"^{re.escape(must)}" if must.startswith("it") else re.escape(must)):
        exhaustion(given)


def test_a_lowered_threshold_is_noted():
    rule, ones = Threshold(1.0, 0.0, 2.0), [judged(0, 1, 1.0), judged(0, 2, 1.6)]
    assert rule(ones, state()).keep == []
    decision = rule(ones, state()._replace(relaxed=1, lowered=0.5))
    assert decision.keep == [Keep(0, 2, 3)] and decision.notes[0, 1] == Note(1.5, 0.0, False)
    assert Threshold(1.0, 0.0, math.inf)(ones, state()._replace(lowered=math.inf)).keep == []


def test_guided_by_rewards_the_highest_score_of_each_hypothesis():
    def token(hypothesis: int, attempt: int, logprob: float, reward: float, uniform: float = 0.5) -> Judged:
        return Judged(hypothesis, attempt, 3, False, (), (logprob,), (), reward, None, (uniform,))

    ones = [token(0, 1, -1.0, 0.0), token(0, 2, -2.0, 1.0), token(0, 3, -3.0, 2.5), token(1, 1, -1.0, 0.0)]
    assert RewardGuided(1.0)(ones, state((0, 1), left=1)) is None
    for weight, least, most, winner in ((0.5, -math.inf, math.inf, 1), (1.0, -math.inf, math.inf, 3), (
            1.5, -math.inf, 1.0, 2), (1.0, -math.inf, 1.0, 1), (-9.0, 0.5, 9.0, 1), (-9.0, 3.0, 9.0, 1)):
        decision = RewardGuided(weight, 0.0, least, most)(ones, state((0, 1)))
        assert decision.keep == [Keep(0, winner, 1), Keep(1, 1, 1)] and not decision.drop, (weight, least, most)
        assert {key for key, note in decision.notes.items() if note.accepted} == {(0, winner), (1, 1)}
    # The draw: score / temperature - log(-log u); here log p is what the uniform makes up for, or just does not.
    drawn = [token(0, 1, -1.0, 0.0, 0.2), token(0, 2, -2.0, 0.0, 0.9)]  # noise -0.476 and 2.250
    for temperature, winner in ((1.0, 2), (0.4, 2), (0.36, 1)):
        rule = RewardGuided(1.0, temperature)
        assert rule.uniforms == 1 and rule(drawn, state()).keep == [Keep(0, winner, 1)]
    assert RewardGuided(1.0).uniforms == 0
    # A reward of -inf loses to any other, whatever its weight; of nothing else the first is kept.
    lost = [token(0, 1, -1.0, -math.inf), token(0, 2, -9.0, -5.0)]
    for rule in (RewardGuided(-1.0), RewardGuided(0.0, 0.5), RewardGuided(2.0, 0.0, 0.0, 1.0)):
        assert rule(lost, state()).keep == [Keep(0, 2, 1)] and rule(lost[:1], state()).keep == [Keep(0, 1, 1)]
    assert RewardGuided(1.0)([earlier(0), token(1, 1, -1.0, 0.0)], state((0, 1))).keep == [
        Keep(0, EARLIER, 0), Keep(1, 1, 1)]


def test_the_first_above():
    """Strictly above, in order; one that has no reward is kept; nothing is decided before every hypothesis has one."""
    rule = FirstAbove(0.5)
    ones = [judged(attempt=1, reward=0.5), judged(attempt=2, reward=0.6), judged(attempt=3, reward=0.9)]
    decision = rule(ones, state())
    assert [(keep.hypothesis, keep.attempt) for keep in decision.keep] == [(0, 2)]
    assert [decision.notes[0, place] for place in (1, 2, 3)] == [
        Note(0.5, None, False), Note(0.5, None, True), Note(0.5, None, False)]
    assert not rule(ones[:1], state()).keep and not rule(ones, state((0, 1))).keep
    [alone] = rule([judged(attempt=1, reward=None)], state()).keep
    assert alone.attempt == 1


@pytest.mark.parametrize("rule", [Threshold(1.0, 0.0, 0.0), Argmax(), RewardGuided(1.0)])
def test_rules_that_read_rewards_say_where_there_are_none(rule):
    with pytest.raises(ValueError, match="was given none: score segments"):
        rule([judged(reward=None)], state())


# -- what a decision must satisfy ---------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.one_of(THRESHOLDS, st.sampled_from([
    Argmax(), Always(), SoftArgmax(0.7), FirstAccepted(0.5, 1.0), DropWorst(0.4), Highest(1), Highest(3),
    Resample(3, 0.5), Resample(3, 0.5, systematic=True), RewardGuided(0.7), RewardGuided(-2.0, 0.5, 0.0, 1.0),
    FirstAbove(), FirstAbove(-1.0), AcceptPrefix(3), GuidedDraft(0.7, 0.5)])), st.integers(0, 2),
       st.lists(st.one_of(st.just([]), ATTEMPTS), min_size=1, max_size=3), st.integers(0, 3), st.booleans())
def test_the_packages_own_rules_make_decisions_that_can_be_done(rule, over, population, left, finished):
    """The loop does not check them. `over`: how many of the hypotheses had finished before. Others may have no
    attempt that is scored yet; rules that do not read in order are asked when all are."""
    assume(all(population) or rule.in_order)
    assume(not over or not isinstance(rule, (SoftArgmax, FirstAccepted)))  # what had ended has no random numbers
    assume(not isinstance(rule, Resample) or all(len(attempts) == 1 for attempts in population))
    assert type(rule) in rules.OWN_RULES and len(rules.OWN_RULES) == 12
    live = tuple(range(len(population)))
    ones = [one for slot, attempts in enumerate(population) for one in (
        [earlier(slot)] if slot < over else
        [judged(slot, attempt, reward, uniform, 3 + tokens % 10, finished) for attempt, (reward, uniform, tokens)
         in enumerate(attempts, 1)])]
    now = state(live, left)._replace(uniforms=(1e-7, 0.4, 1 - 1e-7)[: getattr(rule, "group_uniforms", 0)])
    decision = rule(ones, now)
    most = max(len(live), rule.particles if isinstance(rule, Resample) else getattr(rule, "count", 0))
    assert problem(decision, ones, now, most, 11, (0, 7), False, isinstance(rule, AcceptPrefix)) is None
    if decision is not None and decides(decision) and hasattr(rule, "final"):
        over = [earlier(slot, one.reward) for slot, one in enumerate(ones)]
        assert problem(rule.final(over, now), over, now, len(live), 11, (0, 7), False) is None


def asked(decision, ones=None, live=(0,), population=2, wholes=False, max_tokens=12) -> str | None:
    ones = [judged(slot) for slot in live] if ones is None else ones
    return problem(decision, ones, state(live, max_tokens=max_tokens), population, 11, (0, 7), wholes)


@pytest.mark.parametrize("decision", [
    None, Decision([]), Decision([Keep(0, 1, 3)]), Decision([Keep(0, 1, 1)]), Decision([Keep(0, 1, 0, [4])]),
    Decision([Keep(0, 1, 2, (4, 5, 7))]), Decision([Keep(0, 1, 3), Keep(0, 1, 3)]), Decision([Keep(0, 1, 3, [1] * 9)]),
])
def test_decisions_that_can_be_done(decision):
    assert asked(decision) is None


@pytest.mark.parametrize("keep, fault", [
    (Keep(0, 1, 4), "keeps 4 tokens of attempt 1 of hypothesis 0, which has 3"),
    (Keep(0, 1, True), "keeps True tokens"), (Keep(0, 1, -1, [1]), "keeps -1 tokens"),
    (Keep(0, 1, 0), "keeps no token"), (Keep(0, 2, 3), "attempt 2 of hypothesis 0, which was not judged"),
    (Keep(0, 1, 3, [1] * 10), "past max_tokens=12"), (Keep(0, 1, 3, [7, 1]), "after a token that ends the response"),
    (Keep(0, 1, 3, [11]), "no list of token ids below 11"), (Keep(0, 1, 3, [-1]), "no list of token ids below 11"),
    (Keep(0, 1, 3, [1.0]), "no list of token ids below 11"), (Keep(0, 1, 3, None), "no list of token ids"),
])
def test_what_cannot_be_kept(keep, fault):
    assert fault in asked(Decision([keep]))


def test_what_has_ended_is_not_continued():
    ended = [judged(finished=True)]
    assert asked(Decision([Keep(0, 1, 3)]), ended) is None
    assert asked(Decision([Keep(0, 1, 2, [4])]), ended) is None  # cut before its end
    assert "with which the response ends" in asked(Decision([Keep(0, 1, 3, [4])]), ended)
    assert "with which the response ends" in asked(Decision([Keep(0, EARLIER, 0, [4])]), [earlier(0)])
    assert asked(Decision([Keep(0, EARLIER, 0)]), [earlier(0)]) is None
    assert "whole response" in asked(Decision([Keep(0, 1, 2)]), ended, wholes=True)
    assert "whole response" in asked(Decision([Keep(0, 1, 3)] * 2), ended, wholes=True)


@pytest.mark.parametrize("decision, fault", [
    (Decision([Keep(0, 1, 3)]), "leaves hypothesis 1 neither kept nor dropped"),
    (Decision([Keep(0, 1, 3)], [0, 1]), "drops hypothesis 0, which it keeps too"),
    (Decision([Keep(0, 1, 3)], [1, 2]), "drops hypothesis 2, which is not there"),
    (Decision([], [0, 1]), "drops every hypothesis"),
    (Decision([Keep(0, 1, 3)] * 3, [1]), "keeps 3 hypotheses, which is more than the population of 2"),
    ("no", "returned str instead of"), (Decision([("x",)]), "keeps tuple instead of"),
    (Decision([], notes={0: Note(None, None, True)}), "returned a note of 0, which is no (hypothesis, attempt)"),
    (Decision([], notes=None), "returned notes that are no"), (Decision([], notes={(0, 1): 1.0}), "returned notes"),
])
def test_decisions_that_cannot_be_done(decision, fault):
    assert fault in asked(decision, live=(0, 1))
