"""How many candidates to draw at once: extra lanes are cheap while a step is bound by reading weights."""

from __future__ import annotations

from collections.abc import Callable

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MEASURED = (1, 2, 4, 8, 16, 32, 64, 128)  # counts of lanes, between which times are interpolated
PRIOR_ACCEPTED, PRIOR_COUNTED = 1.0, 4.0  # a weak belief in an accept rate of a quarter, until attempts say otherwise


class WidthChooser:
    """Picks the width that minimises the expected drafting time of an accepted segment.

    A round of width w costs B steps at w lanes per request and ends the segment with probability 1 - (1 - p)^w, p the
    accept rate. The reward model reads candidates in attempt order and stops at the first accepted, so its expected
    work does not depend on w. `step_seconds(lanes)` measures one step; each count is measured once, by `measure` or
    where it is first needed.
    """

    def __init__(self, step_seconds: Callable[[int], float], max_lanes: int, room: Callable[[], int] | None = None):
        self._measure = step_seconds
        self._room = room  # lanes that there are slabs for now, to be measured with; None: for all
        self._grid = [count for count in MEASURED if count <= max_lanes]
        self._seconds: dict[int, float] = {}
        self._known: dict[int, float] = {}  # what `seconds` says, once every count was measured

    def measure(self) -> None:
        """Measures every count now; the largest first, as workspaces that grow later are held twice."""
        for count in reversed(self._grid):
            self._seconds_at(count)

    def choose(self, accepted: int, counted: int, responses: int, max_width: int) -> int:
        """accepted of counted attempts so far, `responses` drafting side by side, at most `max_width` lanes each."""
        rate = (accepted + PRIOR_ACCEPTED) / (counted + PRIOR_COUNTED)
        best, best_cost = 1, float("inf")
        for width in CANDIDATES:
            if width > max_width:
                break
            cost = self.seconds(width * responses) / (1.0 - (1.0 - rate) ** width)
            if cost < best_cost:
                best, best_cost = width, cost
        return best

    def seconds(self, lanes: int) -> float:
        """Of a step with so many lanes; what was not measured is interpolated, and beyond it in proportion."""
        known = self._known.get(lanes)
        if known is None:
            known = self._between(lanes)
            if len(self._seconds) == len(self._grid):
                self._known[lanes] = known
        return known

    def _between(self, lanes: int) -> float:
        grid = self._grid if self._room is None else [count for count in self._grid if count in self._seconds
                                                      or count <= max(1, self._room())]
        below = max(count for count in grid if count <= lanes)
        above = min((count for count in grid if count >= lanes), default=below)
        low, high = self._seconds_at(below), self._seconds_at(above)
        if above == below:
            return low * max(1.0, lanes / below)
        return low + (high - low) * (lanes - below) / (above - below)

    def _seconds_at(self, count: int) -> float:
        if count not in self._seconds:
            self._seconds[count] = self._measure(count)
        return self._seconds[count]
