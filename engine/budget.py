"""Budget: what a request may take before it is ended with what was committed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stars.arguments import integer, known_by_name, real, shown
from stars.errors import RequestError


@known_by_name({})
@dataclass(frozen=True)
class Budget:
    """Bounds on one request, all of its completions together; None: no bound. RequestError for what is none.

    seconds: from when it was handed over, waiting included: then it ends with finish_reason "deadline", once the round
        that is under way is over; neither a draft nor a call of a reward is interrupted.
    attempts: candidates drawn. lm_tokens: tokens drawn by language models, rejected ones too. rm_calls: candidates that
        the reward scores, the prompt alone included. Nothing beyond is drawn or scored, and it ends with "budget".
    What was committed comes back, and attempts of a segment that was not are dropped. Of methods that judge whole
    responses it is the best of those that have ended, and where none has the first one's text so far.
    """

    seconds: float | None = None
    attempts: int | None = None
    lm_tokens: int | None = None
    rm_calls: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None:
            object.__setattr__(self, "seconds", real(
                "Budget.seconds", self.seconds, "a finite number above 0: a deadline lies ahead",
                lambda value: 0.0 < value < math.inf))
        for name in ("attempts", "lm_tokens", "rm_calls"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, integer(f"Budget.{name}", getattr(self, name), 1))

    @property
    def bounds_work(self) -> bool:
        """Whether anything but time is bounded."""
        return self.attempts is not None or self.lm_tokens is not None or self.rm_calls is not None

    @classmethod
    def of(cls, given: Any) -> Budget:
        """What a user gave: one of these or None."""
        if given is None:
            return NO_BUDGET
        if isinstance(given, cls):
            return given
        raise RequestError(f"budget is {shown(given)}, it must be a stars.Budget")


NO_BUDGET = Budget()
CUT_SHORT = ("deadline", "budget")  # the finish reasons of what a budget has ended
