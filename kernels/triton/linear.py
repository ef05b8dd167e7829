"""Matrix products on a GPU: cuBLAS as a rule, a kernel of fixed tiles where the bits of a row must not change.

    out = x @ weight.T + bias

`linear` is torch.mm or torch.addmm with out=: no allocation, so it can be captured. A float32 `out` of 16-bit operands
takes the float32 sums as they are, in torch.mm too. Bytes of a small batch: the weights, once.

`linear_invariant` adds up the products of a row in one fixed order. The tile is the same at any number of rows, the
loop over the inner dimension runs from its start to its end in one program, and rows that are not there count as zero.
(cuBLAS chooses its algorithm, and with it the order, by the number of rows.) It reads the weights once for each 64
rows, from memory for the first of them and from the second-level cache for the others, which run at the same time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.linear import SCHEMES, Weight
from stars.kernels.triton import skinny, tuned
from stars.kernels.triton.tuned import Tile
from stars.kernels.triton.variant import Variant

BLOCK_ROWS = 64  # the least that Hopper's matrix instruction takes
BLOCK_FEATURES = 32  # so that 4096 features are 128 programs, one for each processor

WIDENS = "dtype_out" in torch.ops.aten.mm.overloads()
"""Whether torch's product of 16-bit matrices, on a GPU, takes an `out` of float32."""

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def linear_kernel(x, weight, bias, out, rows, x_stride, out_stride, OUT_FEATURES: tl.constexpr,
                  IN_FEATURES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                  BLOCK_FEATURES: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr):
    """Grid (blocks of rows, blocks of features): one tile of out, over the whole inner dimension in order."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inner = tl.arange(0, BLOCK_INNER)
    there = row[:, None] < rows
    wanted = feature[None, :] < OUT_FEATURES
    x_at = x + row.to(tl.int64)[:, None] * x_stride + inner[None, :]
    weight_at = weight + feature.to(tl.int64)[None, :] * IN_FEATURES + inner[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), dtype=tl.float32)
    for start in range(0, IN_FEATURES, BLOCK_INNER):
        if IN_FEATURES % BLOCK_INNER == 0:
            left = tl.load(x_at, mask=there, other=0.0)
            right = tl.load(weight_at, mask=wanted, other=0.0)
        else:
            left = tl.load(x_at, mask=there & (inner[None, :] < IN_FEATURES - start), other=0.0)
            right = tl.load(weight_at, mask=wanted & (inner[:, None] < IN_FEATURES - start), other=0.0)
        right = right.to(left.dtype)
        if _INTERPRETED:  # whose product of bfloat16 takes the bits for integers
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_at += BLOCK_INNER
        weight_at += BLOCK_INNER
    if HAS_BIAS:
        total += tl.load(bias + feature, mask=feature < OUT_FEATURES, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + feature[None, :], total.to(out.dtype.element_ty),
             mask=there & wanted)


def linear(x: Tensor, weight: Weight, out: Tensor) -> None:
    """As `stars.kernels.linear`. The kernel takes weights packed as deterministic, tensors of types that the library
    does not, and what the card's table says that it is faster at."""
    if weight.quant is not None:
        skinny.plain(x, weight, out)
        return
    matrix, bias = weight.values, weight.bias
    alike = x.dtype == matrix.dtype and (bias is None or bias.dtype == x.dtype)
    widened = out.dtype == torch.float32 and x.element_size() == 2  # logits: rounded to 16 bits, they would have ties
    library = alike and (out.dtype == x.dtype or (widened and bias is None and WIDENS and x.is_cuda))
    measured = None
    if library:
        measured = tuned.plain(weight.scheme, x.shape[0], weight.out_features, weight.in_features, SCHEMES[out.dtype])
    if weight.deterministic or not library:
        linear_invariant(x, weight, out)
    elif measured is not None:
        launch(x, weight, out, measured)
    elif widened:
        torch.mm(x, matrix.t(), out_dtype=torch.float32, out=out)
    elif bias is None:
        torch.mm(x, matrix.t(), out=out)
    else:
        torch.addmm(bias, x, matrix.t(), out=out)


def linear_invariant(x: Tensor, weight: Weight, out: Tensor) -> None:
    """As `linear`, with bits per row that do not depend on the number of rows.

    A weight of another type is rounded to x's, as in the reference; out may have any type.
    """
    launch(x, weight, out, Tile(BLOCK_ROWS, BLOCK_FEATURES, _inner(x.element_size()), 4, 4))


def launch(x: Tensor, weight: Weight, out: Tensor, tile: Tile) -> None:
    """As `linear_invariant`, in given tiles: bits of a row are the same for the same tile, and for no other."""
    rows = x.shape[0]
    matrix = weight.values
    if x.shape[1] != weight.in_features or out.shape != (rows, weight.out_features):
        raise ValueError(f"linear: x is {list(x.shape)} and out {list(out.shape)}, expected [rows, "
                         f"{weight.in_features}] and [rows, {weight.out_features}]")
    if x.dtype != matrix.dtype and x.dtype == torch.float32:  # such a product was compiled into TF32 on sm_100
        raise ValueError(f"linear: x is float32 and the weight {matrix.dtype}; give x the weight's type")
    if not matrix.is_contiguous() or x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("linear: the weight must be contiguous, x and out must have adjacent columns")
    if rows == 0:
        return
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(weight.out_features, tile.features))
    linear_kernel[grid](
        x, matrix, matrix if weight.bias is None else weight.bias, out, rows, x.stride(0), out.stride(0),
        OUT_FEATURES=weight.out_features, IN_FEATURES=weight.in_features, HAS_BIAS=weight.bias is not None,
        BLOCK_ROWS=tile.rows, BLOCK_FEATURES=tile.features, BLOCK_INNER=tile.inner, PRECISION="ieee",
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=_registers(matrix.element_size()))


def _inner(itemsize: int) -> int:
    """24 KB a stage and 96 KB in flight a program in 16 bits; float32, whose products take registers, half of that."""
    return 128 if itemsize == 2 else 32


def _registers(itemsize: int) -> int | None:
    """Most registers of a thread, by the size of a weight; None leaves it to the assembler. With float32 that settled
    for 80 or 96 and spilled one or two numbers (sm_90 and sm_100 with Triton 3.7, sm_100 with 3.8).

    168 are three programs a processor instead of four or five. Beside a 16-bit x, shared memory has room for one.
    """
    return None if itemsize == 2 else 168


def variants() -> list[Variant]:
    """Every type, with and without a remainder in the inner dimension."""
    found = []
    for kind, weight, out, size in (("bf16", "bf16", "bf16", 2), ("fp16", "fp16", "fp16", 2),
                                    ("fp32", "fp32", "fp32", 4), ("bf16", "fp32", "fp32", 2),
                                    ("bf16", "bf16", "fp32", 2)):
        for inner, has_bias in ((4096, False), (4096, True), (1000, False)):
            found.append(Variant(
                f"linear {kind} {weight} {out} {inner}{' bias' if has_bias else ''}", linear_kernel,
                {"x": f"*{kind}", "weight": f"*{weight}", "bias": f"*{weight}", "out": f"*{out}", "rows": "i32",
                 "x_stride": "i32", "out_stride": "i32",
                 **dict.fromkeys(("OUT_FEATURES", "IN_FEATURES", "HAS_BIAS", "BLOCK_ROWS", "BLOCK_FEATURES",
                                  "BLOCK_INNER", "PRECISION"), "constexpr")},
                {"OUT_FEATURES": 4096, "IN_FEATURES": inner, "HAS_BIAS": has_bias, "BLOCK_ROWS": BLOCK_ROWS,
                 "BLOCK_FEATURES": BLOCK_FEATURES, "BLOCK_INNER": _inner(size), "PRECISION": "ieee"}, 4, 4,
                max_registers=_registers(4 if weight == "fp32" else 2)))
    return found
