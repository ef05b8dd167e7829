"""A fixed list of operations over buffers at fixed addresses, recorded once and replayed as one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars

MOST_GRAPHS = 128
"""Shapes kept; the least recently used one makes room."""


class Graphs:
    """Recorded passes by shape. Without libstars the pass is simply run."""

    def __init__(self):
        self._programs: OrderedDict[Hashable, libstars.Program] = OrderedDict()

    def run(self, key: Hashable, step: Callable[[], None], done: Tensor, times: int = 1) -> int:
        """Runs `step` up to `times` times, until all of `done` int32 [n] are non-zero; returns how often it ran.

        `step` is called on the first run of a `key` and replayed afterwards: it must touch the same addresses and have
        the same shapes each time, and read everything else from memory.
        """
        if not on_libstars(done):
            for ran in range(1, times + 1):
                step()
                if bool(done.all()):
                    return ran
            return times
        program = self._programs.get(key)
        if program is not None:
            self._programs.move_to_end(key)
            return program.run(times, done)
        with libstars.record() as program:
            step()
        self._programs[key] = program
        if len(self._programs) > MOST_GRAPHS:
            self._programs.popitem(last=False)
        if times == 1 or bool(done.all()):
            return 1
        return 1 + program.run(times - 1, done)
