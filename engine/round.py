"""One round: propose, score, decide, commit. The loop of every policy, for all active hypotheses at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

from stars import law
from stars.cache import CommitMove, PagedCache
from stars.config import EngineConfig
from stars.detokenizer import cut_at_stop
from stars.draft import Drafter, LaneSpec
from stars.kernels.philox import accept_uniform, pack_stream
from stars.outputs import Segment
from stars.request import Group, Hypothesis, Lane, Request
from stars.reward.base import Candidate, ContextFull, Reward, Scored, Trailing, TrailingCandidate, reward_problem
from stars.width import WidthChooser

NAN_LOGITS = "the language model's logits are NaN or infinite: check its weights, or load it with dtype=\"float32\""


class Round:
    """Advances hypotheses by one round each.

    Every lane belongs to one hypothesis. At the end of a round a lane's slabs have been committed, returned, or are
    kept by `hypothesis.best`, the best seen of a segment that goes on.
    """

    def __init__(self, drafter: Drafter, cache: PagedCache, reward: Reward | None, chooser: WidthChooser,
                 config: EngineConfig):
        self.drafter = drafter
        self.cache = cache
        self.reward = reward
        self.chooser = chooser
        self.max_num_lanes = config.max_num_lanes
        self._trails = config.target.trailing
        self._trailing: tuple[list[Lane], Trailing] | None = None  # what is scored after the draft, until it is read

    def run(self, groups: Sequence[Group]) -> list[Group]:
        """One round for all of `groups`; returns those of which a response grew or ended.

        Whatever stops it in the middle leaves hypotheses and caches half changed: the caller goes back to a boundary.
        """
        active = [hypothesis for group in groups for hypothesis in group.active]
        lanes: list[list[Lane]] = []
        self._propose(active, lanes)
        self._draft(lanes)
        winners = self._decide(lanes)
        self._commit(winners)
        for group in lanes:
            for lane in group:
                if lane is not lane.hypothesis.best or lane.hypothesis.finish_reason is not None:
                    self._release(lane)
        changed = {hypothesis for hypothesis in active
                   if hypothesis.finish_reason is not None or not hypothesis.attempts}
        return [group for group in groups if not changed.isdisjoint(group.hypotheses)]

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
        self.drop_best(hypothesis)
        hypothesis.attempts = []

    def drop_best(self, hypothesis: Hypothesis) -> None:
        """Gives back what the best seen of an undecided segment holds."""
        if hypothesis.best is not None:
            self._release(hypothesis.best)
            hypothesis.best = None

    def prompt_rewards(self, requests: Sequence[Request]) -> None:
        """Scores the empty response of requests whose threshold starts from r(prompt), and sets where it starts."""
        asked = []
        for request in requests:
            plan = request.plan
            if plan.decision == "threshold" and plan.alpha != 1.0 and request.prompt_reward is None:
                asked.append(request)
            else:
                request.threshold_start = plan.reward_threshold
        if not asked:
            return
        holders = [next(h for h in request.hypotheses if h.session is not None) for request in asked]
        for request, holder, result in zip(asked, holders, self._score(
                [(holder, Candidate(holder.session, [], "")) for holder in holders]), strict=True):
            if result.handle is not None:
                self.reward.discard(result.handle)
            problem = reward_problem(result.reward)
            if problem is None and result.reward == float("-inf"):
                problem = "the reward of the prompt alone is -inf: it must be finite, or set alpha=1"
            if problem is not None:
                self.fail(request, problem)
                continue
            request.threshold_start = law.threshold_start(result.reward, request.plan.alpha,
                                                          request.plan.reward_threshold)
            request.prompt_reward = result.reward  # last: it says that the threshold's start is known

    # -- propose --------------------------------------------------------------------------------------------------

    def _propose(self, active: Sequence[Hypothesis], lanes: list[list[Lane]]) -> None:
        """Appends the lanes of each hypothesis to `lanes` as their slabs are taken."""
        for hypothesis, width in zip(active, self._widths(active), strict=True):
            group: list[Lane] = []
            lanes.append(group)
            for attempt in range(len(hypothesis.attempts) + 1, len(hypothesis.attempts) + width + 1):
                group.append(Lane(hypothesis, attempt, self.cache.take_slab()))
            hypothesis.metrics.width = max(hypothesis.metrics.width, width)

    def _widths(self, active: Sequence[Hypothesis]) -> list[int]:
        share = max(1, self.max_num_lanes // len(active))
        widths = []
        for hypothesis in active:
            plan = hypothesis.request.plan
            most = min(share, _max_attempts(hypothesis.request) - len(hypothesis.attempts))
            if plan.width is not None:
                widths.append(min(plan.width, most))
            elif most == 1:
                widths.append(1)
            else:
                seen = [h.metrics for h in hypothesis.request.hypotheses]
                widths.append(self.chooser.choose(sum(m.accepted for m in seen), sum(m.attempts_counted for m in seen),
                                                  len(active), most))
        return widths

    def _draft(self, groups: Sequence[Sequence[Lane]]) -> None:
        lanes = [lane for group in groups for lane in group]
        specs = []
        for lane in lanes:
            hypothesis = lane.hypothesis
            request = hypothesis.request
            specs.append(LaneSpec(hypothesis.table, hypothesis.last_token, lane.slab, _limit(hypothesis), request.seed,
                                  lane.attempt, _stream(hypothesis), request.params, request.stop_ids,
                                  hypothesis.history() if request.params.penalties else None))
        begin = time.perf_counter()
        self.drafter.launch(specs)
        if self._trails:  # the device drafts while the host prepares what follows
            self._score_trailing(groups)
        drafted = self.drafter.drafted(len(lanes))
        seconds = (time.perf_counter() - begin) / len(lanes)
        for lane, (token_ids, logprobs) in zip(lanes, drafted, strict=True):
            lane.token_ids, lane.logprobs = token_ids, logprobs
            metrics = lane.hypothesis.metrics
            metrics.lm_seconds += seconds
            metrics.attempts += 1
            metrics.lm_tokens_drawn += len(token_ids)
            if token_ids[-1] < 0:
                self.fail(lane.hypothesis.request, NAN_LOGITS)
            else:
                _end(lane)

    def _score_trailing(self, groups: Sequence[Sequence[Lane]]) -> None:
        """Starts the first scoring pass after the draft: the device hands the tokens on, the host reads them later."""
        scored, first = [], 0  # groups and the places of their first lanes in the draft
        for group in groups:
            request = group[0].hypothesis.request
            if request.plan.scoring == "segment" and not request.params.stop:  # stop strings are for the host to find
                scored.append((group, first))
            first += len(group)
        batch, candidates = [], []
        for group, first in scored:
            hypothesis = group[0].hypothesis
            limit = _limit(hypothesis)
            for index, lane in enumerate(group[: max(1, self.reward.lanes_per_pass(limit, len(scored)))], first):
                batch.append(lane)
                candidates.append(TrailingCandidate(hypothesis.session, hypothesis.token_ids, index, limit))
        trailing = self.reward.score_trailing(self.drafter.device_draft, candidates) if candidates else None
        if trailing is not None:
            self._trailing = batch, trailing

    # -- score and decide -----------------------------------------------------------------------------------------

    def _decide(self, lanes: Sequence[Sequence[Lane]]) -> list[Lane]:
        """The winning lane of each hypothesis whose segment is decided."""
        winners: dict[Hypothesis, Lane] = {}
        waiting: dict[Hypothesis, list[Lane]] = {}
        for group in lanes:
            hypothesis = group[0].hypothesis
            hypothesis.attempts += group
            if hypothesis.finish_reason is not None:
                continue
            if hypothesis.request.plan.scoring == "segment":
                waiting[hypothesis] = list(group)
            else:
                winners[hypothesis] = group[0]
                group[0].accepted = True
        # Rewards come in attempt order, a few lanes at a time: what follows an accepted lane need not be scored.
        batch, results = self._trailing_results()
        while waiting:
            if not batch:
                for hypothesis, group in waiting.items():
                    batch += group[: max(1, self.reward.lanes_per_pass(len(group[0].token_ids), len(waiting)))]
                results = self._score([(lane.hypothesis, self._candidate(lane.hypothesis, lane)) for lane in batch])
                for lane, result in zip(batch, results, strict=True):
                    lane.score_handle = result.handle
            for lane, result in zip(batch, results, strict=True):
                hypothesis = lane.hypothesis
                if hypothesis.finish_reason is None:
                    waiting[hypothesis] = waiting[hypothesis][1:]
                    self._judge(lane, result, winners)
            waiting = {hypothesis: group for hypothesis, group in waiting.items()
                       if group and hypothesis not in winners and hypothesis.finish_reason is None}
            batch = []
        for group in lanes:
            hypothesis = group[0].hypothesis
            if hypothesis.finish_reason is None and hypothesis not in winners and (
                    len(hypothesis.attempts) >= _max_attempts(hypothesis.request)):
                winners[hypothesis] = hypothesis.best
                hypothesis.best.accepted = hypothesis.request.plan.decision == "argmax"
        return [lane for hypothesis, lane in winners.items() if hypothesis.finish_reason is None]

    def _judge(self, lane: Lane, result: Scored, winners: dict[Hypothesis, Lane]) -> None:
        """Applies the law to one scored lane; lanes of a hypothesis come in attempt order."""
        hypothesis = lane.hypothesis
        request = hypothesis.request
        plan = request.plan
        decided = hypothesis in winners
        problem = reward_problem(result.reward)
        if problem is not None:
            # What follows the winner was scored for nothing: a problem there must not depend on the width.
            if not decided and isinstance(result.reward, ContextFull) and hypothesis.token_ids:
                self.finish(hypothesis, "length")
            elif not decided:
                self.fail(request, problem)
            return
        lane.reward = result.reward
        if plan.decision == "threshold":
            lane.threshold = law.threshold(len(hypothesis.token_ids) + len(lane.token_ids), request.params.max_tokens,
                                           request.threshold_start, plan.reward_threshold)
            lane.accept_probability = law.accept_probability(lane.reward, lane.threshold, plan.beta)
        if decided:
            return
        if plan.decision == "threshold":
            uniform = accept_uniform(request.seed, lane.attempt, len(hypothesis.segments), hypothesis.sample)
            if law.accepts(uniform, lane.reward, lane.threshold, plan.beta):
                lane.accepted = True
                winners[hypothesis] = lane
                return
        if hypothesis.best is None or lane.reward > hypothesis.best.reward:
            if hypothesis.best is not None:
                self._release(hypothesis.best)
            hypothesis.best = lane
        else:
            self._release(lane)

    def _candidate(self, hypothesis: Hypothesis, lane: Lane | None, final: bool = False) -> Candidate:
        text = hypothesis.request.response_text(hypothesis, lane) if self.reward.needs_text else None
        return Candidate(hypothesis.session, hypothesis.content_ids(lane), text, final)

    def _score(self, candidates: Sequence[tuple[Hypothesis, Candidate]]) -> list[Scored]:
        """Scores and keeps the counts and the time of each candidate's hypothesis."""
        begin = time.perf_counter()
        results = self.reward.score([candidate for _, candidate in candidates])
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

    def _commit(self, winners: Sequence[Lane]) -> None:
        ended = [lane for lane in winners if lane.finish_reason is not None]
        problems = self._score_ended([lane for lane in ended if lane.hypothesis.request.plan.scoring == "end"])
        # The slab holds the token before the segment and all of the segment but its last token.
        going_on = [lane for lane in winners if lane.finish_reason is None]
        self.cache.commit([CommitMove(lane.hypothesis.table, lane.slab * self.cache.slab_len, len(lane.token_ids),
                                      lane.hypothesis.table.length) for lane in going_on])
        scored = [lane for lane in going_on if lane.score_handle is not None]
        if scored:
            self.reward.commit([(lane.hypothesis.session, lane.score_handle) for lane in scored])
            for lane in scored:
                lane.score_handle = None
        for lane in winners:
            _append(lane)
            if lane.hypothesis.best is not None and lane.hypothesis.best is not lane:
                self._release(lane.hypothesis.best)
            lane.hypothesis.best = None
            self._release(lane)  # of a lane of an earlier round too, which the end of this round does not reach
        for request, problem in problems:
            self.fail(request, problem)
        for lane in ended:
            if lane.hypothesis.finish_reason is None:
                self.finish(lane.hypothesis, lane.finish_reason, lane.stop_reason)

    def _score_ended(self, lanes: Sequence[Lane]) -> list[tuple[Request, str]]:
        """Gives the lanes that end a response the one reward it gets; returns the problems there were."""
        if not lanes:
            return []
        results = self._score([(lane.hypothesis, self._candidate(lane.hypothesis, lane, final=True)) for lane in lanes])
        problems = []
        for lane, result in zip(lanes, results, strict=True):
            if result.handle is not None:
                self.reward.discard(result.handle)
            problem = reward_problem(result.reward)
            if problem is None:
                lane.reward = result.reward
            else:
                problems.append((lane.hypothesis.request, problem))
        return problems

    def _release(self, lane: Lane) -> None:
        if lane.slab is not None:
            self.cache.return_slab(lane.slab)
            lane.slab = None
        if lane.score_handle is not None:
            self.reward.discard(lane.score_handle)
            lane.score_handle = None


def _limit(hypothesis: Hypothesis) -> int:
    """Most tokens of the next segment."""
    request = hypothesis.request
    return min(request.plan.segment_size, request.params.max_tokens - len(hypothesis.token_ids))


def _stream(hypothesis: Hypothesis) -> int:
    """The random stream of the next segment."""
    return pack_stream(len(hypothesis.segments), hypothesis.sample)


def _count(hypotheses: Sequence[Hypothesis], results: Sequence[Scored], seconds: float) -> None:
    """Adds scores that took `seconds` to the metrics of each candidate's response."""
    for hypothesis, result in zip(hypotheses, results, strict=True):
        hypothesis.metrics.rm_seconds += seconds / len(results)
        hypothesis.metrics.rm_tokens_scored += result.tokens_run
        hypothesis.metrics.rm_tokens_full_rescore += result.tokens_full


def _max_attempts(request: Request) -> int:
    """At temperature 0 all attempts are equal: one is drawn."""
    return 1 if request.params.temperature == 0 else request.plan.max_attempts


def _end(lane: Lane) -> None:
    """Cuts a drafted lane at a stop string and notes whether it would end the response, and why."""
    hypothesis = lane.hypothesis
    request = hypothesis.request
    if request.params.stop:
        # The token that ends the response is no part of its text, so it cannot complete a stop string either.
        content = lane.token_ids[:-1] if lane.token_ids[-1] in request.stop_ids else lane.token_ids
        cut = cut_at_stop(request.detokenizer, hypothesis.token_ids, content, request.params.stop)
        if cut is not None:
            count, lane.stop_reason = cut
            lane.token_ids, lane.logprobs = lane.token_ids[:count], lane.logprobs[:count]
            lane.finish_reason = "stop"
            return
    last = lane.token_ids[-1]
    if last in request.stop_ids:
        lane.finish_reason = "stop"
        lane.stop_reason = None if last in request.eos_token_ids else request.stop_tokens.get(last, last)
    elif len(hypothesis.token_ids) + len(lane.token_ids) >= request.params.max_tokens:
        lane.finish_reason = "length"


def _append(lane: Lane) -> None:
    """Makes a winning lane the newest segment of its response."""
    hypothesis = lane.hypothesis
    attempts = [attempt.attempt_record() for attempt in hypothesis.attempts]
    hypothesis.segments.append(Segment(lane.token_ids, lane.reward, lane.threshold, lane.accepted, attempts))
    hypothesis.token_ids += lane.token_ids
    hypothesis.cumulative_logprob += sum(lane.logprobs)
    hypothesis.reward = lane.reward
    metrics = hypothesis.metrics
    metrics.segments += 1
    metrics.lm_tokens_kept += len(lane.token_ids)
    metrics.accepted += lane.accepted
    metrics.fallbacks += not lane.accepted
    all_count = not lane.accepted or hypothesis.request.plan.decision == "argmax"
    metrics.attempts_counted += len(hypothesis.attempts) if all_count else lane.attempt
    hypothesis.attempts = []
