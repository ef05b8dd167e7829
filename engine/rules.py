"""Decisions: pure functions from what was drawn and scored to what is kept. Tuples in, tuples out.

A rule is a callable of two attributes. It sees every attempt at the segment that is being decided, of every
hypothesis of its group, and says which of them become history. It knows nothing of caches, models or devices. It
never changes what it is given, and calls with equal arguments give equal answers. What `State` says of rounds depends
on how many lanes there were: a text that is to be the same at any width must not depend on it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral, Real
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
    lowered: float = 0.0  # what a threshold is lowered by: `relaxed` times what the exhaustion says


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

    Of whole responses, one that reads in order sees those that have ended up to the first that has not, in the order of
    their slots. They are drawn as it wants them; once it decides, the others end where they are.

    `final(judged, state) -> Decision`, which a rule may have, is asked once all hypotheses of a group have ended and
    more than one is left: every one judged is EARLIER, or a whole response. Without it the highest reward wins.

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
    """The first accepted attempt of each hypothesis, under the law's rising threshold. beta = 0 is the hard rule.

    tests_last: False does not accept the attempt after which none may be drawn, so that the plan's exhaustion has its
    say; a relaxed threshold tests it too. Only of groups of one hypothesis.
    """

    alpha: float
    beta: float
    reward_threshold: float
    tests_last: bool = True
    in_order: ClassVar[bool] = True
    uniforms: ClassVar[int] = 1
    skips_rejected: ClassVar[bool] = True

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision:
        """Decides once every live hypothesis has an accepted attempt."""
        start = threshold_start(state.prompt_reward, self.alpha, self.reward_threshold)
        tested = self.tests_last or state.left or state.unscored or state.relaxed
        untested = None if tested or not judged else judged[-1]
        keep: dict[int, Keep] = {}
        notes = {}
        for one in judged:
            slot, attempt = one.hypothesis, one.attempt
            if attempt == EARLIER:
                keep[slot] = whole(one)
                continue
            tau = threshold(one.tokens, state.max_tokens, start, self.reward_threshold)
            if state.lowered and math.isfinite(tau):
                tau -= state.lowered
            reward = scored(one)
            accepted = slot not in keep and accepts(one.uniforms[0], reward, tau, self.beta)
            probability = accept_probability(reward, tau, self.beta)
            if one is untested:
                accepted, probability = False, 0.0
            notes[slot, attempt] = Note(tau, probability, accepted)
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
        return Decision([whole(winner)], _others(state, winner), notes)


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


@dataclass(frozen=True)
class SoftArgmax:
    """One attempt of all, number i with probability softmax(r_i / temperature); the other hypotheses are dropped."""

    temperature: float
    in_order: ClassVar[bool] = False
    uniforms: ClassVar[int] = 1

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        """Decides once every attempt was drawn."""
        if state.left:
            return None
        weights = _weights([scored(one) for one in judged], self.temperature)
        # The largest of log w - log(-log u): as exact as a walk along the sum, and not moved by a rounding of it.
        chosen = max(range(len(judged)), key=lambda index: -math.inf if not weights[index] else math.log(
            weights[index]) - math.log(-math.log(judged[index].uniforms[0])))
        total, winner = sum(weights), judged[chosen]
        notes = {(one.hypothesis, one.attempt): Note(None, weight / total, one is winner)
                 for one, weight in zip(judged, weights, strict=True)}
        return Decision([whole(winner)], _others(state, winner), notes)


@dataclass(frozen=True)
class FirstAccepted:
    """Of whole responses the first that is accepted under a constant threshold; the others are dropped."""

    beta: float
    reward_threshold: float
    in_order: ClassVar[bool] = True
    uniforms: ClassVar[int] = 1
    skips_rejected: ClassVar[bool] = True

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision:
        """Decides once one is accepted: log u < (r - t) / beta."""
        notes = {}
        for one in judged:
            reward, tau = scored(one), self.reward_threshold - state.lowered
            accepted = accepts(one.uniforms[0], reward, tau, self.beta)
            notes[one.hypothesis, one.attempt] = Note(tau, accept_probability(reward, tau, self.beta), accepted)
            if accepted:
                return Decision([whole(one)], _others(state, one), notes)
        return Decision([], [], notes)


@dataclass(frozen=True)
class DropWorst:
    """Of m live hypotheses the best max(1, round((1 - alpha) m)) by reward stay, finished ones included."""

    alpha: float
    in_order: ClassVar[bool] = False
    uniforms: ClassVar[int] = 0

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        """Decides once every attempt was drawn."""
        return None if state.left else _highest(judged, state, max(1, round((1.0 - self.alpha) * len(state.live))))


@dataclass(frozen=True)
class Highest:
    """The `count` attempts of the highest reward of all hypotheses, finished ones included; who has none is dropped."""

    count: int
    in_order: ClassVar[bool] = False
    uniforms: ClassVar[int] = 0

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        """Decides once every attempt was drawn."""
        return None if state.left else _highest(judged, state, self.count)


@dataclass(frozen=True)
class Resample:
    """`particles` hypotheses are drawn from those there are with weights exp((r - r_parent) / beta).

    multinomial: each by itself. systematic: at (u + i) / particles of the weights' sum, i = 0 … particles - 1, so that
    one of share s is drawn floor(s particles) times or once more. What had ended has weight 1. A hypothesis whose
    response so far has no reward, or -inf, begins at 0: all that compete with it do.
    """

    particles: int
    beta: float
    systematic: bool = False
    sample: bool = False  # whether the completion is a particle at random, or the best
    in_order: ClassVar[bool] = False
    uniforms: ClassVar[int] = 0

    @property
    def group_uniforms(self) -> int:
        """Random numbers of a round."""
        return 1 if self.systematic else self.particles

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        """Decides once every attempt was drawn."""
        if state.left:
            return None
        # Before the first segment all have the prompt's reward, and after weights that were all 0 all have -inf: what
        # all have in common changes no share.
        weights = _weights([scored(one) - (0.0 if one.parent_reward in (None, -math.inf) else one.parent_reward)
                            for one in judged], self.beta)
        edges = list(accumulate(weights))
        first, count = state.uniforms[0], self.particles
        places = [(first + index) / count for index in range(count)] if self.systematic else state.uniforms
        drawn = sorted(bisect_right(edges, place * edges[-1]) for place in places)
        kept = {judged[index].hypothesis for index in drawn}
        notes = {(one.hypothesis, one.attempt): Note(None, weight / edges[-1], one.hypothesis in kept)
                 for one, weight in zip(judged, weights, strict=True)}
        return Decision([whole(judged[index]) for index in drawn],
                        [slot for slot in state.live if slot not in kept], notes)

    def final(self, judged: Sequence[Judged], state: State) -> Decision:
        """Particles are worth the same once they were drawn: the completion is one at random, or the best."""
        winner = judged[int(state.uniforms[0] * len(judged))] if self.sample else best(judged)
        return Decision([whole(winner)], _others(state, winner))


def _weights(values: Sequence[float], scale: float) -> list[float]:
    """exp(value / scale) over that of the largest; of infinite differences the limit. All of -inf weigh the same."""
    top = max(values)
    return [1.0 if value == top else math.exp((value - top) / scale) for value in values]


def _highest(judged: Sequence[Judged], state: State, count: int) -> Decision:
    """The `count` attempts of the highest reward are kept, the earliest of equals; who has none is dropped."""
    ranked = sorted(judged, key=scored, reverse=True)[:count]  # stable: the earliest of equals first
    chosen = {(one.hypothesis, one.attempt) for one in ranked}
    kept = {one.hypothesis for one in ranked}
    notes = {(one.hypothesis, one.attempt): Note(None, None, (one.hypothesis, one.attempt) in chosen) for one in judged}
    return Decision([whole(one) for one in ranked], [slot for slot in state.live if slot not in kept], notes)


def _others(state: State, winner: Judged) -> list[int]:
    """The slots of all hypotheses but the winner's."""
    return [slot for slot in state.live if slot != winner.hypothesis]


OWN_RULES = frozenset({
    Threshold, Argmax, Always, SoftArgmax, FirstAccepted, DropWorst, Highest, Resample, RewardGuided})
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


@dataclass(frozen=True)
class BestSeen:
    """The attempt of the highest reward, the earliest of equals; without rewards the first."""

    draws: ClassVar[bool] = False  # whether `key` reads its random number

    def key(self, attempt: int, reward: float | None, uniform: float) -> float:
        """Of a hypothesis' attempts the one of the highest key is kept, the earliest of equals."""
        return -math.inf if reward is None else reward


@dataclass(frozen=True)
class First:
    """The first attempt, whatever its reward."""

    draws: ClassVar[bool] = False

    def key(self, attempt: int, reward: float | None, uniform: float) -> float:
        """As `BestSeen.key`."""
        return -attempt


@dataclass(frozen=True)
class Last:
    """The last attempt, whatever its reward."""

    draws: ClassVar[bool] = False

    def key(self, attempt: int, reward: float | None, uniform: float) -> float:
        """As `BestSeen.key`."""
        return attempt


@dataclass(frozen=True)
class Softmax:
    """Attempt i with probability exp(r_i / temperature) / sum over the attempts j seen of exp(r_j / temperature).

    A reward of -inf is never kept, unless all are: then the first is. Drawn as the argmax of r_i + temperature * g_i,
    with standard Gumbel noise g_i.
    """

    temperature: float = 1.0
    draws: ClassVar[bool] = True

    def key(self, attempt: int, reward: float | None, uniform: float) -> float:
        """As `BestSeen.key`; uniform: the attempt's own, in (0, 1)."""
        if reward is None or reward == -math.inf:
            return -math.inf
        return reward - self.temperature * math.log(-math.log(uniform))


@dataclass(frozen=True)
class Refuse:
    """Nothing: the response ends with finish_reason "refused" and what was committed before."""


@dataclass(frozen=True)
class Relax:
    """The rule is asked again about all attempts seen, with `State.relaxed` = 1, 2, … `times`; nothing is drawn.

    A threshold is lowered by `relaxed * by`, and tests every attempt with the random number that it had. Where nothing
    is accepted after `times`, `then` applies.
    """

    by: float
    times: int = 1
    then: Any = BestSeen()


@dataclass(frozen=True)
class BackUp:
    """The newest committed segment is taken back and drawn anew, at most `times` in a response; no random number of it
    comes again. In the first segment, or where none is left, `then` applies."""

    times: int = 1
    then: Any = BestSeen()


Pick = BestSeen | First | Last | Softmax
Exhaustion = Pick | Relax | BackUp | Refuse
EXHAUSTIONS: Mapping[str, Callable[..., Exhaustion]] = MappingProxyType({
    "best_seen": BestSeen, "first": First, "last": Last, "softmax": Softmax, "relax": Relax, "back_up": BackUp,
    "refuse": Refuse})
"""Exhaustions by the names that stand for them; "relax:0.5", "softmax:0.7" and "back_up:2" give the first argument."""
MAX_RELAXED = 1 << 10  # times that a rule is asked again
MAX_BACKED_UP = 1 << 20  # segments that a response takes back: it has no more


def exhaustion(given: Any) -> Exhaustion:
    """An exhaustion by its name, or as it is, with numbers of Python's own; ValueError says what it must be."""
    made = _by_name(given) if isinstance(given, str) else given
    if isinstance(made, Softmax):
        return Softmax(_above_zero("temperature", made.temperature))
    if isinstance(made, (Relax, BackUp)):
        then = exhaustion(made.then)
        if type(made) in [type(step) for step in steps(then)]:
            raise ValueError(f"it must hold {type(made).__name__} once: give what it has as `then` another end")
        if isinstance(made, Relax):
            return Relax(_above_zero("by", made.by), _times(made.times, MAX_RELAXED), then)
        return BackUp(_times(made.times, MAX_BACKED_UP), then)
    if isinstance(made, (BestSeen, First, Last, Refuse)):
        return made
    raise ValueError(f"it must be one of {', '.join(EXHAUSTIONS)}, or an object such as "
                     "stars.rules.Softmax(temperature=0.5)")


def steps(choice: Exhaustion) -> tuple[Exhaustion, ...]:
    """What is tried, one after the other: `choice`, what it has as `then`, and so on."""
    return choice, *(steps(choice.then) if isinstance(choice, (Relax, BackUp)) else ())


def _by_name(given: str) -> Any:
    name, colon, argument = given.partition(":")
    if name == "relax" and not colon:
        raise ValueError('it must say by how much, as "relax:0.5" does')
    if not colon:
        return EXHAUSTIONS[name]() if name in EXHAUSTIONS else None
    try:
        if name == "back_up":
            return BackUp(int(argument))
        return {"softmax": Softmax, "relax": Relax}[name](float(argument))
    except ValueError:
        raise ValueError("it must have a number after the colon") from None
    except KeyError:
        return None


def _above_zero(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except (OverflowError, ValueError):
        number = math.nan
    if not 0.0 < number < math.inf:
        raise ValueError(f"its {name} must be a finite number above 0")
    return number


def _times(value: Any, most: int) -> int:
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else 0
    if not 1 <= number <= most:
        raise ValueError(f"its times must be an integer from 1 to {most}")
    return number


def best(judged: Sequence[Judged]) -> Judged:
    """The one of the highest reward, the earliest of equals; without rewards the first."""
    return max(judged, key=lambda one: -math.inf if one.reward is None else one.reward)


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
