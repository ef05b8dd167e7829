"""Worker processes that compile Triton kernels into its cache, for a card that need not be there.

Whatever is launched inside `Pool.recording` is described by Triton itself and sent to the workers, not launched.
Whether the card's own launches find it depends on nothing but Triton's own key: a miss costs time and nothing else.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context

from stage import die_with_the_runner
from triton.runtime.jit import JITFunction

LAUNCH = JITFunction.run  # Triton's own, before anything pretends
SPARE_CORES = 3  # for the stages that run meanwhile


def usual_workers() -> int:
    """All cores that are this process's, but a few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, min(16, cores) - SPARE_CORES)


class Driver:
    """What Triton's front end asks of a driver, for a card that need not be there."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Pointer:
    """Stands for a tensor: its type and its alignment, all that a specialisation knows of it."""

    def __init__(self, dtype, offset: int):
        self.dtype, self.offset = dtype, offset

    def data_ptr(self) -> int:
        return self.offset


class Pool:
    """Worker processes that compile what they are told of. To be made before the GPU is touched: they are forked."""

    def __init__(self, workers: int | None = None, arch: int = 90):
        self.workers = workers or usual_workers()
        self.arch = arch
        self.tasks: dict[tuple[str, str, str], Future] = {}
        self._pool = ProcessPoolExecutor(self.workers, get_context("fork"), die_with_the_runner)
        self._pool.submit(os.getpid).result()  # all of them are there now

    @contextmanager
    def recording(self):
        """Inside, no kernel that is not compiled yet is launched: it goes to the workers."""
        from triton import knobs, language

        def described(*, fn, compile, **_) -> bool:
            read_as_types = [value for value in compile["constants"].values()
                             if isinstance(value, str) and language.dtype.is_dtype(value)]
            if read_as_types:  # and compiled into another kernel, which takes the place of the right one in the cache
                raise ValueError(f"{fn.name}: Triton reads its constants {', '.join(read_as_types)} back as types of "
                                 "its own: call them otherwise")
            key = fn.module, fn.name, compile["specialization_data"]
            if key not in self.tasks:
                self.tasks[key] = self._pool.submit(compile_one, *key, self.arch)
            return True

        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = described
            yield

    def wait(self, limit: float = math.inf) -> dict[str, list[float]]:
        """Until all is compiled, or for `limit` seconds: seconds of each, by kernel. What could not be is printed."""
        seconds: dict[str, list[float]] = {}
        until = time.monotonic() + limit
        for (_, name, _), task in self.tasks.items():
            try:
                error = task.exception(None if math.isinf(limit) else max(0.0, until - time.monotonic()))
            except TimeoutError as problem:  # it is compiled where it is launched, if it is
                error = problem
            if error is None:
                seconds.setdefault(name, []).append(round(task.result(), 3))
            else:
                print(f"{name} was not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return seconds

    def close(self) -> None:
        """Ends the workers, whatever they are at."""
        processes = list(self._pool._processes.values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def describe(function, args: tuple, kwargs: dict) -> None:
    """Asks for a kernel as its launch with fake tensors among the arguments would, inside `Pool.recording`."""
    import torch

    def plain(value):
        if not isinstance(value, torch.Tensor):
            return value
        return Pointer(value.dtype, value.storage_offset() * value.element_size())

    named = {name: plain(value) for name, value in kwargs.items()}
    LAUNCH(function, *map(plain, args), grid=None, warmup=True, **named)


def compile_one(module: str, name: str, description: str, arch: int) -> float:
    """In a worker: compiles into the cache; seconds that the kernel took."""
    from triton.runtime import driver

    driver.set_active(Driver(arch))
    begin = time.perf_counter()
    compiled = getattr(importlib.import_module(module), name).preload(description)
    seconds = time.perf_counter() - begin
    with suppress(Exception):  # what launches it is C, and compiled as well; where there is no driver it does not load
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    return seconds
