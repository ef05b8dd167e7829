"""/v1/models: the names that requests may call the model by. /version."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from stars.arguments import shown
from stars.errors import RequestError
from stars.plan import Policy, plan_of
from stars.policies import POLICIES, parameters_of
from stars.serve.http.description import responses
from stars.serve.http.errors import ApiError
from stars.serve.http.guidance import PLAIN, SAMPLE, default_policy, told_parameters
from stars.serve.http.service import Service, service_of
from stars.serve.http.stars_field import policy_record
from stars.version import __version__

router = APIRouter(tags=["models"])
STARTED = int(time.time())
"""When this process began to serve: OpenAI's cards have a time."""


class Guidance(BaseModel):
    """What a name stands for, besides the language model."""

    policy: str = Field(description="One of `stars methods`")
    parameters: dict[str, Any] = Field(description="By the policy's own names, as requests have them that say nothing "
                                                   "else; null: to be given, or chosen by the engine")
    needs_reward: bool = Field(description="Whether a reward model reads the responses")


class ModelCard(BaseModel):
    """One name that requests may have as their model."""

    id: str
    object: str = "model"
    created: int = Field(description="When the server was started, in seconds since 1970")
    owned_by: str = "stars"
    root: str = Field(description="The language model's name")
    parent: str | None = Field(description="The language model's name, where this is that with a policy; else null")
    max_model_len: int = Field(description="Most tokens of a prompt and its response together")
    stars: Guidance


class ModelList(BaseModel):
    """All of them."""

    object: str = "list"
    data: list[ModelCard]


class Version(BaseModel):
    """Of this package."""

    version: str


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> ModelList:
    """The language model's name, and that name with each policy that this server can run."""
    return ModelList(data=list(cards(service_of(request))))


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=responses(404))
async def get_model(model: str, request: Request) -> ModelCard:
    """One of them."""
    service = service_of(request)
    check_name(service, model)
    return next(card for card in cards(service) if card.id == model)


@router.get("/version", response_model=Version, tags=["server"])
async def version() -> Version:
    """Which version of STARS engine answers."""
    return Version(version=__version__)


def names(service: Service) -> dict[str, str]:
    """The policy of each name that requests may have as their model: of those that this engine can run."""
    model = service.settings.model
    runnable = [name for name in POLICIES if _runs(service, name)]
    return {model: default_policy(service), f"{model}:{PLAIN}": SAMPLE,
            **{f"{model}:{name}": name for name in runnable}}


def check_name(service: Service, name: str) -> None:
    """ApiError 404 for a name that is none of `names`."""
    if name not in names(service):
        raise ApiError(404, f"there is no model {shown(name)} here: GET /v1/models lists those that are, such as "
                       f"{shown(service.settings.model)}", "model", "model_not_found")


def check_reward(service: Service, name: str | None) -> None:
    """The same, and ApiError 400 where there is no reward model that could say something of texts."""
    if name is not None:
        check_name(service, name)
    if service.engine.engine.reward is None:
        raise ApiError(400, "the server has no reward model: start one with --reward MODEL", code="no_reward")


def cards(service: Service) -> Iterator[ModelCard]:
    """Each name, the bare one first."""
    model = service.settings.model
    for name, policy in names(service).items():
        yield ModelCard(id=name, created=STARTED, root=model, parent=None if name == model else model,
                        max_model_len=service.engine.engine.config.max_model_len, stars=_guidance(service, policy))


def _guidance(service: Service, policy: str) -> Guidance:
    given = _given(service, policy)
    example = _example(policy, given)
    parameters = {name: given.get(name) if _is_open(name, given) else value
                  for name, value in policy_record(example).items() if name != "name"}
    return Guidance(policy=policy, parameters=parameters, needs_reward=plan_of(example).score.when != "never")


def _runs(service: Service, policy: str) -> bool:
    try:
        service.engine.engine.check_policy(_example(policy, _given(service, policy)))
    except RequestError:
        return False
    return True


def _given(service: Service, policy: str) -> dict[str, Any]:
    """Parameters of requests of this policy that say nothing of them, as far as the server was told any."""
    settings, given = service.settings, told_parameters(service, policy)
    if settings.calibration is not None and "reward_threshold" in parameters_of(policy):
        given.setdefault("reward_threshold", settings.calibration)
    return given


def _example(policy: str, given: Mapping[str, Any]) -> Policy:
    """The policy with these parameters; a threshold that is left to requests is 0."""
    kept = {name: value for name, value in given.items() if not _is_open(name, given)}
    needed = {"reward_threshold": 0.0} if "reward_threshold" in parameters_of(policy) else {}
    return POLICIES[policy](**{**needed, **kept})


def _is_open(name: str, given: Mapping[str, Any]) -> bool:
    """Whether requests must give this parameter, or another one first that it is taken from."""
    unknown = given.get("reward_threshold") is None
    return unknown and (name == "reward_threshold" or name == "beta" and given.get(name) == "auto")
