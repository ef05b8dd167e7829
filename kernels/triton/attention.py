"""Attention over pages and slabs on a GPU: a list of work on the device, walked by a fixed number of programs.

A row's keys are in two places, and softmax over their union is put together from softmaxes over the parts. For a part
with scores s_j (in units of log2) and values v_j, let L = log2(sum_j 2^s_j) and o = sum_j 2^(s_j - L) v_j. Then over
parts

    out = sum_p 2^(L_p - M) o_p / sum_p 2^(L_p - M),    M = max_p L_p.

- The prefix pass packs the rows of all lanes of a request, times the query heads of a KV head, into one matrix per
  tile (`stars.kernels.triton.tiles`). So a page is read once per request and not once per lane, and products run on
  tensor cores though each lane has one row. (Cascade attention: Juravsky et al., "Hydragen", arXiv 2402.05099; Ye
  et al., "FlashInfer", arXiv 2501.01005.) Its keys are divided among programs (Dao et al., "Flash-Decoding", 2023).
- Slabs, the drafted keys, are items of their own, causal: of one sequence, or of some lanes that draft side by side.
- Inside a part the softmax is online (Dao et al., arXiv 2205.14135; Milakov and Gimelshein, arXiv 1805.02867).

Without a slab (prefill) the same code runs over the pages, causal. Where a tile has one part, its program writes the
output itself. Else, of low tiles, the last program of a tile and KV head to end merges the parts (there are few
vectors, and a launch more would take longer); of wide tiles, a second launch does, on all processors. Sums are in
float32; scores are scaled by log2(e), since the hardware's exponential is 2^x.

Everything that varies between replays of a captured graph (lengths, tables, the list, window starts) is read on the
device. What is fixed at capture: rows, the widths of tiles, and the number of programs.

**The same bits in any company.** Keys are taken in blocks counted from position 0, and parts are merged in order. A
block that a row does not see changes nothing in it: its weights are 2^-inf = 0, its rescaling 2^0 = 1. So with
split_keys > 0 the bits of a row depend on its own keys and on the settings of the launch, not on other rows.

**Head sizes.** A tile's columns are the next power of two: 80 and 96 are computed as 128 with zeros. That costs 1.6 and
1.33 times the tensor core work and shared memory, and no memory traffic: the padding is masked, not read.

**Costs** of a layer: the keys and values of the pages that a group sees, once; of the slab, once a sequence; q and out.
Parts go through the second-level cache: rows * heads * (head_dim + 1) float32 numbers each, written and read.
Operations: 4 * rows * heads * head_dim * keys.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.limits import MAX_HEADS_A_KEY
from stars.kernels.triton.functions import tanh
from stars.kernels.triton.tiles import FIELDS, NARROW, Kind, build, lanes
from stars.kernels.triton.variant import ARCHES, Variant
from stars.kernels.types import Batch, LayerKV

LOG2_E = math.log2(math.e)

ITEM = tl.constexpr(FIELDS)


class Settings(NamedTuple):
    """How a launch is compiled."""

    block_keys: int
    num_warps: int
    num_stages: int  # of the loops over keys: one less is the number of blocks that have a buffer
    by_warps: bool  # whether each warp takes keys of its own, where a tile is as low as one product
    at_once: int  # numbers that a thread loads at once when it merges
    max_registers: int | None = None  # of a thread; None leaves it to the assembler


def settings(head_dim: int, dtype: torch.dtype, width: int, lanes: int, capability: int = 90) -> Settings:
    """For tiles of at most `width` query vectors, slabs of `lanes` an item. The limits: 255 registers a thread, and
    shared memory of 163 KB on sm_80, 227 KB on sm_90 and sm_100; keys and values of a block take block_keys * columns *
    2 numbers.

    float32 is computed without tensor cores (they would round to 10 bits), from operands in registers: blocks are small
    and nothing is prefetched, since this type is for tests and comparisons. The assembler is to use all registers of
    two programs of 8 warps a processor: left to itself it settled for 64 or 72, and spilled two. So with the
    other types, of one program of 8 warps or two of 4.
    """
    columns = triton.next_power_of_2(head_dim)
    if dtype == torch.float32:
        return Settings(32, 8 if columns > 64 else 4, 1, False, 32, 128)
    if capability >= 120:  # GeForce: the tensor cores of sm_80, and 99 KB of shared memory
        capability = 80
    # The sums take width * columns / (32 * num_warps) registers a thread, at most 64. sm_100 needs them in passing from
    # tensor memory, and masked columns (80, 96) then take the last ones.
    num_warps = 8 if width * columns >= (64 if capability >= 100 else 128) * 128 else 4
    # Else the sums of a warp, [16, columns], leave no registers; nor do they on sm_100 beside what one sequence needs.
    by_warps = columns <= 128 and (lanes > 1 or capability < 100)
    # Of the widest, blocks of 64 take all shared memory and the last registers; sm_80 holds a block in registers.
    small = columns > 128 or capability < 90 and width * columns > 64 * 128
    # On sm_100 the assembler, told so, spilled one number of wide tiles; left to itself it takes 185 and none.
    registers = None if capability >= 100 and width > NARROW else 255
    return Settings(32 if small else 64, num_warps, 3, by_warps, 64, registers)


@triton.jit
def _pages(table, key, end, PAGE_SIZE: tl.constexpr):
    """The page of each key before `end`: loaded a block ahead, so that the addresses of keys wait for nothing."""
    return tl.load(table + key // PAGE_SIZE, mask=key < end, other=0)


@triton.jit
def _rows(page, key, slab, in_slab, PAGE_SIZE: tl.constexpr, PAGES: tl.constexpr, SLABS: tl.constexpr):
    """The flat row of each key, in 64 bits: in its page, or behind row `slab` where it is `in_slab`."""
    if not PAGES:
        return (slab + key).to(tl.int64)
    row = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
    if SLABS:
        row = tl.where(in_slab, (slab + key).to(tl.int64), row)
    return row


@triton.jit
def _attend(
    q, keys, values, table, slab, in_slab, begin, end, first, beyond, kv_head, scale, softcap_scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_KEYS: tl.constexpr, PAGES: tl.constexpr, SLABS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
):
    """Softmax of the rows of q [PACKED, WIDTH] over keys `begin` .. `end` - 1: (output, log2 of the sum of weights).

    A row sees the keys from `first` (with WINDOW) to before `beyond`, both [PACKED]. Keys are in the pages of `table`,
    a row of the block table, or with `in_slab` from row `slab` on; PAGES and SLABS say which of the two may be.
    """
    column = tl.arange(0, WIDTH)
    paged_end = tl.where(in_slab, 0, end) if SLABS else end
    sums = tl.zeros([PACKED, WIDTH], tl.float32)
    top = tl.full([PACKED], float("-inf"), tl.float32)
    total = tl.zeros([PACKED], tl.float32)
    page = 0
    if PAGES:
        page = _pages(table, begin + tl.arange(0, BLOCK_KEYS), paged_end, PAGE_SIZE)
    for block in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        key = block + tl.arange(0, BLOCK_KEYS)
        # Rows beyond the end are not read: they may hold anything, and 0 times NaN is NaN.
        read = (key < end)[:, None] & (column < HEAD_DIM)[None, :]
        row = _rows(page, key, slab, in_slab, PAGE_SIZE, PAGES, SLABS)
        if PAGES:
            page = _pages(table, key + BLOCK_KEYS, paged_end, PAGE_SIZE)
        at = ((row * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + column[None, :]
        k = tl.load(keys + at, mask=read, other=0.0)
        v = tl.load(values + at, mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores = tanh(scores) * softcap_scale
        seen = key[None, :] < beyond[:, None]
        if WINDOW:
            seen = seen & (key[None, :] >= first[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far: -inf - -inf would be NaN
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        top = higher
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    return sums / total[:, None], tl.where(nothing, float("-inf"), top + tl.log2(total))


@triton.jit
def _over_warps(x, WARPS: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr):
    """x [4 or 8, PACKED, WIDTH] summed over its first dimension, in one order.

    By halves, each of which moves half of the numbers between warps in long words; tl.sum takes five times as many
    instructions for it.
    """
    if WARPS == 8:
        low, high = tl.split(tl.permute(tl.reshape(x, [2, 4, PACKED, WIDTH]), 1, 2, 3, 0))
        x = low + high
    low, high = tl.split(tl.permute(tl.reshape(x, [2, 2, PACKED, WIDTH]), 2, 3, 1, 0))
    first, second = tl.split(low + high)
    return first + second


@triton.jit
def _attend_by_warps(
    q, keys, values, table, slab, in_slab, begin, end, first, beyond, kv_head, scale, softcap_scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_KEYS: tl.constexpr, PAGES: tl.constexpr, SLABS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
):
    """`_attend` for a tile as low as one product of the tensor cores: each warp takes 16 keys of its own of every
    block.

    Products are batches of WARPS, each a warp's (compilers lay the first dimension out along warps), and so are the
    running softmaxes: within the loop no warp waits for another but for the keys' arrival. They are merged at its end.
    """
    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    column = tl.arange(0, WIDTH)
    paged_end = tl.where(in_slab, 0, end) if SLABS else end
    # A warp's 16 keys are on one page: blocks begin at multiples of 16, and pages have as many keys or more.
    start = tl.arange(0, WARPS) * 16
    offset = start[:, None] + tl.arange(0, 16)[None, :]
    inside = (tl.arange(0, 16) * STRIDE)[None, :, None] + column[None, None, :]
    queries = tl.broadcast_to(q[None, :, :], [WARPS, PACKED, WIDTH])
    sums = tl.zeros([WARPS, PACKED, WIDTH], tl.float32)
    top = tl.full([WARPS, PACKED], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, PACKED], tl.float32)
    page = 0
    if PAGES:
        page = _pages(table, begin + start, paged_end, PAGE_SIZE)
    for block in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        key = block + offset
        read = (key < end)[:, :, None] & (column < HEAD_DIM)[None, None, :]
        row = _rows(page, block + start, slab, in_slab, PAGE_SIZE, PAGES, SLABS)
        if PAGES:
            page = _pages(table, block + BLOCK_KEYS + start, paged_end, PAGE_SIZE)
        at = (row * STRIDE + kv_head * HEAD_DIM)[:, None, None]
        k = tl.load(keys + at + inside, mask=read, other=0.0)
        v = tl.load(values + at + inside, mask=read, other=0.0)
        scores = tl.dot(queries, tl.trans(k, 0, 2, 1)) * scale
        if SOFTCAP:
            scores = tanh(scores) * softcap_scale
        seen = key[:, None, :] < beyond[None, :, None]
        if WINDOW:
            seen = seen & (key[:, None, :] >= first[None, :, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 2))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, :, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 2)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, :, None])
        top = higher
    highest = tl.max(top, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp2(top - base[None, :])
    total = tl.sum(total * share, 0)
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    output = _over_warps(sums * (share / total[None, :])[:, :, None], WARPS, PACKED, WIDTH)
    return output, tl.where(nothing, float("-inf"), highest + tl.log2(total))


@triton.jit
def _merged(
    partial, sizes, first, step, parts, most,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, AT_ONCE: tl.constexpr,
):
    """[VECTORS, WIDTH]: vectors put together from their parts, in order; empty parts at any place do not change a bit.

    partial [n, HEAD_DIM] and sizes [n] hold the parts; those of a vector are `first`, `first` + `step` and so on,
    `parts` of them, all three [VECTORS]; most: the largest of `parts`. AT_ONCE parts are loaded together.
    """
    column = tl.arange(0, WIDTH)
    top = tl.full([VECTORS], float("-inf"), tl.float32)
    total = tl.zeros([VECTORS], tl.float32)
    sums = tl.zeros([VECTORS, WIDTH], tl.float32)
    for begin in range(0, most, AT_ONCE):
        part = begin + tl.arange(0, AT_ONCE)[:, None]
        there = part < parts[None, :]
        at = first[None, :] + part * step[None, :]
        # Past the first-level cache, which may hold what was there before other processors wrote.
        size = tl.load(sizes + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        value = tl.load(partial + at[:, :, None] * HEAD_DIM + column[None, None, :],
                        mask=there[:, :, None] & (column < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(size, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(size - base[None, :])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 0)
        sums = sums * shrink[:, None] + tl.sum(value * weight[:, :, None], 0)
        top = higher
    return sums / total[:, None]


@triton.jit
def _leave(
    output, size, vector, live, out, partial, sizes, item, first_row, split, parts, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, INTO_SLAB: tl.constexpr,
):
    """Leaves an item's result in `out` where it is the only part of its tile, else among the parts. With a slab there
    are two at least.

    output [..., WIDTH] of vectors size [...], which are those of `live`, `vector` heads after the item's first.
    """
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    column = tl.arange(0, WIDTH)
    if len(vector.shape) == 2:
        at = (vector * HEAD_DIM)[:, :, None] + column[None, None, :]
        used = live[:, :, None] & (column < HEAD_DIM)[None, None, :]
    else:
        at = (vector * HEAD_DIM)[:, None] + column[None, :]
        used = live[:, None] & (column < HEAD_DIM)[None, :]
    direct = False if INTO_SLAB else parts == 1
    if direct:
        base = first_row.to(tl.int64) * HEADS + kv_head * PER_KV
        tl.store(out + base * HEAD_DIM + at, output.to(out.dtype.element_ty), mask=used)
    else:
        # Not carried through the loop over keys, which needs the registers.
        place = tl.load(item + 7) + split * tl.load(item + 9) + first_row - tl.load(item + 8)
        part = place.to(tl.int64) * HEADS + kv_head * PER_KV
        tl.store(partial + part * HEAD_DIM + at, output, mask=used)
        tl.store(sizes + part + vector, size, mask=live)


@triton.jit
def _merge_if_last(
    out, partial, sizes, tickets, item, parts, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):
    """Counts an item whose part was left; the last one of its tile and KV head merges all parts."""
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    VECTORS: tl.constexpr = triton.next_power_of_2(PER_KV)
    place = tl.load(item + 7)
    tile_row = tl.load(item + 8)
    tile_rows = tl.load(item + 9)
    arrivals = tl.load(item + 10)
    ticket = tickets + tile_row * KV_HEADS + kv_head
    tl.debug_barrier()  # every thread's numbers are written before the one thread that counts says so
    if tl.atomic_add(ticket, 1, sem="acq_rel") == arrivals - 1:
        tl.store(ticket, 0)
        head = tl.arange(0, VECTORS)
        column = tl.arange(0, WIDTH)
        kept = (head < PER_KV)[:, None] & (column < HEAD_DIM)[None, :]
        count = tl.where(head < PER_KV, parts, 0)
        step = tl.zeros_like(head).to(tl.int64) + tile_rows * HEADS
        for row in range(0, tile_rows):
            first = (place + row).to(tl.int64) * HEADS + kv_head * PER_KV + head
            merged = _merged(partial, sizes, first, step, count, parts, HEAD_DIM, WIDTH, VECTORS, AT_ONCE)
            base = (tile_row + row).to(tl.int64) * HEADS + kv_head * PER_KV
            tl.store(out + (base + head)[:, None] * HEAD_DIM + column[None, :], merged.to(out.dtype.element_ty),
                     mask=kept)


@triton.jit
def _item(
    q, k_pages, v_pages, k_slabs, v_slabs, out, partial, sizes,
    row_start, block_tables, prefix_len, slab_start, slab_used, row_seq, item,
    owner, first_row, count, begin, end, split, splits, kv_head,
    table_stride, split_keys, window, scale, softcap_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_KEYS: tl.constexpr, WARPS: tl.constexpr, PAGES: tl.constexpr, SLABS: tl.constexpr,
    INTO_SLAB: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
):
    """One KV head of an item, which is a range of page keys (with PAGES) or the keys of a slab (with SLABS)."""
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    column = tl.arange(0, WIDTH)
    packed = tl.arange(0, PACKED)
    row = first_row + packed // PER_KV
    live = packed < count * PER_KV
    # In 64 bits where the tile begins, in 32 bits from there, which saves registers.
    base = first_row.to(tl.int64) * HEADS + kv_head * PER_KV
    vector = packed // PER_KV * HEADS + packed % PER_KV
    at = (vector * HEAD_DIM)[:, None] + column[None, :]
    queries = tl.load(q + base * HEAD_DIM + at, mask=live[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    in_slab = split == splits
    seq = tl.load(row_seq + row, mask=live, other=0)
    beyond = tl.load(prefix_len + seq, mask=live, other=0)
    first = beyond
    slab = 0
    if INTO_SLAB:
        if SLABS:
            slab = tl.load(slab_start + owner, mask=in_slab, other=0)
        if SLABS or WINDOW:
            position = row - tl.load(row_start + seq, mask=live, other=0) + tl.load(slab_used + seq, mask=live, other=0)
            first = tl.where(in_slab, position, position + beyond) - window + 1
            beyond = tl.where(in_slab, position + 1, beyond)
    else:
        position = beyond + row - tl.load(row_start + seq, mask=live, other=0)
        first = position - window + 1
        beyond = position + 1
    beyond = tl.where(live, beyond, 0)
    if SLABS or WINDOW:
        high = tl.max(beyond, 0)
        low = 0
        if WINDOW:
            low = tl.maximum(tl.min(tl.where(live, first, 2147483647), 0), 0) // BLOCK_KEYS * BLOCK_KEYS
        if in_slab:
            begin = low
            end = high
        elif WINDOW:  # which moves as the slab fills: what it leaves of the tile's keys is divided here
            if split_keys > 0:
                begin = tl.maximum(begin, low)
            else:
                length = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_KEYS), splits) * BLOCK_KEYS
                begin = low + split * length
                end = tl.minimum(high, begin + length)
    keys = k_pages if PAGES else k_slabs
    values = v_pages if PAGES else v_slabs
    if PAGES and SLABS:
        if in_slab:
            keys = k_slabs
            values = v_slabs
    table = block_tables
    if PAGES:
        table += owner.to(tl.int64) * table_stride
    if WARPS > 0 and PACKED == 16:
        output, size = _attend_by_warps(
            queries, keys, values, table, slab, in_slab, begin, end, first, beyond, kv_head, scale, softcap_scale,
            KV_HEADS, HEAD_DIM, WIDTH, PAGE_SIZE, PACKED, BLOCK_KEYS, PAGES, SLABS, WINDOW, SOFTCAP, STAGES, WARPS)
    else:
        output, size = _attend(
            queries, keys, values, table, slab, in_slab, begin, end, first, beyond, kv_head, scale, softcap_scale,
            KV_HEADS, HEAD_DIM, WIDTH, PAGE_SIZE, PACKED, BLOCK_KEYS, PAGES, SLABS, WINDOW, SOFTCAP, STAGES)
    _leave(output, size, vector, live, out, partial, sizes, item, first_row, split, splits + INTO_SLAB, kv_head, HEADS,
           KV_HEADS, HEAD_DIM, WIDTH, INTO_SLAB)


@triton.jit
def _lanes(
    q, keys, values, out, partial, sizes, slab_start, slab_used, item, first_row, count, splits, kv_head,
    window, scale, softcap_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
):
    """One KV head of the slabs of `count` lanes of a draft, which are as many rows and sequences: each warp takes one.

    Slabs are short, and a program's way to its keys is long: of one lane each, programs would mostly wait.
    """
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    column = tl.arange(0, WIDTH)
    lane = tl.arange(0, WARPS)
    head = tl.arange(0, 16)
    there = lane < count
    live = there[:, None] & (head < PER_KV)[None, :]
    vector = (lane * HEADS)[:, None] + head[None, :]
    base = first_row.to(tl.int64) * HEADS + kv_head * PER_KV
    queries = tl.load(q + base * HEAD_DIM + (vector * HEAD_DIM)[:, :, None] + column[None, None, :],
                      mask=live[:, :, None] & (column < HEAD_DIM)[None, None, :], other=0.0)
    position = tl.load(slab_used + first_row + lane, mask=there, other=-1)
    slab = tl.load(slab_start + first_row + lane, mask=there, other=0).to(tl.int64)
    first = position - window + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(tl.min(tl.where(there, first, 2147483647), 0), 0) // 16 * 16
    inside = (tl.arange(0, 16) * STRIDE)[None, :, None] + column[None, None, :]
    at = (slab * STRIDE + kv_head * HEAD_DIM)[:, None, None] + inside
    sums = tl.zeros([WARPS, 16, WIDTH], tl.float32)
    top = tl.full([WARPS, 16], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, 16], tl.float32)
    for block in tl.range(begin, tl.max(position, 0) + 1, 16, num_stages=STAGES):
        key = block + tl.arange(0, 16)
        seen = key[None, :] <= position[:, None]
        read = seen[:, :, None] & (column < HEAD_DIM)[None, None, :]
        k = tl.load(keys + block * STRIDE + at, mask=read, other=0.0)
        v = tl.load(values + block * STRIDE + at, mask=read, other=0.0)
        scores = tl.dot(queries, tl.trans(k, 0, 2, 1)) * scale
        if SOFTCAP:
            scores = tanh(scores) * softcap_scale
        if WINDOW:
            seen = seen & (key[None, :] >= first[:, None])
        scores = tl.where(seen[:, None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 2))
        base_of = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base_of[:, :, None])
        shrink = tl.exp2(top - base_of)
        total = total * shrink + tl.sum(weights, 2)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, :, None])
        top = higher
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    size = tl.where(nothing, float("-inf"), top + tl.log2(total))
    _leave(sums * (1.0 / total)[:, :, None], size, vector, live, out, partial, sizes, item, first_row, splits,
           splits + 1, kv_head, HEADS, KV_HEADS, HEAD_DIM, WIDTH, True)


@triton.jit
def _fields(item):
    """What a unit of work begins with, loaded at once."""
    return (tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4),
            tl.load(item + 5), tl.load(item + 6))


@triton.jit(do_not_specialize=["table_stride", "split_keys", "window"])
def attention_kernel(
    q, k_pages, v_pages, k_slabs, v_slabs, out, partial, sizes, tickets,
    row_start, block_tables, prefix_len, slab_start, slab_used, row_seq, items,
    table_stride, split_keys, window, scale, softcap_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr, LANES: tl.constexpr, BLOCK_KEYS: tl.constexpr, WARPS: tl.constexpr, INTO_SLAB: tl.constexpr,
    FUSED: tl.constexpr, AT_ONCE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
):
    """One program: units `program_id`, `program_id` + programs and so on of the list.

    A unit is an item and a KV head. An item is a tile of PACKED query vectors and a range of its page keys, or rows of
    a tile and their slab keys, the tile's last part: of one sequence, or where that has one row, of LANES sequences.
    With WARPS, tiles of 16 vectors divide keys among so many warps.

    partial [places, HEADS, HEAD_DIM] and sizes [places, HEADS] (log2 of the sum of weights, -inf where no key was seen)
    are float32: row r of a tile has its part p at place + p * tile_rows + r. tickets [rows, KV_HEADS] are zero before
    and after a launch.
    """
    total = tl.load(items) * KV_HEADS
    first_item = items + ITEM
    owner, first_row, count, begin, end, split, splits = _fields(first_item + tl.program_id(0) // KV_HEADS * ITEM)
    # What only threads' numbers enter is computed anew for each unit: held, it would take fifty registers.
    for unit in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1, disable_licm=True):
        # Neighbours in time work on the KV heads of one key, which lie side by side in memory.
        kv_head = unit % KV_HEADS
        item = first_item + unit // KV_HEADS * ITEM
        if LANES == 0 or (LANES == 1 and PACKED == 16):
            _item(q, k_pages, v_pages, k_slabs, v_slabs, out, partial, sizes, row_start, block_tables, prefix_len,
                  slab_start, slab_used, row_seq, item, owner, first_row, count, begin, end, split, splits, kv_head,
                  table_stride, split_keys, window, scale, softcap_scale, HEADS, KV_HEADS, HEAD_DIM, WIDTH, PAGE_SIZE,
                  PACKED, BLOCK_KEYS, WARPS, True, INTO_SLAB, INTO_SLAB, WINDOW, SOFTCAP, STAGES)
        elif split < splits:
            _item(q, k_pages, v_pages, k_slabs, v_slabs, out, partial, sizes, row_start, block_tables, prefix_len,
                  slab_start, slab_used, row_seq, item, owner, first_row, count, begin, end, split, splits, kv_head,
                  table_stride, split_keys, window, scale, softcap_scale, HEADS, KV_HEADS, HEAD_DIM, WIDTH, PAGE_SIZE,
                  PACKED, BLOCK_KEYS, WARPS, True, False, INTO_SLAB, WINDOW, SOFTCAP, STAGES)
        elif LANES == 1:
            _item(q, k_pages, v_pages, k_slabs, v_slabs, out, partial, sizes, row_start, block_tables, prefix_len,
                  slab_start, slab_used, row_seq, item, owner, first_row, count, begin, end, split, splits, kv_head,
                  table_stride, split_keys, window, scale, softcap_scale, HEADS, KV_HEADS, HEAD_DIM, WIDTH, PAGE_SIZE,
                  16, BLOCK_KEYS, WARPS, False, True, INTO_SLAB, WINDOW, SOFTCAP, STAGES)
        else:
            _lanes(q, k_slabs, v_slabs, out, partial, sizes, slab_start, slab_used, item, first_row, count, splits,
                   kv_head, window, scale, softcap_scale, HEADS, KV_HEADS, HEAD_DIM, WIDTH, WARPS, WINDOW, SOFTCAP,
                   STAGES if FUSED else 2)  # wide tiles leave no registers for more
        if FUSED:
            if splits + INTO_SLAB > 1:
                _merge_if_last(out, partial, sizes, tickets, item, splits + INTO_SLAB, kv_head, HEADS, KV_HEADS,
                               HEAD_DIM, WIDTH, AT_ONCE)
        owner, first_row, count, begin, end, split, splits = _fields(
            first_item + (unit + tl.num_programs(0)) // KV_HEADS * ITEM)


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    partial, sizes, out, row_parts, rows,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, AT_ONCE: tl.constexpr,
):
    """out [rows, HEADS, HEAD_DIM] of the rows that have several parts; row_parts [rows, 3] (place, rows between a row's
    parts, parts) says where they are."""
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    row = vector // HEADS
    column = tl.arange(0, WIDTH)
    place = tl.load(row_parts + row * 3, mask=row < rows, other=0)
    step = tl.load(row_parts + row * 3 + 1, mask=row < rows, other=0)
    parts = tl.load(row_parts + row * 3 + 2, mask=row < rows, other=0)
    most = tl.max(parts, 0)
    if most > 1:
        first = place.to(tl.int64) * HEADS + vector % HEADS
        merged = _merged(partial, sizes, first, step.to(tl.int64) * HEADS, parts, most, HEAD_DIM, WIDTH, VECTORS,
                         AT_ONCE)
        tl.store(out + vector.to(tl.int64)[:, None] * HEAD_DIM + column[None, :], merged.to(out.dtype.element_ty),
                 mask=(parts > 1)[:, None] & (column < HEAD_DIM)[None, :])


MERGED_VECTORS = 4
"""Vectors of a program of the merge."""

MERGED_NUMBERS = 64
"""Numbers that a thread of the merge loads at once; it has 128 threads."""


def attention(
    q: Tensor, kv: LayerKV, batch: Batch, scale: float, out: Tensor,
    window: int | None = None, softcap: float | None = None,
) -> None:
    """Causal grouped-query attention over committed pages and the slab; see `attention_reference`.

    Every row must be in one tile; the output of others is arbitrary. q, out and the cache are contiguous and of one
    type; page_size is a power of two from 16 on.
    """
    rows, heads, head_dim = q.shape
    kv_heads = kv.k_pages.shape[1]
    _check(q, kv, out)
    tiles = batch.tiles or build(batch, heads, kv_heads, head_dim, kv.page_size, q.dtype == torch.float32)
    chosen = settings(head_dim, q.dtype, tiles.width, tiles.lanes, _capability(q.device))
    if tiles.split_keys % chosen.block_keys:
        raise ValueError(f"split_keys is {tiles.split_keys}: it must be a multiple of {chosen.block_keys}")
    if tiles.lanes > max(1, chosen.num_warps * chosen.by_warps):
        raise ValueError(f"slabs of {tiles.lanes} lanes are no item for {chosen.num_warps} warps")
    if q.dtype == torch.float32 and tiles.width > NARROW:
        raise ValueError(f"attention in float32 takes tiles of {NARROW} query vectors, not of {tiles.width}")
    columns = triton.next_power_of_2(head_dim)
    sizes = tiles.workspace[tiles.workspace.numel() // (head_dim + 1) * head_dim :]
    if softcap is not None:
        scale, softcap_scale = scale / softcap, softcap * LOG2_E
    else:
        scale, softcap_scale = scale * LOG2_E, 1.0
    fused = tiles.width == NARROW
    attention_kernel[(tiles.programs,)](
        q, kv.k_pages, kv.v_pages, kv.k_slabs, kv.v_slabs, out, tiles.workspace, sizes, tiles.tickets,
        batch.row_start, batch.block_tables, batch.prefix_len, batch.slab_start, batch.slab_used, tiles.row_seq,
        tiles.items, batch.block_tables.stride(0), tiles.split_keys, window or 0, scale, softcap_scale,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, WIDTH=columns, PAGE_SIZE=kv.page_size, PACKED=tiles.width,
        LANES=tiles.lanes, BLOCK_KEYS=chosen.block_keys, WARPS=chosen.num_warps * chosen.by_warps,
        INTO_SLAB=batch.into_slab, FUSED=fused, WINDOW=window is not None, SOFTCAP=softcap is not None,
        AT_ONCE=_at_once(chosen.at_once * chosen.num_warps, heads // kv_heads, columns), STAGES=chosen.num_stages,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages, maxnreg=chosen.max_registers)
    if not fused:
        merge_kernel[(triton.cdiv(rows * heads, MERGED_VECTORS),)](
            tiles.workspace, sizes, out, tiles.row_parts, rows, HEADS=heads, HEAD_DIM=head_dim, WIDTH=columns,
            VECTORS=MERGED_VECTORS, AT_ONCE=_at_once(MERGED_NUMBERS * 4, MERGED_VECTORS, columns), num_warps=4,
            num_stages=1)


def _at_once(numbers: int, vectors: int, columns: int) -> int:
    """Parts loaded at once when so many vectors are merged, 32 threads a warp; numbers: of a thread, times warps."""
    return max(1, numbers * 32 // (triton.next_power_of_2(vectors) * columns))


@functools.cache
def _capability(device: torch.device) -> int:
    """Compute capability as in sm_90; 90 where kernels are interpreted."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _check(q: Tensor, kv: LayerKV, out: Tensor) -> None:
    heads, head_dim = q.shape[1:]
    kv_heads = kv.k_pages.shape[1]
    tensors = (q, out, *kv[:4])
    if any(tensor.dtype != q.dtype for tensor in tensors):
        raise TypeError(f"attention on a GPU takes one type: queries are {q.dtype}, the cache {kv.k_pages.dtype}, "
                        f"the output {out.dtype}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("attention on a GPU takes contiguous queries, output and cache layers")
    if heads % kv_heads or heads // kv_heads > MAX_HEADS_A_KEY:
        raise ValueError(f"{heads} query heads over {kv_heads} key heads: attention on a GPU takes 1 to "
                         f"{MAX_HEADS_A_KEY} a key head")
    if not 16 <= head_dim <= 256 or head_dim % 8:
        raise ValueError(f"head_dim is {head_dim}: attention on a GPU takes multiples of 8 from 16 to 256")
    if kv.page_size < 16 or kv.page_size & (kv.page_size - 1):
        raise ValueError(f"page_size is {kv.page_size}: attention on a GPU takes powers of two from 16 on")


class _Case(NamedTuple):
    """A kind of pass with tiles of `width` query vectors."""

    name: str
    width: int
    kind: Kind


_CASES = (
    _Case("one lane", 16, "draft"), _Case("16 lanes", 64, "draft"), _Case("32 lanes", 128, "draft"),
    _Case("scoring", 128, "score"), _Case("prefill", 128, "prefill"), _Case("few rows", 16, "score"),
)


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_INTEGERS = ("table_stride", "split_keys", "window")


def variants() -> list[Variant]:
    """Every head size at every kind of pass in bf16 and fp32, and samples of the rest."""
    found = []
    for case in _CASES:
        for head_dim in (64, 80, 96, 128, 256):
            found += _variants(case, head_dim, torch.bfloat16)
            if case.width == NARROW:
                found += _variants(case, head_dim, torch.float32)
        for head_dim in (128, 256):
            found += _variants(case, head_dim, torch.bfloat16, limited=True)
        found += _variants(case, 128, torch.float16)
    found += [_merge_variant(head_dim, torch.bfloat16) for head_dim in (64, 80, 128, 256)]
    return found


def _variants(case: _Case, head_dim: int, dtype: torch.dtype, limited: bool = False) -> list[Variant]:
    """One for each group of targets that share settings; `limited` has a window and a softcap."""
    # Beyond 128 columns tiles have 64 vectors at most, as `tiles.wide` says.
    width = min(case.width, 64 if head_dim > 128 else 128)
    at_a_time = lanes(width, case.kind, head_dim, dtype == torch.float32)
    groups: dict[Settings, list[int]] = {}
    for arch in ARCHES:
        groups.setdefault(settings(head_dim, dtype, width, at_a_time, arch), []).append(arch)
    found = []
    for chosen, arches in groups.items():
        columns = triton.next_power_of_2(head_dim)
        constexprs = dict(
            HEADS=32, KV_HEADS=8, HEAD_DIM=head_dim, WIDTH=columns, PAGE_SIZE=16, PACKED=width,
            LANES=at_a_time, BLOCK_KEYS=chosen.block_keys,
            WARPS=chosen.num_warps * chosen.by_warps, INTO_SLAB=case.kind != "prefill", FUSED=width == NARROW,
            AT_ONCE=_at_once(chosen.at_once * chosen.num_warps, 4, columns), WINDOW=limited, SOFTCAP=limited,
            STAGES=chosen.num_stages)
        pointers = dict.fromkeys(("q", "k_pages", "v_pages", "k_slabs", "v_slabs", "out"), "*" + _TYPES[dtype])
        pointers |= dict.fromkeys(("partial", "sizes"), "*fp32")
        kinds = {**dict.fromkeys(constexprs, "constexpr"), **dict.fromkeys(_INTEGERS, "i32"), **pointers,
                 "scale": "fp32", "softcap_scale": "fp32"}
        signature = {name: kinds.get(name, "*i32") for name in attention_kernel.arg_names}
        name = f"attention {case.name} {head_dim} {_TYPES[dtype]}{' limited' * limited}"
        found.append(Variant(name, attention_kernel, signature, constexprs, chosen.num_warps, chosen.num_stages,
                             tuple(arches), max_registers=chosen.max_registers))
    return found


def _merge_variant(head_dim: int, dtype: torch.dtype) -> Variant:
    columns = triton.next_power_of_2(head_dim)
    constexprs = dict(HEADS=32, HEAD_DIM=head_dim, WIDTH=columns, VECTORS=MERGED_VECTORS,
                      AT_ONCE=_at_once(MERGED_NUMBERS * 4, MERGED_VECTORS, columns))
    signature = {"partial": "*fp32", "sizes": "*fp32", "out": "*" + _TYPES[dtype], "row_parts": "*i32", "rows": "i32"}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return Variant(f"merge {head_dim} {_TYPES[dtype]}", merge_kernel, signature, constexprs, 4, 1)
