"""Keys and values from slab rows to page rows (a commit), or from page to page, in all layers at once."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import Implementation, operation


def copy_rows_reference(
    k_source: Tensor, v_source: Tensor, source: Tensor, k_target: Tensor, v_target: Tensor, target: Tensor,
) -> None:
    """As `copy_rows`."""
    source, target = source.long(), target.long()
    k_target[:, target] = k_source[:, source]
    v_target[:, target] = v_source[:, source]


def _float32(k_source: Tensor, *rest: Tensor) -> bool:
    return k_source.dtype == torch.float32


@operation(cpu=[Implementation("stars.bindings.libstars:copy_rows", when=_float32)],
           cuda="stars.kernels.triton.copy_rows:copy_rows", reference=copy_rows_reference)
def copy_rows(
    k_source: Tensor, v_source: Tensor, source: Tensor, k_target: Tensor, v_target: Tensor, target: Tensor,
) -> None:
    """Copies rows source[i] of k_source and v_source to rows target[i] of k_target and v_target, in every layer.

    k_*, v_* [layers, rows, kv_heads, head_dim]; source, target int32 [n]. Target rows are distinct, and none of them is
    a source row.
    """
