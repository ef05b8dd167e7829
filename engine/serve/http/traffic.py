"""What is under way over HTTP and what has been: counted, told in /metrics, and read where a client is told to come
again later. Used by the server's event loop alone."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, deque

from stars.exposition import Family, Histogram
from stars.metrics import PREFIX

LATELY, REMEMBERED = 60.0, 256  # seconds, and requests, by which the pace is judged
LEAST_WAIT, LONGEST_WAIT = 1, 60
"""Seconds that a client is told to wait."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 300.0)
"""Bounds of what requests take."""


class Traffic:
    """Requests and connections of one server."""

    def __init__(self) -> None:
        self.under_way = 0  # requests of the API that were let in and have not been answered
        self.open_connections = 0
        self.buffered = 0  # bytes of bodies that are being received
        self._begun = time.monotonic()
        self._answers: Counter[tuple[str, str, str]] = Counter()
        self._seconds: dict[str, tuple[list[int], float]] = {}
        self._refused: Counter[str] = Counter({reason: 0 for reason in ("bad", "crowded", "head", "reader")})
        self._ends: deque[float] = deque(maxlen=REMEMBERED)

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request is over. path: its route's, of which there are few, whatever clients ask for."""
        self._answers[method, path, str(status)] += 1
        counts, total = self._seconds.get(path) or ([0] * (len(SECONDS) + 1), 0.0)
        counts[bisect_left(SECONDS, seconds)] += 1
        self._seconds[path] = counts, total + seconds

    def ended(self) -> None:
        """A request that was under way has gone."""
        self._ends.append(time.monotonic())

    def closed(self, reason: str) -> None:
        """The server closed a connection that would have gone on."""
        self._refused[reason] += 1

    def retry_after(self) -> int:
        """Seconds until the requests that are under way will have ended at the pace of the last minute."""
        now = time.monotonic()
        while self._ends and self._ends[0] < now - LATELY:
            self._ends.popleft()
        since = self._ends[0] if len(self._ends) == REMEMBERED else max(self._begun, now - LATELY)
        pace = len(self._ends) / max(now - since, 1e-3)
        # Where nothing has ended for so long: as long again, who knows.
        seconds = self.under_way / pace if pace else now - since
        return int(min(max(math.ceil(seconds), LEAST_WAIT), LONGEST_WAIT))

    def families(self) -> list[Family]:
        """All of it for a text of metrics."""
        return [
            Family(PREFIX + "http_requests_under_way", "gauge", "Requests of the API that are being answered.",
                   {"": self.under_way}),
            Family(PREFIX + "http_connections", "gauge", "Connections that are open.", {"": self.open_connections}),
            Family(PREFIX + "http_connections_closed_total", "counter", "Connections that the server closed: what came "
                   "is no HTTP, too many of them, a head that did not come, a client that did not read.",
                   dict(self._refused), "reason"),
            Family(PREFIX + "http_requests_total", "counter", "Requests that were answered; 499: the client went "
                   "away.", dict(self._answers), ("method", "path", "status")),
            Family(PREFIX + "http_request_duration_seconds", "histogram", "From a request's head to the end of its "
                   "answer.", {path: Histogram(SECONDS, tuple(counts), total)
                               for path, (counts, total) in self._seconds.items()}, "path"),
        ]
