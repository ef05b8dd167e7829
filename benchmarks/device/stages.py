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
    Stage("machine", "machine", 12, quick=True),
    Stage("host", "host", 27, "first light", True, True),
    Stage("first-kernels", "first_light:kernels", 27, "first light", True, True),
    Stage("first-engine", "first_light:small_engine", 27, "first light", True, True),
    # The stages after this one run by the table that it writes.
    Stage("tune-chain", "tune_chain", 40, part_seconds=30),
    Stage("headline-8b", "headline:llama_8b", 60, quick=True, imports="torch,transformers", part_seconds=30),
    Stage("quantised-8b", "quantised:llama_8b", 34, part_seconds=20),
    Stage("beside-8b", "beside:llama_8b", 43, imports="torch,transformers", part_seconds=40),
    Stage("kernels-rows", "kernel_rows", 35, "kernels", True),
    Stage("kernels-fused", "kernel_fused", 35, "kernels", True),
    Stage("kernels-products", "kernel_products", 35, "kernels", True),
    Stage("kernels-attention", "kernel_attention", 35, "kernels", True),
    Stage("kernels-attention-more", "kernel_attention:more", 35, "kernels", True),
    Stage("kernels-prefill", "kernel_prefill", 35, "kernels", True),
    Stage("kernels-sampler", "kernel_sampler", 35, "kernels", True),
    Stage("engine", "engine_checks", 35, "kernels", True),
    Stage("serving", "serving:llama_8b", 18),
    Stage("products", "tune_products", 7),
    Stage("micro", "micro", 17),
    # Asked for by name.
    Stage("ncu", "ncu", 18, always=False, dry=False),
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
