"""The methods of the family, as data: one loop runs them all, a policy is its choices.

Each policy is a small frozen dataclass with the parameters its users know, and `plan()` says them in the loop's own
terms. A new method is one more class here, perhaps with a rule of its own, and a test of its law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from stars.arguments import flag, integer, known_by_name, real
from stars.calibration import threshold_and_beta
from stars.plan import DRAFT_SIZE, MAX_ATTEMPTS, MAX_SIZE, Fixed, Lanes, Plan, Policy, Sampled, Score, Whole
from stars.rules import Always, Argmax, Threshold


@known_by_name({})
@dataclass(frozen=True)
class STARS:
    """Segment-level rejection sampling under a rising threshold (arXiv 2511.03827; parameter names are the paper's).

    A segment of `segment_size` tokens is accepted iff log u < (r - tau(n)) / beta with u ~ U(0, 1). Here
    tau(n) = min(t, r0 + n / N * (t - r0)) and r0 = (1 - alpha) * r(prompt) + alpha * t, with t = reward_threshold,
    n = response tokens including the candidate, N = max_tokens. After `max_attempts` rejections the best reward seen
    wins. `beta = 0` is the hard rule r >= tau. `width` candidates are drawn at once and the first accepted in
    attempt order wins, so the width changes the speed and never the law; None lets the engine choose it.

    `reward_threshold` belongs to the reward model at hand (`Engine.calibrate` measures it): there is no default. beta
    is in the reward's own units, too: "auto" takes the one that the calibration suggests, a tenth of the spread of the
    rewards of one prompt's samples.
    """

    segment_size: int = 16
    max_attempts: int = 20
    alpha: float = 0.5
    beta: float | Literal["auto"] = 0.7
    reward_threshold: float | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        _keep(self, segment_size=_size(self, "segment_size"), max_attempts=_size(self, "max_attempts", MAX_ATTEMPTS),
              width=None if self.width is None else _size(self, "width"))
        threshold, beta = threshold_and_beta("STARS", self.reward_threshold, self.beta)
        _keep(self, beta=beta, reward_threshold=threshold,
              alpha=real("STARS.alpha", self.alpha, "a number between 0 and 1", lambda value: 0.0 <= value <= 1.0))

    def plan(self) -> Plan:
        """Soft or hard threshold, capped, best seen on exhaustion."""
        assert self.reward_threshold is not None and not isinstance(self.beta, str)
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


POLICIES: dict[str, type[Policy]] = {
    "stars": STARS,
    "sample": Sample,
    "best-of-n": BestOfN,
    "blockwise": BlockwiseBestOfK,
}
"""Every policy of the package by the name that the command line knows it by."""


def _size(policy: Any, name: str, maximum: int = MAX_SIZE) -> int:
    return integer(f"{type(policy).__name__}.{name}", getattr(policy, name), 1, maximum)


def _keep(policy: Any, **values: Any) -> None:
    """Puts checked values into a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(policy, name, value)
