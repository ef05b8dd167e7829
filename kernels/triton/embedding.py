"""Rows of the embedding table: `take_rows` over the matrix, whose docstring holds the formula and the figures; of one
that is int8 with a scale a row, the same as numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.linear import Weight
from stars.kernels.triton.take_rows import take_rows
from stars.kernels.triton.variant import Variant

BLOCK = 1024


@triton.jit
def scaled_rows_kernel(values, scales, index, out, rows, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows taken, blocks of a row): out[i] = scales[index[i]] * values[index[i]]; NaN for an index outside."""
    i = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + i)
    known = (row >= 0) & (row < rows)
    scale = tl.load(scales + row, mask=known, other=float("nan"))
    number = tl.load(values + row.to(tl.int64) * WIDTH + column, mask=column < tl.where(known, WIDTH, 0), other=0)
    tl.store(out + i.to(tl.int64) * out_stride + column, (number.to(tl.float32) * scale).to(out.dtype.element_ty),
             mask=column < WIDTH)


def embedding(token_ids: Tensor, weight: Weight, out: Tensor) -> None:
    """As `stars.kernels.embedding`; a token outside the vocabulary becomes NaN."""
    quant, (count, width) = weight.quant, out.shape
    if quant is None:
        take_rows(weight.dense(), token_ids, out)
        return
    if quant.scheme != "int8" or quant.in_features != width or token_ids.shape != (count,) or out.stride(1) != 1:
        raise ValueError(f"embedding: the table is {quant.name} {list(quant.values.shape)}, token_ids "
                         f"{list(token_ids.shape)}, out {list(out.shape)} with strides {out.stride()}: expected int8 "
                         f"rows of {width}, [{count}] and adjacent columns")
    if count:
        scaled_rows_kernel[(count, triton.cdiv(width, BLOCK))](
            quant.values, quant.scales, token_ids, out, quant.out_features, out.stride(0), WIDTH=width, BLOCK=BLOCK,
            num_warps=4)


def variants() -> list[Variant]:
    """Of int8; the others are `take_rows`."""
    return [Variant(f"embedding int8 {target}", scaled_rows_kernel,
                    {"values": "*i8", "scales": "*fp32", "index": "*i32", "out": f"*{target}", "rows": "i32",
                     "out_stride": "i32", "WIDTH": "constexpr", "BLOCK": "constexpr"},
                    {"WIDTH": 4096, "BLOCK": BLOCK}, 4, 1) for target in ("bf16", "fp16", "fp32")]
