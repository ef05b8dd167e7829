"""Products of a few rows with their neighbours fused, as a decode step of a gated transformer needs them.

    end      in            out
    plain    scaled, sums  rstd * (scaled @ weight.T)                        (queries, keys and values; the head)
    residual values        residual += values @ weight.T, scaled and sums    (after attention; the way down)
    swiglu   scaled, sums  silu(gate) * up of rstd * (scaled @ weight.T)     (the way up)

An RMS norm is cut in two. Whoever writes the residual also writes `scaled`, the residual times the next norm's weight,
and `sums`, its squares added up by blocks of 32 features. Whoever reads `scaled` multiplies by 1 / rms at its end, from
the sums, in a fixed order: so no norm needs a launch, and no program reads whole rows before its loop.

Weights are read once, by tiles of features over a part of the inner dimension. Where several programs share a tile
(`splits`), the last of them to arrive adds up all parts in a fixed order and goes on with the end.

With programmatic dependent launch a kernel starts while the one before it still runs: it asks for its first weights,
which depend on nothing, into the second-level cache, and only then waits. Everything else is read and written after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

SUMMED = 32
"""Features whose squares make one entry of `sums`."""


class Tile(NamedTuple):
    """What a program works on, and how."""

    features: int
    inner: int
    warps: int
    stages: int
    splits: int = 1
    swap: bool = False  # weights as the left operand, which from 64 features on is wgmma
    rows: int = 16
    programs: int = 0  # so many programs walk over the tiles; 0: one program a tile
    tma: bool = False
    prefetch: int = 0  # numbers of each weight row that are asked for before the wait; a multiple of 64 a thread
    lines: bool = False  # asked for line by line, not in bulk
    evict: bool = False  # weights leave the cache first


@triton.jit
def _feature(tile, index, OUT_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr, SWIGLU: tl.constexpr):
    """Rows of the weight that a tile takes: adjacent ones, or half of them the gate's and half of them up's."""
    if SWIGLU:
        half: tl.constexpr = BLOCK_FEATURES // 2
        return tile * half + index % half + (index // half) * (OUT_FEATURES // 2)
    else:
        return tile * BLOCK_FEATURES + index


@triton.jit
def _prefetch(weight, tile, start, OUT_FEATURES: tl.constexpr, IN_FEATURES: tl.constexpr,
              BLOCK_FEATURES: tl.constexpr, SWIGLU: tl.constexpr, THREADS: tl.constexpr, LINES: tl.constexpr,
              ahead):
    """Asks for `ahead` adjacent numbers of each weight row of a tile, into the second-level cache: a piece a thread."""
    chunks: tl.constexpr = max(1, THREADS // BLOCK_FEATURES)
    size = ahead // chunks
    index = tl.arange(0, BLOCK_FEATURES * chunks)
    feature = _feature(tile, index // chunks, OUT_FEATURES, BLOCK_FEATURES, SWIGLU)
    at = (weight + feature.to(tl.int64) * IN_FEATURES + start + (index % chunks) * size).to(tl.int64, bitcast=True)
    if LINES:
        for line in range(0, size, 64):
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at + line * 2],
                                      dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.inline_asm_elementwise("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
                                  [at, tl.zeros_like(index) + size * 2], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _end(total, tile, out, sums, residual, gain, scaled, next_sums, rows, eps, OUT_FEATURES: tl.constexpr,
         IN_FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr, SUMMED: tl.constexpr,
         NORM: tl.constexpr, END: tl.constexpr, SUMS: tl.constexpr, NEXT_SUMS: tl.constexpr):
    """What becomes of total float32 [BLOCK_ROWS, BLOCK_FEATURES]."""
    row = tl.arange(0, BLOCK_ROWS)
    there = (row < rows)[:, None]
    if NORM:
        block = tl.arange(0, triton.next_power_of_2(SUMS))
        squares = tl.load(sums + row[:, None] * SUMS + block[None, :], mask=there & (block < SUMS)[None, :], other=0.0,
                          cache_modifier=".cg")
        total *= tl.rsqrt(tl.sum(squares, 1) / IN_FEATURES + eps)[:, None]
    if END == "swiglu":
        half: tl.constexpr = BLOCK_FEATURES // 2
        gate, up = tl.split(tl.permute(tl.reshape(total, (BLOCK_ROWS, 2, half)), (0, 2, 1)))
        feature = tile * half + tl.arange(0, half)
        wanted = there & (feature < OUT_FEATURES // 2)[None, :]
        tl.store(out + row[:, None] * (OUT_FEATURES // 2) + feature[None, :],
                 (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=wanted)
    else:
        feature = tile * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
        wanted = there & (feature < OUT_FEATURES)[None, :]
        at = row[:, None] * OUT_FEATURES + feature[None, :]
        if END == "residual":
            stream = tl.load(residual + at, mask=wanted, other=0.0).to(tl.float32) + total
            stream = stream.to(residual.dtype.element_ty)
            tl.store(residual + at, stream, mask=wanted)
            stream = stream.to(tl.float32)
            weight = tl.load(gain + feature, mask=feature < OUT_FEATURES, other=0.0).to(tl.float32)
            tl.store(scaled + at, (stream * weight[None, :]).to(scaled.dtype.element_ty), mask=wanted)
            blocks: tl.constexpr = BLOCK_FEATURES // SUMMED
            squares = tl.sum(tl.reshape(stream * stream, (BLOCK_ROWS, blocks, SUMMED)), 2)
            block = tile * blocks + tl.arange(0, blocks)
            tl.store(next_sums + row[:, None] * NEXT_SUMS + block[None, :], squares,
                     mask=there & (block < NEXT_SUMS)[None, :])
        else:
            tl.store(out + at, total.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _tile(x, weight, out, sums, residual, gain, scaled, next_sums, partial, tickets, rows, eps, work,
          OUT_FEATURES: tl.constexpr, IN_FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
          BLOCK_FEATURES: tl.constexpr, BLOCK_INNER: tl.constexpr, SPLITS: tl.constexpr, SUMMED: tl.constexpr,
          NORM: tl.constexpr, END: tl.constexpr, SUMS: tl.constexpr, NEXT_SUMS: tl.constexpr, SWAP: tl.constexpr,
          TMA: tl.constexpr, EVICT: tl.constexpr):
    """One tile over its part of the inner dimension, and its end if it is the last part to arrive."""
    SWIGLU: tl.constexpr = END == "swiglu"
    PART: tl.constexpr = IN_FEATURES // SPLITS
    tile = work // SPLITS
    part = work % SPLITS
    row = tl.arange(0, BLOCK_ROWS)
    inner = tl.arange(0, BLOCK_INNER)
    feature = _feature(tile, tl.arange(0, BLOCK_FEATURES), OUT_FEATURES, BLOCK_FEATURES, SWIGLU)
    x_at = x + row[:, None] * IN_FEATURES + inner[None, :]
    there = (row < rows)[:, None]
    if not TMA:
        if OUT_FEATURES % BLOCK_FEATURES != 0:
            feature = tl.minimum(feature, OUT_FEATURES - 1)  # what it gives is stored nowhere
        weight_at = weight + feature.to(tl.int64)[:, None] * IN_FEATURES + inner[None, :]
    if SWAP:
        total = tl.zeros((BLOCK_FEATURES, BLOCK_ROWS), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)
    for start in range(part * PART, part * PART + PART, BLOCK_INNER):
        if TMA:
            if SWIGLU:
                w = weight.load([0, tile * (BLOCK_FEATURES // 2), start]).reshape(BLOCK_FEATURES, BLOCK_INNER)
            else:
                w = weight.load([tile * BLOCK_FEATURES, start])
        elif EVICT:
            w = tl.load(weight_at + start, eviction_policy="evict_first")
        else:
            w = tl.load(weight_at + start)
        values = tl.load(x_at + start, mask=there, other=0.0)
        if _INTERPRETED:  # whose product of bfloat16 takes the bits for integers
            w = w.to(tl.float32)
            values = values.to(tl.float32)
        if SWAP:
            total = tl.dot(w, tl.trans(values), total)
        else:
            total = tl.dot(values, tl.trans(w), total)
    if SWAP:
        total = tl.trans(total)
    if SPLITS > 1:
        local = row[:, None] * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
        parts = partial + tile.to(tl.int64) * (SPLITS * BLOCK_ROWS * BLOCK_FEATURES) + local
        tl.store(parts + part * (BLOCK_ROWS * BLOCK_FEATURES), total, mask=there)
        tl.debug_barrier()
        arrived = tl.atomic_add(tickets + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)
            for one in tl.static_range(SPLITS):
                total += tl.load(parts + one * (BLOCK_ROWS * BLOCK_FEATURES), mask=there, other=0.0,
                                 cache_modifier=".cg")
            tl.store(tickets + tile, 0)
            _end(total, tile, out, sums, residual, gain, scaled, next_sums, rows, eps, OUT_FEATURES, IN_FEATURES,
                 BLOCK_ROWS, BLOCK_FEATURES, SUMMED, NORM, END, SUMS, NEXT_SUMS)
    else:
        _end(total, tile, out, sums, residual, gain, scaled, next_sums, rows, eps, OUT_FEATURES, IN_FEATURES,
             BLOCK_ROWS, BLOCK_FEATURES, SUMMED, NORM, END, SUMS, NEXT_SUMS)


@triton.jit(do_not_specialize=["rows", "ahead"])
def product_kernel(x, weight, raw_weight, out, sums, residual, gain, scaled, next_sums, partial, tickets, rows, ahead,
                   eps,
                   OUT_FEATURES: tl.constexpr, IN_FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                   BLOCK_FEATURES: tl.constexpr, BLOCK_INNER: tl.constexpr, SPLITS: tl.constexpr, SUMMED: tl.constexpr,
                   NORM: tl.constexpr, END: tl.constexpr, SUMS: tl.constexpr, NEXT_SUMS: tl.constexpr,
                   SWAP: tl.constexpr, TMA: tl.constexpr, EVICT: tl.constexpr, PROGRAMS: tl.constexpr,
                   PDL: tl.constexpr, LINES: tl.constexpr, WARPS: tl.constexpr):
    """Grid (tiles * splits), or (PROGRAMS). `raw_weight` is the weight's address where `weight` is a descriptor."""
    WORK: tl.constexpr = (OUT_FEATURES + BLOCK_FEATURES - 1) // BLOCK_FEATURES * SPLITS
    first = tl.program_id(0)
    if PDL:
        if ahead > 0:
            _prefetch(raw_weight, first // SPLITS, (first % SPLITS) * (IN_FEATURES // SPLITS), OUT_FEATURES,
                      IN_FEATURES, BLOCK_FEATURES, END == "swiglu", 32 * WARPS, LINES, ahead)
        gdc_wait()
        gdc_launch_dependents()
    if PROGRAMS > 0:
        for work in tl.range(first, WORK, PROGRAMS, flatten=True):
            _tile(x, weight, out, sums, residual, gain, scaled, next_sums, partial, tickets, rows, eps, work,
                  OUT_FEATURES, IN_FEATURES, BLOCK_ROWS, BLOCK_FEATURES, BLOCK_INNER, SPLITS, SUMMED, NORM, END, SUMS,
                  NEXT_SUMS, SWAP, TMA, EVICT)
    else:
        _tile(x, weight, out, sums, residual, gain, scaled, next_sums, partial, tickets, rows, eps, first,
              OUT_FEATURES, IN_FEATURES, BLOCK_ROWS, BLOCK_FEATURES, BLOCK_INNER, SPLITS, SUMMED, NORM, END, SUMS,
              NEXT_SUMS, SWAP, TMA, EVICT)


@triton.jit(do_not_specialize=["rows"])
def begin_kernel(hidden, gain, residual, scaled, sums, rows, FEATURES: tl.constexpr, SUMS: tl.constexpr,
                 SUMMED: tl.constexpr, BLOCK_ROWS: tl.constexpr, PDL: tl.constexpr):
    """Grid (SUMS): residual, scaled and sums of hidden states that no product has written."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0)
    row = tl.arange(0, BLOCK_ROWS)
    feature = block * SUMMED + tl.arange(0, SUMMED)
    wanted = (row < rows)[:, None] & (feature < FEATURES)[None, :]
    at = row[:, None] * FEATURES + feature[None, :]
    stream = tl.load(hidden + at, mask=wanted, other=0.0)
    tl.store(residual + at, stream, mask=wanted)
    stream = stream.to(tl.float32)
    weight = tl.load(gain + feature, mask=feature < FEATURES, other=0.0).to(tl.float32)
    tl.store(scaled + at, (stream * weight[None, :]).to(scaled.dtype.element_ty), mask=wanted)
    tl.store(sums + row * SUMS + block, tl.sum(stream * stream, 1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "cycles"])
def stub_kernel(qkv, out, rows, cycles, QKV: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr,
                SPIN: tl.constexpr, PDL: tl.constexpr):
    """Grid (rows, blocks): stands for attention: the queries, after so many cycles of the clock."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if SPIN:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u64 a, b; mov.u64 a, %clock64; cvt.s64.s32 b, $1; add.u64 a, a, b; "
            "spin: mov.u64 b, %clock64; setp.lt.u64 p, b, a; @p bra spin; mov.u32 $0, 0; }", "=r,r", [cycles],
            dtype=tl.int32, is_pure=False, pack=1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row * FEATURES + at, tl.load(qkv + row * QKV + at, mask=at < FEATURES), mask=at < FEATURES)


@triton.jit
def norm_kernel(residual, branch, gain, out, eps, FEATURES: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Grid (rows): residual += branch, and its RMS norm."""
    at = tl.program_id(0) * FEATURES + tl.arange(0, BLOCK)
    wanted = tl.arange(0, BLOCK) < FEATURES
    stream = tl.load(residual + at, mask=wanted, other=0.0).to(tl.float32)
    if ADD:
        stream += tl.load(branch + at, mask=wanted, other=0.0).to(tl.float32)
        tl.store(residual + at, stream.to(residual.dtype.element_ty), mask=wanted)
    weight = tl.load(gain + tl.arange(0, BLOCK), mask=wanted, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(stream * stream) / FEATURES + eps)
    tl.store(out + at, (stream * rstd * weight).to(out.dtype.element_ty), mask=wanted)


@triton.jit
def swiglu_kernel(x, out, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, blocks): silu of the first half times the second."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * FEATURES + at, mask=at < FEATURES, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * FEATURES + FEATURES + at, mask=at < FEATURES, other=0.0).to(tl.float32)
    tl.store(out + row * FEATURES + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=at < FEATURES)


class Buffers:
    """What the kernels of a step hand to each other, poisoned so that whatever is not written shows.

    hidden, residual, scaled [rows, features]; qkv, attended, up, middle, logits; sums float32 [rows, features / 32].
    """

    def __init__(self, rows: int, shape, device: str):
        def fresh(width: int, dtype=torch.bfloat16) -> Tensor:
            return torch.full((rows, width), torch.nan, dtype=dtype, device=device)

        self.rows, self.shape = rows, shape
        self.hidden = torch.randn(rows, shape.hidden, device=device).bfloat16()
        self.residual, self.scaled, self.normed = fresh(shape.hidden), fresh(shape.hidden), fresh(shape.hidden)
        self.branch, self.attended = fresh(shape.hidden), fresh(shape.hidden)
        self.qkv, self.up, self.middle = fresh(shape.qkv), fresh(2 * shape.middle), fresh(shape.middle)
        self.logits = fresh(shape.vocabulary, torch.float32)
        self.rounded = fresh(shape.vocabulary)
        self.sums = fresh(shape.hidden // SUMMED, torch.float32)
        self.partial = torch.full((1 << 21,), torch.nan, dtype=torch.float32, device=device)
        self.tickets = torch.zeros(1 << 13, dtype=torch.int32, device=device)

    def poison(self) -> None:
        """NaN wherever a step writes."""
        for one in (self.residual, self.scaled, self.normed, self.branch, self.attended, self.qkv, self.up,
                    self.middle, self.logits, self.rounded, self.sums, self.partial):
            one.fill_(torch.nan)


def product(x: Tensor, weight: Tensor, tile: Tile, end: str, buffers: Buffers, *, norm: bool, out: Tensor | None = None,
            gain: Tensor | None = None, eps: float = 1e-5, pdl: bool = False, launch=None) -> None:
    """x [rows, in_features] times weight [out_features, in_features], with an end as above.

    `launch(kernel, grid, args, kwargs)` is what launches, or compiles.
    """
    out_features, in_features = weight.shape
    split = in_features // tile.splits
    if in_features % tile.splits or split % tile.inner or tile.prefetch > split:
        raise ValueError(f"{tile} does not divide {in_features}")
    if end == "swiglu" and out_features % tile.features or end == "residual" and tile.features < SUMMED:
        raise ValueError(f"{tile} cannot end in {end} at {out_features} features")
    operand = weight
    if tile.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        if end == "swiglu":
            operand = TensorDescriptor(weight, [2, out_features // 2, in_features],
                                       [out_features // 2 * in_features, in_features, 1],
                                       [2, tile.features // 2, tile.inner])
        else:
            operand = TensorDescriptor(weight, [out_features, in_features], [in_features, 1],
                                       [tile.features, tile.inner])
    work = -(-out_features // tile.features) * tile.splits
    buffer = buffers
    args = (x, operand, weight, buffer.logits if out is None else out, buffer.sums, buffer.residual,
            buffer.scaled if gain is None else gain, buffer.scaled, buffer.sums, buffer.partial, buffer.tickets,
            buffer.rows, tile.prefetch if pdl else 0, eps)
    kwargs = dict(OUT_FEATURES=out_features, IN_FEATURES=in_features, BLOCK_ROWS=tile.rows,
                  BLOCK_FEATURES=tile.features, BLOCK_INNER=tile.inner, SPLITS=tile.splits, SUMMED=SUMMED, NORM=norm,
                  END=end, SUMS=in_features // SUMMED if norm else 1,
                  NEXT_SUMS=out_features // SUMMED if end == "residual" else 1, SWAP=tile.swap, TMA=tile.tma,
                  EVICT=tile.evict, PROGRAMS=min(tile.programs, work), PDL=pdl, LINES=tile.lines,
                  WARPS=tile.warps, num_warps=tile.warps, num_stages=tile.stages)
    (launch or launch_now)(product_kernel, (min(tile.programs, work) or work,), args, kwargs | pdl_option(pdl))


def pdl_option(pdl: bool) -> dict[str, bool]:
    """The launch's option; none where it is off, which older Triton knows as well."""
    return {"launch_pdl": True} if pdl else {}


def launch_now(kernel, grid, args, kwargs) -> None:
    kernel[grid](*args, **kwargs)
