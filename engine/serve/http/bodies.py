"""Bodies of requests: strict JSON, read in one place for all addresses that take it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from stars.arguments import shown
from stars.serve.http.errors import ApiError
from stars.trace.json_lines import MAX_NESTING, too_deep

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route whose body, where it takes one, is a JSON object in UTF-8: `APIRouter(route_class=JsonRoute)`.

    Python's parser takes what JSON has not (NaN, the same key twice, half a surrogate pair), takes UTF-16 for UTF-8,
    and stops at a nesting that depends on the stack. What is no JSON is 400 here, another type of content 415.
    """

    def get_route_handler(self) -> Handler:
        """FastAPI's, with the body read and parsed before."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def parsed_first(request: Request) -> Response:
            check_content_type(request.headers.get("content-type"))
            request._json = parsed(await request.body())  # where Request.json() keeps it
            return await handle(request)

        return parsed_first


def check_content_type(given: str | None) -> None:
    """ApiError 415 for what is no JSON. FastAPI would take it for a text that fits no model."""
    kind = (given or "").split(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"the body's content type is {shown(given) if given else 'not said'}, it must be JSON: "
                       "send the header Content-Type: application/json")


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is; ApiError 400 with what is wrong otherwise."""
    if not body.strip():
        raise ApiError(400, "the body is empty: send a JSON object")
    try:
        value = _DECODER.decode(body.decode("utf8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is no UTF-8, at byte {error.start}: encode it so") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # JSONDecodeError, which says where, and what _DECODER's own functions refuse
        what = "a number of too many digits" if str(error).startswith("Exceeds the limit") else str(error)
        raise ApiError(400, f"the body is no JSON: {what}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {_KINDS.get(type(value), 'null')}: send a JSON object")
    if too_deep(value):
        raise _too_deep()
    if b"\\u" in body and _broken(value):
        raise ApiError(400, "the body has half of a surrogate pair, which is no Unicode: send whole characters")
    return value


def _too_deep() -> ApiError:
    return ApiError(400, f"the body nests lists and objects more than {MAX_NESTING} deep: send a flatter one")


def _broken(value: Any) -> bool:
    """Whether a text in `value` cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"it has {text}, which is no number there")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{shown(text)} is beyond the range of numbers")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
