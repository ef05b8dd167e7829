"""Units, what is admitted and pre-empted together, and the lines that they wait in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from stars.request import Group, Hypothesis, Request


@dataclass(eq=False)
class Unit:
    """What is admitted and pre-empted together: the population of a completion, which is decided together, or one of
    several whole responses, which need not be drafted side by side."""

    group: Group
    whole: Hypothesis | None = None  # the one of several

    @property
    def request(self) -> Request:
        """Whose it is."""
        return self.group.request

    @property
    def unfinished(self) -> list[Hypothesis]:
        """Its responses that still grow."""
        members = self.group.hypotheses if self.whole is None else [self.whole]
        return [hypothesis for hypothesis in members if hypothesis.finish_reason is None]

    @property
    def places(self) -> int:
        """Responses that it may have at once before it ends: a rule may fork a group to its population."""
        return self.request.plan.lanes.population if self.whole is None else 1

    @property
    def ready(self) -> bool:
        """Whether it takes part in the next round: both models have read what all of its responses begin with, and
        every reward is there that it waited for."""
        for hypothesis in self.unfinished:
            if hypothesis.table is None or hypothesis.prefill is not None:
                return False
            if hypothesis.wait is not None and not hypothesis.wait.answered:
                return False
        request = self.group.request
        return request.prompt_reward is not None or not request.plan.score.prompt

    def unopened(self) -> Iterator[Hypothesis]:
        """Its responses that lack a table, each again until it has all."""
        for hypothesis in self.unfinished:
            while not hypothesis.opened:
                yield hypothesis


Line = tuple[int, str | None]  # a priority and a user


class Lines:
    """Units that wait: those of one priority and user in a line, first come, first served. Finished ones leave when
    they are first."""

    def __init__(self) -> None:
        self._lines: dict[Line, deque[tuple[int, Unit]]] = {}  # each unit with its number in the order of all
        self._first = self._last = 0  # numbers that were given out

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[Unit]:
        """All of them, in the order in which they came."""
        numbered = sorted((one for line in self._lines.values() for one in line), key=lambda one: one[0])
        return iter([unit for _, unit in numbered])

    def extend(self, units: Iterable[Unit]) -> None:
        """They come last."""
        for unit in units:
            self._last += 1
            self._line(unit).append((self._last, unit))

    def push(self, units: Iterable[Unit]) -> None:
        """They come before all others of their lines, in this order."""
        for unit in reversed(list(units)):
            self._first -= 1
            self._line(unit).appendleft((self._first, unit))

    def remove(self, unit: Unit) -> None:
        """One that waits no longer."""
        name, line = _name(unit), self._line(unit)
        if line[0][1] is unit:
            line.popleft()
        else:
            line.remove(next(one for one in line if one[1] is unit))
        if not line:
            del self._lines[name]

    def sweep(self) -> None:
        """Finished ones that are first leave."""
        for name, line in list(self._lines.items()):
            while line and not line[0][1].unfinished:
                line.popleft()
            if not line:
                del self._lines[name]

    def first(self, standing: Callable[[str | None], tuple[float, int]], without: Unit | None = None,
              only: Group | None = None) -> Unit | None:
        """Who comes next: of the lowest priority, of those of the user of the lowest standing, the first. Lines that
        begin with `without` are left out. With `only`, of that group."""
        self.sweep()
        if only is not None:
            return next((unit for unit in self if unit.unfinished and unit.group is only), None)
        fronts = [(name, *line[0]) for name, line in self._lines.items() if line[0][1] is not without]
        if len(fronts) < 2:
            return fronts[0][2] if fronts else None
        return min(fronts, key=lambda front: (front[0][0], standing(front[0][1]), front[1]))[2]

    def _line(self, unit: Unit) -> deque[tuple[int, Unit]]:
        return self._lines.setdefault(_name(unit), deque())


def _name(unit: Unit) -> Line:
    return unit.request.priority, unit.request.user
