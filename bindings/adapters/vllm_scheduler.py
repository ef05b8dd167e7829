"""A scheduler for vLLM that withholds a segment until it is accepted, and rewinds in place where it is not.

    vllm serve MODEL --scheduler-cls stars.adapters.vllm_scheduler.StarsScheduler \\
        --additional-config '{"stars_reward": "DIRECTORY or module:attribute"}'

Experimental: it rests on insides of vLLM and takes no version but those that it was tried with. See
docs/vllm_scheduler.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from vllm import __version__ as vllm_version

from stars.adapters.vllm_hook import check_setting, check_version, open_judge, unsupported

check_version(vllm_version)  # before what another version may lack

# ruff: noqa: E402
from vllm.logger import init_logger
from vllm.sampling_params import SamplingType
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from stars.adapters.scoring import usable
from stars.adapters.vllm_request import Complete, Held, Terms, joined, sample_of, terms_of
from stars.bindings.controller import Controller, Fed, Verdict
from stars.errors import RequestError, RewardError, StarsError, sentence
from stars.prompt import parse_prompt
from stars.reward.base import Candidate, Scored

logger = init_logger("vllm.stars")


class StarsScheduler(Scheduler):  # type: ignore[misc]  # no types where vLLM is not installed
    """vLLM's scheduler, with STARS for the requests that ask for it: `SamplingParams(extra_args={"stars": {...}})`.

    Of those it keeps back the tokens of the segment that is being drafted; when that is complete the reward is asked
    and libstars' controller decides. What is rejected is cut off the request's tokens and block hashes, and what is
    computed ends one token before what is committed: that token is run again, as it would be for the next token
    anyway, and draws anew. The blocks are kept. All other requests are scheduled as ever.

    StarsError at the start where this vLLM, or how it was set up, cannot do that.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_setting(self)
        self._vocab_size: int = self.vllm_config.model_config.get_vocab_size()
        self._scoring, self._max_segment_size = open_judge(self.vllm_config)
        self._held: dict[str, Held] = {}
        self._later: deque[tuple[Request, Terms]] = deque()  # for which the reward has no room yet
        self._advanced: list[Held] = []  # that have a token more since the last settlement
        self._told: list[tuple[int, EngineCoreOutput]] = []
        _withhold(self.kv_cache_manager, self._held)

    # -- what vLLM calls ---------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """As vLLM's; a request whose "stars" cannot be had ends at once with the finish reason "error"."""
        params = request.sampling_params
        terms = None
        try:
            if params is not None:
                terms = terms_of(params.extra_args, params.seed)
            if terms is None:
                super().add_request(request)
                return
            fault = unsupported(request)
            if fault is not None:
                raise RequestError(f"this request cannot be aligned, as {fault}")
            if terms.law.segment_size > self._max_segment_size:
                raise RequestError(f"segment_size is {terms.law.segment_size} and the reward has room for "
                                   f"{self._max_segment_size} tokens: raise stars_max_segment_size")
        except StarsError as error:
            super().add_request(request)
            self._fail(request, error)
            return
        self._later.append((request, terms))
        self._admit()

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """As vLLM's."""
        if request_ids is not None:
            request_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        for entry in list(self._later):
            if request_ids is None or entry[0].request_id in request_ids:
                self._later.remove(entry)
                super().add_request(entry[0])  # which is how vLLM knows what is to end
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        return ended

    def get_request_counts(self) -> tuple[int, int]:
        """As vLLM's."""
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._later)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """As vLLM's; and masks of one token each, by which the worker draws again what won although it was rejected."""
        output = super().get_grammar_bitmask(scheduler_output)
        forced = [(request_id, held.replay[held.request.num_output_tokens - held.committed])
                  for request_id, held in self._held.items()
                  if held.replay is not None and request_id in scheduler_output.num_scheduled_tokens
                  and not held.request.is_prefill_chunk]
        return _with_tokens(output, forced, self._vocab_size) if forced else output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput,
                           ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's; then the segments that are complete are judged, and what was accepted is told."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        if self._advanced or self._told:
            self._settle(model_runner_output)
            for client, output in self._told:
                outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
            self._told.clear()
        return outputs

    def _update_request_with_output(self, request: Request, new_token_ids: list[int], is_stale: bool = False,
                                    ) -> tuple[list[int], bool]:
        held = self._held.get(request.request_id)
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        if held is None:
            return new_token_ids, stopped
        if stopped:  # that is for the reward to say
            held.stopped, held.stop_reason = request.status, request.stop_reason
            request.status, request.stop_reason = RequestStatus.RUNNING, None
        self._advanced.append(held)
        return [], False

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        held = self._held.pop(request.request_id, None)
        if held is not None:
            self._close(held)
        freed = super()._free_request(request, delay_free_blocks)
        if self._later:
            self._admit()
        return freed

    # -- segments ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Hands over what waits for room in the reward's cache, the first ones first, as far as there is some."""
        while self._later:
            request, terms = self._later[0]
            try:
                prompt = parse_prompt({"prompt_token_ids": request.prompt_token_ids}, self._scoring.tokenizer,
                                      self._vocab_size)
                session = self._scoring.open(prompt, request.max_tokens)
                if session is None and self._held:
                    return
                if session is None:
                    raise RewardError("the reward model's cache is too small for this prompt and max_tokens: lower "
                                      "max_tokens, or raise stars_cache_tokens")
            except StarsError as error:
                self._later.popleft()
                super().add_request(request)
                self._fail(request, error)
                continue
            self._later.popleft()
            self._held[request.request_id] = Held(request, terms, session)
            super().add_request(request)

    def _settle(self, runner_output: ModelRunnerOutput) -> None:
        """Judges what is complete, all requests together."""
        advanced = [held for held in self._advanced if held.request.request_id in self._held]
        self._advanced.clear()
        for held in advanced:
            if held.request.sampling_params.num_logprobs is not None and runner_output.logprobs:
                index = runner_output.req_id_to_index[held.request.request_id]
                held.logprobs.append(runner_output.logprobs.slice_request(index, 1))
        self._start([held for held in advanced if held.controller is None])
        due = [held for held in advanced if held.controller is not None and held.due]
        fresh = [held for held in due if held.replay is None]
        for held in due:
            if held.replay is not None:
                self._replayed(held)
        for held, result in zip(fresh, self._score(fresh), strict=True):
            try:
                reward = usable(result)
            except RewardError as error:
                self._scoring.discard(result.handle)
                self._fail(held.request, error)
            else:
                self._decide(held, reward, result.handle)

    def _start(self, begun: Sequence[Held]) -> None:
        """Their prompts are read by the reward, and their laws begin."""
        for held in begun:
            law = held.terms.law
            try:
                self._scoring.start(held.session)
                prompt_reward = self._scoring.prompt_reward(held.session) if law.reads_prompt else 0.0
                held.controller = law.controller(
                    seed=held.terms.seed, sample=sample_of(held.request.request_id), max_tokens=held.request.max_tokens,
                    prompt_reward=prompt_reward,
                    greedy=held.request.sampling_params.sampling_type == SamplingType.GREEDY)
                held.drawn = held.controller.next(1)[0]
            except Exception as error:  # a fault of the reward ends this request and no other
                self._fail(held.request, error)

    def _score(self, fresh: Sequence[Held]) -> list[Scored]:
        return self._scoring.score([self._candidate(held) for held in fresh]) if fresh else []

    def _candidate(self, held: Held) -> Candidate:
        """The whole response with what was drafted, as a reward reads it: without the token that ended it."""
        ids = list(held.request.output_token_ids)
        stopped = ids.pop() if held.stopped == RequestStatus.FINISHED_STOPPED else None
        if not self._scoring.needs_text:
            return Candidate(held.session, ids, None, stopped=stopped)
        text = None if self._scoring.tokenizer is None else self._scoring.tokenizer.decode(ids)
        return Candidate(held.session, ids, text, False, held.stopped is not None, stopped)

    def _decide(self, held: Held, reward: float, handle: Any) -> None:
        controller, drawn = held.controller, held.drawn
        assert controller is not None and drawn is not None
        draft = Complete(drawn.attempt, held.drafted, held.logprobs, handle)
        decided = controller.feed([Fed(drawn.attempt, len(draft.token_ids), held.stopped is not None, reward)])
        done = decided.verdict in (Verdict.ACCEPT, Verdict.FALLBACK)
        if decided.best == drawn.attempt or done and decided.winner == drawn.attempt:
            held.best, draft = draft, held.best
        if draft is not None:
            self._scoring.discard(draft.handle)
        assert held.best is not None
        if done and decided.winner == drawn.attempt:
            self._commit(held)
            return
        self._rewind(held)
        if done:
            held.replay = held.best.token_ids
        else:
            held.drawn = controller.next(1)[0]

    def _replayed(self, held: Held) -> None:
        """The worker has drawn again what won; held are the log-probabilities of when it was drawn first."""
        assert held.best is not None
        if held.drafted != held.replay:
            self._fail(held.request, RewardError("vLLM's worker did not draw the tokens it was told to"))
            return
        held.logprobs = held.best.logprobs
        self._commit(held)

    def _rewind(self, held: Held) -> None:
        """The request is as it was when its segment began; it keeps its blocks. The worker cuts its own record where
        it is told of fewer output tokens than it has."""
        request = held.request
        kept = request.num_prompt_tokens + held.committed
        del request._output_token_ids[held.committed:]
        del request._all_token_ids[kept:]
        del request.block_hashes[kept // self.hash_block_size:]
        request.num_computed_tokens = min(request.num_computed_tokens, kept - 1)
        held.logprobs, held.stopped, held.stop_reason = [], None, None

    def _commit(self, held: Held) -> None:
        """The segment is history: it is told, its blocks may be found by others, and the next one begins."""
        controller, request, winner = held.controller, held.request, held.best
        assert controller is not None and winner is not None
        self._scoring.commit(held.session, winner.handle)
        controller.commit()
        tokens, logprobs = held.drafted, held.logprobs
        held.committed += len(tokens)
        held.logprobs, held.best, held.replay = [], None, None
        self.kv_cache_manager.cache_blocks(request, held.cacheable)
        prefill_stats = request.take_prefill_stats()
        if prefill_stats is not None:
            prefill_stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))
        progress = None
        if held.stopped is None:
            held.drawn = controller.next(1)[0]
        else:
            request.stop_reason, progress = held.stop_reason, _shown(controller)
            self.finish_requests(request.request_id, held.stopped)
        self._tell(request, new_token_ids=tokens, new_logprobs=joined(logprobs) if logprobs else None,
                   prefill_stats=prefill_stats, num_nans_in_logits=request.num_nans_in_logits,
                   kv_transfer_params=progress)

    def _fail(self, request: Request, error: Exception) -> None:
        """Ends it with the finish reason "error"; the stop reason says why."""
        request.stop_reason = sentence(error)
        logger.warning("request %s ends: %s", request.request_id, request.stop_reason)
        self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
        self._tell(request, new_token_ids=[])

    def _tell(self, request: Request, **fields: Any) -> None:
        self._told.append((request.client_index, EngineCoreOutput(
            request_id=request.request_id, finish_reason=request.get_finished_reason(),
            stop_reason=request.stop_reason, events=request.take_events(), trace_headers=request.trace_headers,
            **fields)))

    def _close(self, held: Held) -> None:
        if held.controller is not None:
            held.controller.close()
        if held.best is not None:
            self._scoring.discard(held.best.handle)
        self._scoring.close(held.session)


def _shown(controller: Controller) -> dict[str, Any]:
    """What became of a response, under a key of its own in the only dictionary that vLLM hands on."""
    progress = controller.progress()
    return {"stars": {name: getattr(progress, name) for name in
                      ("reward", "segments", "accepted", "fallbacks", "attempts", "attempts_counted", "tokens_drawn")}}


def _withhold(manager: KVCacheManager, held: dict[str, Held]) -> None:
    """Makes blocks of `held` requests known to others only up to what no rewind writes again, and shares with them no
    more than that of others'."""
    allocate, find = manager.allocate_slots, manager.get_computed_blocks

    def allocate_slots(request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0,
                       *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        one = held.get(request.request_id)
        if one is None:
            return allocate(request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)
        blocks = allocate(request, num_new_tokens, num_new_computed_tokens, *args,
                          **{**kwargs, "delay_cache_blocks": True})
        if blocks is not None:
            reached = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens
            manager.cache_blocks(request, min(reached, one.cacheable))
        return blocks

    def get_computed_blocks(request: Request) -> tuple[KVCacheBlocks, int, int]:
        blocks, tokens, boundary = find(request)
        one = held.get(request.request_id)
        if one is not None and tokens > one.cacheable:
            block_size = manager.coordinator.single_type_managers[0].block_size
            tokens = one.cacheable // block_size * block_size
            blocks = manager.truncate_computed_blocks(blocks, tokens)
        return blocks, tokens, boundary

    manager.allocate_slots, manager.get_computed_blocks = allocate_slots, get_computed_blocks


def _with_tokens(output: GrammarOutput | None, forced: Sequence[tuple[str, int]], vocab_size: int) -> GrammarOutput:
    """`output`, and for each of these requests a mask in which one token is left."""
    import numpy

    masks = numpy.zeros((len(forced), (vocab_size + 31) // 32), numpy.int32)
    for row, (_, token) in enumerate(forced):
        masks.view(numpy.uint32)[row, token // 32] = 1 << token % 32
    ids, drafts = [request_id for request_id, _ in forced], [0] * len(forced)
    if output is None:
        return GrammarOutput(ids, masks, drafts)
    theirs = output.num_acceptable_drafts
    return GrammarOutput([*output.structured_output_request_ids, *ids],
                         numpy.concatenate([output.grammar_bitmask, masks]),
                         None if theirs is None else [*theirs, *drafts])
