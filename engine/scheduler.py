"""The queue: who waits, who runs, and who gives its pages back when they run out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

from stars.arguments import shown
from stars.budget import NO_BUDGET
from stars.cache import Opening, PagedCache
from stars.config import EngineConfig
from stars.errors import IntegrityError, OutOfPages, RequestError, RewardError, log, sentence
from stars.fairness import Fairness
from stars.models import Models
from stars.plan import Plan
from stars.prefilling import Allowance, Prefiller
from stars.prompt import Prompt
from stars.request import Group, Hypothesis, Prefill, Request
from stars.reward.base import Reward
from stars.round import Round
from stars.seating import Seating, Seats
from stars.spending import is_spent
from stars.unit import Lines, Unit


class Scheduler:
    """Units in the order they came: those in front run, as many as both caches hold, the others wait.

    Who is admitted draws once both models have read its prompt, a bounded number of rows a round where others decode.
    Where nothing decodes, all that is there is read first and begins together, as wide rounds cost little more than
    narrow ones. It is a chunk a round then, too: others may come, be aborted or see their deadline pass meanwhile.

    Pages are taken for a prompt at admission and for a segment before each round. Where they run out, the unit that was
    admitted last is pre-empted: it goes back to its last boundary, gives everything back and waits in front of all
    others. Admitted again, its prompt and what it had committed are computed anew, and it goes on from there.

    The oldest unit never gives way, so that it ends. A unit that gave way is not admitted again before another one has
    given something back: it would need more than there was.
    """

    def __init__(self, cache: PagedCache, reward: Reward | None, models: Models, round_: Round, config: EngineConfig):
        self.waiting = Lines()
        self.running: list[Unit] = []  # as they were admitted
        self._config = config
        self._cache = cache
        self._reward = reward
        self._prefiller = Prefiller(cache, reward, models, config)
        self._round = round_
        self._exact = config.deterministic
        self._gave_way: Unit | None = None  # the last one, until another gives something back
        self._together = -math.inf  # those that came before begin to decode together
        self._budgeted: list[Request] = []  # those that have a budget and may be unfinished
        proposer = round_.proposer
        self._fairness = Fairness()
        self._seating = Seating(self._fairness, proposer.chooser.seconds, proposer.widths_alone, config.max_num_lanes,
                                not config.deterministic)
        self._began = math.inf  # when something last decoded that nothing did before
        self._shared = False  # whether the round that was planned last is shared
        self._latest = -math.inf  # when the last of those came that were admitted

    @property
    def _places(self) -> int:
        """Responses that may run side by side until the next admission: a rule may fork a group to its population."""
        return sum(unit.places for unit in self.running)

    @property
    def groups(self) -> list[Group]:
        """The groups that take part in the next round, as they were admitted.

        A group with a barrier whose segment is decided waits while another one is still at its own.
        """
        groups = list(dict.fromkeys([unit.group for unit in self.running if unit.ready]))
        if any([unit.group.request.plan.lanes.barrier and unit.group.undecided for unit in self.running]):
            groups = [group for group in groups if not group.request.plan.lanes.barrier or group.undecided]
        return self._round.able(groups)

    @property
    def _scorer(self) -> Reward:
        """The reward: whoever needs one was refused where there is none."""
        assert self._reward is not None
        return self._reward

    def check(self, name: str, plan: Plan, prompt: Prompt, max_tokens: int, contexts: Sequence[list[int]]) -> None:
        """RequestError unless the responses to a prompt that are decided together can be held at all.

        name: of the policy that asks for them. contexts: what the language model reads each of them after.
        """
        population = plan.lanes.population
        if population == 1 and len(contexts) == 1 or plan.whole:
            return
        if population > self._config.max_num_seqs:
            raise RequestError(f"{name}'s population is {shown(population)} and the engine decodes "
                               f"{self._config.max_num_seqs} responses at once: build it with larger max_num_seqs and "
                               "max_num_lanes")
        where = f"cache_tokens={self._config.cache_tokens}"
        if self._cache.could_open([Opening(ids[:-1], [len(ids) - 1 + max_tokens] * population) for ids in contexts]):
            if plan.score.when == "never" or self._scorer.could_hold(prompt, max_tokens, population):
                return
            where = f"the reward model's cache of {where}"
        if population == 1:
            lengths = " and ".join(str(len(ids)) for ids in contexts)
            raise RequestError(f"{name} reads a response of up to {max_tokens} tokens after two prompts, of {lengths} "
                               f"tokens, which do not fit {where} together: raise it, or lower max_tokens")
        raise RequestError(f"{name} decodes {population} responses of up to {max_tokens} tokens together, which do "
                           f"not fit {where}: raise it, lower max_tokens, or draw fewer")

    def add(self, request: Request) -> None:
        """Queues `request`."""
        if request.budget != NO_BUDGET:
            self._budgeted.append(request)
        self._fairness.enter(request)
        self.waiting.extend(self._units(request))

    def _units(self, request: Request) -> list[Unit]:
        """The units of a request that may be admitted from now on and were not queued yet, in order.

        Whole responses that are judged in order are queued as they are wanted: as many as the width says may be under
        way beyond what is decided.
        """
        if not request.whole:
            return [Unit(group) for group in request.groups]
        units, width = [], self._round.proposer.window(request, len(self.groups)) if request.in_turn else 0
        for group in request.groups:
            members = group.hypotheses
            if request.in_turn:
                if group.finished:
                    continue
                stop = min(len(members), len(group.judgeable) + width)
                members, group.queued = members[group.queued : stop], max(group.queued, stop)
            units += [Unit(group, hypothesis) for hypothesis in members]
        return units

    # -- budgets --------------------------------------------------------------------------------------------------

    def due(self) -> list[tuple[Request, str]]:
        """The requests that their budgets end now, each with the reason, wherever they are."""
        if not self._budgeted:
            return []
        self._budgeted = [request for request in self._budgeted if not request.finished]
        now = time.monotonic()
        return [(request, "deadline" if request.deadline <= now else "budget") for request in self._budgeted
                if request.deadline <= now or request.bounded and is_spent(request)]

    @property
    def deadline(self) -> float:
        """The next one, on the clock of time.monotonic; inf where there is none."""
        return min([request.deadline for request in self._budgeted], default=math.inf)

    # -- a round's room -------------------------------------------------------------------------------------------

    def plan(self, only: Group | None = None) -> tuple[list[Group], list[Request]]:
        """The groups of the next round, and the requests that ended on the way.

        Whoever runs gets the pages of a segment, and what fits besides is admitted; with `only`, of one group.
        """
        ended = self._ended(self._round.answered_prompts())
        ended += self.reserve()
        ended += self.admit(only)
        if only is None and self._gathers:
            return [], ended
        self._together = -math.inf
        seats = Seats(self.groups)
        self._shared = self._shares
        if self._shared:
            seats = self._seating.seat(seats.groups, self._unread, self._one_by_one)
        self._round.proposer.lanes, self._round.proposer.piece = seats.lanes, seats.piece
        return seats.groups, ended

    def ran(self, groups: Sequence[Group]) -> None:
        """A round was run for `groups`."""
        if self._shared:
            self._seating.ran(groups)
        self._fairness.ran(groups)

    def reserve(self) -> list[Request]:
        """Takes the pages of a segment for every running unit, the oldest first; returns the requests that it ends.

        Units give way, the youngest first, where pages run out.
        """
        ended = []
        for unit in list(self.running):
            for hypothesis in unit.unfinished:
                # While it is read it has the pages that it was admitted with.
                while hypothesis.table is not None and hypothesis.prefill is None and not self._reserve(hypothesis):
                    if len(self.running) > 1:
                        self._preempt(self._fairness.last(self.running))
                    elif self._holds_twice(unit):
                        self._preempt(unit)
                    else:
                        ended.append(self._refuse(unit, "reserve has no room for the next segment of this prompt"))
        while len(self.running) > 1 and self._cache.num_free_pages < self._for_forks():
            self._preempt(self._fairness.last(self.running))
        return ended

    def _holds_twice(self, unit: Unit) -> bool:
        """Whether its responses hold their prompt in several copies: one of them had read it anew, to tell of it."""
        tables = [one.table for one in unit.unfinished if one.table is not None]
        return unit.request.prompt_told is not None and len({table.pages[0] for table in tables if table.pages}) > 1

    def _for_forks(self) -> int:
        """Pages that a round may take besides what is reserved: of a population those are kept twice that stand in the
        place of one who has ended, or who needed fewer."""
        pages = 0
        for unit in self.running:
            members = unit.unfinished if unit.places > 1 else []
            if members and all([hypothesis.opened for hypothesis in members]):
                needed = [sum([self._cache.pages_written(hypothesis.length(context), hypothesis.next_room)
                               for context in hypothesis.contexts]) for hypothesis in members]
                pages += unit.places * max(needed) - sum(needed)
        return pages

    def _reserve(self, hypothesis: Hypothesis, opened: bool = False) -> bool:
        """Takes the pages of the next segment in both caches; False where they are not there.

        opened: the hypothesis holds nothing yet but what its table and session were opened with.
        """
        if not self._reserve_pages(hypothesis):
            return False
        request, segment = hypothesis.request, hypothesis.next_room
        if hypothesis.session is None:
            return True
        # A response that is scored at its end grows in the reward's cache then, all at once.
        unseen = len(hypothesis.token_ids) if opened or request.plan.score.when == "end" else 0
        return self._scorer.reserve(hypothesis.session, unseen + segment)

    def _reserve_pages(self, hypothesis: Hypothesis) -> bool:
        """Takes those of the language model's cache, in every context that is open; False where they are not there."""
        try:
            for context in hypothesis.contexts:
                stop = hypothesis.length(context) + hypothesis.next_room
                self._cache.reserve(context.table, stop - context.table.length)
        except OutOfPages:
            return False
        return True

    def _preempt(self, unit: Unit) -> None:
        """Takes everything from a running `unit` and puts it in front of those that wait."""
        held = unit.unfinished
        spent = {hypothesis: hypothesis.metrics for hypothesis in held}
        if unit.whole is not None and unit.whole.wait is not None:
            unit.whole.go_back()
            self._round.forget_attempts(unit.whole)
        elif unit.group.undecided:
            unit.group.go_back()
            for hypothesis in dict.fromkeys([*held, *unit.group.hypotheses]):
                self._round.forget_attempts(hypothesis)
            for hypothesis in held:
                if hypothesis not in unit.group.hypotheses:  # a fork that waited to be committed
                    self._round.close(hypothesis)
        for hypothesis, metrics in spent.items():
            # The attempts that were given up are counted when they are drawn again; the clock ran for them, too.
            hypothesis.metrics.lm_seconds, hypothesis.metrics.rm_seconds = metrics.lm_seconds, metrics.rm_seconds
            hypothesis.count_preemption()
        self._give_up(unit)

    def make_way(self) -> bool:
        """Has the unit give way that is the next to do so, to somebody who is none and holds nothing once the turn is
        over; False where nobody runs."""
        if not self.running:
            return False
        self._preempt(self._fairness.last(self.running) if len(self.running) > 1 else self.running[0])
        self._gave_way = None  # there is what it had as soon as the turn is over
        return True

    def _give_up(self, unit: Unit) -> None:
        """Takes everything from `unit`, which waits in front of all others until another gives something back."""
        for hypothesis in unit.unfinished:
            self._round.close(hypothesis)
        self._gave_way = unit
        if unit in self.running:
            self.running.remove(unit)
            self.waiting.push([unit])

    def _refuse(self, unit: Unit, problem: str) -> Request:
        """Ends the request of a unit that cannot be held although nothing else holds anything."""
        request, hypotheses = unit.request, unit.unfinished
        for hypothesis in hypotheses:
            self._round.close(hypothesis)
        if not self._can_open(unit):
            raise IntegrityError("a request does not fit in an empty cache, although it was checked: this is a defect")
        return self.fail(request, RewardError(f"{type(self._reward).__name__}.{problem} while nothing else is open: "
                                              "refuse it in check"))

    # -- admission ------------------------------------------------------------------------------------------------

    def admit(self, only: Group | None = None) -> list[Request]:
        """Moves waiting units, in order, into the running ones as long as the pages of prompt and first segment are
        there, and reads on in what those begin with that were admitted; returns the requests that this ends.

        Where something decodes, so many rows of each model are run at most as `max_num_batched_tokens` says, and as
        `Seating.rows` says, which may be none; otherwise a chunk. With `only`, units of one group are admitted and read
        to their end.
        """
        ended: list[Request] = []
        before = self._gave_way
        if not self.waiting and not self._unread:
            return ended
        idle = not any(unit.ready for unit in self.running)
        if idle and not any(one.wait is not None for unit in self.running for one in unit.unfinished):
            self._together = self._began = time.monotonic()  # who waits for a reward has begun
        idle, rows = idle or self._gathers, None
        if only is None:
            rows = self._config.chunk if idle else self._config.max_num_batched_tokens
            self._open_units(only, ended)
            if self._shares and not self._gathers:
                rows = self._seating.rows(rows, self._config.chunk, self.groups, self._unread, self._one_by_one)
        if rows == 0:
            return ended
        if not self._read_on(rows, only, ended) and idle and self._unread:
            self._read_on(None, only, ended)  # there is a reward that does nothing by halves
        first = self._first(only)
        if first is not None and not self.running:
            if self._anew(first.request) is not None and self._forget(first.request):
                return ended + self.admit(only)  # what it reads anew was there twice
            gave_way = self._gave_way if self._gave_way is not before else None
            ended.append(self._refuse(gave_way or first, "can_open refuses this prompt"))
        return ended

    def _read_on(self, rows: int | None, only: Group | None, ended: list[Request]) -> bool:
        """Opens and reads as `admit` says, at most so many rows of each model; whether anything was done."""
        language, reward, done = Allowance(rows), Allowance(rows), False
        while True:
            opened, used = self._open_units(only, ended), language.used + reward.used
            before = language.used
            ready = self._prefiller.advance(self._unread, language, reward)
            if self._shares:
                self._seating.read(language.used - before)
            ended += self._begin(ready)
            # What was read may be shared from now on: those that waited for it are opened next.
            if not opened and not ready and language.used + reward.used == used:
                return done
            done = True

    @property
    def reads(self) -> bool:
        """Whether something that was admitted is still being read."""
        return any(hypothesis.prefill is not None for unit in self.running for hypothesis in unit.unfinished)

    @property
    def _gathers(self) -> bool:
        """Whether those that could decode wait for others that came no later than they; never for other users."""
        return (self._together > -math.inf and self._fairness.plain
                and any([one.request.arrived <= self._together for one in self._unread]))

    @property
    def _shares(self) -> bool:
        """Whether rounds are shared between users, or with those who come meanwhile."""
        return not self._fairness.alone or self._one_by_one

    @property
    def _one_by_one(self) -> bool:
        """Whether requests come while others decode: some that were admitted came after those had begun."""
        return self._latest > self._began

    @property
    def _unread(self) -> list[Hypothesis]:
        """Responses that were admitted and are still being read, in order."""
        return self._fairness.order([hypothesis for unit in self.running for hypothesis in unit.unfinished
                                     if hypothesis.prefill is not None])

    def _first(self, only: Group | None) -> Unit | None:
        """The unit to be admitted next: the rest of one that has been admitted in part, or the first that waits."""
        if self.running and not all(hypothesis.opened for hypothesis in self.running[-1].unfinished):
            return self.running[-1]
        # Who gave way would need more than there was, until another has given something back.
        return self.waiting.first(lambda user: self._fairness.standing(user, self.running),
                                  self._gave_way if self.running else None, only)

    def _open_units(self, only: Group | None, ended: list[Request]) -> bool:
        """Opens what can be read side by side; a request that fails is appended to `ended`. Whether there is something
        new to be read.

        Who could share pages with one that is being read waits until those are written, the rest of its own unit too.
        """
        opened: list[Hypothesis] = []
        beginnings = {beginning for hypothesis in self._unread for beginning in self._beginnings(hypothesis)}
        while (unit := self._first(only)) is not None:
            if unit not in self.running:
                held = len(self.running)
                if not self._make_room(unit):
                    break
                if len(self.running) < held:  # nobody waits for what they were being read with
                    beginnings = {beginning for one in self._unread for beginning in self._beginnings(one)}
            for hypothesis in unit.unopened():
                beginning = self._beginning(hypothesis, 0 if hypothesis.table is None else 1)
                if beginning in beginnings or self._waits_for_reward(hypothesis):
                    return bool(opened)
                try:
                    if not self._open(hypothesis):
                        if any(one.table is not None for one in unit.unfinished):
                            self._give_up(unit)
                        return any(other.table is not None for other in opened)
                except IntegrityError:
                    raise
                except Exception as error:
                    ended.append(self.fail(unit.request, error))
                    break
                opened.append(hypothesis)
                if unit.request.admitted is None:
                    unit.request.admitted = time.monotonic()
                if beginning is not None:
                    beginnings.add(beginning)
                if unit not in self.running:
                    self.waiting.remove(unit)
                    self.running.append(unit)
                    self._latest = max(self._latest, unit.request.arrived)
        return bool(opened)

    def _waits_for_reward(self, hypothesis: Hypothesis) -> bool:
        """Whether the reward is still to read the beginning that it shares with another one, which comes first: the
        language model may be ahead of it. Where one of them has been read its pages are there."""
        request, size = hypothesis.request, self._config.page_size
        if hypothesis.table is not None or request.plan.score.when == "never" or len(request.contexts[0]) <= size:
            return False
        alike = [one for unit in self.running for one in unit.unfinished if one.session is not None
                 and one.request.contexts[0][:size] == request.contexts[0][:size]]
        return bool(alike) and all([one.prefill is not None and not one.reading.started for one in alike])

    def _make_room(self, unit: Unit) -> bool:
        """Whether all of `unit` can be opened, once those have given way that it comes before."""
        while not self._has_room(unit):
            other = self._fairness.gives_way(unit, self.running)
            if other is None:
                return False
            self._preempt(other)
        return True

    def _has_room(self, unit: Unit) -> bool:
        """Whether all of `unit` can be opened in the language model's cache, with a segment each."""
        return self._places + unit.places <= self._config.max_num_seqs and self._can_open(unit)

    def _can_open(self, unit: Unit) -> bool:
        """Whether there are pages for all of `unit`, with a segment each."""
        lengths = [len(one.token_ids) + one.next_room for one in unit.unfinished]
        lengths += [max(lengths)] * (unit.places - len(lengths))  # who is kept twice in the place of one who has ended
        first, *others = [Opening(ids[:-1], [len(ids) - 1 + length for length in lengths])
                          for ids in unit.request.contexts]
        return self._cache.can_open(first.token_ids, first.lengths, unit.request.stores, others,
                                    self._anew(unit.request), self._for_forks())

    def _anew(self, request: Request) -> int | None:
        """The tokens of a request's prompt that its next response may share, where it is to read the others anew: to
        tell what the model says of them. None where nothing is to be told, or another one does."""
        told, teller = request.prompt_told, request.teller
        if told is None or told.complete or teller is not None and teller.table is not None:
            return None
        return told.read

    def _forget(self, request: Request) -> bool:
        """Forgets what is published of a request's prompt; whether anything was."""
        return self._cache.withdraw(request.contexts[0], request.stores)

    def _history(self, hypothesis: Hypothesis, context: int) -> list[int]:
        """What the pages of its context of this number hold before it draws, as far as it is looked for in those of
        others: what was committed, too, unless it has to be run again as it was drafted."""
        prompt_ids = hypothesis.request.contexts[context]
        return (prompt_ids if self._exact else prompt_ids + hypothesis.token_ids)[:-1]

    def _beginning(self, hypothesis: Hypothesis, context: int) -> tuple[int, ...] | None:
        """The history of its context of this number up to the end of the first page that cannot be shared yet; None if
        it fills no such page."""
        history, stores = self._history(hypothesis, context), hypothesis.request.stores
        stop = self._cache.shared_length(history, stores) + self._config.page_size
        return (*stores, *history[:stop]) if len(history) >= stop else None

    def _beginnings(self, hypothesis: Hypothesis) -> list[tuple[int, ...]]:
        """Those of what is being read of it."""
        found = [self._beginning(hypothesis, index) for index in range(len(hypothesis.contexts))]
        return [beginning for beginning in found if beginning is not None]

    def _open(self, hypothesis: Hypothesis) -> bool:
        """Takes the pages of prompt, committed tokens and a segment in both caches; False if one has no room. Of two
        contexts the second is opened by a second call."""
        request = hypothesis.request
        if hypothesis.table is not None:
            try:
                hypothesis.judge = self._cache.open(self._history(hypothesis, 1), request.stores)
            except OutOfPages:
                return False
            return self._reserve_pages(hypothesis)
        scored = request.plan.score.when != "never"
        if scored and not self._scorer.can_open(request.prompt, request.max_tokens):
            return False
        anew = self._anew(request)
        try:
            table = hypothesis.table = self._cache.open(self._history(hypothesis, 0), request.stores, anew)
        except OutOfPages:  # of one of several, whose room others have taken meanwhile
            return False
        if anew is not None:
            request.teller = hypothesis
        hypothesis.prefill, new = Prefill(), not hypothesis.admitted  # else it was interrupted or gave way
        hypothesis.admitted = True
        self._fairness.read(request, len(request.contexts[0]) - table.length + len(hypothesis.token_ids))
        if new:
            hypothesis.metrics.prompt_tokens_cached = table.length
            if request.cached is None:
                request.cached = table.length
        if scored:
            hypothesis.session = self._scorer.open(request.prompt, request.max_tokens)
            if new:
                hypothesis.metrics.rm_tokens_cached = self._scorer.cached(hypothesis.session)
            elif hypothesis.token_ids and request.scores_segments and not self._exact:
                text = request.detokenizer.decode(hypothesis.token_ids) if self._scorer.needs_text else None
                self._scorer.recall(hypothesis.session, hypothesis.token_ids, text)
        return self._reserve(hypothesis, opened=True)

    def _begin(self, ready: Sequence[Hypothesis]) -> list[Request]:
        """What comes before the first draft of responses that were read; returns the requests whose prompt alone cannot
        be scored."""
        for hypothesis in ready:
            if hypothesis.request.prefilled is None:
                hypothesis.request.prefilled = time.monotonic()
        requests = list({hypothesis.request.request_id: hypothesis.request for hypothesis in ready
                         if hypothesis.session is not None and hypothesis.request.prompt_reward is None}.values())
        self._round.prompt_rewards(requests)
        return self._ended(requests)

    def _ended(self, requests: Sequence[Request]) -> list[Request]:
        """Those of `requests` that have ended, what they held given back."""
        ended = [request for request in requests if request.finished]
        if ended:
            self.release(ended)
        return ended

    # -- ends -----------------------------------------------------------------------------------------------------

    def fail(self, request: Request, error: Exception) -> Request:
        """Ends every unfinished response of `request` with an error, and gives back what it held."""
        self._round.fail(request, sentence(error))
        self.release([request])
        log(f"request {request.request_id} ends with an error: {sentence(error)}", error)
        return request

    def release(self, requests: Iterable[Request]) -> None:
        """Gives back what finished responses of `requests` held; units that are finished leave, and whole responses
        that are wanted now come, in front of all that wait."""
        wanted: list[Unit] = []
        for request in requests:
            if request.in_turn:
                wanted += self._units(request)
            if request.finished:
                self._fairness.leave(request)
                if self._fairness.alone:
                    self._seating.settle()
            for group in request.groups:
                for hypothesis in group.hypotheses:
                    if hypothesis.finish_reason is not None and hypothesis.table is not None:
                        self._round.close(hypothesis)
                        self._gave_way = None
        self.running = [unit for unit in self.running if unit.unfinished]
        self.waiting.sweep()
        self.waiting.push(wanted)

    def reset(self, requests: Iterable[Request]) -> None:
        """Begins anew over emptied caches: all that is unfinished of `requests` waits, in their order."""
        requests = list(requests)
        self.running, self.waiting = [], Lines()
        self._together = -math.inf
        self._fairness.reset(requests)
        self._budgeted = [request for request in requests if request.budget != NO_BUDGET]
        for request in requests:
            for group in request.groups:
                group.queued = 0
            self.waiting.extend(unit for unit in self._units(request) if unit.unfinished)
        self._gave_way = None
