"""Rewards of lanes, then the verdict on each request; what is computed is said in `stars.kernels.score_and_decide`.

`score` is one program a lane: gather, add, norm and dot product in float32. `decide` is one program a request, its
lanes side by side: tau and the test in float64, compiled without fused multiply-adds, so that every operation rounds
as it does in `stars.law`. (The logarithm of the uniform comes from the card's library, which errs by less than one unit
in the last place, as the host's does: a verdict could differ from the host's only where the test is that close.)

Bytes: lanes * hidden * (2 * itemsize) plus the head and the norm once a lane from the cache. Computed, not measured,
for an H200: 64 lanes of 4096 in bf16 are 1 MB, 0.25 us at 4.3 TB/s; a lane's three dependent loads, two block sums and
the store take about 3 us, as many again for the verdict, whose loads wait for one another: some 6 us in a graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.philox import KIND_ACCEPT
from stars.kernels.triton.variant import Variant
from stars.kernels.types import DecideState

MOST_HIDDEN = 16384
MOST_LANES = 1024

_INFINITY = tl.constexpr(float("inf"))
_NO_LANE = tl.constexpr(2**31 - 1)
_KIND = tl.constexpr(KIND_ACCEPT << 24)


@triton.jit
def score_kernel(residual, branch, rows, norm_weight, head, head_bias, rewards, residual_stride, branch_stride, eps,
                 HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr):
    lane = tl.program_id(0)
    row = tl.load(rows + lane).to(tl.int64)
    if row >= 0:
        column = tl.arange(0, BLOCK)
        inside = column < HIDDEN
        y = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            y += tl.load(branch + row * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
            y = y.to(residual.dtype.element_ty).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / HIDDEN + eps)
        scale = tl.load(norm_weight + column, mask=inside, other=0.0)
        y = (y.to(scale.dtype).to(tl.float32) * scale.to(tl.float32)).to(scale.dtype).to(tl.float32)
        reward = tl.sum(y * tl.load(head + column, mask=inside, other=0.0).to(tl.float32), axis=0)
        if HAS_BIAS:
            reward += tl.load(head_bias).to(tl.float32)
        tl.store(rewards + lane, reward)


@triton.jit
def decide_kernel(rows, lane_start, seeds, streams, max_tokens, start, reward_threshold, beta, attempts, tokens, slabs,
                  best_reward, best_attempt, best_slab, record, rewards, lanes, requests, POOLS: tl.constexpr,
                  BLOCK: tl.constexpr):
    request = tl.program_id(0)
    if (tl.load(record + request * 3) < 0) & (tl.load(record + request * 3 + 2) < 0):
        first = tl.load(lane_start + request)
        lane = first + tl.arange(0, BLOCK)
        there = lane < tl.load(lane_start + request + 1)
        there = there & (tl.load(rows + lane, mask=there, other=-1) >= 0)
        reward = tl.load(rewards + lane, mask=there, other=0.0).to(tl.float64)

        # tau(n) = min(t, r0 + n / N * (t - r0))
        final = tl.load(reward_threshold + request)
        r0 = tl.load(start + request)
        share = tl.load(tokens + lane, mask=there, other=0).to(tl.float64)
        share = share / tl.load(max_tokens + request).to(tl.float64)
        ramp = r0 + share * (final - r0)
        tau = tl.where(ramp < final, ramp, final)  # an infinite t: the ramp is that or NaN, and not below

        attempt = tl.load(attempts + lane, mask=there, other=1)
        zero = tl.zeros((BLOCK,), tl.int32)
        word, _, _, _ = tl.philox(tl.load(seeds + request), zero, zero, attempt | _KIND,
                                  zero + tl.load(streams + request))
        uniform = ((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08
        hardness = tl.load(beta + request)
        soft = tl.log(uniform) < (reward - tau) / tl.where(hardness == 0.0, 1.0, hardness)
        passed = tl.where(hardness == 0.0, reward >= tau, soft)
        passed = ((tau == -_INFINITY) | passed) & (reward > -_INFINITY) & (tau != _INFINITY)
        faulty = (reward != reward) | (reward == _INFINITY)
        ends = there & (passed | faulty)
        end = tl.min(tl.where(ends, lane, _NO_LANE), axis=0)
        if end < _NO_LANE:
            fault = tl.max(((lane == end) & faulty).to(tl.int32), axis=0)
            tl.store(record + request * 3 + 2 * fault, end)  # the winner's column or the fault's
        else:
            # The earliest of the largest; minus infinity counts as well where nothing was seen before.
            largest = tl.max(tl.where(there, reward, -_INFINITY), axis=0)
            best = tl.min(tl.where(there & (reward == largest), lane, _NO_LANE), axis=0)
            none = tl.load(best_attempt + request) <= 0
            if (best < _NO_LANE) & (none | (largest > tl.load(best_reward + request))):
                tl.store(record + request * 3 + 1, best)
                tl.store(best_reward + request, largest)
                tl.store(best_attempt + request, tl.load(attempts + best))
                for pool in tl.static_range(POOLS):
                    kept = tl.load(best_slab + pool * requests + request)
                    own = tl.load(slabs + pool * lanes + best)
                    tl.store(best_slab + pool * requests + request, own)
                    tl.store(slabs + pool * lanes + best, kept)


def score_and_decide(
    residual: Tensor, branch: Tensor | None, rows: Tensor, norm_weight: Tensor, eps: float, head: Tensor,
    head_bias: Tensor | None, state: DecideState,
) -> None:
    """As `stars.kernels.score_and_decide`."""
    score(residual, branch, rows, norm_weight, eps, head, head_bias, state.rewards)
    decide(rows, state)


def score(
    residual: Tensor, branch: Tensor | None, rows: Tensor, norm_weight: Tensor, eps: float, head: Tensor,
    head_bias: Tensor | None, rewards: Tensor,
) -> None:
    """The rewards alone."""
    lanes, hidden = rows.shape[0], residual.shape[1]
    if hidden > MOST_HIDDEN or norm_weight.numel() != hidden or head.numel() != hidden:
        raise ValueError(f"score_and_decide: rows of {hidden}, a norm of {norm_weight.numel()} and a head of "
                         f"{head.numel()} must be equal and at most {MOST_HIDDEN}")
    added = residual if branch is None else branch
    if added.shape[1] != hidden or residual.stride(1) != 1 or added.stride(1) != 1:
        raise ValueError(f"score_and_decide: the branch is {list(added.shape)} beside {list(residual.shape)}, or "
                         "columns are not adjacent")
    if lanes == 0:
        return
    block = triton.next_power_of_2(hidden)
    score_kernel[(lanes,)](
        residual, added, rows, norm_weight, head, head if head_bias is None else head_bias, rewards,
        residual.stride(0), added.stride(0), eps, HIDDEN=hidden, BLOCK=block, ADD=branch is not None,
        HAS_BIAS=head_bias is not None, num_warps=_warps(block))


def decide(rows: Tensor, state: DecideState) -> None:
    """The verdicts, by state.rewards."""
    lanes, requests = rows.shape[0], state.seeds.shape[0]
    if lanes > MOST_LANES:
        raise ValueError(f"score_and_decide: {lanes} lanes in one call, at most {MOST_LANES}")
    for name, tensor in zip(DecideState._fields, state, strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"score_and_decide: {name} is not contiguous")
    pools = state.slabs.shape[0]
    if state.slabs.shape[1] != lanes or state.best_slab.shape != (pools, requests):
        raise ValueError(f"score_and_decide: slabs {list(state.slabs.shape)} and best_slab "
                         f"{list(state.best_slab.shape)} for {lanes} lanes of {requests} requests")
    if requests:
        decide_kernel[(requests,)](
            rows, state.lane_start, state.seeds, state.streams, state.max_tokens, state.start, state.reward_threshold,
            state.beta, state.attempts, state.tokens, state.slabs, state.best_reward, state.best_attempt,
            state.best_slab, state.record, state.rewards, lanes, requests, POOLS=pools,
            BLOCK=triton.next_power_of_2(max(1, lanes)), num_warps=1 if lanes <= 64 else 4, enable_fp_fusion=False)


def _warps(block: int) -> int:
    return min(16, max(1, block // 1024))


def variants() -> list[Variant]:
    """Rows of usual models in the types of residual stream and weights; 64 lanes and the most."""
    found = []
    for kind, weight, hidden in (("bf16", "bf16", 4096), ("bf16", "fp32", 4096), ("fp16", "fp32", 4096),
                                 ("fp32", "fp32", 4096), ("bf16", "fp32", MOST_HIDDEN), ("fp32", "fp32", MOST_HIDDEN)):
        block = triton.next_power_of_2(hidden)
        constexprs = {"HIDDEN": hidden, "BLOCK": block, "ADD": True, "HAS_BIAS": False}
        kinds = {"residual": f"*{kind}", "branch": f"*{kind}", "rows": "*i32", "norm_weight": f"*{weight}",
                 "head": "*fp32", "head_bias": "*fp32", "rewards": "*fp32", "residual_stride": "i32",
                 "branch_stride": "i32", "eps": "fp32"} | dict.fromkeys(constexprs, "constexpr")
        found.append(Variant(f"score {kind} weight {weight} {hidden}", score_kernel,
                             {name: kinds[name] for name in score_kernel.arg_names}, constexprs, _warps(block), 1))
    for lanes in (1, 64, MOST_LANES):
        constexprs = {"POOLS": 2, "BLOCK": lanes}
        kinds = {"seeds": "*i64", "rewards": "*fp32", "lanes": "i32", "requests": "i32"} | dict.fromkeys(
            ("start", "reward_threshold", "beta", "best_reward"), "*fp64") | dict.fromkeys(constexprs, "constexpr")
        found.append(Variant(f"decide {lanes} lanes", decide_kernel,
                             {name: kinds.get(name, "*i32") for name in decide_kernel.arg_names}, constexprs,
                             1 if lanes <= 64 else 4, 1))
    return found
