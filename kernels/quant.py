"""Matrices in 8 or 4 bits: what loaders make and products take, and the reference that makes numbers of them again.

    w = (value - zero) * scale

Only weights are quantised: activations stay as they are, and products are summed up in float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scheme = Literal["fp8", "int8", "int4"]

INT4_GROUPS = (32, 128)
"""Columns that may share a scale where a weight has four bits."""

FP8 = torch.float8_e4m3fn
FP8_MAX, INT8_MAX, INT4_MAX = 448.0, 127.0, 7.0  # the largest values; int4's of 15 steps around its zero
INT4_ZERO = 8

_STORED = {"fp8": FP8, "int8": torch.int8, "int4": torch.uint8}


class QuantWeight(NamedTuple):
    """A matrix [out_features, in_features] in 8 or 4 bits."""

    values: Tensor  # fp8: float8_e4m3fn, int8: int8 [out, in]; int4: uint8 [out, in / 2], the low nibble is column 2 j
    scales: Tensor  # float32 [out] where group is 0; float16 or float32 [out, in / group]
    zeros: Tensor | None  # int4: uint8 [out, in / group] in 0..15; None: 8 for int4, 0 for the others
    group: int  # adjacent columns that share a scale; 0: all of a row
    scheme: Scheme

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.values.shape[1] * (2 if self.scheme == "int4" else 1)

    @property
    def name(self) -> str:
        """The scheme as tables of tiles call it: "fp8", "int8", "int4-32", "int4-128"."""
        return f"{self.scheme}-{self.group}" if self.group else self.scheme

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


def quantize(matrix: Tensor, scheme: Scheme, group: int = 0, asymmetric: bool = False) -> QuantWeight:
    """`matrix` [out_features, in_features] of any float type, every weight rounded to the nearest value.

    fp8 and int8 have a scale for each row (`group` 0), by which its largest weight becomes 448 or 127. int4 has one for
    each `group` of 32 or 128 columns, by which the largest becomes 7 steps from its zero; `asymmetric` gives the 15
    steps of a group to the range from its least weight to its largest, 0 included. Scales of groups are float16 where
    all are normal numbers of it. Raises ValueError for an unknown scheme, sizes that do not fit, and NaN or infinity.
    """
    _check_scheme(scheme, group)
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"quantize: matrix is {_described(matrix)}, give a float type in two dimensions")
    if asymmetric and scheme != "int4":
        raise ValueError(f"quantize: {scheme} has no zeros, leave asymmetric out")
    wide = matrix.float()
    if not bool(wide.isfinite().all()):
        raise ValueError("quantize: matrix has NaN or infinity, give finite weights")
    if scheme == "int4":
        return _quantize_int4(wide, group, asymmetric)
    scales = _scales(wide.abs().amax(1) if wide.numel() else wide.new_zeros(wide.shape[0]),
                     FP8_MAX if scheme == "fp8" else INT8_MAX)  # [out]
    scaled = wide / scales[:, None]
    values = scaled.to(FP8) if scheme == "fp8" else scaled.round().to(torch.int8)
    return QuantWeight(values, scales, None, 0, scheme)


def _quantize_int4(wide: Tensor, group: int, asymmetric: bool) -> QuantWeight:
    rows, columns = wide.shape
    _check_columns(columns, group)
    groups = wide.view(rows, columns // group, group)  # [out, groups, group]
    zeros: Tensor | None = None
    if asymmetric:
        low = groups.amin(2).clamp_max(0.0)
        scales = _narrowest(_scales(groups.amax(2).clamp_min(0.0) - low, 2 * INT4_MAX + 1))
        zeros = (low / -scales.float()).round().clamp(0, 15).to(torch.uint8)
    else:
        scales = _narrowest(_scales(groups.abs().amax(2), INT4_MAX))
    zero = INT4_ZERO if zeros is None else zeros.float()[:, :, None]
    steps = ((groups / scales.float()[:, :, None]).round() + zero).clamp(0, 15).to(torch.uint8).view(rows, columns)
    return QuantWeight(steps[:, 0::2] | steps[:, 1::2] << 4, scales, zeros, group, "int4")


def dequantize(quant: QuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out_features, in_features]: formed in float32, rounded to `dtype` once."""
    scales, values = quant.scales.float(), quant.values
    if not quant.group:
        return (values.float() * scales[:, None]).to(dtype)
    rows, columns = quant.out_features, quant.in_features
    steps = torch.stack((values & 15, values >> 4), 2).view(rows, columns // quant.group, quant.group).float()
    zero = INT4_ZERO if quant.zeros is None else quant.zeros.float()[:, :, None]
    return ((steps - zero) * scales[:, :, None]).view(rows, columns).to(dtype)


def _scales(largest: Tensor, steps: float) -> Tensor:
    """largest / steps, float32, and a normal number where all weights are zero or nearly so."""
    return (largest / steps).clamp_min(torch.finfo(torch.float32).tiny)


def _narrowest(scales: Tensor) -> Tensor:
    """Scales of groups as float16 where all are normal numbers of it: 2 bytes beside the 16 of 32 weights, not 4.

    A group of zeros has no scale that matters: 1.
    """
    kind = torch.finfo(torch.float16)
    scales = torch.where(scales == torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
    fits = bool(((scales >= kind.tiny) & (scales <= kind.max)).all())
    return scales.half() if fits else scales


def _check_scheme(scheme: str, group: int) -> None:
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme is {scheme!r}, it must be one of {', '.join(get_args(Scheme))}")
    groups = INT4_GROUPS if scheme == "int4" else (0,)
    if group not in groups:
        raise ValueError(f"{scheme}: group is {group}, it must be {' or '.join(map(str, groups))}")


def _check_columns(columns: int, group: int) -> None:
    if columns % group:
        raise ValueError(f"int4-{group}: in_features is {columns}, it must be a multiple of the group of {group}")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
