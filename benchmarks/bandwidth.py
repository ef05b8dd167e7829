"""How fast this machine reads memory: several readers over one buffer far beyond the last cache."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from stars import kernels

BUFFER_BYTES = 3 << 29  # 1.5 GiB: six times the largest last-level cache of the machines that this ran on
COLUMNS = 4096


class Readers:
    """Readers of one buffer by `threads` threads, each called like a `Timed` of `common.interleave`.

    They differ in how many loads are under way and how the threads share the work, so the best one counts: a share of
    the bandwidth is a share of what something on this machine reaches.
    """

    def __init__(self, threads: int, size: int = BUFFER_BYTES):
        self.threads = threads
        matrix = torch.ones(size // (2 * COLUMNS), COLUMNS, dtype=torch.bfloat16)  # 0x3F80: no byte of 0xFF
        self.weight = kernels.pack(matrix)
        self.values = self.weight.values.view(-1)
        self.bytes = self.values.nbytes
        self._wide = self.values.view(torch.float32)
        self._x, self._out = torch.ones(1, COLUMNS), torch.empty(1, matrix.shape[0])
        self._memchr = ctypes.CDLL(None).memchr
        self._memchr.restype, self._memchr.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

    def functions(self) -> Mapping[str, Callable[[int], float | None]]:
        """Name to reader."""
        return {"torch.sum": self._sum, "torch.amax": self._amax, "memchr in threads": self._search,
                "product of one row": self._product}

    def best(self, seconds: Mapping[str, Sequence[float]]) -> list[float]:
        """GB/s of the fastest reader of every repeat, from what `common.interleave` gave for `functions`."""
        return [self.bytes / min(repeat) / 1e9 for repeat in
                zip(*(seconds[name] for name in self.functions()), strict=True)]

    def _sum(self, _: int) -> None:
        self._wide.sum()

    def _amax(self, _: int) -> None:
        self._wide.amax()

    def _product(self, _: int) -> None:
        kernels.linear(self._x, self.weight, self._out)

    def _search(self, _: int) -> float:
        """libc's search for a byte that is not there, a stretch each thread: ctypes lets go of the interpreter."""
        share = self.bytes // self.threads
        workers = [threading.Thread(target=self._memchr, args=(self.values.data_ptr() + i * share, 0xFF, share))
                   for i in range(self.threads)]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - begin
