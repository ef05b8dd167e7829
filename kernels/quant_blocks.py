"""Matrices as GGUF files hold them: rows of blocks, each with its scales inside, and the numbers that they stand for.

    w = code * scale + offset

The layouts are ggml's (ggml-common.h). Blocks of 32 columns are little-endian float16 scales (and minima) and the
codes, whose low nibbles are the first half of the columns. Those of the K types have 256 columns, in sub-blocks of 32
(q6_k: 16) with a small integer scale each, times a float16 of the whole block.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

BlockScheme = Literal["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]


class Layout(NamedTuple):
    """A block."""

    columns: int
    nbytes: int
    group: int  # adjacent columns that share a scale
    bits: int  # of a code


LAYOUTS: dict[str, Layout] = {
    "q8_0": Layout(32, 34, 32, 8), "q4_0": Layout(32, 18, 32, 4), "q4_1": Layout(32, 20, 32, 4),
    "q5_0": Layout(32, 22, 32, 5), "q5_1": Layout(32, 24, 32, 5), "q4_k": Layout(256, 144, 32, 4),
    "q5_k": Layout(256, 176, 32, 5), "q6_k": Layout(256, 210, 16, 6),
}
assert set(LAYOUTS) == set(get_args(BlockScheme))


class Codes(NamedTuple):
    """A matrix taken apart: w = codes * scales + offsets, of each group of columns."""

    codes: Tensor  # int16 [out, groups, group], less its zero where the scheme has one
    scales: Tensor  # float32 [out, groups]
    offsets: Tensor | None  # float32 [out, groups]; None: 0

    def numbers(self) -> Tensor:
        """The matrix, float32 [out, in]."""
        wide = self.codes.float() * self.scales[:, :, None]
        wide = wide if self.offsets is None else wide + self.offsets[:, :, None]
        return wide.flatten(1)


def take_apart(values: Tensor, scheme: str) -> Codes:
    """The codes, scales and offsets of rows of blocks: `values` uint8 [out, blocks * bytes of a block]."""
    layout = LAYOUTS[scheme]
    blocks = values.view(values.shape[0], -1, layout.nbytes)  # [out, blocks, bytes]
    return (_small if layout.columns == 32 else _six if scheme == "q6_k" else _large)(blocks, scheme)


def _small(blocks: Tensor, scheme: str) -> Codes:
    """Blocks of 32 columns: scale, minimum of q?_1, fifth bits of q5_?, codes."""
    scales = _half(blocks, 0)
    if scheme == "q8_0":
        return Codes(blocks[:, :, 2:].contiguous().view(torch.int8).short(), scales, None)
    begin = 4 if scheme.endswith("_1") else 2
    codes = _nibbles(blocks[:, :, -16:])
    if scheme.startswith("q5"):
        fifth = (blocks[:, :, begin : begin + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [out, blocks, 4, 8]
        codes = codes + fifth.flatten(2).short() * 16
    if begin == 4:
        return Codes(codes, scales, _half(blocks, 2))
    return Codes(codes - (8 if scheme == "q4_0" else 16), scales, None)


def _large(blocks: Tensor, scheme: str) -> Codes:
    """q4_k and q5_k: scale of scales, scale of minima, eight of both in six bits each, fifth bits, codes."""
    packed = blocks[:, :, 4:16].int()
    first, second, last = packed.split(4, 2)  # [out, blocks, 4]
    scales = torch.cat([first & 63, (last & 15) | (first >> 6 << 4)], 2)  # [out, blocks, 8]
    minima = torch.cat([second & 63, (last >> 4) | (second >> 6 << 4)], 2)
    codes = _nibbles(blocks[:, :, -128:].unflatten(2, (4, 32)))  # [out, blocks, 4, 64]
    codes = codes.reshape(*blocks.shape[:2], 8, 32)
    if scheme == "q5_k":
        fifth = (blocks[:, :, 16:48][:, :, None] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
        codes = codes + fifth.short() * 16
    d, dmin = _half(blocks, 0)[:, :, None], _half(blocks, 2)[:, :, None]
    return Codes(codes.flatten(1, 2), (d * scales).flatten(1), (-dmin * minima).flatten(1))


def _six(blocks: Tensor, scheme: str) -> Codes:
    """q6_k: low nibbles, upper two bits, sixteen signed scales, scale of scales."""
    low = blocks[:, :, :128].unflatten(2, (2, 2, 32))  # [out, blocks, half, 2, 32]
    low = torch.cat([low & 15, low >> 4], 3)  # [out, blocks, half, 4, 32]
    upper = blocks[:, :, 128:192].unflatten(2, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    codes = low.short() + upper.short() * 16 - 32
    scales = blocks[:, :, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)[:, :, None]
    return Codes(codes.reshape(blocks.shape[0], -1, 16), scales.flatten(1), None)


def _nibbles(packed: Tensor) -> Tensor:
    """The codes of bytes [..., n]: all low nibbles, then all high ones, int16 [..., 2 n]."""
    return torch.cat([packed & 15, packed >> 4], -1).short()


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of every block, as float32 [out, blocks]."""
    return blocks[:, :, at : at + 2].contiguous().view(torch.float16)[:, :, 0].float()
