"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from stars.outputs import RequestOutput
from stars.serve.http.answers import Piece, Shape, answered
from stars.serve.http.asked import Wanted, asked_chat
from stars.serve.http.bodies import JsonRoute
from stars.serve.http.logprobs_field import chat_logprobs, prompt_logprobs
from stars.serve.http.protocol import ChatCompletionRequest
from stars.serve.http.replies import RESPONSES, ChatCompletion
from stars.serve.http.service import service_of

router = APIRouter(tags=["generation"], route_class=JsonRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=RESPONSES)
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Answers a conversation."""
    service = service_of(request)
    return await answered(service, request, asked_chat(service, body), SHAPE)


def _choice(wanted: Wanted, tokenizer: Any, piece: Piece) -> dict[str, Any]:
    return _with_text(wanted, piece, {"message": {"role": "assistant", "content": piece.text, "refusal": None}})


def _delta(wanted: Wanted, tokenizer: Any, piece: Piece) -> dict[str, Any]:
    delta = {"role": "assistant", "content": piece.text} if piece.first else {"content": piece.text}
    choice = _with_text(wanted, piece, {"delta": delta})
    if wanted.return_token_ids and piece.first:
        choice["prompt_token_ids"] = piece.output.prompt_token_ids
    return choice


def _with_text(wanted: Wanted, piece: Piece, text: dict[str, Any]) -> dict[str, Any]:
    """A choice, or what is new of it, around its text."""
    completion = piece.completion
    logprobs = None
    if wanted.logprobs is not None:
        logprobs = chat_logprobs(completion.token_ids, completion.logprobs or [], wanted.logprobs)
    choice = {"index": piece.number, **text, "logprobs": logprobs, "finish_reason": piece.finish_reason,
              "stop_reason": completion.stop_reason}
    return {**choice, "token_ids": completion.token_ids} if wanted.return_token_ids else choice


def _beside(wanted: Wanted, output: RequestOutput) -> Mapping[str, Any]:
    """What vLLM puts beside the choices of a whole answer."""
    beside: dict[str, Any] = {}
    if wanted.return_token_ids:
        beside["prompt_token_ids"] = output.prompt_token_ids
    if wanted.prompt_logprobs:
        beside["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
    return beside


SHAPE = Shape("chatcmpl-", "chat.completion", "chat.completion.chunk", _choice, _delta, _beside)
