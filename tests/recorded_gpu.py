"""A GPU's host side over libstars' arithmetic: everything of `fake_cuda` that can go stale, with values in it.

Passes are padded with idle lanes and rows, host and device have memory of their own that only transfers connect. A
CUDA graph is a program of libstars: what was captured is replayed at the addresses of that time, and capturing runs
nothing. A step without filters draws without them, whatever a lane asks for, as the Triton sampler does.
"""

from __future__ import annotations

import importlib
import random
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch

import stars
from building import PADDED, work_as
from held import tensors_of
from stars import buffers
from stars.bindings import libstars
from stars.cache import PagedCache
from stars.kernels import graph as graphs
from stars.kernels.copy_rows import copy_rows_reference
from stars.kernels.sample_step import sample_step
from stars.target import CPU, CUDA

TARGET = PADDED._replace(own_memory=True, chunk=64, captured_score=48, ridge_rows=CUDA.ridge_rows)
"""Nothing is captured at start-up, before there is an engine whose memory a capture leaves as it is."""


class Stream:
    """What the device was given and has not done yet. It does as much of it as `quick` says whenever it gets more, and
    all that is waited for."""

    def __init__(self):
        self.works: deque = deque()
        self.given = 0  # works in all, those that are done too
        self.quick = random.Random(3).randrange  # of so many works, how many are done at once

    def give(self, work) -> int:
        """The work's place, for `wait`."""
        self.works.append(work)
        self.given += 1
        self.wait(self.given - len(self.works) + self.quick(len(self.works) + 1))
        return self.given

    def wait(self, place: int) -> None:
        while self.works and self.given - len(self.works) < place:
            self.works.popleft()()

    def wait_stream(self, other: Stream) -> None:
        """What comes next here waits for what the other was given so far."""
        place = other.given
        self.give(lambda: other.wait(place))

    def synchronize(self) -> None:
        self.wait(self.given)


class Streams:
    """The device's: what it is given goes to the current one."""

    def __init__(self, main: Stream):
        self.all, self.current = [main], main

    def new(self) -> Stream:
        self.all.append(Stream())
        return self.all[-1]

    @contextmanager
    def on(self, stream: Stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def give(self, work) -> tuple[Stream, int]:
        return self.current, self.current.give(work)

    def synchronize(self) -> None:
        for stream in self.all:
            stream.synchronize()


class Event:
    """A place in a stream."""

    streams: Streams

    def __init__(self):
        self.place = None

    def record(self) -> None:
        self.place = self.streams.current, self.streams.current.given

    def synchronize(self) -> None:
        if self.place is not None:
            self.place[0].wait(self.place[1])


class SplitBuffers:
    """`Buffers` on a device with memory of its own: what was not sent is not there, what was not waited for neither."""

    streams: Streams

    def __init__(self, target, /, zeroed=True, hosts=1, **fields):
        self._there, *self._here = (buffers.Buffers(CPU, **fields) for _ in range(1 + hosts))
        if not zeroed:
            self._there._there.fill_(0x77)
        self._busy, self._place = [False] * hosts, [None] * hosts

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._there[name]

    def host(self, name: str, block: int = 0) -> np.ndarray:
        assert not self._busy[block], f"the host touches {name} before its transfer has ended"
        return self._here[block].host(name)

    def wait(self, block: int = 0) -> None:
        if self._place[block] is not None:
            stream, place = self._place[block]
            stream.wait(place)
        self._busy[block] = False

    def upload(self, size: int | None = None) -> None:
        self._busy[0] = True
        self._place[0] = self.streams.give(lambda: self._there._there[:size].copy_(self._here[0]._there[:size]))

    def fetch(self, block: int = 0) -> None:
        self._busy[block] = True
        self._place[block] = self.streams.give(lambda: self._here[block]._there.copy_(self._there._there))


class RecordedGpu:
    """Counts captures and replays."""

    def __init__(self):
        self.memory: list[torch.Tensor] = []  # of its engines, which a capture must leave as it is
        self.captures = self.replays = self.launched = 0  # launched: parts that ran without being captured
        self.capturing: Graph | None = None
        self.stream = Stream()  # the usual one
        self.streams = Event.streams = SplitBuffers.streams = Streams(self.stream)

    def graph(self) -> Graph:
        return Graph(self)

    def copy_rows(self, *given: torch.Tensor) -> None:
        if self.capturing is None:
            self.streams.current.synchronize()
            copy(*given)
        else:
            self.capturing.copies.append(given)

    def to_device(self, cache, values) -> torch.Tensor:
        self.streams.current.synchronize()  # it is read at once
        return torch.tensor(list(values), dtype=torch.int32)

    def sample_step(self, logits, lanes, filters=True, ended=None, cuts=True) -> None:
        """`sample_step` that looks at filters and entropy cuts only where it is told that there are some."""
        before = lanes.done.clone()
        if not filters:
            off = lanes.top_k.shape
            lanes = lanes._replace(top_k=torch.zeros(off, dtype=torch.int32), top_p=torch.ones(off),
                                   min_p=torch.zeros(off))
        sample_step(logits, lanes, filters, cuts=cuts)
        if self.capturing is None:
            tell(before, lanes.done, ended)
        else:
            self.capturing.told.append((lanes.done, ended))


class Graph:
    """A program in place of a torch.cuda.CUDAGraph."""

    def __init__(self, gpu: RecordedGpu):
        self.gpu = gpu

    def capture_begin(self, pool, capture_error_mode) -> None:
        self.gpu.streams.synchronize()  # recording also runs what it records
        self.before = [(tensor, tensor.clone()) for tensor in self.gpu.memory]
        self.recording, self.copies, self.told = libstars.record(), [], []
        self.program = self.recording.__enter__()
        self.gpu.capturing = self
        self.gpu.captures += 1

    def capture_end(self) -> None:
        self.recording.__exit__(None, None, None)
        self.gpu.capturing = None
        for tensor, value in self.before:
            tensor.copy_(value)
        del self.before, self.recording

    def replay(self) -> None:
        self.gpu.replays += 1
        self.gpu.streams.give(self._run)

    def _run(self) -> None:
        before = [done.clone() for done, _ in self.told]
        self.program.run(1, torch.zeros(1, dtype=torch.int32))
        for given in self.copies:
            copy(*given)
        for (done, ended), was in zip(self.told, before, strict=True):
            tell(was, done, ended)


def tell(before: torch.Tensor, done: torch.Tensor, ended: torch.Tensor | None) -> None:
    """The flags of the lanes that a draw ended."""
    if ended is not None:
        ended[: len(done)][(before == 0) & (done != 0)] = 1


def copy(k_source, v_source, source, k_target, v_target, target) -> None:
    """`copy_rows`, for which row -1 copies nothing: libstars, which is never given one, has no such row."""
    there = source >= 0
    assert torch.equal(there, target >= 0)
    copy_rows_reference(k_source, v_source, source[there], k_target, v_target, target[there])


def mapped(count: int) -> tuple[torch.Tensor, np.ndarray]:
    flags = torch.zeros(count, dtype=torch.int32)
    return flags, flags.numpy()


def install(monkeypatch) -> RecordedGpu:
    """Engines built from now on, for the rest of a test, take the way of a GPU; see `build`."""
    gpu = RecordedGpu()
    for module in ("cache", "draft", "edit_buffers", "logit_reads", "passes", "tiling"):
        monkeypatch.setattr(importlib.import_module(f"stars.{module}"), "Buffers", SplitBuffers)
    work_as(monkeypatch, TARGET)
    monkeypatch.setattr(PagedCache, "_to_device", lambda cache, values: gpu.to_device(cache, values))
    monkeypatch.setattr("stars.draft.sample_step", gpu.sample_step)
    monkeypatch.setattr("stars.kv_store.copy_rows", gpu.copy_rows)
    monkeypatch.setattr("stars.pacing.mapped", mapped)
    monkeypatch.setattr(graphs, "column", lambda done: "cuda")
    replay = graphs.Graphs._replay

    def launched(run: graphs.Graphs, part: graphs.Part, rare: bool) -> None:
        def call() -> None:
            if gpu.capturing is None:
                gpu.streams.current.synchronize()
                gpu.launched += 1
            part.call()

        replay(run, part._replace(call=call), rare)

    monkeypatch.setattr(graphs.Graphs, "_replay", launched)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", gpu.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", gpu.streams.new)
    monkeypatch.setattr(torch.cuda, "stream", gpu.streams.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: gpu.streams.current)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.streams.synchronize)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 8 << 30))
    return gpu


def build(gpu: RecordedGpu, model, reward, **sizes) -> stars.Engine:
    """An engine that takes the way of a GPU."""
    engine = stars.Engine(model, reward, **sizes)
    for cache in (engine._cache, engine.reward.cache):
        gpu.memory += tensors_of(cache)
    own, others, drafter = engine._models.own.passes, engine.reward._passes, engine._round.drafter
    gpu.memory += tensors_of([part._buffers for part in (own, others, drafter)], own._rewards, others._rewards,
                             drafter._logits)
    return engine
