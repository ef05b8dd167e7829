"""From the fused projection to attention's inputs: QK norm, rotation, and the write of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.rms_norm import rms_norm_reference
from stars.kernels.types import Batch, LayerKV


def rope_write_reference(
    qkv: Tensor, batch: Batch, cos: Tensor, sin: Tensor, kv: LayerKV, q_out: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> None:
    """Splits qkv, normalises and rotates queries and keys, writes keys and values where batch.slots says.

    qkv [rows, (heads + 2 * kv_heads) * head_dim], queries first; q_out [rows, heads, head_dim]; cos, sin float32
    [positions, head_dim / 2], read at batch.positions; q_norm, k_norm [head_dim] or None. Halves are rotated as
    (x1 cos - x2 sin, x2 cos + x1 sin) with x1, x2 the two halves of a head (Su et al., arXiv 2104.09864, in the
    half-split form). A slot of -1 writes nothing.
    """
    heads, head_dim = q_out.shape[1:]
    kv_heads = kv.k_pages.shape[1]
    rows = qkv.shape[0]
    q, k, v = qkv.view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)  # [rows, heads, head_dim]
    if q_norm is not None and k_norm is not None:
        q, k = q.contiguous(), k.contiguous()
        rms_norm_reference(q, q_norm, eps, q)
        rms_norm_reference(k, k_norm, eps, k)
    positions = batch.positions.long()
    c, s = cos[positions][:, None].to(qkv.dtype), sin[positions][:, None].to(qkv.dtype)  # [rows, 1, head_dim / 2]
    q_out.copy_(_rotate(q, c, s))
    written = (batch.slots >= 0).nonzero()[:, 0]
    slots = batch.slots[written].long()
    keys, values = (kv.k_slabs, kv.v_slabs) if batch.into_slab else (kv.k_pages, kv.v_pages)
    keys[slots] = _rotate(k, c, s)[written].to(keys.dtype)
    values[slots] = v[written].to(values.dtype)


@operation(cpu="stars.bindings.libstars:rope_write", cuda="stars.kernels.triton.rope_write:rope_write",
           reference=rope_write_reference)
def rope_write(
    qkv: Tensor, batch: Batch, cos: Tensor, sin: Tensor, kv: LayerKV, q_out: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> None:
    """Splits qkv, normalises and rotates queries and keys, writes keys and values; see `rope_write_reference`."""



def _rotate(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)
