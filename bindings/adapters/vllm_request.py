"""What a request to vLLM asks of the law, and what is held of it while a segment is drafted. Needs no vLLM."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stars.adapters.law import Law, law_of
from stars.arguments import integer, known_keywords, shown
from stars.bindings.controller import Controller, Drawn
from stars.errors import RequestError
from stars.policies import STARS

KEY = "stars"
"""Of `SamplingParams.extra_args`: with it a request is aligned, without it nothing of this package touches it."""
_CHILD = re.compile(r"(\d+)_")
_MAX_SAMPLE = 4095


class Asked(NamedTuple):
    """What one request asks."""

    law: Law
    seed: int


def asked_of(extra_args: Mapping[str, Any] | None, sampling_seed: int | None) -> Asked | None:
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
    known_keywords(f'extra_args["{KEY}"]', given, _asked, {})
    return _asked(**{"seed": sampling_seed, **given})


def _asked(reward_threshold: Any = None, segment_size: Any = 16, max_attempts: Any = 20, alpha: Any = 0.5,
           beta: Any = 0.7, seed: Any = None) -> Asked:
    policy = STARS(segment_size=segment_size, max_attempts=max_attempts, alpha=alpha, beta=beta,
                   reward_threshold=reward_threshold)
    law = law_of(policy, "stars.adapters.vllm_scheduler")
    seed = random.getrandbits(64) if seed is None else integer("seed", seed, -(1 << 63), (1 << 64) - 1)
    return Asked(law, seed)


def sample_of(request_id: str) -> int:
    """Which of the completions of one request: vLLM puts their number before its id. They share the law's seed."""
    found = _CHILD.match(request_id)
    return int(found[1]) % (_MAX_SAMPLE + 1) if found else 0


class Draft(NamedTuple):
    """An attempt whose tokens are complete."""

    attempt: int
    token_ids: list[int]
    logprobs: list[Any]  # of each token, as the worker gave them; empty where none were asked for
    handle: Any  # of its reward


@dataclass(eq=False)
class Held:
    """One aligned request, from its arrival to its end."""

    request: Any  # vLLM's
    asked: Asked
    session: Any  # of the reward
    controller: Controller | None = None  # from the first token on
    drawn: Drawn | None = None  # the attempt that is being drafted
    committed: int = 0  # response tokens
    logprobs: list[Any] = field(default_factory=list)  # of the tokens that are withheld
    best: Draft | None = None  # of the attempts so far, which may win in the end
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
