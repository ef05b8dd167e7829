"""What clients may send to /v1/completions and /v1/chat/completions, as pydantic's models: they make the OpenAPI
description. OpenAI's parameters, vLLM's beside them, and `stars`. null is as good as absent, everywhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic.config import JsonDict

from stars.intake import MAX_PRIORITY, MAX_USER
from stars.sampling import MAX_BIAS, MAX_LOGPROBS, MAX_REPETITION, MAX_SAMPLES, MIN_REPETITION

MAX_SENT_USER = MAX_USER - 16  # the API key's name is put before it
MAX_PROMPTS = 1024  # of one request: each is one of the engine's
MAX_STOPS, MAX_STOP = 64, 1024  # strings, and characters of one: each is looked for in every candidate
KNOWN_ONLY: JsonDict = {"additionalProperties": False}  # `extras.refuse` says so in a better sentence
STRICT = ConfigDict(strict=True, extra="allow", json_schema_extra=KNOWN_ONLY)


class _Hashable(FailFast):
    """As pydantic's, for unions, whose members Python 3.11 hashes."""

    __hash__ = object.__hash__


FIRST_ONLY = _Hashable()  # of a long list that is wrong everywhere one error is told
Texts = Annotated[list[str], FIRST_ONLY]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], FIRST_ONLY]
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP}
Stop = Annotated[
    list[Annotated[str, Field(max_length=MAX_STOP)]], FIRST_ONLY, Field(max_length=MAX_STOPS),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]})]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
Prompts = Annotated[Any, WithJsonSchema({"anyOf": [
    _TEXT, _IDS, *({"type": "array", "items": of, "minItems": 1, "maxItems": MAX_PROMPTS} for of in (_TEXT, _IDS))]})]
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": {
    "type": "object", "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}}]}
Seed = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]


def are_ids(given: Any) -> bool:
    """Whether it is a list of token ids, rather than one of texts or of such lists."""
    return isinstance(given, list) and all(type(item) is int for item in given)


class Guidance(BaseModel):
    """How candidates of a segment are accepted or rejected. Besides what is named here it has the parameters of the
    policy, by their names: `reward_threshold`, `beta`, `segment_size`, `max_attempts`, `width` and so on."""

    model_config = ConfigDict(strict=True, extra="allow")

    policy: str | None = Field(None, description="one of `stars methods`, or \"plain\"; the server's default otherwise")
    budget: dict[str, Any] | None = Field(None, description="bounds on the request, as stars.Budget has them: seconds, "
                                          "attempts, lm_tokens, rm_calls")
    return_segments: bool | None = Field(None, description="whether segments come with all their candidates")
    return_trace: bool | None = Field(None, description="whether the text of a file for `stars trace` comes")


class StreamOptions(BaseModel):
    """What a stream says besides its text."""

    model_config = STRICT

    include_usage: bool | None = Field(None, description="whether usage comes last, with no choices")
    continuous_usage_stats: bool | None = Field(None, description="whether each event has the usage so far")
    include_obfuscation: bool | None = Field(None, description="OpenAI's; nothing is padded here")


class JsonSchema(BaseModel):
    """A schema that the text is to fit."""

    model_config = STRICT

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="held always")


class ResponseFormat(BaseModel):
    """OpenAI's way to ask for JSON."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampled(BaseModel):
    """What both addresses take."""

    model_config = STRICT

    model: str | None = Field(None, description="a served name, name:POLICY or name:plain; the default otherwise")
    stars: Guidance | None = None

    temperature: float | None = Field(None, ge=0.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="choices for each prompt")
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None = Field(
        None, description="by token id, of at most 1024 of them")
    user: str | None = Field(None, max_length=MAX_SENT_USER, description="whose it is: users get even shares")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, ge=MIN_REPETITION, le=MAX_REPETITION)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    bad_words: Texts | None = None
    allowed_token_ids: Ids | None = Field(None, min_length=1)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, description="of the prompt's last tokens; -1: that fit")
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    structured_outputs: dict[str, Any] | None = Field(
        None, description="exactly one of json, regex, choice, grammar and json_object")
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="lower ones come first")
    special_tokens: Literal["parse", "text"] | None = Field(
        None, description='"text": control tokens in the prompt are the texts they are')
    return_token_ids: bool | None = Field(None, description="whether token ids come beside texts")


class CompletionRequest(Sampled):
    """A text, or several, to go on with. max_tokens is 16 where nothing is said, as OpenAI's."""

    prompt: Prompts
    add_special_tokens: bool | None = Field(
        None, description="whether the tokenizer's special tokens, such as BOS, are put around texts: true unless told "
                          "otherwise")
    echo: bool | None = Field(None, description="whether the prompt comes before its completion")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class ChatMessage(BaseModel):
    """One message; whatever else it has goes to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"anyOf": [
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
        {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array"}}}]})

    role: str = Field(min_length=1)
    content: Annotated[str | list[dict[str, Any]] | None, WithJsonSchema(_CONTENT)] = Field(
        None, description='a text, or {"type": "text", "text": ...} of them')
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatCompletionRequest(Sampled):
    """A conversation to be answered."""

    messages: Annotated[list[ChatMessage], FIRST_ONLY, Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[dict[str, Any]], FIRST_ONLY] | None = Field(
        None, description="what the chat template shows the model; calls are not taken out of its text")
    tool_choice: str | dict[str, Any] | None = Field(None, description='"none" or "auto"')
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
