"""/v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from stars.outputs import Logprob, RequestOutput
from stars.serve.http.answers import Piece, Shape, answered
from stars.serve.http.asked import Wanted, asked_completion
from stars.serve.http.bodies import JsonRoute
from stars.serve.http.logprobs_field import completion_logprobs, prompt_logprobs
from stars.serve.http.protocol import CompletionRequest
from stars.serve.http.replies import RESPONSES, Completion
from stars.serve.http.service import service_of

router = APIRouter(tags=["generation"], route_class=JsonRoute)


@router.post("/v1/completions", response_model=Completion, responses=RESPONSES)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Goes on with a text, or with several."""
    service = service_of(request)
    return await answered(service, request, asked_completion(service, body), SHAPE)


def _choice(wanted: Wanted, tokenizer: Any, piece: Piece) -> dict[str, Any]:
    """A choice, or what is new of it: they are of one shape."""
    completion, output, text = piece.completion, piece.output, piece.text
    token_ids = completion.token_ids
    entries: list[dict[int, Logprob] | None] = list(completion.logprobs or ())
    if wanted.prompt_only:
        text, token_ids, entries = "", [], []
    if wanted.echo and piece.first:
        text = _prompt_text(wanted, tokenizer, output) + text
        if wanted.logprobs is not None:
            of_prompt = [None if entry is None else dict(list(entry.items())[: wanted.logprobs + 1])
                         for entry in output.prompt_logprobs or [None] * len(output.prompt_token_ids)]
            token_ids, entries = [*output.prompt_token_ids, *token_ids], [*of_prompt, *entries]
    choice: dict[str, Any] = {"index": piece.number, "text": text, "logprobs": None,
                              "finish_reason": piece.finish_reason, "stop_reason": completion.stop_reason}
    if piece.finish_reason is not None and wanted.prompt_only:
        choice |= {"finish_reason": "length", "stop_reason": None}
    if wanted.logprobs is not None:
        assert piece.places is not None
        choice["logprobs"] = completion_logprobs(token_ids, entries, piece.places.of(token_ids))
    if wanted.return_token_ids:
        choice["token_ids"] = [] if wanted.prompt_only else completion.token_ids
        choice["prompt_token_ids"] = output.prompt_token_ids if piece.first else None
    if wanted.prompt_logprobs:
        choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
    return choice


def _prompt_text(wanted: Wanted, tokenizer: Any, output: RequestOutput) -> str:
    """The prompt as its completion follows it: as it was given, or what is decoded of its token ids."""
    if isinstance(output.prompt, str) and wanted.params[0].truncate_prompt_tokens is None:
        return output.prompt
    return "" if tokenizer is None else str(tokenizer.decode(output.prompt_token_ids))


def _beside(wanted: Wanted, output: RequestOutput) -> Mapping[str, Any]:
    return {}


SHAPE = Shape("cmpl-", "text_completion", "text_completion", _choice, _choice, _beside)
