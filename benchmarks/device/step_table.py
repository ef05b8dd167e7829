"""What a decode step is made of: every kernel of replayed steps by CUPTI, through torch's profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bench import Bench

PRODUCTS = {("rms_norm_kernel", "rope_write_kernel"): "qkv", ("attention_kernel", "rms_norm_kernel"): "o",
            ("merge_kernel", "rms_norm_kernel"): "o", ("rms_norm_kernel", "swiglu_kernel"): "gate_up",
            ("swiglu_kernel", "rms_norm_kernel"): "down", ("rms_norm_kernel", "scan_kernel"): "head",
            ("rms_norm_kernel", "apply_penalties_kernel"): "head"}
"""Which product stands between two kernels of ours: a library's own names do not say."""

PROFILED_STEPS = 4  # of a draft: the profiler takes as long over a launch as the card
PRODUCT = "linear_kernel"  # our own, which is named by its neighbours as a library's is
FUSED = "product_kernel"  # our own with an end, which is named by its place in a layer
AFTER_ATTENTION = ("o", "gate_up", "down")
FIRST = ("take_rows_kernel", "embedding_scaled_kernel")  # of a step: the embedding


class Launch(NamedTuple):
    """One kernel on the device."""

    name: str
    start: float  # us
    stop: float


def launches(bench: Bench, lanes: int) -> list[Launch]:
    """Every kernel of a few short drafts at `lanes` lanes, in order."""
    import torch
    from torch.autograd import DeviceType

    bench.step_seconds(lanes, 1, PROFILED_STEPS)  # captured
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        bench.step_seconds(lanes, 1, PROFILED_STEPS)
    found = [Launch(event.name, event.time_range.start, event.time_range.end) for event in profiled.events()
             if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))]
    return sorted(found, key=lambda launch: launch.start)


def table(all_launches: list[Launch], bytes_of: dict[str, float]) -> list[dict]:
    """Rows of {kernel, launches a step, us a step, us a launch, bytes a launch, gb_s}, the longest first.

    Steps of the median number of launches stand for all: the others are the prompt's pass and the last one, which is
    cut short.
    """
    steps = split_steps(all_launches)
    if not steps:
        return []
    count = sorted(len(step) for step in steps)[len(steps) // 2]
    steps = [step for step in steps if len(step) == count]
    sums: dict[str, list[float]] = {}
    for step in steps:
        for label, launch in zip(labels([launch.name for launch in step]), step, strict=True):
            entry = sums.setdefault(label, [0, 0.0])
            entry[0] += 1
            entry[1] += launch.stop - launch.start
    rows = []
    for label, (number, total) in sums.items():
        us = total / number
        size = bytes_of.get(short(label))
        rows.append({"kernel": label, "launches": number / len(steps), "us_a_step": total / len(steps), "us": us,
                     "bytes": size, "gb_s": None if size is None else size / us / 1e3})
    wall = [step[-1].stop - step[0].start for step in steps]
    rows.append({"kernel": "all, from the first launch to the end of the last", "launches": count,
                 "us_a_step": sorted(wall)[len(wall) // 2], "us": None, "bytes": None, "gb_s": None})
    return sorted(rows, key=lambda row: -row["us_a_step"])


def split_steps(all_launches: list[Launch]) -> list[list[Launch]]:
    """Whole steps: from an embedding to what comes before the next."""
    begins = [index for index, launch in enumerate(all_launches) if own_name(launch.name) in FIRST]
    return [all_launches[first:last] for first, last in zip(begins, begins[1:], strict=False)]


def labels(names: list[str]) -> list[str]:
    """A name for each: our own kernel's, or for a library's which product it is."""
    ours = [own_name(name) for name in names]
    found = []
    place = -1  # of a fused product: behind an attention, in order
    for index, (name, own) in enumerate(zip(names, ours, strict=True)):
        if own == FUSED:
            following = next((one for one in ours[index + 1 :] if one), "")
            between = "qkv" if following == "attention_kernel" else "head"
            found.append(f"{AFTER_ATTENTION[place] if 0 <= place < 3 else between} ({FUSED})")
            place += 1
            continue
        if own:
            place = 0 if own in ("attention_kernel", "merge_kernel") else place
            found.append(own)
            continue
        before = next((one for one in reversed(ours[:index]) if one), "")
        after = next((one for one in ours[index + 1 :] if one), "")
        product = PRODUCTS.get((before, after))
        found.append(f"{product or f'between {before} and {after}'} ({name.split('<')[0][:60]})")
    return found


def own_name(name: str) -> str:
    """The kernel's name if it is one of Triton's of this project, else nothing."""
    plain = name.split("(")[0]
    ours = plain.endswith("_kernel") and "::" not in plain and "<" not in plain and plain != PRODUCT
    return plain if ours else ""


def short(label: str) -> str:
    """A label without the library's own name: "gate_up"."""
    return label.split(" (")[0]


def bytes_of(bench: Bench, lanes: int) -> dict[str, float]:
    """What one launch has to move, by label: weights once, the prefix once, half a slab a lane, rows in and out.

    Not what a product's second launch (a sum over parts) or the merge of partial results moves, which plans decide.
    """
    from bench import SEGMENT
    from models import kv_bytes_a_token, stored_bytes

    layer, config = bench.lm.layers[0], bench.lm.config
    size = bench.lm.dtype.itemsize
    of = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down, "head": bench.lm.head}
    found = {name: float(stored_bytes(weight)) for name, weight in of.items()}
    keys = kv_bytes_a_token(bench.lm) / config.num_layers * (bench.context + lanes * SEGMENT / 2)
    hidden, intermediate = lanes * config.hidden_size * size, lanes * config.intermediate_size * size
    qkv, logits = lanes * layer.qkv.out_features * size, lanes * config.vocab_size * 4  # float32
    return found | {"attention_kernel": keys, "rms_norm_kernel": 4 * hidden, "swiglu_kernel": 3 * intermediate,
                    "rope_write_kernel": 2 * qkv, "take_rows_kernel": 2 * hidden, "embedding_scaled_kernel": 3 * hidden,
                    "scan_kernel": logits}
