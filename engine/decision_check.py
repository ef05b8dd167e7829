"""Whether a decision can be done: those of rules that are not the package's own are checked each time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

from stars.rules import EARLIER, Decision, Draw, Judged, Keep, Note, State, decides


def problem(decision: Any, judged: Sequence[Judged], state: State, population: int, vocab_size: int,
            stop_ids: Collection[int], whole_responses: bool, draws: bool = False) -> str | None:
    """What is wrong with a decision, as the end of a sentence that begins with the rule's name; None if it can be done.

    population: the most hypotheses of the group. stop_ids: tokens that end a response. whole_responses: whether
    attempts are whole responses, which can be neither cut, continued nor forked. draws: whether a token may be drawn
    after the kept ones of an attempt.
    """
    if decision is None:
        return None
    if not isinstance(decision, Decision):
        return f"returned {type(decision).__name__} instead of a stars.rules.Decision or None"
    if not isinstance(decision.notes, Mapping) or not all(
            isinstance(note, Note) for note in decision.notes.values()):
        return "returned notes that are no stars.rules.Note by (hypothesis, attempt)"
    shown = {(one.hypothesis, one.attempt): one for one in judged}
    for key in decision.notes:
        if key not in shown:
            return f"returned a note of {key!r}, which is no (hypothesis, attempt) that was judged"
    for threshold, probability, accepted in decision.notes.values():
        if type(accepted) is not bool or any(
                value is not None and not isinstance(value, (int, float)) for value in (threshold, probability)):
            return "returned notes whose threshold, probability and accepted are not a float, a float and a bool"
    if not decides(decision):
        return None
    kept: set[int] = set()
    for keep in decision.keep:
        if not isinstance(keep, Keep):
            return f"keeps {type(keep).__name__} instead of a stars.rules.Keep"
        one = shown.get((keep.hypothesis, keep.attempt))
        if one is None or not isinstance(keep.attempt, Integral):
            return f"keeps attempt {keep.attempt!r} of hypothesis {keep.hypothesis!r}, which was not judged"
        kept.add(keep.hypothesis)
        fault = _keep_problem(keep, one, state, vocab_size, stop_ids, whole_responses, draws)
        if fault is not None:
            return fault
    for slot in decision.drop:
        if slot not in state.live or slot in kept:
            return (f"drops hypothesis {slot!r}, which it keeps too" if slot in kept else
                    f"drops hypothesis {slot!r}, which is not there")
    if len(set(decision.drop)) < len(decision.drop):
        return "drops a hypothesis twice"
    for slot in state.live:
        if slot not in kept and slot not in decision.drop:
            return f"leaves hypothesis {slot} neither kept nor dropped"
    if not decision.keep:
        return "drops every hypothesis of its group"
    if len(decision.keep) > population:
        return f"keeps {len(decision.keep)} hypotheses, which is more than the population of {population}"
    if whole_responses and len(decision.keep) > len(kept):
        return "forks a whole response, which has ended"
    return None


def _keep_problem(keep: Keep, one: Judged, state: State, vocab_size: int, stop_ids: Collection[int],
                  whole_responses: bool, draws: bool) -> str | None:
    which = f"attempt {keep.attempt} of hypothesis {keep.hypothesis}"
    then = keep.then
    if type(keep.tokens) is not int or not 0 <= keep.tokens <= one.drafted:
        return f"keeps {keep.tokens!r} tokens of {which}, which has {one.drafted}"
    if isinstance(then, Draw):
        if not draws:
            return f"draws a token after {which}, for which nothing was read: the plan must read a filtered Ratio"
        if then.source not in ("residual", "judge") or then.source == "residual" and keep.tokens == one.drafted:
            return f"draws a token of {then.source!r} after {keep.tokens} tokens of {which}, of which there is none"
        then = (0,)
    if not isinstance(then, Sequence) or any(type(token) is not int or not 0 <= token < vocab_size for token in then):
        return f"continues {which} with what is no list of token ids below {vocab_size}"
    if then and one.finished and keep.tokens == one.drafted:
        return f"continues {which}, with which the response ends"
    if any(token in stop_ids for token in then[:-1]):
        return f"continues {which} after a token that ends the response"
    if whole_responses and keep.tokens != one.drafted:
        return f"cuts {which}, which is a whole response"
    if one.attempt != EARLIER and not keep.tokens and not then:
        return f"keeps no token of {which}"
    if one.tokens - one.drafted + keep.tokens + len(then) > state.max_tokens:
        return f"continues {which} past max_tokens={state.max_tokens}"
    return None
