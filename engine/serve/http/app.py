"""The application: what is answered where."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from stars.arguments import shown
from stars.errors import StarsError
from stars.exposition import CONTENT_TYPE, Family, exposition
from stars.metrics import PREFIX
from stars.serve.http import calibrate, chat, completions, models, page, rewards, tokens
from stars.serve.http.description import describe
from stars.serve.http.errors import ApiError, api_error, invalid
from stars.serve.http.limits import Bodies, Counted, Hosts, Keys, Places
from stars.serve.http.service import Service, service_of
from stars.version import __version__

logger = logging.getLogger(__name__)

ROUTERS = tuple(room.router for room in (completions, chat, models, tokens, rewards, calibrate, page))


def build_app(service: Service) -> FastAPI:
    """The ASGI application over `service`."""
    app = FastAPI(title="STARS engine", version=__version__, docs_url=None, redoc_url=None,
                  redirect_slashes=False)  # a redirect would be built from the Host that the client gave
    app.state.service = service
    for router in ROUTERS:
        if router is not page.router or service.settings.page:
            app.include_router(router)
    app.add_api_route("/health", _health, methods=["GET"], tags=["server"])
    app.add_api_route("/ready", _ready, methods=["GET"], tags=["server"])
    for path, answer in (("/health", _health), ("/ready", _ready)):
        app.add_route(path, answer, methods=["HEAD"], include_in_schema=False)  # as some load balancers ask
    app.add_api_route("/metrics", _metrics, methods=["GET"], tags=["server"], response_class=PlainTextResponse)
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(StarsError, _on_error)  # what nobody foresaw is answered by `Counted`
    protect(app, service)
    describe(app)
    return app


def protect(app: Starlette, service: Service) -> None:
    """Puts in front of `app` what looks at requests before it does."""
    app.add_middleware(Bodies, service=service)  # the last one that is added comes first
    app.add_middleware(Places, service=service)
    app.add_middleware(Keys, keys=service.settings.api_keys)
    if service.settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=service.settings.cors_origins, allow_methods=("GET", "POST"),
                           allow_headers=("*",), expose_headers=("Retry-After", "X-Request-Id"))
    app.add_middleware(Hosts, settings=service.settings)
    app.add_middleware(Counted, service=service)


async def _health(request: Request) -> JSONResponse:
    """Whether the engine runs: 503 once its loop has ended."""
    if not service_of(request).engine.is_running and not service_of(request).draining:
        raise ApiError(503, "the engine's loop has ended: start the server again", code="engine_dead")
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> JSONResponse:
    """Whether requests are taken: 503 while the server shuts down, too."""
    service = service_of(request)
    service.check_open()
    return await _health(request)


async def _metrics(request: Request) -> PlainTextResponse:
    """The engine's metrics and the server's in Prometheus' text format."""
    service = service_of(request)
    line = Family(PREFIX + "num_requests_in_line", "gauge", "Requests that the engine does not have yet: they stand in "
                  "line, or are being checked.", {"": service.engine.num_in_line})
    families = [*service.engine.metrics.families(), line, *service.traffic.families()]
    return PlainTextResponse(exposition(families, {}), media_type=CONTENT_TYPE)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    told = api_error(error)
    if told.status >= 500 and not isinstance(error, ApiError):
        logger.error("%s %s failed", request.method, shown(request.scope["path"]), exc_info=error)
    return JSONResponse(told.body(), told.status, told.headers)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    """400, where FastAPI would say 422, with the name of the first field that is wrong."""
    assert isinstance(error, RequestValidationError)
    return await _on_error(request, invalid(error.errors()))


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = shown(request.scope["path"])  # request.url has the Host header in it, which may be anything
    messages = {404: f"there is no {path} here", 405: f"{path} takes no {shown(request.method)}"}
    told = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    return JSONResponse(told.body(), error.status_code, dict(error.headers or {}))
