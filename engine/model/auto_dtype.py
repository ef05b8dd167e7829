"""What `dtype="auto"` is on a CPU that multiplies pairs of bfloat16 values: whichever arithmetic is measured ahead.

The instruction does twice the work of a float32 one on some processors and none more on others, and rounding the
activations costs time of its own, so that no table of names would stay true. It is tried where a model is loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import torch

from stars import kernels
from stars.bindings import libstars
from stars.kernels.linear import Arithmetic
from stars.model.config import ModelConfig

logger = logging.getLogger(__name__)

PAIRS = "avx512_bf16"
"""The instruction set of libstars that has the instruction."""
ROWS = (1, 8)
"""Of the products that are tried: one stream, and the candidates of a segment."""
TURNS = 7
LARGEST = 1 << 24
"""Weights of a matrix that is tried, at most: of a longer one its first rows, in a few milliseconds a turn."""
GAIN, LOSS = 1.05, 0.95
"""How many times as fast it must be at some number of rows, and may be at another: rounding more wants a reason."""

Shape = tuple[int, int]
"""out_features, in_features."""


class Choice(NamedTuple):
    """A dtype, "float32" or "bfloat16", and why it was taken."""

    dtype: str
    why: str


def auto_dtype(config: ModelConfig, deterministic: bool, quantised: bool = False) -> Choice:
    """What "auto" is for a model on the CPU. Only a bfloat16 checkpoint's products may be bfloat16, as its weights lose
    nothing by it, and none in deterministic mode, whose bits are the same on every processor. Products of quantised
    matrices have an arithmetic of their own."""
    if config.dtype != "bfloat16":
        return Choice("float32", f"the checkpoint is {config.dtype}")
    if quantised:
        return Choice("float32", "the weights are quantised")
    if deterministic:
        return Choice("float32", "deterministic mode")
    gate_up, down = (2 * config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
    choice = measured_dtype((gate_up, down))
    logger.info('dtype "auto" of a %s model: %s, %s', config.model_type, choice.dtype, choice.why)
    return choice


def measured_dtype(shapes: tuple[Shape, ...]) -> Choice:
    """The arithmetic that is ahead in products of these shapes; float32 without a trial where there is no other."""
    if not libstars.available() or libstars.isa() != PAIRS:
        return Choice("float32", "as no instruction here multiplies pairs of bfloat16 values")
    return _measured(shapes, libstars.num_threads())


@lru_cache(maxsize=64)
def _measured(shapes: tuple[Shape, ...], threads: int) -> Choice:
    """The same where there is a choice, once a process for this number of threads."""
    times = seconds(shapes)
    ahead = {rows: times["float32", rows] / times["bfloat16", rows] for rows in ROWS}
    takes = max(ahead.values()) >= GAIN and min(ahead.values()) >= LOSS
    found = " and ".join(f"{ratio:.2f} at {rows} row{'s' if rows > 1 else ''}" for rows, ratio in ahead.items())
    return Choice("bfloat16" if takes else "float32",
                  f"as products of bfloat16 pairs were measured {found} times as fast as those in float32")


def seconds(shapes: Iterable[Shape]) -> dict[tuple[Arithmetic, int], float]:
    """Seconds of the products of all `shapes` by arithmetic and rows: each one's best of some turns."""
    times: dict[tuple[Arithmetic, int], float] = dict.fromkeys(
        ((arithmetic, rows) for arithmetic in ("float32", "bfloat16") for rows in ROWS), 0.0)
    for out_features, in_features in shapes:
        matrix = torch.full((max(1, min(out_features, LARGEST // in_features)), in_features), 0.5, dtype=torch.bfloat16)
        calls = {case: _product(matrix, *case) for case in times}
        best = dict.fromkeys(times, float("inf"))
        for _ in range(TURNS):  # in turns, so that whatever slows the machine for a while slows both
            for case, call in calls.items():
                begin = time.perf_counter()
                call()
                best[case] = min(best[case], time.perf_counter() - begin)
        for case, taken in best.items():
            times[case] += taken
    return times


def _product(matrix: torch.Tensor, arithmetic: Arithmetic, rows: int) -> Callable[[], None]:
    weight = kernels.pack(matrix, arithmetic=arithmetic)
    x, out = torch.ones(rows, matrix.shape[1]), torch.empty(rows, matrix.shape[0])
    return lambda: kernels.linear(x, weight, out)
