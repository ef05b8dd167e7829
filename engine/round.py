"""One round: propose, score, decide, commit. The loop of every policy, for all active hypotheses at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from stars.cache import CommitMove, PagedCache
from stars.config import EngineConfig
from stars.draft import Drafter, LaneSpec
from stars.errors import IntegrityError, RewardError, describe, log
from stars.kernels.philox import KIND_GROUP, KIND_RULE, accept_uniform, pack_stream, rule_uniforms
from stars.outputs import Segment
from stars.passes import Passes
from stars.policies import rule_name
from stars.request import Group, Hypothesis, Lane, Request
from stars.reward.base import Candidate, ContextFull, Reward, Scored, Trailing, TrailingCandidate, reward_problem
from stars.rules import EARLIER, EXHAUST, Decision, Judged, Keep, State, best, decides, problem
from stars.stops import cut_at_stop
from stars.width import WidthChooser

NAN_LOGITS = "the language model's logits are NaN or infinite: check its weights, or load it with dtype=\"float32\""


@dataclass(eq=False)
class Winner:
    """What becomes history of one hypothesis: drafted tokens of a lane, all of them unless a rule cut them, and what a
    rule put after them."""

    hypothesis: Hypothesis
    lane: Lane
    token_ids: list[int]
    drafted: int  # how many of them the lane drew
    finish_reason: str | None
    stop_reason: int | str | None
    reward: float | None = None  # of the response with it, where that is known
    rows: int = 0  # of keys that were committed from the lane's slab

    @property
    def as_drawn(self) -> bool:
        """Whether it is a lane as it was drawn."""
        return len(self.token_ids) == self.drafted == len(self.lane.token_ids)

    @classmethod
    def of(cls, lane: Lane) -> Winner:
        """All of a lane."""
        return cls(lane.hypothesis, lane, lane.token_ids, len(lane.token_ids), lane.finish_reason, lane.stop_reason,
                   lane.reward)


class Round:
    """Advances groups by one round each.

    Every lane belongs to one hypothesis. At the end of a round a lane's slabs have been committed, returned, or are
    kept by `hypothesis.best`, the best seen of a segment that goes on.
    """

    def __init__(self, drafter: Drafter, cache: PagedCache, passes: Passes, reward: Reward | None,
                 chooser: WidthChooser, config: EngineConfig):
        self.drafter = drafter
        self.cache = cache
        self.passes = passes
        self.reward = reward
        self.chooser = chooser
        self.max_num_lanes = config.max_num_lanes
        self._trails = config.target.trailing
        self._trailing: tuple[list[Lane], Trailing] | None = None  # what is scored after the draft, until it is read

    @property
    def _scorer(self) -> Reward:
        """The reward: whoever needs one was refused where there is none."""
        assert self.reward is not None
        return self.reward

    def run(self, groups: Sequence[Group]) -> list[Group]:
        """One round for all of `groups`; returns those whose segment was decided or that ended.

        Whatever stops it in the middle leaves hypotheses and caches half changed: the caller goes back to a boundary.
        """
        drawn: dict[Hypothesis, list[Lane]] = {}
        self._propose([hypothesis for group in groups for hypothesis in group.active], drawn)
        self._draft(drawn)
        decisions = self._decide(groups, drawn)
        self._commit(groups, decisions, drawn)
        for hypothesis, lanes in drawn.items():
            if hypothesis.attempts:  # the segment goes on
                self._keep_best(hypothesis, lanes)
            else:
                for lane in lanes:
                    self._release(lane)
        return [group for group in groups if group.finished or not group.undecided]

    def reset(self) -> None:
        """After a round that was stopped in the middle, whose caches were emptied."""
        self._trailing = None

    def fail(self, request: Request, message: str) -> None:
        """Ends every unfinished response of `request` with an error."""
        for hypothesis in request.hypotheses:
            if hypothesis.finish_reason is None:
                self.finish(hypothesis, "error", error=message)

    def finish(self, hypothesis: Hypothesis, reason: str, stop_reason: int | str | None = None,
               error: str | None = None) -> None:
        """Ends a response; its pages and its reward session are for the scheduler to close once the round is over."""
        hypothesis.finish_reason, hypothesis.stop_reason, hypothesis.error = reason, stop_reason, error
        self.forget_attempts(hypothesis)

    def drop_best(self, hypothesis: Hypothesis) -> None:
        """Gives back what the best seen of an undecided segment holds."""
        if hypothesis.best is not None:
            self._release(hypothesis.best)
            hypothesis.best = None

    def close(self, hypothesis: Hypothesis) -> None:
        """Gives back the pages and the session of a response."""
        table, session = hypothesis.table, hypothesis.session
        if table is not None:
            self.cache.close(table)
            hypothesis.table = None
        if session is not None:
            hypothesis.session = None
            try:
                self._scorer.close(session)
            except IntegrityError:
                raise
            except Exception as error:  # the response has ended, and nobody else has to do with it
                log(f"the reward could not close a response: {describe(error)}", error)

    def prompt_rewards(self, requests: Sequence[Request]) -> None:
        """Scores the empty response of requests whose plan asks for that."""
        asked = [request for request in requests if request.plan.score.prompt and request.prompt_reward is None]
        if not asked:
            return
        holders = [next(h for h in request.hypotheses if h.session is not None) for request in asked]
        for request, result in zip(asked, self._score(
                [(holder, Candidate(holder.session, [], "")) for holder in holders]), strict=True):
            if result.handle is not None:
                self._scorer.discard(result.handle)
            fault = reward_problem(result.reward)
            if fault is None and result.reward == float("-inf"):
                fault = "the reward of the prompt alone is -inf: it must be finite, or set alpha=1"
            if fault is not None:
                self.fail(request, fault)
            else:
                request.prompt_reward = _number(result.reward)

    # -- propose --------------------------------------------------------------------------------------------------

    def _propose(self, active: Sequence[Hypothesis], drawn: dict[Hypothesis, list[Lane]]) -> None:
        """Adds the lanes of each hypothesis to `drawn` as their slabs are taken."""
        for hypothesis, width in zip(active, self._widths(active), strict=True):
            lanes = drawn[hypothesis] = []
            for attempt in range(len(hypothesis.attempts) + 1, len(hypothesis.attempts) + width + 1):
                lanes.append(Lane(hypothesis, attempt, self.cache.take_slab()))
            hypothesis.metrics.width = max(hypothesis.metrics.width, width)

    def _widths(self, active: Sequence[Hypothesis]) -> list[int]:
        share = max(1, self.max_num_lanes // len(active)) if active else 1
        widths = []
        for hypothesis in active:
            width = hypothesis.request.plan.lanes.width
            most = min(share, _attempts_left(hypothesis))
            if width is not None:
                widths.append(min(width, most))
            elif most == 1:
                widths.append(1)
            else:
                seen = [h.metrics for h in hypothesis.request.hypotheses]
                widths.append(self.chooser.choose(sum(m.accepted for m in seen), sum(m.attempts_counted for m in seen),
                                                  len(active), most))
        return widths

    def _draft(self, drawn: dict[Hypothesis, list[Lane]]) -> None:
        lanes = [lane for own in drawn.values() for lane in own]
        if not lanes:
            return
        specs = []
        for hypothesis, own in drawn.items():
            request = hypothesis.request
            table, last, most, stream = (hypothesis.pages, hypothesis.last_token, hypothesis.next_segment,
                                         _stream(hypothesis))
            history = hypothesis.history() if request.params.penalties else None
            specs += [LaneSpec(table, last, _slab(lane), most, request.seed, lane.attempt, stream, request.params,
                               request.stop_ids, history) for lane in own]
        begin = time.perf_counter()
        self.drafter.launch(specs)
        if self._trails:  # the device drafts while the host prepares what follows
            self._score_trailing(lanes)
        drafted = self.drafter.drafted(len(lanes))
        seconds = (time.perf_counter() - begin) / len(lanes)
        for lane, (token_ids, logprobs) in zip(lanes, drafted, strict=True):
            lane.token_ids, lane.logprobs = token_ids, logprobs
            hypothesis = lane.hypothesis
            metrics = hypothesis.metrics
            metrics.lm_seconds += seconds
            # A whole response is one attempt, in however many pieces it is drafted.
            metrics.attempts += not hypothesis.request.plan.whole or not hypothesis.drafts
            metrics.lm_tokens_drawn += len(token_ids)
            if token_ids[-1] < 0:
                self.fail(hypothesis.request, NAN_LOGITS)
            else:
                count, lane.finish_reason, lane.stop_reason = _ending(hypothesis, token_ids)
                lane.token_ids, lane.logprobs = token_ids[:count], logprobs[:count]

    def _score_trailing(self, lanes: Sequence[Lane]) -> None:
        """Starts the first scoring pass after the draft: the device hands the tokens on, the host reads them later."""
        scored: dict[Hypothesis, list[tuple[int, Lane]]] = {}  # with their places in the draft
        for place, lane in enumerate(lanes):
            request = lane.hypothesis.request
            if request.plan.score.when == "segment" and not request.stop:  # stop strings are found by the host
                scored.setdefault(lane.hypothesis, []).append((place, lane))
        batch, candidates = [], []
        for hypothesis, own in scored.items():
            room = hypothesis.next_segment
            for place, lane in own[: max(1, self._scorer.lanes_per_pass(room, len(scored)))]:
                batch.append(lane)
                candidates.append(TrailingCandidate(hypothesis.session, hypothesis.token_ids, place, room))
        trailing = self._scorer.score_trailing(self.drafter.device_draft, candidates) if candidates else None
        if trailing is not None:
            self._trailing = batch, trailing

    # -- score and decide -----------------------------------------------------------------------------------------

    def _decide(self, groups: Sequence[Group], drawn: dict[Hypothesis, list[Lane]]) -> dict[Group, Decision]:
        """What becomes of each group whose segment is decided. Groups of whole responses are asked later."""
        decisions: dict[Group, Decision] = {}
        unscored: dict[Hypothesis, list[Lane]] = {}
        waiting: list[Group] = []
        for group in groups:
            if group.request.plan.whole:
                continue
            for hypothesis in group.active:
                hypothesis.attempts += drawn[hypothesis]
                if group.request.plan.score.when == "segment":
                    unscored[hypothesis] = list(drawn[hypothesis])
                else:
                    for lane in drawn[hypothesis]:
                        self._may_judge(lane)
            if group.finished:
                continue
            if group.request.plan.score.when == "segment":
                waiting.append(group)
            else:
                self._ask(group, decisions)
        # Rewards come in attempt order, a few lanes at a time: what follows an accepted lane need not be scored.
        batch, results = self._trailing_results()
        while waiting:
            if not batch:
                owners = [h for group in waiting for h in group.active if unscored[h]]
                for hypothesis in owners:
                    lanes = unscored[hypothesis]
                    batch += lanes[: max(1, self._scorer.lanes_per_pass(len(lanes[0].token_ids), len(owners)))]
                results = self._score([(lane.hypothesis, self._candidate(lane.hypothesis, lane)) for lane in batch])
                for lane, result in zip(batch, results, strict=True):
                    lane.score_handle = result.handle
            found: dict[Group, list[tuple[Lane, Scored]]] = {}
            for lane, result in zip(batch, results, strict=True):
                found.setdefault(lane.hypothesis.group, []).append((lane, result))
                del unscored[lane.hypothesis][0]
            for group in waiting:
                self._take(group, found.get(group, []), unscored, decisions)
            waiting = [group for group in waiting if group not in decisions and not group.finished
                       and any(unscored[h] for h in group.active)]
            batch = []
        for group in groups:
            if group in decisions or group.finished or group.request.plan.whole:
                continue
            if not any(_attempts_left(h) for h in group.active):
                judged = _judged(group)
                decisions[group] = EXHAUST[group.request.plan.exhaust](judged, self._state(group, judged))
            else:
                group.round += 1
        return decisions

    def _take(self, group: Group, found: Sequence[tuple[Lane, Scored]], unscored: dict[Hypothesis, list[Lane]],
              decisions: dict[Group, Decision]) -> None:
        """Takes the scores of a pass, each hypothesis' in attempt order, and asks the rule.

        What comes after the decision was scored for nothing: a fault there must not depend on the width.
        """
        if group.finished:  # with another group of its request
            return
        in_order = group.request.plan.decide.in_order
        faults: dict[Hypothesis, tuple[str, bool]] = {}  # and whether the model's context is full
        fresh = False
        for lane, result in found:
            fault = reward_problem(result.reward)
            if fault is not None:
                faults.setdefault(lane.hypothesis, (fault, isinstance(result.reward, ContextFull)))
                continue
            lane.reward = _number(result.reward)
            if lane.hypothesis not in faults:
                self._may_judge(lane)
                fresh = True
        if in_order and fresh and self._ask(group, decisions):
            return
        for hypothesis, (fault, full) in faults.items():
            if full and hypothesis.token_ids:
                self.finish(hypothesis, "length")
            else:
                self.fail(group.request, fault)
                return
        all_scored = not any(unscored[hypothesis] for hypothesis in group.active)
        if not group.finished and (faults if in_order else all_scored):
            self._ask(group, decisions)

    def _may_judge(self, lane: Lane) -> None:
        """From now on the rule is shown this lane."""
        hypothesis = lane.hypothesis
        request = hypothesis.request
        lane.judged = Judged(
            hypothesis.slot, lane.attempt, len(hypothesis.token_ids) + len(lane.token_ids),
            lane.finish_reason is not None, lane.logprobs if _proposes_the_model(request) else (), lane.logprobs, (),
            lane.reward, hypothesis.reward if hypothesis.segments else request.prompt_reward,
            _uniforms(hypothesis, lane.attempt))

    def _ask(self, group: Group, decisions: dict[Group, Decision]) -> bool:
        """Asks the rule of a group; whether that settled what becomes of it, by a decision or by a rule at fault."""
        decision = self._answer(group, _judged(group))
        if decision is None:
            return group.finished
        for hypothesis in group.hypotheses:
            for lane in hypothesis.attempts:
                lane.note = decision.notes.get((hypothesis.slot, lane.attempt), lane.note)
        if not decides(decision):
            return False
        decisions[group] = decision
        return True

    def _answer(self, group: Group, judged: Sequence[Judged]) -> Decision | None:
        """What the rule says, its memory kept; a rule at fault ends its request and no other."""
        request = group.request
        plan = request.plan
        state = self._state(group, judged)
        try:
            decision = plan.decide(judged, state)
            fault = problem(decision, judged, state, plan.lanes.population,
                            self.drafter.decoder.config.vocab_size, request.stop_ids, plan.whole)
        except Exception as error:
            decision, fault = None, f"raised {describe(error)}"
            log(f"the rule {rule_name(plan.decide)} {fault}", error)
        if fault is not None:
            message = f"the rule {rule_name(plan.decide)} {fault}: mend the rule"
            if plan.whole:  # whose responses have ended, and of which none is the completion yet
                for hypothesis in group.hypotheses:
                    self.finish(hypothesis, "error", error=message)
            self.fail(request, message)
            return None
        if decision is not None:
            group.memory = decision.memory
        return decision

    def _state(self, group: Group, judged: Sequence[Judged]) -> State:
        plan, request = group.request.plan, group.request
        segment = max(len(hypothesis.segments) for hypothesis in group.hypotheses)
        attempts = sum(len(hypothesis.attempts) for hypothesis in group.hypotheses)
        unscored = 0 if plan.whole else attempts - sum(one.attempt != EARLIER for one in judged)
        left = 0 if plan.whole else sum(map(_attempts_left, group.active))
        uniforms = rule_uniforms(request.seed, KIND_GROUP, group.round + 1, segment,
                                 group.index * plan.lanes.population, getattr(plan.decide, "group_uniforms", 0))
        return State(segment, group.round, unscored, left, request.max_tokens, request.prompt_reward, 0,
                     [hypothesis.slot for hypothesis in group.hypotheses], uniforms, group.memory)

    def _candidate(self, hypothesis: Hypothesis, extra: Lane | Winner, final: bool = False) -> Candidate:
        text = hypothesis.request.response_text(hypothesis, extra) if self._scorer.needs_text else None
        return Candidate(hypothesis.session, hypothesis.content_ids(extra), text, final)

    def _score(self, candidates: Sequence[tuple[Hypothesis, Candidate]]) -> list[Scored]:
        """Scores and keeps the counts and the time of each candidate's hypothesis."""
        begin = time.perf_counter()
        results = self._scorer.score([candidate for _, candidate in candidates])
        _count([hypothesis for hypothesis, _ in candidates], results, time.perf_counter() - begin)
        return results

    def _trailing_results(self) -> tuple[list[Lane], list[Scored]]:
        """The lanes that were scored without the host, with their scores."""
        if self._trailing is None:
            return [], []
        begin = time.perf_counter()
        batch, trailing = self._trailing
        results = trailing.results([lane.hypothesis.content_ids(lane) for lane in batch])
        self._trailing = None
        for lane, result in zip(batch, results, strict=True):
            lane.score_handle = result.handle
        _count([lane.hypothesis for lane in batch], results, time.perf_counter() - begin)
        return batch, results

    # -- commit ---------------------------------------------------------------------------------------------------

    def _commit(self, groups: Sequence[Group], decisions: dict[Group, Decision],
                drawn: dict[Hypothesis, list[Lane]]) -> None:
        winners: list[Winner] = []
        twins: list[tuple[Winner, int]] = []  # kept a second time, for this slot: a fork of what was committed
        for group in groups:
            if group.request.plan.whole:
                winners += [Winner.of(lane) for hypothesis in group.active for lane in drawn[hypothesis]]
            elif group in decisions and not group.finished:
                self._arrange(group, decisions[group], winners, twins)
        faults = self._score_ended(winners)
        going_on = [winner for winner in winners if winner.finish_reason is None]
        self._commit_rows(going_on)
        self._commit_scored(going_on)
        for winner in winners:
            _append(winner)
        for winner in winners:
            self.forget_attempts(winner.hypothesis)
            self._release(winner.lane)  # of an earlier round too, which the end of this round does not reach
        for request, fault in faults:
            self.fail(request, fault)
        for winner in winners:
            if winner.finish_reason is not None and winner.hypothesis.finish_reason is None:
                self.finish(winner.hypothesis, winner.finish_reason, winner.stop_reason)
        for winner, slot in twins:
            self._fork(winner.hypothesis, slot)
        for group in groups:
            if group.finished:
                self._conclude(group)

    def _arrange(self, group: Group, decision: Decision, winners: list[Winner],
                 twins: list[tuple[Winner, int]]) -> None:
        """Drops and forks as the decision says, and appends what is to be committed of each hypothesis.

        A fork has the history of its parent before this round, or, where both keep the same, after its commit.
        """
        members = {hypothesis.slot: hypothesis for hypothesis in group.hypotheses}
        for slot in decision.drop:
            self._drop(members[slot])  # first: forks may need its pages
        slots = iter(group.free_slots)
        seen: dict[int, list[tuple[Keep, Winner]]] = {}
        for keep in decision.keep:
            parent = members[keep.hypothesis]
            first, kept = keep.hypothesis not in seen, seen.setdefault(keep.hypothesis, [])
            if keep.attempt == EARLIER:
                if not first:
                    self._fork(parent, next(slots))
                continue
            twin = next((winner for other, winner in kept if _same(other, keep)), None)
            if twin is not None:
                twins.append((twin, next(slots)))
                continue
            hypothesis = parent if first else self._fork(parent, next(slots))
            winner = self._winner(hypothesis, parent.attempts[keep.attempt - 1], keep)
            winners.append(winner)
            kept.append((keep, winner))

    def _winner(self, hypothesis: Hypothesis, lane: Lane, keep: Keep) -> Winner:
        """What is committed for `hypothesis`, the lane's own or a fork of that."""
        if not keep.then and keep.tokens == len(lane.token_ids):
            winner = Winner.of(lane)
            winner.hypothesis = hypothesis
            return winner
        token_ids = lane.token_ids[: keep.tokens] + list(keep.then)
        count, finish_reason, stop_reason = _ending(hypothesis, token_ids)
        return Winner(hypothesis, lane, token_ids[:count], min(keep.tokens, count), finish_reason, stop_reason)

    def _commit_rows(self, winners: Sequence[Winner]) -> None:
        """The language model's pages hold all but the last token of each response afterwards."""
        for winner in winners:  # a fork has no room yet, and a rule's own tokens come on top of a segment
            self.cache.reserve(winner.hypothesis.pages, len(winner.token_ids))
        # The slab holds the token before the segment and all of the segment but its last token.
        moves, lacking = [], []
        for winner in winners:
            table, lane = winner.hypothesis.pages, winner.lane
            rows = 0 if lane.slab is None else min(len(winner.token_ids), winner.drafted + 1, len(lane.token_ids))
            winner.rows = rows
            if rows:
                moves.append(CommitMove(table, _slab(lane) * self.cache.slab_len, rows, table.length))
            if rows < len(winner.token_ids):
                lacking.append(winner)
        self.cache.commit(moves)
        if lacking:
            self.passes.prefill([(winner.hypothesis.pages, token_ids, len(token_ids) - 1) for winner in lacking
                                 for token_ids in [winner.hypothesis.request.prompt.token_ids
                                                   + winner.hypothesis.token_ids + winner.token_ids]])

    def _commit_scored(self, winners: Sequence[Winner]) -> None:
        """The reward's sessions hold what the responses hold afterwards."""
        scored = [winner for winner in winners if winner.hypothesis.request.plan.score.when == "segment"]
        drawn = [winner for winner in scored if winner.as_drawn and winner.lane.score_handle is not None]
        if drawn:
            self._scorer.commit([(winner.hypothesis.session, winner.lane.score_handle) for winner in drawn])
            for winner in drawn:
                winner.lane.score_handle = None
        for winner in scored:
            if not winner.as_drawn and winner.lane.score_handle is not None:  # a session may need its room
                self._scorer.discard(winner.lane.score_handle)
                winner.lane.score_handle = None
        for winner in scored:
            if not winner.as_drawn or winner.lane.slab is None:
                candidate = self._candidate(winner.hypothesis, winner)
                self._scorer.resume(candidate.session, candidate.token_ids, candidate.text)

    def _score_ended(self, winners: Sequence[Winner]) -> list[tuple[Request, str]]:
        """Gives the lanes that end a response the one reward it gets; returns the problems there were.

        Where segments are scored, what a rule cut or continued has no reward yet either.
        """
        ended = [winner for winner in winners if winner.finish_reason is not None and (
            winner.hypothesis.request.plan.score.when == "end"
            or winner.hypothesis.request.plan.score.when == "segment" and not winner.as_drawn)]
        if not ended:
            return []
        results = self._score([(winner.hypothesis, self._candidate(winner.hypothesis, winner, final=True))
                               for winner in ended])
        faults = []
        for winner, result in zip(ended, results, strict=True):
            if result.handle is not None:
                self._scorer.discard(result.handle)
            fault = reward_problem(result.reward)
            if fault is not None:
                faults.append((winner.hypothesis.request, fault))
                continue
            winner.reward = _number(result.reward)
            if winner.as_drawn:
                winner.lane.reward = winner.reward
        return faults

    def _fork(self, hypothesis: Hypothesis, slot: int) -> Hypothesis:
        """A second hypothesis with the history that this one has now."""
        fork = hypothesis.fork(slot)
        if hypothesis.finish_reason is None:
            fork.table = self.cache.fork(hypothesis.pages)
            if hypothesis.session is not None:
                fork.session = self._scorer.fork(hypothesis.session)
        fork.mark_boundary()
        group = hypothesis.group
        group.hypotheses = sorted([*group.hypotheses, fork], key=lambda one: one.slot)
        return fork

    def _drop(self, hypothesis: Hypothesis) -> None:
        """A hypothesis that is not kept: what was drawn for it counts, nothing else of it stays."""
        group = hypothesis.group
        self.forget_attempts(hypothesis)
        self.close(hypothesis)
        group.hypotheses = [other for other in group.hypotheses if other is not hypothesis]
        drawn = hypothesis.metrics.drawn()
        drawn.add(group.dropped)
        group.dropped = drawn

    def _conclude(self, group: Group) -> None:
        """All of a group's responses have ended: one of them is the completion."""
        if group.request.plan.whole and not _failed(group):
            self._decide_whole(group)
        if len(group.hypotheses) > 1 and not _failed(group):
            chosen = best(_judged(group)).hypothesis
            for hypothesis in group.hypotheses:
                if hypothesis.slot != chosen:
                    self._drop(hypothesis)

    def _decide_whole(self, group: Group) -> None:
        """Asks the rule which whole response is kept; each is one attempt at the one segment there is."""
        request, members = group.request, group.hypotheses
        judged = [_whole_judged(hypothesis) for hypothesis in members]
        decision = self._answer(group, judged)
        if _failed(group):
            return
        notes = decision.notes if decision is not None else {}
        if decision is None or not decides(decision):
            decision = EXHAUST[request.plan.exhaust](judged, self._state(group, judged))
        attempts = [hypothesis.whole_record(notes.get((hypothesis.slot, 1))) for hypothesis in members]
        kept = {keep.hypothesis for keep in decision.keep}
        for index, hypothesis in enumerate(members):
            if hypothesis.slot not in kept:
                self._drop(hypothesis)
                continue
            record = attempts[index]
            segment = Segment(list(hypothesis.token_ids), record.reward, record.threshold, record.accepted, attempts,
                              index, hypothesis.cumulative_logprob)
            hypothesis.segments.append(segment)
            hypothesis.metrics.keep(segment, request.plan.decide.in_order)

    def _keep_best(self, hypothesis: Hypothesis, lanes: Sequence[Lane]) -> None:
        """Of a segment that goes on, the best seen keeps its slabs, the earliest of equals; the others give theirs
        back."""
        held = [*([hypothesis.best] if hypothesis.best is not None else []), *lanes]
        hypothesis.best = max(held, key=lambda lane: float("-inf") if lane.reward is None else lane.reward)
        for lane in held:
            if lane is not hypothesis.best:
                self._release(lane)

    def forget_attempts(self, hypothesis: Hypothesis) -> None:
        """Gives back what the attempts of an undecided segment hold."""
        self.drop_best(hypothesis)
        hypothesis.attempts = []

    def _release(self, lane: Lane) -> None:
        if lane.slab is not None:
            self.cache.return_slab(lane.slab)
            lane.slab = None
        if lane.score_handle is not None:
            self._scorer.discard(lane.score_handle)
            lane.score_handle = None


def _slab(lane: Lane) -> int:
    """The slab of a lane that has one."""
    assert lane.slab is not None
    return lane.slab


def _number(reward: float | RewardError) -> float:
    """A reward that has no problem."""
    assert not isinstance(reward, RewardError)
    return reward


def _stream(hypothesis: Hypothesis) -> int:
    """The random stream of the next draft."""
    return pack_stream(hypothesis.drafts, hypothesis.sample)


def _uniforms(hypothesis: Hypothesis, attempt: int) -> tuple[float, ...]:
    """As many random numbers of an attempt as its rule declares; the first is that of the accept test."""
    request = hypothesis.request
    count, segment = request.plan.decide.uniforms, len(hypothesis.segments)
    if not count:
        return ()
    first = accept_uniform(request.seed, attempt, segment, hypothesis.sample)
    return first, *rule_uniforms(request.seed, KIND_RULE, attempt, segment, hypothesis.sample, count - 1)


def _max_attempts(request: Request) -> int:
    """At temperature 0 all attempts are equal: one is drawn."""
    return 1 if request.params.temperature == 0 else request.plan.lanes.attempts


def _attempts_left(hypothesis: Hypothesis) -> int:
    return _max_attempts(hypothesis.request) - len(hypothesis.attempts)


def _count(hypotheses: Sequence[Hypothesis], results: Sequence[Scored], seconds: float) -> None:
    """Adds scores that took `seconds` to the metrics of each candidate's response."""
    for hypothesis, result in zip(hypotheses, results, strict=True):
        hypothesis.metrics.rm_seconds += seconds / len(results)
        hypothesis.metrics.rm_tokens_scored += result.tokens_run
        hypothesis.metrics.rm_tokens_full_rescore += result.tokens_full


def _failed(group: Group) -> bool:
    """Whether its completion has ended without a result."""
    return any(hypothesis.finish_reason in ("error", "abort") for hypothesis in group.hypotheses)


def _same(one: Keep, other: Keep) -> bool:
    """Whether two hypotheses that are kept so have the same history."""
    return (one.attempt, one.tokens, list(one.then)) == (other.attempt, other.tokens, list(other.then))


def _judged(group: Group) -> list[Judged]:
    """What a rule is shown: of each hypothesis its attempts so far, in order, as far as they are scored."""
    judged = []
    for hypothesis in group.hypotheses:
        if hypothesis.finish_reason is not None:
            judged.append(Judged(hypothesis.slot, EARLIER, len(hypothesis.token_ids), True, (), (), (),
                                 hypothesis.reward, hypothesis.reward, ()))
        judged += [lane.judged for lane in hypothesis.attempts if lane.judged is not None]
    return judged


def _whole_judged(hypothesis: Hypothesis) -> Judged:
    """A whole response, as its rule is shown it."""
    logprobs, request = hypothesis.logprobs, hypothesis.request
    return Judged(hypothesis.slot, 1, len(hypothesis.token_ids), True, logprobs if _proposes_the_model(request) else (),
                  logprobs, (), hypothesis.reward, request.prompt_reward, _uniforms(hypothesis, 1))


def _proposes_the_model(request: Request) -> bool:
    """Whether the proposal is the language model's own distribution, so that their log-probabilities are the same."""
    return request.params.temperature == 1.0 and not request.params.filters


def _ending(hypothesis: Hypothesis, token_ids: list[int]) -> tuple[int, str | None, int | str | None]:
    """If `token_ids` were committed: how many of them, up to a stop string; whether they end the response, and why."""
    request = hypothesis.request
    last = token_ids[-1]
    if request.stop:
        # The token that ends the response is no part of its text, so it cannot complete a stop string either.
        content = token_ids[:-1] if last in request.stop_ids else token_ids
        cut = cut_at_stop(request.detokenizer, hypothesis.token_ids, content, request.stop)
        if cut is not None:
            count, stop = cut
            return count, "stop", stop
    if last in request.stop_ids:
        own = last in request.eos_token_ids
        return len(token_ids), "stop", None if own else request.stop_tokens.get(last, last)
    ends = len(hypothesis.token_ids) + len(token_ids) >= request.max_tokens
    return len(token_ids), "length" if ends else None, None


def _append(winner: Winner) -> None:
    """Makes a winner the newest segment of its response, or the newest piece of a whole one."""
    hypothesis, lane = winner.hypothesis, winner.lane
    plan = hypothesis.request.plan
    logprobs = lane.logprobs[: winner.drafted]
    hypothesis.drafts += 1
    first = len(hypothesis.token_ids)
    total = len(winner.token_ids)
    hypothesis.ends += [first + stop for stop in (*range(winner.rows, total, plan.segment.draft), total) if stop]
    hypothesis.token_ids += winner.token_ids
    hypothesis.cumulative_logprob += sum(logprobs)
    hypothesis.reward = winner.reward
    if plan.whole:
        hypothesis.logprobs += logprobs
        return
    record = lane.attempt_record()
    segment = Segment(winner.token_ids, record.reward, record.threshold, record.accepted,
                      [attempt.attempt_record() for attempt in lane.hypothesis.attempts], lane.attempt - 1,
                      sum(logprobs))
    hypothesis.segments.append(segment)
    hypothesis.metrics.keep(segment, plan.decide.in_order)
