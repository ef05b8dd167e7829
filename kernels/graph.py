"""A fixed list of operations over buffers at fixed addresses, recorded once and replayed as one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from stars.kernels.dispatch import column, only_references

MAX_GRAPHS = 128
"""Recordings kept, on a GPU several of a shape; the least recently used one makes room."""

LAUNCHES_A_GRAPH = 1024
"""Launches that one CUDA graph may hold, and so the draft steps: 32 of two layers and 8 of six, whose short steps
would feel the gap between one graph and the next; 4 of sixteen layers and 2 of 32, which would not. More cost more
than they save: the driver keeps memory of a captured launch on the device for every shape, and capturing takes the host
time in the middle of somebody's request. benchmarks/device measures graphs of 1, 8 and 32 steps."""


def steps_a_graph(launches: int) -> int:
    """Steps of `launches` launches that one CUDA graph may hold."""
    return max(1, LAUNCHES_A_GRAPH // launches)


class Graphs:
    """Recorded passes by shape: programs of libstars on the CPU, CUDA graphs on a GPU, plain calls otherwise.

    max_steps: that one CUDA graph may hold.
    """

    def __init__(self, max_steps: int = 1):
        self.max_steps = max_steps
        self._recorded: OrderedDict[Hashable, Any] = OrderedDict()
        self._seen: set[Hashable] = set()  # shapes that ran on a GPU without being captured
        self._pool: Any = None  # memory that the CUDA graphs share: they never run at the same time
        self._stream: torch.cuda.Stream | None = None  # that they are captured on, see `_capture`

    def run(self, key: Hashable, step: Callable[[], None], done: Tensor, times: int = 1, rare: bool = False) -> int:
        """Runs `step` up to `times` times, until all of `done` int32 [n] are non-zero; returns how often it ran.

        `step` is called on the first run of a `key` and replayed afterwards: it must touch the same addresses and have
        the same shapes each time, and read everything else from memory. On a GPU a shape is captured once it is run a
        second time (the later steps of a first run among them, one by one); `rare` shapes are not captured. All
        `times` steps are run without asking the device: steps of lanes that are done do nothing.
        """
        program = self._recorded.get(key)  # CUDA graphs go by their steps, too
        if program is not None and not only_references():
            self._recorded.move_to_end(key)
            ran: int = program.run(times, done)
            return ran
        where = column(done)
        if where == "cpu":
            return self._record(key, step, done, times)
        if where == "cuda":
            return self._run_graph(key, step, times, rare)
        return self._run_plainly(step, done, times)

    def _run_plainly(self, step: Callable[[], None], done: Tensor, times: int) -> int:
        for ran in range(1, times + 1):
            step()
            if bool(done.all()):
                return ran
        return times

    def _record(self, key: Hashable, step: Callable[[], None], done: Tensor, times: int) -> int:
        """Runs a shape that is new to libstars, and records its first step."""
        from stars.bindings import libstars

        with libstars.record() as program:
            step()
        if len(program):  # none where libstars has no operation for the tensors' type
            self._keep(key, program)
        if times == 1 or bool(done.all()):
            return 1
        return 1 + (program.run(times - 1, done) if len(program) else self._run_plainly(step, done, times - 1))

    def _run_graph(self, key: Hashable, step: Callable[[], None], times: int, rare: bool) -> int:
        # The first step of a shape compiles kernels and lets libraries allocate, which a capture does not permit.
        first = key not in self._seen
        plain = times if rare else int(first)
        for _ in range(plain):
            step()
        self._seen.add(key)  # not before: a step that was interrupted while it compiled must not be captured next
        left = times - plain
        while left:
            # Powers of two, so that the few graphs of a shape make up segments of any length. A shape that may never
            # come again is worth one step's capture only.
            steps = 1 if first else 1 << (min(left, self.max_steps).bit_length() - 1)
            self._graph((key, steps), step, steps).replay()
            left -= steps
        return times

    def _graph(self, key: Hashable, step: Callable[[], None], steps: int) -> torch.cuda.CUDAGraph:
        """The graph of `steps` steps of a shape, captured where there is none."""
        graph: torch.cuda.CUDAGraph | None = self._recorded.get(key)
        if graph is not None:
            self._recorded.move_to_end(key)
            return graph
        graph = self._capture(step, steps)
        if len(self._recorded) == MAX_GRAPHS:  # the one that makes room may be running
            torch.cuda.synchronize()
        self._keep(key, graph)
        return graph

    def _capture(self, step: Callable[[], None], steps: int) -> torch.cuda.CUDAGraph:
        """A graph of `steps` steps.

        On a stream of its own: cuBLAS keeps one workspace for each stream, and the first graph that is captured there
        owns it. On torch's common capture stream that may be another engine's graph, which goes away with that engine.
        """
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        try:
            # Not by torch.cuda.graph, which waits for the device and gives back all memory that torch keeps at hand: a
            # shape may come up in the midst of requests.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    for _ in range(steps):
                        step()
                finally:
                    graph.capture_end()
        except BaseException:
            self._pool = None  # torch may still take it for one that is being filled
            raise
        return graph

    def _keep(self, key: Hashable, recorded: Any) -> None:
        self._recorded[key] = recorded
        if len(self._recorded) > MAX_GRAPHS:
            self._recorded.popitem(last=False)
