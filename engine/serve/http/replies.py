"""What /v1/completions and /v1/chat/completions answer, for the OpenAPI description alone: answers are built as
dictionaries."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stars.serve.http.description import responses

Reason = Literal["stop", "length", "content_filter", "abort"]


class AttemptRecord(BaseModel):
    """A candidate of a segment, in the order in which they were drawn."""

    text: str | None
    reward: float | None = Field(description="null where an earlier candidate had won")
    threshold: float | None
    accept_probability: float | None
    accepted: bool
    logprob: float | None
    token_ids: list[int] | None = None


class SegmentRecord(BaseModel):
    """A committed segment, with all candidates that were drawn for it."""

    text: str | None
    reward: float | None
    threshold: float | None
    accepted: bool = Field(description="false where all candidates had been rejected")
    winner: int = Field(description="the place of the committed one in `attempts`")
    attempts: list[AttemptRecord]
    token_ids: list[int] | None = None


class ChoiceStars(BaseModel):
    """What the reward said of a choice."""

    reward: float | None
    accept_rate: float | None
    attempts: int
    width: int
    finish_reason: str = Field(description="the engine's own word")
    segments: list[SegmentRecord] | None = None
    seed: int | None = Field(None, description="with several prompts")
    prompt_reward: float | None = Field(None, description="with several prompts")


class PolicyRecord(BaseModel):
    """A policy, with its parameters."""

    model_config = ConfigDict(extra="allow")

    name: str


class AnswerStars(BaseModel):
    """How an answer was guided."""

    policy: PolicyRecord
    seed: int | None
    prompt_reward: float | None
    trace: str | None = Field(None, description="the text of a file for `stars trace`")


class CachedTokens(BaseModel):
    """What of a prompt was read before."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens; of a completion those that were accepted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason
    stop_reason: int | str | None
    stars: ChoiceStars
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    stars: AnswerStars


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class DrawnLogprob(TokenLogprob):
    """A token of an answer, and the most probable ones at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message's tokens."""

    content: list[DrawnLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason
    stop_reason: int | str | None
    stars: ChoiceStars
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    stars: AnswerStars
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


EVENTS = {"content": {"text/event-stream": {"schema": {
    "type": "string", "description": "with `stream`: an event for each committed segment and choice"}}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: EVENTS, **responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503)}
"""Of both addresses, besides what they answer whole."""
