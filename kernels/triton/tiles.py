"""The division of a batch's rows and keys into work for attention on a GPU: host side, no Triton needed.

A tile is a run of adjacent rows of one group, lanes of one request, which read the same pages. The query heads that
share a KV head (H of them) are packed with the rows: a tile of R rows is a matrix of R * H query vectors, at most
`width`, so R = width // H. Its page keys are divided into `splits` ranges, of which a long context has many and a short
one has one; its slab keys are a part more, by sequences: no piece of that crosses a sequence or a tile.

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
"""Keys of a range: fewer spend more time on their partial result than on themselves."""

KEYS_MULTIPLE = 128
"""Where ranges begin, a multiple of every block of keys."""

MAX_PROCESSORS = 160
"""Multiprocessors that contexts are divided among at most (an A100 has 108, an H100 or H200 132, a B200 148)."""

WIDE_COST = 1.5
"""Time of a key in a wide tile over that in a narrow one, which is bound by memory."""

FIELDS = 12
"""int32 numbers of an item: group (of a slab: sequence); first row; rows; first key; end of keys; number of the range (of
a slab: `splits`); ranges of the tile; the tile's place in the workspace, in rows; its first row; its rows; items of the
tile; unused. The list begins with an entry as long, which holds the number of items."""

Kind = Literal["draft", "score", "prefill"]
"""Of a pass: one row a sequence after its slab, rows into slabs, rows into pages."""


class Plan(NamedTuple):
    """The numbers of `Tiles` that say how work is divided."""

    width: int
    slab_width: int
    split_keys: int


class Work(NamedTuple):
    """The list of work of a batch, as the device reads it."""

    items: np.ndarray  # int32 [items, FIELDS]
    row_parts: np.ndarray  # int32 [rows, 3]
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


def plan(
    rows: int, row_start: Sequence[int], seq_group: Sequence[int], kind: Kind, heads_per_kv: int, head_dim: int,
    float32: bool, keys: Sequence[int], capacity: int, deterministic: bool = False,
) -> Plan:
    """How to divide a batch of `rows` rows, idle ones included. keys: page keys that each sequence sees; capacity: keys a
    row of the block tables can hold, a constant of the engine.

    Deterministic plans depend on the kind of the pass alone, which is given and not seen: a score of one row is no
    draft. How many sequences there are and how long they are does not enter, nor does it then into the bits of a row.
    """
    possible = widths(rows, kind, heads_per_kv, head_dim, float32, deterministic)
    width = possible[0]
    if len(possible) > 1:
        narrow, wide = NARROW // heads_per_kv, possible[1] // heads_per_kv
        costs = [0.0, 0.0]
        sequence, sequences = 0, len(seq_group)
        while sequence < sequences:
            start = sequence
            sequence = _end_of_group(seq_group, start)
            count = row_start[sequence] - row_start[start]
            longest = max(1, *keys[start:sequence])
            costs[0] += -(-count // narrow) * longest
            costs[1] += -(-count // wide) * longest * WIDE_COST
        width = possible[costs[1] < costs[0]]
    return plan_of(width, kind, capacity, deterministic)


def plan_of(width: int, kind: Kind, capacity: int, deterministic: bool) -> Plan:
    """The plan of a pass whose tiles are so wide."""
    split_keys = 0
    if deterministic:  # partial results of long chunks would be large; their programs fill a card as they are
        split_keys = -(-capacity // FIXED_SPLITS // SPLIT_MULTIPLE) * SPLIT_MULTIPLE if kind != "prefill" else 1 << 30
    return Plan(width, NARROW if kind == "draft" else width, split_keys)


def _end_of_group(seq_group: Sequence[int], start: int) -> int:
    """The sequence after the last of the group of sequence `start`."""
    group, sequence, sequences = seq_group[start], start + 1, len(seq_group)
    while sequence < sequences and seq_group[sequence] == group:
        sequence += 1
    return sequence


def tiles_of(
    row_start: Sequence[int], seq_group: Sequence[int], kind: Kind, rows_per_tile: int, keys: Sequence[int],
) -> list[tuple[int, int, int, int]]:
    """(group, first row, rows, end of the page keys that it sees) of each tile, in order of rows."""
    found: list[tuple[int, int, int, int]] = []
    sequence, sequences = 0, len(seq_group)
    while sequence < sequences:
        start = sequence
        sequence = _end_of_group(seq_group, start)
        begin, end = row_start[start], row_start[sequence]
        longest = max(keys[start:sequence])
        # Of one causal sequence, a tile sees no further than its last row; of several, masks see to the rest.
        hidden = kind == "prefill" and sequence == start + 1
        for row in range(begin, end, rows_per_tile):
            stop = min(row + rows_per_tile, end)
            found.append((seq_group[start], row, stop - row, longest - (end - stop) * hidden))
    return found


def range_keys(ends: Sequence[int], kv_heads: int, multiprocessors: int) -> int:
    """Keys of a range: as many as make one processor's share of all keys of all tiles.

    The longest context is not divided further than MAX_SPLITS. Where there are fewer tiles than processors, ranges are
    as long as is needed for one each, as a second one would double the time.
    """
    share = -(-sum(ends) * kv_heads // multiprocessors)
    length = max(LEAST_KEYS, share, -(-max(ends) // MAX_SPLITS))
    length = -(-length // KEYS_MULTIPLE) * KEYS_MULTIPLE
    most = multiprocessors // kv_heads
    if len(ends) < most:
        while sum([-(-end // length) for end in ends]) > most:
            length += max(KEYS_MULTIPLE, length // 8 // KEYS_MULTIPLE * KEYS_MULTIPLE)
    return length


def work(
    row_start: Sequence[int], seq_group: Sequence[int], kind: Kind, heads: int, kv_heads: int, keys: Sequence[int],
    plan: Plan, multiprocessors: int,
) -> Work:
    """The list of work of a batch under a plan, long ranges first."""
    tiles = tiles_of(row_start, seq_group, kind, plan.width // (heads // kv_heads), keys)
    into_slab = kind != "prefill"
    table = np.array(tiles, dtype=np.int32).reshape(-1, 4)
    rows, ends = table[:, 2], table[:, 3]
    length = plan.split_keys or range_keys([tile[3] for tile in tiles], kv_heads, min(multiprocessors, MAX_PROCESSORS))
    splits = -(-ends // length)
    parts = splits + into_slab
    kept = rows * parts * (parts > 1)
    places = np.cumsum(kept)
    first_place = places - kept
    # Pieces of slabs: cut where a sequence or a tile begins.
    if kind == "draft":
        starts = np.arange(row_start[-1])
        sequences = starts
    elif into_slab:
        starts = np.unique(np.concatenate((np.asarray(row_start[:-1]), table[:, 1])))
        sequences = np.searchsorted(np.asarray(row_start), starts, "right") - 1
    else:
        starts = sequences = np.zeros(0, np.int64)
    tile_of_piece = np.searchsorted(table[:, 1], starts, "right") - 1
    arrivals = splits + np.bincount(tile_of_piece, minlength=len(tiles)) if into_slab else splits
    ranges = int(splits.sum())
    items = np.zeros((ranges + len(starts), FIELDS), np.int32)
    tile = np.repeat(np.arange(len(tiles)), splits)
    split = np.arange(ranges) - np.repeat(np.cumsum(splits) - splits, splits)
    items[:ranges, :3] = table[tile, :3]
    items[:ranges, 3] = split * length
    items[:ranges, 4] = np.minimum(ends[tile], (split + 1) * length)
    items[:ranges, 5] = split
    if into_slab:
        pieces = items[ranges:]
        pieces[:, 0], pieces[:, 1] = sequences, starts
        pieces[:-1, 2] = starts[1:] - starts[:-1]
        pieces[-1, 2] = row_start[-1] - starts[-1]
        pieces[:, 5] = splits[tile_of_piece]
        tile = np.concatenate((tile, tile_of_piece))
    common = np.stack((splits, first_place, table[:, 1], rows, arrivals), 1)
    items[:, 6:11] = common[tile]
    if ranges * kv_heads > multiprocessors:  # else all begin at once
        order = np.argsort(items[:ranges, 3] - items[:ranges, 4], kind="stable")
        items[:ranges] = items[order]
    row_parts = np.repeat(np.stack((first_place, rows, parts), 1), rows, 0)
    row_parts[:, 0] += np.arange(row_start[-1]) - np.repeat(table[:, 1], rows)
    return Work(items, row_parts, int(places[-1]))


def spare_items(programs: int, kv_heads: int) -> int:
    """Items behind the list that are read, and not used: each program reads ahead by a unit, `programs` further on."""
    return -(-programs // kv_heads) + 1


def max_items(rows: int, kv_heads: int, deterministic: bool) -> int:
    """Upper bound of the items of any batch of at most `rows` rows, those that end the list apart."""
    # A tile and a piece of a slab have a row at least; of ranges beyond one a tile there is one a processor at most.
    return rows * (1 + (FIXED_SPLITS if deterministic else 1)) + MAX_PROCESSORS // kv_heads


def max_workspace(rows: int, heads: int, head_dim: int, deterministic: bool) -> int:
    """float32 numbers that attention needs besides its output for any batch of at most `rows` rows: a partial result and
    its log-sum-exp for every part of a row."""
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
    chosen = plan(row_start[-1], row_start, seq_group, kind, heads // kv_heads, head_dim, float32, keys.tolist(),
                  batch.block_tables.shape[1] * page_size, deterministic)
    return build_as(chosen, row_start, seq_group, kind, heads, kv_heads, head_dim, keys.tolist(),
                    batch.row_start.device)


def build_as(
    plan: Plan, row_start: Sequence[int], seq_group: Sequence[int], kind: Kind, heads: int, kv_heads: int, head_dim: int,
    keys: Sequence[int], device: torch.device | str, multiprocessors: int | None = None,
) -> Tiles:
    """Tiles of a given plan in new tensors."""
    device = torch.device(device)
    multiprocessors = multiprocessors or processors(device)
    found = work(row_start, seq_group, kind, heads, kv_heads, keys, plan, multiprocessors)
    count = programs(row_start[-1], heads, plan.width, multiprocessors)
    items = np.zeros((1 + len(found.items) + spare_items(count, kv_heads), FIELDS), np.int32)
    items[0, 0] = len(found.items)
    items[1 : 1 + len(found.items)] = found.items
    row_seq = np.repeat(np.arange(len(seq_group), dtype=np.int32), np.diff(row_start))
    tensors = (torch.from_numpy(array).to(device) for array in (row_seq, found.row_parts.astype(np.int32), items))
    return Tiles(*tensors, *plan, count,
                 torch.empty(found.places * heads * (head_dim + 1), dtype=torch.float32, device=device),
                 torch.zeros(row_start[-1] * kv_heads, dtype=torch.int32, device=device))
