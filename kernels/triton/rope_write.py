"""QK norm, rotation, and the write of keys and values on a GPU: one launch from the projection to attention's inputs.

Bytes: a row is read and written once, 2 * rows * (heads + 2 * kv_heads) * head_dim * itemsize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.variant import Variant
from stars.kernels.types import Batch, LayerKV

HEADS_AT_A_TIME = 4
"""Heads a program works on. Always the same, so that the sum of squares of a head is taken in the same order."""


@triton.jit
def rope_write_kernel(
    qkv, positions, slots, cos, sin, keys, values, q_out, q_norm, k_norm, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    AT_A_TIME: tl.constexpr, NORM: tl.constexpr,
):
    """One program: AT_A_TIME adjacent heads of one row of qkv; WIDTH is a power of two, at least HEAD_DIM / 2.

    All in float32, rounded once at the end.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    BLOCKS: tl.constexpr = (ALL + AT_A_TIME - 1) // AT_A_TIME
    row = tl.program_id(0) // BLOCKS
    head = tl.program_id(0) % BLOCKS * AT_A_TIME + tl.arange(0, AT_A_TIME)
    column = tl.arange(0, WIDTH)
    inside = (column < HALF)[None, :]
    live = (head < ALL)[:, None] & inside
    is_query = (head < HEADS)[:, None]
    is_value = (head >= HEADS + KV_HEADS)[:, None]
    at = (row.to(tl.int64) * (ALL * HEAD_DIM) + head * HEAD_DIM)[:, None] + column[None, :]
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    low = tl.load(qkv + at, mask=live, other=0.0).to(tl.float32)
    high = tl.load(qkv + at + HALF, mask=live, other=0.0).to(tl.float32)
    turned_low, turned_high = low, high
    if NORM:
        square = tl.sum(low * low + high * high, 1)
        factor = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        in_half = column < HALF
        query_low = tl.load(q_norm + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
        query_high = tl.load(q_norm + HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
        key_low = tl.load(k_norm + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
        key_high = tl.load(k_norm + HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
        turned_low = low * factor * tl.where(is_query, query_low, key_low)
        turned_high = high * factor * tl.where(is_query, query_high, key_high)
    c = tl.load(cos + position * HALF + column, mask=column < HALF, other=0.0)[None, :]
    s = tl.load(sin + position * HALF + column, mask=column < HALF, other=0.0)[None, :]
    out_low = turned_low * c - turned_high * s
    out_high = turned_high * c + turned_low * s
    q_at = ((row.to(tl.int64) * HEADS + head) * HEAD_DIM)[:, None] + column[None, :]
    to_query = is_query & inside
    tl.store(q_out + q_at, out_low.to(q_out.dtype.element_ty), mask=to_query)
    tl.store(q_out + q_at + HALF, out_high.to(q_out.dtype.element_ty), mask=to_query)
    # No `live & (slot >= 0)`: the interpreter takes a scalar with a block of booleans for an int32, and from Triton
    # 3.9 on no such mask.
    written = (head < tl.where(slot >= 0, ALL, 0))[:, None] & inside
    k_at = ((slot * KV_HEADS + head - HEADS) * HEAD_DIM)[:, None] + column[None, :]
    to_key = written & (is_query == 0) & (is_value == 0)
    tl.store(keys + k_at, out_low.to(keys.dtype.element_ty), mask=to_key)
    tl.store(keys + k_at + HALF, out_high.to(keys.dtype.element_ty), mask=to_key)
    v_at = k_at - KV_HEADS * HEAD_DIM
    to_value = written & is_value
    tl.store(values + v_at, low.to(values.dtype.element_ty), mask=to_value)
    tl.store(values + v_at + HALF, high.to(values.dtype.element_ty), mask=to_value)


def rope_write(
    qkv: Tensor, batch: Batch, cos: Tensor, sin: Tensor, kv: LayerKV, q_out: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> None:
    """As `rope_write_reference`, but rounded once at the end. All tensors are contiguous; both norms or none."""
    rows, heads, head_dim = q_out.shape
    kv_heads = kv.k_pages.shape[1]
    keys, values = (kv.k_slabs, kv.v_slabs) if batch.into_slab else (kv.k_pages, kv.v_pages)
    if not all(tensor.is_contiguous() for tensor in (qkv, q_out, keys, values, cos, sin)):
        raise ValueError("rope_write on a GPU takes contiguous tensors")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_write on a GPU takes norms of queries and keys together")
    if rows == 0:
        return
    blocks = triton.cdiv(heads + 2 * kv_heads, HEADS_AT_A_TIME)
    rope_write_kernel[(rows * blocks,)](
        qkv, batch.positions, batch.slots, cos, sin, keys, values, q_out, cos if q_norm is None else q_norm,
        cos if k_norm is None else k_norm, eps, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim // 2), AT_A_TIME=HEADS_AT_A_TIME, NORM=q_norm is not None, num_warps=1)


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def variants() -> list[Variant]:
    """Every head size in every type, with and without norms."""
    found = []
    for dtype, number in _TYPES.items():
        for head_dim in (64, 80, 96, 128, 256):
            for norm in (False, True):
                constexprs = dict(HEADS=32, KV_HEADS=8, HEAD_DIM=head_dim, AT_A_TIME=HEADS_AT_A_TIME, NORM=norm,
                                  WIDTH=triton.next_power_of_2(head_dim // 2))
                kinds = dict.fromkeys(constexprs, "constexpr")
                kinds |= {"positions": "*i32", "slots": "*i32", "cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
                if not norm:
                    kinds |= {"q_norm": "*fp32", "k_norm": "*fp32"}  # the cosines stand in for them
                signature = {name: kinds.get(name, "*" + number) for name in rope_write_kernel.arg_names}
                found.append(Variant(f"rope_write {head_dim} {number}{' norm' * norm}", rope_write_kernel, signature,
                                     constexprs, 1, 1))
    return found
