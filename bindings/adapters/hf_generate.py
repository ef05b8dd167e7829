"""STARS as a `custom_generate` of transformers: any causal language model there, its caches and its settings."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from stars.adapters.drawing import Proposal
from stars.adapters.hf_stack import Criterion, Edits, ForwardTokens, HFStack, Inputs, Processor
from stars.adapters.law import Law, law_of
from stars.adapters.loop import Loop, Response
from stars.adapters.scoring import Scoring
from stars.arguments import integer, shown
from stars.chat import continued, parse_chat
from stars.errors import RequestError, RewardError, warn
from stars.model.loaded import origin_of
from stars.model.tokenizer import Detokenizer, Tokenizer, from_transformers
from stars.outputs import CompletionOutput
from stars.prompt import Prompt, parse_prompt
from stars.reward.resolve import resolve_reward
from stars.sampling import MAX_SAMPLES
from stars.sources import checked_reward
from stars.stops import find_stop

ADAPTER = "stars.adapters.transformers"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "the policy decides between attempts, beams do not"),
    "num_beam_groups": ((None, 1), "the policy decides between attempts, beams do not"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search is another way to choose tokens"),
    "dola_layers": ((None,), "it draws from the difference of layers"),
    "prompt_lookup_num_tokens": ((None,), "assisted generation drafts by itself"),
    "use_cache": ((None, True), "rewinding needs the cache"),
    "guidance_scale": ((None, 1, 1.0), "its processor has a cache of its own, which cannot be rewound"),
    "encoder_repetition_penalty": ((None, 1.0), "its processor knows rows of prompts, not of attempts"),
    "encoder_no_repeat_ngram_size": ((None, 0), "its processor knows rows of prompts, not of attempts"),
    "watermarking_config": ((None,), "it changes logits after the filters"),
    "output_scores": ((None, False), "what is kept was drawn in batches of attempts; rewards and log-probabilities are "
                      "in `stars` of what return_dict_in_generate=True returns"),
    "output_logits": ((None, False), "what is kept was drawn in batches of attempts"),
    "output_attentions": ((None, False), "what is kept was drawn in batches of attempts"),
    "output_hidden_states": ((None, False), "what is kept was drawn in batches of attempts"),
    "compile_config": ((None,), "the numbers of lanes change, so the model is not compiled"),
    "token_healing": ((None, False), "it rewrites prompts"),
}
"""Fields of a GenerationConfig, what they are when nothing is asked for, and why anything else is refused."""
SAMPLED: dict[str, tuple[tuple[Any, ...], str]] = {
    name: ((None, neutral), "it is none of temperature, top_k, top_p and min_p")
    for name, neutral in (("top_h", None), ("typical_p", 1.0), ("epsilon_cutoff", 0.0), ("eta_cutoff", 0.0))}
"""The same where tokens are sampled."""
WARPERS = {"TemperatureLogitsWarper": "temperature", "TopKLogitsWarper": "top_k", "TopPLogitsWarper": "top_p",
           "MinPLogitsWarper": "min_p"}
"""Processors that generate makes of its settings, and the setting: the sampler does the same."""
DISTANCES = ("bloom", "mpt")
"""Models that take no position_ids and need none: what they read of positions are distances."""
TAKEN = ("attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep", "cache_position")
"""What generate hands on to a model's forward pass and the adapter gives, or leaves out, by itself."""


@dataclass
class StarsGenerateOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]  # transformers' types are not read
    """What generate returns with return_dict_in_generate=True: `sequences` int64 [rows, length] as ever, and by row
    what the engine says of a response."""

    stars: list[CompletionOutput] | None = None
    forward_tokens: ForwardTokens | None = None  # rows that the language model ran


class AlignedGenerate:
    """What `transformers` returns: give it to generate as custom_generate.

    One call at a time: another thread waits its turn.
    """

    def __init__(self, reward: Any, policy: Any, tokenizer: Any, cache_tokens: int | None):
        self._law = law_of(policy, ADAPTER)
        if self._law.scores:
            self._reward = resolve_reward(checked_reward(reward))
            if self._reward is None:
                raise RewardError("reward is None, and the policy asks for rewards: give a model directory, a callable "
                                  "or a stars.Reward")
        elif reward is not None:
            raise RequestError(f"the policy asks for no reward and reward is {shown(reward)}: leave it out")
        self._tokenizer = tokenizer if tokenizer is None or isinstance(tokenizer, Tokenizer) else (
            from_transformers(tokenizer))
        self._cache_tokens = None if cache_tokens is None else integer("cache_tokens", cache_tokens, 1)
        self._scoring: Scoring | None = None
        self._bound: tuple[Any, ...] = ()  # what the reward's sizes were made for
        self._turn = threading.RLock()
        self._busy = False

    def __call__(self, model: Any, input_ids: Tensor, logits_processor: Any = None, stopping_criteria: Any = None,
                 generation_config: Any = None, synced_gpus: bool = False, streamer: Any = None, *,
                 seed: int | Sequence[int] | None = None, messages: Sequence[Any] | None = None,
                 **model_kwargs: Any) -> Tensor | StarsGenerateOutput:
        """As generate calls it. `seed` and `messages` reach it through generate's own keywords:

        seed: 64 bits, of all prompts or of each; None draws one for each prompt from torch's generator, so that
        torch.manual_seed fixes it. Responses to one prompt (num_return_sequences) differ by their number.
        messages: the conversation that each prompt renders, for rewards that render it with a template of their own;
        one conversation for one prompt.
        """
        frame = sys._getframe(1)
        streamer = streamer if streamer is not None else _given(frame, "streamer")
        assistant, synced_gpus = _given(frame, "assistant_model"), synced_gpus or bool(_given(frame, "synced_gpus"))
        with self._turn:
            if self._busy:
                raise RequestError("this custom_generate is at work in this thread: a reward cannot call the generate "
                                   "that asked it, give it a model and an adapter of its own")
            self._busy = True
            try:
                if synced_gpus:
                    raise _refusal("synced_gpus", True, "processes would have to agree on every attempt")
                if assistant is not None:
                    raise _refusal("assistant_model", type(assistant), "assisted generation drafts by itself")
                return self._generate(
                    model, input_ids, processors=logits_processor or [], criteria=stopping_criteria or [],
                    config=generation_config, streamer=streamer, seed=seed, messages=messages,
                    model_kwargs=model_kwargs)
            finally:
                self._busy = False
                if streamer is not None:  # who reads it in another thread does not wait for ever
                    streamer.end()

    def _generate(self, model: Any, input_ids: Tensor, *, processors: Sequence[Any], criteria: Sequence[Any],
                  config: Any, streamer: Any, seed: Any, messages: Any, model_kwargs: Mapping[str, Any],
                  ) -> Tensor | StarsGenerateOutput:
        _check(model, input_ids, config, model_kwargs)
        if streamer is not None and len(input_ids) > 1:
            raise RequestError(f"a streamer takes one sequence and there are {len(input_ids)}: give one prompt and "
                               "num_return_sequences=1, or leave streamer out")
        inputs = _inputs(model, input_ids, config, model_kwargs)
        rows, length = inputs.token_ids.shape
        stops = _stop_ids(criteria, _vocab_size(model))
        limit = min([one.max_length for one in criteria if hasattr(one, "max_length")], default=config.max_length)
        if limit <= length:
            raise RequestError(f"the prompt has {length} tokens and max_length is {limit}: raise it, or set "
                               "max_new_tokens")
        proposal, law = _proposal(config, stops, model), self._law
        responses = self._responses(model, inputs, limit - length, seed, messages)
        for one in responses:
            one.greedy = proposal.temperature == 0
        scoring = self._scoring_of(model, limit, rows, law) if law.scores else None
        stack = HFStack(model, inputs, {one: row for row, one in enumerate(responses)}, proposal,
                        _edits(processors, criteria, config, inputs))
        loop = Loop(stack, scoring, law, None, frozenset(stops))
        told = 0
        run = loop.run(responses)
        try:
            for changed in run:
                if streamer is not None and len(responses[0].token_ids) > told:
                    streamer.put(torch.tensor(responses[0].token_ids[told:]))
                    told = len(responses[0].token_ids)
                if not config.return_dict_in_generate:
                    _raise_first(changed, responses)
        finally:
            run.close()
        sequences = _sequences(input_ids, responses, _padding(config, stops))
        if not config.return_dict_in_generate:
            return sequences
        outputs = [_output(one, stops, _stop_strings(criteria)) for one in responses]
        failed = [one.error for one in outputs if one.error is not None]
        if failed:
            warn(f"{len(failed)} of {rows} rows ended with an error, the first: {failed[0]}", 5)
        return StarsGenerateOutput(sequences=sequences, stars=outputs, forward_tokens=stack.forward_tokens)

    def _responses(self, model: Any, inputs: Inputs, max_tokens: int, seed: Any, messages: Any) -> list[Response]:
        count = len(inputs.token_ids) // inputs.responses
        seeds, chats = _seeds(seed, count), _conversations(messages, count)
        vocab, made = _vocab_size(model), []
        for index in range(count):
            row = index * inputs.responses
            ids = inputs.token_ids[row, inputs.padding[row] :].tolist()
            prompt = self._prompt(ids, chats[index], vocab)
            detokenizer = None if self._tokenizer is None else Detokenizer(self._tokenizer, ids)
            for sample in range(inputs.responses):
                one = Response(prompt, seeds[index], sample, max_tokens)
                one.decode = None if detokenizer is None else detokenizer.decode
                made.append(one)
        return made

    def _prompt(self, token_ids: list[int], messages: Any, vocab_size: int) -> Prompt:
        """The ids are what the model reads; rewards get text of them, or the conversation."""
        prompt = parse_prompt({"prompt_token_ids": token_ids}, self._tokenizer, vocab_size)
        if messages is None:
            return prompt
        chat = parse_chat({"messages": messages}, self._tokenizer)
        assert self._tokenizer is not None
        text = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return prompt._replace(given=list(messages), text=text, rendering=continued(chat, text))

    def _scoring_of(self, model: Any, length: int, rows: int, law: Law) -> Scoring:
        """The reward, bound to sizes in powers of two: what one call needs most others do."""
        device = model.device.type
        kind = _vocab_size(model), device
        sizes = _power(length, 2048), _power(rows, 64), _power(rows * law.width, 64)
        if self._scoring is not None and self._bound[:2] == kind:
            sizes = tuple([max(have, want) for have, want in zip(self._bound[2:], sizes, strict=True)])
        if self._scoring is None or self._bound != (*kind, *sizes):
            self._scoring = None  # before the next: a reward belongs to one at a time
            self._scoring = Scoring(
                self._reward, self._tokenizer, kind[0], max_model_len=sizes[0], segment_size=law.segment_size,
                max_num_seqs=sizes[1], max_num_lanes=sizes[2], device=device, cache_tokens=self._cache_tokens,
                own=origin_of(model))
            self._bound = *kind, *sizes
        return self._scoring


def transformers(*, policy: Any, reward: Any = None, tokenizer: Any = None,
                 cache_tokens: int | None = None) -> AlignedGenerate:
    """A custom_generate for any causal language model: `model.generate(**inputs, custom_generate=transformers(…))`.

    policy: STARS with exhaust="best_seen", BlockwiseBestOfK with one k, or Sample without a score. reward: as the
    Engine takes it; it runs on the model's kind of device, in a cache of its own of `cache_tokens`. tokenizer: the
    model's, a fast one of transformers or one of ours; without it rewards get token ids alone, and there is no text.

    What generate is given holds: settings, processors, criteria, streamer, cache_implementation. What cannot be done is
    refused by name (RequestError). One object serves many calls and loads the reward once.

    A row whose reward fails ends there. With return_dict_in_generate=True the others go on, and its output has
    finish_reason "error" and the error's text; else RewardError names the row at once, as sequences could not say it.
    """
    return AlignedGenerate(reward, policy, tokenizer, cache_tokens)


# -- what generate gives -----------------------------------------------------------------------------------------------


def _given(frame: FrameType, name: str) -> Any:
    """An argument of generate that it keeps from a custom_generate that is a callable: read where it stands."""
    return frame.f_locals.get(name) if frame.f_code.co_name == "generate" else None


def _refusal(name: str, value: Any, why: str) -> RequestError:
    return RequestError(f"{ADAPTER} does not take {name}={shown(value)} ({why}): leave it out")


def _check(model: Any, input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """RequestError for all that would have to be ignored."""
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise RequestError(f"{kind} is an encoder and a decoder: {ADAPTER} runs causal language models")
    fields = REFUSED | SAMPLED if config.do_sample else REFUSED
    for name, (neutral, why) in fields.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise _refusal(name, value, why)
    for name, value in model_kwargs.items():
        if name not in TAKEN and value is not None and value is not False:
            raise RequestError(f"{ADAPTER} reads prompts of token ids alone and does not take {name}: leave it out")
    if (config.num_return_sequences or 1) > MAX_SAMPLES:
        raise RequestError(f"num_return_sequences is {config.num_return_sequences}, it must be at most {MAX_SAMPLES}")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    # An empty one may have its memory: for prefill_chunk_size generate makes a static cache's at once.
    filled = any(getattr(layer, "is_initialized", False) and layer.get_seq_length() > 0
                 for layer in getattr(cache, "layers", ()))
    if filled or getattr(cache, "_is_user_defined", False):
        raise RequestError(f"{ADAPTER} rewinds a cache of its own and does not take a cache: leave it out, or choose "
                           "its kind by cache_implementation")
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    known = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if rope.get("rope_type") in ("longrope", "dynamic"):
        known = known or text.max_position_embeddings
        if config.max_length > known:
            raise RequestError(f"{kind} rotates anew once a text passes {known} tokens ({rope['rope_type']}), so that "
                               f"its cache cannot be rewound: keep prompt and max_new_tokens below that")
    if input_ids.numel() == 0:
        raise RequestError("the prompt is empty: give at least one token")


def _inputs(model: Any, input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> Inputs:
    ids = input_ids.to(model.device)
    rows, length = ids.shape
    mask = model_kwargs.get("attention_mask")
    padding = [0] * rows
    if mask is not None:
        held = mask.to("cpu").long().cumsum(1)
        padding = (held == 0).sum(1).tolist()
        if held[:, -1].tolist() != [length - one for one in padding]:
            raise RequestError("attention_mask has zeros behind a prompt's first token: pad on the left "
                               "(padding_side=\"left\")")
    positions = model_kwargs.get("position_ids")
    if positions is None:
        positions = (torch.arange(length)[None] - torch.tensor(padding)[:, None]).clamp(min=0)
    if positions.dim() != 2:
        raise RequestError(f"the positions of {type(model).__name__} have {positions.dim()} dimensions: {ADAPTER} runs "
                           "models whose tokens have one position each")
    if positions.shape[1] < length:
        raise RequestError(f"position_ids or attention_mask has {positions.shape[1]} columns and the prompts have "
                           f"{length} tokens: give one for each token, or leave it out")
    positions = positions.to(model.device).expand(rows, -1)[:, -length:]
    counts = "position_ids" not in inspect.signature(model.forward).parameters
    if counts and (rows > 1 or any(padding)) and model.config.model_type not in DISTANCES:
        raise RequestError(f"{type(model).__name__} takes no position_ids and counts columns, which move where several "
                           "responses go on at different places: give one prompt without padding, and "
                           "num_return_sequences=1")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    return Inputs(ids, padding, positions, [one + 1 for one in positions[:, -1].tolist()],
                  config.num_return_sequences or 1, getattr(config, "prefill_chunk_size", None), cache)


def _proposal(config: Any, stops: Sequence[int], model: Any) -> Proposal:
    if not config.do_sample:
        return Proposal(0.0, stop_ids=tuple(stops))
    top_k = config.top_k or 0
    return Proposal(1.0 if config.temperature is None else float(config.temperature),
                    0 if top_k >= _vocab_size(model) else top_k, 1.0 if config.top_p is None else float(config.top_p),
                    float(config.min_p or 0.0), tuple(stops))


def _stop_ids(criteria: Sequence[Any], vocab_size: int) -> list[int]:
    """Token ids that end a response."""
    found: set[int] = set()
    for one in criteria:
        if isinstance(one, stopping_criteria.EosTokenCriteria):
            found.update(torch.as_tensor(one.eos_token_id).flatten().tolist())
    return sorted([one for one in found if 0 <= one < vocab_size])  # -1, and what is beyond, is never drawn


def _stop_strings(criteria: Sequence[Any]) -> list[str]:
    return [text for one in criteria if isinstance(one, stopping_criteria.StopStringCriteria)
            for text in one.stop_strings]


def _edits(processors: Sequence[Any], criteria: Sequence[Any], config: Any, inputs: Inputs) -> Edits:
    """Processors but for what the sampler does itself; criteria but for those that the controller knows."""
    kept = []
    for one in processors:
        setting = WARPERS.get(type(one).__name__)
        same = setting is not None and config.do_sample and getattr(one, setting, None) == getattr(config, setting)
        if not same and not isinstance(one, logits_process.LogitNormalization):  # which no draw sees
            kept.append(one)
    known = stopping_criteria.MaxLengthCriteria, stopping_criteria.EosTokenCriteria
    ends: list[Criterion] = [one for one in criteria if not isinstance(one, known)]
    by_row: Callable[[int], Sequence[Processor]] | None = None
    if kept:
        made = [[_of_row(one, row, inputs.responses) for one in kept] for row in range(len(inputs.token_ids))]
        by_row = made.__getitem__
    return Edits(by_row, ends, _stop_strings(criteria))


def _of_row(processor: Any, row: int, responses: int) -> Processor:
    """A processor that knows rows of generate, as one of the attempts of this row alone; others as they are."""
    if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            processor = logits_process.RepetitionPenaltyLogitsProcessor(
                processor.penalty, prompt_ignore_length=int(ignored[row]))
    if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor = logits_process.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row // responses, ids), 1)
    made: Processor = processor
    return made


def _seeds(seed: Any, count: int) -> list[int]:
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise RequestError(f"seed has {len(seed)} numbers and there are {count} prompts: give one, or one for each")
        return [integer("seed", one, 0, 2**64 - 1) for one in seed]
    return [integer("seed", seed, 0, 2**64 - 1)] * count


def _conversations(messages: Any, count: int) -> list[Any]:
    if messages is None:
        return [None] * count
    if isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], Mapping):
        messages = [messages]
    if not isinstance(messages, (list, tuple)) or len(messages) != count:
        raise RequestError(f"messages must be one conversation for each of the {count} prompts")
    return list(messages)


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _power(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


# -- what generate returns ---------------------------------------------------------------------------------------------


def _raise_first(changed: Sequence[Response], responses: Sequence[Response]) -> None:
    for one in changed:
        if one.error is not None:
            raise type(one.error)(f"row {responses.index(one)} of the batch: {one.error}") from one.error


def _padding(config: Any, stops: Sequence[int]) -> int:
    given = config.pad_token_id
    given = given[0] if isinstance(given, (list, tuple)) else given
    return int(given) if given is not None else stops[0] if stops else 0


def _sequences(input_ids: Tensor, responses: Sequence[Response], padding: int) -> Tensor:
    """Int64 [rows, prompt and longest response], padded on the right."""
    longest = max([len(one.token_ids) for one in responses])
    made = [one.token_ids + [padding] * (longest - len(one.token_ids)) for one in responses]
    return torch.cat([input_ids, torch.tensor(made, dtype=input_ids.dtype, device=input_ids.device).reshape(
        len(made), longest)], dim=1)


def _output(response: Response, stops: Sequence[int], strings: Sequence[str]) -> CompletionOutput:
    output = response.output()
    if output.finish_reason == "stop" and output.token_ids[-1] not in stops and response.decode is not None:
        found = find_stop(response.decode(response.token_ids), strings)
        output.stop_reason = found[1] if found else None
    return output
