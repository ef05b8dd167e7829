"""Prompts on their way into both caches, and what was committed before: in chunks, first come, first served."""

from __future__ import annotations

from collections.abc import Sequence

from stars.cache import BlockTable, PagedCache
from stars.config import EngineConfig
from stars.errors import RewardError
from stars.logprobs import PromptLogprobs
from stars.models import Models, Piece
from stars.request import Hypothesis, PromptContext
from stars.reward.base import Progress, Reward
from stars.streams import SideStream

Job = tuple[BlockTable, Sequence[int], int]
"""As `Passes.prefill` takes them."""


class Allowance:
    """Rows of prompts that one model may still run in a round. left: None where there is no bound."""

    def __init__(self, rows: int | None):
        self.left = rows
        self.used = 0

    def take(self, rows: int) -> None:
        """Counts rows that were run."""
        self.used += rows
        if self.left is not None:
            self.left = max(0, self.left - rows)

    def fits(self, rows: int) -> bool:
        """Whether a piece of so many rows, which cannot be divided, may be run. The first of a round always may."""
        return self.left is None or rows <= self.left or not self.used


class Prefiller:
    """Runs what responses that were admitted begin with through both models, a bounded number of rows at a time.

    Each model has a queue of its own, in the order of admission. What was begun goes before what was not. The two
    models' passes of a round are launched side by side.
    """

    def __init__(self, cache: PagedCache, reward: Reward | None, models: Models, config: EngineConfig):
        self._cache = cache
        self._reward = reward
        self._models = models
        self._exact = config.deterministic
        # Two models have buffers, graphs and workspaces of their own. One that is both has not, and its engines' lock
        # tells; rewards that say nothing of their models run where everything else does.
        locks = reward.locks if reward is not None else ()
        self._side = SideStream(config.target) if locks and models.own.decoder.lock not in locks else None

    def advance(self, hypotheses: Sequence[Hypothesis], language: Allowance, reward: Allowance) -> list[Hypothesis]:
        """Reads on for those of `hypotheses` that are being read, given in the order of their admission; returns those
        that both models have read to their end, which may draw from now on."""
        scored = [hypothesis for hypothesis in hypotheses if hypothesis.session is not None]
        if scored and self._side is not None:
            self._side.side_by_side(lambda: self._run_language(hypotheses, language),
                                    lambda: self._run_reward(scored, reward))
        else:
            self._run_language(hypotheses, language)
            if scored:
                self._run_reward(scored, reward)
        ready = [hypothesis for hypothesis in hypotheses if self._written(hypothesis) and self._scored(hypothesis)]
        for hypothesis in ready:
            hypothesis.prefill = None
        return ready

    def _written(self, hypothesis: Hypothesis) -> bool:
        """Whether the language model's pages hold all tokens but the last, which is the first input of a draft."""
        return hypothesis.reading.published == len(hypothesis.request.contexts) and self._unwritten(hypothesis) is None

    def _unwritten(self, hypothesis: Hypothesis) -> PromptContext | None:
        """The first of its contexts whose pages lack some of what was committed."""
        return next((context for context in hypothesis.contexts
                     if context.table.length < hypothesis.length(context)), None)

    def _scored(self, hypothesis: Hypothesis) -> bool:
        """Whether the reward's session, if there is one, holds the response so far."""
        if hypothesis.session is None:
            return True
        return hypothesis.reading.started and hypothesis.reading.resumed == self._to_resume(hypothesis)

    def _to_resume(self, hypothesis: Hypothesis) -> int:
        """Tokens of the response that its session takes up. One that is scored at its end grows there then."""
        return len(hypothesis.token_ids) if hypothesis.request.plan.score.when == "segment" else 0

    def _run_language(self, hypotheses: Sequence[Hypothesis], allowance: Allowance) -> None:
        if self._exact:
            self._recompute(hypotheses, allowance)
        unread = [(hypothesis, index, context) for hypothesis in hypotheses
                  for index, context in enumerate(hypothesis.contexts) if index >= hypothesis.reading.published]
        if not unread:
            return
        jobs: list[Job] = []
        for hypothesis, _, context in unread:
            ids = context.prompt_ids + ([] if self._exact else hypothesis.token_ids)
            jobs.append((context.table, ids, len(ids) - 1))
        for told, those in _batches(unread, jobs):
            allowance.take(self._models.tell(those[0], told, allowance.left) if told is not None else
                           self._models.prefill(those, allowance.left))
            if any([table.length < stop for table, _, stop in those]):  # nobody overtakes who came before
                break
        for (hypothesis, index, _), (table, token_ids, stop) in zip(unread, jobs, strict=True):
            if table.length == stop and index == hypothesis.reading.published:
                self._cache.publish(table, token_ids[:stop])
                hypothesis.reading.published += 1

    def _recompute(self, hypotheses: Sequence[Hypothesis], allowance: Allowance) -> None:
        """Runs what was committed through the language model again as it was drafted, a segment at a time in slabs.

        So every key has the bits that it had: attention adds up what lies in pages and what lies in a slab apart.
        """
        def waits() -> list[tuple[Hypothesis, PromptContext]]:
            """A context at a time of each: there is a slab for each."""
            return [(one, context) for one in hypotheses if one.reading.published == len(one.request.contexts)
                    and (context := self._unwritten(one)) is not None]

        while waiting := waits():
            pieces = []
            for hypothesis, context in waiting:
                first, begin = context.table.length, len(context.prompt_ids) - 1
                stop = next(begin + end for end in hypothesis.ends if begin + end > first)
                if not allowance.fits(stop - first):
                    break
                allowance.take(stop - first)
                pieces.append((hypothesis, context, first, stop))
            if not pieces:
                return
            slabs = [self._cache.take_slab() for _ in pieces]
            self._models.recompute([
                Piece(context.table, (context.prompt_ids + hypothesis.token_ids)[first:stop], slab,
                      context.table.stores)
                for (hypothesis, context, first, stop), slab in zip(pieces, slabs, strict=True)])
            for slab in slabs:
                self._cache.return_slab(slab)

    def _run_reward(self, hypotheses: Sequence[Hypothesis], allowance: Allowance) -> None:
        assert self._reward is not None
        if not self._resume([hypothesis for hypothesis in hypotheses if hypothesis.reading.started], allowance):
            return
        new = [hypothesis for hypothesis in hypotheses if not hypothesis.reading.started]
        if not new:
            return
        progress = self._reward.start_in_chunks([hypothesis.session for hypothesis in new], allowance.left)
        self._count(progress, allowance, "start_in_chunks")
        started = new[: progress.done]
        for hypothesis in started:
            hypothesis.reading.started = True
        self._resume(started, allowance)

    def _resume(self, hypotheses: Sequence[Hypothesis], allowance: Allowance) -> bool:
        """Lets sessions that have started take up what was committed; False where no more rows are left for that."""
        assert self._reward is not None
        for hypothesis in hypotheses:
            reading, stop = hypothesis.reading, self._to_resume(hypothesis)
            while reading.resumed < stop:
                end = next(end for end in hypothesis.ends if end > reading.resumed) if self._exact else stop
                ids = hypothesis.token_ids[:end]
                text = hypothesis.request.detokenizer.decode(ids) if self._reward.needs_text else None
                # In deterministic mode what was committed together is run together.
                rows = None if self._exact and not allowance.used else allowance.left
                progress = self._reward.resume_in_chunks(hypothesis.session, ids, text, rows)
                self._count(progress, allowance, "resume_in_chunks")
                if not progress.done:
                    return False
                reading.resumed = end
        return True

    def _count(self, progress: Progress, allowance: Allowance, method: str) -> None:
        """Takes what a reward has run; RewardError where nobody else has to be waited for and it has done nothing."""
        if allowance.left is None and not progress.done and not progress.rows:
            raise RewardError(f"{type(self._reward).__name__}.{method} has done nothing although max_rows is None: let "
                              "it do all that it is asked")
        allowance.take(progress.rows)


def _batches(unread: Sequence[tuple[Hypothesis, int, PromptContext]], jobs: Sequence[Job]
             ) -> list[tuple[PromptLogprobs | None, list[Job]]]:
    """What is read together, in order: who tells of a prompt what the model says of it is read by itself."""
    batches: list[tuple[PromptLogprobs | None, list[Job]]] = []
    for (hypothesis, context, _), job in zip(unread, jobs, strict=True):
        told = hypothesis.request.prompt_told if hypothesis is hypothesis.request.teller and context == 0 else None
        if told is not None and told.complete:
            told = None
        if told is None and batches and batches[-1][0] is None:
            batches[-1][1].append(job)
        else:
            batches.append((told, [job]))
    return batches
