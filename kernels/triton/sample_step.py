"""One draft step for all lanes, in place on the device; what is computed is said in `stars.kernels.sample_step`.

The vocabulary is divided into tiles of 2048 tokens, one program each. No row is sorted: every filter is a threshold.

    scan      all lanes: maximum and sum of exponentials of the raw logits of a tile, and, where lanes may be cut, what
              their entropy needs; of lanes without filters also a bound on the largest z + g. Lanes without filters
              are then done but for `finish`.
    bracket, collect, select
              lanes with filters: the least z that is kept, see `sample_filters`
    draw      a bound on the largest z + g of those that reach the threshold, a tile at a time
    finish    the entropy, where the lane may be cut; z + g itself in the tile with the highest bound, and in others
              whose bound it does not reach (few: see `_ceiling`); the winner, its log-probability, and the lane's step

Logits are read once for lanes without filters and three times with them. A threshold is the same in every run and
batch, and differs from the reference's only where a sum of exponentials comes within 1e-5 of top_p.

Noise errs by less than 4e-6 (see `noise`), and z + g is rounded once: tokens whose scores differ by less than 2e-5 at
|z| < 32 may change places with the reference's order. A token's bits do not depend on the number of lanes.

Without filters `scan` is bound by arithmetic, Philox above all, and not by its bytes. The four launches for filters
leave at once where no lane has any, and `filters=False` leaves them out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.limits import MAX_VOCAB
from stars.kernels.triton.noise import exp, gumbel, log2_short, token_words
from stars.kernels.triton.sample_filters import SAMPLE, bracket_kernel, collect_kernel, list_block, select_kernel
from stars.kernels.triton.sample_lane import INFINITY, UNFILTERED, has_filters, is_open, row_maximum, scaled
from stars.kernels.triton.variant import Variant
from stars.kernels.types import LaneState

TILE = 2048  # tokens a program
FINISH_WARPS = 16  # with 8, and so 8 tokens a thread, the loop over tiles spilled on sm_90 and sm_100
FINISH_REGISTERS = 128
"""Most registers of a thread of `finish`: all that its threads can have, and not what the assembler would settle for.
Left to itself it stays below 40 or 64, so that a processor may hold two or three programs, and then spills one to three
numbers (sm_80 with Triton 3.7, sm_100 with 3.8). It now takes 80, one program a processor: a lane waits for no other
up to as many lanes as there are processors."""
SCAN_WARPS = 2  # of scan and draw: with 32 tokens a thread, the sums over a tile cost an instruction a token

_NO_TOKEN = tl.constexpr(2**31 - 1)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


class Workspace(NamedTuple):
    """Partial results of one step. Steps that may run at the same time need one each."""

    highest: Tensor  # float32 [lanes, tiles] largest raw logit; NaN where a logit is NaN or +inf
    total: Tensor  # float32 [lanes, tiles] sum of exp(logit - highest)
    weighted: Tensor  # float32 [lanes, tiles] sum of exp(d) * d, d = logit - highest, where lanes may be cut
    ceiling: Tensor  # float32 [lanes, tiles] no z + g exceeds it; with filters first the sum of exp(z - largest z)
    mode: Tensor  # int32 [lanes]
    bounds: Tensor  # float32 [lanes, 4] largest z, interval's low and high, threshold
    count: Tensor  # type: ignore[assignment]  # int32 [lanes] values listed
    mass: Tensor  # int64 [lanes, 2] for top_p without top_k: above the interval, and of all that min_p keeps
    values: Tensor  # float32 [lanes, vocab] listed values of z


# -- what lanes and tiles have in common ------------------------------------------------------------------------------


@triton.jit
def _best(score, token):
    """(largest score, its token; the lowest of equal ones) of two-dimensional tiles."""
    best = tl.max(tl.max(score, axis=1), axis=0)
    first = tl.where(score == best, token, _NO_TOKEN)
    return best, tl.min(tl.min(first, axis=1), axis=0)


@triton.jit
def _counter(seeds, steps, attempts, streams, lane):
    """What `token_words` takes of a lane."""
    return tl.load(seeds + lane), tl.load(steps + lane), tl.load(attempts + lane), tl.load(streams + lane)


@triton.jit
def _ceiling(terms):
    """A bound on the largest z + g of a tile, by the least of `terms`, log2_short(words) - z * log2(e).

    z + g falls short of it by log(-log u / (1 - u)), which is nothing for an improbable winner and 0.4 on average for a
    certain one. In simulated draws (normal logits, and such as a language model's at temperatures of 0.6 to 1) `finish`
    looked at 1.0 to 1.3 tiles on average, and the slowest of 64 lanes at 3.

    What is added is four times what rounding may take away: 2^-21 of z and of the bound, 2e-5 in logarithms and noise.
    """
    bound = -_LN_2 * tl.min(tl.min(terms, axis=1), axis=0)
    return bound + tl.where(tl.abs(bound) < INFINITY, tl.abs(bound) * 1.9073486328125e-06 + 1e-4, 0.0)


# -- scan -------------------------------------------------------------------------------------------------------------


@triton.jit
def scan_kernel(logits, logits_stride, done, steps, max_steps, temperatures, top_ks, top_ps, min_ps, seeds, attempts,
                streams, highest, total, weighted, ceiling, VOCAB: tl.constexpr, TILES: tl.constexpr,
                TILE: tl.constexpr, FILTERS: tl.constexpr, CUTS: tl.constexpr):
    """Grid (tiles, lanes): the tile's maximum and sum of exponentials, and, without filters, a bound on its z + g. With
    CUTS also what an entropy needs of the tile, from the same read."""
    tile = tl.program_id(0)
    lane = tl.program_id(1)
    seed, step, attempt, stream = _counter(seeds, steps, attempts, streams, lane)
    temperature = tl.load(temperatures + lane)
    if is_open(done, step, lane, max_steps):
        block = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        tokens = block[:, None] * 4 + tl.arange(0, 4)[None, :]  # [TILE / 4, 4]
        x = tl.load(logits + lane.to(tl.int64) * logits_stride + tokens, mask=tokens < VOCAB,
                    other=-INFINITY).to(tl.float32)
        largest = tl.max(tl.max(x, axis=1), axis=0)
        base = tl.where(largest > -INFINITY, largest, 0.0)
        below = x - base
        exponentials = exp(below)
        sums = tl.sum(tl.sum(exponentials, axis=1), axis=0)  # NaN where a logit is NaN or +inf
        part = lane * TILES + tile
        if CUTS:
            below = tl.maximum(below, -1000.0)  # where the exponential is 0; -inf times 0 would be NaN
            tl.store(weighted + part, tl.sum(tl.sum(exponentials * below, axis=1), axis=0))
        tl.store(highest + part, tl.where(sums == sums, largest, float("nan")))
        tl.store(total + part, sums)
        filtered = False
        if FILTERS:
            filtered = has_filters(temperature, tl.load(top_ks + lane), tl.load(top_ps + lane), tl.load(min_ps + lane),
                                 VOCAB)
            if filtered:
                z_base = scaled(base, temperature)
                tl.store(ceiling + part, tl.sum(tl.sum(exp(scaled(x, temperature) - z_base), axis=1), axis=0))
        if (temperature > 0.0) & (not filtered):
            short = log2_short(token_words(seed, step, attempt, stream, block))
            reach = _ceiling(x * (-_LOG2_E / temperature) + short)
            tl.store(ceiling + part, tl.where(temperature < 1e-30, INFINITY, reach))  # 1 / temperature may overflow


# -- draw and finish --------------------------------------------------------------------------------------------------


@triton.jit
def draw_kernel(logits, logits_stride, temperatures, steps, seeds, attempts, streams, mode, bounds, ceiling,
                VOCAB: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """Grid (tiles, lanes): of lanes with filters, a bound on z + g of the tile's tokens that reach the threshold."""
    tile = tl.program_id(0)
    lane = tl.program_id(1)
    if tl.load(mode + lane) != UNFILTERED:
        threshold = tl.load(bounds + lane * 4 + 3)
        seed, step, attempt, stream = _counter(seeds, steps, attempts, streams, lane)
        block = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        tokens = block[:, None] * 4 + tl.arange(0, 4)[None, :]  # [TILE / 4, 4]
        x = tl.load(logits + lane.to(tl.int64) * logits_stride + tokens, mask=tokens < VOCAB,
                    other=-INFINITY).to(tl.float32)
        z = scaled(x, tl.load(temperatures + lane))
        reach = threshold * 0.0 - INFINITY
        if tl.max(tl.max(z, axis=1), axis=0) >= threshold:
            short = log2_short(token_words(seed, step, attempt, stream, block))
            reach = _ceiling(tl.where(z >= threshold, short - z * _LOG2_E, INFINITY))
        tl.store(ceiling + lane * TILES + tile, reach)


@triton.jit
def _leader(left, part):
    """(the largest of `left`, its tile; the first of equal ones)."""
    top = tl.max(left, axis=0)
    return top, tl.min(tl.where(left == top, part, _NO_TOKEN), axis=0)


@triton.jit
def _entropy(highest, sums, weighted):
    """Nats of the softmax over a lane's tiles: log S - W / S, where S adds up exp(d) and W exp(d) * d, d = logit less
    the largest. Moving a tile from its own largest by m adds m * S to its W. NaN where a maximum is."""
    largest = row_maximum(highest)
    there = highest > -INFINITY
    moved = tl.where(there, highest - largest, 0.0)
    scale = tl.where(there, exp(moved), 0.0)
    mass = tl.sum(scale * sums, axis=0)
    return tl.log(mass) - tl.sum(scale * (weighted + moved * sums), axis=0) / mass


@triton.jit
def finish_kernel(logits, logits_stride, token_ids, positions, slots, slab_used, steps, max_tokens, done, out_tokens,
                  out_logprobs, max_steps, temperatures, seeds, attempts, streams, stop_ids, entropy_cuts, least_tokens,
                  highest, total, weighted, ceiling, mode, bounds, ended, VOCAB: tl.constexpr, TILES: tl.constexpr,
                  TILES_BLOCK: tl.constexpr, TILE: tl.constexpr, STOPS: tl.constexpr, STOPS_BLOCK: tl.constexpr,
                  FILTERS: tl.constexpr, TELLS: tl.constexpr, CUTS: tl.constexpr):
    """One program a lane: draws the token from the tiles that may hold it, and advances the lane.

    A lane that ends is noted in `ended` as well, where it TELLS: a store that nothing here waits for, as it may go to
    the host's memory.
    """
    lane = tl.program_id(0)
    # All that can be found without waiting is asked for first.
    seed, step, attempt, stream = _counter(seeds, steps, attempts, streams, lane)
    part = tl.arange(0, TILES_BLOCK)
    there = part < TILES
    highest_logit = tl.load(highest + lane * TILES + part, mask=there, other=-INFINITY)
    reach = tl.load(ceiling + lane * TILES + part, mask=there, other=-INFINITY)
    sums = tl.load(total + lane * TILES + part, mask=there, other=0.0)
    temperature = tl.load(temperatures + lane)
    stop = tl.arange(0, STOPS_BLOCK)
    ids = tl.load(stop_ids + lane * STOPS + stop, mask=stop < STOPS, other=-1)
    ends_at = tl.load(max_tokens + lane)
    threshold = temperature * 0.0 - INFINITY
    if FILTERS:
        if tl.load(mode + lane) != UNFILTERED:
            threshold = tl.load(bounds + lane * 4 + 3)
    draws = is_open(done, step, lane, max_steps)
    if CUTS:
        short = tl.load(weighted + lane * TILES + part, mask=there, other=0.0)
        nats = _entropy(highest_logit, sums, short)  # NaN, which is no cut, of logits that are no distribution
        draws = draws & ((step < tl.load(least_tokens + lane)) | ((nats >= tl.load(entropy_cuts + lane)) == 0))
    if draws:
        row = logits + lane.to(tl.int64) * logits_stride
        largest = row_maximum(highest_logit)
        drawn = -1
        logprob = tl.where(largest == -INFINITY, -INFINITY, float("nan"))
        if tl.abs(largest) < INFINITY:
            greedy = temperature == 0.0
            if temperature > 0.0:  # or so small that z overflows
                greedy = tl.abs(tl.div_rn(largest, temperature)) == INFINITY
            drawn = _NO_TOKEN
            best = largest * 0.0 - INFINITY
            left = tl.where(greedy, highest_logit, reach)
            top, tile = _leader(left, part)
            while (top > best) | ((top == best) & (tile * TILE < drawn)):
                block = tile * (TILE // 4) + tl.arange(0, TILE // 4)
                tokens = block[:, None] * 4 + tl.arange(0, 4)[None, :]  # [TILE / 4, 4]
                scores = tl.load(row + tokens, mask=tokens < VOCAB, other=-INFINITY).to(tl.float32)
                if not greedy:
                    z = scaled(scores, temperature)
                    noise = gumbel(token_words(seed, step, attempt, stream, block))
                    scores = tl.where(z >= threshold, z + noise, -INFINITY)
                score, token = _best(scores, tokens)
                better = (score > best) | ((score == best) & (token < drawn))
                best = tl.where(better, score, best)
                drawn = tl.where(better, token, drawn)
                left = tl.where(part == tile, -INFINITY, left)
                top, tile = _leader(left, part)
            sums = tl.where(highest_logit > -INFINITY, sums * exp(highest_logit - largest), 0.0)
            logprob = tl.load(row + drawn).to(tl.float32) - largest - tl.log(tl.sum(sums, axis=0))
        tl.store(out_tokens + lane * max_steps + step, drawn)
        tl.store(out_logprobs + lane * max_steps + step, logprob)
        tl.store(steps + lane, step + 1)
        stopped = tl.max((ids == drawn).to(tl.int32), axis=0)
        if (drawn < 0) | (step + 1 >= ends_at) | (stopped != 0):
            tl.store(done + lane, 1)
            if TELLS:
                tl.store(ended + lane, 1)
        else:
            tl.store(token_ids + lane, drawn)
            tl.store(positions + lane, tl.load(positions + lane) + 1)
            tl.store(slots + lane, tl.load(slots + lane) + 1)
            tl.store(slab_used + lane, tl.load(slab_used + lane) + 1)
    elif tl.load(done + lane) == 0:  # it is cut, or no column is left for its token
        tl.store(done + lane, 1)
        if TELLS:
            tl.store(ended + lane, 1)


# -- host -------------------------------------------------------------------------------------------------------------


def make_workspace(lanes: int, vocab: int, device: torch.device, filters: bool = True) -> Workspace:
    """Room for steps of up to `lanes` lanes. Without `filters`, for steps with filters=False only."""
    tiles = triton.cdiv(vocab, TILE)

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Workspace(
        room(torch.float32, lanes, tiles), room(torch.float32, lanes, tiles), room(torch.float32, lanes, tiles),
        room(torch.float32, lanes, tiles), room(torch.int32, lanes), room(torch.float32, lanes, 4),
        room(torch.int32, lanes),
        room(torch.int64, lanes, 2), room(torch.float32, lanes if filters else 0, vocab))


_shared: dict[tuple[torch.device, int], list[Workspace]] = {}


def shared_workspace(lanes: int, vocab: int, device: torch.device) -> Workspace:
    """The workspace of a device and vocabulary, grown where it is too small. The outgrown are kept: graphs use them.

    One stream at a time may use it. Growing allocates, which a graph cannot capture: run a step of the most lanes
    before.
    """
    kept = _shared.setdefault((device, vocab), [])
    if not kept or kept[-1].mode.shape[0] < lanes:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"sample_step: a graph is being captured and the workspace is too small for {lanes} "
                               "lanes: run one step of this size before, or pass a workspace")
        kept.append(make_workspace(lanes, vocab, device))
    return kept[-1]


def sample_step(logits: Tensor, lanes: LaneState, filters: bool = True, ended: Tensor | None = None, cuts: bool = True,
                workspace: Workspace | None = None) -> None:
    """As `stars.kernels.sample_step`, for logits of float32, bfloat16 or float16 with adjacent columns.

    With filters=False the caller knows that no lane has top_k, top_p or min_p, and four launches are left out; a lane
    that has them all the same draws without them. With cuts=False the same goes for entropy_cut, which needs no launch
    of its own. A lane without a column for its token is ended.
    """
    count, vocab = logits.shape
    _check(logits, lanes)
    if ended is not None and (ended.dtype != torch.int32 or ended.shape[0] < count or not ended.is_contiguous()):
        raise ValueError(f"sample_step: ended is {ended.dtype} {list(ended.shape)} for {count} lanes, or not "
                         "contiguous")
    if count == 0:
        return
    space = shared_workspace(count, vocab, logits.device) if workspace is None else workspace
    if space.mode.shape[0] < count or (filters and space.values.shape[0] < count) or space.values.shape[1] != vocab:
        raise ValueError(f"sample_step: a workspace of {list(space.values.shape)} for {count} lanes of {vocab}")
    tiles = triton.cdiv(vocab, TILE)
    tiles_block = triton.next_power_of_2(tiles)
    stride, max_steps = logits.stride(0), lanes.out_tokens.shape[1]
    scan_kernel[(tiles, count)](
        logits, stride, lanes.done, lanes.steps, max_steps, lanes.temperature, lanes.top_k, lanes.top_p, lanes.min_p,
        lanes.seeds, lanes.attempts, lanes.streams, space.highest, space.total, space.weighted, space.ceiling,
        VOCAB=vocab, TILES=tiles, TILE=TILE, FILTERS=filters, CUTS=cuts, num_warps=SCAN_WARPS)
    if filters:
        bracket_kernel[(count,)](
            logits, stride, lanes.done, lanes.steps, max_steps, lanes.temperature, lanes.top_k, lanes.top_p,
            lanes.min_p, space.highest, space.ceiling, space.mode, space.bounds, space.count, space.mass,
            VOCAB=vocab, TILES=tiles, TILES_BLOCK=tiles_block, SAMPLE=SAMPLE, num_warps=8)
        collect_kernel[(tiles, count)](
            logits, stride, lanes.temperature, lanes.top_k, lanes.top_p, space.mode, space.bounds, space.count,
            space.mass, space.values, VOCAB=vocab, TILE=TILE, num_warps=4)
        select_kernel[(count,)](
            logits, stride, lanes.temperature, lanes.top_k, lanes.top_p, space.mode, space.bounds, space.count,
            space.mass, space.values, VOCAB=vocab, BLOCK=list_block(vocab), num_warps=8)
        draw_kernel[(tiles, count)](
            logits, stride, lanes.temperature, lanes.steps, lanes.seeds, lanes.attempts, lanes.streams, space.mode,
            space.bounds, space.ceiling, VOCAB=vocab, TILES=tiles, TILE=TILE, num_warps=SCAN_WARPS)
    finish_kernel[(count,)](
        logits, stride, lanes.token_ids, lanes.positions, lanes.slots, lanes.slab_used, lanes.steps, lanes.max_tokens,
        lanes.done, lanes.out_tokens, lanes.out_logprobs, max_steps, lanes.temperature, lanes.seeds, lanes.attempts,
        lanes.streams, lanes.stop_ids, lanes.entropy_cut, lanes.least_tokens, space.highest, space.total,
        space.weighted, space.ceiling, space.mode, space.bounds, lanes.done if ended is None else ended, VOCAB=vocab,
        TILES=tiles, TILES_BLOCK=tiles_block, TILE=TILE, STOPS=lanes.stop_ids.shape[1],
        STOPS_BLOCK=triton.next_power_of_2(max(1, lanes.stop_ids.shape[1])), FILTERS=filters, TELLS=ended is not None,
        CUTS=cuts, num_warps=FINISH_WARPS, maxnreg=FINISH_REGISTERS)


def _check(logits: Tensor, lanes: LaneState) -> None:
    """What the host knows without asking the device."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16) or logits.stride(1) != 1:
        raise ValueError(f"sample_step: logits are {logits.dtype} with strides {logits.stride()}, expected float32, "
                         "bfloat16 or float16 with adjacent columns")
    if logits.shape[1] > MAX_VOCAB:
        raise ValueError(f"sample_step: a vocabulary of {logits.shape[1]} exceeds the {MAX_VOCAB} whose probabilities "
                         "can be added up exactly")
    count = logits.shape[0]
    for name, tensor in zip(LaneState._fields, lanes, strict=True):
        if tensor.shape[0] != count or not tensor.is_contiguous():
            raise ValueError(f"sample_step: {name} is {list(tensor.shape)} for {count} lanes, or not contiguous")


def variants() -> list[Variant]:
    """Every kernel at a Llama 3 vocabulary in the three types, and at a small one; with filters and without, and where
    lanes may be cut."""
    found = []
    for kind, vocab in (("bf16", 128256), ("fp16", 128256), ("fp32", 128256), ("fp32", 262144), ("bf16", 1000)):
        for name, (kernel, warps, filters) in {
            "scan": (scan_kernel, SCAN_WARPS, False), "scan filters": (scan_kernel, SCAN_WARPS, True),
            "scan cuts": (scan_kernel, SCAN_WARPS, False), "scan filters cuts": (scan_kernel, SCAN_WARPS, True),
            "bracket": (bracket_kernel, 8, True), "collect": (collect_kernel, 4, True),
            "select": (select_kernel, 8, True), "draw": (draw_kernel, SCAN_WARPS, True),
            "finish": (finish_kernel, FINISH_WARPS, False), "finish filters": (finish_kernel, FINISH_WARPS, True),
            "finish cuts": (finish_kernel, FINISH_WARPS, False),
            "finish filters cuts": (finish_kernel, FINISH_WARPS, True),
        }.items():
            tiles = triton.cdiv(vocab, TILE)
            constexprs = {"VOCAB": vocab, "TILES": tiles, "TILES_BLOCK": triton.next_power_of_2(tiles), "TILE": TILE,
                          "SAMPLE": SAMPLE, "BLOCK": list_block(vocab), "STOPS": 16, "STOPS_BLOCK": 16,
                          "FILTERS": filters, "TELLS": True, "CUTS": "cuts" in name}
            kinds = {"logits": f"*{kind}"} | _KINDS
            signature = {argument: "constexpr" if argument in constexprs else kinds.get(argument, "*i32")
                         for argument in kernel.arg_names}
            found.append(Variant(f"sample_step {name} {kind} {vocab}", kernel, signature,
                                 {key: value for key, value in constexprs.items() if key in signature}, warps, 1,
                                 max_registers=FINISH_REGISTERS if kernel is finish_kernel else None))
    return found


_KINDS = {"logits_stride": "i32", "max_steps": "i32", "seeds": "*i64", "mass": "*i64"} | dict.fromkeys(
    ("temperatures", "top_ps", "min_ps", "highest", "total", "weighted", "ceiling", "bounds", "values", "out_logprobs",
     "entropy_cuts"), "*fp32")
