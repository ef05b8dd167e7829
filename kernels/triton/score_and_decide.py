"""Rewards of lanes and their verdicts in one launch; what is computed is said in `stars.kernels.score_and_decide`.

One program a lane: addition, norm and dot product in float32, then tau and the test in float64, compiled without fused
multiply-adds, so that every operation rounds as it does in `stars.rules`. (The logarithm of the uniform comes from the
card's library, which errs by less than one unit in the last place, as the host's does: a verdict could differ from the
host's only where the test is that close.)

Bytes: lanes * hidden * (2 * itemsize) plus the head and the norm once a lane from the cache. Computed, not measured,
for an H200: 64 lanes of 4096 in bf16 are 1 MB, 0.25 us at 4.3 TB/s, so what counts is what a lane waits for: loads that
are all in flight at once, two block sums, a division and a store, about 3 us in a graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.philox import KIND_ACCEPT
from stars.kernels.triton.rms_norm import MOST_HIDDEN, normed, warps
from stars.kernels.triton.variant import Variant
from stars.kernels.types import DecideState

_INFINITY = tl.constexpr(float("inf"))
_KIND = tl.constexpr(KIND_ACCEPT << 24)


@triton.jit
def score_and_decide_kernel(residual, branch, norm_weight, head, bias, seeds, streams, attempts, tokens, max_tokens,
                            start, reward_threshold, beta, rewards, accepted, residual_stride, branch_stride, eps,
                            HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """One program a lane: reward, threshold and test."""
    lane = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    y = tl.load(residual + lane.to(tl.int64) * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(branch + lane.to(tl.int64) * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(norm_weight + column, mask=inside, other=0.0)
    if BLOCK <= 8192:  # held beside a longer row and its norm, it was more than the registers (sm_90, Triton 3.9)
        direction = tl.load(head + column, mask=inside, other=0.0)

    # tau and the uniform before the sums: no load is moved across a barrier, so these would wait on their own behind.
    final = tl.load(reward_threshold + lane)
    r0 = tl.load(start + lane)
    share = tl.load(tokens + lane).to(tl.float64) / tl.load(max_tokens + lane).to(tl.float64)
    ramp = r0 + share * (final - r0)
    tau = tl.where(ramp < final, ramp, final)  # an infinite threshold: the ramp is that or NaN, and not below
    word, _, _, _ = tl.philox(tl.load(seeds + lane), 0, 0, tl.load(attempts + lane) | _KIND, tl.load(streams + lane))
    luck = tl.log(((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08)
    hardness = tl.load(beta + lane)

    y = normed(y.to(residual.dtype.element_ty).to(tl.float32), scale, eps, HIDDEN)
    if BLOCK > 8192:
        direction = tl.load(head + column, mask=inside, other=0.0)
    reward = tl.sum(y.to(tl.float32) * direction, axis=0)
    if HAS_BIAS:
        reward += tl.load(bias)
    tl.store(rewards + lane, reward)

    reward = reward.to(tl.float64)
    soft = luck < (reward - tau) / tl.where(hardness == 0.0, 1.0, hardness)
    passed = (tau == -_INFINITY) | tl.where(hardness == 0.0, reward >= tau, soft)
    passed = passed & (reward > -_INFINITY) & (reward < _INFINITY) & (tau != _INFINITY)
    tl.store(accepted + lane, passed.to(tl.int32))


def score_and_decide(residual: Tensor, branch: Tensor, norm_weight: Tensor, eps: float, head: Tensor,
                     state: DecideState, bias: Tensor | None = None) -> None:
    """As `stars.kernels.score_and_decide`, `head` float32 [1, hidden], `bias` float32 [1] or None; the residual is left
    as it is."""
    lanes, hidden = residual.shape
    if hidden > MOST_HIDDEN or norm_weight.numel() != hidden or head.numel() != hidden:
        raise ValueError(f"score_and_decide: rows of {hidden}, a norm of {norm_weight.numel()} and a head of "
                         f"{head.numel()} must be equal and at most {MOST_HIDDEN}")
    if branch.shape != residual.shape or residual.stride(1) != 1 or branch.stride(1) != 1:
        raise ValueError(f"score_and_decide: the branch is {list(branch.shape)} beside {list(residual.shape)}, or "
                         "columns are not adjacent")
    if bias is not None and bias.numel() != 1:
        raise ValueError(f"score_and_decide: the bias is {list(bias.shape)} and must be one number")
    for name, tensor in zip(DecideState._fields, state, strict=True):
        if tensor.shape != (lanes,) or not tensor.is_contiguous():
            raise ValueError(f"score_and_decide: {name} is {list(tensor.shape)} for {lanes} lanes, or not contiguous")
    if lanes:
        block = triton.next_power_of_2(hidden)
        score_and_decide_kernel[(lanes,)](
            residual, branch, norm_weight, head, head if bias is None else bias, *state, residual.stride(0),
            branch.stride(0), eps, HIDDEN=hidden, BLOCK=block, HAS_BIAS=bias is not None, num_warps=warps(block),
            enable_fp_fusion=False)


def variants() -> list[Variant]:
    """Rows of usual models in the types of residual stream and weights, and the longest."""
    found = []
    for kind, weight, hidden, bias in (("bf16", "bf16", 4096, False), ("bf16", "fp32", 4096, False),
                                       ("bf16", "fp32", 4096, True), ("fp16", "fp32", 4096, False),
                                       ("fp32", "fp32", 4096, False), ("bf16", "fp32", MOST_HIDDEN, True),
                                       ("fp32", "fp32", MOST_HIDDEN, False)):
        block = triton.next_power_of_2(hidden)
        constexprs = {"HIDDEN": hidden, "BLOCK": block, "HAS_BIAS": bias}
        kinds = {"residual": f"*{kind}", "branch": f"*{kind}", "norm_weight": f"*{weight}", "head": "*fp32",
                 "bias": "*fp32", "seeds": "*i64", "rewards": "*fp32", "residual_stride": "i32",
                 "branch_stride": "i32", "eps": "fp32"}
        kinds |= dict.fromkeys(("start", "reward_threshold", "beta"), "*fp64") | dict.fromkeys(constexprs, "constexpr")
        found.append(Variant(f"score_and_decide {kind} weight {weight} {hidden}{' bias' * bias}",
                             score_and_decide_kernel,
                             {name: kinds.get(name, "*i32") for name in score_and_decide_kernel.arg_names}, constexprs,
                             warps(block), 1, fp_fusion=False))
    return found
