"""SamplingParams: how the language model proposes tokens. Names and meanings are vLLM's, and so are the defaults,
except for max_tokens, which is 128 here."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stars.arguments import flag, integer, known_by_name, number_below, real, shown
from stars.errors import RequestError
from stars.structured import StructuredOutputsParams
from stars.vllm_names import SAMPLING

MIN_REPETITION, MAX_REPETITION = 0.01, 100.0  # beyond, penalised logits would lose all meaning or overflow
MAX_SAMPLES = 1 << 12  # the sample index has 12 bits of the random counter
MIN_NORMAL, MAX_FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127
MAX_LOGPROBS = 20  # most tokens besides the drawn one whose log-probabilities are returned, as in vLLM
MAX_BIAS = 100.0  # as in vLLM and OpenAI's API: a bias beyond decides everything


class RequestOutputKind(enum.Enum):
    """What an output holds: all so far, what is new since the last one, or all at the end and nothing before."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@known_by_name(SAMPLING)
@dataclass(frozen=True)
class SamplingParams:
    """The proposal distribution and the end of a response; validated once, on construction (RequestError).

    Numbers may be numpy's, and are kept as Python's. Parameters that vLLM has and this class has not are refused by
    name (`stars.vllm_names` lists them), unless their value asks for nothing.

    Filters apply in vLLM's order: temperature, min_p, top_k, top_p. They shape the proposal only; the acceptance
    temperature of a policy is its own parameter (`beta`).

    temperature: 0 takes the most probable token, so that all attempts of a segment are equal.
    top_k, top_p, min_p: 0, 1.0 and 0.0 switch the filter off, and so does a top_k of the whole vocabulary or more.
    max_tokens: response tokens, EOS included; `N` of the threshold's schedule. None: as many as max_model_len leaves.
    n: completions of each prompt; they use random streams 0 .. n-1.
    stop: strings that end the response and are left out of its text.
    stop_token_ids: token ids that end the response besides the model's EOS ids.
    seed: 64 bits; None draws one, which the output reports, and so does -1, as in vLLM.
    presence_penalty, frequency_penalty: -2 to 2, subtracted from the logit of a token of the response, once and as
        often as it is there; 0 is off. A candidate's own tokens count, those of other candidates do not.
    repetition_penalty: above 0; divides the positive logits of tokens of prompt and response, multiplies the others; 1
        is off. Penalties come before temperature and filters.
    logprobs: 0 to 20 most probable tokens whose log-probabilities come with each token of the response, besides its
        own, which always does: of what it was drawn from, temperature and filters left out. None: none.
    attempt_logprobs: the same of every attempt, rejected ones too.
    prompt_logprobs: as `logprobs`, of the tokens of the prompt, by the engine's own model's logits as they are. Such a
        prompt is read anew, whatever of it is in the cache.
    logit_bias: by token id, of at most 1024 of them, -100 to 100, added to its logit before penalties.
    min_tokens: of a response before an EOS or stop token may be drawn; where structured_outputs leave nothing else, it
        is drawn all the same.
    bad_words: texts that no response may contain, as vLLM tokenises them: with and without a space before; at most 16
        tokens each, and at most 1024 of several tokens.
    allowed_token_ids: the only ids that may be drawn.
    include_stop_str_in_output: keeps the stop string, or the text of the stop token, that ended the response in its
        text. Rewards read the same with it and without, as with the next two.
    skip_special_tokens: False shows special tokens in the text. Stop strings are found in the text without them.
    detokenize: False leaves the text empty, and decodes nothing but what a reward reads.
    truncate_prompt_tokens: keeps so many of a prompt's last tokens, BOS or not; -1 as many as fit beside max_tokens.
        Rewards read what is left too, but those that render messages themselves read them whole.
    output_kind: what `stream`, `step` and `AsyncEngine` return; `generate` returns all at the end.
    structured_outputs: a StructuredOutputsParams, or its fields in a dictionary: the texts that may be drawn at all.

    Bias, bans and masks come before penalties, those before temperature and filters. A response that they leave no
    token ends with an error. Methods that compare two distributions refuse them by name.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = 128
    n: int = 1
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    attempt_logprobs: bool = False
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    min_tokens: int = 0
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        max_tokens = self.max_tokens
        checked: dict[str, Any] = {
            "temperature": _between("temperature", self.temperature, 0.0, MAX_FLOAT32, "a finite number of at least "
                                    "0.0 that 32 bits can hold"),
            "top_k": max(integer("SamplingParams.top_k", self.top_k, -1), 0),
            "top_p": _between("top_p", self.top_p, math.ulp(0.0), 1.0, "above 0 and at most 1"),
            "min_p": _between("min_p", self.min_p, 0.0, 1.0, "between 0 and 1"),
            "max_tokens": None if max_tokens is None else integer("SamplingParams.max_tokens", max_tokens, 1),
            "n": integer("SamplingParams.n", self.n, 1),
            "stop": self._stop_strings(),
            "stop_token_ids": self._stop_token_ids(),
            "ignore_eos": flag("SamplingParams.ignore_eos", self.ignore_eos),
            "seed": self._seed(),
            "presence_penalty": _between("presence_penalty", self.presence_penalty, -2.0, 2.0, "between -2 and 2"),
            "frequency_penalty": _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "between -2 and 2"),
            "repetition_penalty": _between(
                "repetition_penalty", self.repetition_penalty, MIN_REPETITION, MAX_REPETITION,
                f"between {MIN_REPETITION} and {MAX_REPETITION:g}; 1.0 switches it off"),
            "logprobs": _count("logprobs", self.logprobs),
            "attempt_logprobs": flag("SamplingParams.attempt_logprobs", self.attempt_logprobs),
            "prompt_logprobs": _count("prompt_logprobs", self.prompt_logprobs),
            "logit_bias": self._logit_bias(),
            "min_tokens": integer("SamplingParams.min_tokens", 0 if self.min_tokens is None else self.min_tokens, 0),
            "bad_words": self._bad_words(),
            "allowed_token_ids": self._allowed_token_ids(),
            "include_stop_str_in_output": flag("SamplingParams.include_stop_str_in_output",
                                               self.include_stop_str_in_output),
            "skip_special_tokens": flag("SamplingParams.skip_special_tokens", self.skip_special_tokens),
            "detokenize": flag("SamplingParams.detokenize", self.detokenize),
            "truncate_prompt_tokens": self._truncate_prompt_tokens(),
            "output_kind": self._output_kind(),
            "structured_outputs": StructuredOutputsParams.of(self.structured_outputs),
        }
        if checked["stop"] and not checked["detokenize"]:
            raise RequestError("SamplingParams.stop is found in the text, and detokenize is False: give "
                               "stop_token_ids, or leave detokenize out")
        if checked["attempt_logprobs"] and checked["logprobs"] is None:
            raise RequestError("SamplingParams.attempt_logprobs says whose log-probabilities are returned and logprobs "
                               "is None: give logprobs too")
        if checked["max_tokens"] is not None and checked["min_tokens"] > checked["max_tokens"]:
            raise RequestError(f"SamplingParams.min_tokens is {shown(self.min_tokens)} and max_tokens "
                               f"{shown(max_tokens)}: lower min_tokens or raise max_tokens")
        if checked["n"] > MAX_SAMPLES:
            raise RequestError(f"SamplingParams.n is {shown(self.n)}, the most is {MAX_SAMPLES}: split the request")
        if checked["temperature"] < MIN_NORMAL:  # the sampler's 32 bits would lose it, and zero has its own path
            checked["temperature"] = 0.0
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _seed(self) -> int | None:
        seed = None if self.seed is None else integer("SamplingParams.seed", self.seed, -(1 << 63), (1 << 64) - 1)
        return None if seed == -1 else seed

    def _stop_strings(self) -> tuple[str, ...]:
        texts = _items("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        if not all(isinstance(text, str) and text for text in texts):
            raise RequestError("SamplingParams.stop must be a string or a list of strings, none of them empty")
        return texts

    def _stop_token_ids(self) -> tuple[int, ...]:
        try:
            return tuple(integer("it", token, 0) for token in _items("stop_token_ids", self.stop_token_ids))
        except RequestError:
            raise RequestError(f"SamplingParams.stop_token_ids must be a list of token ids, 0 or above, and is "
                               f"{shown(self.stop_token_ids)}") from None

    def _logit_bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"SamplingParams.logit_bias is {shown(self.logit_bias)}, it must be a dictionary of "
                               "token ids and numbers")
        bias: dict[int, float] = {}
        for token, value in self.logit_bias.items():
            if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 20:
                token = int(token)  # JSON's keys are texts
            token = integer("a token id of SamplingParams.logit_bias", token, 0)
            bias[token] = real(f"SamplingParams.logit_bias[{shown(token)}]", value,
                               f"between {-MAX_BIAS:g} and {MAX_BIAS:g}", lambda number: abs(number) <= MAX_BIAS)
        return bias or None

    def _bad_words(self) -> tuple[str, ...]:
        words = _items("bad_words", (self.bad_words,) if isinstance(self.bad_words, str) else self.bad_words)
        if not all(isinstance(word, str) and word for word in words):
            raise RequestError("SamplingParams.bad_words must be a list of strings, none of them empty")
        return tuple(dict.fromkeys(words))

    def _allowed_token_ids(self) -> tuple[int, ...] | None:
        if self.allowed_token_ids is None:
            return None
        try:
            ids = tuple(dict.fromkeys(integer("it", token, 0)
                                      for token in _items("allowed_token_ids", self.allowed_token_ids)))
        except RequestError:
            raise RequestError(f"SamplingParams.allowed_token_ids must be a list of token ids, 0 or above, and is "
                               f"{shown(self.allowed_token_ids)}") from None
        if not ids:
            raise RequestError("SamplingParams.allowed_token_ids is empty, so that nothing could be drawn: give at "
                               "least one id, or None")
        return ids

    def _truncate_prompt_tokens(self) -> int | None:
        given = self.truncate_prompt_tokens
        if given is None:
            return None
        number = integer("SamplingParams.truncate_prompt_tokens", given, -1)
        if number == 0:
            raise RequestError("SamplingParams.truncate_prompt_tokens is 0, which leaves no prompt: give at least 1, "
                               "-1 for as many as fit, or None")
        return number

    def _output_kind(self) -> RequestOutputKind:
        given = self.output_kind
        name = given.name if isinstance(given, enum.Enum) else given  # vLLM's own enumeration has the same names
        for kind in RequestOutputKind:
            if isinstance(name, (str, int)) and name in (kind.name, kind.value) and not isinstance(name, bool):
                return kind
        raise RequestError(f"SamplingParams.output_kind is {shown(given)}, it must be one of "
                           f"{', '.join(f'RequestOutputKind.{kind.name}' for kind in RequestOutputKind)}")

    def settle(self, prompt_tokens: int, max_model_len: int, vocab_size: int) -> SamplingParams:
        """These parameters for one prompt and model: max_tokens is a number, top_k is off where it keeps everything.

        Raises RequestError where the prompt leaves no room or not the room for min_tokens, and for token ids that the
        model does not have.
        """
        for name, token_ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias),
                                ("allowed_token_ids", self.allowed_token_ids)):
            outside = next((token for token in token_ids or () if token >= vocab_size), None)
            if outside is not None:
                raise RequestError(f"SamplingParams.{name} has {shown(outside)}, which is outside the model's "
                                   f"vocabulary of {vocab_size}: use ids of the model's tokenizer")
        changes: dict[str, Any] = {}
        if self.top_k >= vocab_size:
            changes["top_k"] = 0
        if self.max_tokens is None:
            if prompt_tokens >= max_model_len:
                raise RequestError(f"the prompt of {prompt_tokens} tokens leaves no room for a response, the limit is "
                                   f"{max_model_len}: shorten the prompt or raise max_model_len")
            changes["max_tokens"] = max_model_len - prompt_tokens
            if self.min_tokens > changes["max_tokens"]:
                raise RequestError(f"SamplingParams.min_tokens is {self.min_tokens} and the prompt of {prompt_tokens} "
                                   f"tokens leaves {changes['max_tokens']}: lower min_tokens or shorten the prompt")
        return dataclasses.replace(self, **changes) if changes else self

    @cached_property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p is on."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @cached_property
    def penalties(self) -> bool:
        """Whether one of the penalties is on."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


def _count(name: str, value: Any) -> int | None:
    if number_below(value, 0):  # as -1, which is all of the vocabulary in vLLM
        raise RequestError(f"SamplingParams.{name} is {shown(value)}, it must be an integer from 0 to {MAX_LOGPROBS}, "
                           "the most that is returned")
    return None if value is None else integer(f"SamplingParams.{name}", value, 0, MAX_LOGPROBS)


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    try:
        return tuple(value)
    except Exception:  # no list, or one that cannot be read
        raise RequestError(f"SamplingParams.{name} is {shown(value)}, it must be a list") from None


def _between(name: str, value: Any, least: float, most: float, wanted: str) -> float:
    return real(f"SamplingParams.{name}", value, wanted, lambda number: least <= number <= most)
