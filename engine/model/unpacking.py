"""From what quantised checkpoints store of a matrix to a QuantWeight, exactly: orders of bits, scales and zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.quant import INT4_GROUPS, QuantWeight, of_blocks

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where AWQ's GEMM layout has adjacent columns among the eight nibbles of a word, from its lowest."""
Q8_COLUMNS = 32


def shared_columns(columns: int, groups: int) -> int:
    """The group that our products take for a row of so many columns in so many groups; 0 where there is none."""
    stored = columns // groups
    return next((group for group in reversed(INT4_GROUPS) if stored % group == 0), 0)


def nibbles(words: Tensor) -> Tensor:
    """uint8 [..., 8 n] of int32 [..., n], each word's lowest four bits first."""
    stored = words.contiguous().view(torch.uint8)
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)


def in_pairs(steps: Tensor) -> Tensor:
    """Columns uint8 [out, in] of 0 to 15 as a QuantWeight has them, [out, in / 2]."""
    return steps[:, 0::2] | steps[:, 1::2] << 4


def awq_columns(words: Tensor) -> Tensor:
    """uint8 [rows, 8 n] in the order of columns, of AWQ's words int32 [rows, n]."""
    return nibbles(words).view(words.shape[0], -1, 8)[:, :, AWQ_ORDER].flatten(1)


def int4(values: Tensor, scales: Tensor, zeros: Tensor | None) -> QuantWeight:
    """values uint8 [out, in / 2]; scales [out, groups] of any float type; zeros uint8 [out, groups], None: 8."""
    groups = scales.shape[1]
    group = shared_columns(2 * values.shape[1], groups)
    times = 2 * values.shape[1] // groups // group
    scales = _exact(scales.repeat_interleave(times, dim=1))
    zeros = None if zeros is None or bool((zeros == 8).all()) else zeros.repeat_interleave(times, dim=1).contiguous()
    return QuantWeight(values.contiguous(), scales, zeros, group, "int4")


def int8(values: Tensor, scales: Tensor) -> QuantWeight:
    """values int8 [out, in]; scales [out, groups] of any float type. Several groups a row are blocks of Q8_0, where
    float16 holds their scales; ValueError where it does not."""
    rows, columns = values.shape
    if scales.shape[1] == 1:
        return QuantWeight(values.contiguous(), scales.float().flatten().contiguous(), None, 0, "int8")
    narrow = scales.half()
    if not torch.equal(narrow.double(), scales.double()):
        raise ValueError("scales that float16 cannot hold")
    narrow = narrow.repeat_interleave(columns // Q8_COLUMNS // scales.shape[1], dim=1)  # [out, blocks]
    blocks = torch.cat((narrow.contiguous().view(rows, -1, 1).view(torch.uint8),
                        values.contiguous().view(torch.uint8).view(rows, -1, Q8_COLUMNS)), dim=2)
    return of_blocks(blocks.view(rows, -1), "q8_0")


def fp8(values: Tensor, scales: Tensor) -> QuantWeight:
    """values float8_e4m3fn [out, in]; scales of any float type, [out]. ValueError for codes that are no numbers."""
    if bool(((values.view(torch.uint8) & 127) == 127).any()):
        raise ValueError("NaN")
    return QuantWeight(values.contiguous(), scales.float().contiguous(), None, 0, "fp8")


def _exact(scales: Tensor) -> Tensor:
    """As float16 where that holds all of them, else as float32."""
    narrow, wide = scales.half(), scales.float()
    return narrow.contiguous() if torch.equal(narrow.float(), wide) else wide.contiguous()
