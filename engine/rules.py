"""Decisions: pure functions from what was drawn and scored to what is kept. Tuples in, tuples out.

A rule is a callable of two attributes. It sees every attempt at the segment that is being decided, of every
hypothesis of its group, and says which of them become history. It knows nothing of caches, models or devices. It
never changes what it is given, and calls with equal arguments give equal answers. What `State` says of rounds depends
on how many lanes there were: a text that is to be the same at any width must not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

EARLIER = 0
"""The attempt number of a hypothesis that had finished before this segment: nothing is drawn for it any more."""


class Judged(NamedTuple):
    """One attempt at a segment: tokens that continue a hypothesis, or a whole response."""

    hypothesis: int  # its slot in the group
    attempt: int  # from 1, over all rounds of the segment; EARLIER for a hypothesis that had finished before
    tokens: int  # n: response tokens, the attempt's included (EOS counts)
    finished: bool  # whether the response ends with it
    logprobs: Sequence[float]  # of the proposal as drawn; empty where it is not the LM itself (temperature, filters)
    raw_logprobs: Sequence[float]  # of the LM with its penalties at temperature 1, one for each drafted token
    per_token: Sequence[float]  # scores by token; empty for a scalar reward
    reward: float | None  # of the response with this attempt; None where the plan asks for none
    parent_reward: float | None  # of the response without it; None where it is not known
    uniforms: Sequence[float]  # in (0, 1), as many as the rule declares: the first is that of the accept test

    @property
    def drafted(self) -> int:
        """Tokens that were drawn for it."""
        return len(self.raw_logprobs)


class State(NamedTuple):
    """What else a rule may know when it is asked."""

    segment: int  # from 0
    round: int  # of this segment, from 0
    unscored: int  # attempts that were drawn and are not judged yet
    left: int  # attempts that may still be drawn, of all hypotheses together
    max_tokens: int  # N
    prompt_reward: float | None  # r(x), where the plan asks for it
    relaxed: int  # how often the rule was relaxed for this segment
    live: Sequence[int]  # slots of the group's hypotheses, finished ones included
    uniforms: Sequence[float]  # in (0, 1), of this round; as many as the rule's `group_uniforms`, if it has that
    memory: Any  # what this rule returned last; None before


class Keep(NamedTuple):
    """The first `tokens` drafted tokens of an attempt, and `then` tokens that were not drafted, become history."""

    hypothesis: int
    attempt: int
    tokens: int
    then: Sequence[int] = ()


class Note(NamedTuple):
    """What outputs, traces and metrics say of an attempt."""

    threshold: float | None
    probability: float | None  # of being accepted
    accepted: bool


class Decision(NamedTuple):
    """What becomes of a group. One that keeps and drops nothing decides nothing yet: its notes and memory count.

    Otherwise every live hypothesis is kept or dropped. A second `Keep` of a hypothesis is a fork: it takes a free slot,
    and so draws by itself from then on.
    """

    keep: Sequence[Keep]
    drop: Sequence[int] = ()
    notes: Mapping[tuple[int, int], Note] = MappingProxyType({})  # by (hypothesis, attempt)
    memory: Any = None


class Rule(Protocol):
    """in_order: asked after every scoring pass with a prefix, in attempt order, of every hypothesis' attempts; what it
    keeps must not depend on where the prefix was cut after the winner. Otherwise every attempt that was drawn is scored
    first. uniforms: random numbers that it needs of each attempt. A rule may also have `group_uniforms`, as many random
    numbers of a round, and `skips_rejected`: True says that it need not see again what a note of its rejected.

    None: nothing is decided. The loop scores what is unscored, else draws another round, and when nothing is left
    applies the plan's exhaustion. A kept attempt that its note does not call accepted counts as a fallback.
    """

    @property
    def in_order(self) -> bool: ...

    @property
    def uniforms(self) -> int: ...

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None: ...


# -- the law of acceptance, in float64 ----------------------------------------------------------------------------


def threshold_start(prompt_reward: float | None, alpha: float, reward_threshold: float) -> float:
    """r0 = (1 - alpha) * r(prompt) + alpha * reward_threshold. With alpha = 1, `prompt_reward` is not read."""
    if alpha == 1.0:
        return reward_threshold
    if prompt_reward is None:
        raise ValueError(f"alpha={alpha:g} needs the prompt's reward: ask for it in the plan's score")
    return (1.0 - alpha) * prompt_reward + alpha * reward_threshold


def threshold(tokens: int, max_tokens: int, start: float, reward_threshold: float) -> float:
    """tau(n) = min(t, r0 + n / N * (t - r0)), `tokens` = n response tokens including the candidate (EOS counts)."""
    if not math.isfinite(reward_threshold):
        return reward_threshold
    return min(reward_threshold, start + tokens / max_tokens * (reward_threshold - start))


def accept_probability(reward: float, tau: float, beta: float) -> float:
    """P(log u < (reward - tau) / beta) = min(1, exp((reward - tau) / beta)); beta = 0: the hard rule reward >= tau."""
    if reward == -math.inf or tau == math.inf:
        return 0.0
    if tau == -math.inf:
        return 1.0
    if beta == 0.0:
        return 1.0 if reward >= tau else 0.0
    return math.exp(min(0.0, (reward - tau) / beta))


def accepts(uniform: float, reward: float, tau: float, beta: float) -> bool:
    """log u < (reward - tau) / beta, with the edges of `accept_probability`; `uniform` is in (0, 1)."""
    if reward == -math.inf or tau == math.inf:
        return False
    if tau == -math.inf:
        return True
    if beta == 0.0:
        return reward >= tau
    return math.log(uniform) < (reward - tau) / beta


# -- rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """The first accepted attempt of each hypothesis, under the law's rising threshold. beta = 0 is the hard rule."""

    alpha: float
    beta: float
    reward_threshold: float
    in_order: ClassVar[bool] = True
    uniforms: ClassVar[int] = 1
    skips_rejected: ClassVar[bool] = True

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision:
        """Decides once every live hypothesis has an accepted attempt."""
        start = threshold_start(state.prompt_reward, self.alpha, self.reward_threshold)
        keep: dict[int, Keep] = {}
        notes = {}
        for one in judged:
            slot, attempt = one.hypothesis, one.attempt
            if attempt == EARLIER:
                keep[slot] = whole(one)
                continue
            tau = threshold(one.tokens, state.max_tokens, start, self.reward_threshold)
            reward = scored(one)
            accepted = slot not in keep and accepts(one.uniforms[0], reward, tau, self.beta)
            notes[slot, attempt] = Note(tau, accept_probability(reward, tau, self.beta), accepted)
            if accepted:
                keep[slot] = whole(one)
        return Decision(list(keep.values()) if len(keep) == len(state.live) else [], [], notes)


@dataclass(frozen=True)
class Argmax:
    """The attempt of the highest reward of all, the earliest of equals; the other hypotheses are dropped."""

    in_order: ClassVar[bool] = False
    uniforms: ClassVar[int] = 0

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        """Decides once every attempt was drawn."""
        if state.left:
            return None
        winner = max(judged, key=scored)  # max keeps the earliest of equals
        notes = {(one.hypothesis, one.attempt): Note(None, None, one is winner) for one in judged}
        return Decision([whole(winner)], [slot for slot in state.live if slot != winner.hypothesis], notes)


@dataclass(frozen=True)
class Always:
    """The first attempt of each hypothesis, whatever its reward."""

    in_order: ClassVar[bool] = True
    uniforms: ClassVar[int] = 0

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision:
        """Decides once every live hypothesis has an attempt."""
        first: dict[int, Judged] = {}
        for one in judged:
            first.setdefault(one.hypothesis, one)
        notes = {(one.hypothesis, one.attempt): Note(None, None, True) for one in first.values()}
        keep = [whole(one) for one in first.values()] if len(first) == len(state.live) else []
        return Decision(keep, [], notes)


@dataclass(frozen=True)
class RewardGuided:
    """Of each hypothesis the attempt of the highest score = weight * min(max(r, least), most) + log p, or a draw by it.

    log p is the sum of an attempt's raw log-probabilities: of one token its logit, but for a constant. temperature 0 is
    the argmax, the earliest of equals. Above it the attempt is drawn with probability softmax(score / temperature), as
    the argmax of score / temperature - log(-log u) with the uniform of each attempt. A reward of -inf is a score of
    -inf, whatever the weight and the bounds.
    """

    weight: float
    temperature: float = 0.0
    least: float = -math.inf
    most: float = math.inf
    in_order: ClassVar[bool] = False

    @property
    def uniforms(self) -> int:
        """One for a draw."""
        return 1 if self.temperature > 0.0 else 0

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        """Decides once every attempt of every live hypothesis was drawn."""
        if state.left > 0:
            return None
        winners: dict[int, tuple[float, Judged]] = {}
        for one in judged:
            score = self._score(one) if one.attempt != EARLIER else math.inf
            if one.hypothesis not in winners or score > winners[one.hypothesis][0]:
                winners[one.hypothesis] = score, one
        if len(winners) < len(state.live):
            return None
        chosen = [one for _, one in winners.values()]
        keys = {(one.hypothesis, one.attempt) for one in chosen}
        notes = {(one.hypothesis, one.attempt): Note(None, None, (one.hypothesis, one.attempt) in keys)
                 for one in judged if one.attempt != EARLIER}
        return Decision([whole(one) for one in chosen], [], notes)

    def _score(self, one: Judged) -> float:
        reward = scored(one)
        if reward == -math.inf:
            return reward
        score = self.weight * min(max(reward, self.least), self.most) + sum(one.raw_logprobs)
        if self.temperature > 0.0:
            score = score / self.temperature - math.log(-math.log(one.uniforms[0]))
        return score


OWN_RULES = frozenset({Threshold, Argmax, Always, RewardGuided})
"""Rules whose decisions always satisfy `problem`, as a test shows: those of others are checked each time."""


def whole(one: Judged) -> Keep:
    """All of an attempt."""
    return Keep(one.hypothesis, one.attempt, one.drafted)


def scored(one: Judged) -> float:
    """Its reward, which there must be."""
    if one.reward is None:
        raise ValueError("a rule that reads rewards was given none: score segments, or whole responses at their end")
    return one.reward


# -- what the loop applies where a rule decides nothing -----------------------------------------------------------


def best(judged: Sequence[Judged]) -> Judged:
    """The one of the highest reward, the earliest of equals; without rewards the first."""
    return max(judged, key=lambda one: -math.inf if one.reward is None else one.reward)


def best_seen(judged: Sequence[Judged], state: State) -> Decision:
    """Every hypothesis keeps its best attempt."""
    attempts: dict[int, list[Judged]] = {}
    for one in judged:
        attempts.setdefault(one.hypothesis, []).append(one)
    return Decision([whole(best(ones)) for ones in attempts.values()])


EXHAUST: dict[str, Callable[[Sequence[Judged], State], Decision]] = {"best_seen": best_seen}
"""A plan's exhaustion by name."""


# -- what a decision must satisfy ---------------------------------------------------------------------------------


def decides(decision: Decision | None) -> bool:
    """Whether something is kept or dropped."""
    return decision is not None and bool(decision.keep or decision.drop)


def problem(decision: Any, judged: Sequence[Judged], state: State, population: int, vocab_size: int,
            stop_ids: Collection[int], whole_responses: bool) -> str | None:
    """What is wrong with a decision, as the end of a sentence that begins with the rule's name; None if it can be done.

    population: the most hypotheses of the group. stop_ids: tokens that end a response. whole_responses: whether
    attempts are whole responses, which can be neither cut, continued nor forked.
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
        fault = _keep_problem(keep, one, state, vocab_size, stop_ids, whole_responses)
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
                  whole_responses: bool) -> str | None:
    which = f"attempt {keep.attempt} of hypothesis {keep.hypothesis}"
    then = keep.then
    if type(keep.tokens) is not int or not 0 <= keep.tokens <= one.drafted:
        return f"keeps {keep.tokens!r} tokens of {which}, which has {one.drafted}"
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
