"""The division of a batch's rows into tiles for attention on a GPU: host side, no Triton needed.

A tile is a run of adjacent rows that one program per KV head works on. The query heads that share a KV head (H of them)
are packed with the rows: a tile of R rows is a matrix of R * H query vectors, at most `packed`, so R = packed // H.
Prefix tiles hold rows of one group, lanes of one request, since they read the same pages; slab tiles hold rows of one
sequence. No tile crosses a group (a sequence), and each begins where the one before ended.

A captured graph fixes the number of tiles, not their contents: the tensors are as long as a bucket says, and tiles
that hold 0 rows end at once. Since empty programs are not free either, a graph is best keyed by
`bucket(number of tiles)`, besides the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from stars.kernels.types import Batch, Tiles

MAX_SPLITS = 16
"""Parts a context is divided into at most: each costs a pass of a row's partial result through memory."""

SPLIT_MULTIPLE = 256
"""split_keys is a multiple of this, and so of every block of keys a kernel reads at a time."""

PROGRAMS_WANTED = 132
"""Programs that fill a card once: the processors of an H100 or H200 (an A100 has 108, a B200 148)."""

MAX_PARTIAL = 2 * PROGRAMS_WANTED * 128
"""Query vectors whose partial results a plan may ask for, over all splits: twice a card full of the largest tiles."""

Kind = Literal["draft", "score", "prefill"]
"""Of a pass: one row a sequence after its slab, rows into slabs, rows into pages."""


class Plan(NamedTuple):
    """The numbers of `Tiles`: what is fixed when a graph is captured."""

    packed: int
    packed_slab: int
    splits: int
    split_keys: int


def bucket(count: int) -> int:
    """The next power of two: tensors of tiles have such lengths, so that there are few graphs."""
    return 1 << max(0, count - 1).bit_length()


def packing(max_rows: int, heads_per_kv: int) -> int:
    """Packed rows of a full tile when no group (or sequence) has more than `max_rows` rows: 16, 32, 64 or 128.

    16 is the least height of a tensor core product; more than 128 would leave no registers for the sums.
    """
    return min(128, max(16, bucket(max_rows * heads_per_kv), bucket(heads_per_kv)))


def plan(
    row_start: Sequence[int], seq_group: Sequence[int], kind: Kind, heads: int, kv_heads: int, keys: Sequence[int],
    capacity: int, deterministic: bool = False,
) -> Plan:
    """How to divide a batch of this shape. keys: page keys that each sequence sees; capacity: keys a row of the block
    tables can hold, a constant of the engine.

    Deterministic plans depend on the kind of the pass alone, which is given and not seen: a score of one row is no
    draft. How many sequences there are and how long they are does not enter, nor does it then into the bits of a row.
    """
    heads_per_kv = heads // kv_heads
    if deterministic:
        split_keys = -(-capacity // MAX_SPLITS)
        split_keys = -(-split_keys // SPLIT_MULTIPLE) * SPLIT_MULTIPLE
        if kind == "prefill":  # partial results of long chunks would be large; their programs fill a card as they are
            return Plan(128, 128, 1, 0)
        draft = kind == "draft"
        return Plan(64 if draft else 128, packing(1, heads_per_kv) if draft else 128, -(-capacity // split_keys),
                    split_keys)
    counts = np.diff(np.asarray(row_start))
    in_group = np.bincount(np.asarray(seq_group), weights=counts)
    packed = packing(int(in_group.max()), heads_per_kv)
    tiles = np.ceil(in_group / (packed // heads_per_kv))  # [groups]
    seen = np.zeros(len(in_group))
    np.maximum.at(seen, seq_group, keys)
    longest = max(1.0, seen.max())
    # As many parts of the longest context as make one program's share of all keys of one of them: where one context is
    # long, its programs would read on after all others have ended.
    share = max(1.0, float((tiles * seen).sum())) * kv_heads / PROGRAMS_WANTED
    # Parts of fewer than 128 keys spend more time on their partial results than on their keys. The length enters by its
    # power of two, so that few graphs serve all.
    splits = bucket(max(1, int(min(MAX_SPLITS, longest / share, min(capacity, bucket(int(longest))) // 128))))
    while splits > 1 and splits * row_start[-1] * heads > MAX_PARTIAL:
        splits //= 2
    return Plan(packed, packing(int(counts.max()), heads_per_kv), splits, 0)


def tile_table(row_start: Sequence[int], owner: Sequence[int], rows_per_tile: int) -> np.ndarray:
    """int32 [tiles, 3]: (owner, first row, rows) of each tile; owner[s] is the group of sequence s, or s itself."""
    tiles: list[tuple[int, int, int]] = []
    sequence = 0
    while sequence < len(owner):
        begin = row_start[sequence]
        held_by = owner[sequence]
        while sequence < len(owner) and owner[sequence] == held_by:
            sequence += 1
        end = row_start[sequence]
        tiles += [(held_by, row, min(rows_per_tile, end - row)) for row in range(begin, end, rows_per_tile)]
    return np.array(tiles, dtype=np.int32).reshape(-1, 3)


def fill(
    row_start: Sequence[int], seq_group: Sequence[int], into_slab: bool, heads_per_kv: int, plan: Plan,
    row_seq: np.ndarray, prefix: np.ndarray, slab: np.ndarray,
) -> tuple[int, int]:
    """Writes the tiles of a batch into int32 buffers [rows], [tiles, 3], [slab tiles, 3]; what is left of them is
    zeroed. Returns the tiles used, (prefix, slab). Raises ValueError if a buffer is too short."""
    sequences = range(len(seq_group))
    prefix_tiles = tile_table(row_start, seq_group, plan.packed // heads_per_kv)
    slab_tiles = tile_table(row_start, sequences, plan.packed_slab // heads_per_kv) if into_slab else prefix_tiles[:0]
    for buffer, tiles in ((prefix, prefix_tiles), (slab, slab_tiles)):
        if len(tiles) > len(buffer):
            raise ValueError(f"{len(tiles)} tiles do not fit a buffer of {len(buffer)}")
        buffer[: len(tiles)] = tiles
        buffer[len(tiles) :] = 0
    row_seq[: row_start[-1]] = np.repeat(sequences, np.diff(row_start))
    row_seq[row_start[-1] :] = 0
    return len(prefix_tiles), len(slab_tiles)


def max_tiles(rows: int, sequences: int, packed: int, heads_per_kv: int) -> int:
    """Upper bound of the tiles of any batch of this many rows and sequences."""
    return min(rows, rows // (packed // heads_per_kv) + sequences)


def workspace_size(plan: Plan, into_slab: bool, rows: int, heads: int, head_dim: int) -> int:
    """float32 numbers that attention needs besides its output: a partial result and its log-sum-exp a part."""
    parts = plan.splits + into_slab
    return 0 if parts == 1 else parts * rows * heads * (head_dim + 1)


def max_workspace(rows: int, heads: int, head_dim: int, deterministic: bool) -> int:
    """`workspace_size` of the largest plan for at most `rows` rows, idle ones included."""
    size = (MAX_SPLITS + 1) * rows * heads
    if not deterministic:
        size = min(size, 2 * MAX_PARTIAL + 2 * rows * heads)  # idle rows at most double the rows; and the slab's part
    return size * (head_dim + 1)


def build(batch: Batch, heads: int, kv_heads: int, page_size: int, deterministic: bool = False) -> Tiles:
    """Tiles of a batch whose contents are read back from its device: for single calls, not for captured graphs.

    Rows into a slab are taken for scores.
    """
    row_start, seq_group = batch.row_start.tolist(), batch.seq_group.tolist()
    keys = np.array(batch.prefix_len.tolist()) + (0 if batch.into_slab else np.diff(row_start))
    capacity = batch.block_tables.shape[1] * page_size
    chosen = plan(row_start, seq_group, "score" if batch.into_slab else "prefill", heads, kv_heads, keys.tolist(),
                  capacity, deterministic)
    return build_as(chosen, row_start, seq_group, batch.into_slab, heads // kv_heads, batch.row_start.device)


def build_as(
    plan: Plan, row_start: Sequence[int], seq_group: Sequence[int], into_slab: bool, heads_per_kv: int,
    device: torch.device | str,
) -> Tiles:
    """Tiles of a given plan in new tensors."""
    rows, sequences = row_start[-1], len(seq_group)
    buffers = [np.zeros(rows, np.int32)] + [
        np.zeros((max_tiles(rows, sequences, packed, heads_per_kv), 3), np.int32)
        for packed in (plan.packed, plan.packed_slab)
    ]
    used = fill(row_start, seq_group, into_slab, heads_per_kv, plan, *buffers)
    row_seq, prefix, slab = (torch.from_numpy(buffer).to(device) for buffer in buffers)
    return Tiles(row_seq, prefix[: bucket(used[0])], slab[: bucket(used[1])], *plan)
