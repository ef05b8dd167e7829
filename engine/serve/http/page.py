"""The page at /: a playground that streams plain and aligned answers beside each other, and what it asks before it can.

The page is one file without requests to anybody else. Its policy lets nothing run but its own script, known by its
hash, and the browser itself refuses to make HTML of a text.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, WithJsonSchema

from stars.calibration import Calibration
from stars.serve.http.description import responses
from stars.serve.http.models import cards
from stars.serve.http.service import service_of
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


class Playground(BaseModel):
    """What the page must know of the server before it can ask."""

    model: str = Field(description="The language model's name")
    version: str
    chat: bool = Field(description="Whether the model takes messages")
    reward: bool = Field(description="Whether there is a reward that STARS can be run with")
    example: str = Field(description="A prompt to begin with")
    defaults: dict[str, int | float | None] = Field(description="Of STARS' parameters; null: to be given, or the "
                                                                "server's to choose")
    threshold_range: Annotated[tuple[float, float], WithJsonSchema(
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2})] = Field(
        description="Where thresholds make sense")


@router.get("/v1/playground", response_model=Playground, responses=responses(401, 429, 503))
async def playground(request: Request) -> Playground:
    """What the page at / must know of the server."""
    service = service_of(request)
    tokenizer = service.engine.engine.tokenizer
    chat = tokenizer is not None and bool(tokenizer.has_chat_template)
    aligned = next((card for card in cards(service) if card.id == f"{service.settings.model}:stars"), None)
    calibration = service.settings.calibration
    defaults = {name: aligned.stars.parameters[name] if aligned is not None else None for name in FIELDS}
    if defaults["beta"] == "auto":
        defaults["beta"] = None if calibration is None else calibration.beta
    return Playground(
        model=service.settings.model, version=__version__, chat=chat, reward=aligned is not None,
        example=EXAMPLES[chat], defaults=defaults, threshold_range=_threshold_range(calibration))


def _threshold_range(calibration: Calibration | None) -> tuple[float, float]:
    """From below the worst to above the best of the samples that were calibrated on."""
    quantiles = () if calibration is None else calibration.quantiles.values()
    seen = [value for value in quantiles if math.isfinite(value)]
    if not seen:
        return RANGE
    return float(math.floor(min(seen) - 1)), float(math.ceil(max(seen) + 1))
