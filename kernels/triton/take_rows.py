"""Selected rows of a matrix, the embedding's among them: out[i] = x[index[i]].

torch.index_select(out=) does neither of two things needed here. It wants equal types on both sides, and the residual
stream may be wider than the table. To it an index out of range is an assertion on the device that ends the process's
use of it: here such a row becomes NaN, which does not pass unseen, as in libstars.

Bytes: 2 * n * width * itemsize.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.variant import Variant

BLOCK = 1024


@triton.jit
def take_rows_kernel(x, index, out, rows, x_stride, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows taken, blocks of a row); an index outside x gives NaN."""
    i = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.load(index + i)
    # A width, not `inside & known`: the interpreter takes a scalar with a block of booleans for an int32, and from
    # Triton 3.9 on no such mask.
    known = tl.where((row >= 0) & (row < rows), WIDTH, 0)
    values = tl.load(x + row.to(tl.int64) * x_stride + column, mask=column < known, other=float("nan"))
    tl.store(out + i.to(tl.int64) * out_stride + column, values.to(out.dtype.element_ty), mask=inside)


def take_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """As `stars.kernels.take_rows`; a row outside x becomes NaN, and out's type may differ from x's."""
    count, width = out.shape
    if x.shape[1] != width or index.shape != (count,) or x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"take_rows: x is {list(x.shape)} with strides {x.stride()}, index {list(index.shape)}, out "
                         f"{list(out.shape)}: expected [rows, {width}] and [{count}] with adjacent columns")
    if count and width:
        take_rows_kernel[(count, triton.cdiv(width, BLOCK))](
            x, index, out, x.shape[0], x.stride(0), out.stride(0), WIDTH=width, BLOCK=BLOCK, num_warps=4)


def variants() -> list[Variant]:
    """Tables and streams of equal and of different types."""
    return [Variant(f"take_rows {source} {target}", take_rows_kernel,
                    {"x": f"*{source}", "index": "*i32", "out": f"*{target}", "rows": "i32", "x_stride": "i32",
                     "out_stride": "i32", "WIDTH": "constexpr", "BLOCK": "constexpr"},
                    {"WIDTH": 4096, "BLOCK": BLOCK}, 4, 1)
            for source, target in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32"))]
