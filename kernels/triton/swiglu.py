"""The gate of the MLP: out = activation(gate) * up, gate and up the halves of a row.

silu(x) = x / (1 + exp(-x)), or GELU by tanh, in float32, rounded to the inputs' type and then multiplied, as torch
does it in two steps.

Bytes: 3 * rows * intermediate * itemsize.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stars.kernels.swiglu import Activation
from stars.kernels.triton.functions import tanh
from stars.kernels.triton.variant import Variant

BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_up, out, gate_up_stride, out_stride, INTERMEDIATE: tl.constexpr, GELU: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Grid (rows, blocks of a row)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INTERMEDIATE
    source = gate_up + row * gate_up_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        gate = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * (gate * gate * gate))))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    gate = gate.to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + column, (gate * up).to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, out: Tensor, activation: Activation = "silu") -> None:
    """As `stars.kernels.swiglu`."""
    rows, intermediate = out.shape
    if gate_up.shape != (rows, 2 * intermediate) or gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"swiglu: gate_up is {list(gate_up.shape)} with strides {gate_up.stride()}, expected "
                         f"[{rows}, {2 * intermediate}] with adjacent columns")
    if rows and intermediate:
        swiglu_kernel[(rows, triton.cdiv(intermediate, BLOCK))](
            gate_up, out, gate_up.stride(0), out.stride(0), INTERMEDIATE=intermediate, GELU=activation == "gelu_tanh",
            BLOCK=BLOCK, num_warps=4)


def variants() -> list[Variant]:
    """An even size, and one that leaves a remainder and unaligned halves."""
    return [Variant(f"swiglu {kind} {intermediate}{' gelu' if gelu else ''}", swiglu_kernel,
                    {"gate_up": f"*{kind}", "out": f"*{kind}", "gate_up_stride": "i32", "out_stride": "i32",
                     "INTERMEDIATE": "constexpr", "GELU": "constexpr", "BLOCK": "constexpr"},
                    {"INTERMEDIATE": intermediate, "GELU": gelu, "BLOCK": BLOCK}, 4, 1)
            for kind in ("bf16", "fp16", "fp32") for intermediate, gelu in ((14336, False), (37, False), (9216, True))]
