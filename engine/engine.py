"""The engine: models, caches and the queue of requests behind the public calls."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from stars.arguments import integer, real, refuse_bare_prompt, refuse_keywords, refuse_others, request_ids, shown
from stars.budget import Budget
from stars.cache import PagedCache
from stars.calibration import Calibration, PlainSample, PlainSegments
from stars.chat import SpecialTokens
from stars.config import EngineConfig, allocation
from stars.determinism import check_row_invariance
from stars.draft import Drafter
from stars.errors import (
    IntegrityError,
    ModelError,
    RequestError,
    RewardError,
    StarsError,
    describe,
    log,
    sentence,
    warn,
)
from stars.fit import fit
from stars.intake import Asked, Intake, no_params
from stars.metrics import EngineMetrics
from stars.model.action_head import load_action_head
from stars.model.config import load_config
from stars.model.decoder import Decoder
from stars.model.loaded import LoadedModel, taken
from stars.model.loader import load_model
from stars.model.sharing import SharedWeights
from stars.models import Member, Models, check_heads, check_named, load_named
from stars.outputs import RequestOutput, Rewards, warn_of_errors
from stars.passes import Passes
from stars.plan import DRAFT_SIZE, Plan, Policy, plan_of
from stars.readers import Parts, Readers
from stars.request import Group, Owner, Request
from stars.response_scorer import ResponseScorer
from stars.reward.base import Later, Reward, with_parts
from stars.reward.resolve import resolve_reward
from stars.round import Round
from stars.rules import FirstAccepted, Threshold
from stars.sampling import SamplingParams
from stars.scheduler import Scheduler
from stars.score_call import ScoreCall, score_call
from stars.sizes import language_model
from stars.sources import checked_model, checked_reward, resolve_tokenizer
from stars.spans import Spans, parent_of
from stars.target import device_of
from stars.turns import Turns, one_at_a_time
from stars.vllm_names import CALL, ENGINE
from stars.waiting import pause
from stars.width import WidthChooser

logger = logging.getLogger(__name__)

LOW_ACCEPT_RATE = 0.02
"""Below this, over at least LOW_ACCEPT_ATTEMPTS attempts, the threshold is reported as out of the reward's reach."""
LOW_ACCEPT_ATTEMPTS = 100
ALONE_SECONDS = 5.0
"""How long a completion that is run by itself, after a round that raised, may wait for rewards in its caller's turn."""
MAX_WARNED = 100  # policies that are remembered, and warned of
T = TypeVar("T")


class Engine:
    """A language model and whatever scores it, decoding any number of requests together.

    model: a Hugging Face directory, a GGUF file, the name of either in the Hugging Face hub ("org/name@revision",
        "org/name:FILE.gguf"), a model that transformers has loaded (see `from_transformers`), or a Decoder (then give
        `tokenizer` too, if there is one).
    tokenizer: a directory with a tokenizer.json, a GGUF file, or a fast tokenizer of transformers; None: the model's
        own.
    reward: a reward model, given as `model` is, or a LoRA adapter that makes one of `model`, whose weights are then
        held once; a Reward (`CausalReward`, `LoraReward`, `ProcessReward`, `EncoderReward`, `FunctionReward`,
        `ImplicitReward`, `RemoteReward`, or of others `WeightedReward`, `CachedReward`), a callable fn(prompt,
        responses) -> floats, or None for plain sampling only.
    device: "cpu", "cuda", or "auto": an NVIDIA GPU where torch finds one of compute capability 8.0 or more, Triton can
        be imported and its kernels serve the model, else the CPU; for a model in memory, where that is. A GPU compiles
        kernels at its first start, and captures graphs at each.
    dtype: "auto", "float32", "bfloat16", or on a GPU "float16"; a torch.dtype, "half" and "float" mean the same. On the
        CPU it is that of the stored matrices. "bfloat16" also rounds the activations of their products where the CPU
        multiplies bfloat16 pairs (AVX512-BF16); README.md has what that gave on two processors. "auto" keeps the
        checkpoint's values, each model its own, and is "bfloat16" for those in bfloat16 where that was measured ahead
        on such a CPU: `repr(engine)` says which. Sums, attention, norms and caches are float32. On a GPU everything has
        the dtype ("auto": the checkpoint's).
    models: other language models by name, directories or Decoders, that policies draw with or judge by: of the own
        one's vocabulary, special tokens and context. A directory may hold a LoRA adapter; what several of all the
        engine's models, rewards' included, read from one file is held once. heads: files of heads by name.
    tracer_provider: an OpenTelemetry TracerProvider, which gets a span of every request that has ended (spans.py).
    deterministic: promises the same text for the same seed at any width and in any batch. Checked here; raises
        ModelError where the arithmetic at hand cannot keep the promise.
    The other arguments are those of `EngineConfig`.

    Any thread may call: one runs, the others wait their turn, and the requests of several threads share rounds. A
    reward may not call the engine that asks it: RequestError. What stops a call in the middle, an exception or an
    interrupt, undoes the round it was in: the next call draws it again from the same random numbers, and nothing is
    lost. An exception that one request alone causes ends that request with finish_reason "error".

    `metrics` counts what it does: `engine.metrics.text()` is Prometheus' text, at any moment and from any thread.

    Construction raises ModelError, TokenizerError, RewardError or RequestError.
    """

    @torch.inference_mode(False)  # what is allocated here is written outside the caller's inference mode, too
    def __init__(self, model: Any, reward: Any = None, *, tokenizer: Any = None, device: str = "auto",
                 dtype: str = "auto", deterministic: bool = False, cache_tokens: int | None = None,
                 gpu_memory_utilization: float = 0.9, page_size: int = 16, max_model_len: int | None = None,
                 max_num_seqs: int = 64, max_num_lanes: int = 64, max_segment_size: int = 128,
                 prefill_backend: str = "auto", max_num_batched_tokens: int | None = None,
                 quantization: str | None = None, reward_quantization: str | None = None,
                 models: Mapping[str, Any] | None = None, heads: Mapping[str, Any] | None = None,
                 tracer_provider: Any = None, **others: Any):
        begin = time.perf_counter()
        refuse_keywords("Engine", others, EngineConfig.resolve, ENGINE)
        self.spans = Spans(tracer_provider, _name(model)) if tracer_provider is not None else None
        model, reward = checked_model(model), checked_reward(reward)
        given = isinstance(model, Decoder)
        # What is no number is refused below.
        reach = max_model_len if isinstance(max_model_len, int) else None
        shape = model.config if given else load_config(model).reaching(reach)
        if isinstance(model, (Decoder, LoadedModel)) and device == "auto":
            device = device_of(model.device.type)
        config = EngineConfig.resolve(
            shape, device, dtype, deterministic, cache_tokens=cache_tokens,
            gpu_memory_utilization=gpu_memory_utilization, page_size=page_size, max_model_len=max_model_len,
            max_num_seqs=max_num_seqs, max_num_lanes=max_num_lanes, max_segment_size=max_segment_size,
            prefill_backend=prefill_backend, max_num_batched_tokens=max_num_batched_tokens,
            quantization=quantization, reward_quantization=reward_quantization)
        if config.quantization is not None and given:
            raise RequestError(f'quantization is "{config.quantization}", and model is a Decoder, whose weights are '
                               "read already: give load_model(DIR, quantization=...) that")
        shared = SharedWeights(Path(model) if isinstance(model, (str, Path)) else None)
        with shared:
            self.reward = resolve_reward(reward)
        tokenizer = resolve_tokenizer(tokenizer, model)
        files = check_heads(heads)
        # Everything that can be refused is refused before any weight is read.
        action_heads = {name: load_action_head(file, shape.hidden_size, f"heads[{name!r}]", config.device,
                                               config.deterministic) for name, file in files.items()}
        with shared:
            named = check_named(models, shape, tokenizer, config)
            self.config = config = fit(config, model, self.reward, tokenizer, shape.vocab_size, named)
            decoder = model if given else load_model(
                model, dtype=config.dtype, device=config.device, head="lm", deterministic=config.deterministic,
                max_rows=1, max_model_len=config.max_model_len,  # passes and drafts reserve what they need
                quantization=config.quantization)
        decoder.check_device(config.device, "the model")
        if config.deterministic:
            check_row_invariance(decoder, config.target)
        self.model_config = decoder.config
        self.tokenizer = tokenizer
        sizes = language_model(config)
        with allocation(config), shared:
            self._cache = PagedCache(self.model_config, config, sizes, decoder.dtype)
            with decoder.lock:  # another engine may be at work with it
                passes = Passes(decoder, self._cache, config, sizes)
                drafter = Drafter(decoder, self._cache, config)
            self._models = Models(config, self._cache, Member(decoder, 0, passes), drafter,
                                  load_named(named, model, decoder, config))
            self._readers = Readers(Parts(self._models, self._cache, config, action_heads))
            if self.reward is not None:
                for reward in with_parts(self.reward):
                    self._claim(reward)
                self.reward.bind(tokenizer, self.model_config.vocab_size, config)
            cache = self._cache
            chooser = WidthChooser(drafter.step_seconds, config.max_num_lanes, lambda: cache.num_free_slabs)
            if config.target.captured_at_start:
                with decoder.lock:
                    drafter.warm_up()
                    passes.warm_up()
                    chooser.measure()
                for member in self._models.members[1:]:
                    with member.decoder.lock:
                        member.passes.warm_up()
                if self.reward is not None:
                    self.reward.warm_up(drafter.device_draft)
        self._round = Round(self._models, self._cache, self.reward, chooser, config)
        self._scheduler = Scheduler(self._cache, self.reward, self._models, self._round, config)
        self._intake = Intake(config, self.model_config, tokenizer, self.reward, self._models, self._readers,
                              self._scheduler)
        self._scorer = None if self.reward is None else ResponseScorer(
            self.reward, self._intake.pair_parser(self.reward), self._cache, self._scheduler, config)
        self._turns = Turns([*(member.decoder.lock for member in self._models.members),
                             *(self.reward.locks if self.reward is not None else ())])
        # The requests and what their hypotheses have committed are what counts: queue and caches can be made from it.
        self._requests: dict[str, Request] = {}  # unfinished, in the order they came
        self.metrics = EngineMetrics(self._requests, self._scheduler, self._cache, self.reward, config.max_model_len)
        self._changed: dict[str, Request] = {}  # since the last step, in order; their outputs are built when fetched
        self._orphans: deque[str] = deque()  # ids of requests whose owner went away
        self._changing = False  # True while any of this or the caches changes, and after a call that was stopped there
        self._in_round: Sequence[Group] = ()  # whose round has begun and does not stand yet
        self._ids = itertools.count()
        self._warnings: list[str] = []  # to be shown once the books are closed
        self._warned: set[Plan] = set()
        logger.info("%r from %s, in %.1f s", self, "a Decoder" if given else model,
                    time.perf_counter() - begin)

    @classmethod
    def from_transformers(cls, model: Any, reward: Any = None, *, tokenizer: Any = None, **settings: Any) -> Engine:
        """An engine made of a model that transformers has loaded, with the settings that `Engine` takes.

        model: a PreTrainedModel of a family that is read from directories, with a language model head. reward: as
            Engine's, or a loaded ...ForSequenceClassification or ...ForTokenClassification, whose tokenizer is that of
            the directory it was loaded from: else give CausalReward(model, tokenizer=...).
        tokenizer: a fast tokenizer of transformers, or as Engine's. None: that of the directory that the model was
            loaded from; where that is no directory here, there is none, and prompts are token ids.
        device "auto" is where the model is, dtype "auto" the type of its weights, as of a checkpoint in that type.

        On a GPU, matrices that are products by themselves are the model's own memory, where they have the engine's
        dtype and are on its device: embedding, language model head, o_proj, down_proj; of phi3 also gate_up_proj, and
        qkv_proj where all dimensions are rotated. Queries, keys and values become one matrix, gates and ups another: a
        copy. On the CPU every matrix is packed in the order that libstars multiplies in: a copy in bfloat16 where
        that holds all of its numbers, else in float32. Norms, biases and reward heads are float32 copies
        everywhere. Copies are made one at a time, and what was copied is not held: its memory is free once the caller
        lets go of the model. The model is never written to. While the engine lives it must not be trained or written
        to, as that would reach some of the engine's weights and not others: make an engine anew for new weights.

        Raises ModelError besides for weights that are quantised, on several devices or offloaded, and for adapters that
        are not merged.
        """
        given = taken(model)
        if not isinstance(given, LoadedModel):
            raise ModelError(f"model is {type(model).__name__}, it must be a PreTrainedModel of transformers: what "
                             "Engine takes of models besides is given to Engine")
        return cls(given, reward, tokenizer=tokenizer, **settings)

    def _claim(self, reward: Reward) -> None:
        """Makes `reward` this engine's, where it has a state of its own; RewardError if it is another's."""
        if not reward.exclusive:
            return
        owner = reward.engine
        if owner is not None and owner() not in (None, self):
            gc.collect()  # it may be one that nobody uses any more
            if owner() is not None:
                raise RewardError(f"this {type(reward).__name__} belongs to another engine: make one for each engine")
        reward.engine = weakref.ref(self)

    def __repr__(self) -> str:
        if "_warned" not in vars(self):
            return "Engine(not built)"
        shape, config = self.model_config, self.config
        running = len({unit.request.request_id for unit in self._scheduler.running})
        named = ", ".join(self._models.named)
        beside = f"; models {named}" if named else ""
        rounded = f" in {config.quantization}" if config.quantization is not None else ""
        return (f"Engine({shape.model_type}: {shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary "
                f"{shape.vocab_size}{beside}; reward "
                f"{type(self.reward).__name__ if self.reward is not None else None}; {config.device}, "
                f"{self._models.own.passes.decoder.arithmetic}{rounded}; "
                f"max_model_len {config.max_model_len}, cache_tokens {config.cache_tokens}; requests: {running} "
                f"running, {len(self._requests) - running} waiting)")

    # -- whole calls ----------------------------------------------------------------------------------------------

    def generate(self, prompts: Any = None, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
                 policy: Policy | Sequence[Policy] | None = None,
                 use_tqdm: bool | Callable[..., tqdm] = True, *, budget: Budget | Sequence[Budget] | None = None,
                 priority: int | Sequence[int] = 0, user: str | Sequence[str] | None = None,
                 **others: Any) -> list[RequestOutput]:
        """Completes every prompt; one RequestOutput a prompt, in order.

        prompts: a string, {"prompt_token_ids": [...]}, {"messages": [...]}, or a list of those; beside messages the
        dictionary may have what `chat` takes, and beside {"prompt": text} "special_tokens". sampling_params,
        policy, budget, priority and user: one for all, or a list with one for each prompt. Requests of a lower priority
        come first; of those of one priority the `user`'s who was served fewest tokens, and no user's make a round much
        longer for another. Every input is checked before any work: RequestError names the index of the prompt at
        fault. What fails later ends that request with finish_reason "error", and one warning says of how many.
        """
        refuse_others("generate", others, CALL, ("prompts", "sampling_params", "policy", "use_tqdm", "budget",
                                                 "priority", "user"))
        outputs = self._complete(prompts, sampling_params, policy, use_tqdm, budget, priority, user)
        warn_of_errors(outputs, stacklevel=3)
        return outputs

    def _complete(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None,
                  policy: Policy | Sequence[Policy] | None, use_tqdm: bool | Callable[..., tqdm],
                  budget: Budget | Sequence[Budget] | None, priority: int | Sequence[int],
                  user: str | Sequence[str] | None) -> list[RequestOutput]:
        refuse_bare_prompt(prompts)
        prompts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
        count = len(prompts)
        parent = parent_of(self.spans)
        asked = [Asked(*one)._replace(trace_context=parent) for one in zip(
            prompts, _one_each("sampling_params", sampling_params, count), _one_each("policy", policy, count),
            _one_each("budget", budget, count), _one_each("priority", priority, count), _one_each("user", user, count),
            strict=True)]
        owner = Owner()
        requests: list[Request] = []
        bar = None
        try:
            self._submit(_each(asked, self._intake.compiled), owner, requests)
            progress = tqdm if use_tqdm is True else use_tqdm
            bar = progress(total=len(requests), desc="Processed prompts", dynamic_ncols=True) if progress else None
            finished = 0
            while owner.waits_for:
                if awaited := self._advance_for(owner):
                    pause(awaited, self._scheduler.deadline)
                done = len(requests) - len(owner.waits_for)
                if bar is not None:
                    bar.update(done - finished)
                finished = done
            outputs = self._outputs(requests)
        finally:
            try:
                if bar is not None:
                    bar.close()
            finally:
                self._disown(requests)
        return outputs

    def chat(self, messages: Any = None, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
             policy: Policy | Sequence[Policy] | None = None, use_tqdm: bool | Callable[..., tqdm] = True, *,
             tools: list[dict[str, Any]] | None = None, chat_template_kwargs: dict[str, Any] | None = None,
             add_generation_prompt: bool | None = None, continue_final_message: bool = False,
             special_tokens: SpecialTokens = "parse", budget: Budget | Sequence[Budget] | None = None,
             priority: int | Sequence[int] = 0, user: str | Sequence[str] | None = None,
             **others: Any) -> list[RequestOutput]:
        """Answers a conversation, or each of a list of them; one RequestOutput a conversation, in order.

        messages: dictionaries with "role" and "content" (text, or a list of text parts) or "tool_calls". They are
        rendered by the model's chat template, as transformers' apply_chat_template does it, and by the reward model's.

        tools: JSON schemas, for both templates. chat_template_kwargs: further variables of the language model's.
        continue_final_message: the response continues the final message, whose content is text, in the same turn, for
        rewards too. add_generation_prompt: whether an assistant's turn is opened; None: unless a message is continued.
        special_tokens: "text" reads control tokens in messages, tools and variables as the text that they are, so that
        no user can end a turn; "parse", as other engines do, as tokens. The other arguments are those of `generate`,
        which takes the same by prompt: {"messages": [...], "tools": [...], ...}.
        """
        refuse_others("chat", others, CALL, (
            "messages", "sampling_params", "policy", "use_tqdm", "tools", "chat_template_kwargs",
            "add_generation_prompt", "continue_final_message", "special_tokens", "budget", "priority", "user"))
        several = isinstance(messages, (list, tuple)) and messages and all(
            isinstance(one, (list, tuple)) for one in messages)
        said = {"tools": tools, "chat_template_kwargs": chat_template_kwargs,
                "add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message,
                "special_tokens": special_tokens}
        # Not None, which would count as absent.
        prompts = [{"messages": [] if one is None else one, **said} for one in (messages if several else [messages])]
        outputs = self._complete(prompts, sampling_params, policy, use_tqdm, budget, priority, user)
        warn_of_errors(outputs, stacklevel=3)
        return outputs

    def stream(self, prompt: Any = None, sampling_params: SamplingParams | None = None,
               policy: Policy | None = None, *, budget: Budget | None = None, priority: int = 0,
               user: str | None = None, **others: Any) -> Iterator[RequestOutput]:
        """Yields the output of one prompt each time a segment was committed; each output is cumulative, unless
        SamplingParams.output_kind asks for what is new or for the last one alone.

        Text that may still change is held back: an incomplete character, a possible start of a stop string. The prompt
        is checked at the call (RequestError); closing the iterator early aborts the request.
        """
        refuse_others("stream", others, CALL, ("prompt", "sampling_params", "policy", "budget", "priority", "user"))
        if isinstance(prompt, (list, tuple)):
            refuse_bare_prompt(prompt)
            raise RequestError("stream takes one prompt: call it for each, or give the list to generate")
        asked = Asked(prompt, sampling_params, policy, budget, priority, user, trace_context=parent_of(self.spans))
        return self._stream(self._check(self._intake.compiled(asked)))

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        owner = Owner()
        try:
            self._join(request, owner)
            finished = False
            while not finished:
                output, awaited = self._next_output(request, owner)
                if awaited:
                    pause(awaited, self._scheduler.deadline)
                if output is not None:
                    finished = output.finished
                    yield output
        finally:
            # The iterator may be collected anywhere, in the middle of a round too: if it is nobody's turn the request
            # ends now, else, as its owner is gone, with the next turn.
            self._turns.attempt(lambda: self._drop([request]))

    def calibrate(self, prompts: Any, sampling_params: SamplingParams | None = None, quantile: float = 0.9,
                  num_samples: int = 16, use_tqdm: bool | Callable[..., tqdm] = False,
                  segment_size: int = DRAFT_SIZE) -> Calibration:
        """A reward_threshold for these prompts, the `quantile` of the rewards of finished plain samples, and what else
        they say of the reward: a float with attributes, that policies take as it is.

        sampling_params: as for the run to come; its `n` is replaced by `num_samples`. segment_size: prefixes of so
        many tokens, twice as many, … are scored too; a warning says where they do not foretell the end.
        """
        quantile = real("quantile", quantile, "between 0 and 1", lambda value: 0.0 <= value <= 1.0)
        calibration = Calibration.measure(
            self.plain_samples(prompts, sampling_params, num_samples, use_tqdm, segment_size), quantile)
        if calibration.warning is not None:
            warn(calibration.warning, stacklevel=2)
        return calibration

    def plain_samples(self, prompts: Any, sampling_params: SamplingParams | None = None, num_samples: int = 16,
                      use_tqdm: bool | Callable[..., tqdm] = False,
                      segment_size: int = DRAFT_SIZE) -> list[list[PlainSample]]:
        """The rewards of `num_samples` plain samples of every prompt, which `Calibration.measure` takes."""
        refuse_bare_prompt(prompts)
        if self.reward is None:
            raise RequestError("calibrate needs a reward: build the engine with Engine(model, reward=...)")
        params = sampling_params if sampling_params is not None else SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(no_params(params))
        params = dataclasses.replace(params, n=integer("num_samples", num_samples, 1))
        policy = PlainSegments(integer("segment_size", segment_size, 1, self.config.max_segment_size))
        outputs = self.generate(prompts, params, policy, use_tqdm=use_tqdm)
        for output in outputs:
            for completion in output.outputs:
                if completion.error is not None:
                    raise RequestError(f"a sample of {output.prompt!r} could not be scored: {completion.error}")
        return [[sample for sample in map(PlainSample.of, output.outputs) if sample is not None] for output in outputs]

    def score(self, prompts: Any = None, responses: Any = None, **others: Any) -> Rewards:
        """The reward of each response, as the loop would have scored it: a list of floats, in order.

        prompts: as of `generate`, one for all responses or one for each. responses: a text or a list of token ids,
        whose EOS is what ended it, or a list of those. Without responses each prompt is a whole: of messages the last
        one, an assistant's, is scored as the answer to the others, and a text is scored as one where the reward reads
        prompt and response as one text, and as a response to nothing where it is a callable.

        All is checked before anything is scored: RequestError or RewardError, which names the one at fault, as it does
        where one has no reward. A long list is scored a slice at a time, between the rounds of others, and -inf, by
        which a reward rejects, is a reward.
        """
        refuse_others("score", others, CALL, ("prompts", "responses"))
        call = self._score_call(prompts, responses)
        try:
            while not call.done:
                if awaited := self._score_turn(call):
                    pause(awaited)
        finally:
            call.cancel()
        return call.result()

    def _score_call(self, prompts: Any, responses: Any) -> ScoreCall:
        """What is to be scored, of which nothing is checked yet; RequestError where there is no reward."""
        if self._scorer is None:
            raise RequestError("score needs a reward: build the engine with Engine(model, reward=...)")
        return score_call(prompts, responses)

    @one_at_a_time
    def _score_turn(self, call: ScoreCall) -> list[Later]:
        """A slice, or a round of others where there is no room for one; what is waited for outside of the turn."""
        assert self._scorer is not None
        if not self._score_slice(call):
            self._advance()
        return call.awaited() if self._scorer.waits(call) else []

    # -- step by step ---------------------------------------------------------------------------------------------

    def add_request(self, /, prompt: Any = None, sampling_params: SamplingParams | None = None,
                    policy: Policy | None = None, *, request_id: str | None = None, budget: Budget | None = None,
                    priority: int = 0, user: str | None = None, trace_headers: Mapping[str, str] | None = None,
                    **others: Any) -> str:
        """Queues a request and returns its id; RequestError or RewardError if it can never run as it stands.

        trace_headers: W3C's traceparent and tracestate of the span that its own belongs to; None: the caller's.
        """
        refuse_others("add_request", others, CALL, ("prompt", "sampling_params", "policy", "request_id", "budget",
                                                    "priority", "user", "trace_headers"))
        asked = Asked(prompt, sampling_params, policy, budget, priority, user,
                      trace_context=parent_of(self.spans, trace_headers))
        return self._add(self._intake.compiled(asked), request_id)

    @one_at_a_time
    def _add(self, asked: Asked, request_id: str | None) -> str:
        request = self._parse(asked, request_id)
        self._enqueue(request)
        return request.request_id

    def step(self) -> list[RequestOutput]:
        """Admits what fits, runs one round, and returns the outputs that changed since the last step, as each
        request's output_kind asks for them.

        Where all that runs waits for rewards, it waits with them, for 0.05 s at most.
        """
        outputs, awaited = self._step()
        if awaited and not outputs:
            pause(awaited, self._scheduler.deadline)
        return outputs

    @one_at_a_time
    def _step(self) -> tuple[list[RequestOutput], list[Later]]:
        awaited = self._advance()
        changed = list(self._changed.values())
        outputs = [self._output(request) for request in changed]
        news = [request.news(output) for request, output in zip(changed, outputs, strict=True)]
        self._changed = {}
        for request, output in zip(changed, outputs, strict=True):
            request.hand_out(output)
        return news, awaited

    @one_at_a_time
    def abort(self, request_id: str | Iterable[str]) -> bool:
        """Ends a request, or several, with finish_reason "abort", keeping what was committed; whether there was one.

        The next `step` returns their last outputs.
        """
        found = [self._requests[one] for one in dict.fromkeys(request_ids(request_id)) if one in self._requests]
        self._abort(found)
        return bool(found)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do or to return."""
        return bool(self._requests or self._changed)

    def check_policy(self, policy: Policy) -> None:
        """RequestError where no request can have `policy` here, for want of a reward, a model, a head or memory for its
        segments. Any thread may ask, at any moment."""
        self._intake.needs_of(policy, plan_of(policy))

    @one_at_a_time
    def check_integrity(self) -> None:
        """Raises IntegrityError unless every page and slab of both models is accounted for."""
        self._recover()
        running = dict.fromkeys([unit.group for unit in self._scheduler.running])
        self._cache.check_integrity(slabs_out=self._round.slabs_held(running))
        if self.reward is not None:
            self.reward.check_integrity()

    @one_at_a_time
    def _measure_widths(self) -> None:
        """Measures now what steps take, which a free width or a shared round would measure in the midst of others."""
        with self._models.own.decoder.lock:
            self._round.proposer.chooser.measure()

    # -- the queue ------------------------------------------------------------------------------------------------

    def _parse(self, asked: Asked, request_id: str | None = None) -> Request:
        """A checked request that is not queued yet."""
        if request_id is None:
            request_id = self._new_id()
        elif not isinstance(request_id, str) and not (type(request_id) is int and abs(request_id) < 1 << 64):
            raise RequestError(f"request_id is {type(request_id).__name__}, it must be a string")
        elif self._in_use(request_id):
            raise RequestError(f"request id {shown(request_id)} is in use: choose another")
        return self._intake.parse(asked, request_id)

    @one_at_a_time
    def _check(self, asked: Asked) -> Request:
        return self._parse(asked)

    def _new_id(self) -> str:
        return next(request_id for request_id in map(str, self._ids) if not self._in_use(request_id))

    def _in_use(self, request_id: str) -> bool:
        return request_id in self._requests or request_id in self._changed

    @one_at_a_time
    def _submit(self, asked: Iterable[Asked], owner: Owner, requests: list[Request]) -> None:
        """Appends a request for each of `asked` to `requests`, and queues them once all were checked."""
        requests += _each(asked, self._parse)
        for request in requests:
            self._enqueue(request, owner)

    @one_at_a_time
    def _join(self, request: Request, owner: Owner) -> None:
        if self._in_use(request.request_id):  # by somebody who chose it since the request was checked
            request.request_id = self._new_id()
        self._enqueue(request, owner)

    def _enqueue(self, request: Request, owner: Owner | None = None) -> None:
        request_id = request.request_id
        if self._in_use(request_id):
            raise RequestError(f"request id {request_id!r} is in use: choose another")
        self._recover()
        if owner is not None:
            owner.waits_for.add(request_id)
            orphans = self._orphans
            request.owner = weakref.ref(owner, lambda _: orphans.append(request_id))
        self._changing = True
        self._requests[request_id] = request
        self._scheduler.add(request)
        self._changing = False

    @one_at_a_time
    def _disown(self, requests: Sequence[Request]) -> None:
        self._drop(requests)

    def _drop(self, requests: Sequence[Request]) -> None:
        """Ends what is still unfinished of them."""
        self._abort([request for request in requests if self._requests.get(request.request_id) is request])
        for request in requests:
            request.owner = None

    def _abort(self, requests: Sequence[Request]) -> None:
        self._recover()
        if not requests:
            return
        self._changing = True
        for request in requests:
            for hypothesis in request.hypotheses:
                if hypothesis.finish_reason is None:
                    self._round.finish(hypothesis, "abort")
        self._settle(requests)
        self._changing = False

    @one_at_a_time
    def _advance_for(self, owner: Owner) -> list[Later]:
        """Advances, unless another thread has brought what this one waits for meanwhile."""
        return self._advance() if owner.waits_for else []

    @one_at_a_time
    def _next_output(self, request: Request, owner: Owner) -> tuple[RequestOutput | None, list[Later]]:
        """The output of `request` if it has changed, by a round of this thread or of another's; None if not, and what
        is waited for."""
        awaited = self._advance() if not owner.news else []
        if not owner.news:
            return None, awaited
        output = self._output(request)
        news = request.news(output)
        owner.news = False
        request.hand_out(output)
        return news, []

    @one_at_a_time
    def _outputs(self, requests: Sequence[Request]) -> list[RequestOutput]:
        return [self._output(request) for request in requests]

    def _output(self, request: Request) -> RequestOutput:
        """A snapshot. A request whose text cannot be decoded has ended with an error, and has no text."""
        try:
            return request.output()
        except Exception as error:
            self._fail(request, error)
            request.tokenizer = None
            for hypothesis in request.hypotheses:
                hypothesis.finish_reason, hypothesis.error = "error", hypothesis.error or sentence(error)
            return request.output()

    def _advance(self, before_round: Callable[[], None] | None = None) -> list[Later]:
        """Admits what fits and runs one round, or, after an exception, a segment of each request by itself.

        before_round: called where it is known what the round's requests are, and which have ended without it.
        Where all that runs waits for rewards that come later, there is no round, and it returns those: whoever called
        waits for one of them outside of its turn.
        """
        awaited: list[Later] = []
        self._recover()
        while self._orphans:
            if self._orphans[0] in self._requests:
                self._abort([self._requests[self._orphans[0]]])
            self._orphans.popleft()
        try:
            if self._cut_short():  # their outputs do not wait for a round of others
                return awaited
            groups = self._schedule()
            if before_round is not None:
                before_round()
            self._run_round(groups)
            self._cut_short()
            if not groups and not self._scheduler.reads:
                awaited = self._round.awaited()
        except IntegrityError:
            raise
        except Exception as error:
            self._one_by_one(error)
        self._show_warnings()
        return awaited

    def _schedule(self, only: Group | None = None) -> list[Group]:
        """The groups of the next round, as the scheduler plans it; with `only`, of one group."""
        self._changing = True
        groups, ended = self._scheduler.plan(only)
        if ended:
            self._settle(ended)
        self._changing = False
        return groups

    def _cut_short(self) -> bool:
        """Ends the requests whose time or budget is over; whether there were some."""
        due = self._scheduler.due()
        if not due:
            return False
        self._begin([group for request, _ in due for group in request.groups if not group.finished])
        for request, reason in due:
            self._round.conclude(request, reason)
        self._in_round = ()
        self._settle([request for request, _ in due])
        self._changing = False
        return True

    def _begin(self, groups: Sequence[Group]) -> None:
        """From here on `groups` change, and go back to what they are now if the change is stopped in the middle."""
        for group in groups:
            if not group.undecided:
                group.mark_boundary()
        self._changing, self._in_round = True, groups

    def _run_round(self, groups: Sequence[Group]) -> None:
        if not groups:
            return
        self._begin(groups)
        changed = self._round.run(groups)
        self._in_round = ()  # from here on it stands
        self.metrics.committed(changed)
        self._scheduler.ran(groups)
        self._settle({group.request.request_id: group.request for group in changed}.values())
        self._changing = False

    def _one_by_one(self, error: Exception) -> None:
        """Gives every group that was at work when `error` was raised a segment by itself: who fails alone ends."""
        groups = [group for request in self._requests.values() for group in request.groups
                  if any(hypothesis.table is not None for hypothesis in group.hypotheses)]
        if not groups:
            raise error
        self._recover()
        if len(groups) == 1:
            self._fail(groups[0].request, error)
            return
        log(f"a round raised {describe(error)}: each of its {len(groups)} completions is run by itself", error)
        for group in groups:
            if group.finished:  # as another one of its request failed
                continue
            self._changing = True
            self._recover()  # nobody else holds a page
            try:
                self._run_alone(group)
            except IntegrityError:
                raise
            except Exception as alone:
                self._recover()
                self._fail(group.request, alone)

    def _run_alone(self, group: Group) -> None:
        """To the end of a segment: the round that failed may be a later one of it. What comes later is waited for, or
        it would be asked for again after every round that fails."""
        until = min(time.monotonic() + ALONE_SECONDS, self._scheduler.deadline)
        while True:
            groups = self._schedule(group)
            self._run_round(groups)
            if groups and not group.undecided and not group.waits:
                return
            awaited = self._round.awaited()
            if not groups and (not awaited or time.monotonic() > until):
                return
            if not groups:
                pause(awaited)

    def _score_slice(self, call: ScoreCall) -> bool:
        """A turn of `call`; False where there was no room. After an exception each of a slice is scored by itself, with
        nothing else in the caches: who fails alone ends the call."""
        assert self._scorer is not None
        self._recover()
        stop = max(call.alone, call.next + self.config.max_num_lanes)
        try:
            return self._changed_by(call, alone=False)
        except IntegrityError:
            raise
        except Exception as error:
            self._recover()
            call.alone = stop
            log(f"a slice of responses to be scored raised {describe(error)}: each is scored by itself", error)
        try:
            return self._changed_by(call, alone=True)
        except IntegrityError:
            raise
        except Exception as error:
            self._recover()
            call.fail(call.next, error)
            return True

    def _changed_by(self, call: ScoreCall, alone: bool) -> bool:
        assert self._scorer is not None
        self._changing = True
        done = self._scorer.advance(call, alone)
        self._changing = False
        return done

    def _fail(self, request: Request, error: Exception) -> None:
        before, self._changing = self._changing, True
        self._settle([self._scheduler.fail(request, error)])
        self._changing = before

    def _recover(self) -> None:
        """After a call that was stopped in the middle: back to what was committed, with empty caches."""
        if not self._changing:
            return
        self.config.target.synchronise()  # what the stopped call had launched may still read what the host fills next
        requests = list(self._requests.values())
        for group in (group for request in requests for group in request.groups):
            # A round that did not end never happened; after one, a segment that goes on is begun again.
            if group.undecided or group in self._in_round or group.waits:
                group.go_back()
        self._in_round = ()
        self._round.reset()
        self._cache.reset()
        if self.reward is not None:
            self.reward.reset()
        for hypothesis in (hypothesis for request in requests for hypothesis in request.hypotheses):
            hypothesis.let_go()
        self._scheduler.reset(requests)
        self.metrics.reset(requests)
        self._settle([request for request in requests if request.finished])
        self._changing = False

    def _settle(self, requests: Iterable[Request]) -> None:
        """Gives back what finished hypotheses held and hands out the outputs of `requests`."""
        requests = list(requests)
        if requests:
            self._scheduler.release(requests)
        for request in requests:
            if request.request_id not in self._requests:
                continue
            finished = request.finished
            if finished:
                self._note_out_of_reach(request)
                self.metrics.ended(request)
            if request.owner is None:
                if request.has_news:
                    self._changed[request.request_id] = request
            elif (owner := request.owner()) is not None:
                if request.has_news:
                    owner.changed(request.request_id, finished)
            if finished:
                del self._requests[request.request_id]
                self.metrics.forget(request)
                if self.spans is not None:
                    self.spans.ended(request)

    def _note_out_of_reach(self, request: Request) -> None:
        """Notes, once a policy, that the threshold lies far outside the rewards that were seen."""
        plan = request.plan
        if not isinstance(plan.decide, (Threshold, FirstAccepted)):
            return
        if plan in self._warned or len(self._warned) == MAX_WARNED:
            return
        metrics = [hypothesis.metrics for hypothesis in request.hypotheses]
        counted, accepted = sum(m.attempts_counted for m in metrics), sum(m.accepted for m in metrics)
        threshold = plan.decide.reward_threshold
        if threshold == float("inf") or counted < LOW_ACCEPT_ATTEMPTS or accepted > LOW_ACCEPT_RATE * counted:
            return
        seen = [attempt.reward for hypothesis in request.hypotheses for segment in hypothesis.segments
                for attempt in segment.attempts if attempt.reward is not None]
        if not seen:
            return
        self._warned.add(plan)
        self._warnings.append(f"reward_threshold={threshold:g} accepted {accepted} of {counted} attempts (the rewards "
                              f"seen lie between {min(seen):.3g} and {max(seen):.3g}): measure one with "
                              "engine.calibrate(prompts)")

    def _show_warnings(self) -> None:
        while self._warnings:
            warn(self._warnings.pop(), stacklevel=2)


def _name(model: Any) -> str:
    """What a model is called in traces: its name in the hub, its file's or directory's, or its type."""
    if isinstance(model, (str, Path)):
        return Path(model).resolve().name if Path(model).exists() else str(model)
    if isinstance(model, LoadedModel):
        return str(model.settings["model_type"])
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _each(asked: Iterable[Asked], check: Callable[[Asked], T]) -> list[T]:
    """What `check` makes of each of `asked`; RequestError names the one at fault."""
    results = []
    for index, one in enumerate(asked):
        try:
            results.append(check(one))
        except StarsError as error:
            raise RequestError(f"prompts[{index}]: {error}") from error
    return results


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """`value` for each of `count` prompts, or its own items."""
    if not isinstance(value, (list, tuple)) or isinstance(value, Plan):  # which is a tuple, and refused by name later
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts: give one for all, or one for each")
    return list(value)
