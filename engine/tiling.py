"""Attention's work in buffers at fixed addresses, for passes that a GPU captures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stars.buffers import Buffers
from stars.config import EngineConfig
from stars.kernels.triton import tiles
from stars.kernels.types import Tiles
from stars.model.config import ModelConfig


class Tiling:
    """One list of attention's work: of the drafts, or of the passes, of one model, for at most `max_rows` rows.

    capacity: keys a row of the block tables can hold. Plans of a deterministic engine depend on a pass' kind alone.
    """

    def __init__(self, model: ModelConfig, config: EngineConfig, max_rows: int, capacity: int):
        self.heads = model.num_heads
        self.kv_heads = model.num_kv_heads
        self.head_dim = model.head_dim
        self.float32 = config.target.float32 or config.dtype == "float32"
        self.capacity = capacity
        self.deterministic = config.deterministic
        device = torch.device(config.target.device)
        self._processors = tiles.processors(device)
        self._rows = -(-max_rows // 4) * 4  # which keeps what follows aligned to 16 bytes
        spare = tiles.spare_items(self._programs(max_rows, tiles.NARROW), self.kv_heads)
        items = 1 + tiles.max_items(max_rows, self.kv_heads, self.deterministic) + spare
        # Sequences of rows, parts of rows, and the list, in one: it is sent as far as the list goes.
        self._buffers = Buffers(config.target, table=(torch.int32, (4 * self._rows + items * tiles.FIELDS,)))
        # For the most that a plan can ask for: growing it later would move it under the graphs that use it.
        size = tiles.max_workspace(max_rows, self.heads, self.head_dim, self.deterministic)
        self._workspace = torch.empty(size, dtype=torch.float32, device=device)
        self._tickets = torch.zeros(max_rows * self.kv_heads, dtype=torch.int32, device=device)
        self._views: dict[tuple[int, tiles.Plan], Tiles] = {}

    def fill(self, rows: int, row_start: Sequence[int], seq_group: Sequence[int], kind: tiles.Kind,
             keys: Sequence[int]) -> Tiles:
        """Work of a pass of `rows` rows (idle ones included) whose sequences begin at `row_start`, sent to the device.

        keys: page keys that each sequence sees.
        """
        groups = tiles.groups_of(seq_group, keys)
        plan = tiles.plan(rows, row_start, groups, kind, self.heads // self.kv_heads, self.head_dim, self.float32,
                          self.capacity, self.deterministic)
        work = tiles.work(row_start, groups, kind, self.heads, self.kv_heads, plan, self._processors)
        used = row_start[-1]
        self._buffers.wait()
        table = self._buffers.host("table")
        sequences = np.arange(len(seq_group))
        table[:used] = sequences if kind == "draft" else sequences.repeat(np.diff(row_start))
        if work.row_parts is not None:
            row_parts = table[self._rows : self._rows + 3 * rows].reshape(-1, 3)
            row_parts[:used] = work.row_parts
            row_parts[used:] = 0
        self._send(work.items)
        return self._tiles(rows, plan)

    def shapes(self, rows: int, kind: tiles.Kind) -> list[Tiles]:
        """One without any work for every shape that `fill` can return for a pass of so many rows and this kind."""
        heads_per_kv = self.heads // self.kv_heads
        plans = [tiles.plan_of(width, kind, self.head_dim, self.float32, self.capacity, self.deterministic)
                 for width in tiles.widths(rows, kind, heads_per_kv, self.head_dim, self.float32, self.deterministic)]
        self._buffers.wait()
        self._buffers.host("table")[self._rows : self._rows + 3 * rows] = 0
        self._send(np.zeros((0, tiles.FIELDS), np.int32))
        return [self._tiles(rows, plan) for plan in plans]

    def _send(self, items: np.ndarray) -> None:
        """Writes the list, and sends the table as far as that."""
        table, start = self._buffers.host("table"), 4 * self._rows + tiles.FIELDS
        table[start - tiles.FIELDS] = len(items)
        table[start : start + items.size] = items.reshape(-1)
        self._buffers.upload(4 * (start + items.size))

    def _programs(self, rows: int, width: int) -> int:
        return tiles.programs(rows, self.heads, width, self._processors)

    def _tiles(self, rows: int, plan: tiles.Plan) -> Tiles:
        """Views of the table for a pass of `rows` rows."""
        found = self._views.get((rows, plan))
        if found is None:
            table, start = self._buffers["table"], self._rows
            found = self._views[rows, plan] = Tiles(
                table[:rows], table[start : start + 3 * rows].view(-1, 3), table[4 * start :].view(-1, tiles.FIELDS),
                *plan, self._programs(rows, plan.width), self._workspace, self._tickets)
        return found


def shape(chosen: Tiles) -> tuple[int, ...]:
    """What of the work is fixed in a captured graph, besides its rows and its kind: part of its key."""
    return (chosen.width, chosen.lanes, chosen.split_keys)
