"""Builds `skinny_cuda.cu` with nvcc, one library an end and a number of rows, and launches it on torch's stream."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ENDS = {"plain": 0, "residual": 1, "swiglu": 2, "float": 3}
SOURCE = Path(__file__).with_name("skinny_cuda.cu")


class CudaTile(NamedTuple):
    """What a block works on. Shared memory, at most 113 KB, holds (features + rows) * inner * stages numbers."""

    features: int
    split_warps: int  # parts of the inner dimension of a stage
    inner: int
    stages: int
    grid: int = 128
    prefetch: int = 0  # numbers of each weight row, past the ring, that are asked for before the wait

    @property
    def splits(self) -> int:
        """Blocks that share a tile."""
        return 1


CASES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "plain": ((48, 2, 128, 5), (64, 2, 128, 4), (32, 4, 256, 3), (48, 2, 256, 2)),
    "residual": ((32, 4, 256, 3), (32, 2, 128, 6), (32, 4, 512, 2)),
    "swiglu": ((64, 2, 128, 4), (32, 4, 256, 3), (112, 1, 128, 2), (64, 2, 256, 2)),
    "float": ((64, 2, 128, 4), (32, 4, 256, 3), (64, 2, 256, 2)),
}
"""(features, split_warps, inner, stages) by end: what is compiled."""


def start(folder: str, rows: tuple[int, ...] = (8, 16), arch: str = "90") -> list[tuple[str, int, subprocess.Popen]]:
    """Starts a compiler for each library."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    running = []
    for end, cases in CASES.items():
        for count in rows:
            wrapper = Path(folder) / f"{end}{count}.cu"
            rows_of = "".join(f" STARS_CASE({number}, {', '.join(map(str, case))})"
                              for number, case in enumerate(cases))
            wrapper.write_text(f"#define STARS_END {ENDS[end]}\n#define STARS_ROWS {count}\n"
                               f"#define STARS_CASES{rows_of}\n#include \"{SOURCE}\"\n")
            command = [compiler, "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v",
                       "-shared", "-Xcompiler", "-fPIC", str(wrapper), "-o", str(wrapper.with_suffix(".so"))]
            running.append((end, count, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                                         text=True)))
    return running


def finish(running: list[tuple[str, int, subprocess.Popen]], timeout: float) -> dict[str, str]:
    """Waits; what the compiler said, where it failed or spilled."""
    problems = {}
    for end, rows, process in running:
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said = "took too long"
        spilled = any("spill" in line and " 0 bytes spill stores" not in line for line in said.splitlines())
        if process.returncode or spilled:
            problems[f"{end} {rows}"] = said[-1500:]
    return problems


class Library:
    """The launches of all ends."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.loaded: dict[tuple[str, int], ctypes.CDLL] = {}

    def product(self, x: Tensor, weight: Tensor, tile: CudaTile, end: str, buffers, *, out: Tensor | None,
                gain: Tensor | None, eps: float, pdl: bool) -> None:
        """As `skinny_kernels.product`."""
        rows = 8 if buffers.rows <= 8 else 16
        if end == "plain" and out is not None and out.dtype == torch.float32:
            end = "float"
        key = (end, rows)
        if key not in self.loaded:
            self.loaded[key] = ctypes.CDLL(str(self.folder / f"{end}{rows}.so"))
        if any(one is not None and not one.is_contiguous() for one in (x, weight, out)):
            raise ValueError("x, weight and out must be contiguous")

        def at(tensor: Tensor | None) -> ctypes.c_void_p:
            return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

        code = self.loaded[key].stars_skinny(
            CASES[end].index(tuple(tile[:4])), at(x), at(weight), at(out), at(buffers.sums), at(buffers.residual),
            at(gain), at(buffers.scaled), at(buffers.sums), buffers.rows, weight.shape[0], weight.shape[1],
            tile.prefetch, ctypes.c_float(eps), tile.grid, int(pdl),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if code:
            raise RuntimeError(f"launch of {end} {tuple(tile)} failed with {code}")
