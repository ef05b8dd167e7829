"""The page at /: a playground that streams plain and aligned answers beside each other, and what it asks before it can.

The page is one file without requests to anybody else. Its policy lets nothing run but its own script, known by its
hash, and the browser itself refuses to make HTML of a text.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from stars.policies import STARS
from stars.serve.http.service import service_of
from stars.serve.http.settings import ServerSettings
from stars.version import __version__

router = APIRouter(tags=["page"])

RANGE = (-5.0, 5.0)  # of the threshold's slider, where no calibration says what rewards there are
FIELDS = ("reward_threshold", "beta", "segment_size", "width")  # of STARS that the page has sliders for
EXAMPLES = {True: "How do I learn to cook?", False: "This film was"}  # a message, a text to continue


class Page(NamedTuple):
    """A page and what is sent with it."""

    body: bytes
    headers: dict[str, str]


@cache
def playground_page() -> Page:
    """The file, with the hashes of its script and its style in its policy."""
    body = Path(__file__).with_name("playground.html").read_bytes()
    policy = ("default-src 'none'", f"script-src {_hash(body, b'script')}", f"style-src {_hash(body, b'style')}",
              "img-src data:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
              "require-trusted-types-for 'script'", "trusted-types 'none'")
    return Page(body, {
        "Content-Security-Policy": "; ".join(policy), "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin"})


def _hash(body: bytes, name: bytes) -> str:
    """The source of the only inline element of this name, as a policy calls it."""
    [inside] = re.findall(b"<%b>(.*?)</%b>" % (name, name), body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(request: Request) -> Response:
    """The playground."""
    found = playground_page()
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
    if found.headers["ETag"] in known or known == ["*"]:
        return Response(status_code=304, headers=found.headers)
    return Response(found.body, headers=found.headers, media_type="text/html")


@router.get("/v1/playground")
async def playground(request: Request) -> JSONResponse:
    """What the playground must know of the server: the model's name, whether it takes messages, whether there is a
    reward, and what the server's own settings make of STARS."""
    service = service_of(request)
    engine = service.engine.engine
    chat = engine.tokenizer is not None and bool(engine.tokenizer.has_chat_template)
    return JSONResponse({
        "model": service.settings.model, "version": __version__, "chat": chat, "reward": engine.reward is not None,
        "example": EXAMPLES[chat], "defaults": _defaults(service.settings),
        "threshold_range": _threshold_range(service.settings)})


def _defaults(settings: ServerSettings) -> dict[str, Any]:
    """Of STARS, by name; None where the server, or nobody, chooses."""
    values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(STARS) if field.name in FIELDS}
    if settings.policy in (None, "stars"):
        values |= {name: value for name, value in settings.policy_parameters.items() if name in FIELDS}
    if settings.calibration is not None:
        if values["reward_threshold"] is None:
            values["reward_threshold"] = settings.calibration.reward_threshold
        if values["beta"] == "auto":
            values["beta"] = settings.calibration.beta
    return {name: value if isinstance(value, (int, float)) and math.isfinite(value) else None
            for name, value in values.items()}


def _threshold_range(settings: ServerSettings) -> tuple[float, float]:
    """From below the worst to above the best of the samples that were calibrated on."""
    quantiles = settings.calibration.quantiles.values() if settings.calibration is not None else ()
    seen = [value for value in quantiles if math.isfinite(value)]
    if not seen:
        return RANGE
    return float(math.floor(min(seen) - 1)), float(math.ceil(max(seen) + 1))
