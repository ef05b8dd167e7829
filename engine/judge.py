"""Judging: the rule of each group is asked what becomes of it, in attempt order, as scores come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from stars.decision_check import problem
from stars.errors import describe, log
from stars.exhaustions import BackUp, Redraft, Refuse, Relax
from stars.kernels.philox import KIND_GROUP, KIND_RULE, MAX_ATTEMPT, accept_uniform, exhaust_uniform, rule_uniforms
from stars.plan import rule_name
from stars.request import Group, Hypothesis, Lane, Request, Wait, Winner
from stars.reward.base import ContextFull, Scored, settled
from stars.rules import EARLIER, OWN_RULES, Decision, Judged, State, best, decides, whole
from stars.scores import Scores, late, usable
from stars.waiting import Waiting

Answers = Callable[[Sequence[Judged], State], Decision | None]
One = TypeVar("One", Judged, Lane)


class Judge:
    """Decides groups: its results are decisions, and responses that end for want of a reward or by a rule's fault."""

    def __init__(self, scores: Scores, vocab_size: int, waiting: Waiting):
        self._scores = scores
        self._waiting = waiting
        self._vocab_size = vocab_size

    def decide(self, groups: Sequence[Group], drawn: dict[Hypothesis, list[Lane]],
               answered: Sequence[Wait] = ()) -> tuple[dict[Group, Decision], list[Hypothesis]]:
        """What becomes of each group whose segment is decided, and the hypotheses whose newest segment is taken back
        instead. Groups of whole responses are asked later.

        answered: of groups whose lanes were drawn before; `drawn` has them, too. Groups may wait afterwards.
        """
        backed_up: list[Hypothesis] = []
        groups = [group for group in groups if not group.request.whole]
        resumed = {wait.group: wait.scores for wait in answered}
        decisions: dict[Group, Decision] = {}
        unscored: dict[Hypothesis, list[Lane]] = {}
        waiting: list[Group] = []
        for group in groups:
            if group in resumed:
                continue
            members, scored = unfinished(group), group.waits_for_scores
            for hypothesis in members:
                lanes = drawn[hypothesis]
                hypothesis.attempts += lanes
                if scored and lanes:
                    unscored[hypothesis] = list(lanes)
                elif not scored:
                    for lane in lanes:
                        may_judge(lane)
            if scored and members:
                waiting.append(group)
            elif members:
                self._ask(group, decisions)
        # Rewards come in attempt order, a few lanes at a time: what follows an accepted lane need not be scored.
        found = self._scores.trailing_pass(unscored)
        for group, answers in resumed.items():
            found += answers
            waiting.append(group)
            for hypothesis in unfinished(group):
                unscored[hypothesis] = [lane for lane in hypothesis.attempts if lane.judged is None]
        while unscored:
            of_group: dict[Group, list[tuple[Lane, Scored]]] = {group: [] for group in waiting}
            for lane, result in found or self._scores.next_pass(unscored):
                hypothesis = lane.hypothesis
                if hypothesis in unscored:  # else it was scored while it drew tokens of no logits
                    del unscored[hypothesis][0]
                    of_group[hypothesis.group].append((lane, result))
            for group, scores in of_group.items():
                if any([type(result.reward) is not float and late(result) for _, result in scores]):
                    members = group.hypotheses
                    self._waiting.hold(Wait(group, members, {one: drawn.get(one, []) for one in members}, scores, []))
                else:
                    self._take(group, scores, unscored, decisions)
            unscored = {hypothesis: lanes for hypothesis, lanes in unscored.items() if lanes
                        and hypothesis.finish_reason is None and hypothesis.wait is None
                        and hypothesis.group not in decisions}
            waiting = list(dict.fromkeys([hypothesis.group for hypothesis in unscored]))
            found = []
        self._scores.drop_ahead()
        for group in groups:
            members = unfinished(group)
            if group in decisions or not members or self._waiting.waits and group.waits:
                continue
            if not any([hypothesis.attempts_left for hypothesis in members]):
                self._exhaust(group, decisions, backed_up)
            else:
                group.round += 1
        return decisions, backed_up

    def take_ended(self, scores: Sequence[tuple[Winner, Scored]]) -> list[tuple[Hypothesis, str]]:
        """Gives what ends a response its reward, which is there; returns the responses that got none, and why."""
        faults = []
        for winner, result in scores:
            if isinstance(reward := usable(result.reward), str):
                faults.append((winner.hypothesis, reward))
                continue
            winner.reward, winner.hypothesis.per_token = reward, result.per_token
            if winner.as_drawn and winner.lane.reward is None:  # else it has what a head says of it
                winner.lane.reward = reward
        return faults

    def decide_whole(self, group: Group) -> Decision | None:
        """Which of the whole responses of a group are kept: each is one attempt at the one segment there is. None where
        nothing is decided yet, by a rule that reads in order, and where the rule or a reward is at fault."""
        judged, state = _shown_anew(group)
        decision = self._answer(group, judged, state, group.request.plan.decide) if judged else None
        if group.failed:
            return None
        if self._settles_whole(group, decision):
            return decision
        ended = group.judgeable
        if len(ended) == len(group.hypotheses):
            return self._exhaust_whole(group)
        stopped = group.hypotheses[len(ended)]
        if stopped.finish_reason is not None:  # without a reward, and it is its turn
            stopped.finish("error", error=stopped.error)
            group.fail(str(stopped.error))
        return None

    def _settles_whole(self, group: Group, decision: Decision | None) -> bool:
        """Keeps the notes of a decision on whole responses; whether it keeps or drops some."""
        if decision is None:
            return False
        for hypothesis in group.hypotheses:
            hypothesis.note = decision.notes.get((hypothesis.slot, 1), hypothesis.note)
        return decides(decision)

    def _exhaust_whole(self, group: Group) -> Decision | None:
        """What the plan keeps of whole responses of which the rule keeps none; None where it refuses all of them, or
        the rule is at fault."""
        request = group.request
        for group.relaxed in range(1, 1 + _relaxations(request)):
            decision = self._answer(group, *shown(group), request.plan.decide)
            if group.failed or self._settles_whole(group, decision):
                return decision
        if isinstance(request.exhaust[-1], Refuse):
            for hypothesis in group.hypotheses:
                hypothesis.refuse()
            return None
        pick, members = request.pick, {hypothesis.slot: hypothesis for hypothesis in group.hypotheses}
        chosen = max(shown(group)[0], key=lambda one: pick.key(  # each is one attempt, in the order of the slots
            one.hypothesis + 1, one.reward, _exhaust_uniform(members[one.hypothesis], 1) if pick.draws else 0.5))
        return Decision([whole(chosen)], [slot for slot in members if slot != chosen.hypothesis])

    def choose(self, group: Group) -> Hypothesis | None:
        """Which of several responses, all of which have ended, is the completion: the best, or what the rule says. None
        where the rule is at fault."""
        if all([hypothesis.finish_reason == "refused" for hypothesis in group.hypotheses]):
            return group.hypotheses[0]
        judged, state = shown(group)
        final = getattr(group.request.plan.decide, "final", None)
        if final is not None:
            uniforms = _group_uniforms(group, MAX_ATTEMPT, state.segment)  # a round that no segment reaches
            decision = self._answer(group, judged, state._replace(round=0, uniforms=uniforms), final)
            if group.failed:
                return None
            if decision is not None and decides(decision):
                kept = {keep.hypothesis for keep in decision.keep}
                judged = [one for one in judged if one.hypothesis in kept]
        chosen = best(judged).hypothesis
        return next(hypothesis for hypothesis in group.hypotheses if hypothesis.slot == chosen)

    def _exhaust(self, group: Group, decisions: dict[Group, Decision], backed_up: list[Hypothesis]) -> None:
        """Does what the plan says where every attempt was drawn and the rule has decided nothing: one step after the
        other, up to one that settles it, or that draws more."""
        if group.redraft is not None:  # of what was redrawn something is kept, whatever its rule says
            self._keep_preferred(group, decisions)
            return
        for step in group.request.exhaust:
            if isinstance(step, Relax):
                for group.relaxed in range(1, step.times + 1):
                    if self._ask(group, decisions):
                        return
            elif isinstance(step, BackUp):
                [hypothesis] = group.hypotheses
                if hypothesis.segments and hypothesis.backups < step.times:
                    backed_up.append(hypothesis)
                    return
            elif isinstance(step, Refuse):
                for hypothesis in unfinished(group):
                    hypothesis.refuse()
            elif isinstance(step, Redraft):
                group.begin_stage(group.request.redraft)
                group.relaxed, group.round = 0, group.round + 1
            else:
                self._keep_preferred(group, decisions)

    def _keep_preferred(self, group: Group, decisions: dict[Group, Decision]) -> None:
        """Keeps of each hypothesis the attempt that the plan's exhaustion prefers."""
        decisions[group] = Decision([
            whole(one) for hypothesis, ones in _by_hypothesis(group) for one in [preferred(hypothesis, ones)]])

    def _take(self, group: Group, scores: Sequence[tuple[Lane, Scored]], unscored: dict[Hypothesis, list[Lane]],
              decisions: dict[Group, Decision]) -> None:
        """Takes the scores of a pass, each hypothesis' in attempt order, and asks the rule.

        What comes after the decision was scored for nothing: a fault there must not depend on the width.
        """
        if not unfinished(group):  # with another group of its request
            return
        in_order = group.rule.in_order
        # Whether the model's context is full, and whether no token could be drawn.
        faults: dict[Hypothesis, tuple[str, bool, bool]] = {}
        fresh = False
        for lane, result in scores:
            # What a reader alone says is on the lane already.
            reward = lane.fault or (usable(result.reward) if group.scores_segments else lane.reward)
            if isinstance(reward, str):
                faults.setdefault(lane.hypothesis, (
                    reward, isinstance(settled(result.reward), ContextFull), lane.fault is not None))
                continue
            lane.reward = reward
            if lane.hypothesis not in faults:
                may_judge(lane)
                fresh = True
        if in_order and fresh and self._ask(group, decisions):
            return
        for hypothesis, (fault, full, dead) in faults.items():
            if full and hypothesis.token_ids:
                hypothesis.finish("length")
            else:
                (group if dead else group.request).fail(fault)
                return
        members = unfinished(group)
        if members and (faults if in_order else not any([unscored.get(hypothesis) for hypothesis in members])):
            self._ask(group, decisions)

    def _ask(self, group: Group, decisions: dict[Group, Decision]) -> bool:
        """Asks the rule of a group; whether that settled what becomes of it, by a decision or by a rule at fault."""
        decision = self._answer(group, *_shown_anew(group), group.rule)
        if decision is None:
            return not unfinished(group)
        for hypothesis in group.hypotheses if decision.notes else ():
            for lane in hypothesis.attempts:
                note = decision.notes.get((hypothesis.slot, lane.attempt))
                if note is not None:  # what was redrawn is kept as a fallback, and accepted by nobody
                    lane.note = note if group.redraft is None else note._replace(accepted=False)
        if not decides(decision):
            return False
        decisions[group] = decision
        return True

    def _answer(self, group: Group, judged: Sequence[Judged], state: State, rule: Answers) -> Decision | None:
        """What the rule says, or its `final`, its memory kept; a rule at fault ends its request and no other."""
        request, owner, fault = group.request, group.rule, None
        try:
            decision = rule(judged, state)
            if type(owner) not in OWN_RULES:
                fault = problem(decision, judged, state, request.plan.lanes.population, self._vocab_size,
                                request.stop_ids, request.whole, request.plan.drawn_after > 0)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever else a user's rule raises, sys.exit too, is that request's error
            decision, fault = None, f"raised {describe(error)}"
            log(f"the rule {rule_name(owner)} {fault}", error)
        if fault is not None:
            message = f"the rule {rule_name(owner)} {fault}: mend the rule"
            if request.whole or group.finished:  # responses have ended, and none is the completion yet
                for hypothesis in group.hypotheses:
                    hypothesis.finish("error", error=message)
            request.fail(message)
            return None
        if decision is not None and group.redraft is None:
            group.memory = decision.memory
        return decision


def unfinished(group: Group) -> list[Hypothesis]:
    """The members that still grow."""
    return [hypothesis for hypothesis in group.hypotheses if hypothesis.finish_reason is None]


def preferred(hypothesis: Hypothesis, ones: Sequence[One]) -> One:
    """Of attempts at the segment that is being decided the one that the plan's exhaustion keeps in the end."""
    pick = hypothesis.request.pick
    if not pick.draws:
        return max(ones, key=lambda one: pick.key(one.attempt, one.reward, 0.5))
    return max(ones, key=lambda one: pick.key(one.attempt, one.reward, _exhaust_uniform(hypothesis, one.attempt)))


def _by_hypothesis(group: Group) -> list[tuple[Hypothesis, list[Judged]]]:
    """What the rule is shown of each hypothesis."""
    judged = shown(group)[0]
    return [(hypothesis, [one for one in judged if one.hypothesis == hypothesis.slot])
            for hypothesis in group.hypotheses]


def _relaxations(request: Request) -> int:
    """How often a rule that decides nothing is relaxed."""
    return sum(step.times for step in request.exhaust if isinstance(step, Relax))


def _exhaust_uniform(hypothesis: Hypothesis, attempt: int) -> float:
    """The random number by which an exhaustion draws, of an attempt at the segment that is being decided."""
    segment = len(hypothesis.segments)
    return exhaust_uniform(hypothesis.request.seed, hypothesis.skipped + attempt, segment, hypothesis.sample)


def may_judge(lane: Lane) -> None:
    """From now on the rule is shown this lane."""
    hypothesis = lane.hypothesis
    request = hypothesis.request
    lane.judged = Judged(
        hypothesis.slot, lane.attempt, len(hypothesis.token_ids) + len(lane.token_ids), lane.finish_reason is not None,
        lane.logprobs if request.proposes_model else (), lane.logprobs, lane.per_token, lane.reward,
        hypothesis.reward if hypothesis.segments else request.prompt_reward, _uniforms(hypothesis, lane.attempt))


def shown(group: Group, rejected: bool = True) -> tuple[list[Judged], State]:
    """What a rule is shown: of each hypothesis its attempts so far, in order, as far as they are scored.

    Without `rejected`, those are left out that a note of the rule calls not accepted.
    """
    request = group.request
    judged: list[Judged] = []
    segment = unscored = left = 0
    if request.whole:
        members = group.judgeable
        judged = [_whole_judged(one) for one in members if rejected or one.note is None or one.note.accepted]
        left = len(group.hypotheses) - len(members)
    for hypothesis in group.hypotheses:
        segment = max(segment, len(hypothesis.segments))
        if request.whole:
            continue
        if hypothesis.finish_reason is not None:
            judged.append(Judged(hypothesis.slot, EARLIER, len(hypothesis.token_ids), True, (), (), (),
                                 hypothesis.reward, hypothesis.reward, ()))
        else:
            attempts = hypothesis.attempts if group.redraft is None else hypothesis.candidates
            unscored += sum([lane.judged is None for lane in attempts])
            judged += [lane.judged for lane in attempts if lane.judged is not None and (
                rejected or lane.note is None or lane.note.accepted)]
            left += hypothesis.attempts_left
    number = group.hypotheses[0].skipped + group.round + 1
    return judged, State(segment, group.round, unscored, left, request.max_tokens, request.prompt_reward, group.relaxed,
                         [hypothesis.slot for hypothesis in group.hypotheses],
                         _group_uniforms(group, number, segment), group.memory if group.redraft is None else None,
                         group.relaxed * request.relaxed_by)


def _shown_anew(group: Group) -> tuple[list[Judged], State]:
    """What a rule is shown that may have been asked before: a verdict that is final need not be given again, or many
    attempts would take quadratic time. A relaxed rule sees everything once more."""
    return shown(group, bool(group.relaxed) or not getattr(group.rule, "skips_rejected", False))


def _group_uniforms(group: Group, number: int, segment: int) -> tuple[float, ...]:
    """As many random numbers of a group's round as its rule declares. number: of the round, from 1."""
    request = group.request
    count = getattr(group.rule, "group_uniforms", 0)
    sample = group.index * request.plan.lanes.population
    return rule_uniforms(request.seed, KIND_GROUP, number, segment, sample, count) if count else ()


def _whole_judged(hypothesis: Hypothesis) -> Judged:
    """A whole response, as its rule is shown it."""
    logprobs, request = hypothesis.logprobs, hypothesis.request
    return Judged(hypothesis.slot, 1, len(hypothesis.token_ids), True, logprobs if request.proposes_model else (),
                  logprobs, hypothesis.per_token, hypothesis.reward, request.prompt_reward, _uniforms(hypothesis, 1))


def _uniforms(hypothesis: Hypothesis, attempt: int) -> tuple[float, ...]:
    """As many random numbers of an attempt as its rule declares; the first is that of the accept test."""
    request = hypothesis.request
    count, segment = hypothesis.group.rule.uniforms, len(hypothesis.segments)
    if not count:
        return ()
    attempt += hypothesis.skipped  # of a segment that is drawn anew every random number is
    first = accept_uniform(request.seed, attempt, segment, hypothesis.sample)
    if count == 1:
        return (first,)
    return first, *rule_uniforms(request.seed, KIND_RULE, attempt, segment, hypothesis.sample, count - 1)
