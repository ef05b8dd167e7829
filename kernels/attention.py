"""Attention over committed pages and a drafted slab, in one ragged batch."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import Implementation, operation
from stars.kernels.prefill_attention import prefill_attention
from stars.kernels.types import Batch, LayerKV


def attention_reference(
    q: Tensor, kv: LayerKV, batch: Batch, scale: float, out: Tensor,
    window: int | None = None, softcap: float | None = None,
) -> None:
    """Causal grouped-query attention; which keys a row sees is said at `Batch`.

    q, out [rows, heads, head_dim]. With `window`, a key at position p is seen from position t only if t - p < window.
    With `softcap` c, scores become c * tanh(score / c) before the softmax. Softmax in float32.
    """
    heads = q.shape[1]
    repeat = heads // kv.k_pages.shape[1]
    starts, groups = batch.row_start.tolist(), batch.seq_group.tolist()
    prefix_len, slab_start, slab_used = batch.prefix_len.tolist(), batch.slab_start.tolist(), batch.slab_used.tolist()
    for seq, group in enumerate(groups):
        rows = slice(starts[seq], starts[seq + 1])
        count, prefix = starts[seq + 1] - starts[seq], prefix_len[seq]
        in_pages = prefix if batch.into_slab else prefix + count  # page keys that some row of this sequence sees
        at = torch.arange(in_pages, device=q.device)
        page_rows = batch.block_tables[group].long()[at // kv.page_size] * kv.page_size + at % kv.page_size
        keys, values = kv.k_pages[page_rows], kv.v_pages[page_rows]  # [keys, kv_heads, head_dim]
        if batch.into_slab:
            slab = slice(slab_start[seq], slab_start[seq] + slab_used[seq] + count)
            keys, values = torch.cat((keys, kv.k_slabs[slab])), torch.cat((values, kv.v_slabs[slab]))
        keys = keys.repeat_interleave(repeat, dim=1).float()  # [keys, heads, head_dim]
        values = values.repeat_interleave(repeat, dim=1).float()
        scores = torch.einsum("rhd,khd->hrk", q[rows].float(), keys) * scale  # [heads, rows, keys]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        key_position = torch.arange(keys.shape[0], device=q.device)
        row_position = keys.shape[0] - count + torch.arange(count, device=q.device)
        distance = row_position[:, None] - key_position[None, :]  # [rows, keys]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = scores.masked_fill(~seen, -torch.inf)
        out[rows] = torch.einsum("hrk,khd->rhd", scores.softmax(-1), values).to(out.dtype)


def _by_library(
    q: Tensor, kv: LayerKV, batch: Batch, scale: float, out: Tensor,
    window: int | None = None, softcap: float | None = None,
) -> None:
    assert batch.prefill is not None
    prefill_attention(q, kv, batch.prefill, scale, out, window, softcap)


def _library_chosen(q: Tensor, kv: LayerKV, batch: Batch, *rest: object) -> bool:
    return batch.prefill is not None


_LIBRARY = Implementation(_by_library, _library_chosen)


@operation(cpu=[_LIBRARY, Implementation("stars.bindings.libstars:attention")],
           cuda=[_LIBRARY, Implementation("stars.kernels.triton.attention:attention")], reference=attention_reference)
def attention(
    q: Tensor, kv: LayerKV, batch: Batch, scale: float, out: Tensor,
    window: int | None = None, softcap: float | None = None,
) -> None:
    """Causal grouped-query attention over committed pages and the slab; see `attention_reference`."""
