"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stars.arguments import MAX_SHOWN, shown
from stars.errors import EngineDeadError, QueueFullError, RequestError, RewardError, StarsError, TokenizerError
from stars.policies import POLICIES

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
         422: "invalid_request_error", 429: "rate_limit_error", 431: "invalid_request_error",
         499: "client_closed_request", 500: "server_error", 501: "not_implemented_error",
         503: "service_unavailable_error", 505: "invalid_request_error"}
TOO_LONG = re.compile(r"the limit is \d+ \(|leaves no room for a response")
"""What `Intake` says of a prompt that does not fit."""
NAMED = re.compile(r"\b([A-Z]\w*)\.([a-z]\w*)")  # "SamplingParams.top_p is 2, it must …"
OF_POLICY = frozenset(kind.__name__ for kind in POLICIES.values())
WORD = re.compile(r"\b[a-z]\w*")
NO_PARAMETER = frozenset(("n", "stop", "user", "model", "stream", "seed", "stars", "prompt", "messages", "echo"))
"""Names of parameters that are words of sentences, too."""
SPOKEN = tuple((re.compile(pattern), param) for pattern, param in (
    (r"\bstop (strings?|token ids)\b", "stop"), (r"\bn times the policy's", "n"),
    (r"\ba segment may have\b", "stars.segment_size"), (r"\bno (model|head) named\b", "stars.policy"),
    (rf"\b({'|'.join(sorted(OF_POLICY))})\b", "stars.policy")))
"""How sentences speak of parameters that they do not name."""
PLAINER = {"a valid dictionary or object to extract fields from": "an object", "a valid dictionary": "an object",
           "a valid boolean": "true or false", "a valid ": "a ", "a integer": "an integer"}
KINDS = ("str", "int", "float", "bool")  # where one of several types is wanted pydantic's places have the type, too
NESTED = ("stars", "stream_options", "response_format")  # parameters whose own ones are named behind a dot


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


def shutting_down(retry_after: int) -> ApiError:
    """What is told of requests that come too late."""
    return ApiError(503, "the server is shutting down: try another one, or later", code="draining",
                    headers={"Retry-After": str(retry_after), "Connection": "close"})


def api_error(error: Exception, given: Collection[str] = (), otherwise: str | None = None) -> ApiError:
    """What a client is told of an exception of the engine. What is no error of the package's is a 500 that says
    nothing of itself: it is for the log.

    given: the parameters that the client may have given, one of which is at fault. otherwise: which one it is where
        the message names none.
    """
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, QueueFullError):
        return ApiError(429, f"{message.split(':')[0]}: try again later", code="queue_full")
    if isinstance(error, EngineDeadError):
        return ApiError(503, message, code="engine_dead")
    if isinstance(error, (RequestError, RewardError, TokenizerError)):
        code = "context_length_exceeded" if TOO_LONG.search(message) else None
        said = NAMED.sub(_as_sent, message).replace("StructuredOutputsParams", "structured_outputs")
        return ApiError(400, said.replace("True or False", "true or false"),
                        _param(message) or _spoken_of(said, given) or otherwise, code)
    if isinstance(error, StarsError):
        return ApiError(500, message)
    return ApiError(500, "an error of the server, which its log has")


def invalid(errors: Sequence[Any]) -> ApiError:
    """400, where FastAPI would say 422, of what pydantic says of a body: with the name of the first field that is
    wrong."""
    first = errors[0]
    place = [part for part in first["loc"] if part != "body"]
    if not place:
        return ApiError(400, f"the body: {first['msg']}")
    names = place[:2] if place[0] in NESTED and len(place) > 1 and isinstance(place[1], str) else place[:1]
    name = ".".join(map(str, names))
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing: give it", name)
    reasons = dict.fromkeys(_reason(error["msg"]) for error in errors if error["loc"][:2] == first["loc"][:2])
    inside = [part for part in place[len(names):] if isinstance(part, int) or part not in KINDS and "[" not in part]
    where = "".join(f".{part}" if isinstance(part, str) and part.isidentifier() and len(part) <= MAX_SHOWN
                    else f"[{shown(part)}]" for part in inside)
    return ApiError(400, f"{name}{where} is {shown(first['input'])}, it must {' or '.join(list(reasons)[:3])}", name)


def _reason(message: str) -> str:
    """What pydantic says that a value should be."""
    message = re.sub(r"^\w+ should | after validation.*", "", message)
    for theirs, ours in PLAINER.items():
        message = message.replace(theirs, ours)
    return message


def _param(message: str) -> str | None:
    """The parameter that a sentence of the engine's names with its class, as clients name it; None where it does not.
    """
    named = NAMED.search(message)
    if named is None:
        return None
    name = _sent_name(named[1], named[2])
    return "structured_outputs" if named[1] == "StructuredOutputsParams" else name


def _spoken_of(message: str, given: Collection[str]) -> str | None:
    """The parameter that a sentence speaks of first, otherwise."""
    found = [(word.start(), word[0]) for word in WORD.finditer(message)
             if word[0] in given and word[0] not in NO_PARAMETER]
    found += [(place.start(), param) for pattern, param in SPOKEN if (place := pattern.search(message)) is not None]
    return min(found)[1] if found else None


def _as_sent(named: re.Match[str]) -> str:
    """A parameter in a sentence, as clients name it."""
    return _sent_name(named[1], named[2]) or named[0]


def _sent_name(owner: str, name: str) -> str | None:
    if owner == "SamplingParams":
        return name
    if owner == "StructuredOutputsParams":
        return f"structured_outputs.{name}"
    if owner == "Budget":
        return f"stars.budget.{name}"
    return f"stars.{name}" if owner in OF_POLICY else None
