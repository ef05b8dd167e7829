"""Decisions: pure functions from what was drawn and scored to what is kept. Tuples in, tuples out.

A rule is a callable of two attributes. It sees every attempt at the segment that is being decided, of every
hypothesis of its group, and says which of them become history. It knows nothing of caches, models or devices. It
never changes what it is given, and calls with equal arguments give equal answers. What `State` says of rounds depends
on how many lanes there were: a text that is to be the same at any width must not depend on it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

EARLIER = 0
"""The attempt number of a hypothesis that had finished before this segment: nothing is drawn for it any more."""


class Judged(NamedTuple):
    """One attempt at a segment: tokens that continue a hypothesis, or a whole response."""

    hypothesis: int  # its slot in the group
    attempt: int  # from 1, over all rounds of the segment; EARLIER for a hypothesis that had finished before
    tokens: int  # n: response tokens, the attempt's included (EOS counts)
    finished: bool  # whether the response ends with it
    logprobs: Sequence[float]  # of the proposal as drawn; empty where it is not the LM itself (filters, another model)
    raw_logprobs: Sequence[float]  # of the LM, or what else is drawn from, with penalties at temperature 1, by token
    per_token: Sequence[float]  # scores by token, of a Ratio log p - log q; empty for a scalar reward
    reward: float | None  # of the response with this attempt, or a head's of it; None where none is asked for
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


class Draw(NamedTuple):
    """One token that the engine draws at the position after the tokens that are kept, where the plan reads a filtered
    `Ratio`: source "residual", from max(p - q, 0) normalised, or "judge", from p. p and q are what the ratio is of."""

    source: Literal["residual", "judge"]


class Keep(NamedTuple):
    """The first `tokens` drafted tokens of an attempt, and `then` tokens that were not drafted, become history."""

    hypothesis: int
    attempt: int
    tokens: int
    then: Sequence[int] | Draw = ()


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
    applies the plan's exhaustion (`stars.exhaustions`). A kept attempt that its note does not call accepted counts as a
    fallback.
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
class FirstAbove:
    """The first attempt of each hypothesis, in order, whose reward is above `least`, or that has none as it is alone.
    Where none is, the plan's exhaustion says which is kept."""

    least: float = 0.5
    in_order: ClassVar[bool] = True
    uniforms: ClassVar[int] = 0
    skips_rejected: ClassVar[bool] = True

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision:
        """Decides once every live hypothesis has an accepted attempt. What is noted: `least`, and the verdict."""
        keep: dict[int, Keep] = {}
        notes = {}
        for one in judged:
            slot, attempt = one.hypothesis, one.attempt
            if attempt == EARLIER:
                keep[slot] = whole(one)
                continue
            accepted = slot not in keep and (one.reward is None or one.reward > self.least)
            notes[slot, attempt] = Note(None if one.reward is None else self.least, None, accepted)
            if accepted:
                keep[slot] = whole(one)
        decided = len(keep) == len(state.live)
        return Decision(list(keep.values()) if decided else [], [], notes)


@dataclass(frozen=True)
class AcceptPrefix:
    """Of each hypothesis the first attempt, as far as its tokens are accepted in order, token i iff log u_i <
    per_token[i]: with probability min(1, p_i / q_i), where per_token is log p - log q.

    After the first rejected token one is drawn from max(p - q, 0), normalised, in its place. After all, where the
    response goes on, one is drawn from p. Where p and q are distributions over the same tokens, each token that is kept
    has the law p, given those before it: it is speculative sampling (arXiv 2211.17192, 2302.01318).
    """

    most: int  # tokens of an attempt
    in_order: ClassVar[bool] = True

    @property
    def uniforms(self) -> int:
        """One for each token."""
        return self.most

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision:
        """Decides once every live hypothesis has an attempt. What is noted: with what probability all of its tokens
        are accepted, and whether they were."""
        first: dict[int, Judged] = {}
        for one in judged:
            first.setdefault(one.hypothesis, one)
        keep, notes = [], {}
        for one in first.values():
            if one.attempt == EARLIER:
                keep.append(whole(one))
                continue
            accepted = sum(takewhile(bool, (math.log(uniform) < ratio for uniform, ratio in zip(
                one.uniforms, one.per_token, strict=False))))
            chance = math.exp(sum(min(0.0, ratio) for ratio in one.per_token))
            every = accepted == one.drafted
            notes[one.hypothesis, one.attempt] = Note(None, chance, every)
            if every and (one.finished or one.tokens >= state.max_tokens):
                keep.append(whole(one))
            else:
                keep.append(Keep(one.hypothesis, one.attempt, accepted, Draw("judge" if every else "residual")))
        return Decision(keep if len(keep) == len(state.live) else [], [], notes)


@dataclass(frozen=True)
class GuidedDraft:
    """Of each hypothesis' attempts one is drawn, with probability softmax(beta * s), and kept if its s >= t.

    s = r + sum(per_token) / beta, the reward tilted by the log-ratio of the segment under the language model and under
    the model that drew it; t = reward_threshold. An attempt's threshold is what its reward must reach for that,
    t - sum(per_token) / beta. Drawn as the argmax of beta * s - log(-log u) with the uniform of each attempt.
    """

    beta: float
    reward_threshold: float
    in_order: ClassVar[bool] = False
    uniforms: ClassVar[int] = 1

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        """Decides once every attempt was drawn, where every hypothesis has drawn one that is kept."""
        if state.left:
            return None
        keep: list[Keep] = []
        notes: dict[tuple[int, int], Note] = {}
        for slot in state.live:
            ones = [one for one in judged if one.hypothesis == slot]
            if ones[0].attempt == EARLIER:
                keep.append(whole(ones[0]))
                continue
            tilts = [sum(one.per_token) / self.beta for one in ones]
            tilted = [scored(one) + tilt for one, tilt in zip(ones, tilts, strict=True)]
            weights = _weights(tilted, 1.0 / self.beta)
            drawn, total = _drawn(weights, ones), sum(weights)
            for place, (one, tilt, value, weight) in enumerate(zip(ones, tilts, tilted, weights, strict=True)):
                passes = value >= self.reward_threshold and value > -math.inf
                notes[slot, one.attempt] = Note(self.reward_threshold - tilt, weight / total if passes else 0.0,
                                                passes and place == drawn)
                if passes and place == drawn:
                    keep.append(whole(one))
        return Decision(keep if len(keep) >= len(state.live) else [], [], notes)


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
        total, winner = sum(weights), judged[_drawn(weights, judged)]
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


def _drawn(weights: Sequence[float], judged: Sequence[Judged]) -> int:
    """The place of one of them, drawn in proportion to its weight: the largest of log w - log(-log u), which is as
    exact as a walk along the sum, and not moved by a rounding of it."""
    return max(range(len(judged)), key=lambda index: -math.inf if not weights[index] else math.log(
        weights[index]) - math.log(-math.log(judged[index].uniforms[0])))


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
    Threshold, Argmax, Always, SoftArgmax, FirstAccepted, DropWorst, Highest, Resample, RewardGuided, AcceptPrefix,
    FirstAbove, GuidedDraft})
"""Rules whose decisions can always be done, as a test shows: those of others are checked each time."""


def whole(one: Judged) -> Keep:
    """All of an attempt."""
    return Keep(one.hypothesis, one.attempt, one.drafted)


def scored(one: Judged) -> float:
    """Its reward, which there must be."""
    if one.reward is None:
        raise ValueError("a rule that reads rewards was given none: score segments, or whole responses at their end")
    return one.reward


def best(judged: Sequence[Judged]) -> Judged:
    """The one of the highest reward, the earliest of equals; without rewards the first."""
    return max(judged, key=lambda one: -math.inf if one.reward is None else one.reward)


def decides(decision: Decision | None) -> bool:
    """Whether something is kept or dropped."""
    return decision is not None and bool(decision.keep or decision.drop)
