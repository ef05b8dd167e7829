"""A commit: rows of slabs to rows of pages, keys and values, all layers, one launch.

    k_target[layer, target[i]] = k_source[layer, source[i]], the same for values

One program copies the keys and values of one row of one layer (1024 numbers of each). Rows are copied as they are, so
pages equal slabs byte for byte. A negative source or target copies nothing, so that a captured graph can hold a fixed
number of rows.

Bytes: 4 * layers * n * kv_heads * head_dim * itemsize (keys and values, in and out).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.variant import Variant


@triton.jit
def copy_rows_kernel(k_source, v_source, source, k_target, v_target, target, source_stride, target_stride,
                     WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, layers, blocks of a row): keys and values of row source[i] to row target[i]; -1 copies nothing."""
    i = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    from_row = tl.load(source + i).to(tl.int64)
    to_row = tl.load(target + i).to(tl.int64)
    if (from_row >= 0) & (to_row >= 0):
        column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        inside = column < WIDTH
        read = layer * source_stride + from_row * WIDTH + column
        write = layer * target_stride + to_row * WIDTH + column
        keys = tl.load(k_source + read, mask=inside)
        values = tl.load(v_source + read, mask=inside)
        tl.store(k_target + write, keys, mask=inside)
        tl.store(v_target + write, values, mask=inside)


def copy_rows(
    k_source: Tensor, v_source: Tensor, source: Tensor, k_target: Tensor, v_target: Tensor, target: Tensor,
) -> None:
    """As `stars.kernels.copy_rows`; pairs with a negative row are left out."""
    layers, _, kv_heads, head_dim = k_source.shape
    for name, tensor, like in (("v_source", v_source, k_source), ("v_target", v_target, k_target)):
        if tensor.shape != like.shape or tensor.stride() != like.stride() or tensor.dtype != like.dtype:
            raise ValueError(f"copy_rows: {name} is {tensor.dtype} {list(tensor.shape)}, unlike its keys "
                             f"{like.dtype} {list(like.shape)}")
    if k_source.dtype != k_target.dtype or k_target.shape[0] != layers or k_target.shape[2:] != (kv_heads, head_dim):
        raise ValueError(f"copy_rows: rows of {k_source.dtype} {list(k_source.shape)} do not fit "
                         f"{k_target.dtype} {list(k_target.shape)}")
    if not (k_source[0].is_contiguous() and k_target[0].is_contiguous()):
        raise ValueError("copy_rows: the rows of a layer must be contiguous")
    count, width = source.shape[0], kv_heads * head_dim
    if count and layers:
        block = _block(width)
        copy_rows_kernel[(count, layers, triton.cdiv(width, block))](
            k_source, v_source, source, k_target, v_target, target, k_source.stride(0), k_target.stride(0),
            WIDTH=width, BLOCK=block, num_warps=_warps(block))


def _block(width: int) -> int:
    return min(1024, triton.next_power_of_2(width))


def _warps(block: int) -> int:
    return max(1, block // 256)


def variants() -> list[Variant]:
    """Rows of 8 heads of 128, and of a small model."""
    found = []
    for kind in ("bf16", "fp16", "fp32"):
        for width in (1024, 64, 8192):
            pointers = {name: f"*{kind}" for name in ("k_source", "v_source", "k_target", "v_target")}
            signature = {"k_source": pointers["k_source"], "v_source": pointers["v_source"], "source": "*i32",
                         "k_target": pointers["k_target"], "v_target": pointers["v_target"], "target": "*i32",
                         "source_stride": "i64", "target_stride": "i64", "WIDTH": "constexpr", "BLOCK": "constexpr"}
            block = _block(width)
            found.append(Variant(f"copy_rows {kind} {width}", copy_rows_kernel, signature,
                                 {"WIDTH": width, "BLOCK": block}, _warps(block), 1))
    return found
