"""Log-probabilities of given tokens in one launch; what is computed is said in `stars.kernels.token_logprobs`.

One program a row: a maximum and a sum of exponentials that follow the row block by block.

Bytes: 4 * rows * vocab, each read once. A program alone has few loads in flight; but the product that made the logits
reads the whole head, which is many times a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.variant import Variant

BLOCK = 4096
WARPS = 8


@triton.jit
def token_logprobs_kernel(logits, targets, logprobs, stride, vocab, wanted, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0)
    mine = logits + row.to(tl.int64) * stride
    highest = tl.full([BLOCK], float("-inf"), tl.float32)  # of every column of blocks
    total = tl.zeros([BLOCK], tl.float32)  # of exp(x - highest)
    for first in range(0, vocab, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(mine + column, mask=column < vocab, other=float("-inf"))
        above = tl.maximum(highest, x)  # a NaN shows in the sum
        base = tl.where(above == float("-inf"), 0.0, above)  # -inf - -inf would be no number
        total = total * tl.exp(highest - base) + tl.exp(x - base)
        highest = above
    most = tl.max(highest, axis=0)
    base = tl.where(most == float("-inf"), 0.0, most)
    summed = tl.sum(total * tl.exp(highest - base), axis=0)
    log_sum = tl.log(summed)
    for place in range(row * wanted, (row + 1) * wanted):
        target = tl.load(targets + place)
        found = tl.load(mine + tl.maximum(target, 0)) - most - log_sum
        tl.store(logprobs + place, tl.where(target < 0, 0.0, found))


def token_logprobs(logits: Tensor, targets: Tensor, logprobs: Tensor) -> None:
    """As `stars.kernels.token_logprobs`."""
    rows, vocab = logits.shape
    if logits.element_size() != 4 or not logits.is_floating_point() or logits.stride(1) != 1:
        raise ValueError(f"token_logprobs: logits are {logits.dtype} {list(logits.shape)} with strides "
                         f"{logits.stride()}, expected float32 with adjacent columns")
    if len(targets) != rows or targets.dim() != 2 or targets.shape != logprobs.shape or not (
            targets.is_contiguous() and logprobs.is_contiguous()):
        raise ValueError(f"token_logprobs: targets are {list(targets.shape)} and logprobs {list(logprobs.shape)} for "
                         f"{rows} rows, or not contiguous")
    if rows:
        token_logprobs_kernel[(rows,)](logits, targets, logprobs, logits.stride(0), vocab, targets.shape[1],
                                       BLOCK=BLOCK, num_warps=WARPS)


def variants() -> list[Variant]:
    """One: the length of a row is no constant of it."""
    return [Variant("token_logprobs", token_logprobs_kernel,
                    {"logits": "*fp32", "targets": "*i32", "logprobs": "*fp32", "stride": "i32", "vocab": "i32",
                     "wanted": "i32", "BLOCK": "constexpr"}, {"BLOCK": BLOCK}, WARPS, 1)]
