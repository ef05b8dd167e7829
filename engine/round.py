"""One round: propose, score, decide, commit. The loop of every policy, for all active hypotheses at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from stars.cache import PagedCache
from stars.commit import Committer, keep_whole
from stars.config import EngineConfig
from stars.errors import IntegrityError, RewardError, describe, log
from stars.exhaustions import Refuse
from stars.judge import Judge, preferred
from stars.models import Models
from stars.proposer import Proposer
from stars.request import Group, Hypothesis, Lane, Request, Wait, Winner
from stars.reward.base import Candidate, Later, Reward, Scored
from stars.rules import Decision, Keep
from stars.scores import Scores, late, usable
from stars.spending import affordable
from stars.waiting import Waiting
from stars.width import WidthChooser


class Round:
    """Advances groups by one round each.

    Every lane belongs to one hypothesis. At the end of a round a lane's slabs have been committed, returned, or are
    kept by `hypothesis.preferred`, of a segment that goes on, or by `hypothesis.wait` until rewards are there.
    """

    def __init__(self, models: Models, cache: PagedCache, reward: Reward | None, chooser: WidthChooser,
                 config: EngineConfig):
        self.proposer = Proposer(models, cache, chooser, config)
        self.drafter = drafter = self.proposer.drafter
        self._waiting = Waiting()
        self._scores = Scores(reward, config.target.trailing)
        self._judge = Judge(self._scores, drafter.decoder.config.vocab_size, self._waiting)
        self._committer = Committer(cache, models, reward, config.deterministic)
        self._cache = cache
        self._reward = reward
        self._trails = config.target.trailing
        # What was drafted has other bits than what a prompt's passes make of it: there nothing of it is shared.
        self._remembers = not config.deterministic

    @property
    def _scorer(self) -> Reward:
        """The reward: whoever needs one was refused where there is none."""
        assert self._reward is not None
        return self._reward

    def run(self, groups: Sequence[Group]) -> list[Group]:
        """One round for all of `groups`; returns those whose segment was decided or that ended.

        Whatever stops it in the middle leaves hypotheses and caches half changed: the caller goes back to a boundary.
        """
        drawing = self._drawing(groups)
        answered = self._waiting.take(groups) if self._waiting.waits else []
        drawn = self.proposer.launch(drawing)
        if self._trails and drawn:  # the device drafts while the host prepares what follows
            self._scores.score_trailing(drawn, self.drafter.device_draft)
        if drawn:
            self.drafter.pace()
        self._scores.launch_trailing()
        self.proposer.collect(drawn)
        undecided, scored, ended = groups, [], []
        if answered:
            scored, ended = [[wait for wait in answered if bool(wait.ends) is ends] for ends in (False, True)]
            won = {wait.group for wait in ended}
            undecided = [group for group in groups if group not in won]
            for wait in scored:
                drawn.update(wait.drawn)
        decisions, backed_up = self._judge.decide(undecided, drawn, scored)
        self._commit(groups, decisions, drawn, ended)
        for hypothesis in backed_up:
            self._give_back(hypothesis, drawn[hypothesis])
            self._committer.take_back(hypothesis)
        if self._waiting.waits:
            for wait in self._waiting.stale():
                self._forget(wait)
        for hypothesis, lanes in drawn.items():
            if hypothesis.wait is not None:
                continue
            if hypothesis.attempts:  # the segment goes on
                self._keep_preferred(hypothesis, lanes)
            else:
                self._give_back(hypothesis, lanes)
        changed = {*decisions, *(wait.group for wait in ended)} if ended else decisions
        return [group for group in groups if group.request.whole or group.finished
                or group in changed and not (self._waiting.waits and group.waits)]

    def able(self, groups: Sequence[Group]) -> list[Group]:
        """Those of `groups` that a round would do something for: draw, or take up what was waited for."""
        if not self._waiting.waits and not any([group.request.bounded for group in groups]):
            return list(groups)
        drawing = {hypothesis.group for hypothesis in self._drawing(groups)}
        drawing.update(wait.group for wait in self._waiting.waits if wait.answered)
        return [group for group in groups if group in drawing]

    def _drawing(self, groups: Sequence[Group]) -> list[Hypothesis]:
        """The responses of `groups` that get lanes in a round."""
        if self._waiting.waits:
            drawing = self._waiting.drawing(groups, self._cache.num_free_slabs)
        else:
            drawing = [hypothesis for group in groups for hypothesis in group.active]
        if any([group.request.bounded for group in groups]):
            drawing = affordable(drawing)
        return drawing

    def awaited(self) -> list[Later]:
        """The rewards that are still to come."""
        return self._waiting.awaited()

    def slabs_held(self, groups: Iterable[Group]) -> int:
        """Slabs that responses of `groups` hold between rounds, each as often as one of their lanes holds it."""
        members = [hypothesis for group in groups for hypothesis in group.hypotheses]
        waits = dict.fromkeys([one.wait for one in members if one.wait is not None])
        kept = [lane for wait in waits for lanes in wait.drawn.values() for lane in lanes]
        kept += [one.preferred for one in members if one.preferred is not None]
        return sum([(lane.slab is not None) + (lane.judge_slab is not None) for lane in set(kept)])

    def reset(self) -> None:
        """After a round that was stopped in the middle, whose caches were emptied."""
        self._scores.reset()
        self._waiting.reset()

    def fail(self, request: Request, message: str) -> None:
        """Ends every unfinished response of `request` with an error."""
        for hypothesis in request.hypotheses:
            if hypothesis.finish_reason is None:
                self.finish(hypothesis, "error", error=message)

    def finish(self, hypothesis: Hypothesis, reason: str, stop_reason: int | str | None = None,
               error: str | None = None) -> None:
        """Ends a response; its pages and its reward session are for the scheduler to close once the round is over."""
        hypothesis.finish(reason, stop_reason, error)
        self.forget_attempts(hypothesis)
        self._waiting.forget_prompt(hypothesis.request)

    def forget_attempts(self, hypothesis: Hypothesis) -> None:
        """Gives back what the attempts of an undecided segment hold, and no longer waits for their rewards."""
        if hypothesis.wait is not None:
            self._forget(hypothesis.wait)
        self._give_back(hypothesis, [])
        hypothesis.attempts = []

    def close(self, hypothesis: Hypothesis, keep: bool = True) -> None:
        """Gives back the pages and the session of a response.

        keep: whether somebody may come back to it, by a later turn or once it goes on: then its full pages stay until
        others need them. They do not where it ended with an error, which may have left anything in them.
        """
        self._give_back(hypothesis, [])  # of an undecided segment, where its request has failed in another's round
        table, session = hypothesis.table, hypothesis.session
        keep = keep and self._remembers and hypothesis.finish_reason != "error"
        if table is not None:
            for context in hypothesis.contexts:
                self._cache.close(context.table, context.prompt_ids + hypothesis.token_ids if keep else ())
            hypothesis.table = hypothesis.judge = hypothesis.prefill = None
        if session is not None:
            hypothesis.session = None
            try:
                if keep:
                    self._scorer.remember([(session, None)])
                    hypothesis.left = session if len(hypothesis.group.hypotheses) > 1 else None
                self._scorer.close(session)
            except IntegrityError:
                raise
            except Exception as error:  # the response has ended, and nobody else has to do with it
                log(f"the reward could not close a response: {describe(error)}", error)

    def prompt_rewards(self, requests: Sequence[Request]) -> None:
        """Scores the empty response of requests whose plan asks for that. They draw nothing before it is there."""
        asked = [request for request in requests if request.plan.score.prompt and request.prompt_reward is None
                 and request not in self._waiting.prompts]
        if not asked:
            return
        holders = [next(h for h in request.hypotheses if h.session is not None and h.prefill is None)
                   for request in asked]
        results = self._scores.score(holders, [Candidate(holder.session, [], "") for holder in holders])
        for request, result in zip(asked, results, strict=True):
            if result.handle is not None:
                self._scorer.discard(result.handle)
            if isinstance(result.reward, Future):
                self._waiting.prompts[request] = result.reward
            else:
                self._take_prompt(request, result.reward)

    def answered_prompts(self) -> list[Request]:
        """The requests whose prompt's reward was waited for and is there, which have taken it."""
        if not self._waiting.prompts:
            return []
        answered = [request for request, future in self._waiting.prompts.items() if future.done()]
        for request in answered:
            self._take_prompt(request, self._waiting.prompts.pop(request))
        return answered

    def _take_prompt(self, request: Request, answer: float | RewardError | Later) -> None:
        reward = usable(answer)
        if reward == float("-inf"):
            reward = "the reward of the prompt alone is -inf: it must be finite, or set alpha=1"
        if isinstance(reward, str):
            self.fail(request, reward)
        else:
            request.prompt_reward = reward

    def _commit(self, groups: Sequence[Group], decisions: dict[Group, Decision],
                drawn: dict[Hypothesis, list[Lane]], ended: Sequence[Wait]) -> None:
        """ended: what has waited for the rewards of its ends, and is committed now with the rest."""
        winners, twins, dropped = self._committer.arrange(groups, decisions, drawn)
        for hypothesis in dropped:
            self._drop(hypothesis, drawn)
        self._committer.discard_others(winners)
        scores = self._scores.score_ended(winners)
        if scores and any([late(result) for _, result in scores]):
            winners, twins, scores = self._hold_ends(winners, twins, scores, drawn)
        for wait in ended:
            drawn.update(wait.drawn)
            if wait.winners[0].hypothesis.finish_reason is None:  # else its request has failed meanwhile
                winners, twins, scores = wait.winners + winners, wait.twins + twins, wait.ends + scores
        faults = self._judge.take_ended(scores) if scores else []
        self._committer.commit([winner for winner in winners if winner.finish_reason is None],
                               [winner for winner in winners if winner.finish_reason is not None])
        for winner in winners:
            winner.hypothesis.append(winner)
        for winner in winners:
            self.forget_attempts(winner.hypothesis)
            self._release(winner.lane)  # of an earlier round too, which the end of this round does not reach
        for hypothesis, fault in faults:
            if not hypothesis.request.in_turn:
                hypothesis.request.fail(fault)
        for winner in winners:
            if winner.finish_reason is not None and winner.hypothesis.finish_reason is None:
                winner.hypothesis.finish(winner.finish_reason, winner.stop_reason)
        for hypothesis, fault in faults:
            if hypothesis.request.in_turn:  # one before it may be accepted, and then nobody has asked for its reward
                hypothesis.error = fault
        for winner, slot in twins:
            self._committer.fork(winner.hypothesis, slot)
        grown = {winner.hypothesis.group for winner in winners if winner.finish_reason is not None}
        grown.update([one.group for one in drawn if one.error is not None and one.request.in_turn])
        for group in groups:
            if group.finished or group.request.in_turn and group in grown:
                self._conclude(group, drawn)

    def _hold_ends(self, winners: list[Winner], twins: list[tuple[Winner, int]], scores: list[tuple[Winner, Scored]],
                   drawn: dict[Hypothesis, list[Lane]],
                   ) -> tuple[list[Winner], list[tuple[Winner, int]], list[tuple[Winner, Scored]]]:
        """Those of what has won that do not wait for the reward of an end. Who is decided together waits together."""
        def unit(winner: Winner) -> Hypothesis | Group:
            hypothesis = winner.hypothesis
            return hypothesis if hypothesis.request.whole else hypothesis.group

        waiting = dict.fromkeys([unit(winner) for winner, result in scores if late(result)])
        for one in waiting:
            members = [one] if isinstance(one, Hypothesis) else one.hypotheses
            self._waiting.hold(Wait(
                members[0].group, members, {member: drawn.get(member, []) for member in members}, [],
                [(winner, result) for winner, result in scores if unit(winner) is one],
                [winner for winner in winners if unit(winner) is one],
                [(winner, slot) for winner, slot in twins if unit(winner) is one]))
        return ([winner for winner in winners if unit(winner) not in waiting],
                [(winner, slot) for winner, slot in twins if unit(winner) not in waiting],
                [(winner, result) for winner, result in scores if unit(winner) not in waiting])

    def _conclude(self, group: Group, drawn: dict[Hypothesis, list[Lane]]) -> None:
        """All of a group's responses have ended, or as many as its rule wants to see: one of them is the completion."""
        if group.request.whole and not group.failed:
            decision = self._judge.decide_whole(group)
            for hypothesis in keep_whole(group, decision) if decision is not None else ():
                self._drop(hypothesis, drawn)
            if not group.finished:
                return
        if len(group.hypotheses) > 1 and not group.failed:
            self._choose(group, drawn)

    def _choose(self, group: Group, drawn: dict[Hypothesis, list[Lane]]) -> None:
        """Of several responses, all of which have ended, one is the completion."""
        chosen = self._judge.choose(group)
        for hypothesis in group.hypotheses if chosen is not None else ():
            if hypothesis is not chosen:
                group.drop(hypothesis)
                self._drop(hypothesis, drawn)

    def conclude(self, request: Request, reason: str) -> None:
        """Ends what is unfinished of a request, for want of time or budget, with what was committed.

        Of a population the plan's own final choice among the responses that there are is the completion. Of whole
        responses it is made of those that have ended, with a reward if they are to have one; where none has, the first
        is kept as far as it is. A plan that refuses what its rule does not accept keeps nothing then.
        """
        for group in request.groups:
            if not group.finished:
                self._cut_short(group, reason)

    def _cut_short(self, group: Group, reason: str) -> None:
        request, members = group.request, group.hypotheses
        ended = [one for one in members if one.finish_reason is not None and one.error is None]
        for hypothesis in members:
            if hypothesis.finish_reason is None:
                self.finish(hypothesis, reason)
        if request.whole:
            kept = ended or members[:1]
            for hypothesis in members:
                if hypothesis not in kept:
                    group.drop(hypothesis)
                    self._drop(hypothesis, {})
            if ended:
                self._conclude(group, {})
            elif isinstance(request.exhaust[-1], Refuse):
                kept[0].refuse()
            elif kept[0].token_ids:
                keep_whole(group, Decision([Keep(kept[0].slot, 1, len(kept[0].token_ids))]))
        elif len(members) > 1:
            self._choose(group, {})
        if not group.failed:
            for hypothesis in group.hypotheses:
                hypothesis.finish_reason, hypothesis.stop_reason = reason, None

    def _forget(self, wait: Wait) -> None:
        """Ends a wait whose answers nobody wants any more."""
        self._waiting.forget(wait)
        for hypothesis, lanes in wait.drawn.items():
            for lane in lanes:
                self._release(lane)

    def _drop(self, hypothesis: Hypothesis, drawn: dict[Hypothesis, list[Lane]]) -> None:
        """Gives back all that a hypothesis holds that has left its group, which may have waited for its reward. Nobody
        comes back to it, unless another one begins with its text, as forks do."""
        if hypothesis.wait is not None:
            self._forget(hypothesis.wait)
        self._give_back(hypothesis, drawn.get(hypothesis, []))
        token_ids = hypothesis.token_ids
        lost = not any([other.token_ids[: len(token_ids)] == token_ids for other in hypothesis.group.hypotheses])
        session = hypothesis.session if hypothesis.session is not None else hypothesis.left
        self.close(hypothesis, keep=not lost)
        hypothesis.left = None
        if lost and self._remembers:  # what had ended before, or was a fork's twin, might have been the one to stay
            for prompt_ids in hypothesis.request.contexts:
                self._cache.forget(prompt_ids + token_ids, len(prompt_ids), hypothesis.request.stores)
            if session is not None:
                self._scorer.forget(session)

    def _keep_preferred(self, hypothesis: Hypothesis, lanes: Sequence[Lane]) -> None:
        """Of a segment that goes on, the attempt that its exhaustion would keep keeps its slabs; the others give theirs
        back. Where it is redrawn, that is none of what was drawn before."""
        held = [*([hypothesis.preferred] if hypothesis.preferred is not None else []), *lanes]
        redrawn = hypothesis.group.redraft is not None
        able = [lane for lane in held if lane.attempt > hypothesis.own_attempts] if redrawn else held
        hypothesis.preferred = preferred(hypothesis, able) if able else None
        for lane in held:
            if lane is not hypothesis.preferred:
                self._release(lane)

    def _give_back(self, hypothesis: Hypothesis, lanes: Sequence[Lane]) -> None:
        """Releases lanes of a hypothesis, and the one that it has kept."""
        if hypothesis.preferred is not None:
            self._release(hypothesis.preferred)
            hypothesis.preferred = None
        for lane in lanes:
            self._release(lane)

    def _release(self, lane: Lane) -> None:
        if lane.slab is not None:
            self._cache.return_slab(lane.slab)
            lane.slab = None
        if lane.judge_slab is not None:
            self._cache.return_slab(lane.judge_slab)
            lane.judge_slab = None
        if lane.score_handle is not None:
            self._scorer.discard(lane.score_handle)
            lane.score_handle = None
        lane.reading = None
