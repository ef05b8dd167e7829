"""Tensors and numbers into the structs of parameters of stars.h, whose fields say what each of them must be."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from stars.bindings.layouts import HEADER, STRUCTURES

Value: TypeAlias = "int | float | Tensor | tuple[Tensor, tuple[int, ...]] | Fields | None"
"""Of a field. An array: a tensor and the shape that it must have, or None for NULL. A void*: a tensor as it is. A
struct within: its own fields. Else a number."""
Fields: TypeAlias = dict[str, Value]

_ELEMENTS = {"float*": torch.float32, "double*": torch.float64, "int32_t*": torch.int32, "int64_t*": torch.int64}
_NUMBERS = ("int32_t", "int64_t", "float", "double")


class Struct:
    """A struct of stars.h, to be filled by the names of its fields."""

    def __init__(self, name: str):
        self.name = name
        self._structure = STRUCTURES[name]
        fields = HEADER.structs[name]
        sized = fields[0].name == "size"  # which is filled in here
        self._size = (ctypes.sizeof(self._structure),) if sized else ()
        self._columns = [(field.name, _kind(field.type)) for field in fields[sized:]]

    def fill(self, op: str, fields: Fields) -> ctypes.Structure:
        """The struct; ValueError names the operation and the tensor that has not the field's type or the shape given.

        TypeError: the header has other fields, or fields of another kind, than are given.
        """
        if len(fields) != len(self._columns):
            raise self._other_fields(op, fields)
        values: list[object] = [*self._size]
        try:
            for name, kind in self._columns:
                value = fields[name]
                if kind is int or value is None:  # ctypes refuses what is no number
                    values.append(value)
                elif isinstance(kind, torch.dtype) and isinstance(value, tuple):
                    values.append(address(op, name, value[0], kind, value[1]))
                elif kind is ctypes.c_void_p and isinstance(value, Tensor):
                    values.append(value.data_ptr())
                elif isinstance(kind, Struct) and isinstance(value, dict):
                    values.append(kind.fill(op, value))
                else:
                    raise TypeError(f"{op}: {name} of {self.name} in stars.h takes no {type(value).__name__}")
        except KeyError as error:
            raise self._other_fields(op, fields) from error
        try:
            return self._structure(*values)
        except TypeError as error:
            raise TypeError(f"{op}: {self.name} of stars.h takes no such numbers: {error}") from error

    def _other_fields(self, op: str, fields: Fields) -> TypeError:
        differing = {name for name, _ in self._columns} ^ set(fields)
        return TypeError(f"{op}: {self.name} of stars.h and the binding differ in {', '.join(sorted(differing))}")


Kind: TypeAlias = torch.dtype | Struct | type[int] | type[ctypes.c_void_p]


def _kind(of: str) -> Kind:
    """What a field of a C type takes: an array of a dtype, a struct's fields, a number, or an address."""
    of = of.removeprefix("const ")
    if of in STRUCTURES:
        return Struct(of)
    if of in _NUMBERS:
        return int
    return ctypes.c_void_p if of == "void*" else _ELEMENTS[of]


def tensors(fields: Fields) -> Iterator[Tensor]:
    """Those among the fields, and the fields of structs within."""
    for value in fields.values():
        if isinstance(value, tuple):
            yield value[0]
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors(value)


def address(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where a contiguous tensor on the CPU, of this type and shape, lies; ValueError says what it is instead."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{op}: {name} is {described(tensor)}, expected contiguous "
                         f"{str(dtype).removeprefix('torch.')} {list(shape)} on cpu")
    return tensor.data_ptr()


def described(tensor: Tensor) -> str:
    """A tensor's type, shape and place in words."""
    layout = "" if tensor.is_contiguous() else " not contiguous"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}{layout}"
