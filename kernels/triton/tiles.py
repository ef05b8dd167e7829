"""The division of a batch's rows and keys into work for attention on a GPU: host side, no Triton needed.

A tile is a run of adjacent rows of one group, lanes of one request, which read the same pages. The query heads that
share a KV head (H of them) are packed with the rows: a tile of R rows is a matrix of R * H query vectors, at most
`width`, so R = width // H. Its page keys are divided into ranges, of which a long context has many and a short one has
one; its slab keys are a part more. Of that, a piece holds rows of one sequence, or where each has one row, `lanes` of
them; no piece crosses a tile.

The list of work has one item for every range of a tile, and for every piece of a slab. A program takes an item and a KV
head at a time, so a captured graph fixes how wide tiles are and how many programs walk the list, and nothing of what is
in it. For a number of rows and a kind of pass, tiles have one of two widths.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from stars.kernels.types import Batch, Tiles

NARROW = 16
"""Query vectors of the lowest tile: the least height of a tensor core product."""

MAX_SPLITS = 31
"""Ranges that the keys of a tile are divided into at most: each is a partial result that goes through memory."""

FIXED_SPLITS = 16
"""Ranges of the longest context where they are fixed by position."""

SPLIT_MULTIPLE = 256
"""split_keys is a multiple of this, and so of every block of keys a kernel reads at a time."""

LEAST_KEYS = 128
"""Keys of a range: fewer spend more time on their partial result than on themselves, by reckoning, not measured."""

KEYS_MULTIPLE = 128
"""Where ranges begin, a multiple of every block of keys."""

MAX_PROCESSORS = 160
"""Multiprocessors that contexts are divided among at most (an A100 has 108, an H100 or H200 132, a B200 148)."""

WIDE_COST = 1.5
"""Time of a key in a wide tile over that in a narrow one, which is bound by memory: an estimate."""

FIELDS = 12
"""int32 numbers of an item: group (of a slab: sequence); first row; rows; first key; end of keys; number of the range
(of a slab: `splits`); ranges of the tile; the tile's place in the workspace, in rows; its first row; its rows; items
of the tile; its parts. The list begins with an entry as long, which holds the number of items."""

Kind = Literal["draft", "score", "prefill"]
"""Of a pass: one row a sequence after its slab, rows into slabs, rows into pages."""


class Plan(NamedTuple):
    """The numbers of `Tiles` that say how work is divided."""

    width: int
    lanes: int
    split_keys: int


class Group(NamedTuple):
    """Adjacent sequences that read the same pages."""

    row: int  # of the block tables
    start: int  # first sequence
    stop: int  # the one after the last
    keys: int  # page keys that the longest of them sees


class Work(NamedTuple):
    """The list of work of a batch, as the device reads it."""

    items: np.ndarray  # int32 [items, FIELDS]
    row_parts: np.ndarray | None  # int32 [rows, 3]; None: no second launch reads it
    places: int  # rows of partial results


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a card. An interpreter runs programs one after another, so that few are better."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def programs(rows: int, heads: int, width: int, multiprocessors: int) -> int:
    """Programs that walk the list: two a processor, or as many as tiles of so many rows have at least."""
    return max(2 * multiprocessors, -(-rows * heads // width))


def widths(rows: int, kind: Kind, heads_per_kv: int, head_dim: int, float32: bool, deterministic: bool) -> list[int]:
    """Query vectors of full tiles: what a pass of `rows` rows may be given, narrow first, then wide.

    Wide tiles have 128, or 64 where that is enough or the sums of 128 would leave no registers. A deterministic engine
    has one width for each kind of pass, since the bits of a row depend on it.
    """
    vectors = rows * heads_per_kv
    if float32:
        return [NARROW]
    if deterministic:
        return [64 if kind == "draft" or head_dim > 128 else 128]
    if vectors <= NARROW:
        return [NARROW]
    return [NARROW, 64 if vectors <= 64 or head_dim > 128 else 128]


def groups_of(seq_group: Sequence[int], keys: Sequence[int]) -> list[Group]:
    """The groups of a batch in order. keys: page keys that each sequence sees."""
    found: list[Group] = []
    start, held_by, longest = 0, -1, 0
    for sequence, group in enumerate(seq_group):
        if group != held_by:
            if sequence:
                found.append(Group(held_by, start, sequence, longest))
            start, held_by, longest = sequence, group, 0
        longest = max(longest, keys[sequence])
    found.append(Group(held_by, start, len(seq_group), longest))
    return found


def plan(
    rows: int, row_start: Sequence[int], groups: Sequence[Group], kind: Kind, heads_per_kv: int, head_dim: int,
    float32: bool, capacity: int, deterministic: bool = False,
) -> Plan:
    """How to divide a batch of `rows` rows, idle ones included. capacity: keys a row of the block tables can hold, a
    constant of the engine.

    Deterministic plans depend on the kind of the pass alone, which is given and not seen: a score of one row is no
    draft. How many sequences there are and how long they are does not enter, nor does it then into the bits of a row.
    """
    possible = widths(rows, kind, heads_per_kv, head_dim, float32, deterministic)
    width = possible[0]
    if len(possible) > 1:
        narrow, wide = NARROW // heads_per_kv, possible[1] // heads_per_kv
        saved = 0.0  # time of the narrow tiles less that of the wide ones
        for group in groups:
            count = row_start[group.stop] - row_start[group.start]
            saved += (group.keys + 1) * (-(-count // narrow) - WIDE_COST * -(-count // wide))
        width = possible[saved > 0]
    return plan_of(width, kind, head_dim, float32, capacity, deterministic)


def plan_of(width: int, kind: Kind, head_dim: int, float32: bool, capacity: int, deterministic: bool) -> Plan:
    """The plan of a pass whose tiles are so wide."""
    split_keys = 0
    if deterministic:  # partial results of long chunks would be large; their programs fill a card as they are
        split_keys = -(-capacity // FIXED_SPLITS // SPLIT_MULTIPLE) * SPLIT_MULTIPLE if kind != "prefill" else 1 << 30
    return Plan(width, lanes(width, kind, head_dim, float32), split_keys)


def lanes(width: int, kind: Kind, head_dim: int, float32: bool) -> int:
    """Lanes of a draft whose slabs are an item together, one a warp; 0 where slabs are items of one sequence each."""
    if kind != "draft":
        return 0
    if float32 or head_dim > 128:  # warps share every block of keys
        return 1
    return 8 if width > 64 and head_dim > 64 else 4  # as many as such programs have warps at least


def range_keys(ends: Sequence[int], kv_heads: int, multiprocessors: int) -> int:
    """Keys of a range: as many as make one processor's share of all keys of all tiles.

    The longest context is not divided further than MAX_SPLITS. Where there are fewer tiles than processors, ranges are
    as long as is needed for one each, as a second one would double the time.
    """
    share = -(-sum(ends) * kv_heads // multiprocessors)
    length = max(LEAST_KEYS, share, -(-max(ends) // MAX_SPLITS))
    length = -(-length // KEYS_MULTIPLE) * KEYS_MULTIPLE
    most = multiprocessors // kv_heads
    if len(ends) <= most:
        while sum([-(-end // length) for end in ends]) > most:
            length += max(KEYS_MULTIPLE, length // 8 // KEYS_MULTIPLE * KEYS_MULTIPLE)
    return length


def work(
    row_start: Sequence[int], groups: Sequence[Group], kind: Kind, heads: int, kv_heads: int, plan: Plan,
    multiprocessors: int,
) -> Work:
    """The list of work of a batch under a plan, long ranges first."""
    rows_per_tile, into_slab = plan.width // (heads // kv_heads), kind != "prefill"
    spans: list[tuple[int, int, int, int]] = []  # of tiles: group, first row, rows, end of the keys that it sees
    for group, start, stop, keys in groups:
        begin, end = row_start[start], row_start[stop]
        # Of one causal sequence, a tile sees no further than its last row; of several, masks see to the rest.
        hidden = not into_slab and stop == start + 1
        for row in range(begin, end, rows_per_tile):
            after = min(row + rows_per_tile, end)
            spans.append((group, row, after - row, keys - (end - after) * hidden))
    ends = [span[3] for span in spans]
    length = plan.split_keys or range_keys(ends, kv_heads, min(multiprocessors, MAX_PROCESSORS))
    pieces = [] if plan.lanes or not into_slab else _pieces(row_start, spans)
    if plan.lanes:
        counts = [-(-span[2] // plan.lanes) for span in spans]
    else:
        counts = [len(of_tile) for of_tile in pieces] if into_slab else [0] * len(spans)
    tiles = []
    place = 0
    for (group, row, rows, end), count in zip(spans, counts, strict=True):
        splits = max(1, -(-end // length))
        parts = splits + into_slab
        tiles.append((group, row, rows, 0, end, 0, splits, place, row, rows, splits + count, parts))
        if parts > 1:
            place += rows * parts
    table = np.array(tiles, np.int32)
    splits_of = table[:, 6]
    ranges = table.repeat(splits_of, 0)
    if len(ranges) > len(tiles):
        ranges[:, 5] = np.arange(len(ranges)) - (splits_of.cumsum() - splits_of).repeat(splits_of)
        ranges[:, 3] = ranges[:, 5] * length
        np.minimum(ranges[:, 4], ranges[:, 3] + length, out=ranges[:, 4])
    if len(ranges) * kv_heads > multiprocessors:  # else all begin at once
        ranges = ranges[(ranges[:, 3] - ranges[:, 4]).argsort(kind="stable")]
    items = ranges
    if into_slab:
        slabs = table.repeat(counts, 0)
        slabs[:, 5] = slabs[:, 6]
        if pieces:
            slabs[:, :3] = [piece for of_tile in pieces for piece in of_tile]
        else:  # a row a sequence
            ahead = np.array(counts)
            skipped = (np.arange(len(slabs)) - (ahead.cumsum() - ahead).repeat(ahead)) * plan.lanes
            slabs[:, 1] += skipped
            slabs[:, 0] = slabs[:, 1]
            np.minimum(slabs[:, 2] - skipped, plan.lanes, out=slabs[:, 2])
        items = np.concatenate((ranges, slabs))
    row_parts = None
    if plan.width != NARROW:
        of_rows = table.repeat(table[:, 2], 0)
        row_parts = of_rows[:, (7, 9, 11)]
        row_parts[:, 0] += np.arange(len(row_parts)) - of_rows[:, 1]
    return Work(items, row_parts, place)


def _pieces(row_start: Sequence[int], spans: Sequence[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """The (sequence, first row, rows) of the slabs of each tile, cut where a sequence or a tile begins."""
    found = []
    sequence = 0
    for _, row, rows, _ in spans:
        of_tile = []
        stop = row + rows
        while row < stop:
            while row_start[sequence + 1] <= row:
                sequence += 1
            after = min(stop, row_start[sequence + 1])
            of_tile.append((sequence, row, after - row))
            row = after
        found.append(of_tile)
    return found


def spare_items(programs: int, kv_heads: int) -> int:
    """Items behind the list that are read, and not used: each program reads ahead by a unit, `programs` further on."""
    return -(-programs // kv_heads) + 1


def max_items(rows: int, kv_heads: int, deterministic: bool) -> int:
    """Upper bound of the items of any batch of at most `rows` rows, those that end the list apart."""
    # A tile and a piece of a slab have a row at least; of ranges beyond one a tile there is one a processor at most.
    return rows * (1 + (FIXED_SPLITS if deterministic else 1)) + MAX_PROCESSORS // kv_heads


def max_workspace(rows: int, heads: int, head_dim: int, deterministic: bool) -> int:
    """float32 numbers that attention needs besides its output for any batch of at most `rows` rows: a partial result
    and its log-sum-exp for every part of a row."""
    if deterministic:
        vectors = (FIXED_SPLITS + 1) * rows * heads
    else:  # a range and the slab, and as many ranges more as there are processors, of tiles of 128 vectors
        vectors = 2 * rows * heads + min(MAX_SPLITS * rows * heads, MAX_PROCESSORS * 128)
    return vectors * (head_dim + 1)


def build(
    batch: Batch, heads: int, kv_heads: int, head_dim: int, page_size: int, float32: bool, deterministic: bool = False,
) -> Tiles:
    """Tiles of a batch whose contents are read back from its device: for single calls, not for captured graphs.

    Rows into a slab are taken for scores.
    """
    row_start, seq_group = batch.row_start.tolist(), batch.seq_group.tolist()
    kind: Kind = "score" if batch.into_slab else "prefill"
    keys = np.array(batch.prefix_len.tolist()) + (0 if batch.into_slab else np.diff(row_start))
    groups = groups_of(seq_group, keys.tolist())
    chosen = plan(row_start[-1], row_start, groups, kind, heads // kv_heads, head_dim, float32,
                  batch.block_tables.shape[1] * page_size, deterministic)
    return build_as(chosen, row_start, groups, kind, heads, kv_heads, head_dim, batch.row_start.device)


def build_as(
    plan: Plan, row_start: Sequence[int], groups: Sequence[Group], kind: Kind, heads: int, kv_heads: int, head_dim: int,
    device: torch.device | str, multiprocessors: int | None = None,
) -> Tiles:
    """Tiles of a given plan in new tensors."""
    device = torch.device(device)
    multiprocessors = multiprocessors or processors(device)
    rows = row_start[-1]
    found = work(row_start, groups, kind, heads, kv_heads, plan, multiprocessors)
    count = programs(rows, heads, plan.width, multiprocessors)
    items = np.zeros((1 + len(found.items) + spare_items(count, kv_heads), FIELDS), np.int32)
    items[0, 0] = len(found.items)
    items[1 : 1 + len(found.items)] = found.items
    row_parts = np.zeros((rows, 3), np.int32)
    if found.row_parts is not None:
        row_parts[:] = found.row_parts
    row_seq = np.repeat(np.arange(len(row_start) - 1, dtype=np.int32), np.diff(row_start))
    tensors = [torch.from_numpy(array).to(device) for array in (row_seq, row_parts, items)]
    return Tiles(tensors[0], tensors[1], tensors[2], *plan, count,
                 torch.empty(found.places * heads * (head_dim + 1), dtype=torch.float32, device=device),
                 torch.zeros(rows * kv_heads, dtype=torch.int32, device=device))
