"""/v1/calibrate: a threshold for prompts, of plain samples that share the engine with all other requests."""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from stars.arguments import shown
from stars.calibration import Calibration, PlainSample, PlainSegments
from stars.errors import RequestError, RewardError
from stars.intake import MAX_PRIORITY
from stars.plan import DRAFT_SIZE, MAX_SIZE
from stars.sampling import MAX_BIAS, MAX_REPETITION, MIN_REPETITION, RequestOutputKind, SamplingParams
from stars.serve.http import draws
from stars.serve.http.asked import DEFAULT_MAX_TOKENS
from stars.serve.http.bodies import JsonRoute
from stars.serve.http.errors import ApiError, api_error
from stars.serve.http.extras import refuse_unknown
from stars.serve.http.models import check_reward
from stars.serve.http.protocol import FIRST_ONLY, MAX_SENT_USER, Ids, Seed, Stop, Texts, are_ids
from stars.serve.http.reward_replies import CalibrationReply
from stars.serve.http.service import Service, service_of, user_of
from stars.serve.http.streaming import client_closed, dumped, unless_gone

router = APIRouter(tags=["reward"], route_class=JsonRoute)

MAX_PROMPTS, MAX_SAMPLES, MAX_TOGETHER = 256, 256, 4096
"""Of one calibration, and of all of its prompts together: samples."""
AT_ONCE = 2
"""Calibrations under way; beyond, a client is told to come back."""
RETRY_SECONDS = 10
WINDOW = 4
"""Prompts that are under way at once, of one calibration: more would stand in other requests' line."""
_under_way: weakref.WeakKeyDictionary[Service, int] = weakref.WeakKeyDictionary()

_ANY_PROMPT = {"anyOf": [{"type": "string", "minLength": 1},
                         {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                         {"type": "object", "required": ["messages"]}]}
Prompt = Annotated[Any, WithJsonSchema(_ANY_PROMPT)]


class CalibrationRequest(BaseModel):
    """Prompts as those to come, and how they will be sampled."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(
        description='texts, lists of token ids, or {"messages": [...]}')
    model: str | None = Field(None, description="a served name; the default otherwise")
    quantile: float | None = Field(None, ge=0.0, le=1.0, description="of the rewards: 0.9")
    num_samples: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="for each prompt: 16")
    segment_size: int | None = Field(None, ge=1, le=MAX_SIZE, description=f"prefixes of so many tokens, twice as many, "
                                     f"… are scored too: {DRAFT_SIZE}")
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    user: str | None = Field(None, max_length=MAX_SENT_USER, description="whose samples they are; a name of their own")
    max_tokens: int | None = Field(None, ge=1, description=f"of a sample: {DEFAULT_MAX_TOKENS}")
    temperature: float | None = Field(None, ge=0.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    min_tokens: int | None = Field(None, ge=0)
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(None, ge=MIN_REPETITION, le=MAX_REPETITION)
    logit_bias: dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None = None
    bad_words: Texts | None = None
    allowed_token_ids: Annotated[Ids, FIRST_ONLY] | None = Field(None, min_length=1)


SAMPLING = tuple(CalibrationRequest.model_fields)[tuple(CalibrationRequest.model_fields).index("max_tokens"):]
"""The parameters that are those of SamplingParams."""


@router.post("/v1/calibrate", response_model=CalibrationReply)
async def calibrate(request: Request, body: CalibrationRequest) -> Response:
    """A reward_threshold for these prompts, and what else plain samples say of the reward: what `--calibration` takes,
    saved as a file. The server itself stays as it is."""
    service = service_of(request)
    service.check_open()
    prompts, params = _asked(service, body)
    with _place(service):
        user = user_of(request, body.user or f"calibrate-{draws.name()}")
        calibration = await unless_gone(request.receive, _measured(service, body, prompts, params, user))
    if calibration is None:
        raise client_closed()
    if not all(map(math.isfinite, (calibration, calibration.mean, calibration.spread))):
        raise ApiError(400, "too many samples have the reward -inf, and no threshold can be made of it: give prompts "
                       "that the reward accepts some answers to", "prompts", "unscorable")
    return Response(dumped({**calibration.record(), "warning": calibration.warning}), media_type="application/json")


def _asked(service: Service, body: CalibrationRequest) -> tuple[list[Any], SamplingParams]:
    """Prompts as the engine takes them, and how they are sampled; ApiError for what cannot be asked."""
    refuse_unknown(body)
    check_reward(service, body.model)
    samples = body.num_samples or 16
    if samples * len(body.prompts) > MAX_TOGETHER:
        raise ApiError(400, f"{samples} samples of {len(body.prompts)} prompts are {samples * len(body.prompts)}, the "
                       f"most is {MAX_TOGETHER}: give fewer", "num_samples")
    given = {name: getattr(body, name) for name in SAMPLING if getattr(body, name) is not None}
    given.setdefault("max_tokens", max(DEFAULT_MAX_TOKENS, body.min_tokens or 0))
    try:
        params = SamplingParams(n=samples, output_kind=RequestOutputKind.FINAL_ONLY, **given)
    except RequestError as error:
        raise api_error(error) from error
    return [_prompt(index, one) for index, one in enumerate(body.prompts)], params


def _prompt(index: int, given: Any) -> Any:
    if given and are_ids(given):
        return {"prompt_token_ids": given}
    if isinstance(given, str) or isinstance(given, dict) and "messages" in given:
        return given
    raise ApiError(400, f"prompts[{index}] is {shown(given)}, it must be a text, a list of token ids or "
                   '{"messages": [...]}', "prompts")


@contextmanager
def _place(service: Service) -> Iterator[None]:
    """One of the calibrations that may be under way; ApiError 429 where there is none left."""
    if _under_way.get(service, 0) >= AT_ONCE:
        raise ApiError(429, f"{AT_ONCE} calibrations are under way, as many as may be: try again later",
                       code="calibrating", headers={"Retry-After": str(RETRY_SECONDS)})
    _under_way[service] = _under_way.get(service, 0) + 1
    try:
        yield
    finally:
        _under_way[service] -= 1


async def _measured(service: Service, body: CalibrationRequest, prompts: list[Any], params: SamplingParams,
                    user: str | None) -> Calibration:
    """Samples of all prompts, a few at a time; the first error ends them all."""
    policy = PlainSegments(body.segment_size or DRAFT_SIZE)
    samples: list[list[PlainSample]] = [[] for _ in prompts]
    left = iter(enumerate(prompts))

    async def work() -> None:
        for index, prompt in left:
            samples[index] = await _sampled(service, prompt, index, params, policy, body.priority or 0, user)

    workers = [asyncio.ensure_future(work()) for _ in range(min(WINDOW, len(prompts)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return Calibration.measure(samples, 0.9 if body.quantile is None else body.quantile)


async def _sampled(service: Service, prompt: Any, index: int, params: SamplingParams, policy: PlainSegments,
                   priority: int, user: str | None) -> list[PlainSample]:
    """Of one prompt. The first ones do not stand in line where there is one; the others wait for their turn."""
    add = service.engine.add_nowait if index < WINDOW else service.engine.add
    try:
        stream = await add(prompt, params, policy, priority=priority, user=user)
    except (RequestError, RewardError) as error:
        told = api_error(error, given=SAMPLING, otherwise="prompts")
        where = f"prompts[{index}]: " if told.status == 400 else ""
        param = (told.param or "").removeprefix("stars.")  # a segment's size is no policy's here
        raise ApiError(told.status, f"{where}{told}", param or None, told.code, told.headers) from error
    try:
        output = [one async for one in stream][-1]
    finally:
        await stream.aclose()
    for completion in output.outputs:
        if completion.error is not None or completion.finish_reason == "abort":
            raise ApiError(500, f"a sample of prompts[{index}] has no reward: {completion.error or 'it was aborted'}")
    return [sample for sample in map(PlainSample.of, output.outputs) if sample is not None]
