"""Penalties on what was said already; what is changed is said in `stars.kernels.apply_penalties`.

`PROGRAMS` programs a lane share its entries of the history, which are distinct tokens in rising order; the first of
them also penalises what the lane drew and the history lacks, which it finds by bisection. So every token is changed by
one program, once.

A lane whose penalties are off leaves at once. The grid is fixed, so that a graph serves any history.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.variant import Variant
from stars.kernels.types import LaneState, Penalties

PROGRAMS = 8
BLOCK = 256  # entries at a time
WARPS = 4


@triton.jit
def _penalised(logits, token, there, count, repetition, frequency, presence):
    """Changes the logits of `token` [block], `count` [block] times said, where `there`."""
    raw = tl.load(logits + token, mask=there, other=0.0)
    z = raw.to(tl.float64)
    z = tl.where(z > 0.0, z / repetition, z * repetition)
    z = z - frequency * count.to(tl.float64) - tl.where(count > 0, presence, 0.0)
    tl.store(logits + token, z.to(tl.float32).to(raw.dtype), mask=there)


@triton.jit
def apply_penalties_kernel(logits, logits_stride, done, steps, out_tokens, max_steps, history, starts, counts,
                           repetitions, frequencies, presences, VOCAB: tl.constexpr, PROGRAMS: tl.constexpr,
                           BLOCK: tl.constexpr, STEPS_BLOCK: tl.constexpr):
    """Grid (PROGRAMS, lanes): they share out the entries of the history; the first one has what the draft adds."""
    program = tl.program_id(0)
    lane = tl.program_id(1)
    repetition = tl.load(repetitions + lane).to(tl.float64)
    frequency = tl.load(frequencies + lane).to(tl.float64)
    presence = tl.load(presences + lane).to(tl.float64)
    off = (repetition == 1.0) & (frequency == 0.0) & (presence == 0.0)
    if (tl.load(done + lane) == 0) & (not off):
        drawn = tl.minimum(tl.load(steps + lane), max_steps)
        own = out_tokens + lane * max_steps
        entries = history + tl.load(starts + lane) * 2
        count = tl.load(counts + lane)
        row = logits + lane.to(tl.int64) * logits_stride

        first = program * BLOCK
        while first < count:
            entry = first + tl.arange(0, BLOCK)
            there = entry < count
            token = tl.load(entries + entry * 2, mask=there, other=-1)
            said = tl.load(entries + entry * 2 + 1, mask=there, other=0)
            for at in range(drawn):
                said += (token == tl.load(own + at)).to(tl.int32)
            there = there & (token >= 0) & (token < VOCAB)
            _penalised(row, token, there, said, repetition, frequency, presence)
            first += PROGRAMS * BLOCK

        if program == 0:
            place = tl.arange(0, STEPS_BLOCK)
            there = place < drawn
            token = tl.load(own + place, mask=there, other=-1)
            said = tl.zeros([STEPS_BLOCK], tl.int32)
            for at in range(drawn):
                other = tl.load(own + at)
                said += (token == other).to(tl.int32)
                there = there & ((place <= at) | (token != other))  # the first of equal ones
            low = tl.zeros([STEPS_BLOCK], tl.int32)  # entries below `low` are less than the token
            high = low + count
            width = count
            while width > 0:  # as often as halving takes
                between = low < high
                middle = (low + high) // 2
                entry_token = tl.load(entries + middle * 2, mask=between, other=0)
                low = tl.where(between & (entry_token < token), middle + 1, low)
                high = tl.where(between & (entry_token >= token), middle, high)
                width = width // 2
            listed = tl.load(entries + low * 2, mask=low < count, other=-1)
            there = there & (listed != token) & (token >= 0) & (token < VOCAB)
            _penalised(row, token, there, said, repetition, frequency, presence)


def apply_penalties(logits: Tensor, lanes: LaneState, penalties: Penalties) -> None:
    """As `stars.kernels.apply_penalties`, for logits of float32, bfloat16 or float16 with adjacent columns."""
    count, vocab = logits.shape
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16) or logits.stride(1) != 1:
        raise ValueError(f"apply_penalties: logits are {logits.dtype} with strides {logits.stride()}, expected "
                         "float32, bfloat16 or float16 with adjacent columns")
    if penalties.history.dim() != 2 or penalties.history.shape[1] != 2 or not penalties.history.is_contiguous():
        raise ValueError(f"apply_penalties: history is {list(penalties.history.shape)}, expected contiguous "
                         "[entries, 2]")
    for name in ("start", "count", "repetition", "frequency", "presence"):
        tensor = getattr(penalties, name)
        if tensor.shape != (count,) or not tensor.is_contiguous():
            raise ValueError(f"apply_penalties: {name} is {list(tensor.shape)} for {count} lanes, or not contiguous")
    if count:
        max_steps = lanes.out_tokens.shape[1]
        apply_penalties_kernel[(PROGRAMS, count)](
            logits, logits.stride(0), lanes.done, lanes.steps, lanes.out_tokens, max_steps, *penalties, VOCAB=vocab,
            PROGRAMS=PROGRAMS, BLOCK=BLOCK, STEPS_BLOCK=triton.next_power_of_2(max_steps), num_warps=WARPS)


def variants() -> list[Variant]:
    """A Llama 3 vocabulary in the three types, short and long segments."""
    found = []
    for kind, steps in (("bf16", 128), ("fp16", 128), ("fp32", 128), ("fp32", 1024)):
        constexprs = {"VOCAB": 128256, "PROGRAMS": PROGRAMS, "BLOCK": BLOCK, "STEPS_BLOCK": steps}
        kinds = {"logits": f"*{kind}", "logits_stride": "i32", "max_steps": "i32"}
        kinds |= dict.fromkeys(("repetitions", "frequencies", "presences"), "*fp32")
        kinds |= dict.fromkeys(constexprs, "constexpr")
        found.append(Variant(f"apply_penalties {kind} {steps} steps", apply_penalties_kernel,
                             {name: kinds.get(name, "*i32") for name in apply_penalties_kernel.arg_names}, constexprs,
                             WARPS, 1))
    return found
