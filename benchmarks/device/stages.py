"""The stages of a run, in order: what they are, how long they may take, and which module holds them."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """One stage is one process. Stages of one group run side by side; those that measure time run alone."""

    name: str
    module: str  # has run(record, settings), or the function named after a colon
    seconds: int  # most it may take
    quick_seconds: int
    group: str = ""
    correctness: bool = False  # whether its failure is a failure of the run
    dry: bool = True  # whether it has anything to do without a GPU
    quick: bool = True  # whether it is part of a quick run


STAGES = (
    Stage("environment", "environment", 90, 60),
    Stage("kernels-rows", "kernel_rows", 110, 45, "correctness", True),
    Stage("kernels-products", "kernel_products", 110, 45, "correctness", True),
    Stage("kernels-attention", "kernel_attention", 110, 45, "correctness", True),
    Stage("kernels-attention-more", "kernel_attention:more", 110, 0, "correctness", True, quick=False),
    Stage("kernels-prefill", "kernel_prefill", 110, 45, "correctness", True),
    Stage("kernels-sampler", "kernel_sampler", 110, 45, "correctness", True),
    Stage("engine", "engine_checks", 110, 45, "correctness", True),
    # Its checks count where they fail; that it has no time for all of them is no fault of the kernels.
    Stage("sanitizer", "sanitizer", 60, 0, "correctness", dry=False, quick=False),
    Stage("micro", "micro", 90, 25),
    Stage("end-to-end-1b", "end_to_end:llama_1b", 80, 35),
    Stage("end-to-end-8b", "end_to_end:llama_8b", 120, 0, quick=False),
    Stage("side-by-side-1b", "side_by_side:llama_1b", 70, 30),
    Stage("side-by-side-8b", "side_by_side:llama_8b", 80, 0, quick=False),
    Stage("compiled-1b", "side_by_side:compiled_1b", 100, 0, quick=False),
    Stage("end-to-end-qwen3-8b", "end_to_end:qwen3_8b", 60, 0, quick=False),
)
"""The most telling first: what no longer fits in the time of the run is left out and said to be."""

TOTAL_SECONDS, QUICK_SECONDS = 525, 140
LEAST_SECONDS = 15  # a stage is not begun with less


def groups(stages: list[Stage]) -> list[list[Stage]]:
    """Stages that run side by side, in order."""
    found: list[list[Stage]] = []
    for stage in stages:
        if found and stage.group and found[-1][0].group == stage.group:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found
