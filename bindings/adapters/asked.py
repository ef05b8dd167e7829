"""What a user asks of an adapter: prompts with their settings; what it cannot do is refused by name, never ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from stars.arguments import shown
from stars.errors import RequestError
from stars.sampling import SamplingParams


def refuse_settings(params: SamplingParams, taken: Collection[str], adapter: str) -> None:
    """RequestError for a setting that is not among `taken` and asks for something."""
    neutral = SamplingParams()
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if field.name not in taken and value != getattr(neutral, field.name):
            raise RequestError(f"SamplingParams.{field.name} is {shown(value)}, and {adapter} has not got it: leave it "
                               "out, or use stars.Engine")


def paired(prompts: Any, sampling_params: Any) -> list[tuple[Any, Any]]:
    """Each of `prompts`, one or a list of them, with its settings: those given for all, or one of a list; RequestError
    where that has another length. Neither is looked into."""
    given = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    each = list(sampling_params) if isinstance(sampling_params, (list, tuple)) else [sampling_params] * len(given)
    if len(each) != len(given):
        raise RequestError(f"there are {len(given)} prompts and {len(each)} sampling_params: give one for all, or one "
                           "for each")
    return list(zip(given, each, strict=True))


def checked_params(params: Any) -> SamplingParams:
    """The settings of one prompt; None: the defaults. RequestError for anything else."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params is {type(params).__name__}, it must be a stars.SamplingParams")
    return params
