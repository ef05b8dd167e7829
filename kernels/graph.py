"""A fixed list of operations over buffers at fixed addresses, recorded once and replayed as one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stars.kernels.dispatch import column, only_references

MAX_PROGRAMS = 512
"""Programs of libstars kept; the least recently used one makes room. Prompts of each length have one in either model;
one of SmolLM2-135M takes 0.16 MB, and about 12 ms to record again."""

LAUNCH_BYTES = 64 << 10
"""Of a GPU's memory, at most, that the driver keeps for one captured launch: an estimate, see benchmarks/NOTES.md."""

LATER_BYTES = 32 << 20
"""Of a GPU's memory for CUDA graphs that were not captured at start-up, where their owner names no bound of its own."""


class Part(NamedTuple):
    """A stretch of a step: a CUDA graph of its own on a GPU, which may serve several steps."""

    key: Hashable  # says everything that is fixed in the recording
    call: Callable[[], None]  # runs it: the same addresses and shapes for one key, all else read from memory
    launches: int = 1  # on a GPU, at most


class Captured(NamedTuple):
    """A part's CUDA graph, and the memory that it is reckoned with."""

    graph: torch.cuda.CUDAGraph
    bytes: int


class Graphs:
    """Recorded steps: programs of libstars on the CPU, CUDA graphs on a GPU, plain calls otherwise.

    A step is a list of parts. On a GPU each part is captured by itself and they are replayed back to back: what comes
    between two of them may change from step to step, and one capture serves every step it is a part of. The gap from
    one graph to the next is one to two microseconds by estimate, of which a step of a large model has thousands.

    later_bytes: of a GPU's memory for graphs that were not captured at start-up; the least recently used makes room.
    """

    def __init__(self, later_bytes: int = LATER_BYTES) -> None:
        self.later_bytes = later_bytes
        self._programs: OrderedDict[Hashable, Any] = OrderedDict()  # by the keys of all parts of a step
        self._at_start: dict[Hashable, torch.cuda.CUDAGraph] = {}  # by the key of a part; these stay
        self._later: OrderedDict[Hashable, Captured] = OrderedDict()
        self._seen: set[Hashable] = set()  # parts that ran on a GPU without being captured
        self._pool: Any = None  # memory that the CUDA graphs share: they never run at the same time
        self._stream: torch.cuda.Stream | None = None  # that they are captured on, see `_capture`

    def run(self, parts: Sequence[Part], done: Tensor, times: int = 1, rare: bool = False) -> int:
        """Runs the step of `parts` up to `times` times, until all of `done` int32 [n] are non-zero; returns how often.

        On a GPU a part that `warm_up` did not capture is captured once it is run a second time; those of `rare` steps
        are launched one by one. The device is not asked there: all `times` steps are run, and those of lanes that are
        done do nothing.
        """
        key = tuple([part.key for part in parts])
        program = self._programs.get(key)
        if program is not None and not only_references():
            self._programs.move_to_end(key)
            ran: int = program.run(times, done)
            return ran
        where = column(done)
        if where == "cpu":
            return self._record(key, parts, done, times)
        if where == "cuda":
            for _ in range(times):
                for part in parts:
                    self._replay(part, rare)
            return times
        return self._run_plainly(parts, done, times)

    def run_beside(self, part: Part, where: Tensor, rare: bool = False) -> None:
        """Runs a part that libstars cannot record, as torch's own operations are among it: captured and replayed where
        `where` lies on a GPU, called elsewhere. rare: as `run`'s."""
        if column(where) == "cuda":
            self._replay(part, rare)
        else:
            part.call()

    def warm_up(self, part: Part) -> None:
        """Captures a part on a GPU, for good, before it is needed: it runs, which compiles its kernels, and is replayed
        once, by which the device gets it."""
        part.call()
        graph = self._at_start[part.key] = self._capture(part.call)
        graph.replay()

    def _run_plainly(self, parts: Sequence[Part], done: Tensor, times: int) -> int:
        for ran in range(1, times + 1):
            for part in parts:
                part.call()
            if bool(done.all()):
                return ran
        return times

    def _record(self, key: Hashable, parts: Sequence[Part], done: Tensor, times: int) -> int:
        """Records a step that is new to libstars as one program, and runs it."""
        from stars.bindings import libstars

        with libstars.record(execute=False) as program:
            for part in parts:
                part.call()
        if not len(program):  # libstars has no operation for the tensors' type; it was run
            return 1 if times == 1 or bool(done.all()) else 1 + self._run_plainly(parts, done, times - 1)
        ran: int = program.run(times, done)
        self._programs[key] = program
        if len(self._programs) > MAX_PROGRAMS:
            self._programs.popitem(last=False)
        return ran

    def _replay(self, part: Part, rare: bool) -> None:
        key = part.key
        graph = self._at_start.get(key)
        if graph is None and key in self._later:
            self._later.move_to_end(key)
            graph = self._later[key].graph
        if graph is None:
            # The first run compiles kernels and lets libraries allocate, which a capture does not permit.
            size = part.launches * LAUNCH_BYTES
            if key not in self._seen or size > self.later_bytes:
                part.call()
                if not rare:
                    self._seen.add(key)  # not before: what was interrupted while it compiled must not be captured next
                return
            graph = self._capture(part.call)
            self._make_room(size)
            self._later[key] = Captured(graph, size)
        graph.replay()

    def _make_room(self, size: int) -> None:
        """Gives up the least recently used of the later graphs, until there is memory for another."""
        held = sum([captured.bytes for captured in self._later.values()])
        if held + size > self.later_bytes:
            torch.cuda.synchronize()  # they may be running
        while held + size > self.later_bytes:
            held -= self._later.popitem(last=False)[1].bytes

    def _capture(self, call: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `call` launches.

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
                # An interrupt may come as soon as the capture has begun, before `capture_begin` returns, and as it is
                # about to be ended: so that is tried twice. A stream that is left capturing makes every wait for the
                # device fail from then on.
                try:
                    try:
                        graph.capture_begin(self._pool, capture_error_mode="thread_local")
                        call()
                    finally:
                        _end_capture(graph)
                finally:
                    _end_capture(graph)
        except BaseException:
            self._pool = None  # torch may still take it for one that is being filled
            raise
        return graph


def _end_capture(graph: torch.cuda.CUDAGraph) -> None:
    """Ends what the current stream captures, where it still does."""
    if torch.cuda.is_current_stream_capturing():
        graph.capture_end()
