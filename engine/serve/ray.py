"""`stars serve` on as many machines as it takes: an application of Ray Serve.

`build` makes it: `serve run stars.serve.ray:build model=… reward=…`, or the import path of a file for `serve deploy`
(docs/serve-config.yaml). How many replicas there are, on which machines, and who answers which request is Ray Serve's
business; docs/scaling.md says how to tell it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, NoReturn, cast

try:
    import ray
    from ray import serve
    from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
except ImportError as error:
    raise ImportError("stars.serve.ray needs Ray Serve: pip install 'stars-engine[ray]'") from error

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stars.arguments import closest, shown
from stars.bindings import libstars
from stars.cli import options
from stars.cli.serve import engine_of, settings_of
from stars.cli.serve_options import add_serving
from stars.errors import EngineDeadError, RequestError
from stars.exposition import CONTENT_TYPE, exposition, merged
from stars.serve.forward import Ask, Forward, Head, answered
from stars.serve.http.app import build_app, protect
from stars.serve.http.errors import ApiError
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings

logger = logging.getLogger(__name__)

LOST = (RayActorError, ReplicaUnavailableError, ObjectLostError, WorkerCrashedError, EngineDeadError)
"""What a request gets whose replica is gone, or has an engine that is."""
OURS = ("replicas", "ingress")
ELSEWHERE = {"host": "http_options.host", "port": "http_options.port", "max_connections": "the load balancer in front",
             "header_seconds": "the load balancer in front", "write_seconds": "the load balancer in front",
             "log_requests": "logging_config"}
"""Flags of `stars serve` that mean nothing here, and where what they say belongs."""
PROBE = 5.0
"""Seconds that replicas have to say how they are."""


def build(config: Mapping[str, Any]) -> serve.Application:
    """The application that `config` asks for: engines behind one API.

    Its keys are the flags of `stars serve`, as in {"model": "path/to/lm", "reward": "path/to/rm", "max_num_seqs": 32,
    "set": {"reward_threshold": 2.0}}; those that may be given several times take a list. And beside them:

    replicas: how many engines; or options of their deployment, which is called "engine", under Serve's own names:
        num_replicas, autoscaling_config, ray_actor_options (num_gpus, num_cpus), max_ongoing_requests,
        request_router_config, …
    ingress: the same of what stands in front of them, called "api": it keeps limits and keys, and has requests that
        were lost with a replica answered by another one.

    RequestError for what cannot be.
    """
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise RequestError(f"the application's args are {shown(config)}, they must be names and values")
    given = {name.replace("-", "_"): value for name, value in config.items()}
    own = {name: given.pop(name, None) for name in OURS}
    args = _arguments(given)
    settings = settings_of(args, room_for=lambda connections: connections)  # which Serve's proxies hold
    replicas = {"graceful_shutdown_timeout_s": settings.drain_seconds,
                "max_ongoing_requests": settings.max_concurrent_requests} | _deployment("replicas", own["replicas"])
    ingress = {"max_ongoing_requests": 2 * settings.max_concurrent_requests,  # beyond its own limit it says 429
               "graceful_shutdown_timeout_s": settings.drain_seconds} | _deployment("ingress", own["ingress"])
    engines = _with("replicas", EngineReplica, replicas).bind(args, settings)
    return _with("ingress", Api, ingress).bind(settings, engines)


def _deployment(name: str, given: Any) -> dict[str, Any]:
    """Serve's options of a deployment; a number is how many replicas it has."""
    if given is None:
        return {}
    if isinstance(given, str) and given.isdecimal():  # as `serve run` hands it on
        given = int(given)
    if isinstance(given, (int, str)) and not isinstance(given, bool):
        return {"num_replicas": given}
    if isinstance(given, Mapping):
        return dict(given)
    raise RequestError(f"{name} is {shown(given)}, it must be a number, \"auto\", or options of a deployment")


def _with(name: str, deployment: Any, given: dict[str, Any]) -> Any:
    try:
        return deployment.options(**given)
    except (TypeError, ValueError) as error:  # the latter as pydantic writes it, in several lines
        errors = getattr(error, "errors", None)
        first = errors()[0] if callable(errors) else None
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else " ".join(str(error).split())
        raise RequestError(f"{name}: {told}") from None


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


def _arguments(given: Mapping[str, Any]) -> argparse.Namespace:
    """What `stars serve` would make of its flags. RequestError."""
    parser = _Flags(add_help=False, allow_abbrev=False)
    add_serving(parser)
    options.add_models(parser)
    options.add_policy(parser)
    options.add_engine(parser)
    flags = {action.dest: action for action in parser._actions}
    words = ["--host=0.0.0.0"]  # whoever may ask: Serve listens, where it is told to
    for name, value in given.items():
        if name in ELSEWHERE:
            raise RequestError(f"{name} is not the application's: that is said by {ELSEWHERE[name]}")
        if name not in flags:
            raise RequestError(f"there is no {name}: {closest(name, [*flags, *OURS])}")
        words += _words(flags[name], value)
    args = parser.parse_args(words)
    options.check_policy(parser, args, alone=False)
    return args


def _words(action: argparse.Action, value: Any) -> list[str]:
    """What stands on a command line where `value` is meant."""
    [flag, *_] = action.option_strings
    if value is None:
        return []
    if action.nargs == 0:
        if str(value).lower() not in ("true", "false"):
            raise RequestError(f"{action.dest} is {shown(value)}, it must be true or false")
        return [flag] if str(value).lower() == "true" else []
    if isinstance(value, Mapping):
        return [f"{flag}={name}={_text(one)}" for name, one in value.items()]
    several = value if isinstance(value, (list, tuple)) else [value]
    if action.nargs is None:
        return [f"{flag}={_text(one)}" for one in several]
    groups = several if several and isinstance(several[0], (list, tuple)) else [several]
    return [word for group in groups for word in (flag, *map(_text, group))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _take_threads() -> None:
    """As many as Ray gives this replica CPUs, whole ones, unless the environment says how many."""
    cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    if cpus and "STARS_NUM_THREADS" not in os.environ and libstars.available():
        libstars.set_num_threads(min(cpus, libstars.usable_cpus()))


@serve.deployment(name="engine", health_check_period_s=2.0)
class EngineReplica:
    """One engine, and the API over it, in a process of its own."""

    def __init__(self, args: argparse.Namespace, settings: ServerSettings):
        _take_threads()
        self.service = Service(engine_of(args), settings)
        self.app = build_app(self.service)

    async def answer(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """What the API answers, as `answered` has it."""
        if not self.service.engine.is_running:
            logger.error("the engine's loop has ended: this replica ends too, so that it is replaced")
            os._exit(1)  # at once: whoever still answers fast, with errors, would be given every request
        async with aclosing(answered(self.app, ask)) as items:
            async for item in items:
                if isinstance(item, Head) and item.status == 503 and not self.service.engine.is_running:
                    raise EngineDeadError("the engine's loop has ended")  # nothing was sent: another one may answer
                yield item

    def metrics(self) -> str:
        """The engine's, in Prometheus' text format, as this replica's."""
        return self.service.engine.metrics.text(replica=serve.get_replica_context().replica_tag)

    def check_health(self) -> bool:
        """True, or an error where this replica must be replaced: Serve asks, and so does /health."""
        if not self.service.engine.is_running:
            raise EngineDeadError("the engine's loop has ended")
        return True

    async def __del__(self) -> None:
        """Once requests are done, or had their time."""
        if "service" in vars(self):
            await self.service.engine.shutdown(drain=False)


def _unnumbered(app: ASGIApp) -> ASGIApp:
    """`app` without ids of requests in its answers: Serve puts its own there, which its logs have."""
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await app(scope, receive, sent)

    return answer


@serve.deployment(name="api", ray_actor_options={"num_cpus": 0.5})
@serve.ingress()
class Api:
    """What is asked: limits, keys and a replica that answers."""

    def __init__(self, settings: ServerSettings, engines: Any):
        self.service = Service(cast(Any, None), settings)  # the engines are elsewhere
        self.engines = engines

    def __serve_build_asgi_app__(self) -> ASGIApp:
        forward = Forward(self._answers, LOST)
        app = Starlette(routes=[
            Route("/health", self._health), Route("/ready", self._health), Route("/metrics", self._metrics),
            Mount("/", app=forward)])
        protect(app, self.service)
        return _unnumbered(app)

    async def _answers(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        response = self.engines.options(stream=True).answer.remote(ask)
        over = False
        try:
            async for item in response:
                yield item
            over = True
        except BackPressureError:
            raise ApiError(429, "too many requests wait for a replica: try again later", code="queue_full",
                           headers={"Retry-After": str(self.service.traffic.retry_after())}) from None
        except DeploymentUnavailableError:
            raise ApiError(503, "no engine could be started", code="engine_dead") from None
        finally:
            if not over:
                response.cancel()

    async def _health(self, request: Request) -> Response:
        """503 where no engine says that it runs."""
        if not await self._everywhere("check_health"):
            raise ApiError(503, "no engine answers: try again later", code="engine_dead", headers={"Retry-After": "1"})
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        """Of all engines, and of the requests that came by here."""
        own = exposition(self.service.traffic.families(), {"replica": serve.get_replica_context().replica_tag})
        return PlainTextResponse(merged([*await self._everywhere("metrics"), own]), media_type=CONTENT_TYPE)

    async def _everywhere(self, method: str) -> list[Any]:
        """What a method says at each engine that answers in time."""
        try:
            found = await self.engines.broadcast(method).results_async(timeout_s=PROBE, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [one for one in found if not isinstance(one, BaseException)]
