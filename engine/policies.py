"""The methods of the family, as data: one loop runs them all, a policy is its choices.

Each policy is a small frozen dataclass with the parameters its users know, and `plan()` says them in the loop's own
terms. A new method is one more class here, perhaps with a rule of its own, and a test of its law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from stars.arguments import as_float, flag, integer, known_by_name, real, shown
from stars.errors import RequestError
from stars.plan import (
    DRAFT_SIZE,
    MAX_ATTEMPTS,
    MAX_RANKS,
    MAX_SIZE,
    Enumerate,
    Fixed,
    Lanes,
    Plan,
    Policy,
    Sampled,
    Score,
    Whole,
)
from stars.rules import Always, Argmax, RewardGuided, Threshold

LEAST_TEMPERATURE = 1e-6
"""Of a softmax of scores: below it is an argmax but for ties, which is to be asked for as such."""


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


@known_by_name({})
@dataclass(frozen=True)
class ARGS:
    """Alignment as Reward-Guided Search, token by token (Khanov, Burapacheep, Li, ICLR 2024; arXiv 2402.01694).

    The `topk` most probable next tokens are enumerated, and each is scored by logit + weight * r, r the reward of the
    response with that token. "greedy" takes the highest score, the more probable token of equals; "stochastic" draws
    from softmax(score / temperature). Both are exact. Names and defaults are those of the authors' page and code, whose
    code calls the second mode "topk".

    What differs from their code. EOS is a candidate like any other, ends the response where it is chosen, and the
    reward reads the response without it (their code reads it as a token, and goes on after it). The reward need not
    share the language model's tokenizer. `temperature` of SamplingParams does not enter the scores: it shapes what
    top_p and min_p keep, of which the `topk` are enumerated; penalties count in the logits. The random numbers are the
    engine's own.
    """

    topk: int = 10
    weight: float = 1.0
    mode: Literal["greedy", "stochastic"] = "greedy"
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in ("greedy", "stochastic"):
            raise RequestError(f'ARGS.mode is {shown(self.mode)}, it must be "greedy" or "stochastic"')
        _keep(self, topk=_size(self, "topk", MAX_RANKS), weight=_finite(self, "weight"),
              temperature=_temperature(self, "temperature"))

    def plan(self) -> Plan:
        """All of the topk attempts in one round if there is room, the highest score or a draw by it."""
        return _guided(self.topk, RewardGuided(self.weight, self.temperature if self.mode == "stochastic" else 0.0))


@known_by_name({})
@dataclass(frozen=True)
class RAD:
    """Reward-Augmented Decoding, token by token (Deng and Raffel, EMNLP 2023; arXiv 2310.09520).

    Of the `topk` most probable next tokens one is drawn from softmax((logit + beta * r) / temperature), r the reward of
    the response with that token, clamped to 0 .. 1; `inverse` steers by 1 - r instead. That is exact. Names and
    defaults are those of the authors' code, method "linear", at transformers' temperature of 1.

    What differs from their code. Their reward model was trained to give 0 to 1 at every prefix: for rewards of another
    range `clamp=False` leaves r as it is. Any reward serves, and one that reads prefixes incrementally, as theirs does
    (`CausalReward`), reads a token of each candidate. Theirs is given candidate tokens that were encoded anew one by
    one, ours the response. Of EOS, of SamplingParams and of random numbers the same holds as for ARGS.
    """

    topk: int = 20
    beta: float = 30.0
    inverse: bool = False
    clamp: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _keep(self, topk=_size(self, "topk", MAX_RANKS), beta=_finite(self, "beta"),
              inverse=flag("RAD.inverse", self.inverse), clamp=flag("RAD.clamp", self.clamp),
              temperature=_temperature(self, "temperature"))

    def plan(self) -> Plan:
        """All of the topk attempts in one round if there is room, a draw by their scores."""
        # beta * (1 - r) is -beta * r but for a constant.
        weight = -self.beta if self.inverse else self.beta
        least, most = (0.0, 1.0) if self.clamp else (-math.inf, math.inf)
        return _guided(self.topk, RewardGuided(weight, self.temperature, least, most))


POLICIES: dict[str, type[Policy]] = {
    "stars": STARS,
    "sample": Sample,
    "best-of-n": BestOfN,
    "blockwise": BlockwiseBestOfK,
    "args": ARGS,
    "rad": RAD,
}
"""Every policy of the package by the name that the command line knows it by."""


def _guided(topk: int, rule: RewardGuided) -> Plan:
    return Plan(Enumerate(topk), Fixed(1), Lanes(topk, topk), Score("segment"), rule)


def _finite(policy: Any, name: str) -> float:
    return real(f"{type(policy).__name__}.{name}", getattr(policy, name), "a finite number", math.isfinite)


def _temperature(policy: Any, name: str) -> float:
    return real(f"{type(policy).__name__}.{name}", getattr(policy, name),
                f"a finite number of at least {LEAST_TEMPERATURE:g}",
                lambda value: LEAST_TEMPERATURE <= value < math.inf)


def _size(policy: Any, name: str, maximum: int = MAX_SIZE) -> int:
    return integer(f"{type(policy).__name__}.{name}", getattr(policy, name), 1, maximum)


def _keep(policy: Any, **values: Any) -> None:
    """Puts checked values into a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(policy, name, value)
