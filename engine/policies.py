"""The methods of the family, as data: one loop runs them all, a policy is its choices.

Each policy is a small frozen dataclass with the parameters its users know, and `plan()` says them in the loop's own
terms. A new method is one more class here, perhaps with a rule of its own, and a test of its law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stars.arguments import as_float, flag, integer, known_by_name, real
from stars.errors import RequestError
from stars.plan import (
    DRAFT_SIZE,
    MAX_ATTEMPTS,
    MAX_SIZE,
    Fixed,
    Lanes,
    Plan,
    Policy,
    Sampled,
    Score,
    Whole,
    exhaustion_of,
)
from stars.rules import Always, Argmax, Threshold


@known_by_name({})
@dataclass(frozen=True)
class STARS:
    """Segment-level rejection sampling under a rising threshold (arXiv 2511.03827; parameter names are the paper's).

    A segment of `segment_size` tokens is accepted iff log u < (r - tau(n)) / beta with u ~ U(0, 1). Here
    tau(n) = min(t, r0 + n / N * (t - r0)) and r0 = (1 - alpha) * r(prompt) + alpha * t, with t = reward_threshold,
    n = response tokens including the candidate, N = max_tokens. After `max_attempts` rejections `exhaust` says what is
    done, by a name or an object of `stars.rules`: unless told otherwise, the best reward seen wins. `beta = 0` is the
    hard rule r >= tau. `width` candidates are drawn at once and the first accepted in attempt order wins, so the width
    changes the speed and never the law; None lets the engine choose it.

    `reward_threshold` belongs to the reward model at hand (`Engine.calibrate` measures it): there is no default.
    """

    segment_size: int = 16
    max_attempts: int = 20
    alpha: float = 0.5
    beta: float = 0.7
    reward_threshold: float | None = None
    width: int | None = None
    exhaust: Any = "best_seen"

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
                                    lambda value: True),
              exhaust=_exhaust(self))

    def plan(self) -> Plan:
        """Soft or hard threshold, capped."""
        assert self.reward_threshold is not None
        # An infinite threshold swallows r(prompt) in the formula of r0: alpha = 1 says the same without computing it.
        alpha = self.alpha if math.isfinite(self.reward_threshold) else 1.0
        return Plan(Sampled(), Fixed(self.segment_size), Lanes(self.width, self.max_attempts),
                    Score("segment", prompt=alpha != 1.0),
                    Threshold(float(alpha), float(self.beta), float(self.reward_threshold)), self.exhaust)


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


POLICIES: dict[str, type[Policy]] = {
    "stars": STARS,
    "sample": Sample,
    "best-of-n": BestOfN,
    "blockwise": BlockwiseBestOfK,
}
"""Every policy of the package by the name that the command line knows it by."""


def _size(policy: Any, name: str, maximum: int = MAX_SIZE) -> int:
    return integer(f"{type(policy).__name__}.{name}", getattr(policy, name), 1, maximum)


def _exhaust(policy: Any) -> Any:
    """Its field `exhaust`, a name or an object, checked."""
    exhaustion_of(f"{type(policy).__name__}.exhaust", policy.exhaust)
    return policy.exhaust


def _keep(policy: Any, **values: Any) -> None:
    """Puts checked values into a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(policy, name, value)
