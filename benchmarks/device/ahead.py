"""Compiles, before the card is asked for it, what the engine will launch at the shapes of an 8B pair: ahead.py [--arch 90]

The engine runs over fake tensors on the CPU (`fake_cuda`), with two layers instead of 32, which launch the same kernels;
every specialisation it asks for goes to worker processes, which compile it into Triton's cache. Where the launches of
the card's own run find them depends on nothing but Triton's own key, so that a miss costs time and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import importable

importable.install()

from triton.runtime.jit import JITFunction

LAUNCH = JITFunction.run  # Triton's own, before anything pretends
SPARE_CORES = 3  # for the stages that run meanwhile


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
        self.workers = workers or max(1, (os.cpu_count() or 2) - SPARE_CORES)
        self.arch = arch
        self.tasks: dict[tuple[str, str, str], Future] = {}
        self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("fork"))
        self._pool.submit(os.getpid).result()  # all of them are there now

    @contextmanager
    def recording(self):
        """Inside, no kernel that is not compiled yet is launched: it goes to the workers."""
        from triton import knobs

        def described(*, fn, compile, **_) -> bool:
            key = fn.module, fn.name, compile["specialization_data"]
            if key not in self.tasks:
                self.tasks[key] = self._pool.submit(compile_one, *key, self.arch)
            return True

        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = described
            yield

    def wait(self) -> dict[str, list[float]]:
        """Until all is compiled: seconds of each, by kernel. What could not be compiled is printed."""
        seconds: dict[str, list[float]] = {}
        for (_, name, _), task in self.tasks.items():
            error = task.exception()
            if error is None:
                seconds.setdefault(name, []).append(round(task.result(), 3))
            else:
                print(f"{name} was not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return seconds

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def describe(function, args: tuple, kwargs: dict) -> None:
    """Asks for a kernel as its launch with fake tensors among the arguments would, inside `Pool.recording`."""
    import torch

    def plain(value):
        if not isinstance(value, torch.Tensor):
            return value
        return Pointer(value.dtype, value.storage_offset() * value.element_size())

    LAUNCH(function, *map(plain, args), grid=None, warmup=True, **{name: plain(value) for name, value in kwargs.items()})


def compile_one(module: str, name: str, description: str, arch: int) -> float:
    """In a worker: compiles into the cache; seconds it took."""
    from triton.runtime import driver

    driver.set_active(Driver(arch))
    begin = time.perf_counter()
    getattr(importlib.import_module(module), name).preload(description)
    return time.perf_counter() - begin


def rehearse(shape: str) -> None:
    """What the headline, the rivals' stage and serving ask of an engine, over fake tensors."""
    import fake_cuda
    from bench import SEGMENT, Bench, Plain
    from record import Record, Settings

    from stars.kernels import prefill_attention

    for library in prefill_attention.BACKENDS:  # they bring kernels of their own
        prefill_attention.BACKENDS[library] = lambda *given: None
    with tempfile.TemporaryDirectory() as folder, fake_cuda.gpu():
        settings = Settings(rehearsing=True)
        bench = Bench(Record(Path(folder) / "ahead.json", "ahead"), settings, shape, layers=2, seed=None)
        for lanes in (1, 16, 8, 4):
            bench.step_seconds(lanes)
        for context in (1024, 4096, (1 << 14) - SEGMENT):
            for count in (4, 1):
                bench.reward_pass_seconds(context, count)
        for context in (bench.context, 128, 64):
            bench.context = context
            bench.complete(Plain())
            for rate in (0.3, 0.1):
                for width in (None, 8, 1):
                    bench.complete(bench.policy(width), rate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability of the card: 90 is an H100 or H200")
    parser.add_argument("--shape", default="Llama-3.1-8B")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - SPARE_CORES))
    parser.add_argument("--json", help="file for the seconds of every kernel")
    options = parser.parse_args()
    import torch  # before the workers are forked, so that they need not
    from triton.runtime import driver

    import stars  # noqa: F401

    begin = time.perf_counter()
    torch.set_num_threads(1)
    pool = Pool(options.workers, options.arch)
    import fake_cuda

    fake_cuda.install()
    fake_cuda.on_variant = describe
    driver.set_active(Driver(options.arch))
    try:
        with pool.recording():
            rehearse(options.shape)
    finally:
        recorded = time.perf_counter() - begin
        seconds = pool.wait()
        print(f"{len(pool.tasks)} kernels for sm_{options.arch}: {sum(map(sum, seconds.values())):.1f} s of compiling by "
              f"{options.workers} workers, {time.perf_counter() - begin:.1f} s in all ({recorded:.1f} to find them)")
        if options.json:
            Path(options.json).write_text(json.dumps({"kernels": len(pool.tasks), "seconds": seconds}, indent=1))
        pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
