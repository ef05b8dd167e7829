"""Rewards of lanes in one launch; what is computed is said in `stars.kernels.score`.

One program a lane: addition of the branch where there is one, norm and dot product in float32, compiled without fused
multiply-adds, so that every operation rounds as it does in the reference.

Bytes: lanes * hidden * (2 * itemsize) plus the head and the norm once a lane from the cache. Few: what counts is what a
lane waits for, loads that are all in flight at once, two block sums and a store.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.limits import MAX_HIDDEN
from stars.kernels.linear import Weight
from stars.kernels.triton.rms_norm import normed, warps
from stars.kernels.triton.variant import Variant


@triton.jit
def score_kernel(residual, branch, norm_weight, head, bias, rewards, residual_stride, branch_stride, eps,
                 HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr):
    """One program a lane, which holds its row whole; ADD: with a branch."""
    lane = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    y = tl.load(residual + lane.to(tl.int64) * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(branch + lane.to(tl.int64) * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(norm_weight + column, mask=inside, other=0.0)
    if BLOCK <= 8192:  # besides a longer row and its norm, it was more than the registers (sm_90, Triton 3.9)
        direction = tl.load(head + column, mask=inside, other=0.0)
    y = normed(y.to(residual.dtype.element_ty).to(tl.float32), scale, eps, HIDDEN)
    if BLOCK > 8192:
        direction = tl.load(head + column, mask=inside, other=0.0)
    reward = tl.sum(y.to(tl.float32) * direction, axis=0)
    if HAS_BIAS:
        reward += tl.load(bias)
    tl.store(rewards + lane, reward)


def score(residual: Tensor, branch: Tensor | None, norm_weight: Tensor, eps: float, head: Weight, hidden: Tensor,
          rewards: Tensor) -> None:
    """As `stars.kernels.score`; the residual is left as it is and `hidden` is not used."""
    lanes, width = residual.shape
    matrix, bias = head.values, head.bias
    if head.quant is not None or not matrix.is_floating_point():
        raise ValueError(f"score: the head is stored as {head.scheme if head.quant else matrix.dtype} and must be of "
                         "floating point numbers: leave it out of quantisation")
    if width > MAX_HIDDEN or norm_weight.numel() != width or matrix.numel() != width:
        raise ValueError(f"score: rows of {width}, a norm of {norm_weight.numel()} and a head of {matrix.numel()} must "
                         f"be equal and at most {MAX_HIDDEN}")
    added = residual if branch is None else branch
    if added.shape != residual.shape or residual.stride(1) != 1 or added.stride(1) != 1:
        raise ValueError(f"score: the branch is {list(added.shape)} and the residual {list(residual.shape)}, or "
                         "columns are not adjacent")
    if bias is not None and bias.numel() != 1:
        raise ValueError(f"score: the bias is {list(bias.shape)} and must be one number")
    if rewards.shape != (lanes,) or not rewards.is_contiguous():
        raise ValueError(f"score: rewards are {list(rewards.shape)} for {lanes} lanes, or not contiguous")
    if lanes:
        block = triton.next_power_of_2(width)
        score_kernel[(lanes,)](
            residual, added, norm_weight, matrix, matrix if bias is None else bias, rewards, residual.stride(0),
            added.stride(0), eps, HIDDEN=width, BLOCK=block, ADD=branch is not None, HAS_BIAS=bias is not None,
            num_warps=warps(block), enable_fp_fusion=False)


def variants() -> list[Variant]:
    """Rows of usual models in the types of residual stream and weights, and the longest."""
    found = []
    for kind, weight, hidden, add, bias in (
            ("bf16", "bf16", 4096, True, False), ("bf16", "fp32", 4096, True, False),
            ("bf16", "fp32", 4096, True, True), ("bf16", "fp32", 4096, False, True),
            ("fp16", "fp32", 4096, True, False), ("fp32", "fp32", 4096, True, False),
            ("bf16", "fp32", MAX_HIDDEN, True, True), ("fp32", "fp32", MAX_HIDDEN, True, False)):
        block = triton.next_power_of_2(hidden)
        constexprs = {"HIDDEN": hidden, "BLOCK": block, "ADD": add, "HAS_BIAS": bias}
        kinds = {"residual": f"*{kind}", "branch": f"*{kind}", "norm_weight": f"*{weight}", "residual_stride": "i32",
                 "branch_stride": "i32", "eps": "fp32"} | dict.fromkeys(constexprs, "constexpr")
        found.append(Variant(f"score {kind} weight {weight} {hidden}{' add' * add}{' bias' * bias}", score_kernel,
                             {name: kinds.get(name, "*fp32") for name in score_kernel.arg_names}, constexprs,
                             warps(block), 1, fp_fusion=False))
    return found
