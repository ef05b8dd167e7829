"""The device's random words, stored as they are: a kernel for the test alone (it imports Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

from stars.kernels.triton.noise import gumbel, token_words


@triton.jit
def words_kernel(words_out, noise_out, seed, position, attempt, stream, BLOCKS: tl.constexpr):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    words = token_words(tl.load(seed), tl.load(position), tl.load(attempt), tl.load(stream), block)
    at = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(words_out + at, words.to(tl.int32, bitcast=True))
    tl.store(noise_out + at, gumbel(words))
