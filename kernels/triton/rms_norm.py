"""RMS norm with the residual stream's addition in it: one program a row, the row in registers.

    residual += x (where given);  out = weight * cast(y / sqrt(mean(y^2) + eps)),  y = residual or x

Sums are float32; y is what was stored to the residual stream, rounded as it was; the cast is to the weight's type and
so is the product, as in the reference. A row's bits do not depend on how many rows there are.

Bytes: x, residual in; residual, out written: 4 * rows * hidden * itemsize (2 without a residual).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.limits import MAX_HIDDEN
from stars.kernels.triton.variant import Variant


@triton.jit
def normed(y, scale, eps, HIDDEN: tl.constexpr):
    """The row y float32 [block], zero after HIDDEN, normalised and scaled, in the type of `scale` [block]."""
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / HIDDEN + eps)
    return (y.to(scale.dtype).to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)


@triton.jit
def rms_norm_kernel(x, residual, weight, out, x_stride, residual_stride, out_stride, eps, HIDDEN: tl.constexpr,
                    BLOCK: tl.constexpr, ADD: tl.constexpr):
    """One program a row, which it holds whole; ADD: with the residual stream."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    y = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0)  # no load is moved across the barrier of the sum
    if ADD:
        stream = residual + row * residual_stride + column
        total = tl.load(stream, mask=inside, other=0.0).to(tl.float32) + y
        rounded = total.to(residual.dtype.element_ty)
        tl.store(stream, rounded, mask=inside)
        y = rounded.to(tl.float32)
    tl.store(out + row * out_stride + column, normed(y, scale, eps, HIDDEN).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
    """As `stars.kernels.rms_norm`."""
    rows, hidden = x.shape
    if hidden > MAX_HIDDEN:
        raise ValueError(f"rms_norm: rows of {hidden} exceed the {MAX_HIDDEN} that one program holds")
    for name, tensor in (("x", x), ("out", out), ("residual", x if residual is None else residual)):
        if tensor.shape != x.shape or tensor.stride(1) != 1:
            raise ValueError(f"rms_norm: {name} is {list(tensor.shape)} with strides {tensor.stride()}, expected "
                             f"{list(x.shape)} with adjacent columns")
    if weight.shape != (hidden,) or not weight.is_contiguous():
        raise ValueError(f"rms_norm: weight is {list(weight.shape)}, expected contiguous [{hidden}]")
    if rows == 0:
        return
    stream = x if residual is None else residual
    block = triton.next_power_of_2(hidden)
    rms_norm_kernel[(rows,)](x, stream, weight, out, x.stride(0), stream.stride(0), out.stride(0), eps, HIDDEN=hidden,
                             BLOCK=block, ADD=residual is not None, num_warps=warps(block))


def warps(block: int) -> int:
    """Sixteen elements a thread up to 4096, thirty-two beyond: 16 warps at 8192 took 4 bytes too many on sm_80."""
    return min(max(8, block // 1024), max(1, block // 512))


def variants() -> list[Variant]:
    """Hidden sizes from a head's (QK norms never come here, but small models do) to the largest."""
    found = []
    for hidden in (64, 2048, 4096, 5120, MAX_HIDDEN):
        for kind, weight in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32")):
            for add in (False, True):
                block = triton.next_power_of_2(hidden)
                found.append(Variant(
                    f"rms_norm {kind} {hidden} weight {weight}{' add' if add else ''}", rms_norm_kernel,
                    {"x": f"*{kind}", "residual": f"*{kind}", "weight": f"*{weight}", "out": f"*{kind}",
                     "x_stride": "i32", "residual_stride": "i32", "out_stride": "i32", "eps": "fp32",
                     "HIDDEN": "constexpr", "BLOCK": "constexpr", "ADD": "constexpr"},
                    {"HIDDEN": hidden, "BLOCK": block, "ADD": add}, warps(block), 1))
    return found
