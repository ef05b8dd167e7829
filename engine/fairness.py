"""Fairness between users: what each was served, and who gives way to whom.

The counters are those of VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): tokens served to
each user; who comes back from idle is lifted to the least of those active. Where one user is active nothing is decided
here, and what it is served is counted once its requests end or another user comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stars.request import Group, Hypothesis, Request
from stars.unit import Unit

User = str | None
MAX_IDLE = 1024  # users without a request whose counters are kept


class Fairness:
    """Keeps the counters, and answers the scheduler's questions by them."""

    def __init__(self) -> None:
        self._active: dict[User, set[Request]] = {}  # their unfinished requests
        self._served: dict[User, float] = {}
        self._fresh: dict[User, tuple[Request, float]] = {}  # what those came with who are not ahead, and what they had
        self._priorities: dict[int, int] = {}  # how many unfinished requests have each

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

    def goes_first(self, request: Request) -> bool:
        """Whether a request that has no segment yet may go before those that have: of one user any, of several the one
        with which a user came from idle who was not served more than the others. So nobody is first for long."""
        return self.alone or self._is_fresh(request)

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
            if all([self.served(user) <= self.served(other) for other in self._active]):
                self._fresh[user] = request, self.served(user)
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
        if self._is_fresh(request):
            del self._fresh[request.user]
        if not requests:
            del self._active[request.user]
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
        self._fresh = {}
        self._served |= {user: count for user, count in served.items() if user in self._active}

    def read(self, request: Request, tokens: int) -> None:
        """So many tokens are run as what a response begins with."""
        self._served[request.user] = self.served(request.user) + tokens

    def ran(self, groups: Iterable[Group]) -> None:
        """A round was run for `groups`."""
        for request in dict.fromkeys([group.request for group in groups]):
            if not self.alone:
                self._charge(request)
            if self._is_fresh(request) and any([one.token_ids for one in request.hypotheses]):
                del self._fresh[request.user]

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
        return sorted(hypotheses, key=lambda one: (one.request.priority, self._standing(one.request)))

    def _standing(self, request: Request) -> float:
        """What its user was served; of one that goes first before it came, so that the prompts of such are read in the
        order in which they came, however long they are."""
        return self._fresh[request.user][1] if self._is_fresh(request) else self.served(request.user)

    def _is_fresh(self, request: Request) -> bool:
        """Whether its user came from idle with it, was not ahead of the others, and has no segment of it yet."""
        return request.user in self._fresh and self._fresh[request.user][0] is request

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


def _work(request: Request) -> int:
    """Tokens that were drawn and scored for a request."""
    tokens = 0
    for group in request.groups:
        for hypothesis in group.hypotheses:
            tokens += hypothesis.metrics.lm_tokens_drawn + hypothesis.metrics.rm_tokens_scored
        if group.dropped is not None:
            tokens += group.dropped.lm_tokens_drawn + group.dropped.rm_tokens_scored
    return tokens
