"""Attention's tiles in buffers at fixed addresses, for passes that a GPU captures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stars.buffers import Buffers
from stars.config import EngineConfig
from stars.kernels.triton import tiles
from stars.kernels.types import Tiles
from stars.model.config import ModelConfig


class Tiling:
    """One set of tile buffers: of the drafts, or of the passes, of one model, for at most `max_rows` rows.

    capacity: keys a row of the block tables can hold. Plans of a deterministic engine depend on a pass' kind alone.
    """

    def __init__(self, model: ModelConfig, config: EngineConfig, max_rows: int, capacity: int):
        self.heads = model.num_heads
        self.kv_heads = model.num_kv_heads
        self.capacity = capacity
        self.deterministic = config.deterministic
        max_tiles = tiles.bucket(max_rows)  # a tile has a row at least
        self._buffers = Buffers(config.target, row_seq=(torch.int32, (max_rows,)),
                                prefix=(torch.int32, (max_tiles, 3)), slab=(torch.int32, (max_tiles, 3)))
        # For the most that a plan can ask for: growing it later would move it under the graphs that use it.
        size = tiles.max_workspace(max_rows, model.num_heads, model.head_dim, config.deterministic)
        self._workspace = torch.empty(size, dtype=torch.float32, device=config.target.device)

    def fill(self, rows: int, row_start: Sequence[int], seq_group: Sequence[int], kind: tiles.Kind,
             keys: Sequence[int]) -> Tiles:
        """Tiles of a pass of `rows` rows (idle ones included) whose sequences begin at `row_start`, sent to the device.

        keys: page keys that each sequence sees.
        """
        plan = tiles.plan(row_start, seq_group, kind, self.heads, self.kv_heads, keys, self.capacity,
                          self.deterministic)
        self._buffers.wait()
        used = tiles.fill(row_start, seq_group, kind != "prefill", self.heads // self.kv_heads, plan,
                          self._buffers.host("row_seq"), self._buffers.host("prefix"), self._buffers.host("slab"))
        self._buffers.upload()
        return Tiles(self._buffers["row_seq"][:rows], self._buffers["prefix"][: tiles.bucket(used[0])],
                     self._buffers["slab"][: tiles.bucket(max(1, used[1]))], *plan, self._workspace)


def shape(chosen: Tiles) -> tuple[int, ...]:
    """What of the tiles is fixed in a captured graph: part of its key."""
    return (len(chosen.prefix), len(chosen.slab), chosen.packed, chosen.packed_slab, chosen.splits, chosen.split_keys)
