"""A body becomes what the engine is asked for: prompts, sampling parameters, a policy; or an ApiError that names the
parameter at fault."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from stars.arguments import shown
from stars.errors import RequestError
from stars.policies import Sample
from stars.sampling import RequestOutputKind, SamplingParams
from stars.serve.http import draws
from stars.serve.http.errors import TOO_LONG, ApiError, api_error
from stars.serve.http.extras import refuse, refuse_within
from stars.serve.http.guidance import Guided, guided
from stars.serve.http.protocol import (
    MAX_PROMPTS,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    Sampled,
    are_ids,
)
from stars.serve.http.service import Service

DEFAULT_MAX_TOKENS = 16
"""Of completions, as in OpenAI's API."""
COMMON = ("temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "top_k",
          "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "bad_words",
          "allowed_token_ids", "skip_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens",
          "prompt_logprobs")
"""Parameters whose names and meanings are those of SamplingParams."""

NO_SEED = (None, -1)
OTHERS = frozenset((*COMMON, "max_tokens", "structured_outputs", "special_tokens", "chat_template_kwargs", "tools",
                    "add_generation_prompt", "continue_final_message", "priority"))
"""Parameters that a sentence of the engine's may be about."""


class Wanted(NamedTuple):
    """What one HTTP request asks for."""

    prompts: list[Any]  # as the engine takes them
    params: list[SamplingParams]  # of each
    guided: Guided
    main: str  # the parameter that holds the prompts
    names: dict[str, str]  # what clients call a parameter that the engine calls otherwise
    priority: int = 0
    user: str | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    prompt_only: bool = False  # whether the completion is left out
    return_token_ids: bool = False
    prompt_logprobs: bool = False  # whether they are shown
    logprobs: int | None = None  # how many of the most probable tokens are shown beside each
    shortens: bool = False  # whether fewer tokens will do, where the context leaves fewer

    def refused(self, error: Exception, number: int | None = None) -> ApiError:
        """What is told of an error that the engine refuses prompt `number`, of several, with."""
        told = api_error(error, given=OTHERS, otherwise=self.main)
        if told.status != 400:
            return told
        message = re.sub(r"\b[a-z_]+\b", lambda word: self.names.get(word[0], word[0]), str(told))
        where = "" if number is None else f"prompt {number}: "
        return ApiError(400, where + message, self.names.get(told.param or "", told.param), told.code)

    def could_be_shorter(self, error: Exception) -> bool:
        """Whether the context is too short for max_tokens, which nobody asked for."""
        return self.shortens and isinstance(error, RequestError) and TOO_LONG.search(str(error)) is not None


def asked_completion(service: Service, body: CompletionRequest) -> Wanted:
    """What a body of /v1/completions asks for."""
    refuse(body)
    prompts = _prompts(body)
    most = service.engine.max_requests
    if most is not None and len(prompts) > most:
        raise ApiError(400, f"there are {len(prompts)} prompts, and no more than {most} may run and wait at once: "
                       "split the request", "prompt")
    judged = guided(service, body.model, body.stars)
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = max(DEFAULT_MAX_TOKENS, body.min_tokens or 0)
    prompt_only = max_tokens == 0
    if prompt_only:
        if not body.echo:
            raise ApiError(400, "max_tokens is 0, which is for echo alone: give at least 1", "max_tokens")
        judged = judged._replace(policy=Sample())
    given = {"max_tokens": max(1, max_tokens), "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        given["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    params, names = _params(body, given)
    return _wanted(body, prompts, params, judged, "prompt", names)._replace(
        echo=bool(body.echo), prompt_only=prompt_only, logprobs=body.logprobs)


def asked_chat(service: Service, body: ChatCompletionRequest) -> Wanted:
    """What a body of /v1/chat/completions asks for."""
    refuse(body)
    prompt = {"messages": [message_of(number, message) for number, message in enumerate(body.messages)],
              "tools": _tools(body), "chat_template_kwargs": body.chat_template_kwargs,
              "add_generation_prompt": body.add_generation_prompt,
              "continue_final_message": body.continue_final_message, "special_tokens": body.special_tokens}
    judged = guided(service, body.model, body.stars)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}: "
                       "give the second alone", "max_completion_tokens")
    if body.max_tokens == 0:
        raise ApiError(400, "max_tokens is 0, it must be at least 1", "max_tokens")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    default = max(service.settings.default_max_tokens, body.min_tokens or 0)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs says how many are wanted beside each token's, and logprobs is not true: give "
                       "it too", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params, names = _params(body, {"max_tokens": default if max_tokens is None else max_tokens, "logprobs": logprobs})
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return _wanted(body, [prompt], params, judged, "messages", names)._replace(
        logprobs=logprobs, shortens=max_tokens is None)


def _wanted(body: Sampled, prompts: list[Any], params: SamplingParams, judged: Guided, main: str,
            names: dict[str, str]) -> Wanted:
    if not hasattr(judged.policy, "segment_size") and hasattr(judged.policy, "max_segment"):
        names["stars.segment_size"] = "stars.max_segment"
    options = body.stream_options
    if options is not None:
        refuse_within("stream_options", options.model_extra, type(options).model_fields)
        if not body.stream:
            raise ApiError(400, "stream_options are given and stream is not true: leave them out", "stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs do not come in a stream: leave one out", "prompt_logprobs")
    of_each = [params] * len(prompts)
    if body.seed in NO_SEED:
        of_each[1:] = [dataclasses.replace(params, seed=draws.seed()) for _ in prompts[1:]]
    return Wanted(prompts, of_each, judged, main, names, body.priority or 0, body.user, bool(body.stream),
                  bool(options and options.include_usage), bool(options and options.continuous_usage_stats),
                  return_token_ids=bool(body.return_token_ids), prompt_logprobs=body.prompt_logprobs is not None)


def _params(body: Sampled, given: dict[str, Any]) -> tuple[SamplingParams, dict[str, str]]:
    """The sampling parameters, and which of them clients call otherwise."""
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    values = {name: getattr(body, name) for name in COMMON if getattr(body, name) is not None} | given
    if body.seed in NO_SEED:
        values["seed"] = draws.seed()
    structured, names = _structured(body), {}
    if structured is not None and body.structured_outputs is None:
        names["structured_outputs"] = "response_format"
    try:
        return SamplingParams(**values, structured_outputs=structured, output_kind=kind), names
    except RequestError as error:
        told = api_error(error, given=OTHERS)
        raise ApiError(400, str(told), names.get(told.param or "", told.param)) from error


def _structured(body: Sampled) -> dict[str, Any] | None:
    """structured_outputs as they are, or what response_format makes of them."""
    format = body.response_format
    if format is None:
        return body.structured_outputs
    schema = format.json_schema
    refuse_within("response_format", format.model_extra, type(format).model_fields)
    if format.type != "text" and body.structured_outputs is not None:
        raise ApiError(400, "response_format and structured_outputs both say what the text must be: give one",
                       "response_format")
    if format.type != "json_schema":
        if schema is not None:
            raise ApiError(400, f'response_format has a json_schema and its type is {shown(format.type)}: give '
                           '"json_schema"', "response_format.type")
        return {"json_object": True} if format.type == "json_object" else body.structured_outputs
    if schema is None or schema.schema_ is None:
        raise ApiError(400, "response_format has no schema: give it as json_schema.schema",
                       "response_format.json_schema")
    refuse_within("response_format.json_schema", schema.model_extra, ("name", "description", "schema", "strict"))
    return {"json": schema.schema_}


def _prompts(body: CompletionRequest) -> list[Any]:
    given = body.prompt
    several = given if isinstance(given, list) and given and not are_ids(given) else [given]
    if len(several) > MAX_PROMPTS:
        raise ApiError(400, f"there are {len(several)} prompts, the most is {MAX_PROMPTS}: split the request", "prompt")
    if given is None:
        raise ApiError(400, "prompt is missing: give it", "prompt")
    beside = {} if body.special_tokens is None else {"special_tokens": body.special_tokens}
    of_text = beside if body.add_special_tokens is None else {**beside, "add_special_tokens": body.add_special_tokens}
    prompts: list[Any] = []
    for one in several:
        if isinstance(one, str):
            prompts.append({"prompt": one, **of_text})
        elif are_ids(one):
            prompts.append({"prompt_token_ids": one, **beside})
        else:
            raise ApiError(400, f"prompt is {shown(given)}, it must be a text, a list of token ids, or a list "
                           "of either", "prompt")
    return prompts


def message_of(number: int, message: ChatMessage) -> dict[str, Any]:
    """A message as the engine takes it: what is null left out, and the role that OpenAI calls developer by the name
    that chat templates know it by."""
    given = {name: value for name, value in message.model_dump(exclude_unset=True).items()
             if value is not None or name == "content"}
    if isinstance(message.content, list):
        given["content"] = [_part(number, part) for part in message.content]
    if message.role == "developer":
        given["role"] = "system"
    return given


def _part(number: int, part: dict[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    text = part.get({"text": "text", "refusal": "refusal"}.get(kind, "") if isinstance(kind, str) else "")
    if not isinstance(text, str):
        raise ApiError(400, f"messages[{number}].content has a part of type {shown(kind)} that is no text, and models "
                       'here read text only: give {"type": "text", "text": ...}', "messages")
    return {"type": "text", "text": text}


def _tools(body: ChatCompletionRequest) -> list[dict[str, Any]] | None:
    choice = body.tool_choice
    if choice not in (None, "none", "auto"):
        raise ApiError(400, f"tool_choice is {shown(choice)}, and calls are not forced: leave it out, or say what the "
                       "text must be by response_format", "tool_choice")
    return None if choice == "none" else body.tools
