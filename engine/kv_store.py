"""Keys and values of one model, in the rows of a PagedCache's pages and slabs."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.copy_rows import copy_rows
from stars.kernels.types import LayerKV
from stars.model.config import ModelConfig


class KVStore:
    """Allocated once, never zero-filled: what a row holds is for the ledger to say, which many models may share."""

    def __init__(self, shape: ModelConfig, page_rows: int, slab_rows: int, page_size: int, dtype: torch.dtype,
                 device: torch.device):
        if max(page_rows, slab_rows) * shape.num_kv_heads > 2**31 - 1:
            raise ValueError(f"the cache would have {max(page_rows, slab_rows)} rows of {shape.num_kv_heads} heads, "
                             "numbered in int32: lower the cache budget")
        row = (shape.num_kv_heads, shape.head_dim)
        self.k_pages = torch.empty(shape.num_layers, page_rows, *row, dtype=dtype, device=device)
        self.v_pages = torch.empty_like(self.k_pages)  # [layers, page_rows, kv_heads, head_dim]
        self.k_slabs = torch.empty(shape.num_layers, slab_rows, *row, dtype=dtype, device=device)
        self.v_slabs = torch.empty_like(self.k_slabs)  # [layers, slab_rows, kv_heads, head_dim]
        self._layers = [
            LayerKV(self.k_pages[i], self.v_pages[i], self.k_slabs[i], self.v_slabs[i], page_size)
            for i in range(shape.num_layers)
        ]

    def layer(self, i: int) -> LayerKV:
        """Views of layer `i`, always the same ones."""
        return self._layers[i]

    def commit_rows(self, source: Tensor, target: Tensor) -> None:
        """Copies slab rows `source` to page rows `target`, int32 [n], in every layer."""
        copy_rows(self.k_slabs, self.v_slabs, source, self.k_pages, self.v_pages, target)

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copies page rows `source` to page rows `target`, int32 [n], in every layer."""
        copy_rows(self.k_pages, self.v_pages, source, self.k_pages, self.v_pages, target)
