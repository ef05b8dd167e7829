"""The stages of a run, in order: what they are, how long they may take, and which module holds them."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """One stage is one process. Stages of one group run side by side; those that measure time run alone."""

    name: str
    module: str  # has run(record, settings), or the function named after a colon
    seconds: int  # most it may take, from the moment it has the device
    group: str = ""
    correctness: bool = False  # whether its failure is a failure of the run
    quick: bool = False  # whether it is part of a quick run
    always: bool = True  # whether it is part of a whole run; the others are asked for by --only
    dry: bool = True  # whether it has anything to do without a GPU
    imports: str = "torch"  # what is slow to import, and is, before its turn comes
    part_seconds: int = 1000  # a part that takes longer is stopped, and the others go on in another process


STAGES = (
    # First light: what the card gives, and whether anything runs on it at all.
    Stage("machine", "machine", 15, quick=True),
    Stage("first-kernels", "first_light:kernels", 28, "first light", True, True),
    Stage("first-engine", "first_light:small_engine", 28, "first light", True, True),
    Stage("headline-8b", "headline:llama_8b", 72, quick=True, imports="torch,transformers", part_seconds=30),
    Stage("beside-8b", "beside:llama_8b", 64, imports="torch,transformers", part_seconds=45),
    Stage("kernels-rows", "kernel_rows", 40, "kernels", True),
    Stage("kernels-products", "kernel_products", 40, "kernels", True),
    Stage("kernels-attention", "kernel_attention", 40, "kernels", True),
    Stage("kernels-attention-more", "kernel_attention:more", 40, "kernels", True),
    Stage("kernels-prefill", "kernel_prefill", 40, "kernels", True),
    Stage("kernels-sampler", "kernel_sampler", 40, "kernels", True),
    Stage("engine", "engine_checks", 40, "kernels", True),
    Stage("products", "tune_products", 15),
    Stage("micro", "micro", 19),
    Stage("ncu", "ncu", 18, dry=False),
    Stage("serving", "serving:llama_8b", 22),
    # Asked for by name.
    Stage("end-to-end-1b", "end_to_end:llama_1b", 80, always=False),
    Stage("end-to-end-8b", "end_to_end:llama_8b", 120, always=False),
    Stage("end-to-end-qwen3-8b", "end_to_end:qwen3_8b", 60, always=False),
    Stage("beside-1b", "beside:llama_1b", 50, always=False, imports="torch,transformers"),
    Stage("compiled-1b", "beside:compiled_1b", 100, always=False, imports="torch,transformers"),
    # Its checks count where they fail; that it has no time for all of them is no fault of the kernels.
    Stage("sanitizer", "sanitizer", 240, correctness=True, always=False, dry=False),
)
"""The most telling first: what no longer fits in the time of the run is left out and said to be."""

TOTAL_SECONDS, QUICK_SECONDS = 293, 118
"""Of a call, imports and waits included; what writes the tables at the end stays under 300 and 120."""
MIN_SECONDS = 4  # a stage is not begun with less


def groups(stages: list[Stage]) -> list[list[Stage]]:
    """Stages that run side by side, in order."""
    found: list[list[Stage]] = []
    for stage in stages:
        if found and stage.group and found[-1][0].group == stage.group:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def sum_of_limits(stages: list[Stage]) -> int:
    """The most that `stages` take together."""
    return sum(max(stage.seconds for stage in group) for group in groups(stages))
