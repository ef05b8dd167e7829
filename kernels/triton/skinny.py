"""Products of a few rows with their neighbours fused: the five launches of a layer that are not attention's, in four.

    end       reads            gives
    qkv       scaled, squares  queries; keys and values where they belong: norm, product, QK norm, rotation
    residual  any rows         residual += product; scaled, squares (after attention, and the way down)
    swiglu    scaled, squares  silu(gate) * up
    normed    scaled, squares  the product of the normed stream (the head)
    plain     any rows         the product

A norm is cut in two (`stars.kernels.types.Stream`): whoever writes the residual also writes it times the next norm's
weight, and its squares added up by blocks of 32 features; whoever reads that multiplies by 1 / rms at its end. So no
norm is a launch, and no program reads whole rows before its loop.

Weights are read once, in tiles of features over the inner dimension or, with splits, over a part of it. What is ended
as a whole is a unit: a tile, or for `qkv` a head. Where several programs share a unit, each leaves its sums in
`SplitSpace.partial` and takes a ticket; the last to arrive adds up all parts, in their order, goes on with the end and
puts the counter back to zero. So bits depend on the tile, never on who was last. Blocks of rows are neighbours in the
order of launch and share the weights that they read through the second-level cache.

With programmatic dependent launch (`Tile.pdl`) a kernel starts while the one before it still runs: it asks for its
first weights, which depend on nothing, into the second-level cache, and then waits. All else is read and written after.

Bytes: the weights, once. Activations, sums of parts and what is written stay in the second-level cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stars.kernels.linear import Weight
from stars.kernels.triton import dequant, tuned
from stars.kernels.triton.dequant import load_block
from stars.kernels.triton.tuned import SUMMED, Tile
from stars.kernels.triton.variant import ARCHES, Variant
from stars.kernels.types import Batch, LayerKV, SplitSpace, Stream

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SUMMED = tl.constexpr(SUMMED)
_SQUARES = tl.constexpr(2048)
"""Squares that a program holds at a time: sixteen registers a thread."""

EMBEDDED = 1024
"""Features of a row that a program of the embedding takes."""


@triton.jit
def _prefetch(weight, feature, first, ahead, ROW_BYTES: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
              CHUNKS: tl.constexpr):
    """Asks for `ahead` bytes from byte `first` on of each weight row of a tile, into the second-level cache."""
    piece = ahead // CHUNKS // 16 * 16
    chunk = tl.arange(0, CHUNKS)[None, :]
    at = weight.to(tl.int64) + feature.to(tl.int64)[:, None] * ROW_BYTES + first + chunk * piece
    tl.inline_asm_elementwise("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
                              [at, tl.zeros((BLOCK_FEATURES, CHUNKS), tl.int32) + piece], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def _squares(squares, row, there, BLOCK_ROWS: tl.constexpr, SUMS: tl.constexpr):
    """[BLOCK_ROWS, a part of SUMS] whose sum is a row's squares."""
    WIDTH: tl.constexpr = min(triton.next_power_of_2(SUMS), _SQUARES // BLOCK_ROWS)
    found = tl.zeros((BLOCK_ROWS, WIDTH), dtype=tl.float32)
    for first in tl.static_range(0, SUMS, WIDTH):
        block = first + tl.arange(0, WIDTH)
        found += tl.load(squares + row[:, None] * SUMS + block[None, :],
                         mask=there[:, None] & (block < SUMS)[None, :], other=0.0, cache_modifier=".cg")
    return found


@triton.jit
def _rstd(square, eps, FEATURES: tl.constexpr):
    return tl.rsqrt(tl.sum(square, 1) / FEATURES + eps)


@triton.jit
def _collected(parts, at, wanted, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """The sum of all parts, in their order."""
    total = tl.load(parts + at, mask=wanted, other=0.0, cache_modifier=".cg")
    for one in tl.static_range(1, SPLITS):
        total += tl.load(parts + one * SIZE + at, mask=wanted, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _product(total, feature, present, rstd, scales, bias, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What the sums of `feature` stand for."""
    total *= rstd[:, None]
    if SCALED:
        total *= tl.load(scales + feature, mask=present, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + feature, mask=present, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _halves(total, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, 2 * WIDTH] in two."""
    return tl.split(tl.permute(tl.reshape(total, (ROWS, 2, WIDTH)), (0, 2, 1)))


@triton.jit
def _end_head(low, high, head, row, there, position, slot, rstd, scales, bias, out, cos, sin, keys, values, q_norm,
              k_norm, eps, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
              QK_NORM: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """A head of queries, keys or values from its halves [BLOCK_ROWS, WIDTH]; in float32, rounded once at the end."""
    HALF: tl.constexpr = HEAD_DIM // 2
    column = tl.arange(0, WIDTH)
    inside = column < HALF
    wanted = there[:, None] & inside[None, :]
    feature = head * HEAD_DIM + column
    low = _product(low, feature, inside, rstd, scales, bias, SCALED, HAS_BIAS)
    high = _product(high, feature + HALF, inside, rstd, scales, bias, SCALED, HAS_BIAS)
    written = (slot >= 0)[:, None] & inside[None, :]
    if head < HEADS + KV_HEADS:
        c = tl.load(cos + position[:, None] * HALF + column[None, :], mask=wanted, other=0.0)
        s = tl.load(sin + position[:, None] * HALF + column[None, :], mask=wanted, other=0.0)
        if QK_NORM:
            is_query = tl.zeros((WIDTH,), dtype=tl.int32) + head < HEADS
            query_low = tl.load(q_norm + column, mask=inside & is_query, other=0.0).to(tl.float32)
            query_high = tl.load(q_norm + HALF + column, mask=inside & is_query, other=0.0).to(tl.float32)
            key_low = tl.load(k_norm + column, mask=inside & (is_query == 0), other=0.0).to(tl.float32)
            key_high = tl.load(k_norm + HALF + column, mask=inside & (is_query == 0), other=0.0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(low * low + high * high, 1) / HEAD_DIM + eps)[:, None]
            low = low * factor * (query_low + key_low)[None, :]  # one of the two is zero
            high = high * factor * (query_high + key_high)[None, :]
        out_low = low * c - high * s
        out_high = high * c + low * s
        if head < HEADS:
            q_at = ((row.to(tl.int64) * HEADS + head) * HEAD_DIM)[:, None] + column[None, :]
            tl.store(out + q_at, out_low.to(out.dtype.element_ty), mask=wanted)
            tl.store(out + q_at + HALF, out_high.to(out.dtype.element_ty), mask=wanted)
        else:
            k_at = ((slot * KV_HEADS + head - HEADS) * HEAD_DIM)[:, None] + column[None, :]
            tl.store(keys + k_at, out_low.to(keys.dtype.element_ty), mask=written)
            tl.store(keys + k_at + HALF, out_high.to(keys.dtype.element_ty), mask=written)
    else:
        v_at = ((slot * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM)[:, None] + column[None, :]
        tl.store(values + v_at, low.to(values.dtype.element_ty), mask=written)
        tl.store(values + v_at + HALF, high.to(values.dtype.element_ty), mask=written)


@triton.jit
def _end_tile(total, parts, local, tile, feature, present, row, there, square, eps, scales, bias, out, squares,
              residual, gain, scaled, OUT_FEATURES: tl.constexpr, IN_FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
              BLOCK_FEATURES: tl.constexpr, SPLITS: tl.constexpr, END: tl.constexpr, SCALED: tl.constexpr,
              NORM: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What becomes of the sums of a tile: `total`, or with splits all parts at `parts`."""
    at = row.to(tl.int64)[:, None] * OUT_FEATURES + feature[None, :]
    wanted = there[:, None] & present[None, :]
    if END == "residual":
        before = tl.load(residual + at, mask=wanted, other=0.0).to(tl.float32)  # on their way beside the parts
        weight = tl.load(gain + feature, mask=present, other=0.0).to(tl.float32)
    if SPLITS > 1:
        total = _collected(parts, local, there[:, None], SPLITS, BLOCK_ROWS * BLOCK_FEATURES)
    rstd = _rstd(square, eps, IN_FEATURES) if NORM else tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    total = _product(total, feature, present, rstd, scales, bias, SCALED, HAS_BIAS)
    if END == "swiglu":
        HALF: tl.constexpr = BLOCK_FEATURES // 2
        gate, up = _halves(total, BLOCK_ROWS, HALF)
        column = tile * HALF + tl.arange(0, HALF)
        tl.store(out + row.to(tl.int64)[:, None] * (OUT_FEATURES // 2) + column[None, :],
                 (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty),
                 mask=there[:, None] & (column < OUT_FEATURES // 2)[None, :])
    elif END == "residual":
        stream = (before + total).to(residual.dtype.element_ty)
        tl.store(residual + at, stream, mask=wanted)
        stream = stream.to(tl.float32)
        tl.store(scaled + at, (stream * weight[None, :]).to(scaled.dtype.element_ty), mask=wanted)
        BLOCKS: tl.constexpr = BLOCK_FEATURES // _SUMMED
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        sums = tl.sum(tl.reshape(stream * stream, (BLOCK_ROWS, BLOCKS, _SUMMED)), 2)
        tl.store(squares + row[:, None] * (OUT_FEATURES // _SUMMED) + block[None, :], sums,
                 mask=there[:, None] & (block < OUT_FEATURES // _SUMMED)[None, :])
    else:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["rows", "ahead"])
def product_kernel(
    x, weight, scales, zeros, bias, out, squares, residual, gain, scaled, positions, slots, cos, sin, keys, values,
    q_norm, k_norm, partial, tickets, rows, ahead, eps,
    OUT_FEATURES: tl.constexpr, IN_FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    BLOCK_INNER: tl.constexpr, SPLITS: tl.constexpr, END: tl.constexpr, HAS_BIAS: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, QK_NORM: tl.constexpr, SWAP: tl.constexpr, SCHEME: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr, CHUNKS: tl.constexpr,
):
    """Grid (blocks of rows, units * tiles of a unit * splits)."""
    NORM: tl.constexpr = END == "qkv" or END == "swiglu" or END == "normed"
    SCALED: tl.constexpr = SCHEME != "none" and GROUP == 0
    HALF: tl.constexpr = BLOCK_FEATURES // 2
    # A head takes one tile, halves side by side, or several; any other unit is a tile.
    HEAD_WIDTH: tl.constexpr = 2 * triton.next_power_of_2(HEAD_DIM // 2) if END == "qkv" else 0
    WHOLE: tl.constexpr = BLOCK_FEATURES == HEAD_WIDTH
    TILES: tl.constexpr = (HEAD_DIM + BLOCK_FEATURES - 1) // BLOCK_FEATURES if END == "qkv" else 1
    UNITS: tl.constexpr = OUT_FEATURES // HEAD_DIM if END == "qkv" else (
        OUT_FEATURES + BLOCK_FEATURES - 1) // BLOCK_FEATURES
    UNIT_WIDTH: tl.constexpr = TILES * BLOCK_FEATURES
    SIZE: tl.constexpr = BLOCK_ROWS * UNIT_WIDTH
    FULL: tl.constexpr = UNIT_WIDTH == HEAD_DIM if END == "qkv" else OUT_FEATURES % BLOCK_FEATURES == 0
    BLOCKS: tl.constexpr = (IN_FEATURES + BLOCK_INNER - 1) // BLOCK_INNER
    work = tl.program_id(1)
    part = work % SPLITS
    unit = work // (SPLITS * TILES)
    index = tl.arange(0, BLOCK_FEATURES)
    if END == "qkv":
        if WHOLE:
            offset = index % HALF + index // HALF * (HEAD_DIM // 2)  # in the head
            present = index % HALF < HEAD_DIM // 2
        else:
            offset = work // SPLITS % TILES * BLOCK_FEATURES + index
            present = offset < HEAD_DIM
        feature = unit * HEAD_DIM + offset
    elif END == "swiglu":
        offset = index
        feature = unit * HALF + index % HALF + index // HALF * (OUT_FEATURES // 2)  # half of them gate, half of them up
        present = unit * HALF + index % HALF < OUT_FEATURES // 2
    else:
        offset = index
        feature = unit * BLOCK_FEATURES + index
        present = feature < OUT_FEATURES
    if PDL:
        if ahead > 0:
            BITS: tl.constexpr = 4 if SCHEME == "int4 weight" else weight.dtype.element_ty.primitive_bitwidth
            first = part * BLOCKS // SPLITS * (BLOCK_INNER * BITS // 8)
            _prefetch(weight, tl.minimum(feature, OUT_FEATURES - 1), first, ahead, IN_FEATURES * BITS // 8,
                      BLOCK_FEATURES, CHUNKS)
        gdc_wait()
        gdc_launch_dependents()

    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there = row < rows
    asked = 0.0
    if NORM and SPLITS * TILES == 1:  # on their way beside the weights, and used after the loop
        asked = _squares(squares, row, there, BLOCK_ROWS, IN_FEATURES // _SUMMED)
    if END == "qkv":
        position = tl.load(positions + row, mask=there, other=0).to(tl.int64)
        slot = tl.load(slots + row, mask=there, other=-1).to(tl.int64)
    x_at = x + row.to(tl.int64)[:, None] * IN_FEATURES + tl.arange(0, BLOCK_INNER)[None, :]
    if SWAP:
        total = tl.zeros((BLOCK_FEATURES, BLOCK_ROWS), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)
    for block in range(part * BLOCKS // SPLITS, (part + 1) * BLOCKS // SPLITS):
        start = block * BLOCK_INNER
        w = load_block(weight, scales, zeros, feature, present, start, IN_FEATURES, BLOCK_INNER, FULL, SCHEME, GROUP,
                       x.dtype.element_ty)
        if IN_FEATURES % BLOCK_INNER == 0:
            rows_of_x = tl.load(x_at + start, mask=there[:, None], other=0.0)
        else:
            within = start + tl.arange(0, BLOCK_INNER) < IN_FEATURES
            rows_of_x = tl.load(x_at + start, mask=there[:, None] & within[None, :], other=0.0)
        if _INTERPRETED:  # whose product of bfloat16 takes the bits for integers
            w = w.to(tl.float32)
            rows_of_x = rows_of_x.to(tl.float32)
        if SWAP:
            total = tl.dot(w, tl.trans(rows_of_x), total, input_precision="ieee")
        else:
            total = tl.dot(rows_of_x, tl.trans(w), total, input_precision="ieee")
    if SWAP:
        total = tl.trans(total)

    local = tl.arange(0, BLOCK_ROWS)[:, None] * UNIT_WIDTH + offset[None, :]
    counter = tl.program_id(0) * UNITS + unit
    parts = partial + counter.to(tl.int64) * (SPLITS * SIZE)
    if SPLITS * TILES > 1:
        tl.store(parts + part * SIZE + local, total, mask=there[:, None] & present[None, :])
        tl.debug_barrier()
        last = tl.atomic_add(tickets + counter, 1, sem="acq_rel") == SPLITS * TILES - 1
    else:
        last = True
    if last:
        if SPLITS * TILES > 1:
            tl.debug_barrier()
        if NORM and SPLITS * TILES > 1:
            square = _squares(squares, row, there, BLOCK_ROWS, IN_FEATURES // _SUMMED)
        else:
            square = asked
        if END == "qkv":
            WIDTH: tl.constexpr = HEAD_WIDTH // 2
            if SPLITS * TILES > 1:
                column = tl.arange(0, WIDTH)
                at = tl.arange(0, BLOCK_ROWS)[:, None] * UNIT_WIDTH + column[None, :]
                wanted = there[:, None] & (column < HEAD_DIM // 2)[None, :]
                low = _collected(parts, at, wanted, SPLITS, SIZE)
                high = _collected(parts, at + HEAD_DIM // 2, wanted, SPLITS, SIZE)
            else:
                low, high = _halves(total, BLOCK_ROWS, WIDTH)
            _end_head(low, high, unit, row, there, position, slot, _rstd(square, eps, IN_FEATURES), scales, bias, out,
                      cos, sin, keys, values, q_norm, k_norm, eps, HEADS, KV_HEADS, HEAD_DIM, WIDTH, QK_NORM, SCALED,
                      HAS_BIAS)
        else:
            _end_tile(total, parts, local, unit, feature, present, row, there, square, eps, scales, bias, out, squares,
                      residual, gain, scaled, OUT_FEATURES, IN_FEATURES, BLOCK_ROWS, BLOCK_FEATURES, SPLITS, END,
                      SCALED, NORM, HAS_BIAS)
        if SPLITS * TILES > 1:
            tl.store(tickets + counter, 0)


@triton.jit
def embedding_scaled_kernel(token_ids, table, gain, residual, scaled, squares, vocab, HIDDEN: tl.constexpr,
                            BLOCK: tl.constexpr):
    """Grid (rows, blocks of a row); a token outside the vocabulary gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    token = tl.load(token_ids + row)
    # A width, not `inside & known`: the interpreter takes a scalar with a block of booleans for an int32.
    known = tl.where((token >= 0) & (token < vocab), HIDDEN, 0)
    stream = tl.load(table + token.to(tl.int64) * HIDDEN + column, mask=column < known, other=float("nan"))
    stream = stream.to(residual.dtype.element_ty)
    tl.store(residual + row * HIDDEN + column, stream, mask=inside)
    stream = stream.to(tl.float32)
    weight = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled + row * HIDDEN + column, (stream * weight).to(scaled.dtype.element_ty), mask=inside)
    block = tl.program_id(1) * (BLOCK // _SUMMED) + tl.arange(0, BLOCK // _SUMMED)
    tl.store(squares + row * (HIDDEN // _SUMMED) + block,
             tl.sum(tl.reshape(stream * stream, (BLOCK // _SUMMED, _SUMMED)), 1), mask=block < HIDDEN // _SUMMED)


def qkv_rope(
    stream: Stream, weight: Weight, eps: float, batch: Batch, cos: Tensor, sin: Tensor, kv: LayerKV, q_out: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, space: SplitSpace,
) -> None:
    """As `stars.kernels.qkv_rope`; both norms or none."""
    if (q_norm is None) != (k_norm is None):
        raise ValueError("qkv_rope on a GPU takes norms of queries and keys together")
    keys, values = (kv.k_slabs, kv.v_slabs) if batch.into_slab else (kv.k_pages, kv.v_pages)
    heads, head_dim = q_out.shape[1:]
    kv_heads = keys.shape[1]
    if weight.out_features != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(f"qkv_rope: the weight has {weight.out_features} rows, expected {heads} + 2 * {kv_heads} "
                         f"heads of {head_dim}")
    turn = _Turn(batch.positions, batch.slots, cos, sin, keys, values, cos if q_norm is None else q_norm,
                 cos if k_norm is None else k_norm)
    _check("qkv_rope", q_out=q_out, **turn._asdict())
    launch("qkv", stream.scaled, weight, q_out, stream, space, eps=eps, turn=turn, heads=heads, kv_heads=kv_heads,
           head_dim=head_dim, qk_norm=q_norm is not None)


def linear_residual(x: Tensor, weight: Weight, gain: Tensor, stream: Stream, space: SplitSpace) -> None:
    """As `stars.kernels.linear_residual`."""
    _check("linear_residual", gain=gain)
    if gain.shape != (weight.out_features,) or stream.residual.shape != (x.shape[0], weight.out_features):
        raise ValueError(f"linear_residual: gain is {list(gain.shape)} and the residual {list(stream.residual.shape)}, "
                         f"expected [{weight.out_features}] and [{x.shape[0]}, {weight.out_features}]")
    launch("residual", x, weight, None, stream, space, gain=gain)


def linear_swiglu(stream: Stream, weight: Weight, eps: float, out: Tensor, space: SplitSpace) -> None:
    """As `stars.kernels.linear_swiglu`."""
    _check_out("linear_swiglu", out, stream.scaled.shape[0], weight.out_features // 2)
    launch("swiglu", stream.scaled, weight, out, stream, space, eps=eps)


def linear_normed(stream: Stream, weight: Weight, eps: float, out: Tensor, space: SplitSpace) -> None:
    """As `stars.kernels.linear_normed`."""
    _check_out("linear_normed", out, stream.scaled.shape[0], weight.out_features)
    launch("normed", stream.scaled, weight, out, stream, space, eps=eps)


def embedding_scaled(token_ids: Tensor, weight: Weight, gain: Tensor, stream: Stream) -> None:
    """As `stars.kernels.embedding_scaled`; a token outside the vocabulary becomes NaN."""
    table = weight.dense()
    rows, hidden = stream.residual.shape
    _check("embedding_scaled", token_ids=token_ids, table=table, gain=gain, **stream._asdict())
    if table.shape[1] != hidden or hidden % SUMMED or token_ids.shape != (rows,) or gain.shape != (hidden,):
        raise ValueError(f"embedding_scaled: the table is {list(table.shape)}, token_ids {list(token_ids.shape)}, gain "
                         f"{list(gain.shape)}: expected rows of {hidden}, a multiple of {SUMMED}, and [{rows}]")
    if rows:
        embedding_scaled_kernel[(rows, triton.cdiv(hidden, EMBEDDED))](
            token_ids, table, gain, *stream, table.shape[0], HIDDEN=hidden, BLOCK=EMBEDDED, num_warps=4)


def plain(x: Tensor, weight: Weight, out: Tensor) -> None:
    """As `stars.kernels.linear`, whatever the weight's scheme; contiguous tensors."""
    _check_out("linear", out, x.shape[0], weight.out_features)
    launch("plain", x, weight, out, None, None)


class _Turn(NamedTuple):
    """What the end of `qkv` reads and writes besides."""

    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor
    q_norm: Tensor
    k_norm: Tensor


def launch(
    end: str, x: Tensor, weight: Weight, out: Tensor | None, stream: Stream | None, space: SplitSpace | None, *,
    eps: float = 0.0, gain: Tensor | None = None, turn: _Turn | None = None, heads: int = 0, kv_heads: int = 0,
    head_dim: int = 0, qk_norm: bool = False,
) -> None:
    """One product in the tile that is in force for it (`tuned.tile`).

    Raises ValueError for tensors that are not contiguous or do not fit together, and for a SplitSpace smaller than
    `tuned.needed`.
    """
    rows, in_features = x.shape
    scheme, out_features = weight.scheme, weight.out_features
    matrix, quant = weight.values, weight.quant
    _check(f"a product with end {end}", x=x, weight=matrix, **({} if stream is None else stream._asdict()))
    if in_features != weight.in_features:
        raise ValueError(f"a product with end {end}: rows of {in_features} beside a weight of {weight.in_features}")
    if quant is None and x.dtype != matrix.dtype:
        raise ValueError(f"a product with end {end}: x is {x.dtype} and the weight {matrix.dtype}")
    if stream is not None and (rows, stream.residual.shape[1]) != (
            stream.squares.shape[0], SUMMED * stream.squares.shape[1]):
        raise ValueError(f"a product with end {end}: squares are {list(stream.squares.shape)} beside a residual of "
                         f"{list(stream.residual.shape)}, expected one for {SUMMED} features")
    if rows == 0:
        return
    tile = tuned.tile(end, scheme, tuned.FIXED_ROWS if weight.deterministic else rows, out_features, in_features)
    if end == "qkv":
        tile = tuned.of_heads(tile, head_dim)
    floats, tickets = tuned.needed(end, tile, rows, out_features, head_dim)
    if floats and (space is None or space.partial.numel() < floats or space.tickets.numel() < tickets):
        raise ValueError(f"a product with end {end}: {rows} rows of {out_features} features in {tile.splits} splits "
                         f"meet in {floats} numbers and {tickets} tickets: reserve what `tuned.room` says")
    units, tiles, _ = tuned.units_of(end, tile, out_features, head_dim)
    pdl = tile.pdl and matrix.is_cuda and torch.cuda.get_device_capability(matrix.device) >= (9, 0)
    values = matrix.view(torch.uint8) if scheme == "fp8" else matrix  # not every card has the type, all have bytes
    kind, scales, zeros = ("none", matrix, None) if quant is None else (quant.scheme, quant.scales, quant.zeros)
    # x and the matrix stand in for what an end does not read.
    product_kernel[(triton.cdiv(rows, tile.rows), units * tiles * tile.splits)](
        x, values, scales, zeros, matrix if weight.bias is None else weight.bias, x if out is None else out,
        *((x, x) if stream is None else (stream.squares, stream.residual)), x if gain is None else gain,
        x if stream is None else stream.scaled, *((x,) * 8 if turn is None else turn),
        *((x, x) if space is None else space), rows,
        _ahead(tile, in_features, matrix.element_size() * matrix.shape[1]) if pdl else 0, eps,
        OUT_FEATURES=out_features, IN_FEATURES=in_features, BLOCK_ROWS=tile.rows, BLOCK_FEATURES=tile.features,
        BLOCK_INNER=tile.inner, SPLITS=tile.splits, END=end, HAS_BIAS=weight.bias is not None, HEADS=heads,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, QK_NORM=qk_norm, SWAP=tile.swap,
        SCHEME=dequant.kernel_scheme(kind), GROUP=0 if quant is None else quant.group, PDL=pdl, CHUNKS=_chunks(tile),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=_registers(kind, x.dtype == torch.float32, tile),
        **({"launch_pdl": True} if pdl else {}))


def _chunks(tile: Tile) -> int:
    """Pieces of a weight row that are asked for one by one: a thread has one."""
    return max(1, 32 * tile.warps // tile.features)


def _registers(scheme: str, wide: bool, tile: Tile) -> int | None:
    """Most registers of a thread; None leaves it to the assembler. wide: activations are float32.

    In tiles of few rows of int4 it settled for 128 and spilled two numbers (sm_100, Triton 3.7); told 255 it takes 134.
    Large tiles, told so, spill on sm_90, and those of float32 on sm_80.
    """
    return 255 if scheme == "int4" and tile.warps <= 2 and not wide else None


def _ahead(tile: Tile, in_features: int, row_bytes: int) -> int:
    """Bytes of a weight row that are asked for ahead: no more than the smallest part of a row has."""
    blocks = triton.cdiv(in_features, tile.inner)
    least = (blocks // tile.splits * tile.inner - (blocks * tile.inner - in_features)) * row_bytes // in_features
    ahead = min(tile.prefetch, least)
    return 0 if row_bytes % 16 or ahead < 16 * _chunks(tile) else ahead


def _check(name: str, **tensors: Tensor) -> None:
    wrong = [key for key, tensor in tensors.items() if not tensor.is_contiguous()]
    if wrong:
        raise ValueError(f"{name} on a GPU takes contiguous tensors: {', '.join(wrong)}")


def _check_out(name: str, out: Tensor, rows: int, features: int) -> None:
    _check(name, out=out)
    if out.shape != (rows, features):
        raise ValueError(f"{name}: out is {list(out.shape)}, expected [{rows}, {features}]")


def _variant(name: str, end: str, kind: str, rows: int, out_features: int, in_features: int, *, bias: bool = False,
             heads: int = 0, kv_heads: int = 0, head_dim: int = 0, qk_norm: bool = False, tile: Tile | None = None,
             arches: tuple[int, ...] = ARCHES, scheme: str = "none", group: int = 0, zeros: bool = False,
             scale: str = "") -> Variant:
    """One product in the tile that is its default on the smallest of `ARCHES`, or in a given one.

    kind: of the activations, and of the weight where there is no scheme. scale: of groups, where not as `pack` has it.
    """
    scale = scale or ("fp16" if group == 32 else "fp32")
    stored = kind if scheme == "none" else f"{scheme}-{group}" if group else scheme
    chosen = tuned.default(end, stored, rows, out_features, in_features, tuned.SHARED[80]) if tile is None else tile
    if end == "qkv":
        chosen = tuned.of_heads(chosen, head_dim)
    constexprs = dict(
        OUT_FEATURES=out_features, IN_FEATURES=in_features, BLOCK_ROWS=chosen.rows, BLOCK_FEATURES=chosen.features,
        BLOCK_INNER=chosen.inner, SPLITS=chosen.splits, END=end, HAS_BIAS=bias, HEADS=heads, KV_HEADS=kv_heads,
        HEAD_DIM=head_dim, QK_NORM=qk_norm, SWAP=chosen.swap, SCHEME=dequant.kernel_scheme(scheme), GROUP=group,
        PDL=chosen.pdl, CHUNKS=_chunks(chosen), **({} if zeros else {"zeros": None}))
    kinds = dict.fromkeys(constexprs, "constexpr") | {"rows": "i32", "ahead": "i32", "eps": "fp32"}
    if scheme != "none":
        kinds |= {"weight": "*i8" if scheme == "int8" else "*u8", "scales": f"*{scale}"}
    if end != "plain":
        kinds |= {"squares": "*fp32", "partial": "*fp32", "tickets": "*i32"}
    if end == "qkv":
        kinds |= {"positions": "*i32", "slots": "*i32", **dict.fromkeys(("cos", "sin", "q_norm", "k_norm"), "*fp32")}
    if end == "normed":
        kinds["out"] = "*fp32"
    if end == "residual":
        kinds["gain"] = "*fp32"
    signature = {name: kinds.get(name, f"*{scale if name == 'zeros' else kind}") for name in product_kernel.arg_names}
    stored = "" if scheme == "none" else f" {stored}"
    return Variant(f"skinny {end} {kind}{stored} {name}", product_kernel, signature, constexprs, chosen.warps,
                   chosen.stages, arches, max_registers=_registers(scheme, kind == "fp32", chosen))


def variants() -> list[Variant]:
    """The products of an 8B model in every default tile, dependent launches, and the shapes of other families."""
    found = []
    llama: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
        ("qkv", 6144, 4096, dict(heads=32, kv_heads=8, head_dim=128)), ("residual", 4096, 4096, {}),
        ("swiglu", 28672, 4096, {}), ("residual", 4096, 14336, {}), ("normed", 128256, 4096, {}),
        ("plain", 6144, 4096, {}))
    for kind, counts in (("bf16", (1, 32, 64, 128)), ("fp16", (1, 128)), ("fp32", (1,))):
        found += [_variant(f"{out_features} {in_features}, {rows} rows", end, kind, rows, out_features, in_features,
                           **more) for rows in counts for end, out_features, in_features, more in llama]
    for end, out_features, in_features, more in llama[:-1]:
        chosen = tuned.default(end, "bf16", 1, out_features, in_features, tuned.SHARED[90])
        found.append(_variant(f"{out_features} {in_features}, dependent", end, "bf16", 1, out_features, in_features,
                              tile=chosen._replace(pdl=True, prefetch=512), arches=(90, 100), **more))
    for head_dim, hidden in ((64, 896), (80, 2560), (96, 3072), (128, 5120), (256, 3072)):
        for rows in (1, 128):
            found.append(_variant(f"heads of {head_dim}, {rows} rows", "qkv", "bf16", rows, 16 * head_dim, hidden,
                                  bias=True, heads=8, kv_heads=4, head_dim=head_dim, qk_norm=head_dim > 64))
        whole = Tile(16, tuned.head_width(head_dim), 64, 4, 4)
        found.append(_variant(f"heads of {head_dim} in one tile", "qkv", "bf16", 1, 16 * head_dim, hidden, heads=8,
                              kv_heads=4, head_dim=head_dim, qk_norm=True, tile=whole))
    for end, out_features, in_features in (("residual", 896, 4864), ("residual", 1600, 1000), ("swiglu", 9728, 896),
                                           ("normed", 32001, 896), ("plain", 1000, 1000)):
        found += [_variant(f"{out_features} {in_features} bias, {rows} rows", end, "bf16", rows, out_features,
                           in_features, bias=True) for rows in (1, 64)]
    for scheme, group in (("fp8", 0), ("int8", 0), ("int4", 32), ("int4", 128)):
        stored: dict[str, Any] = dict(scheme=scheme, group=group)
        for end, out_features, in_features, more in llama:
            name = f"{out_features} {in_features}"
            found.append(_variant(f"{name}, 1 rows", end, "bf16", 1, out_features, in_features, **more, **stored))
            large = tuned.default(end, "fp8", 128, out_features, in_features, tuned.SHARED[90])
            found += [_variant(f"{name}, {words}", end, "bf16", 128, out_features, in_features, arches=arches,
                               tile=tile, **more, **stored)
                      for words, arches, tile in (("128 rows", (80,), None), ("large tile", (90, 100), large))]
        found += [_variant(f"28672 4096, {rows} rows", "swiglu", "bf16", rows, 28672, 4096, **stored)
                  for rows in (32, 64)]
        found += [_variant("896 4864 bias", "residual", "fp16", 128, 896, 4864, bias=True, arches=(80,), **stored),
                  _variant("9728 896 bias", "swiglu", "fp16", 1, 9728, 896, bias=True, **stored),
                  _variant("1000 1152", "plain", "fp32", 1, 1000, 1152, **stored)]
    for group in (32, 128):
        found += [_variant(f"1000 1152 zeros, {rows} rows", "plain", kind, rows, 1000, 1152, scheme="int4", group=group,
                           zeros=True) for rows in (1, 64) for kind in ("bf16", "fp16")]
    found += [_variant(f"1000 1152 wide scales, {rows} rows", "plain", "bf16", rows, 1000, 1152, scheme="int4",
                       group=32, zeros=True, scale="fp32") for rows in (1, 64)]
    for kind in ("bf16", "fp16", "fp32"):
        found.append(Variant(
            f"embedding_scaled {kind}", embedding_scaled_kernel,
            {"token_ids": "*i32", "table": f"*{kind}", "gain": "*fp32", "residual": f"*{kind}", "scaled": f"*{kind}",
             "squares": "*fp32", "vocab": "i32", "HIDDEN": "constexpr", "BLOCK": "constexpr"},
            {"HIDDEN": 4096, "BLOCK": EMBEDDED}, 4, 1))
    return found
