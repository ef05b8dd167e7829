"""What became of one request."""

from __future__ import annotations

import dataclasses
from typing import Any

REFUSALS = (429, 503)
"""Statuses by which a server says that it has too much to do: answers, and no failures."""
COMPLETED, REFUSED, FAILED = "completed", "refused", "failed"


@dataclasses.dataclass
class Answer:
    """One request as its client saw it. Times are seconds from the start of the run."""

    due: float  # when it was to be sent
    sent: float | None = None  # None: it never was
    times: list[float] = dataclasses.field(default_factory=list)  # of each event that brought text
    ended: float | None = None
    status: int | None = None  # of HTTP; None where no answer came
    error: str | None = "not sent"  # in a few words; None of a request that was answered to its end
    retry_after: bool = False  # whether a refusal said when to come again
    text: str = ""
    finish_reason: str | None = None
    input_tokens: int | None = None  # as the endpoint counted them
    output_tokens: int | None = None
    stars: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `stars serve`: what its choice says of itself

    @property
    def outcome(self) -> str:
        """One of COMPLETED, REFUSED, FAILED."""
        if self.error is None:
            return COMPLETED
        return REFUSED if self.status in REFUSALS else FAILED

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first text; where none came, to the end."""
        first = self.times[0] if self.times else self.ended
        return None if first is None or self.sent is None else first - self.sent

    @property
    def e2el(self) -> float | None:
        """Seconds from sending to the end."""
        return None if self.ended is None or self.sent is None else self.ended - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one text and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Seconds from the first text to the end for each token but one, as vLLM has it; None of less than two."""
        if self.output_tokens is None or self.output_tokens < 2 or self.e2el is None or self.ttft is None:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)
