"""Seating: who shares a round with whom, how long its drafts are, and how much of the prompts is read in it.

Two bounds, and a round keeps both. Between users: a round of k users costs none of them more than about k times what
one of its own would. Between requests that come one after the other, as a server has them: who comes meanwhile waits
for the end of a round, so that rounds are kept short where that costs little, and who lacks its first segment goes
before those that have theirs. Where wide rounds take hardly longer than narrow ones, as on a GPU, or all of them are
short, this keeps nobody out; nor does it where all that run have come together, as `generate` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from stars.fairness import Fairness, User
from stars.request import Group, Hypothesis

DRAFT_SHARE, PROMPT_SHARE = 0.75, 0.1
"""Of k times its own round that a draft of k users may take, and of (k - 1) times that others' prompts may where the
draft takes all of that: the rest is for rewards, the host, and the round that was under way when a user came. When the
share was chosen (newcomers had no rounds of their own then), a chat's p99 beside a batch was 1.7, 1.5 and 1.3 times
that alone at 0.9, 0.75 and 0.65; a batch beside one who asked all the time drew 900, 860 and 500 tokens a second."""
READ_SHARE = 0.4  # of the time of others' drafts, that prompts of one who draws nothing may take beside them
SHORT = 0.02  # seconds of a draft that nobody minds who comes meanwhile
LONGEST = 2.5  # drafts of a single lane that a draft may take where requests come one after the other
PATIENCE = 8.0  # of the longest draft that newcomers go first for, before the others have a round; no more than is fair
LEAST_PIECE = 2  # tokens of a segment drawn in pieces: of fewer the host would do more than the model
LEAST_ROWS = 16  # of prompts in a round, however little another user's share of it is


class Load(NamedTuple):
    """Rows of a draft that have so many tokens each."""

    rows: int
    tokens: int


class Seats(NamedTuple):
    """Who takes part in a round, how many lanes each user has there at most, and how long its drafts are."""

    groups: list[Group]
    lanes: Mapping[User, int] | None = None  # None: as many as would be drawn if all were of one user
    piece: int | None = None  # most tokens of a segment that may be drawn in pieces; None: all that there are


class Costs(NamedTuple):
    """What the next round is chosen by."""

    loads: dict[User, list[Load]]  # what each user's responses would draw if they were alone
    own: dict[User, float]  # seconds of that, and of those of whom nothing is read yet but prompts
    limit: float  # seconds that the draft may take
    piece: int | None  # as Seats'


class Seating:
    """Answers the scheduler's questions about a round.

    seconds: of a step by its rows. widths: the lanes that the responses of one user would get if they were alone.
    pieces: whether a segment may be drawn in pieces at all.
    """

    def __init__(self, fairness: Fairness, seconds: Callable[[int], float],
                 widths: Callable[[Sequence[Hypothesis]], list[int]], max_lanes: int, pieces: bool):
        self._fairness = fairness
        self._seconds = seconds
        self._widths = widths
        self._max_lanes = max_lanes
        self._pieces = pieces
        self._credit = 0.0  # seconds of a round that those who had no seat have been left without
        self._owed = 0.0  # seconds that prompts took of others' time
        self._ahead = 0.0  # seconds that newcomers went first for since the others had a round
        self._read = 0  # rows of prompts since the last round
        self._round = 1

    def read(self, rows: int) -> None:
        """So many rows of prompts were run."""
        self._read += rows

    def settle(self) -> None:
        """Of users one at most is left: nobody is left without any more, and nobody owes anything."""
        self._credit = self._owed = 0.0

    def ran(self, groups: Iterable[Group]) -> None:
        """A round was run for `groups`."""
        self._round += 1
        for group in groups:
            group.seated = self._round

    def rows(self, most: int | None, chunk: int, groups: Sequence[Group], reading: Sequence[Hypothesis],
             one_by_one: bool) -> int | None:
        """Rows of prompts that each model runs in the next round at most.

        Where others' may come that is never all prompts at once. Chunks are not divided: beside other users' drafts
        one is run and what it took is owed, until rounds have passed whose time left as much; meanwhile only what is
        short is run. one_by_one: whether requests come one after the other; then newcomers are read one at a time, and
        none while one that was read goes first.
        """
        one_by_one = one_by_one and not self._cheap(groups)
        if self._fairness.alone and not one_by_one:
            return most
        rows = chunk if most is None else min(chunk, most)
        first = reading[0].group if reading else None
        if first is None:
            return rows
        if one_by_one and self._hurry(groups, reading, self._costs(groups, reading, one_by_one)):
            return 0
        if one_by_one and self._goes_first(first):
            return min(rows, max(map(len, first.request.contexts)))
        others = self._owed > 0.0 and any([group.active for group in groups
                                           if group.request.user != first.request.user])
        return min(rows, LEAST_ROWS) if others else rows

    def seat(self, groups: list[Group], reading: Sequence[Hypothesis], one_by_one: bool) -> Seats:
        """Who of `groups` takes part in the next round.

        Of users all groups of the one whose own round would cost least take part, with the lanes that they would have
        alone, and of all others, the user who was served least first, as many as there is time for. What those are left
        without who have no seat adds up, so that the costliest group has its turn. Each user's groups take turns.

        Of requests that come one after the other those that lack their first segment have rounds of their own, as long
        as the others can wait: in a round with others they would have fewer lanes, each of which is one chance less.
        """
        read, self._read = self._read, 0
        one_by_one = one_by_one and not self._cheap(groups)
        if self._fairness.alone and not one_by_one:
            self._ahead = 0.0
            return Seats(groups)
        for group in groups:
            group.seated = group.seated or self._round
        costs = self._costs(groups, reading, one_by_one)
        if len(costs.own) > 1:
            self._pay(costs, reading[0].request.user if reading else None, read)
        new = self._hurry(groups, reading, costs) if one_by_one else None
        if new is not None:
            self._ahead += max(SHORT, read * self._row + self._together(new, costs.piece))
            first = [group for group in groups if group in new or not group.active]
            return Seats(first if new else [], piece=costs.piece)
        self._ahead = 0.0
        everything = _all(costs.loads)
        if sum(load.rows for load in everything) <= self._max_lanes and self._cost(everything) <= costs.limit:
            self._credit = 0.0
            return Seats(groups, piece=costs.piece)
        return self._share(groups, costs)

    def _costs(self, groups: Sequence[Group], reading: Sequence[Hypothesis], one_by_one: bool) -> Costs:
        piece = self._piece(groups) if one_by_one else None
        loads = self._loads(groups, piece)
        own = {user: self._cost(ones) for user, ones in loads.items()}
        for hypothesis in reading:
            if hypothesis.request.user not in loads:
                alone = self._cost([Load(1, _tokens(hypothesis, piece))])
                own[hypothesis.request.user] = min(own.get(hypothesis.request.user, alone), alone)
        limit = self._longest(groups, max) if one_by_one and groups else math.inf
        return Costs(loads, own, min(limit, _fair(own)), piece)

    @property
    def _row(self) -> float:
        """Seconds that a row of a prompt takes, about: that of a draft of many lanes."""
        many = min(32, self._max_lanes)
        return self._seconds(many) / many

    def _cheap(self, groups: Sequence[Group]) -> bool:
        """Whether no round is too long for who comes meanwhile, however many lanes it has."""
        widest = self._seconds(self._max_lanes)
        tokens = max([one.next_segment for group in groups for one in group.active], default=1)
        return widest <= LONGEST * self._seconds(1) or widest * tokens <= SHORT

    def _pay(self, costs: Costs, reader: User, read: int) -> None:
        """What is owed for so many rows of prompts and those before: a round of others pays a share of its time, less
        what the one who reads draws in it, and at least a little."""
        own = costs.own
        others = self._cost(_all({user: ones for user, ones in costs.loads.items() if user != reader}))
        drawn = own[reader] if reader in costs.loads else 0.0
        paid = max(READ_SHARE * others - drawn, PROMPT_SHARE * (len(own) - 1) * min(own.values()))
        self._owed = max(0.0, self._owed + read * self._row - paid)

    def _longest(self, groups: Sequence[Group], of: Callable[[list[int]], int]) -> float:
        """Seconds that a draft may take where others may come meanwhile, by the longest or the shortest of the segments
        that are drawn."""
        segments = [one.max_segment for group in groups for one in group.active]
        return max(SHORT, LONGEST * of(segments) * self._seconds(1)) if segments else SHORT

    def _hurry(self, groups: Sequence[Group], reading: Sequence[Hypothesis], costs: Costs) -> list[Group] | None:
        """The newcomers that go before the others, as many of those that came first as there is time for, none while
        they are being read; None where nobody does: the others have waited long for newcomers, or a round of the first
        of these would be too long itself.

        Who has a higher priority than some of those that would wait does not go before them.
        """
        drawing = [group for group in groups if group.active]
        requests = [*(group.request for group in drawing), *(one.request for one in reading)]
        lowest = min([request.priority for request in requests], default=0)
        new = [group for group in drawing if group.request.priority <= lowest and self._goes_first(group)]
        reads = any([one.request.priority <= lowest and self._goes_first(one.group) for one in reading])
        if not drawing or not (new or reads) or len(new) == len(drawing) and not reading:
            return None
        if self._ahead >= min(PATIENCE * self._longest(groups, min), _fair(costs.own)):
            return None
        count = 0
        while count < len(new) and self._together(new[: count + 1], costs.piece) <= costs.limit:
            count += 1
        return new[:count] if count or not new else None

    def _together(self, groups: Sequence[Group], piece: int | None) -> float:
        """Seconds of a draft of these, with the lanes that they have if nobody else is there."""
        members = [one for group in groups for one in group.active]
        return self._cost([Load(width, _tokens(one, piece))
                           for one, width in zip(members, self._widths(members), strict=True)])

    def _goes_first(self, group: Group) -> bool:
        """Whether none of its responses has its first segment, and it may go before those that have theirs."""
        return (not any([one.token_ids for one in group.hypotheses]) and self._fairness.goes_first(group.request))

    def _piece(self, groups: Sequence[Group]) -> int | None:
        """Most tokens that a round draws, where all that take part may be drawn in pieces."""
        members = [one for group in groups for one in group.active]
        if not self._pieces or not members or not all([one.request.piecewise for one in members]):
            return None
        return max(LEAST_PIECE, int(SHORT / self._seconds(min(len(members), self._max_lanes))))

    def _share(self, groups: list[Group], costs: Costs) -> Seats:
        """As `seat`, where there is no time for all of them."""
        loads, own, limit, piece = costs
        lightest = [min(own, key=lambda user: own[user])] if len(own) > 1 else []
        chosen = {group for group in groups if not group.active or group.request.user in lightest}
        taken = [load for user in lightest for load in loads.get(user, ())]
        left = {user: sorted((one for one in groups if one.active and one.request.user == user),
                             key=lambda group: group.seated)
                for user in loads if user not in lightest}
        ahead = {user: self._fairness.served(user) for user in left}
        seated = dict.fromkeys(left, 0)
        missing: float | None = None  # the time that the first of those that are left out lacks
        while left:
            user = min(left, key=lambda user: ahead[user])
            group = left[user].pop(0)
            more = [Load(1, _tokens(hypothesis, piece)) for hypothesis in group.active]
            needed = self._cost(taken + more)
            rows = sum(load.rows for load in taken + more)
            if not taken or (needed <= limit + self._credit and rows <= self._max_lanes):
                chosen.add(group)
                taken += more
                seated[user] += len(more)
                ahead[user] += sum(load.tokens for load in more)
            else:
                missing = max(0.0, needed - limit) if missing is None else missing
                left[user] = []
            if not left[user]:
                del left[user]
        lanes = {user: count + self._more(taken, limit) // len(seated) for user, count in seated.items() if count}
        lanes |= dict.fromkeys([user for user in lightest if user in loads], self._max_lanes)
        spare = limit + self._credit - self._cost(taken)
        self._credit = 0.0 if missing is None else max(0.0, min(spare, missing))
        return Seats([group for group in groups if group in chosen], lanes, piece)

    def _more(self, taken: Sequence[Load], limit: float) -> int:
        """Lanes for which there is time besides those of `taken`."""
        tokens = max((load.tokens for load in taken), default=1)
        low, high = 0, self._max_lanes - sum(load.rows for load in taken)
        while low < high:
            middle = (low + high + 1) // 2
            if self._cost([*taken, Load(middle, tokens)]) <= limit:
                low = middle
            else:
                high = middle - 1
        return max(0, low)

    def _loads(self, groups: Sequence[Group], piece: int | None = None) -> dict[User, list[Load]]:
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
                loads[user] = [Load(1 if one.request.ranks else min(width, most), _tokens(one, piece))
                               for one, width in zip(members, self._widths(members), strict=True)]
        return loads

    def _cost(self, loads: Iterable[Load]) -> float:
        return cost(self._seconds, loads)


def cost(seconds: Callable[[int], float], loads: Iterable[Load]) -> float:
    """Seconds of a draft: all rows are run until the shortest have their tokens, then the others."""
    rows: dict[int, int] = {}
    for load in loads:
        rows[load.tokens] = rows.get(load.tokens, 0) + load.rows
    left, done, total = sum(rows.values()), 0, 0.0
    for tokens in sorted(rows):
        if left:
            total += (tokens - done) * seconds(left)
        left, done = left - rows[tokens], tokens
    return total


def _fair(own: Mapping[User, float]) -> float:
    """Seconds that a draft of these users may take: of one any."""
    return DRAFT_SHARE * len(own) * min(own.values()) if len(own) > 1 else math.inf


def _tokens(hypothesis: Hypothesis, piece: int | None) -> int:
    """Most that its next draft has, where one is a piece of a segment."""
    return hypothesis.next_segment if piece is None else min(piece, hypothesis.next_segment)


def _all(loads: Mapping[User, list[Load]]) -> list[Load]:
    return [load for ones in loads.values() for load in ones]
