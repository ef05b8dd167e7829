"""What the OpenAPI description says besides what routes say themselves: the errors that any of them may answer with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

REASONS = {
    400: "The request cannot be: `error.param` names what is wrong with it", 401: "No API key that is known",
    403: "Pages of another origin, which were not allowed", 404: "No model of this name",
    408: "The body did not come in time", 413: "The body is too large", 415: "The body is not said to be JSON",
    429: "Too many requests: try again after Retry-After seconds", 500: "An error of the server",
    503: "The server shuts down, or its engine has ended",
}
"""What is said of each status that is an error."""
OF_ALL = (400, 401, 500, 503)
OF_BODIES = (403, 404, 408, 413, 415, 429)
"""Errors of requests that have one, besides."""
THEIRS = ("HTTPValidationError", "ValidationError")
"""Shapes of FastAPI's own errors, which are not sent here."""


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = Field(description="The parameter that is wrong, where it is one")
    code: str | None = Field(description="A word for programs, such as `model_not_found`")


class ErrorBody(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors, which not all may."""
    return {status: {"model": ErrorBody, "description": REASONS[status]} for status in statuses}


def describe(app: FastAPI) -> None:
    """Makes `app` describe the errors of each route: a body that does not fit is a 400, never FastAPI's 422."""
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(found: dict[str, Any]) -> dict[str, Any]:
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name in THEIRS:
        schemas.pop(name, None)
    body = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= {**body.pop("$defs"), "ErrorBody": body}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    for operation in _operations(found):
        responses = operation["responses"]
        responses.pop("422", None)
        for status in (*OF_ALL, *(OF_BODIES if "requestBody" in operation else ())):
            responses.setdefault(str(status), {"description": REASONS[status], "content": content})
    return found


def _operations(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in found["paths"].values():
        yield from path.values()
