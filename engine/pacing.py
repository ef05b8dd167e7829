"""How far the host launches ahead of a GPU, and how it learns that all lanes of a draft have ended."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

QUEUED = 2e-3
"""Seconds of work, at least, that the device still has when the host is woken to launch more: by estimate twice what
the host takes to prepare the scores of a draft or to be scheduled again, and what a draft that ends early wastes at
most, where a step takes less. The first steps are launched before that preparation."""

FIRST_AHEAD = 8
"""Steps ahead before a step was measured: by estimate enough for a model of some hundred million parameters."""


def mapped(count: int) -> tuple[Tensor, np.ndarray]:
    """int32 [count] zeros in pinned memory of the host: as kernels write it, by its own address, and as the host reads
    it."""
    tensor = torch.zeros(count, dtype=torch.int32, pin_memory=True)
    return tensor, tensor.numpy()


_kept: list[Tensor] = []
"""The flags of every engine, for good: a few hundred bytes each. torch's allocator of pinned memory knows of copies
and not of kernels, so that of an engine which goes away in the midst of a draft it would hand out flags again that the
steps under way have yet to store to."""


class Pacing:
    """Launches the steps of a draft at most `ahead` of the device, and no more once all its lanes have ended.

    The draw of a step stores a 1 into `ended` for each lane that it ends, in memory of the host. An event behind every
    step says when that is there to be read: before the host launches a step, it waits for the one `ahead` before it. A
    draft whose lanes have all ended therefore runs `ahead` - 1 steps for nothing, or fewer.

    Nothing is added to the stream but events. Copying the flags would put a transfer between every two steps. A
    conditional node of CUDA's would let the device stop by itself, without a step too many; but the step would have to
    be one graph, its parts no longer apart, and torch does not capture such nodes.
    """

    def __init__(self, lanes: int):
        self.ended, self._ended = mapped(lanes)  # int32 [lanes]
        _kept.append(self.ended)
        self.ahead = FIRST_AHEAD
        self._shortest = math.inf  # seconds of a step
        self._events: list[torch.cuda.Event] = []  # a ring: of step i at i modulo `ahead`
        self._lanes = self._launched = 0
        self._running = False

    def measured(self, seconds: float) -> None:
        """Takes the time of a step into account: the shortest of all decides."""
        self._shortest = min(self._shortest, seconds)
        self.ahead = 1 + max(1, math.ceil(QUEUED / max(self._shortest, 1e-6)))

    def begin(self, lanes: int) -> None:
        """A draft of `lanes` lanes, idle ones not counted, of which nothing was launched yet."""
        if self._running:  # it was interrupted: its steps may still tell of their lanes
            torch.cuda.synchronize()
        self._running = True
        self._ended[:lanes] = 0
        self._lanes, self._launched = lanes, 0
        while len(self._events) < self.ahead:
            self._events.append(torch.cuda.Event())

    def launch(self, step: Callable[[], object], left: int, wait: bool) -> int:
        """Launches up to `left` steps of the draft; returns how many are still to be launched.

        With `wait`, none: it waits for the device wherever that is as far behind as it may be. Else those for which it
        would have to.
        """
        while left:
            event = self._events[self._launched % self.ahead]
            if self._launched >= self.ahead:
                if not wait:
                    return left
                event.synchronize()
                if self._ended[: self._lanes].all():
                    return 0
            step()
            event.record()
            self._launched += 1
            left -= 1
        return 0

    def end(self) -> None:
        """All was launched, and a transfer behind it that whoever begins the next draft has waited for."""
        self._running = False
