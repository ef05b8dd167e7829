"""A kernel that does nothing but read: the limit of what reads weights and keys (it imports Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHOICES = ((2048, 8, 4), (4096, 8, 8), (8192, 4, 8), (2048, 32, 4))
"""(words of a block, blocks of a program, warps): which of them is fastest differs from card to card."""


@triton.jit
def read_kernel(source, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Grid (programs): the exclusive or of BLOCK * STEPS adjacent int32 words, one word a program."""
    at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in tl.static_range(STEPS):
        total ^= tl.load(source + at + step * BLOCK)
    tl.store(out + tl.program_id(0), tl.xor_sum(total, 0))


def read(source: torch.Tensor, out: torch.Tensor, choice: tuple[int, int, int]) -> None:
    """Reads all of source int32 [a multiple of 2^16] once; out int32 [at least a word a program]."""
    block, steps, warps = choice
    read_kernel[(source.numel() // (block * steps),)](source, out, BLOCK=block, STEPS=steps, num_warps=warps)
