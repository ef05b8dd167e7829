"""Time on the device: launches captured in a graph, over rotated buffers, so caches and the host stay out of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch

ROTATED_BYTES = 256 << 20
"""What the rotated buffers hold together: five times the second-level cache of an H100 or H200 (50 MB)."""
MAX_SETS = 64


@cache
def capture_stream() -> torch.cuda.Stream:
    """One for all captures, as libraries keep a workspace for every stream."""
    return torch.cuda.Stream()


_rehearsing = False


def rehearsing() -> bool:
    """Whether calls are only to be made once, and not timed."""
    return _rehearsing


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, whatever is timed is called once."""
    global _rehearsing
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False


def sets(bytes_a_set: float, dry: bool) -> int:
    """How many sets of buffers to rotate through for honest figures of memory."""
    return 2 if dry or _rehearsing else int(min(MAX_SETS, max(2, ROTATED_BYTES // max(1, bytes_a_set))))


class Seconds(float):
    """The median of some repeats, and their smallest and largest."""

    spread: tuple[float, float]

    @classmethod
    def of(cls, times: Sequence[float]) -> Seconds:
        made = cls(statistics.median(times))
        made.spread = (min(times), max(times))
        return made


def seconds_a_call(calls: Sequence[Callable[[], object]], device: str, repeats: int = 7, least: int = 20) -> Seconds:
    """Median seconds of one of `calls`, which do the same work on different buffers.

    On a GPU every call runs once (which compiles), then all of them are captured in one graph, at least `least`
    launches, whose replays are timed with events. On the CPU they are called.
    """
    if device == "cpu":
        calls[0]()
        begin = time.perf_counter()
        for call in calls:
            call()
        return Seconds.of([(time.perf_counter() - begin) / len(calls)])
    if rehearsing():
        calls[0]()
        return Seconds.of([1.0])
    for call in calls:
        call()
    rounds = max(1, -(-least // len(calls)))
    graph = captured([*calls] * rounds)
    times = [_between(graph.replay) for _ in range(repeats)]
    return Seconds.of([seconds / (rounds * len(calls)) for seconds in times])


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All of `calls`, each of which has run before, in one graph.

    Not by torch.cuda.graph, which collects garbage and gives memory back: hundreds of figures are captured.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(capture_stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def seconds_each(call: Callable[[], object], device: str, repeats: int = 5, warmups: int = 1) -> list[float]:
    """Seconds of whole calls that end with the device idle, host time included."""
    if rehearsing():
        warmups, repeats = 0, 1
    times = []
    for index in range(warmups + repeats):
        begin = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        if index >= warmups:
            times.append(time.perf_counter() - begin)
    return times


def median_seconds(call: Callable[[], object], device: str, repeats: int = 5, warmups: int = 1) -> Seconds:
    """The median of `seconds_each`."""
    return Seconds.of(seconds_each(call, device, repeats, warmups))


def _between(call: Callable[[], object]) -> float:
    """Seconds of `call` on the device, after one that is not timed: without it the host's launching would be, too."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
