"""/score, /v1/score, /classify and /pooling: what the reward model says of texts."""

from __future__ import annotations

import base64
import math
import re
import struct
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from stars.errors import RequestError, RewardError
from stars.outputs import Rewards
from stars.serve.http import draws
from stars.serve.http.bodies import JsonRoute
from stars.serve.http.errors import ApiError, api_error
from stars.serve.http.models import check_reward
from stars.serve.http.reward_bodies import (
    WAYS,
    ClassifyRequest,
    OfReward,
    PoolingRequest,
    ScoreRequest,
    messages_of,
    refuse_unknown,
    texts_of,
)
from stars.serve.http.reward_replies import ClassifyReply, PoolingReply, ScoreReply
from stars.serve.http.service import Service, service_of
from stars.serve.http.stars_field import number
from stars.serve.http.streaming import client_closed, dumped, unless_gone

router = APIRouter(tags=["reward"], route_class=JsonRoute)

LABEL = "LABEL_0"
"""What transformers calls the only label of a model that does not name it."""
PLACE = re.compile(r"^(?:responses|prompts)\[(\d+)\]: ")
CONTEXT = re.compile(r"(\d+) tokens for the reward model, whose context is (\d+)")
"""How a reward says that a text is longer than it reads."""


@router.post("/score", response_model=ScoreReply)
@router.post("/v1/score", response_model=ScoreReply)
async def score(request: Request, body: ScoreRequest) -> Response:
    """Rewards of responses to prompts."""
    service = _checked(request, body)
    rewards = await _rewards(service, request, *_divided(body))
    return _answer(service, body, "score", rewards, lambda reward: {"object": "score", "score": reward})


@router.post("/classify", response_model=ClassifyReply)
async def classify(request: Request, body: ClassifyRequest) -> Response:
    """Rewards of texts, each as the probability of a label."""
    service = _checked(request, body)
    rewards = await _rewards(service, request, *_whole(body))
    return _answer(service, body, "classify", rewards,
                   lambda reward: {"label": LABEL, "probs": [reward], "num_classes": 1})


@router.post("/pooling", response_model=PoolingReply)
async def pooling(request: Request, body: PoolingRequest) -> Response:
    """Rewards of texts, as bare numbers."""
    service = _checked(request, body)
    rewards = await _rewards(service, request, *_whole(body))
    encoded = body.encoding_format == "base64"

    def data(reward: float | None) -> dict[str, Any]:
        if encoded:
            packed = struct.pack("<f", math.nan if reward is None else reward)
            return {"object": "pooling", "data": base64.b64encode(packed).decode()}
        return {"object": "pooling", "data": [[reward]] if body.task == "token_classify" else [reward]}

    return _answer(service, body, "pool", rewards, data)


def _checked(request: Request, body: OfReward) -> Service:
    """The service, if it has a reward and the body nothing that is not here."""
    service = service_of(request)
    service.check_open()
    refuse_unknown(body)
    check_reward(service, body.model)
    return service


def _divided(body: ScoreRequest) -> tuple[list[Any], list[Any] | None, str]:
    """(prompts, responses, the parameter that has the responses)."""
    given = [name for name in (*WAYS, *WAYS.values(), "items", "messages") if getattr(body, name) is not None]
    ways = {frozenset(way): way for way in (*WAYS.items(), ("queries", "items"))}
    if given == ["messages"]:
        assert body.messages is not None
        several = isinstance(body.messages[0], list)
        conversations: list[Any] = list(body.messages) if several else [body.messages]
        return [messages_of(f"messages[{index}]" if several else "messages", one, body.chat_template_kwargs)
                for index, one in enumerate(conversations)], None, "messages"
    first, second = ways.get(frozenset(given), ("", ""))
    if not first:
        what = f"has {' and '.join(given)}" if given else "has none of them"
        raise ApiError(400, f"the body {what}: give text_1 and text_2, or messages", given[0] if given else "text_1")
    if body.chat_template_kwargs:
        raise ApiError(400, f"chat_template_kwargs belong to messages, and there is {first}: leave them out",
                       "chat_template_kwargs")
    prompts = texts_of(first, getattr(body, first))
    answers = texts_of(second, getattr(body, second))
    if len(prompts) not in (1, len(answers)):
        raise ApiError(400, f"{first} has {len(prompts)} texts and {second} {len(answers)}: give one {first} for "
                       "all, or one for each", second)
    return [one if isinstance(one, str) else {"prompt_token_ids": one} for one in prompts], answers, second


def _whole(body: ClassifyRequest) -> tuple[list[Any], None, str]:
    """The same of what nobody has divided."""
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "the body must have input or messages, and not both", "input")
    if body.messages is not None:
        if body.add_special_tokens:
            raise ApiError(400, "add_special_tokens is true, and a chat template has them: leave it out",
                           "add_special_tokens")
        return [messages_of("messages", body.messages, body.chat_template_kwargs)], None, "messages"
    if body.chat_template_kwargs:
        raise ApiError(400, "chat_template_kwargs belong to messages, and there is input: leave them out",
                       "chat_template_kwargs")
    texts = texts_of("input", body.input)
    special = body.add_special_tokens is not False
    return [{"prompt_token_ids": one} if isinstance(one, list) else {"prompt": one, "add_special_tokens": special}
            for one in texts], None, "input"


async def _rewards(service: Service, request: Request, prompts: list[Any], answers: list[Any] | None,
                   name: str) -> Rewards:
    """Their rewards; whoever goes away has them scored no further."""
    try:
        rewards = await unless_gone(request.receive, service.engine.score(prompts, answers))
    except (RequestError, RewardError) as error:
        raise _refusal(error, name) from error
    if rewards is None:
        raise client_closed()
    return rewards


def _refusal(error: Exception, name: str) -> ApiError:
    """What is told of a text that cannot be scored. A server that asks for several asks for each by itself then."""
    told = api_error(error, otherwise=name)
    if told.status != 400:
        return told
    message = PLACE.sub(lambda place: f"{name}[{place[1]}]: ", str(told))
    found = CONTEXT.search(message)
    if found is not None:
        place = f"{name}[{message[len(name) + 1:message.index(']')]}]: " if message.startswith(f"{name}[") else ""
        return ApiError(400, f"{place}{found[1]} tokens are more than the reward model's context length of {found[2]}: "
                        "shorten the text", name, "context_length_exceeded")
    return ApiError(400, message, name, "unscorable" if isinstance(error, RewardError) else None)


def _answer(service: Service, body: OfReward, kind: str, rewards: Rewards,
            item: Callable[[float | None], dict[str, Any]]) -> Response:
    reward = service.engine.engine.reward
    raw = body.use_activation is False or reward is not None and reward.activated
    data = [{"index": index, **item(number(one) if raw else _sigmoid(one))} for index, one in enumerate(rewards)]
    usage = {"prompt_tokens": rewards.num_tokens, "total_tokens": rewards.num_tokens, "completion_tokens": 0,
             "prompt_tokens_details": None}
    return Response(dumped({
        "id": f"{kind}-{draws.name()}", "object": "list", "created": int(time.time()),
        "model": body.model or service.settings.model, "data": data, "usage": usage}), media_type="application/json")


def _sigmoid(value: float) -> float:
    """Of -inf, by which a reward rejects, it is 0."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    small = math.exp(value)
    return small / (1.0 + small)
