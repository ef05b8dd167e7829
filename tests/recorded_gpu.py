"""A GPU's host side over libstars' arithmetic: everything of `fake_cuda` that can go stale, with values in it.

Passes are padded with idle lanes and rows, host and device have memory of their own that only transfers connect. A
CUDA graph is a program of libstars: what was captured is replayed at the addresses of that time, and capturing runs
nothing. A step without filters draws without them, whatever a lane asks for, as the Triton sampler does.
"""

from __future__ import annotations

import importlib
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

TARGET = PADDED._replace(own_memory=True, padded_moves=True, chunk=64, ridge_rows=CUDA.ridge_rows,
                         measures_widths=False)
"""Widths are not measured: that would capture before there is an engine."""


class SplitBuffers:
    """`Buffers` on a device with memory of its own: what was not sent is not there, what was not waited for neither."""

    def __init__(self, target, /, zeroed=True, **fields):
        self._there, self._here = (buffers.Buffers(CPU, **fields) for _ in range(2))
        if not zeroed:
            self._there._here.fill_(0x77)
        self._busy, self._coming = False, None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._there[name]

    def host(self, name: str) -> np.ndarray:
        assert not self._busy, f"the host touches {name} before its transfer has ended"
        return self._here.host(name)

    def wait(self) -> None:
        self._busy = False
        if self._coming is not None:
            self._here._here.copy_(self._coming)
            self._coming = None

    def upload(self, size: int | None = None) -> None:
        self._there._here[:size].copy_(self._here._here[:size])
        self._busy = True

    def fetch(self) -> None:
        self._coming, self._busy = self._there._here.clone(), True


class RecordedGpu:
    """Counts captures and replays."""

    def __init__(self):
        self.memory: list[torch.Tensor] = []  # of its engines, which a capture must leave as it is
        self.captures = self.replays = 0
        self.capturing: Graph | None = None

    def graph(self) -> Graph:
        return Graph(self)

    def copy_rows(self, *given: torch.Tensor) -> None:
        if self.capturing is None:
            copy(*given)
        else:
            self.capturing.copies.append(given)


class Graph:
    """A program in place of a torch.cuda.CUDAGraph."""

    def __init__(self, gpu: RecordedGpu):
        self.gpu = gpu

    def capture_begin(self, pool, capture_error_mode) -> None:
        self.before = [(tensor, tensor.clone()) for tensor in self.gpu.memory]
        self.recording, self.copies = libstars.record(), []
        self.program = self.recording.__enter__()
        self.gpu.capturing = self
        self.gpu.captures += 1

    def capture_end(self) -> None:
        self.recording.__exit__(None, None, None)
        self.gpu.capturing = None
        for tensor, value in self.before:  # recording also runs what it records
            tensor.copy_(value)
        del self.before, self.recording

    def replay(self) -> None:
        self.gpu.replays += 1
        self.program.run(1, torch.zeros(1, dtype=torch.int32))
        for given in self.copies:
            copy(*given)


def draw(logits, lanes, filters=True) -> None:
    """`sample_step` that looks at filters only where it is told that there are some."""
    if not filters:
        off = lanes.top_k.shape
        lanes = lanes._replace(top_k=torch.zeros(off, dtype=torch.int32), top_p=torch.ones(off), min_p=torch.zeros(off))
    sample_step(logits, lanes, filters)


def copy(k_source, v_source, source, k_target, v_target, target) -> None:
    """`copy_rows`, for which row -1 copies nothing: libstars, which is never given one, has no such row."""
    there = source >= 0
    assert torch.equal(there, target >= 0)
    copy_rows_reference(k_source, v_source, source[there], k_target, v_target, target[there])


@contextmanager
def nothing(stream):
    yield


def install(monkeypatch) -> RecordedGpu:
    """Engines built from now on, for the rest of a test, take the way of a GPU; see `build`."""
    gpu = RecordedGpu()
    for module in ("cache", "draft", "passes", "tiling"):
        monkeypatch.setattr(importlib.import_module(f"stars.{module}"), "Buffers", SplitBuffers)
    work_as(monkeypatch, TARGET)
    monkeypatch.setattr(PagedCache, "_to_device", lambda cache, values: torch.tensor(list(values), dtype=torch.int32))
    monkeypatch.setattr("stars.draft.sample_step", draw)
    monkeypatch.setattr("stars.cache.copy_rows", gpu.copy_rows)
    monkeypatch.setattr(graphs, "column", lambda done: "cuda")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", gpu.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 8 << 30))
    return gpu


def build(gpu: RecordedGpu, model, reward, **sizes) -> stars.Engine:
    """An engine that takes the way of a GPU."""
    engine = stars.Engine(model, reward, **sizes)
    for cache in (engine._cache, engine.reward.cache):
        gpu.memory += tensors_of(cache)
    gpu.memory += tensors_of([part._buffers for part in (engine._passes, engine.reward._passes, engine._round.drafter)],
                             engine._passes._rewards, engine.reward._passes._rewards)
    return engine
