"""How a request's candidates are judged: its `stars` and the name that it calls the model by become a policy."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from stars.arguments import closest, shown
from stars.budget import Budget
from stars.errors import RequestError
from stars.plan import Policy, plan_of
from stars.policies import POLICIES, parameters_of
from stars.serve.http.errors import ApiError, api_error
from stars.serve.http.protocol import Guidance
from stars.serve.http.service import Service

PLAIN = "plain"
"""What samples that nothing judges are called, besides their own name."""
SAMPLE = "sample"


class Guided(NamedTuple):
    """How a request is guided, and what its user wants to see of that."""

    model: str  # as it was called
    policy: Policy
    budget: Budget | None = None
    return_segments: bool = False
    return_trace: bool = False


def served_names(service: Service) -> list[str]:
    """The names that requests may call the model by."""
    own = service.settings.model
    return [own, f"{own}:{PLAIN}", *(f"{own}:{name}" for name in POLICIES)]


def guided(service: Service, model: str | None, stars: Guidance | None) -> Guided:
    """The policy of a request and what goes with it. ApiError: 404 for a model that is not served, 400 with the name of
    what is wrong in `stars`."""
    asked = stars if stars is not None else Guidance.model_validate({})
    named = _policy_of_name(service, model)
    if named is not None and asked.policy is not None and named != _checked_name(asked.policy):
        raise ApiError(400, f"the model is {shown(model)} and stars.policy {shown(asked.policy)}, which is another "
                       "one: name the policy once", "stars.policy")
    name = named or (_checked_name(asked.policy) if asked.policy is not None else default_policy(service))
    policy = _policy(service, name, asked.model_extra or {})
    return Guided(model or service.settings.model, policy, _budget(asked.budget), bool(asked.return_segments),
                  bool(asked.return_trace))


def default_policy(service: Service) -> str:
    """The policy of requests that name none."""
    if service.settings.policy is not None:
        return service.settings.policy
    return "stars" if service.engine.engine.reward is not None else SAMPLE


def told_parameters(service: Service, policy: str) -> dict[str, Any]:
    """Parameters of a policy that the server was started with: those of its default one."""
    return dict(service.settings.policy_parameters) if policy == default_policy(service) else {}


def _policy_of_name(service: Service, model: str | None) -> str | None:
    """The policy that a model's name has behind its colon."""
    if model is None:
        return None
    own, colon, policy = model.partition(":")
    if own != service.settings.model or colon and policy != PLAIN and policy not in POLICIES:
        raise ApiError(404, f"there is no model {shown(model)}: {closest(model, served_names(service))}", "model",
                       "model_not_found")
    return _checked_name(policy) if colon else None


def _checked_name(policy: str) -> str:
    if policy == PLAIN:
        return SAMPLE
    if policy not in POLICIES:
        raise ApiError(400, f"stars.policy is {shown(policy)}, which is none: {closest(policy, (PLAIN, *POLICIES))}",
                       "stars.policy")
    return policy


def _policy(service: Service, name: str, given: dict[str, Any]) -> Policy:
    """The policy `name` with what was given of it, and the server's defaults for the rest."""
    settings, kind = service.settings, POLICIES[name]
    known = parameters_of(name)
    of_user = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
               if value is not None}
    unknown = next((key for key in of_user if key not in known), None)
    if unknown is not None:
        raise ApiError(400, f"the policy {name} has no {shown(unknown)}: "
                       f"{closest(unknown, known) if known else 'leave it out'}", f"stars.{unknown}")
    parameters = told_parameters(service, name) | of_user
    if "reward_threshold" in known and parameters.get("reward_threshold", "auto") == "auto":
        if settings.calibration is None:
            raise ApiError(400, f"the policy {name} needs a reward_threshold, which depends on the reward model: "
                           "measure one with /v1/calibrate, or start the server with --calibration FILE",
                           "stars.reward_threshold")
        parameters["reward_threshold"] = settings.calibration
    elif parameters.get("beta") == "auto" and settings.calibration is not None:
        parameters["beta"] = settings.calibration.beta
    try:
        policy = kind(**parameters)
        plan = plan_of(policy)
    except RequestError as error:
        raise api_error(error, otherwise="stars.policy") from error
    if plan.score.when != "never" and service.engine.engine.reward is None:
        raise ApiError(400, f"the policy {name} needs a reward model, and the server has none: call the model "
                       f'"{settings.model}:{PLAIN}"', "stars.policy")
    return policy


def _budget(given: dict[str, Any] | None) -> Budget | None:
    if given is None:
        return None
    known = [field.name for field in dataclasses.fields(Budget)]
    bounds = {name: value for name, value in given.items() if value is not None}
    unknown = next((name for name in bounds if name not in known), None)
    if unknown is not None:
        raise ApiError(400, f"a budget has no {shown(unknown)}: {closest(unknown, known)}", f"stars.budget.{unknown}")
    try:
        return Budget(**bounds)
    except RequestError as error:
        raise api_error(error) from error
