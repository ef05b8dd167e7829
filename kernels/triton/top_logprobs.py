"""What stood beside the tokens that were drawn; what is found is said in `stars.kernels.top_logprobs`.

No row is sorted. Every token has a key of 64 bits that no two share: the logit's place in the order of the float32
numbers above, what is left of the id below. So ranks, ties and order are exact.

    scan    grid (tiles, lanes): the tile's largest key, its sum of exponentials, and how many of its keys are above
            that of the drawn token
    finish  one program a lane: the rank, the sum over all tiles, and the keys in order: the largest of all tiles, and
            then of its tile, which is read again, the next one below it

Bytes: the logits once, 4 * lanes * vocab, and a tile of 8 KiB again for each token that is wanted, out of the cache. A
lane that has nothing to tell leaves at once in both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.noise import exp
from stars.kernels.triton.sample_lane import INFINITY
from stars.kernels.triton.variant import Variant
from stars.kernels.types import TopLogprobs

TILE = 2048  # tokens a program
SCAN_WARPS = 4
FINISH_WARPS = 8

_IDS = tl.constexpr(0x7FFFFFFF)  # the lowest id has the largest key of equal logits
_NONE = tl.constexpr(-(2**63))  # below every key


class Workspace(NamedTuple):
    """Partial results of one step, a tile each."""

    keys: Tensor  # int64 [lanes, tiles] the largest
    sums: Tensor  # float32 [lanes, tiles] of exp(logit - the largest of the tile); NaN where a logit is NaN or +inf
    above: Tensor  # int32 [lanes, tiles] keys above the drawn token's


_shared: dict[tuple[torch.device, int], list[Workspace]] = {}


def _workspace(lanes: int, tiles: int, device: torch.device) -> Workspace:
    """Kept and grown as `sample_step.shared_workspace` is, and allocated outside of captures as that is."""
    kept = _shared.setdefault((device, tiles), [])
    if not kept or len(kept[-1].keys) < lanes:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"top_logprobs: a graph is being captured and there is no room for {lanes} lanes: run "
                               "this size before")
        kept.append(Workspace(*(torch.empty(lanes, tiles, dtype=dtype, device=device)
                                for dtype in (torch.int64, torch.float32, torch.int32))))
    return kept[-1]


@triton.jit
def _keys(x, tokens, there):
    """int64 keys of the logits `x` of `tokens`; `_NONE` where there is no token."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return tl.where(there, (order << 32) | (tokens.to(tl.int64) ^ _IDS), _NONE)


@triton.jit
def _logit_of(key):
    """The logit of a key."""
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _tells(wanted, told, steps, lane, max_steps):
    """Whether the lane has a draw that was not read yet, and a column for it."""
    step = tl.load(steps + lane) - 1
    return (tl.load(wanted + lane) >= 0) & (step >= tl.load(told + lane)) & (step >= 0) & (step < max_steps)


@triton.jit
def scan_kernel(logits, stride, steps, tokens, wanted, told, max_steps, keys, sums, above, VOCAB: tl.constexpr,
                TILES: tl.constexpr, TILE: tl.constexpr):
    """Grid (tiles, lanes)."""
    tile = tl.program_id(0)
    lane = tl.program_id(1)
    if _tells(wanted, told, steps, lane, max_steps):
        row = logits + lane.to(tl.int64) * stride
        drawn = tl.load(tokens + lane * max_steps + tl.load(steps + lane) - 1)
        inside = (drawn >= 0) & (drawn < VOCAB)
        own = _keys(tl.load(row + drawn, mask=inside, other=0.0), drawn, inside)
        token = tile * TILE + tl.arange(0, TILE)
        there = token < VOCAB
        x = tl.load(row + token, mask=there, other=-INFINITY)
        mine = _keys(x, token, there)
        best = tl.max(mine, axis=0)
        largest = _logit_of(best)
        # Of a tile that holds NaN or +inf the sum is NaN, whatever its largest key says.
        base = tl.where((largest > -INFINITY) & (largest < INFINITY), largest, 0.0)
        total = tl.sum(exp(x - base), axis=0)
        wrong = tl.max(((x != x) | (x == INFINITY)).to(tl.int32), axis=0)
        part = lane * TILES + tile
        tl.store(keys + part, best)
        tl.store(sums + part, tl.where(wrong != 0, float("nan"), total))
        tl.store(above + part, tl.sum((mine > own).to(tl.int32), axis=0))


@triton.jit
def finish_kernel(logits, stride, steps, tokens, wanted, told, max_steps, ranks, token_ids, logprobs, own, most, keys,
                  sums, above, VOCAB: tl.constexpr, TILES: tl.constexpr, TILES_BLOCK: tl.constexpr, TILE: tl.constexpr,
                  OWN: tl.constexpr):
    """One program a lane."""
    lane = tl.program_id(0)
    if _tells(wanted, told, steps, lane, max_steps):
        step = tl.load(steps + lane) - 1
        place = lane * max_steps + step
        row = logits + lane.to(tl.int64) * stride
        drawn = tl.load(tokens + place)
        inside = (drawn >= 0) & (drawn < VOCAB)
        part = tl.arange(0, TILES_BLOCK)
        there = part < TILES
        left = tl.load(keys + lane * TILES + part, mask=there, other=_NONE)
        total = tl.load(sums + lane * TILES + part, mask=there, other=0.0)
        before = tl.sum(tl.load(above + lane * TILES + part, mask=there, other=0), axis=0)
        largest = _logit_of(tl.max(left, axis=0))
        wrong = tl.max((total != total).to(tl.int32), axis=0)
        fit = inside & (wrong == 0) & (largest > -INFINITY)
        highest = tl.where(left == _NONE, -INFINITY, _logit_of(left))
        total = tl.where(highest > -INFINITY, total * exp(highest - largest), 0.0)
        log_sum = tl.log(tl.sum(total, axis=0))
        tl.store(ranks + place, tl.where(fit, before + 1, 0))
        if OWN:
            x = tl.load(row + drawn, mask=inside, other=0.0)
            tl.store(own + place, tl.where(fit, x - largest - log_sum, float("nan")))
        count = tl.where(fit, tl.minimum(tl.load(wanted + lane), most), 0)
        column = place.to(tl.int64) * most
        for i in range(most):
            best = tl.max(left, axis=0)
            x = tl.where(best == _NONE, -INFINITY, _logit_of(best))
            found = (i < count) & (x > -INFINITY)
            token = ((best & _IDS) ^ _IDS).to(tl.int32)
            tl.store(token_ids + column + i, tl.where(found, token, -1))
            tl.store(logprobs + column + i, tl.where(found, x - largest - log_sum, -INFINITY))
            if found:
                tile = token // TILE
                at = tile * TILE + tl.arange(0, TILE)
                mine = _keys(tl.load(row + at, mask=at < VOCAB, other=-INFINITY), at, at < VOCAB)
                left = tl.where(part == tile, tl.max(tl.where(mine < best, mine, _NONE), axis=0), left)
        tl.store(told + lane, step + 1)


def top_logprobs(logits: Tensor, steps: Tensor, tokens: Tensor, top: TopLogprobs) -> None:
    """As `stars.kernels.top_logprobs`."""
    (count, vocab), max_steps = logits.shape, tokens.shape[1]
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"top_logprobs: logits are {logits.dtype} {list(logits.shape)} with strides "
                         f"{logits.stride()}, expected float32 with adjacent columns")
    most = top.token_ids.shape[2]
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "steps": (steps, (count,)), "tokens": (tokens, (count, max_steps)), "wanted": (top.wanted, (count,)),
        "told": (top.told, (count,)), "ranks": (top.ranks, (count, max_steps)),
        "token_ids": (top.token_ids, (count, max_steps, most)), "logprobs": (top.logprobs, (count, max_steps, most))}
    if top.own is not None:
        shapes["own"] = top.own, (count, max_steps)
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"top_logprobs: {name} is {list(tensor.shape)}, expected contiguous {list(shape)}")
    if not count:
        return
    tiles = triton.cdiv(vocab, TILE)
    space = _workspace(count, tiles, logits.device)
    scan_kernel[(tiles, count)](
        logits, logits.stride(0), steps, tokens, top.wanted, top.told, max_steps, *space, VOCAB=vocab, TILES=tiles,
        TILE=TILE, num_warps=SCAN_WARPS)
    finish_kernel[(count,)](
        logits, logits.stride(0), steps, tokens, top.wanted, top.told, max_steps, top.ranks, top.token_ids,
        top.logprobs, top.ranks if top.own is None else top.own, most, *space, VOCAB=vocab, TILES=tiles,
        TILES_BLOCK=triton.next_power_of_2(tiles), TILE=TILE, OWN=top.own is not None, num_warps=FINISH_WARPS)


def variants() -> list[Variant]:
    """A large vocabulary, a Llama 3 one and a small one; of drafts and of prompts, where the own one is said, too."""
    found = []
    for vocab in (1000, 128256, 262144):
        tiles = triton.cdiv(vocab, TILE)
        for name, kernel, warps, own in (("scan", scan_kernel, SCAN_WARPS, False),
                                         ("finish", finish_kernel, FINISH_WARPS, False),
                                         ("finish own", finish_kernel, FINISH_WARPS, True)):
            constexprs = {"VOCAB": vocab, "TILES": tiles, "TILES_BLOCK": triton.next_power_of_2(tiles), "TILE": TILE,
                          "OWN": own}
            kinds = {"logits": "*fp32", "stride": "i32", "max_steps": "i32", "most": "i32", "keys": "*i64",
                     "sums": "*fp32", "logprobs": "*fp32", "own": "*fp32" if own else "*i32"}
            kinds |= dict.fromkeys(constexprs, "constexpr")
            signature = {argument: kinds.get(argument, "*i32") for argument in kernel.arg_names}
            found.append(Variant(f"top_logprobs {name} {vocab}", kernel, signature,
                                 {key: value for key, value in constexprs.items() if key in signature}, warps, 1))
    return found
