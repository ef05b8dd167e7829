"""One round: propose, score, decide, commit. The loop of every policy, for all active hypotheses at once."""

from __future__ import annotations

from collections.abc import Sequence

from stars.cache import PagedCache
from stars.commit import Committer, keep_whole
from stars.config import EngineConfig
from stars.draft import Drafter
from stars.errors import IntegrityError, describe, log
from stars.judge import Judge, preferred, usable
from stars.passes import Passes
from stars.proposer import Proposer
from stars.request import Group, Hypothesis, Lane, Request
from stars.reward.base import Candidate, Reward
from stars.rules import Decision
from stars.width import WidthChooser


class Round:
    """Advances groups by one round each.

    Every lane belongs to one hypothesis. At the end of a round a lane's slabs have been committed, returned, or are
    kept by `hypothesis.best`, the best seen of a segment that goes on.
    """

    def __init__(self, drafter: Drafter, cache: PagedCache, passes: Passes, reward: Reward | None,
                 chooser: WidthChooser, config: EngineConfig):
        self.drafter = drafter
        self.proposer = Proposer(drafter, cache, chooser, config)
        self._judge = Judge(reward, drafter.decoder.config.vocab_size, config.target.trailing)
        self._committer = Committer(cache, passes, reward)
        self._cache = cache
        self._reward = reward
        self._trails = config.target.trailing

    @property
    def _scorer(self) -> Reward:
        """The reward: whoever needs one was refused where there is none."""
        assert self._reward is not None
        return self._reward

    def run(self, groups: Sequence[Group]) -> list[Group]:
        """One round for all of `groups`; returns those whose segment was decided or that ended.

        Whatever stops it in the middle leaves hypotheses and caches half changed: the caller goes back to a boundary.
        """
        drawn = self.proposer.launch([hypothesis for group in groups for hypothesis in group.active])
        if self._trails and drawn:  # the device drafts while the host prepares what follows
            self._judge.score_trailing(drawn, self.drafter.device_draft)
        if drawn:
            self.drafter.pace()
        self._judge.launch_trailing()
        self.proposer.collect(drawn)
        decisions = self._judge.decide(groups, drawn)
        self._commit(groups, decisions, drawn)
        for hypothesis, lanes in drawn.items():
            if hypothesis.attempts:  # the segment goes on
                self._keep_best(hypothesis, lanes)
            else:
                self._give_back(hypothesis, lanes)
        return [group for group in groups if group in decisions or group.request.whole or group.finished]

    def reset(self) -> None:
        """After a round that was stopped in the middle, whose caches were emptied."""
        self._judge.reset()

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

    def forget_attempts(self, hypothesis: Hypothesis) -> None:
        """Gives back what the attempts of an undecided segment hold."""
        self._give_back(hypothesis, [])
        hypothesis.attempts = []

    def close(self, hypothesis: Hypothesis) -> None:
        """Gives back the pages and the session of a response."""
        table, session = hypothesis.table, hypothesis.session
        if table is not None:
            self._cache.close(table)
            hypothesis.table = hypothesis.prefill = None
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
        holders = [next(h for h in request.hypotheses if h.session is not None and h.prefill is None)
                   for request in asked]
        results = self._judge.score(holders, [Candidate(holder.session, [], "") for holder in holders])
        for request, result in zip(asked, results, strict=True):
            if result.handle is not None:
                self._scorer.discard(result.handle)
            reward = usable(result.reward)
            if reward == float("-inf"):
                reward = "the reward of the prompt alone is -inf: it must be finite, or set alpha=1"
            if isinstance(reward, str):
                self.fail(request, reward)
            else:
                request.prompt_reward = reward

    def _commit(self, groups: Sequence[Group], decisions: dict[Group, Decision],
                drawn: dict[Hypothesis, list[Lane]]) -> None:
        winners, twins, dropped = self._committer.arrange(groups, decisions, drawn)
        for hypothesis in dropped:
            self._drop(hypothesis, drawn)
        self._committer.discard_others(winners)
        faults = self._judge.score_ended(winners)
        self._committer.commit([winner for winner in winners if winner.finish_reason is None])
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
        ended = {winner.hypothesis.group for winner in winners if winner.finish_reason is not None}
        for group in groups:
            if group.finished or group.request.in_turn and group in ended:
                self._conclude(group, drawn)

    def _conclude(self, group: Group, drawn: dict[Hypothesis, list[Lane]]) -> None:
        """All of a group's responses have ended, or as many as its rule wants to see: one of them is the completion."""
        if group.request.whole and not group.failed:
            decision = self._judge.decide_whole(group)
            for hypothesis in keep_whole(group, decision) if decision is not None else ():
                self._drop(hypothesis, drawn)
            if not group.finished:
                return
        if len(group.hypotheses) > 1 and not group.failed:
            chosen = self._judge.choose(group)
            for hypothesis in group.hypotheses if chosen is not None else ():
                if hypothesis is not chosen:
                    group.drop(hypothesis)
                    self._drop(hypothesis, drawn)

    def _drop(self, hypothesis: Hypothesis, drawn: dict[Hypothesis, list[Lane]]) -> None:
        """Gives back all that a hypothesis holds that has left its group."""
        self._give_back(hypothesis, drawn.get(hypothesis, []))
        self.close(hypothesis)

    def _keep_best(self, hypothesis: Hypothesis, lanes: Sequence[Lane]) -> None:
        """Of a segment that goes on, the attempt that its exhaustion would keep keeps its slabs: the best seen, unless
        the plan says otherwise. The others give theirs back."""
        held = [*([hypothesis.best] if hypothesis.best is not None else []), *lanes]
        hypothesis.best = preferred(hypothesis, held)
        for lane in held:
            if lane is not hypothesis.best:
                self._release(lane)

    def _give_back(self, hypothesis: Hypothesis, lanes: Sequence[Lane]) -> None:
        """Releases lanes of a hypothesis, and its best seen."""
        if hypothesis.best is not None:
            self._release(hypothesis.best)
            hypothesis.best = None
        for lane in lanes:
            self._release(lane)

    def _release(self, lane: Lane) -> None:
        if lane.slab is not None:
            self._cache.return_slab(lane.slab)
            lane.slab = None
        if lane.score_handle is not None:
            self._scorer.discard(lane.score_handle)
            lane.score_handle = None
