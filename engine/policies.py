"""The methods of the family, as data: one loop runs them all, a policy is its choices.

Each policy is a small frozen dataclass with the parameters its users know, and `plan()` says them in the loop's own
terms. A new method is one more class here and a test of its law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from stars.arguments import as_float, flag, integer, known_by_name, real, shown
from stars.errors import RequestError, describe

DRAFT_SIZE = 16  # tokens drafted at a time where the method itself has no segments
MAX_ATTEMPTS = (1 << 24) - 1  # the attempt has 24 bits of the random counter
MOST_SIZE = (1 << 31) - 1


class Plan(NamedTuple):
    """The loop's five choices for one request."""

    segment_size: int  # tokens of a segment (B)
    max_attempts: int  # candidates of one segment before the best seen wins
    width: int | None  # lanes of a request and round; None lets the engine choose
    scoring: Literal["segment", "end", "never"]  # when the reward model looks
    decision: Literal["threshold", "argmax", "always"]
    candidates: int = 1  # whole responses of which the best final reward wins
    alpha: float = 1.0
    beta: float = 0.0
    reward_threshold: float = -math.inf


class Policy(Protocol):
    """What the engine needs of a method."""

    def plan(self) -> Plan:
        """The method in the loop's terms."""


@known_by_name({})
@dataclass(frozen=True)
class STARS:
    """Segment-level rejection sampling under a rising threshold (arXiv 2511.03827; parameter names are the paper's).

    A segment of `segment_size` tokens is accepted iff log u < (r - tau(n)) / beta with u ~ U(0, 1), where
    tau(n) = min(t, r0 + n / N * (t - r0)), r0 = (1 - alpha) * r(prompt) + alpha * t, t = reward_threshold,
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

    def __post_init__(self):
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
        # An infinite threshold swallows r(prompt) in the formula of r0: alpha = 1 says the same without computing it.
        alpha = self.alpha if math.isfinite(self.reward_threshold) else 1.0
        return Plan(self.segment_size, self.max_attempts, self.width, "segment", "threshold",
                    alpha=float(alpha), beta=float(self.beta), reward_threshold=float(self.reward_threshold))


@known_by_name({})
@dataclass(frozen=True)
class Sample:
    """Plain sampling from the language model; `score=True` adds one reward of the finished response."""

    score: bool = False

    def __post_init__(self):
        _keep(self, score=flag("Sample.score", self.score))

    def plan(self) -> Plan:
        """Every draft is kept."""
        return Plan(DRAFT_SIZE, 1, 1, "end" if self.score else "never", "always")


@known_by_name({})
@dataclass(frozen=True)
class BestOfN:
    """Draws `n` whole responses and returns the one of the highest reward."""

    n: int = 8

    def __post_init__(self):
        _keep(self, n=_size(self, "n"))

    def plan(self) -> Plan:
        """Plain sampling of n hypotheses, argmax of their final rewards."""
        return Plan(DRAFT_SIZE, 1, 1, "end", "always", candidates=self.n)


@known_by_name({})
@dataclass(frozen=True)
class BlockwiseBestOfK:
    """Draws `k` candidates of every segment and keeps the one of the highest reward."""

    k: int = 8
    segment_size: int = 16

    def __post_init__(self):
        _keep(self, k=_size(self, "k", MAX_ATTEMPTS), segment_size=_size(self, "segment_size"))

    def plan(self) -> Plan:
        """All k attempts in one round if there is room, argmax of their rewards."""
        return Plan(self.segment_size, self.k, self.k, "segment", "argmax")


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
    where = f"{name}.plan()"
    for field, choices in (("scoring", ("segment", "end", "never")),
                           ("decision", ("threshold", "argmax", "always"))):
        value = getattr(plan, field)
        if not isinstance(value, str) or value not in choices:
            raise RequestError(f"{where}.{field} is {shown(value)}, it must be one of {', '.join(choices)}")
    if plan.decision != "always" and plan.scoring != "segment" or plan.candidates != 1 and plan.scoring == "never":
        raise RequestError(f"{where} decides by rewards and has scoring={plan.scoring!r}, which gives none in time: "
                           'score every segment ("segment"), or whole candidates at their end ("end")')
    return plan._replace(
        segment_size=integer(f"{where}.segment_size", plan.segment_size, 1, MOST_SIZE),
        max_attempts=integer(f"{where}.max_attempts", plan.max_attempts, 1, MAX_ATTEMPTS),
        width=None if plan.width is None else integer(f"{where}.width", plan.width, 1, MOST_SIZE),
        candidates=integer(f"{where}.candidates", plan.candidates, 1, MOST_SIZE),
        alpha=real(f"{where}.alpha", plan.alpha, "between 0 and 1", lambda value: 0.0 <= value <= 1.0),
        beta=real(f"{where}.beta", plan.beta, "finite, 0 or above", lambda value: 0.0 <= value < math.inf),
        reward_threshold=real(f"{where}.reward_threshold", plan.reward_threshold, "a number",
                              lambda value: not math.isnan(value)))


def _size(policy: Any, name: str, most: int = MOST_SIZE) -> int:
    return integer(f"{type(policy).__name__}.{name}", getattr(policy, name), 1, most)


def _keep(policy: Any, **values: Any) -> None:
    """Puts checked values into a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(policy, name, value)
