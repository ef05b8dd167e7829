"""What quantised matrices of files become on a GPU, whose products take int8, fp8, int4 and plain numbers.

    q4_0           int4 in groups of 32: the same numbers, (code - 8) * scale, in 0.5625 bytes a weight
    other blocks   numbers of the activations' type, rounded once

q4_1's (code * scale + minimum) would be int4 with a zero of -minimum / scale. But a kernel takes that zero in the
activations' type: in bfloat16 it is off by up to 1/32 of a step, for all weights of a group alike, and rounding numbers
errs by at most as much, for each by itself. K types have minima as well, or groups of 16 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stars.kernels.quant import QuantWeight, dequantize, rows, stacks
from stars.kernels.quant_blocks import LAYOUTS

ROWS = 4096
"""Rows that are made numbers of at a time: on their way they are float32."""


def served(parts: Sequence[Tensor | QuantWeight], dtype: torch.dtype, looked_up: bool = False,
           ) -> list[Tensor] | list[QuantWeight]:
    """Matrices that will lie one below the other, as a GPU reads them: of one scheme, or all numbers of `dtype`.

    looked_up: their rows are wanted one by one, which there are kernels for of numbers and of int8.
    """
    found = [int4_of(part) if isinstance(part, QuantWeight) and part.scheme == "q4_0" else part for part in parts]
    quants = [part for part in found if isinstance(part, QuantWeight) and part.scheme not in LAYOUTS]
    if len(quants) == len(found) and stacks(quants) and not (looked_up and quants[0].scheme != "int8"):
        return [_loaded_ahead(quant) for quant in quants]
    return [numbers(part, dtype) if isinstance(part, QuantWeight) else part.to(dtype) for part in parts]


def int4_of(quant: QuantWeight) -> QuantWeight:
    """Blocks of q4_0 as int4 in groups of 32. A block's low nibbles are its first 16 columns; a byte of int4 has two
    neighbours."""
    blocks = quant.values.view(quant.out_features, -1, LAYOUTS["q4_0"].nbytes)  # [out, groups, bytes]
    packed = blocks[:, :, 2:]
    codes = torch.cat([packed & 15, packed >> 4], 2).flatten(1)  # [out, in]
    scales = blocks[:, :, :2].contiguous().view(torch.float16)[:, :, 0].contiguous()
    return QuantWeight(codes[:, 0::2] | codes[:, 1::2] << 4, scales, None, 32, "int4")


def numbers(quant: QuantWeight, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`, a part of its rows at a time."""
    out = torch.empty(quant.out_features, quant.in_features, dtype=dtype, device=quant.values.device)
    for first in range(0, quant.out_features, ROWS):
        some = slice(first, first + ROWS)
        out[some] = dequantize(rows(quant, some), dtype)
    return out


def _loaded_ahead(quant: QuantWeight) -> QuantWeight:
    """With scales of which a tile's row has four bytes at least: a tile may be 64 columns wide."""
    return quant._replace(scales=quant.scales.float()) if quant.group >= 64 else quant
