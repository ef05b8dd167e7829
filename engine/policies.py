"""The methods of the family, as data: one loop runs them all, a policy is its choices.

Each policy is a small frozen dataclass with the parameters its users know, and `plan()` says them in the loop's own
terms. A new method is one more class here, perhaps with a rule of its own, and a test of its law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from stars.arguments import as_float, flag, integer, known_by_name, real, shown
from stars.errors import RequestError, describe
from stars.rules import EXHAUST, Always, Argmax, Rule, Threshold

DRAFT_SIZE = 16  # tokens drafted at a time where the method itself has no segments
MAX_ATTEMPTS = (1 << 24) - 1  # the attempt has 24 bits of the random counter
MAX_SIZE = (1 << 31) - 1
MAX_UNIFORMS = 1 << 10  # random numbers of one attempt, or of a group's round


@dataclass(frozen=True)
class Sampled:
    """Attempts are drawn from the language model as the sampling parameters say."""


@dataclass(frozen=True)
class Fixed:
    """Segments of `size` tokens (B), fewer where the response ends or max_tokens clips the last one."""

    size: int

    @property
    def draft(self) -> int:
        """Most tokens of one draft."""
        return self.size


@dataclass(frozen=True)
class Whole:
    """An attempt is a whole response, drafted `piece` tokens at a time; the rule is asked when all have ended."""

    piece: int = DRAFT_SIZE

    @property
    def draft(self) -> int:
        """Most tokens of one draft."""
        return self.piece


@dataclass(frozen=True)
class Lanes:
    """width: attempts of a hypothesis drawn at once; None lets the engine choose. attempts: at one segment of a
    hypothesis, before the plan's exhaustion. population: hypotheses of one completion."""

    width: int | None = None
    attempts: int = 1
    population: int = 1


@dataclass(frozen=True)
class Score:
    """when: what the reward model reads: every attempt ("segment"), each response once, when it has ended ("end"), or
    nothing ("never"). prompt: whether it reads the prompt alone, too, as the response begins."""

    when: Literal["segment", "end", "never"] = "segment"
    prompt: bool = False


class Plan(NamedTuple):
    """The loop's six choices for one request."""

    propose: Sampled
    segment: Fixed | Whole
    lanes: Lanes
    score: Score
    decide: Rule
    exhaust: Literal["best_seen"] = "best_seen"  # what is kept when the rule decides nothing: a name in rules.EXHAUST

    @property
    def whole(self) -> bool:
        """Whether an attempt is a whole response."""
        return isinstance(self.segment, Whole)


class Policy(Protocol):
    """What the engine needs of a method."""

    def plan(self) -> Plan:
        """The method in the loop's terms."""


@known_by_name({})
@dataclass(frozen=True)
class STARS:
    """Segment-level rejection sampling under a rising threshold (arXiv 2511.03827; parameter names are the paper's).

    A segment of `segment_size` tokens is accepted iff log u < (r - tau(n)) / beta with u ~ U(0, 1). Here
    tau(n) = min(t, r0 + n / N * (t - r0)) and r0 = (1 - alpha) * r(prompt) + alpha * t, with t = reward_threshold,
    n = response tokens including the candidate, N = max_tokens. After `max_attempts` rejections the best reward seen
    wins. `beta = 0` is the hard rule r >= tau. `width` candidates are drawn at once and the first accepted in
    attempt order wins, so the width changes the speed and never the law; None lets the engine choose it.

    `reward_threshold` belongs to the reward model at hand (`Engine.calibrate` measures it): there is no default.
    """

    segment_size: int = 16
    max_attempts: int = 20
    alpha: float = 0.5
    beta: float = 0.7
    reward_threshold: float | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        _keep(self, segment_size=_size(self, "segment_size"), max_attempts=_size(self, "max_attempts", MAX_ATTEMPTS),
              width=None if self.width is None else _size(self, "width"))
        threshold = as_float(self.reward_threshold)
        if self.reward_threshold is None or threshold is not None and math.isnan(threshold):
            raise RequestError("STARS needs a reward_threshold, which depends on the reward model: "
                               "measure one with engine.calibrate(prompts)")
        _keep(self,
              alpha=real("STARS.alpha", self.alpha, "a number between 0 and 1", lambda value: 0.0 <= value <= 1.0),
              beta=real("STARS.beta", self.beta, "a finite number, 0 (the hard rule) or above",
                        lambda value: 0.0 <= value < math.inf),
              reward_threshold=real("STARS.reward_threshold", self.reward_threshold, "a number that a float can hold",
                                    lambda value: True))

    def plan(self) -> Plan:
        """Soft or hard threshold, capped, best seen on exhaustion."""
        assert self.reward_threshold is not None
        # An infinite threshold swallows r(prompt) in the formula of r0: alpha = 1 says the same without computing it.
        alpha = self.alpha if math.isfinite(self.reward_threshold) else 1.0
        return Plan(Sampled(), Fixed(self.segment_size), Lanes(self.width, self.max_attempts),
                    Score("segment", prompt=alpha != 1.0),
                    Threshold(float(alpha), float(self.beta), float(self.reward_threshold)))


@known_by_name({})
@dataclass(frozen=True)
class Sample:
    """Plain sampling from the language model; `score=True` adds one reward of the finished response."""

    score: bool = False

    def __post_init__(self) -> None:
        _keep(self, score=flag("Sample.score", self.score))

    def plan(self) -> Plan:
        """Every draft is kept."""
        return Plan(Sampled(), Fixed(DRAFT_SIZE), Lanes(1), Score("end" if self.score else "never"), Always())


@known_by_name({})
@dataclass(frozen=True)
class BestOfN:
    """Draws `n` whole responses and returns the one of the highest reward."""

    n: int = 8

    def __post_init__(self) -> None:
        _keep(self, n=_size(self, "n"))

    def plan(self) -> Plan:
        """Plain sampling of n whole responses, argmax of their rewards. The best of one is a scored sample."""
        if self.n == 1:
            return Sample(score=True).plan()
        return Plan(Sampled(), Whole(DRAFT_SIZE), Lanes(1, population=self.n), Score("end"), Argmax())


@known_by_name({})
@dataclass(frozen=True)
class BlockwiseBestOfK:
    """Draws `k` candidates of every segment and keeps the one of the highest reward."""

    k: int = 8
    segment_size: int = 16

    def __post_init__(self) -> None:
        _keep(self, k=_size(self, "k", MAX_ATTEMPTS), segment_size=_size(self, "segment_size"))

    def plan(self) -> Plan:
        """All k attempts in one round if there is room, argmax of their rewards."""
        return Plan(Sampled(), Fixed(self.segment_size), Lanes(self.k, self.k), Score("segment"), Argmax())


def plan_of(policy: Any) -> Plan:
    """The plan of any object with `plan()`, its numbers checked and Python's own; RequestError names what is wrong.

    A round trusts a plan: what a policy of somebody else's gets wrong is found before it is queued.
    """
    if isinstance(policy, type):
        raise RequestError(f"policy is the class {policy.__name__}: give an object such as "
                           "stars.STARS(reward_threshold=1.0)")
    name = type(policy).__name__
    try:
        method = getattr(policy, "plan", None)
        plan = method() if callable(method) else None
    except Exception as error:
        raise RequestError(f"{name}.plan() raised {describe(error)}: mend the policy") from error
    if not callable(method):
        raise RequestError(f"policy is {name}, it must be an object such as stars.STARS(reward_threshold=1.0)")
    if not isinstance(plan, Plan):
        raise RequestError(f"{name}.plan() returned {shown(plan)}, it must return a stars.policies.Plan")
    try:
        return _checked(plan, f"{name}.plan()")
    except RequestError:
        raise
    except Exception as error:  # an attribute of somebody else's that cannot be read
        raise RequestError(f"{name}.plan() returned a plan that raised {describe(error)}: mend the policy") from error


def _checked(plan: Plan, where: str) -> Plan:
    propose = _one_of(f"{where}.propose", plan.propose, Sampled)
    lanes, score = _one_of(f"{where}.lanes", plan.lanes, Lanes), _one_of(f"{where}.score", plan.score, Score)
    segment = plan.segment
    if isinstance(segment, Fixed):
        segment = Fixed(integer(f"{where}.segment.size", segment.size, 1, MAX_SIZE))
    elif isinstance(segment, Whole):
        segment = Whole(integer(f"{where}.segment.piece", segment.piece, 1, MAX_SIZE))
    else:
        raise RequestError(f"{where}.segment is {shown(segment)}, it must be a stars.policies.Fixed or Whole")
    lanes = Lanes(None if lanes.width is None else integer(f"{where}.lanes.width", lanes.width, 1, MAX_SIZE),
                  integer(f"{where}.lanes.attempts", lanes.attempts, 1, MAX_ATTEMPTS),
                  integer(f"{where}.lanes.population", lanes.population, 1, MAX_SIZE))
    _named(f"{where}.score.when", score.when, ("segment", "end", "never"))
    score = Score(score.when, flag(f"{where}.score.prompt", score.prompt))
    _named(f"{where}.exhaust", plan.exhaust, tuple(EXHAUST))
    if score.prompt and score.when == "never":
        raise RequestError(f'{where} asks for the reward of the prompt and has score.when="never": score the responses '
                           "too, or set score.prompt to False")
    if isinstance(segment, Whole) and (lanes.attempts != 1 or score.when == "segment"):
        raise RequestError(f"{where} has whole responses, each of which is one attempt, scored at its end at most: set "
                           'lanes.attempts to 1 and score.when to "end" or "never", and ask for a population')
    rule = _checked_rule(f"{where}.decide", plan.decide)
    needed = ("end",) if isinstance(segment, Whole) else ("segment",)
    if isinstance(rule, (Threshold, Argmax)) and score.when not in needed:
        raise RequestError(f"{where} decides by rewards and has score.when={score.when!r}, which gives none in time: "
                           'score every segment ("segment"), or whole responses at their end ("end")')
    if isinstance(rule, Threshold) and rule.alpha != 1.0 and not score.prompt:
        raise RequestError(f"{where} has a threshold that starts from the prompt's reward and does not ask for that: "
                           "set score.prompt to True, or alpha to 1")
    return Plan(propose, segment, lanes, score, rule, plan.exhaust)


def _checked_rule(where: str, rule: Any) -> Rule:
    """`rule` if it is one, Threshold with numbers of Python's own."""
    if isinstance(rule, type) or not callable(rule) or not hasattr(rule, "in_order") or not hasattr(rule, "uniforms"):
        raise RequestError(f"{where} is {shown(rule)}, it must be a rule: an object to be called with (judged, state) "
                           "that has the attributes in_order and uniforms, such as stars.rules.Argmax()")
    flag(f"{where}.in_order", rule.in_order)
    integer(f"{where}.uniforms", rule.uniforms, 0, MAX_UNIFORMS)
    integer(f"{where}.group_uniforms", getattr(rule, "group_uniforms", 0), 0, MAX_UNIFORMS)
    if not isinstance(rule, Threshold):
        checked: Rule = rule
        return checked
    return replace(
        rule, alpha=real(f"{where}.alpha", rule.alpha, "between 0 and 1", lambda value: 0.0 <= value <= 1.0),
        beta=real(f"{where}.beta", rule.beta, "finite, 0 or above", lambda value: 0.0 <= value < math.inf),
        reward_threshold=real(f"{where}.reward_threshold", rule.reward_threshold, "a number",
                              lambda value: not math.isnan(value)))


def rule_name(rule: Rule) -> str:
    """A rule as an error names it."""
    name = getattr(rule, "__name__", None)
    return name if isinstance(name, str) else type(rule).__name__


Choice = TypeVar("Choice")


def _one_of(where: str, value: Any, kind: type[Choice]) -> Choice:
    if isinstance(value, kind):
        return value
    raise RequestError(f"{where} is {shown(value)}, it must be a stars.policies.{kind.__name__}")


def _named(where: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"{where} is {shown(value)}, it must be one of {', '.join(choices)}")


def _size(policy: Any, name: str, maximum: int = MAX_SIZE) -> int:
    return integer(f"{type(policy).__name__}.{name}", getattr(policy, name), 1, maximum)


def _keep(policy: Any, **values: Any) -> None:
    """Puts checked values into a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(policy, name, value)
