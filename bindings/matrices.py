"""Matrices in the packed form that libstars multiplies with."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from stars.bindings.huge_pages import empty
from stars.bindings.layouts import HEADER
from stars.bindings.library import check_status, last_error, loaded
from stars.bindings.params import address, described

Arithmetic = Literal["float32", "bfloat16"]

_STORED = {torch.float32: HEADER.constants["STARS_F32"], torch.bfloat16: HEADER.constants["STARS_BF16"]}
_BF16_DOT = HEADER.constants["STARS_BF16_DOT"]
_BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")


class Quantised(Protocol):
    """A `stars.kernels.quant.QuantWeight`, whose tensors have been checked."""

    @property
    def values(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def zeros(self) -> Tensor | None: ...
    @property
    def group(self) -> int: ...
    @property
    def scheme(self) -> str: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...


class PackedWeight(Protocol):
    """What operations read of a `stars.kernels.Weight`, which must be packed."""

    @property
    def values(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype | None: ...
    @property
    def arithmetic(self) -> Arithmetic: ...
    @property
    def format(self) -> str | None: ...


def pack(matrix: Tensor, arithmetic: Arithmetic = "float32") -> Tensor:
    """The packed form, a uint8 vector, of a float32 or bfloat16 `matrix` [out_features, in_features].

    With `arithmetic` "bfloat16", for bfloat16 matrices only, in the order in which pairs of its values are multiplied.
    """
    if matrix.dim() != 2 or matrix.dtype not in _STORED or (
        arithmetic == "bfloat16" and matrix.dtype != torch.bfloat16
    ):
        expected = "bfloat16" if arithmetic == "bfloat16" else "float32 or bfloat16"
        raise ValueError(f"pack: matrix is {described(matrix)}, expected a {expected} matrix")
    pointer = address("pack", "matrix", matrix, matrix.dtype, matrix.shape)
    out_features, in_features = matrix.shape
    dtype = stored_type(matrix.dtype, arithmetic)
    packed = empty(_packed_bytes(out_features, in_features, dtype))
    check_status(loaded().stars_pack(pointer, out_features, in_features, dtype, packed.data_ptr()))
    return packed


def unpack(
    packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype, arithmetic: Arithmetic = "float32",
) -> Tensor:
    """The matrix [out_features, in_features] that `pack` was given."""
    if dtype not in _STORED:
        raise ValueError(f"unpack: dtype is {dtype}, expected float32 or bfloat16")
    stored = stored_type(dtype, arithmetic)
    size = _packed_bytes(out_features, in_features, stored)
    pointer = address("unpack", "packed", packed, torch.uint8, (size,))
    matrix = torch.empty(out_features, in_features, dtype=dtype)
    check_status(loaded().stars_unpack(pointer, out_features, in_features, stored, matrix.data_ptr()))
    return matrix


def format_of(scheme: str, scales: torch.dtype = torch.float16, zeros: bool = False) -> str | None:
    """What libstars stores a QuantWeight as: the name of a stars_dtype less its STARS_; None: it has none for it.

    `scales` and `zeros` are of int4: the type of the one, and whether there are the others.
    """
    if scheme in _BLOCKS or scheme == "int8":
        return scheme.upper()
    if scheme != "int4":
        return None
    return "INT4_F32" if scales == torch.float32 else "INT4" if zeros else "Q4_0"


def pack_quant(quant: Quantised) -> tuple[Tensor, str]:
    """The packed form, a uint8 vector, of a matrix on the CPU, and its format; about as many bytes as before.

    The values may be a view of a mapped file: they are read once, by all threads. ValueError: libstars has no format
    for the scheme, or the tensors are none of the CPU's.
    """
    form = format_of(quant.scheme, quant.scales.dtype, quant.zeros is not None)
    if form is None:
        raise ValueError(f"pack: libstars has no products of {quant.scheme}")
    out_features, in_features = quant.out_features, quant.in_features
    packed = empty(quant_bytes(out_features, in_features, form))
    values, zeros = quant.values, quant.zeros
    scales = quant.scales if quant.scales.numel() else None
    check_status(loaded().stars_pack_quant(
        address("pack", "values", values, values.dtype, values.shape),
        None if scales is None else address("pack", "scales", scales, scales.dtype, scales.shape),
        None if zeros is None else address("pack", "zeros", zeros, torch.uint8, zeros.shape),
        quant.group, out_features, in_features, _number(form), packed.data_ptr()))
    return packed, form


def unpack_quant(packed: Tensor, out_features: int, in_features: int, form: str) -> Tensor:
    """The matrix float32 [out_features, in_features], to the bit what `stars.kernels.quant.dequantize` makes."""
    size = quant_bytes(out_features, in_features, form)
    pointer = address("unpack", "packed", packed, torch.uint8, (size,))
    matrix = torch.empty(out_features, in_features)
    check_status(loaded().stars_unpack_quant(pointer, out_features, in_features, _number(form), matrix.data_ptr()))
    return matrix


def quant_bytes(out_features: int, in_features: int, form: str) -> int:
    """Bytes of the packed form of a matrix [out_features, in_features] in a format; ValueError: it cannot be."""
    if max(out_features, in_features) >= 2**63:  # ctypes would cut it off
        raise ValueError(f"stars_quant_bytes: a matrix of [{out_features}, {in_features}] is too large")
    count = int(loaded().stars_quant_bytes(out_features, in_features, _number(form)))
    if count == 0:
        raise ValueError(last_error())
    return count


def _number(form: str) -> int:
    return HEADER.constants[f"STARS_{form}"]


def stored_type(dtype: torch.dtype | None, arithmetic: Arithmetic, form: str | None = None) -> int:
    """The stars_dtype of a packed matrix: of a type and an arithmetic, or in a format of few bits."""
    if form is not None:
        return _number(form)
    if dtype is None:
        raise ValueError("weight has neither a dtype nor a format; make it with stars.kernels.pack")
    return _BF16_DOT if arithmetic == "bfloat16" else _STORED[dtype]


def _packed_bytes(out_features: int, in_features: int, stored: int) -> int:
    if max(out_features, in_features) >= 2**63:  # ctypes would cut it off
        raise ValueError(f"stars_packed_bytes: a matrix of [{out_features}, {in_features}] is too large")
    count = int(loaded().stars_packed_bytes(out_features, in_features, stored))
    if count == 0:
        raise ValueError(last_error())
    return count
