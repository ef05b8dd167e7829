"""Attention over pages and slabs on a GPU: two passes in one launch, and a merge.

A row's keys are in two places, and softmax over their union is put together from softmaxes over the parts. For a part
with scores s_j (in units of log2) and values v_j, let L = log2(sum_j 2^s_j) and o = sum_j 2^(s_j - L) v_j. Then over
parts

    out = sum_p 2^(L_p - M) o_p / sum_p 2^(L_p - M),    M = max_p L_p.

- The prefix pass packs the rows of all lanes of a request, times the query heads of a KV head, into one matrix per
  tile (`stars.kernels.triton.tiles`). So a page is read once per request and not once per lane, and products run on
  tensor cores though each lane has one row. (Cascade attention: Juravsky et al., "Hydragen", arXiv 2402.05099; Ye
  et al., "FlashInfer", arXiv 2501.01005.) Its keys are divided among programs (Dao et al., "Flash-Decoding", 2023).
- The slab pass is one program per sequence, KV head and tile: the drafted keys, causal.
- Inside a part the softmax is online (Dao et al., arXiv 2205.14135; Milakov and Gimelshein, arXiv 1805.02867).

Without a slab (prefill) the same code runs over the pages, causal, and where there is one part it writes the output
itself. Sums are in float32; scores are scaled by log2(e), since the hardware's exponential is 2^x.

Everything that varies between replays of a captured graph (lengths, tables, tiles, window starts) is read on the
device. What is fixed at capture: the lengths of the tensors of tiles, and the numbers of `Tiles`.

**The same bits in any company.** Keys are taken in blocks counted from position 0, and parts are merged in order. A
block that a row does not see changes nothing in it: its weights are 2^-inf = 0, its rescaling 2^0 = 1. So with
split_keys > 0 the bits of a row depend on its own keys and on the settings of the launch, not on other rows.

**Head sizes.** A tile's width is the next power of two: 80 and 96 are computed as 128 with zeros. That costs 1.6 and
1.33 times the tensor core work and shared memory, and no memory traffic: the padding is masked, not read.

**Costs** of a layer: the keys and values of the pages that a group sees, once; of the slab, once a sequence; q and out.
Parts go through the second-level cache: splits + 1 of rows * heads * (head_dim + 1) float32 numbers, written and read.
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
from stars.kernels.triton.tiles import Plan, build, workspace_size
from stars.kernels.triton.variant import ARCHES, Variant
from stars.kernels.types import Batch, LayerKV

LOG2_E = math.log2(math.e)


class Settings(NamedTuple):
    """How a launch is compiled."""

    piece: int  # query vectors a program takes; tiles that have more are shared between programs
    block_keys: int
    num_warps: int
    num_stages: int  # of the loop over pages
    slab_stages: int
    max_registers: int | None = None  # of a thread; None leaves it to the assembler


def settings(head_dim: int, dtype: torch.dtype, packed: int, capability: int = 90) -> Settings:
    """For tiles of at most `packed` query vectors. The limits: 255 registers a thread, and shared memory of 163 KB on
    sm_80, 227 KB on sm_90 and sm_100; keys and values of a block take block_keys * width * 2 numbers.

    Half of the stages of the loop over pages hold keys and values in flight, since an address depends on an entry of
    the block table that was itself loaded stages before. A slab is a block or two, not worth buffers.

    float32 is computed without tensor cores (they would round to 10 bits), from operands in registers: pieces and
    blocks are small and nothing is prefetched, since this type is for tests and comparisons. The assembler is to use
    all registers of two programs of 8 warps a processor: left to itself it settled for 64 or 72, and spilled two.
    """
    width = triton.next_power_of_2(head_dim)
    if dtype == torch.float32:
        return Settings(16, 32, 8 if width > 64 else 4, 1, 1, 128)
    piece = min(packed, 64 if width > 128 else 128)
    if capability >= 120:  # GeForce: the tensor cores of sm_80, and 99 KB of shared memory
        capability = 80
    # The sums take piece * width / (32 * num_warps) registers a thread, at most 64. sm_100 needs them in passing from
    # tensor memory, and masked columns (80, 96) then take the last ones.
    num_warps = 8 if piece * width >= (64 if capability >= 100 else 128) * 128 else 4
    if piece <= 64:  # bound by memory: small blocks, three in flight; or too wide for more than two
        deep = packed <= 64 and (width <= 128 or capability >= 90)
        return Settings(piece, 32, num_warps, 6 if deep else 4, 2)
    # Bound by arithmetic: wide products reread their left side less often. sm_80 holds a block in registers.
    return Settings(piece, 32 if capability < 90 else 64, num_warps, 4, 2)


def merged_at_a_time(head_dim: int, parts: int) -> int:
    """Items per program of the merge: as many as keep 64 numbers of a thread in flight, at most 16."""
    return max(1, min(16, triton.next_power_of_2(8192 // (parts * triton.next_power_of_2(head_dim)) + 1) // 2))


@triton.jit
def _tanh(x):
    """Odd polynomial (least squares, error 2e-8) below 1/2, where 1 - 2^-y loses digits; else from the exponential."""
    square = x * x
    near = x + x * square * (-0.3333314061 + square * (0.1332582235 + square * (-0.0530422069 + square * 0.0172354765)))
    shrunk = tl.exp2(tl.abs(x) * -2.8853900817779268)  # e^(-2 |x|)
    far = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def _attend(
    q, keys, values, place, begin, end, first, beyond, kv_head, scale, softcap_scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_KEYS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax of the rows of q [PACKED, WIDTH] over keys `begin` .. `end` - 1: (output, log2 of the sum of weights).

    A row sees the keys from `first` (with WINDOW) to before `beyond`, both [PACKED]. With PAGE_SIZE, `place` points to
    a row of the block table; with 0, it is the flat row of key 0.
    """
    column = tl.arange(0, WIDTH)
    sums = tl.zeros([PACKED, WIDTH], tl.float32)
    top = tl.full([PACKED], float("-inf"), tl.float32)
    total = tl.zeros([PACKED], tl.float32)
    for block in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        key = block + tl.arange(0, BLOCK_KEYS)
        # Rows beyond the end are not read: they may hold anything, and 0 times NaN is NaN.
        read = (key < end)[:, None] & (column < HEAD_DIM)[None, :]
        if PAGE_SIZE > 0:
            page = tl.load(place + key // PAGE_SIZE, mask=key < end, other=0)
            row = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
        else:
            row = (place + key).to(tl.int64)
        at = ((row * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + column[None, :]
        k = tl.load(keys + at, mask=read, other=0.0)
        v = tl.load(values + at, mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores = _tanh(scores) * softcap_scale
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


@triton.jit(do_not_specialize=["rows", "table_stride", "tile_programs", "splits", "split_keys", "window"])
def attention_kernel(
    q, k_pages, v_pages, k_slabs, v_slabs, out, partial, sizes,
    row_start, block_tables, prefix_len, slab_start, slab_used, row_seq, tiles, slab_tiles,
    rows, table_stride, tile_programs, splits, split_keys, window, scale, softcap_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PACKED: tl.constexpr, PIECES: tl.constexpr, PACKED_SLAB: tl.constexpr, SLAB_PIECES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, INTO_SLAB: tl.constexpr, DIRECT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, STAGES: tl.constexpr, SLAB_STAGES: tl.constexpr,
):
    """One program: a piece of a tile, one KV head and one part of its page keys, or (from `tile_programs` on) its slab
    keys. A tile has PIECES pieces of PACKED query vectors, a slab tile SLAB_PIECES of PACKED_SLAB.

    partial [parts, rows, HEADS, HEAD_DIM] and sizes [parts, rows, HEADS] (log2 of the sum of weights, -inf where no key
    was seen) are float32; the slab's part is the last one. DIRECT: one part, written to `out`.
    """
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    column = tl.arange(0, WIDTH)
    # Neighbours in time work on the KV heads of one key, which lie side by side in memory.
    kv_head = tl.program_id(0) % KV_HEADS
    program = tl.program_id(0) // KV_HEADS
    if program < tile_programs:
        tile = tiles + (program // splits // PIECES) * 3
        begin_piece = program // splits % PIECES * PACKED
        split = program % splits
        group = tl.load(tile)
        first_row = tl.load(tile + 1)
        count = tl.load(tile + 2)
        if count * PER_KV > begin_piece:
            packed = begin_piece + tl.arange(0, PACKED)
            row = first_row + packed // PER_KV
            live = packed < count * PER_KV
            # In 64 bits where the tile begins, in 32 bits from there: places are held through the loop for the output,
            # and as pairs of registers they were the few numbers too many that some compilers spilled.
            base = first_row.to(tl.int64) * HEADS + kv_head * PER_KV
            head = packed // PER_KV * HEADS + packed % PER_KV
            at = (head * HEAD_DIM)[:, None] + column[None, :]
            used = live[:, None] & (column < HEAD_DIM)[None, :]
            queries = tl.load(q + base * HEAD_DIM + at, mask=used, other=0.0)
            seq = tl.load(row_seq + row, mask=live, other=0)
            prefix = tl.load(prefix_len + seq, mask=live, other=0)
            position = prefix + row - tl.load(row_start + seq, mask=live, other=0)
            if INTO_SLAB:
                position += tl.load(slab_used + seq, mask=live, other=0)
                beyond = prefix
            else:
                beyond = position + 1
            beyond = tl.where(live, beyond, 0)
            end = tl.max(beyond, 0)
            first = position - window + 1
            begin = 0
            if WINDOW:
                begin = tl.maximum(tl.min(tl.where(live, first, 2147483647), 0), 0) // BLOCK_KEYS * BLOCK_KEYS
            if split_keys > 0:
                begin = tl.maximum(begin, split * split_keys)
                end = tl.minimum(end, (split + 1) * split_keys)
            else:
                length = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_KEYS), splits) * BLOCK_KEYS
                begin += split * length
                end = tl.minimum(end, begin + length)
            output, size = _attend(
                queries, k_pages, v_pages, block_tables + group.to(tl.int64) * table_stride, begin, end, first, beyond,
                kv_head, scale, softcap_scale, KV_HEADS, HEAD_DIM, WIDTH, PAGE_SIZE, PACKED, BLOCK_KEYS, WINDOW,
                SOFTCAP, STAGES)
            if DIRECT:
                tl.store(out + base * HEAD_DIM + at, output.to(out.dtype.element_ty), mask=used)
            else:
                part = split.to(tl.int64) * rows * HEADS + base
                tl.store(partial + part * HEAD_DIM + at, output, mask=used)
                tl.store(sizes + part + head, size, mask=live)
    elif INTO_SLAB:
        tile = slab_tiles + (program - tile_programs) // SLAB_PIECES * 3
        begin_piece = (program - tile_programs) % SLAB_PIECES * PACKED_SLAB
        seq = tl.load(tile)
        first_row = tl.load(tile + 1)
        count = tl.load(tile + 2)
        if count * PER_KV > begin_piece:
            packed = begin_piece + tl.arange(0, PACKED_SLAB)
            row = first_row + packed // PER_KV
            live = packed < count * PER_KV
            base = first_row.to(tl.int64) * HEADS + kv_head * PER_KV
            head = packed // PER_KV * HEADS + packed % PER_KV
            at = (head * HEAD_DIM)[:, None] + column[None, :]
            used = live[:, None] & (column < HEAD_DIM)[None, :]
            queries = tl.load(q + base * HEAD_DIM + at, mask=used, other=0.0)
            slab_position = row - tl.load(row_start + seq) + tl.load(slab_used + seq)
            beyond = tl.where(live, slab_position + 1, 0)
            first = slab_position - window + 1
            begin = 0
            if WINDOW:
                begin = tl.maximum(tl.min(tl.where(live, first, 2147483647), 0), 0) // BLOCK_KEYS * BLOCK_KEYS
            output, size = _attend(
                queries, k_slabs, v_slabs, tl.load(slab_start + seq), begin, tl.max(beyond, 0), first, beyond,
                kv_head, scale, softcap_scale, KV_HEADS, HEAD_DIM, WIDTH, 0, PACKED_SLAB, BLOCK_KEYS, WINDOW, SOFTCAP,
                SLAB_STAGES)
            part = splits.to(tl.int64) * rows * HEADS + base
            tl.store(partial + part * HEAD_DIM + at, output, mask=used)
            tl.store(sizes + part + head, size, mask=live)


@triton.jit(do_not_specialize=["items"])
def merge_kernel(
    partial, sizes, out, items,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ITEMS: tl.constexpr,
):
    """out [items, HEAD_DIM] from partial [PARTS, items, HEAD_DIM] and sizes [PARTS, items]; an item is a head of a row.

    Parts are added in order, so empty parts at any place do not change a bit. The loops are unrolled: all loads of a
    program are under way at once.
    """
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    column = tl.arange(0, WIDTH)
    live = item < items
    inside = (column < HEAD_DIM)[None, :]
    top = tl.full([ITEMS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(sizes + part * items + item, mask=live, other=float("-inf")))
    total = tl.zeros([ITEMS], tl.float32)
    sums = tl.zeros([ITEMS, WIDTH], tl.float32)
    at = item[:, None] * HEAD_DIM + column[None, :]
    for part in tl.static_range(PARTS):
        size = tl.load(sizes + part * items + item, mask=live, other=float("-inf"))
        full = size != float("-inf")
        weight = tl.where(full, tl.exp2(size - top), 0.0)
        start = tl.cast(items, tl.int64) * (part * HEAD_DIM)
        sums += weight[:, None] * tl.load(partial + start + at, mask=full[:, None] & inside, other=0.0)
        total += weight
    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=live[:, None] & inside)


_workspaces: dict[torch.device, list[Tensor]] = {}


def reserve_workspace(size: int, device: torch.device) -> Tensor:
    """The device's shared workspace of at least `size` float32 numbers, for launches on one stream at a time.

    It grows outside captures only, so run a shape once before capturing it. Outgrown buffers are kept: graphs captured
    with them hold their addresses. Passes that may overlap in time need workspaces of their own, in `Tiles.workspace`.
    """
    held = _workspaces.setdefault(device, [])
    if not held or held[-1].numel() < size:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"attention needs {size} numbers of workspace while a graph is captured: run the shape "
                               "once before capturing it, or pass a workspace in the batch's tiles")
        held.append(torch.empty(size, dtype=torch.float32, device=device))
    return held[-1]


def attention(
    q: Tensor, kv: LayerKV, batch: Batch, scale: float, out: Tensor,
    window: int | None = None, softcap: float | None = None,
) -> None:
    """Causal grouped-query attention over committed pages and the slab; see `attention_reference`.

    Every row must be in one prefix tile and, with into_slab, in one slab tile; the output of others is arbitrary.
    q, out and the cache are contiguous and of one type; page_size is a power of two from 16 on.
    """
    rows, heads, head_dim = q.shape
    kv_heads = kv.k_pages.shape[1]
    _check(q, kv, out)
    tiles = batch.tiles or build(batch, heads, kv_heads, kv.page_size)
    plan = Plan(tiles.packed, tiles.packed_slab, tiles.splits, tiles.split_keys)
    piece, block_keys, num_warps, num_stages, slab_stages, max_registers = settings(
        head_dim, q.dtype, max(tiles.packed, tiles.packed_slab), _capability(q.device))
    packed, packed_slab = min(tiles.packed, piece), min(tiles.packed_slab, piece)
    pieces, slab_pieces = tiles.packed // packed, tiles.packed_slab // packed_slab
    if tiles.split_keys % block_keys:
        raise ValueError(f"split_keys is {tiles.split_keys}: it must be a multiple of {block_keys}")
    size = workspace_size(plan, batch.into_slab, rows, heads, head_dim)
    parts = tiles.splits + batch.into_slab
    if size:
        workspace = reserve_workspace(size, q.device) if tiles.workspace is None else tiles.workspace
        if workspace.numel() < size:
            raise ValueError(f"the workspace holds {workspace.numel()} numbers: this batch needs {size}")
        sizes = workspace[parts * rows * heads * head_dim :]
    else:
        workspace = sizes = out
    tile_programs = tiles.prefix.shape[0] * pieces * tiles.splits
    programs = tile_programs + (tiles.slab.shape[0] * slab_pieces if batch.into_slab else 0)
    if softcap is not None:
        scale, softcap_scale = scale / softcap, softcap * LOG2_E
    else:
        scale, softcap_scale = scale * LOG2_E, 1.0
    attention_kernel[(programs * kv_heads,)](
        q, kv.k_pages, kv.v_pages, kv.k_slabs, kv.v_slabs, out, workspace, sizes,
        batch.row_start, batch.block_tables, batch.prefix_len, batch.slab_start, batch.slab_used, tiles.row_seq,
        tiles.prefix, tiles.slab, rows, batch.block_tables.stride(0), tile_programs, tiles.splits, tiles.split_keys,
        window or 0, scale, softcap_scale,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        PAGE_SIZE=kv.page_size, PACKED=packed, PIECES=pieces, PACKED_SLAB=packed_slab, SLAB_PIECES=slab_pieces,
        BLOCK_KEYS=block_keys, INTO_SLAB=batch.into_slab, DIRECT=not size, WINDOW=window is not None,
        SOFTCAP=softcap is not None, STAGES=num_stages, SLAB_STAGES=slab_stages, num_warps=num_warps,
        num_stages=num_stages, maxnreg=max_registers)
    if size:
        items, at_a_time = rows * heads, merged_at_a_time(head_dim, parts)
        merge_kernel[(triton.cdiv(items, at_a_time),)](
            workspace, sizes, out, items, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), PARTS=parts,
            ITEMS=at_a_time, num_warps=4, num_stages=1)


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
    """A kind of pass: tiles of `packed` and `packed_slab` query vectors."""

    name: str
    packed: int
    packed_slab: int
    into_slab: bool


_CASES = (
    _Case("one lane", 16, 16, True), _Case("16 lanes", 64, 16, True), _Case("32 lanes", 128, 16, True),
    _Case("scoring", 128, 128, True), _Case("prefill", 128, 128, False),
)


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_INTEGERS = ("rows", "table_stride", "tile_programs", "splits", "split_keys", "window")


def variants() -> list[Variant]:
    """Every head size at every kind of pass in bf16 and fp32, and samples of the rest."""
    found = []
    for case in _CASES:
        for head_dim in (64, 80, 96, 128, 256):
            found += _variants(case, head_dim, torch.bfloat16) + _variants(case, head_dim, torch.float32)
        for head_dim in (128, 256):
            found += _variants(case, head_dim, torch.bfloat16, limited=True)
        found += _variants(case, 128, torch.float16)
    found += [_merge_variant(head_dim, dtype, parts) for head_dim in (64, 80, 128, 256) for parts in (2, 9, 17)
              for dtype in (torch.bfloat16, torch.float32)]
    return found


def _variants(case: _Case, head_dim: int, dtype: torch.dtype, limited: bool = False) -> list[Variant]:
    """One for each group of targets that share settings; `limited` has a window and a softcap."""
    packed = max(case.packed, case.packed_slab)
    chosen: dict[Settings, list[int]] = {}
    for arch in ARCHES:
        chosen.setdefault(settings(head_dim, dtype, packed, arch), []).append(arch)
    found = []
    for (piece, block_keys, num_warps, num_stages, slab_stages, max_registers), arches in chosen.items():
        constexprs = dict(
            HEADS=32, KV_HEADS=8, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), PAGE_SIZE=16,
            PACKED=min(case.packed, piece), PIECES=max(1, case.packed // piece),
            PACKED_SLAB=min(case.packed_slab, piece), SLAB_PIECES=max(1, case.packed_slab // piece),
            BLOCK_KEYS=block_keys, INTO_SLAB=case.into_slab, DIRECT=not case.into_slab, WINDOW=limited,
            SOFTCAP=limited, STAGES=num_stages, SLAB_STAGES=slab_stages)
        number = "*" + _TYPES[dtype]
        pointers = dict.fromkeys(("q", "k_pages", "v_pages", "k_slabs", "v_slabs", "out"), number)
        pointers |= dict.fromkeys(("partial", "sizes"), "*fp32" if case.into_slab else number)
        kinds = {**dict.fromkeys(constexprs, "constexpr"), **dict.fromkeys(_INTEGERS, "i32"), **pointers,
                 "scale": "fp32", "softcap_scale": "fp32"}
        signature = {name: kinds.get(name, "*i32") for name in attention_kernel.arg_names}
        name = f"attention {case.name} {head_dim} {_TYPES[dtype]}{' limited' * limited}"
        found.append(Variant(name, attention_kernel, signature, constexprs, num_warps, num_stages, tuple(arches),
                             max_registers=max_registers))
    return found


def _merge_variant(head_dim: int, dtype: torch.dtype, parts: int) -> Variant:
    constexprs = dict(HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), PARTS=parts,
                      ITEMS=merged_at_a_time(head_dim, parts))
    signature = {"partial": "*fp32", "sizes": "*fp32", "out": "*" + _TYPES[dtype], "items": "i32"}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return Variant(f"merge {parts} parts {head_dim} {_TYPES[dtype]}", merge_kernel, signature, constexprs, 4, 1)
