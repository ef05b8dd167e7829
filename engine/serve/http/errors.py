"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stars.errors import EngineDeadError, QueueFullError, RequestError, RewardError, StarsError, TokenizerError

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
         422: "invalid_request_error", 429: "rate_limit_error", 499: "client_closed_request",
         500: "server_error", 501: "not_implemented_error", 503: "service_unavailable_error"}
TOO_LONG = re.compile(r"the limit is \d+ \(")  # what `Intake` says of a prompt that does not fit
NAMED = re.compile(r"\b[A-Z]\w*\.([a-z]\w*)")  # "SamplingParams.top_p is 2, it must …"


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        return {"error": {"message": str(self), "type": TYPES.get(self.status, "server_error"), "param": self.param,
                          "code": self.code}}


def api_error(error: Exception, retry_after: int = 1) -> ApiError:
    """What a client is told of an exception of the engine. What is no error of the package's is a 500 that says
    nothing of itself: it is for the log."""
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry_after)})
    if isinstance(error, EngineDeadError):
        return ApiError(503, message, code="engine_dead")
    if isinstance(error, (RequestError, RewardError, TokenizerError)):
        named = NAMED.search(message)
        code = "context_length_exceeded" if TOO_LONG.search(message) else None
        return ApiError(400, message, param=named[1] if named else None, code=code)
    if isinstance(error, StarsError):
        return ApiError(500, message)
    return ApiError(500, "an error of the server, which its log has")
