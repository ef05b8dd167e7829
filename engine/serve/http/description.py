"""What the OpenAPI description says of errors: the statuses that each address answers with, and the shape of each."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

REASONS = {
    400: "The request cannot be: `error.param` names what is wrong with it", 401: "No API key that is known",
    403: "The name of this server, or of the calling page, is none that was allowed",
    404: "There is no model of this name", 408: "The body did not come in time", 413: "The body is too large",
    415: "The body is not said to be JSON", 429: "Too many requests: try again after Retry-After seconds",
    500: "An error of the server", 503: "The server shuts down, or its engine has ended",
}
"""What is said of each status that is an error."""


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
    """The `responses` of a route that may answer with these errors."""
    return {status: {"model": ErrorBody, "description": REASONS[status]} for status in statuses}


JSON_BODY = (400, 401, 408, 413, 415, 429, 503)
"""Errors that any address may answer with which reads a body."""


def describe(app: FastAPI) -> None:
    """Makes `app` say of itself what it does: a body that is no JSON of the right shape is a 400, never FastAPI's 422.
    """
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                found.get("components", {}).get("schemas", {}).pop(name, None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
