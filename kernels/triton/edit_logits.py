"""Biases, bans and masks of single tokens; what is changed is said in `stars.kernels.edit_logits`.

The first program of a lane has its entries and its words, the others a share of its mask each, whose logits they write
and never read. An entry whose token the mask forbids is left to those, so that no logit has two writers that differ.

A lane that asks for nothing leaves at once. The grid is fixed, so that a graph serves any edits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.variant import Variant
from stars.kernels.types import Edits, LaneState

BLOCK = 128  # entries, words, or words of a mask, at a time
WARPS = 4


@triton.jit
def edit_logits_kernel(logits, logits_stride, done, steps, out_tokens, max_steps, entries, starts, counts, bases, words,
                       first_words, word_counts, tails, masks, mask_rows, VOCAB: tl.constexpr, LENGTH: tl.constexpr,
                       BLOCK: tl.constexpr):
    """Grid (1 + blocks of the mask, lanes)."""
    program = tl.program_id(0)
    lane = tl.program_id(1)
    if tl.load(done + lane) == 0:
        row = logits + lane.to(tl.int64) * logits_stride
        mask_row = tl.load(mask_rows + lane)
        mask = masks + mask_row.to(tl.int64) * ((VOCAB + 31) // 32)
        if program == 0:
            drawn = tl.minimum(tl.load(steps + lane), max_steps)
            length = tl.load(bases + lane) + drawn

            own_entries = entries + tl.load(starts + lane).to(tl.int64) * 3
            count = tl.load(counts + lane)
            first = drawn * 0
            while first < count:
                entry = first + tl.arange(0, BLOCK)
                there = entry < count
                token = tl.load(own_entries + entry * 3, mask=there, other=-1)
                until = tl.load(own_entries + entry * 3 + 1, mask=there, other=0)
                bias = tl.load(own_entries + entry * 3 + 2, mask=there, other=0).to(tl.float32, bitcast=True)
                there = there & (token >= 0) & (token < VOCAB)
                bits = tl.load(mask + token // 32, mask=there & (mask_row >= 0), other=-1)
                there = there & (((bits >> (token % 32)) & 1) != 0)
                logit = tl.load(row + token, mask=there, other=0.0)
                tl.store(row + token, tl.where(until > length, float("-inf"), logit + bias), mask=there)
                first += BLOCK

            tl.debug_barrier()  # a word bans what an entry has a bias for
            own_words = words + tl.load(first_words + lane).to(tl.int64) * LENGTH
            count = tl.load(word_counts + lane)
            own = out_tokens + lane * max_steps
            tail = tails + lane * (LENGTH - 1)
            first = drawn * 0
            while first < count:
                word = first + tl.arange(0, BLOCK)
                there = word < count
                token = tl.load(own_words + word * LENGTH + LENGTH - 1, mask=there, other=-1)
                there = there & (token >= 0) & (token < VOCAB)
                for back in range(1, LENGTH):
                    of_segment = back <= drawn
                    said = tl.where(of_segment, tl.load(own + drawn - back, mask=of_segment, other=0),
                                    tl.load(tail + LENGTH - 1 - (back - drawn), mask=back > drawn, other=0))
                    wanted = tl.load(own_words + word * LENGTH + LENGTH - 1 - back, mask=there, other=-1)
                    there = there & ((wanted < 0) | (wanted == said))
                tl.store(row + token, tl.full([BLOCK], float("-inf"), tl.float32), mask=there)
                first += BLOCK
        elif mask_row >= 0:
            word = (program - 1) * BLOCK + tl.arange(0, BLOCK)
            bits = tl.load(mask + word, mask=word < (VOCAB + 31) // 32, other=-1)
            place = tl.arange(0, 32)
            column = word[:, None] * 32 + place[None, :]  # [BLOCK, 32]
            forbidden = ((bits[:, None] >> place[None, :]) & 1) == 0
            tl.store(row + column, tl.full([BLOCK, 32], float("-inf"), tl.float32), mask=forbidden & (column < VOCAB))


def edit_logits(logits: Tensor, lanes: LaneState, edits: Edits) -> None:
    """As `stars.kernels.edit_logits`, for logits with adjacent columns."""
    count, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"edit_logits: logits are {logits.dtype} with strides {logits.stride()}, expected float32 "
                         "with adjacent columns")
    length = edits.words.shape[-1]
    each = (count,)
    shapes = {"entries": (len(edits.entries), 3), "words": (len(edits.words), length), "tail": (count, length - 1),
              "masks": (len(edits.masks), (vocab + 31) // 32)}
    for name in Edits._fields:
        tensor = getattr(edits, name)
        wanted = shapes.get(name, each)
        if tensor.dtype != torch.int32 or tensor.shape != wanted or not tensor.is_contiguous():
            raise ValueError(f"edit_logits: {name} is {tensor.dtype} {list(tensor.shape)} for {count} lanes and a "
                             f"vocabulary of {vocab}, expected contiguous int32 {list(wanted)}")
    if count:
        blocks = triton.cdiv(shapes["masks"][1], BLOCK)
        edit_logits_kernel[(1 + blocks, count)](
            logits, logits.stride(0), lanes.done, lanes.steps, lanes.out_tokens, lanes.out_tokens.shape[1], *edits,
            VOCAB=vocab, LENGTH=length, BLOCK=BLOCK, num_warps=WARPS)


def variants() -> list[Variant]:
    """A Llama 3 vocabulary, and one that is no multiple of 32."""
    found = []
    for vocab in (128256, 49153):
        constexprs = {"VOCAB": vocab, "LENGTH": 16, "BLOCK": BLOCK}
        kinds = {"logits": "*fp32", "logits_stride": "i32", "max_steps": "i32"} | dict.fromkeys(constexprs, "constexpr")
        found.append(Variant(f"edit_logits {vocab}", edit_logits_kernel,
                             {name: kinds.get(name, "*i32") for name in edit_logits_kernel.arg_names}, constexprs,
                             WARPS, 1))
    return found
