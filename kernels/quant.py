"""Matrices in 4 to 8 bits: what loaders make and products take, and the reference that makes numbers of them again.

    w = (value - zero) * scale

Only weights are quantised. Activations stay as they are on a GPU; on the CPU products take them in 16 bits (`pack`).
Matrices of GGUF files stay as they are stored (`quant_blocks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stars.kernels.quant_blocks import LAYOUTS, BlockScheme, take_apart

Rounded = Literal["fp8", "int8", "int4"]
"""Schemes that `quantize` rounds to."""
Scheme = Rounded | BlockScheme

INT4_GROUPS = (32, 64, 128)
"""Columns that may share a scale where a weight has four bits."""

FP8 = torch.float8_e4m3fn
FP8_MAX, INT8_MAX, INT4_MAX = 448.0, 127.0, 7.0  # the largest values; int4's of 15 steps around its zero
INT4_ZERO = 8
PIECE = 1 << 15
"""Weights that a CPU rounds at once, as many as torch gives one thread."""
INTEGERS = 1.5 * 2.0**23
"""Beside it float32 holds integers only."""

_STORED = {"fp8": FP8, "int8": torch.int8, "int4": torch.uint8} | dict.fromkeys(LAYOUTS, torch.uint8)


class QuantWeight(NamedTuple):
    """A matrix [out_features, in_features] in 4 to 8 bits."""

    # fp8: float8_e4m3fn, int8: int8 [out, in]; int4: uint8 [out, in / 2], the low nibble is column 2 j; of schemes of
    # blocks: the blocks themselves, uint8 [out, in / group * bytes of a block], perhaps a view of a file
    values: Tensor
    scales: Tensor  # float32 [out] where group is 0; float16 or float32 [out, in / group]; of blocks: float32 [0]
    zeros: Tensor | None  # int4: uint8 [out, in / group] in 0..15; None: 8 for int4, 0 for the others
    group: int  # adjacent columns that share a scale, or columns of a block; 0: all of a row
    scheme: Scheme

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        if self.scheme in LAYOUTS:
            return self.values.shape[1] // LAYOUTS[self.scheme].nbytes * self.group
        return self.values.shape[1] * (2 if self.scheme == "int4" else 1)

    @property
    def name(self) -> str:
        """The scheme as tables of tiles call it: "fp8", "int8", "int4-32", "int4-128", "q4_k"."""
        return f"{self.scheme}-{self.group}" if self.scheme == "int4" else self.scheme

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zeros: what a product of few rows reads."""
        return self.values.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def check(quant: QuantWeight) -> None:
    """Raises ValueError, which names the field, unless the tensors are those that the scheme has."""
    _check_scheme(quant.scheme, quant.group)
    values, scales, zeros = quant.values, quant.scales, quant.zeros
    if values.dim() != 2 or values.dtype != _STORED[quant.scheme]:
        raise ValueError(f"{quant.name}: values are {_described(values)}, give a matrix of {_STORED[quant.scheme]}")
    if quant.scheme in LAYOUTS:
        _check_blocks(quant)
        return
    rows, columns = quant.out_features, quant.in_features
    if quant.group:
        _check_columns(columns, quant.group)
    shape = [rows, columns // quant.group] if quant.group else [rows]
    kinds = (torch.float16, torch.float32) if quant.group else (torch.float32,)
    if list(scales.shape) != shape or scales.dtype not in kinds:
        raise ValueError(f"{quant.name}: scales are {_described(scales)}, give {' or '.join(map(str, kinds))} {shape}")
    if zeros is not None and quant.scheme != "int4":
        raise ValueError(f"{quant.name}: zeros are {_described(zeros)}, give None: only int4 has zeros")
    if zeros is not None and (list(zeros.shape) != shape or zeros.dtype != torch.uint8):
        raise ValueError(f"{quant.name}: zeros are {_described(zeros)}, give torch.uint8 {shape}")
    for name, tensor in (("values", values), ("scales", scales), ("zeros", zeros)):
        if tensor is not None and (not tensor.is_contiguous() or tensor.device != values.device):
            raise ValueError(f"{quant.name}: {name} are not contiguous on the values' device: make them so")


def _check_blocks(quant: QuantWeight) -> None:
    values, nbytes = quant.values, LAYOUTS[quant.scheme].nbytes
    if values.shape[1] % nbytes or not values.is_contiguous():
        raise ValueError(f"{quant.name}: values are {_described(values)}, give contiguous rows of blocks of {nbytes} "
                         "bytes")
    if quant.scales.numel() or quant.zeros is not None:
        raise ValueError(f"{quant.name}: scales and zeros are in the blocks, give an empty tensor and None")


def of_blocks(values: Tensor, scheme: BlockScheme) -> QuantWeight:
    """Rows of blocks as GGUF files hold them, uint8 [out, in / columns * bytes of a block]."""
    quant = QuantWeight(values, torch.empty(0, device=values.device), None, LAYOUTS[scheme].columns, scheme)
    check(quant)
    return quant


def rows(quant: QuantWeight, index: Tensor | slice) -> QuantWeight:
    """Some rows of a matrix, or all in another order: `index` int64 [n] or a slice."""
    scales = quant.scales if quant.scheme in LAYOUTS else quant.scales[index].contiguous()
    zeros = None if quant.zeros is None else quant.zeros[index].contiguous()
    return quant._replace(values=_bytes(quant.values)[index].contiguous().view(quant.values.dtype), scales=scales,
                          zeros=zeros)


def stacks(parts: Sequence[QuantWeight]) -> bool:
    """Whether matrices can lie one below the other as one: of one scheme, group and width."""
    return len({(part.scheme, part.group, part.in_features) for part in parts}) == 1


def stack(parts: Sequence[QuantWeight]) -> QuantWeight:
    """Matrices one below the other, which `stacks`."""
    first = parts[0]
    if len(parts) == 1:
        return first
    values = torch.cat([_bytes(part.values) for part in parts]).view(first.values.dtype)
    if first.scheme in LAYOUTS:
        return first._replace(values=values)
    kind = torch.float16 if all(part.scales.dtype == torch.float16 for part in parts) else torch.float32
    scales = torch.cat([part.scales.to(kind) for part in parts])
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat([part.scales.new_full(part.scales.shape, INT4_ZERO, dtype=torch.uint8) if part.zeros is None
                           else part.zeros for part in parts])
    return QuantWeight(values, scales, zeros, first.group, first.scheme)


def _bytes(values: Tensor) -> Tensor:
    """Values as something that can be gathered and joined: float8 cannot, on every device."""
    return values.view(torch.uint8)


def quantize(matrix: Tensor, scheme: Rounded, group: int = 0, asymmetric: bool = False) -> QuantWeight:
    """`matrix` [out_features, in_features] of any float type, every weight rounded to the nearest value.

    fp8 and int8 have a scale for each row (`group` 0), by which its largest weight becomes 448 or 127. int4 has one for
    each `group` of 32, 64 or 128 columns, by which the largest becomes 7 steps from its zero; `asymmetric` gives the 15
    steps of a group to the range from its least weight to its largest, 0 included. Scales of groups are float16 where
    all are normal numbers of it. Raises ValueError for an unknown scheme, sizes that do not fit, and NaN or infinity.
    """
    _check_scheme(scheme, group)
    if scheme in LAYOUTS:
        raise ValueError(f"quantize: {scheme} is read from files only, give {', '.join(get_args(Rounded))}")
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"quantize: matrix is {_described(matrix)}, give a float type in two dimensions")
    if asymmetric and scheme != "int4":
        raise ValueError(f"quantize: {scheme} has no zeros, leave asymmetric out")
    if scheme == "int4":
        return _quantize_int4(matrix, group, asymmetric)
    largest = matrix.new_zeros(matrix.shape[0], dtype=torch.float32)
    for piece in _pieces(matrix):
        largest[piece] = matrix[piece].abs().amax(1)
    _check_finite(largest)
    scales = _scales(largest, FP8_MAX if scheme == "fp8" else INT8_MAX)  # [out]
    values = torch.empty(matrix.shape, dtype=_STORED[scheme], device=matrix.device)
    for piece in _pieces(matrix):
        scaled = matrix[piece].float() / scales[piece, None]
        values[piece] = scaled if scheme == "fp8" else _round(scaled)
    return QuantWeight(values, scales, None, 0, scheme)


def _quantize_int4(matrix: Tensor, group: int, asymmetric: bool) -> QuantWeight:
    rows, columns = matrix.shape
    _check_columns(columns, group)
    groups = matrix.reshape(rows, columns // group, group)  # [out, groups, group]
    pieces = _pieces(matrix)
    low, scales = torch.zeros(2, rows, columns // group, device=matrix.device)
    for piece in pieces:
        part = groups[piece].float()
        least, largest = part.amin(2), part.amax(2)
        _check_finite(least, largest)
        if asymmetric:
            low[piece] = least.clamp_max_(0.0)
            scales[piece] = _scales(largest.clamp_min_(0.0) - least, 2 * INT4_MAX + 1)
        else:
            scales[piece] = _scales(torch.maximum(least.abs_(), largest.abs_()), INT4_MAX)
    scales = _narrowest(scales, pieces)
    zeros = torch.empty(scales.shape, dtype=torch.uint8, device=matrix.device) if asymmetric else None
    values = torch.empty(rows, columns // 2, dtype=torch.uint8, device=matrix.device)
    for piece in pieces:
        scale = scales[piece].float()
        steps = _round(groups[piece].float() / scale[:, :, None])
        if zeros is None:
            steps += INT4_ZERO
        else:
            zero = _round(low[piece] / -scale).clamp_(0, 15)
            zeros[piece] = zero
            steps += zero[:, :, None]
        nibbles = steps.clamp_(0, 15).to(torch.uint8).flatten(1)
        values[piece] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return QuantWeight(values, scales, zeros, group, "int4")


def _pieces(matrix: Tensor) -> list[slice]:
    """Rows that are rounded at once: on a CPU so few that they stay in a core's cache, and in one thread, as threads
    that wait for each other after every step cost more than they save. A GPU takes all."""
    rows, columns = matrix.shape
    count = max(1, PIECE // max(1, columns) if matrix.is_cpu else rows)
    return [slice(start, start + count) for start in range(0, rows, count)] if columns else []


def _round(steps: Tensor) -> Tensor:
    """`steps`, below 2 ** 22 in magnitude, to the nearest integers in place, ties to even: as torch.round, which takes
    all threads from 2048 numbers on and waits milliseconds for each where they are busy."""
    return steps.add_(INTEGERS).sub_(INTEGERS)


def _check_finite(*limits: Tensor) -> None:
    """Raises ValueError where a matrix has NaN or infinity: then its least or largest weights are."""
    if not all(bool(limit.isfinite().all()) for limit in limits):
        raise ValueError("quantize: matrix has NaN or infinity, give finite weights")


def dequantize(quant: QuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out_features, in_features]: formed in float32, rounded to `dtype` once."""
    scales, values = quant.scales.float(), quant.values
    if quant.scheme in LAYOUTS:
        return take_apart(values, quant.scheme).numbers().to(dtype)
    if not quant.group:
        return (values.float() * scales[:, None]).to(dtype)
    rows, columns = quant.out_features, quant.in_features
    steps = torch.stack((values & 15, values >> 4), 2).view(rows, columns // quant.group, quant.group).float()
    zero = INT4_ZERO if quant.zeros is None else quant.zeros.float()[:, :, None]
    return ((steps - zero) * scales[:, :, None]).view(rows, columns).to(dtype)


def _scales(largest: Tensor, steps: float) -> Tensor:
    """largest / steps, float32, and a normal number where all weights are zero or nearly so."""
    return (largest / steps).clamp_min(torch.finfo(torch.float32).tiny)


def _narrowest(scales: Tensor, pieces: Sequence[slice]) -> Tensor:
    """Scales of groups as float16 where all are normal numbers of it: 2 bytes beside the 16 of 32 weights, not 4.

    A group of zeros has no scale that matters: 1.
    """
    kind = torch.finfo(torch.float16)
    narrow, fits = torch.empty_like(scales, dtype=torch.float16), True
    for piece in pieces:
        part = scales[piece]
        part.masked_fill_(part == torch.finfo(torch.float32).tiny, 1.0)
        fits = fits and bool(((part >= kind.tiny) & (part <= kind.max)).all())
        narrow[piece] = part
    return narrow if fits else scales


def _check_scheme(scheme: str, group: int) -> None:
    if scheme not in _STORED:
        raise ValueError(f"scheme is {scheme!r}, it must be one of {', '.join(_STORED)}")
    groups = INT4_GROUPS if scheme == "int4" else (LAYOUTS[scheme].columns,) if scheme in LAYOUTS else (0,)
    if group not in groups:
        raise ValueError(f"{scheme}: group is {group}, it must be {' or '.join(map(str, groups))}")


def _check_columns(columns: int, group: int) -> None:
    if columns % group:
        raise ValueError(f"int4-{group}: in_features is {columns}, it must be a multiple of the group of {group}")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
