"""A factor on every value, and a soft bound, in place: x = scale * x, then softcap * tanh(x / softcap).

Formed in float32 and rounded once. Bytes: 2 * rows * width * itemsize.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.triton.functions import tanh
from stars.kernels.triton.variant import Variant

BLOCK = 1024


@triton.jit
def rescale_kernel(x, stride, scale, softcap, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, blocks of a row); SOFTCAP: whether there is one."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = x + tl.program_id(0).to(tl.int64) * stride + column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        value = tanh(value / softcap) * softcap
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


def rescale(x: Tensor, scale: float, softcap: float | None = None) -> None:
    """As `stars.kernels.rescale`."""
    rows, width = x.shape
    if x.stride(1) != 1:
        raise ValueError(f"rescale: x is {list(x.shape)} with strides {x.stride()}, expected adjacent columns")
    if rows and width:
        rescale_kernel[(rows, triton.cdiv(width, BLOCK))](
            x, x.stride(0), float(scale), float(softcap or 0.0), WIDTH=width, SOFTCAP=softcap is not None, BLOCK=BLOCK,
            num_warps=4)


def variants() -> list[Variant]:
    """Embeddings of every type, and logits, which are float32."""
    return [Variant(f"rescale {kind}{' softcap' if softcap else ''}", rescale_kernel,
                    {"x": f"*{kind}", "stride": "i32", "scale": "fp32", "softcap": "fp32", "WIDTH": "constexpr",
                     "SOFTCAP": "constexpr", "BLOCK": "constexpr"},
                    {"WIDTH": width, "SOFTCAP": softcap, "BLOCK": BLOCK}, 4, 1)
            for kind, width, softcap in (("bf16", 2304, False), ("fp16", 2304, False), ("fp32", 2304, False),
                                         ("fp32", 256000, True))]
