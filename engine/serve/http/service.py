"""What all handlers share: the engine, how it is served, and what is under way."""

from __future__ import annotations

from typing import Any, cast

from fastapi import Request

from stars.serve.async_engine import AsyncEngine
from stars.serve.http.errors import shutting_down
from stars.serve.http.settings import ServerSettings
from stars.serve.http.traffic import Traffic


class Service:
    """One engine behind an API."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings):
        self.engine = engine
        self.settings = settings
        self.traffic = Traffic()
        self.draining = False  # from SIGTERM on: no more requests are taken

    def check_open(self) -> None:
        """ApiError where no request is taken any more."""
        if self.draining:
            raise shutting_down(self.traffic.retry_after())


def user_of(request: Request, user: str | None) -> str | None:
    """What the engine calls a request's user: those of one API key are none of another's."""
    client: str | None = getattr(request.state, "client", None)
    return user if client is None else f"{client}/{user or ''}"


def service_of(request: Request) -> Service:
    """The Service of a request's application."""
    return cast(Any, request.app.state).service  # type: ignore[no-any-return]
