"""Tokens of a round's attempts, drawn from another stack's logits by the engine's own sampler and random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stars.adapters.loop import Asked, Draft
from stars.bindings import libstars, recording
from stars.edits import NOTHING_LEFT
from stars.errors import ModelError, RequestError, StarsError
from stars.kernels.philox import signed_seed, signed_stream
from stars.kernels.sample_step import sample_step
from stars.kernels.types import LaneState
from stars.proposer import NAN_LOGITS

ALONE = 1 << 19
"""Logits that one thread draws from: the stack's own threads wait on the CPUs for its next pass, and to wake others
for less takes longer (50 to 200 us) than it saves."""


class Proposal(NamedTuple):
    """What attempts are drawn from; filters and their order are those of `stars.SamplingParams`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()  # token ids that end the response

    @property
    def filters(self) -> bool:
        """Whether any filter is on."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


class Drawing:
    """The attempts of a round, each a lane; one token of each is drawn at a time.

    proposal: of all of them, or a list with one for each of `asked`.
    """

    def __init__(self, asked: Sequence[Asked], proposal: Proposal | Sequence[Proposal],
                 device: torch.device | str = "cpu"):
        attempts = [one for _, attempts in asked for one in attempts]
        count, steps = len(attempts), max(one.max_tokens for one in attempts)
        self._counts = [len(attempts) for _, attempts in asked]
        each = [proposal] * len(asked) if isinstance(proposal, Proposal) else list(proposal)
        proposals = [one for one, own in zip(each, self._counts, strict=True) for _ in range(own)]  # of each lane
        self._filters = any(one.filters for one in each)
        self._stops = [set(one.stop_ids) for one in each]
        self._records = torch.device(device).type == "cpu" and libstars.available()
        self._program: recording.Program | None = None  # of the draw from logits at `_place`
        self._place = 0

        def ints(values: Sequence[Any], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def same(value: float, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((count,), value, dtype=dtype, device=device)

        def floats(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        most = max(1, *map(len, self._stops))
        stops = [sorted(one) + [-1] * (most - len(one)) for one in self._stops]
        self.lanes = LaneState(
            token_ids=same(0), positions=same(0), slots=same(0), slab_used=same(0), steps=same(0),
            max_tokens=ints([one.max_tokens for one in attempts]), done=same(0),
            out_tokens=torch.full((count, steps), -1, dtype=torch.int32, device=device),
            out_logprobs=torch.zeros((count, steps), device=device),
            seeds=ints([signed_seed(one.seed) for one in attempts], torch.int64),
            attempts=ints([one.attempt for one in attempts]),
            streams=ints([signed_stream(one.stream) for one in attempts]),
            temperature=floats([one.temperature for one in proposals]), top_k=ints([one.top_k for one in proposals]),
            top_p=floats([one.top_p for one in proposals]), min_p=floats([one.min_p for one in proposals]),
            stop_ids=ints([own for own, number in zip(stops, self._counts, strict=True) for _ in range(number)]),
            entropy_cut=same(math.inf, torch.float32), least_tokens=same(0))

    @property
    def done(self) -> list[bool]:
        """Whether each lane has ended."""
        return [bool(one) for one in self.lanes.done.tolist()]

    @property
    def token_ids(self) -> list[int]:
        """The token that each lane has drawn last: what its next forward pass reads. Of lanes that are done anything.
        """
        return self.lanes.token_ids.tolist()

    def draw(self, logits: Tensor) -> None:
        """Draws one token of every lane that is not done. logits: float32 [lanes, vocab], contiguous; rows of lanes
        that are done are not read. A row of NaN or of nothing but -inf is found by `drafts`."""
        if self._records and logits.numel() <= ALONE:
            with libstars.alone():
                self._draw(logits)
        else:
            self._draw(logits)

    def _draw(self, logits: Tensor) -> None:
        place, again = logits.data_ptr(), logits.data_ptr() == self._place
        if again and self._program is not None:  # a replay costs the host a tenth of a call
            self._program.run(1, self.lanes.done)
            return
        self._place, self._program = place, None
        if not (again and self._records):
            sample_step(logits, self.lanes, filters=self._filters, cuts=False)
            return
        with recording.record() as program:
            sample_step(logits, self.lanes, filters=self._filters, cuts=False)
        if len(program):  # else it was not libstars that drew
            self._program = program

    def drafts(self) -> list[list[Draft] | StarsError]:
        """What was drawn, once all lanes are done: one list a response, in the attempts' order. A response whose logits
        were no distribution, or left no token, has an error in its place: ModelError or RequestError."""
        lanes = self.lanes
        tokens, logprobs, steps = lanes.out_tokens.tolist(), lanes.out_logprobs.double(), lanes.steps.tolist()
        found: list[list[Draft] | StarsError] = []
        place = 0
        for count, stops in zip(self._counts, self._stops, strict=True):
            drafts = []
            fault: StarsError | None = None
            for lane in range(place, place + count):
                token_ids, logprob = tokens[lane][: steps[lane]], float(logprobs[lane, : steps[lane]].sum())
                if token_ids[-1] < 0:
                    fault = RequestError(NOTHING_LEFT) if logprob == -math.inf else ModelError(NAN_LOGITS)
                drafts.append(Draft(token_ids, token_ids[-1] in stops, logprob))
            found.append(fault or drafts)
            place += count
        return found
