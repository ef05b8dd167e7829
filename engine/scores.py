"""Scores of lanes, a few of each response at a time, in attempt order, by passes that are prepared as early as can be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from stars.errors import RewardError
from stars.kernels.types import Draft
from stars.request import Extra, Hypothesis, Lane, Reader, Request, Winner
from stars.reward.base import (
    Ahead,
    Candidate,
    Later,
    Reward,
    Scored,
    Trailing,
    TrailingCandidate,
    reward_problem,
    settled,
)
from stars.spending import calls_left


class Scores:
    """Asks the reward what it says of lanes, and counts what that costs. What is made of it is for others to say."""

    def __init__(self, reward: Reward | None, ahead: bool):
        self._reward = reward
        self._trailing: tuple[list[Lane], Trailing] | None = None  # what is scored after the draft, until it is read
        self._looks_ahead = ahead  # whether the device works beside the host
        # The next scoring pass, where it was prepared, and whether it was launched.
        self._ahead: tuple[list[Lane], Ahead, bool] | None = None
        self._idle = math.inf  # seconds that the host last waited for a pass during which it prepared none
        self._preparing = 0.0  # seconds that it last took to prepare one

    @property
    def _scorer(self) -> Reward:
        """The reward: whoever needs one was refused where there is none."""
        assert self._reward is not None
        return self._reward

    def reset(self) -> None:
        """After a round that was stopped in the middle, whose caches were emptied."""
        self._trailing = self._ahead = None

    def score_trailing(self, drawn: dict[Hypothesis, list[Lane]], draft: Draft) -> None:
        """Prepares the first scoring pass after the draft, for `launch_trailing`: the device hands the tokens on, the
        host reads them later."""
        scored: dict[Hypothesis, list[tuple[int, Lane]]] = {}  # with their places in the draft
        place = 0
        for hypothesis, lanes in drawn.items():
            request = hypothesis.request
            if request.ranks:  # one row of the draft for all of its lanes, whose tokens the host hands out
                place += bool(lanes) and lanes[0].ranking is None
                continue
            if hypothesis.proposal.apart:  # drafted before
                continue
            if hypothesis.group.scores_segments and not request.stop and hypothesis.group.reader is None:
                scored[hypothesis] = list(enumerate(lanes, place))  # stop strings are found by the host
            place += len(lanes)
        batch, candidates = [], []
        for hypothesis, own in scored.items():
            room = hypothesis.next_segment
            for place, lane in own[: max(1, self._scorer.lanes_per_pass(room, len(scored)))]:
                batch.append(lane)
                candidates.append(TrailingCandidate(hypothesis.session, hypothesis.token_ids, place, room))
        trailing = self._scorer.score_trailing(draft, candidates) if candidates else None
        if trailing is not None:
            self._trailing = batch, trailing

    def launch_trailing(self) -> None:
        """Launches the pass that `score_trailing` prepared, if it did, behind the whole draft."""
        if self._trailing is not None:
            self._trailing[1].launch()

    def score(self, hypotheses: Sequence[Hypothesis], candidates: list[Candidate]) -> list[Scored]:
        """Scores candidates, and keeps the counts and the time of each one's hypothesis."""
        begin = time.perf_counter()
        results = self._scorer.score(candidates)
        _count(hypotheses, results, time.perf_counter() - begin)
        return results

    def score_ended(self, winners: Sequence[Winner]) -> list[tuple[Winner, Scored]]:
        """Asks for the one reward that what ends a response gets.

        Where segments are scored, what a rule cut or continued has no reward yet either, nor what was redrawn unscored.
        """
        ended = [winner for winner in winners if winner.finish_reason is not None and (
            winner.hypothesis.request.plan.score.when == "end"
            or winner.unscored)]
        if any([winner.hypothesis.request.bounded for winner in ended]):
            ended = _within_budgets(ended)
        if not ended:
            return []
        candidates: list[Candidate] = []
        for winner in ended:
            candidates += self._candidates(winner.hypothesis, [winner], final=True)
        results = self.score([winner.hypothesis for winner in ended], candidates)
        for result in results:
            if result.handle is not None:
                self._scorer.discard(result.handle)
        return list(zip(ended, results, strict=True))

    def _candidates(self, hypothesis: Hypothesis, extras: Sequence[Extra],
                    final: bool = False) -> list[Candidate]:
        """The response with each of `extras`."""
        contents, request = hypothesis.contents(extras), hypothesis.request
        stopped = [extra.token_ids[-1] if extra.token_ids and extra.token_ids[-1] in request.stop_ids else None
                   for extra in extras]
        if not self._scorer.needs_text:
            return [Candidate(hypothesis.session, ids, None, final, stopped=stop)
                    for ids, stop in zip(contents, stopped, strict=True)]
        return [Candidate(hypothesis.session, ids, request.response_text(hypothesis, extra), final,
                          extra.finish_reason is not None, stop)
                for ids, extra, stop in zip(contents, extras, stopped, strict=True)]

    def _next_lanes(self, unscored: dict[Hypothesis, list[Lane]]) -> dict[Hypothesis, list[Lane]]:
        """The next lanes of each response, in attempt order, as many as are worth it at once."""
        return {hypothesis: lanes[: max(1, self._scorer.lanes_per_pass(len(lanes[0].token_ids), len(unscored)))]
                for hypothesis, lanes in unscored.items()}

    def next_pass(self, unscored: dict[Hypothesis, list[Lane]]) -> list[tuple[Lane, Scored]]:
        """Scores the next lanes of each response, once its reader has read them, if it has one."""
        read: list[tuple[Lane, Scored]] = []
        if any([hypothesis.group.reader is not None for hypothesis in unscored]):
            read = self._read(unscored)
            unscored = {one: lanes for one, lanes in unscored.items() if one.group.scores_segments}
        return read + self._next_rewards(unscored) if unscored else read

    def _read(self, unscored: dict[Hypothesis, list[Lane]]) -> list[tuple[Lane, Scored]]:
        """Reads lanes of those that have a reader: the next ones, or all where the reward is asked after it. Returns
        those that no reward is asked of."""
        chosen: dict[Reader, list[Lane]] = {}
        responses = len(unscored)
        for hypothesis, lanes in unscored.items():
            reader, request = hypothesis.group.reader, hypothesis.request
            if reader is None or request.scores_segments and lanes[0].reading is not None:
                continue
            count = len(lanes) if request.scores_segments else max(1, reader.lanes_per_pass(
                len(lanes[0].token_ids), responses))
            chosen.setdefault(reader, []).extend(lanes[:count])
        done = []
        for reader, lanes in chosen.items():
            begin = time.perf_counter()
            readings = reader.read(lanes)
            seconds = (time.perf_counter() - begin) / len(lanes)
            for lane, (reward, per_token, kept) in zip(lanes, readings, strict=True):
                lane.per_token, lane.reading = per_token, kept
                lane.hypothesis.metrics.lm_seconds += seconds
                if not lane.hypothesis.request.scores_segments:
                    lane.reward = reward
                    done.append((lane, Scored(math.nan)))
        return done

    def _next_rewards(self, unscored: dict[Hypothesis, list[Lane]]) -> list[tuple[Lane, Scored]]:
        """Scores the next lanes of each response by the reward."""
        begin = time.perf_counter()
        chosen = self._next_lanes(unscored)
        batch = [lane for lanes in chosen.values() for lane in lanes]
        hypotheses = [lane.hypothesis for lane in batch]
        ahead, launched = self._take_ahead(batch)
        candidates: list[Candidate] = []
        if ahead is None:
            for hypothesis, lanes in chosen.items():
                candidates += self._candidates(hypothesis, lanes)
            ahead = self._scorer.score_ahead(candidates) if self._looks_ahead else None
        if ahead is None:
            return _with_handles(batch, self.score(hypotheses, candidates))
        if not launched:
            ahead.launch()
        self._look_ahead(unscored, batch)
        results = self._wait(ahead.results)
        scored = _with_handles(batch, results)
        _count(hypotheses, results, time.perf_counter() - begin)
        return scored

    def _look_ahead(self, unscored: dict[Hypothesis, list[Lane]], batch: Sequence[Lane]) -> None:
        """Prepares the pass that comes next if the one of `batch`, which the device is at, decides nothing.

        The host has nothing else to do meanwhile, and the device nothing once that pass has ended. What is scored
        whatever a rule says is launched at once, so that the device goes on without the host. What a rule that reads in
        order may not want waits for its word, and where preparing takes the host longer than a pass takes the device,
        it is not even prepared. Asking a rule and replaying a graph takes the host 0.1 ms by estimate, and a pass of an
        8B model took an H100 7.2 ms: launched early, it would pay only where fewer than one in some seventy is in vain.
        """
        taken = set(batch)
        left = {hypothesis: rest for hypothesis, lanes in unscored.items()
                if (rest := [lane for lane in lanes if lane not in taken])}
        wanted = not any([hypothesis.group.rule.in_order for hypothesis in left])
        if not self._looks_ahead or not left or (self._preparing > self._idle and not wanted):
            return
        begin = time.perf_counter()
        chosen = self._next_lanes(left)
        candidates: list[Candidate] = []
        for hypothesis, lanes in chosen.items():
            candidates += self._candidates(hypothesis, lanes)
        ahead = self._scorer.score_ahead(candidates)
        if ahead is not None:
            self._ahead = [lane for lanes in chosen.values() for lane in lanes], ahead, wanted
            self._preparing = time.perf_counter() - begin
            if wanted:
                ahead.launch()

    def _wait(self, results: Callable[..., list[Scored]], *given: list[list[int]]) -> list[Scored]:
        """Takes the results of a pass, and the time that it takes the device."""
        begin = time.perf_counter()
        scored = results(*given)
        if self._ahead is None:
            self._idle = time.perf_counter() - begin
        return scored

    def _take_ahead(self, batch: Sequence[Lane]) -> tuple[Ahead | None, bool]:
        """What was prepared, and whether it was launched, if it scores `batch`, in its order; otherwise it is dropped.
        """
        if self._ahead is None:
            return None, False
        prepared, ahead, launched = self._ahead
        self._ahead = None
        if prepared == batch:
            return ahead, launched
        ahead.drop()
        return None, False

    def trailing_pass(self, unscored: dict[Hypothesis, list[Lane]]) -> list[tuple[Lane, Scored]]:
        """The lanes that were scored without the host, with their scores."""
        if self._trailing is None:
            return []
        begin = time.perf_counter()
        batch, trailing = self._trailing
        self._look_ahead(unscored, batch)
        results = self._wait(trailing.results, [lane.hypothesis.content_ids(lane) for lane in batch])
        self._trailing = None
        scored = _with_handles(batch, results)
        _count([lane.hypothesis for lane in batch], results, time.perf_counter() - begin)
        return scored

    def drop_ahead(self) -> None:
        """What was prepared for lanes that are not scored any more gives back what it took."""
        self._take_ahead([])


def _within_budgets(ended: Sequence[Winner]) -> list[Winner]:
    """Those of `ended` whose requests may have another reward; the others end without one, for want of it."""
    left: dict[Request, float] = {}
    scored = []
    for winner in ended:
        request = winner.hypothesis.request
        left[request] = left.get(request, calls_left(request)) - 1
        if left[request] >= 0:
            scored.append(winner)
        else:
            winner.finish_reason, winner.stop_reason = "budget", None
    return scored


def late(scored: Scored) -> bool:
    """Whether a reward is still to come."""
    return isinstance(scored.reward, Future) and not scored.reward.done()


def usable(reward: float | RewardError | Later) -> float | str:
    """A reward that is there, or why it cannot be used."""
    if type(reward) is float and reward < math.inf:  # no NaN either
        return reward
    reward = settled(reward)
    fault = reward_problem(reward)
    if fault is not None:
        return fault
    assert not isinstance(reward, RewardError)
    return reward


def _with_handles(batch: Sequence[Lane], results: Sequence[Scored]) -> list[tuple[Lane, Scored]]:
    """Lanes with their scores; each keeps what the reward keeps of it."""
    for lane, result in zip(batch, results, strict=True):
        lane.score_handle = result.handle
        if result.per_token and lane.hypothesis.group.reader is None:
            lane.per_token = result.per_token
    return list(zip(batch, results, strict=True))


def _count(hypotheses: Sequence[Hypothesis], results: Sequence[Scored], seconds: float) -> None:
    """Adds scores that took `seconds` to the metrics of each candidate's response."""
    for hypothesis, result in zip(hypotheses, results, strict=True):
        metrics = hypothesis.metrics
        metrics.rm_seconds += seconds / len(results)
        metrics.rm_calls += 1
        metrics.rm_tokens_scored += result.tokens_run
        metrics.rm_tokens_full_rescore += result.tokens_full
