"""What /v1/completions and /v1/chat/completions answer, as pydantic's models: for the OpenAPI description alone. Fields
that may be missing come where they were asked for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length", "content_filter", "abort"]


class Attempt(BaseModel):
    """A candidate of a segment."""

    text: str | None
    reward: float | None
    threshold: float | None
    accept_probability: float | None
    accepted: bool | None
    logprob: float | None
    token_ids: list[int] | None = None


class Segment(BaseModel):
    """A segment that was committed, with all its candidates."""

    text: str | None
    reward: float | None
    threshold: float | None
    accepted: bool | None = Field(description="Whether the rule accepted it; false: it was the best of those rejected")
    winner: int = Field(description="Which of the attempts it is")
    attempts: list[Attempt]
    token_ids: list[int] | None = None


class ChoiceStars(BaseModel):
    """How a choice came about."""

    reward: float | None
    accept_rate: float | None
    attempts: int
    width: float | None
    finish_reason: str = Field(description="The engine's own word")
    segments: list[Segment] | None = Field(None, description="Where stars.return_segments was true")
    seed: int | None = Field(None, description="Here where there are several prompts")
    prompt_reward: float | None = None


class AnswerStars(BaseModel):
    """How all of them did."""

    policy: dict[str, Any] = Field(description="Its name, and each parameter by its own")
    seed: int | None
    prompt_reward: float | None
    trace: str | None = Field(None, description="A file for `stars trace`, where stars.return_trace was true")


class CachedTokens(BaseModel):
    """Of a prompt, those that were not read again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens that were read and written; of rejected candidates none."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """Of each token, in lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """What both kinds have."""

    index: int
    finish_reason: FinishReason
    stop_reason: int | str | None = Field(description="The stop string or token that ended it")
    stars: ChoiceStars
    token_ids: list[int] | None = None


class CompletionChoice(Choice):
    """A text."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class TokenLogprob(BaseModel):
    """Of one token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """Of one token of an answer."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Of each token."""

    content: list[ContentLogprob]
    refusal: None


class Message(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    """A message."""

    message: Message
    logprobs: ChatLogprobs | None


class Answer(BaseModel):
    """What both kinds have."""

    id: str
    created: int
    model: str
    usage: Usage
    stars: AnswerStars


class CompletionAnswer(Answer):
    """Texts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatAnswer(Answer):
    """Messages."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


EVENTS = {"text/event-stream": {"schema": {"type": "string", "description":
    "Where stream is true: one `data: {JSON}` a committed segment and choice, the last with its finish_reason and "
    "`stars`; with stream_options.include_usage one with `usage` and no choices; then `data: [DONE]`. An error in the "
    "midst of it is an event with `error`."}}}


def answers(model: type[Answer]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with a `model`, or with events."""
    return {200: {"model": model, "content": EVENTS, "description": "All of it, or events"}}
