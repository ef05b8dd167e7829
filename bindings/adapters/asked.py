"""What a user asks of an adapter that it cannot do: refused by name, never ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from stars.arguments import shown
from stars.errors import RequestError
from stars.sampling import SamplingParams


def refuse_settings(params: SamplingParams, taken: Collection[str], adapter: str) -> None:
    """RequestError for a setting that is not among `taken` and asks for something."""
    neutral = SamplingParams()
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if field.name not in taken and value != getattr(neutral, field.name):
            raise RequestError(f"{adapter} has no SamplingParams.{field.name}, which is {shown(value)}: leave it out, "
                               "or use stars.Engine")
