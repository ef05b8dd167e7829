"""What a request to vLLM asks of the law, and what is held of it while a segment is drafted. Needs no vLLM."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stars.adapters.law import Law, law_of
from stars.arguments import integer, refuse_unknown, shown
from stars.bindings.controller import Controller, Drawn
from stars.errors import RequestError
from stars.policies import STARS

KEY = "stars"
"""Of `SamplingParams.extra_args`: with it a request is aligned, without it nothing of this package touches it."""
_CHILD = re.compile(r"(\d+)_")
_MAX_SAMPLE = 4095


FIELDS = ("reward_threshold", "segment_size", "max_attempts", "alpha", "beta", "seed")
"""Of what stands under KEY: those of the policy STARS, whose defaults they have, and the law's seed."""


class Terms(NamedTuple):
    """What one request asks."""

    law: Law
    seed: int


def terms_of(extra_args: Mapping[str, Any] | None, sampling_seed: int | None) -> Terms | None:
    """What stands under KEY: a dictionary, or the same as JSON text, for servers that take flat values only.

    None where nothing does. A seed that is not given is the sampling seed, or else drawn. RequestError names what is
    unknown, missing or out of range.
    """
    given = (extra_args or {}).get(KEY)
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise RequestError(f'extra_args["{KEY}"] is {shown(given)}, it must be a dictionary, or one as JSON text'
                               ) from None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise RequestError(f'extra_args["{KEY}"] is {shown(given)}, it must be a dictionary such as '
                           '{"reward_threshold": 1.0}')
    for name, value in given.items():
        if name not in FIELDS:
            refuse_unknown(f'extra_args["{KEY}"]', name, value, FIELDS, {})
    settings = {"reward_threshold": None, **given}
    seed = settings.pop("seed", sampling_seed)
    law = law_of(STARS(**settings), "stars.adapters.vllm_scheduler")
    return Terms(law, random.getrandbits(64) if seed is None else integer("seed", seed, -(1 << 63), (1 << 64) - 1))


def sample_of(request_id: str) -> int:
    """Which of the completions of one request: vLLM puts their number before its id. They share the law's seed."""
    found = _CHILD.match(request_id)
    return int(found[1]) % (_MAX_SAMPLE + 1) if found else 0


class Complete(NamedTuple):
    """An attempt whose tokens are all there."""

    attempt: int
    token_ids: list[int]
    logprobs: list[Any]  # of each token, as the worker gave them; empty where none were asked for
    handle: Any  # of its reward


@dataclass(eq=False)
class Held:
    """One aligned request, from its arrival to its end."""

    request: Any  # vLLM's
    terms: Terms
    session: Any  # of the reward
    controller: Controller | None = None  # from the first token on
    drawn: Drawn | None = None  # the attempt that is being drafted
    committed: int = 0  # response tokens
    logprobs: list[Any] = field(default_factory=list)  # of the tokens that are withheld
    best: Complete | None = None  # of the attempts so far, which may win in the end
    replay: list[int] | None = None  # the tokens of the best, while the worker draws them again
    stopped: Any = None  # the status that vLLM's own checks gave it with the latest token
    stop_reason: Any = None

    @property
    def drafted(self) -> list[int]:
        """Response tokens that are withheld."""
        return list(self.request.output_token_ids[self.committed:])

    @property
    def cacheable(self) -> int:
        """Tokens, the prompt's with them, that no rewind writes again: all that are committed, but the last one."""
        return int(self.request.num_prompt_tokens) + self.committed - 1

    @property
    def due(self) -> bool:
        """Whether the segment is complete."""
        if self.stopped is not None:
            return True
        most = self.drawn.max_tokens if self.replay is None and self.drawn is not None else len(self.replay or ())
        return int(self.request.num_output_tokens) - self.committed == most


def joined(rows: Sequence[Any]) -> Any:
    """Log-probabilities of one token each, in vLLM's own tuples of arrays, as those of all."""
    import numpy

    first = rows[0]
    return type(first)(*(numpy.concatenate([row[place] for row in rows]) for place in range(3)), None)
