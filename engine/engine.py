"""The engine: models, caches and the queue of requests behind the public calls."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.determinism import check_row_invariance
from stars.device import check_fit
from stars.draft import MAX_STOP_IDS, Drafter
from stars.errors import IntegrityError, ModelError, RequestError, StarsError
from stars.kernels.philox import MAX_SAMPLE
from stars.model.config import load_config
from stars.model.loader import load_model
from stars.model.tokenizer import load_tokenizer
from stars.outputs import RequestOutput
from stars.passes import Passes
from stars.policies import Policy, Sample
from stars.prompt import parse_prompt
from stars.request import Hypothesis, Request
from stars.reward import resolve_reward
from stars.reward.base import Limits
from stars.round import Round
from stars.sampling import SamplingParams
from stars.width import WidthChooser

LOW_ACCEPT_RATE = 0.02
"""Below this, over at least LOW_ACCEPT_ATTEMPTS attempts, the threshold is reported as out of the reward's reach."""
LOW_ACCEPT_ATTEMPTS = 100


class Engine:
    """A language model and whatever scores it, decoding any number of requests together.

    model: a Hugging Face directory, or a Decoder (then give `tokenizer` too, if there is one).
    reward: a directory of a one-label sequence-classification model, a Reward (`CausalReward`, `EncoderReward`,
        `FunctionReward`), a callable fn(prompt, responses) -> floats, or None for plain sampling only.
    device: "auto" (the CPU, in this release), "cpu" or "cuda". dtype: "auto", "float32", "bfloat16", or on a GPU
        "float16". On the CPU it is that of the stored matrices ("auto" keeps the checkpoint's values); "bfloat16" also
        rounds the activations of their products where the CPU multiplies bfloat16 pairs (AVX512-BF16): about twice as
        fast at many rows on a Zen 4, slower than float32 on the Xeon that was measured. Sums, attention, norms and
        caches are float32. On a GPU everything has the dtype ("auto": the checkpoint's).
    deterministic: promises the same text for the same seed at any width and in any batch. Checked here; raises
        ModelError where the arithmetic at hand cannot keep the promise.
    The other arguments are those of `EngineConfig`.

    Construction and calls are made from one thread. Raises ModelError, TokenizerError, RewardError or ValueError.
    """

    @torch.inference_mode(False)  # what is allocated here is written outside the caller's inference mode, too
    def __init__(self, model: Any, reward: Any = None, *, tokenizer: Any = None, device: str = "auto",
                 dtype: str = "auto", deterministic: bool = False, **limits: int | str | None):
        if hasattr(model, "forward"):
            self.config = EngineConfig.resolve(model.config, device, dtype, deterministic, **limits)
            decoder = model
        else:
            if not isinstance(model, (str, Path)):
                raise ModelError(f"model is {type(model).__name__}, it must be a model directory or a Decoder")
            # Everything that can be refused is refused before any weight is read.
            self.config = EngineConfig.resolve(load_config(model), device, dtype, deterministic, **limits)
            reward = resolve_reward(reward)
            check_fit(self.config, model, reward)
            decoder = load_model(model, dtype=self.config.dtype, device=self.config.device, head="lm",
                                 deterministic=deterministic, max_model_len=self.config.max_model_len)
            tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
        config = self.config
        decoder.check_device(config.device, "the model")
        if deterministic:
            check_row_invariance(decoder)
        self.model_config = decoder.config
        self.tokenizer = tokenizer
        self.reward = resolve_reward(reward)
        shape = self.model_config
        self._cache = PagedCache(
            shape.num_layers, shape.num_kv_heads, shape.head_dim, page_size=config.page_size,
            num_pages=config.num_pages, num_slabs=config.max_num_lanes + config.max_num_seqs,
            slab_len=config.max_segment_size, dtype=decoder.dtype, device=config.device)
        self._passes = Passes(decoder, self._cache, config.max_num_seqs, config.max_model_len, config.padded,
                              deterministic, config.prefill_backend)
        drafter = Drafter(decoder, self._cache, config.max_num_lanes, config.max_num_seqs, config.max_segment_size,
                          config.max_model_len, config.padded, deterministic)
        if self.reward is not None:
            self.reward.bind(tokenizer, shape.vocab_size, Limits(
                config.cache_tokens, config.page_size, config.max_num_seqs, config.max_num_lanes,
                config.max_segment_size, config.device, config.dtype, deterministic, config.padded,
                config.prefill_backend))
        chooser = WidthChooser(drafter.step_seconds, config.max_num_lanes)
        if self.reward is not None and config.padded:
            # At start-up on a GPU, which also compiles and captures steps. On the CPU a step of a large model can take
            # seconds: there each count waits until a policy leaves its width to the engine.
            chooser.measure()
        self._round = Round(drafter, self._cache, self.reward, chooser, config.max_num_lanes)
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Hypothesis] = deque()
        self._running: list[Hypothesis] = []
        self._changed: dict[str, Request] = {}  # since the last step, in order; their outputs are built when fetched
        self._owned: dict[str, Request | None] = {}  # those of generate and stream; None: no news since the last look
        self._ids = itertools.count()
        self._warned: set[Policy] = set()

    # -- whole calls ----------------------------------------------------------------------------------------------

    def generate(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
                 policy: Policy | Sequence[Policy] | None = None,
                 use_tqdm: bool | Callable[..., tqdm] = True) -> list[RequestOutput]:
        """Completes every prompt; one RequestOutput a prompt, in order.

        prompts: a string, {"prompt_token_ids": [...]}, {"messages": [...]}, or a list of those. sampling_params and
        policy: one for all, or a list with one for each prompt. Every input is checked before any work: RequestError
        names the index of the prompt at fault. What fails later ends that request with finish_reason "error".
        """
        prompts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
        params = _one_each("sampling_params", sampling_params, len(prompts))
        policies = _one_each("policy", policy, len(prompts))
        requests = []
        for index, prompt in enumerate(prompts):
            try:
                requests.append(self._parse(prompt, params[index], policies[index], None))
            except StarsError as error:
                raise RequestError(f"prompts[{index}]: {error}") from error
        progress = tqdm if use_tqdm is True else use_tqdm
        bar = progress(total=len(requests), desc="Processed prompts", dynamic_ncols=True) if progress else None
        ids = [request.request_id for request in requests]
        finished = 0
        try:
            for request in requests:
                self._enqueue(request, owned=True)
            while any(request_id in self._requests for request_id in ids):
                self._advance()
                done = sum(request_id not in self._requests for request_id in ids)
                if bar is not None:
                    bar.update(done - finished)
                finished = done
            return [request.output() for request in requests]
        finally:
            if bar is not None:
                bar.close()
            self._disown(ids)

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None,
               policy: Policy | None = None) -> Iterator[RequestOutput]:
        """Yields the output of one prompt each time a segment was committed; each output is cumulative.

        Text that may still change is held back: an incomplete character, a possible start of a stop string. The prompt
        is checked at the call (RequestError); closing the iterator early aborts the request.
        """
        request = self._parse(prompt, sampling_params, policy, None)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        request_id = request.request_id
        try:
            self._enqueue(request, owned=True)
            while True:
                if self._owned[request_id] is None:
                    self._advance()
                    continue
                self._owned[request_id] = None
                output = request.output()
                yield output
                if output.finished:
                    return
        finally:
            self._disown([request_id])

    def calibrate(self, prompts: Any, sampling_params: SamplingParams | None = None, quantile: float = 0.9,
                  num_samples: int = 16, use_tqdm: bool | Callable[..., tqdm] = False) -> float:
        """A reward_threshold for these prompts: a quantile of the rewards of finished plain samples.

        sampling_params: as for the run to come; its `n` is replaced by `num_samples`.
        """
        if not 0.0 <= quantile <= 1.0:
            raise RequestError(f"quantile is {quantile}, it must be between 0 and 1")
        rewards = self.sample_rewards(prompts, sampling_params, num_samples, use_tqdm)
        return float(np.quantile(rewards, quantile))

    def sample_rewards(self, prompts: Any, sampling_params: SamplingParams | None = None, num_samples: int = 16,
                       use_tqdm: bool | Callable[..., tqdm] = False) -> list[float]:
        """Rewards of `num_samples` finished plain samples of every prompt; what `calibrate` takes its quantile of."""
        params = dataclasses.replace(sampling_params or SamplingParams(), n=num_samples)
        outputs = self.generate(prompts, params, Sample(score=True), use_tqdm=use_tqdm)
        for output in outputs:
            for completion in output.outputs:
                if completion.error is not None:
                    raise RequestError(f"a sample of {output.prompt!r} could not be scored: {completion.error}")
        return [completion.reward for output in outputs for completion in output.outputs]

    # -- step by step ---------------------------------------------------------------------------------------------

    def add_request(self, prompt: Any, sampling_params: SamplingParams | None = None, policy: Policy | None = None,
                    *, request_id: str | None = None) -> str:
        """Queues a request and returns its id; RequestError or RewardError if it can never run as it stands."""
        request = self._parse(prompt, sampling_params, policy, request_id)
        self._enqueue(request, owned=False)
        return request.request_id

    def step(self) -> list[RequestOutput]:
        """Admits what fits, runs one round, and returns the outputs that changed since the last step."""
        self._advance()
        changed, self._changed = self._changed, {}
        return [request.output() for request in changed.values()]

    def abort(self, request_id: str) -> bool:
        """Ends a request with finish_reason "abort", keeping what was committed; False if there is none of that id.

        The next `step` returns its last output.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        for hypothesis in request.hypotheses:
            if hypothesis.finish_reason is None:
                self._round.finish(hypothesis, "abort")
        self._settle([request])
        return True

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do or to return."""
        return bool(self._requests or self._changed)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every page and slab of both models is accounted for."""
        held = sum(1 for hypothesis in self._running if hypothesis.best is not None)
        self._cache.check_integrity(slabs_out=held)
        if self.reward is not None:
            self.reward.check_integrity()

    # -- the queue ------------------------------------------------------------------------------------------------

    def _parse(self, given: Any, params: SamplingParams | None, policy: Policy | None,
               request_id: str | None) -> Request:
        """A checked request that is not queued yet."""
        params = params if params is not None else SamplingParams()
        policy = policy if policy is not None else Sample()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is {type(params).__name__}, it must be a stars.SamplingParams")
        if isinstance(policy, type) or not hasattr(policy, "plan"):
            name = policy.__name__ if isinstance(policy, type) else type(policy).__name__
            raise RequestError(f"policy is {name}, it must be an object such as stars.STARS(reward_threshold=1.0)")
        plan = policy.plan()
        if plan.scoring != "never" and self.reward is None:
            raise RequestError(f"{type(policy).__name__} needs a reward: build the engine with Engine(model, "
                               "reward=...)")
        if plan.segment_size > self.config.max_segment_size:
            raise RequestError(f"segment_size is {plan.segment_size} and the engine's slabs hold "
                               f"{self.config.max_segment_size} tokens: build it with a larger max_segment_size")
        if params.n * plan.candidates > MAX_SAMPLE + 1:
            raise RequestError(f"n times the policy's candidates is {params.n * plan.candidates}, the most is "
                               f"{MAX_SAMPLE + 1}: split the request")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, which the model directory lacks: use stop_token_ids")
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        stop_ids = tuple(dict.fromkeys(eos + params.stop_token_ids))
        if len(stop_ids) > MAX_STOP_IDS:
            raise RequestError(f"there are {len(stop_ids)} EOS and stop token ids, the most is {MAX_STOP_IDS}: "
                               "give fewer")
        vocab_size = self.model_config.vocab_size
        prompt = parse_prompt(given, self.tokenizer, vocab_size)
        needed = len(prompt.token_ids) + params.max_tokens
        if needed > self.config.max_model_len:
            raise RequestError(f"the prompt of {len(prompt.token_ids)} tokens and max_tokens={params.max_tokens} make "
                               f"{needed}, the limit is {self.config.max_model_len} "
                               f"({self.config.max_model_len_from}): shorten the prompt or lower max_tokens")
        if plan.scoring != "never":
            self.reward.check(prompt, params.max_tokens)
        if request_id is None:
            request_id = next(id for id in map(str, self._ids) if not self._in_use(id))
        elif self._in_use(request_id):
            raise RequestError(f"request id {request_id!r} is in use: choose another")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return Request(request_id, prompt, params, policy, plan, seed, stop_ids, tuple(eos), self.tokenizer)

    def _in_use(self, request_id: str) -> bool:
        return request_id in self._requests or request_id in self._owned or request_id in self._changed

    def _enqueue(self, request: Request, owned: bool) -> None:
        if owned:
            self._owned[request.request_id] = None
        self._requests[request.request_id] = request
        self._waiting += request.hypotheses

    def _disown(self, request_ids: Sequence[str]) -> None:
        """Ends what is still unfinished of them and forgets their outputs."""
        for request_id in request_ids:
            self.abort(request_id)
            self._owned.pop(request_id, None)

    def _advance(self) -> None:
        self._admit()
        if not self._running:
            return
        changed = self._round.run(self._running)
        self._settle({hypothesis.request.request_id: hypothesis.request for hypothesis in changed}.values())

    def _settle(self, requests: Any) -> None:
        """Closes what finished hypotheses held and hands out the outputs of `requests`."""
        requests = list(requests)
        for request in requests:
            for hypothesis in request.hypotheses:
                if hypothesis.finish_reason is not None:
                    self._close(hypothesis)
        self._running = [hypothesis for hypothesis in self._running if hypothesis.finish_reason is None]
        self._waiting = deque(hypothesis for hypothesis in self._waiting if hypothesis.finish_reason is None)
        for request in requests:
            if request.request_id not in self._requests:
                continue
            if request.finished:
                del self._requests[request.request_id]
                self._warn_if_out_of_reach(request)
            if request.request_id in self._owned:
                self._owned[request.request_id] = request
            else:
                self._changed[request.request_id] = request

    def _close(self, hypothesis: Hypothesis) -> None:
        if hypothesis.table is not None:
            self._cache.close(hypothesis.table)
            hypothesis.table = None
        if hypothesis.session is not None:
            self.reward.close(hypothesis.session)
            hypothesis.session = None

    def _admit(self) -> None:
        """Moves waiting hypotheses, in order, into the running ones as long as their pages can be reserved."""
        opened: list[Hypothesis] = []
        beginnings: set[tuple[int, ...]] = set()
        try:
            while self._waiting and len(self._running) + len(opened) < self.config.max_num_seqs:
                hypothesis = self._waiting[0]
                if beginnings and self._beginning(hypothesis) in beginnings:
                    # It can share pages with one that was opened a moment ago, once those are written.
                    self._start(opened)
                    opened, beginnings = [], set()
                if not self._open(hypothesis):
                    break
                self._waiting.popleft()
                opened.append(hypothesis)
                beginning = self._beginning(hypothesis)
                if beginning is not None:
                    beginnings.add(beginning)
            self._start(opened)
        except BaseException:
            # An interrupted admission never happened: what was opened goes back to the head of the queue.
            for hypothesis in opened:
                self._close(hypothesis)
            self._running = [hypothesis for hypothesis in self._running if hypothesis not in opened]
            self._waiting.extendleft(h for h in reversed(opened) if h.finish_reason is None)
            self._settle({h.request.request_id: h.request for h in opened if h.request.finished}.values())
            raise
        if self._waiting and not self._running:
            raise IntegrityError("a request does not fit in an empty cache, although it was checked: this is a defect")

    def _beginning(self, hypothesis: Hypothesis) -> tuple[int, ...] | None:
        """Its prompt up to the end of the first page that cannot be shared yet; None if it fills no such page."""
        history = hypothesis.request.prompt.token_ids[:-1]
        stop = self._cache.shared_length(history) + self.config.page_size
        return tuple(history[:stop]) if len(history) >= stop else None

    def _open(self, hypothesis: Hypothesis) -> bool:
        """Reserves the pages of a whole response in both models; False, and nothing changed, if they are not free."""
        request = hypothesis.request
        history = request.prompt.token_ids[:-1]
        capacity = len(history) + request.params.max_tokens
        scored = request.plan.scoring != "never"
        if not self._cache.can_open(history, capacity):
            return False
        if scored and not self.reward.can_open(request.prompt, request.params.max_tokens):
            return False
        try:
            hypothesis.table = self._cache.open(history, capacity)
            hypothesis.metrics.prompt_tokens_cached = hypothesis.table.length
            if scored:
                hypothesis.session = self.reward.open(request.prompt, request.params.max_tokens)
        except BaseException:
            self._close(hypothesis)
            raise
        return True

    def _start(self, opened: list[Hypothesis]) -> None:
        """Runs the prompts of newly opened hypotheses through both models."""
        if not opened:
            return
        # The last prompt token is the first input of a draft.
        self._passes.prefill([(hypothesis.table, ids, len(ids) - 1)
                              for hypothesis in opened for ids in [hypothesis.request.prompt.token_ids]])
        for hypothesis in opened:
            self._cache.publish(hypothesis.table, hypothesis.request.prompt.token_ids[:-1])
        scored = [hypothesis for hypothesis in opened if hypothesis.session is not None]
        requests: list[Request] = []
        if scored:
            self.reward.start([hypothesis.session for hypothesis in scored])
            requests = list({h.request.request_id: h.request for h in scored
                             if h.request.prompt_reward is None}.values())
            self._round.prompt_rewards(requests)
        self._running += opened
        failed = [request for request in requests if request.finished]
        if failed:
            self._settle(failed)

    def _warn_if_out_of_reach(self, request: Request) -> None:
        """Says so, once a policy, when the threshold lies far outside the rewards that were seen."""
        if request.plan.decision != "threshold" or request.policy in self._warned:
            return
        metrics = [hypothesis.metrics for hypothesis in request.hypotheses]
        counted, accepted = sum(m.attempts_counted for m in metrics), sum(m.accepted for m in metrics)
        threshold = request.plan.reward_threshold
        if threshold == float("inf") or counted < LOW_ACCEPT_ATTEMPTS or accepted > LOW_ACCEPT_RATE * counted:
            return
        seen = [attempt.reward for hypothesis in request.hypotheses for segment in hypothesis.segments
                for attempt in segment.attempts if attempt.reward is not None]
        if not seen:
            return
        self._warned.add(request.policy)
        warnings.warn(f"reward_threshold={threshold:g} accepted {accepted} of {counted} attempts (the rewards seen lie "
                      f"between {min(seen):.3g} and {max(seen):.3g}): measure one with engine.calibrate(prompts)",
                      stacklevel=2)


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """`value` for each of `count` prompts, or its own items."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts: give one for all, or one for each")
    return list(value)
