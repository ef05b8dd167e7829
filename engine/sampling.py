"""SamplingParams: how the language model proposes tokens. Names, defaults and meanings are vLLM's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stars.errors import RequestError

LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0  # beyond, penalised logits would lose all meaning or overflow
MAX_SAMPLES = 1 << 12  # the sample index has 12 bits of the random counter


@dataclass(frozen=True)
class SamplingParams:
    """The proposal distribution and the end of a response; validated once, on construction (RequestError).

    Filters apply in vLLM's order: temperature, min_p, top_k, top_p. They shape the proposal only; the acceptance
    temperature of a policy is its own parameter (`beta`).

    temperature: 0 takes the most probable token, so that all attempts of a segment are equal.
    top_k, top_p, min_p: 0, 1.0 and 0.0 switch the filter off.
    max_tokens: response tokens, EOS included; `N` of the threshold's schedule.
    n: completions of each prompt; they use random streams 0 .. n-1.
    stop: strings that end the response and are left out of its text.
    stop_token_ids: token ids that end the response beside the model's EOS ids.
    seed: 64 bits; None draws one, which the output reports.
    presence_penalty, frequency_penalty: -2 to 2, subtracted from the logit of a token of the response, once and as
        often as it is there; 0 is off. A candidate's own tokens count, those of other candidates do not.
    repetition_penalty: above 0; divides the positive logits of tokens of prompt and response, multiplies the others; 1
        is off. Penalties come before temperature and filters.

    The fields from min_tokens on exist in vLLM and not here: any value but the default is refused by name.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 128
    n: int = 1
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logits_processors: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self)[13:]:
            if getattr(self, field.name) != field.default:
                raise RequestError(f"SamplingParams.{field.name} is not implemented: leave it at {field.default!r}")
        _finite_at_least("temperature", self.temperature, 0.0)
        _integer_at_least("top_k", self.top_k, -1)
        _integer_at_least("max_tokens", self.max_tokens, 1)
        _integer_at_least("n", self.n, 1)
        if self.n > MAX_SAMPLES:
            raise RequestError(f"SamplingParams.n is {self.n}, the most is {MAX_SAMPLES}: split the request")
        if not is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"SamplingParams.top_p is {self.top_p!r}, it must be above 0 and at most 1")
        if not is_number(self.min_p) or not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"SamplingParams.min_p is {self.min_p!r}, it must be between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not is_number(value) or not -2.0 <= value <= 2.0:
                raise RequestError(f"SamplingParams.{name} is {value!r}, it must be between -2 and 2")
        if not is_number(self.repetition_penalty) or not LEAST_REPETITION <= self.repetition_penalty <= MOST_REPETITION:
            raise RequestError(f"SamplingParams.repetition_penalty is {self.repetition_penalty!r}, it must be between "
                               f"{LEAST_REPETITION} and {MOST_REPETITION:g}; 1.0 switches it off")
        if self.seed is not None and not (isinstance(self.seed, int) and -(1 << 63) <= self.seed < 1 << 64):
            raise RequestError(f"SamplingParams.seed is {self.seed!r}, it must be None or an integer of 64 bits")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        stop = _items("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError("SamplingParams.stop must be a string or a list of strings, none of them empty")
        object.__setattr__(self, "stop", stop)
        stop_token_ids = _items("stop_token_ids", self.stop_token_ids)
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in stop_token_ids):
            raise RequestError("SamplingParams.stop_token_ids must be a list of token ids, 0 or above")
        object.__setattr__(self, "stop_token_ids", stop_token_ids)

    @property
    def filters(self) -> bool:
        """Whether top_k, top_p or min_p is on."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalties(self) -> bool:
        """Whether one of the penalties is on."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float (a bool is neither)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise RequestError(f"SamplingParams.{name} is {value!r}, it must be a list")
    return tuple(value)


def _finite_at_least(name: str, value: float, least: float) -> None:
    if not is_number(value) or not math.isfinite(value) or value < least:
        raise RequestError(f"SamplingParams.{name} is {value!r}, it must be a finite number of at least {least}")


def _integer_at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"SamplingParams.{name} is {value!r}, it must be an integer of at least {least}")
