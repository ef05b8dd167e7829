"""Fairness between users: what each was served, who gives way to whom, and who shares a round.

The counters are those of VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): tokens served to
each user; who comes back from idle is lifted to the least of those active. Where one user is active nothing is decided
here, and what it is served is counted once its requests end or another user comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from stars.request import Group, Hypothesis, Request
from stars.unit import Unit

User = str | None
MAX_IDLE = 1024  # users without a request whose counters are kept
DRAFT_SHARE, PROMPT_SHARE = 0.75, 0.1
"""Of k times its own round that a draft of k users may take, and of (k - 1) times that others' prompts may: the rest is
for rewards, the host, and the round that was under way when a user came. At shares of 0.9, 0.75 and 0.65 a chat's p99
beside a batch is 1.7, 1.5 and 1.3 times that alone; a batch beside one who asks all the time draws 900, 860 and 500
tokens a second."""
LEAST_ROWS = 16  # of prompts in a round, however little another user's share of it is


class Load(NamedTuple):
    """Rows of a draft that have so many tokens each."""

    rows: int
    tokens: int


class Seats(NamedTuple):
    """Who takes part in a round, and how many lanes each user has there at most."""

    groups: list[Group]
    lanes: Mapping[User, int] | None = None  # None: as many as would be drawn if all were of one user


class Fairness:
    """Keeps the counters, and answers the scheduler's questions by them.

    seconds: of a step by its rows. widths: the lanes that the responses of one user would get if they were alone.
    """

    def __init__(self, seconds: Callable[[int], float], widths: Callable[[Sequence[Hypothesis]], list[int]],
                 max_lanes: int):
        self._seconds = seconds
        self._widths = widths
        self._max_lanes = max_lanes
        self._active: dict[User, set[Request]] = {}  # their unfinished requests
        self._served: dict[User, float] = {}
        self._priorities: dict[int, int] = {}  # how many unfinished requests have each
        self._credit = 0.0  # seconds of a round that others than the lightest user have been left without
        self._round = 0

    @property
    def alone(self) -> bool:
        """Whether one user at most has unfinished requests."""
        return len(self._active) < 2

    @property
    def plain(self) -> bool:
        """Whether all unfinished requests are of one user and one priority: first come, first served."""
        return len(self._active) < 2 and len(self._priorities) < 2

    # -- counters -------------------------------------------------------------------------------------------------

    def served(self, user: User) -> float:
        """Tokens that a user was served, but for what all are ahead by."""
        return self._served.get(user, 0.0)

    def standing(self, user: User, running: Sequence[Unit]) -> tuple[float, int]:
        """What users who wait are ordered by: tokens served, then responses that run."""
        return self.served(user), sum([unit.places for unit in running if unit.request.user == user])

    def enter(self, request: Request) -> None:
        """A request was queued."""
        user, priority = request.user, request.priority
        if user not in self._active:
            if self.alone:
                for other in (one for requests in self._active.values() for one in requests):
                    self._charge(other)
            if self._active:
                self._served[user] = max(self.served(user), min(map(self.served, self._active)))
            self._active[user] = set()
        requests = self._active[user]
        if request not in requests:
            requests.add(request)
            self._priorities[priority] = self._priorities.get(priority, 0) + 1

    def leave(self, request: Request) -> None:
        """A request has ended, or is told of a second time."""
        requests = self._active.get(request.user)
        if requests is None or request not in requests:
            return
        self._charge(request)
        requests.discard(request)
        if not requests:
            del self._active[request.user]
            if self.alone:  # nobody is left without any more
                self._credit = 0.0
        self._priorities[request.priority] -= 1
        if not self._priorities[request.priority]:
            del self._priorities[request.priority]
        if not self._active:  # who was ahead of whom has cost nobody anything
            self._served = {}
        elif len(self._served) > MAX_IDLE + len(self._active):
            self._served = {user: self.served(user) for user in self._active}

    def reset(self, requests: Iterable[Request]) -> None:
        """These are the unfinished requests."""
        served, self._active, self._priorities = self._served, {}, {}
        self._served = {}
        for request in requests:
            if not request.finished:
                self.enter(request)
        self._served |= {user: count for user, count in served.items() if user in self._active}

    def read(self, request: Request, tokens: int) -> None:
        """So many tokens are run as what a response begins with."""
        self._served[request.user] = self.served(request.user) + tokens

    def ran(self, groups: Iterable[Group]) -> None:
        """A round was run for `groups`."""
        if not self.alone:
            self._round += 1
            for group in groups:
                group.seated = self._round
            for request in dict.fromkeys([group.request for group in groups]):
                self._charge(request)

    def _charge(self, request: Request) -> None:
        """Counts what was drawn and scored since the last time; what was given up, and is drawn again, twice."""
        work = _work(request)
        self._served[request.user] = self.served(request.user) + max(0, work - request.served)
        request.served = work

    # -- who gives way --------------------------------------------------------------------------------------------

    def order(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """Whose prompt is read first: of the lowest priority, then of the user who was served least."""
        if self.plain:
            return hypotheses
        return sorted(hypotheses, key=lambda one: (one.request.priority, self.served(one.request.user)))

    def last(self, running: Sequence[Unit]) -> Unit:
        """Of two or more who gives way where pages run out: never the oldest of the lowest priority, so that it ends.
        Of the others one of the highest priority, of the user who was served most, the youngest."""
        if self.plain:
            return running[-1]
        first = min(running, key=lambda unit: unit.request.priority)
        others = [unit for unit in running if unit is not first]
        return max(reversed(others), key=lambda unit: (unit.request.priority, self.served(unit.request.user)))

    def gives_way(self, unit: Unit, running: Sequence[Unit]) -> Unit | None:
        """Who gives way so that `unit`, which waits, can be admitted; None where it waits on.

        The youngest of the highest priority, if that is above its own. Else, of its own priority, the youngest of the
        user who was served most, if that has been served as much as its own user, and is left with as many responses
        as that has then: so two users never take turns in it, and nobody's last one gives way.
        """
        priority, user = unit.request.priority, unit.request.user
        if self.plain or not running:
            return None
        below = max(reversed(running), key=lambda other: other.request.priority)
        if below.request.priority > priority:
            return below
        places: dict[User, int] = {}
        youngest: dict[User, Unit] = {}
        for other in running:
            name = other.request.user
            places[name] = places.get(name, 0) + other.places
            if other.request.priority == priority:
                youngest[name] = other
        wanted = places.get(user, 0) + unit.places
        ahead = [name for name, other in youngest.items()
                 if name != user and self.served(name) >= self.served(user) and places[name] - other.places >= wanted]
        return youngest[max(ahead, key=self.served)] if ahead else None

    # -- a round --------------------------------------------------------------------------------------------------

    def rows(self, most: int | None, chunk: int, groups: Sequence[Group], reading: Sequence[Hypothesis]) -> int | None:
        """Rows of prompts that each model runs in the next round at most. Beside other users' drafts no more than
        what these leave, and never all prompts at once: someone else's may come."""
        rows = chunk if most is None else most
        first = reading[0].request.user if reading else None
        own = self._own({user: loads for user, loads in self._loads(groups).items() if user != first})
        if own:
            many = min(32, self._max_lanes)
            share = (len(self._active) - 1) * min(own.values()) * PROMPT_SHARE
            rows = min(rows, max(LEAST_ROWS, int(share * many / self._seconds(many))))
        return rows

    def seat(self, groups: list[Group], reading: Sequence[Hypothesis]) -> Seats:
        """Who of `groups` takes part in the next round.

        A round of k users costs none of them more than about k times what one of its own would: all groups of the user
        whose own round would cost least take part, with the lanes that they would have alone, and of all others, the
        user who was served least first, as many as there is time for. What they are left without adds up, so that
        the costliest group has its turn. Each user's groups take turns.
        """
        loads = self._loads(groups)
        own = self._own(loads)
        for hypothesis in reading:
            if hypothesis.request.user not in loads:
                alone = _cost(self._seconds, [Load(1, hypothesis.next_segment)])
                own[hypothesis.request.user] = min(own.get(hypothesis.request.user, alone), alone)
        if len(own) < 2:
            self._credit = 0.0
            return Seats(groups)
        limit = DRAFT_SHARE * len(own) * min(own.values())
        everything = [load for ones in loads.values() for load in ones]
        if sum(load.rows for load in everything) <= self._max_lanes and _cost(self._seconds, everything) <= limit:
            self._credit = 0.0
            return Seats(groups)
        lightest = min(own, key=lambda user: own[user])
        return self._share(groups, loads, lightest, limit)

    def _share(self, groups: list[Group], loads: Mapping[User, list[Load]], lightest: User, limit: float) -> Seats:
        """As `seat`, where there is no time for all of them."""
        chosen = {group for group in groups if not group.active or group.request.user == lightest}
        taken = list(loads.get(lightest, ()))
        left = {user: sorted((one for one in groups if one.active and one.request.user == user),
                             key=lambda group: group.seated) for user in loads if user != lightest}
        ahead = {user: self.served(user) for user in left}
        seated = dict.fromkeys(left, 0)
        missing: float | None = None  # the time that the first of those that are left out lacks
        while left:
            user = min(left, key=lambda user: ahead[user])
            group = left[user].pop(0)
            more = [Load(1, hypothesis.next_segment) for hypothesis in group.active]
            cost = _cost(self._seconds, taken + more)
            if cost <= limit + self._credit and sum(load.rows for load in taken + more) <= self._max_lanes:
                chosen.add(group)
                taken += more
                seated[user] += len(more)
                ahead[user] += sum(load.tokens for load in more)
            else:
                missing = cost - limit if missing is None else missing
                left[user] = []
            if not left[user]:
                del left[user]
        lanes = {user: count + self._more(taken, limit) // len(seated) for user, count in seated.items() if count}
        if lightest in loads:
            lanes[lightest] = self._max_lanes
        spare = limit + self._credit - _cost(self._seconds, taken)
        self._credit = 0.0 if missing is None else max(0.0, min(spare, missing))
        return Seats([group for group in groups if group in chosen], lanes)

    def _more(self, taken: Sequence[Load], limit: float) -> int:
        """Lanes for which there is time besides those of `taken`."""
        tokens = max((load.tokens for load in taken), default=1)
        low, high = 0, self._max_lanes - sum(load.rows for load in taken)
        while low < high:
            middle = (low + high + 1) // 2
            if _cost(self._seconds, [*taken, Load(middle, tokens)]) <= limit:
                low = middle
            else:
                high = middle - 1
        return max(0, low)

    def _loads(self, groups: Sequence[Group]) -> dict[User, list[Load]]:
        """What each user's responses would draw if they were alone, at most their share of all lanes beyond one each.
        """
        active: dict[User, list[Hypothesis]] = {}
        for group in groups:
            active.setdefault(group.request.user, []).extend(group.active)
        share = self._max_lanes // max(1, len(active))
        loads = {}
        for user, members in active.items():
            if members:
                most = max(1, share // len(members))
                loads[user] = [Load(1 if one.request.ranks else min(width, most), one.next_segment)
                               for one, width in zip(members, self._widths(members), strict=True)]
        return loads

    def _own(self, loads: Mapping[User, list[Load]]) -> dict[User, float]:
        return {user: _cost(self._seconds, ones) for user, ones in loads.items()}


def _cost(seconds: Callable[[int], float], loads: Iterable[Load]) -> float:
    """Of a draft: all rows are run until the shortest have their tokens, then the others."""
    rows: dict[int, int] = {}
    for load in loads:
        rows[load.tokens] = rows.get(load.tokens, 0) + load.rows
    left, done, total = sum(rows.values()), 0, 0.0
    for tokens in sorted(rows):
        if left:
            total += (tokens - done) * seconds(left)
        left, done = left - rows[tokens], tokens
    return total


def _work(request: Request) -> int:
    """Tokens that were drawn and scored for a request."""
    tokens = 0
    for group in request.groups:
        for hypothesis in group.hypotheses:
            tokens += hypothesis.metrics.lm_tokens_drawn + hypothesis.metrics.rm_tokens_scored
        if group.dropped is not None:
            tokens += group.dropped.lm_tokens_drawn + group.dropped.rm_tokens_scored
    return tokens
