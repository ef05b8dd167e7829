"""What the kernels of a draft step have in common: a lane's state and scores, and what `bracket` tells the others."""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))

# What `bracket` found, in `mode`.
UNFILTERED = tl.constexpr(0)
KNOWN = tl.constexpr(1)  # the threshold is in `threshold`
SEARCH = tl.constexpr(2)  # it is to be looked for


@triton.jit
def is_open(done, step, lane, max_steps):
    """Whether the lane draws in this step: it is not done, and has a column for its token."""
    return (tl.load(done + lane) == 0) & (step >= 0) & (step < max_steps)


@triton.jit
def has_filters(temperature, top_k, top_p, min_p, VOCAB: tl.constexpr):
    """Whether any token could be left out of the lane's draw."""
    return (temperature > 0.0) & (((top_k > 0) & (top_k < VOCAB)) | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def scaled(logits, temperature):
    """z, rounded once as in the reference."""
    z = logits
    if temperature != 1.0:
        z = tl.div_rn(logits, temperature)
    return z


@triton.jit
def row_maximum(parts):
    """The largest of the maxima of a lane's tiles; NaN if one is NaN."""
    wrong = tl.max((parts != parts).to(tl.int32), axis=0)
    largest = tl.max(tl.where(parts != parts, -INFINITY, parts), axis=0)
    return tl.where(wrong != 0, float("nan"), largest)
