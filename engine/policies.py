"""The methods of the family, as data: one loop runs them all, a policy is its choices.

Each policy is a small frozen dataclass with the parameters its users know, and `plan()` says them in the loop's own
terms. A new method is one more class here and a test of its law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from stars.errors import RequestError, describe
from stars.sampling import is_number

DRAFT_SIZE = 16  # tokens drafted at a time where the method itself has no segments


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


def checked_plan(policy: Policy) -> Plan:
    """What `policy` plans, which may be an object of the user's; RequestError where the loop could not follow it."""
    name = type(policy).__name__
    try:
        plan = policy.plan()
    except Exception as error:
        raise RequestError(f"{name}.plan() raised {describe(error)}") from error
    if not isinstance(plan, Plan):
        raise RequestError(f"{name}.plan() returned {type(plan).__name__}, it must return a stars.policies.Plan")
    for field in ("segment_size", "max_attempts", "width", "candidates"):
        value = getattr(plan, field)
        if not (field == "width" and value is None):
            _integer(f"{name}.plan()", field, value)
    for field, known in (("scoring", ("segment", "end", "never")), ("decision", ("threshold", "argmax", "always"))):
        if getattr(plan, field) not in known:
            raise RequestError(f"{name}.plan() has {field} = {getattr(plan, field)!r}, it must be one of "
                               f"{', '.join(known)}")
    for field in ("alpha", "beta", "reward_threshold"):
        value = getattr(plan, field)
        if not isinstance(value, float) or math.isnan(value):
            raise RequestError(f"{name}.plan() has {field} = {value!r}, it must be a float")
    return plan


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
        _integer("STARS", "segment_size", self.segment_size)
        _integer("STARS", "max_attempts", self.max_attempts)
        if self.width is not None:
            _integer("STARS", "width", self.width)
        for name in ("alpha", "beta", "reward_threshold"):
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise RequestError(f"STARS.{name} is {value!r}, it must be a number")
        if self.reward_threshold is None or math.isnan(self.reward_threshold):
            raise RequestError("STARS needs a reward_threshold, which depends on the reward model: "
                               "measure one with engine.calibrate(prompts)")
        if self.alpha is None or not 0.0 <= self.alpha <= 1.0:
            raise RequestError(f"STARS.alpha is {self.alpha}, it must be between 0 and 1")
        if self.beta is None or not 0.0 <= self.beta < math.inf:
            raise RequestError(f"STARS.beta is {self.beta}, it must be 0 (the hard rule) or a positive number")

    def plan(self) -> Plan:
        """Soft or hard threshold, capped, best seen on exhaustion."""
        # An infinite threshold swallows r(prompt) in the formula of r0: alpha = 1 says the same without computing it.
        alpha = self.alpha if math.isfinite(self.reward_threshold) else 1.0
        return Plan(self.segment_size, self.max_attempts, self.width, "segment", "threshold",
                    alpha=float(alpha), beta=float(self.beta), reward_threshold=float(self.reward_threshold))


@dataclass(frozen=True)
class Sample:
    """Plain sampling from the language model; `score=True` adds one reward of the finished response."""

    score: bool = False

    def plan(self) -> Plan:
        """Every draft is kept."""
        return Plan(DRAFT_SIZE, 1, 1, "end" if self.score else "never", "always")


@dataclass(frozen=True)
class BestOfN:
    """Draws `n` whole responses and returns the one of the highest reward."""

    n: int = 8

    def __post_init__(self):
        _integer("BestOfN", "n", self.n)

    def plan(self) -> Plan:
        """Plain sampling of n hypotheses, argmax of their final rewards."""
        return Plan(DRAFT_SIZE, 1, 1, "end", "always", candidates=self.n)


@dataclass(frozen=True)
class BlockwiseBestOfK:
    """Draws `k` candidates of every segment and keeps the one of the highest reward."""

    k: int = 8
    segment_size: int = 16

    def __post_init__(self):
        _integer("BlockwiseBestOfK", "k", self.k)
        _integer("BlockwiseBestOfK", "segment_size", self.segment_size)

    def plan(self) -> Plan:
        """All k attempts in one round if there is room, argmax of their rewards."""
        return Plan(self.segment_size, self.k, self.k, "segment", "argmax")


def _integer(policy: str, name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{policy}.{name} is {value!r}, it must be an integer of at least 1")
