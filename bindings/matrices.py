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


def stored_type(dtype: torch.dtype, arithmetic: Arithmetic) -> int:
    """The stars_dtype of a packed matrix."""
    return _BF16_DOT if arithmetic == "bfloat16" else _STORED[dtype]


def _packed_bytes(out_features: int, in_features: int, stored: int) -> int:
    if max(out_features, in_features) >= 2**63:  # ctypes would cut it off
        raise ValueError(f"stars_packed_bytes: a matrix of [{out_features}, {in_features}] is too large")
    count = int(loaded().stars_packed_bytes(out_features, in_features, stored))
    if count == 0:
        raise ValueError(last_error())
    return count
