"""Logits of several models as one row of logits; the formula is said in `stars.kernels.blend_logits`.

A program has a block of columns of one lane: it reads them of every model that has a weight there, and writes them
once, so that `out` may be one of the models' own logits. Its bytes are 4 * lanes * vocab * (models + 1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.variant import Variant

BLOCK = 1024  # columns
WARPS = 4


@triton.jit
def blend_logits_kernel(logits, weights, done, out, room, out_stride, MODELS: tl.constexpr, VOCAB: tl.constexpr,
                        BLOCK: tl.constexpr):
    """Grid (lanes, blocks of the vocabulary)."""
    lane = tl.program_id(0)
    if tl.load(done + lane) == 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < VOCAB
        total = tl.zeros([BLOCK], tl.float64)
        forbidden = tl.zeros([BLOCK], tl.int32)
        for model in tl.static_range(MODELS):
            weight = tl.load(weights + model * room + lane)
            if weight != 0.0:
                row = logits + (model * room + lane).to(tl.int64) * VOCAB
                logit = tl.load(row + column, mask=inside, other=0.0)
                no = logit == float("-inf")
                forbidden = forbidden | no.to(tl.int32)
                usable = tl.where(logit == float("inf"), float("nan"), tl.where(no, 0.0, logit))
                total += weight.to(tl.float64) * usable.to(tl.float64)
        blended = tl.where((forbidden != 0) & (total == total), float("-inf"), total.to(tl.float32))
        tl.store(out + lane.to(tl.int64) * out_stride + column, blended, mask=inside)


def blend_logits(logits: Tensor, weights: Tensor, done: Tensor, out: Tensor) -> None:
    """As `stars.kernels.blend_logits`."""
    (models, room, vocab), (lanes, columns) = logits.shape, out.shape
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"blend_logits: logits are {logits.dtype} {list(logits.shape)}, expected contiguous float32")
    if weights.dtype != torch.float32 or weights.shape != (models, room) or not weights.is_contiguous():
        raise ValueError(f"blend_logits: weights are {weights.dtype} {list(weights.shape)}, expected contiguous "
                         f"float32 [{models}, {room}]")
    if out.dtype != torch.float32 or columns != vocab or lanes > room or out.stride(1) != 1:
        raise ValueError(f"blend_logits: out is {out.dtype} {list(out.shape)}, expected float32 [at most {room}, "
                         f"{vocab}] with adjacent columns")
    if done.dtype != torch.int32 or done.shape != (lanes,) or not done.is_contiguous():
        raise ValueError(f"blend_logits: done is {done.dtype} {list(done.shape)}, expected contiguous int32 [{lanes}]")
    if lanes:
        blend_logits_kernel[(lanes, triton.cdiv(vocab, BLOCK))](
            logits, weights, done, out, room, out.stride(0), MODELS=models, VOCAB=vocab, BLOCK=BLOCK, num_warps=WARPS)


def variants() -> list[Variant]:
    """A Llama 3 vocabulary, of one to three models."""
    found = []
    for models in (1, 2, 3):
        constexprs = {"MODELS": models, "VOCAB": 128256, "BLOCK": BLOCK}
        kinds = {"done": "*i32", "room": "i32", "out_stride": "i32"} | dict.fromkeys(constexprs, "constexpr")
        found.append(Variant(f"blend_logits {models} models", blend_logits_kernel,
                             {name: kinds.get(name, "*fp32") for name in blend_logits_kernel.arg_names}, constexprs,
                             WARPS, 1))
    return found
