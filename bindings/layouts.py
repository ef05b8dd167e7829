"""stars.h in ctypes: structs of parameters, signatures of functions, made of the header that is installed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, TypeAlias

from stars.bindings.header import Header, parse

_SCALARS: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float, "double": ctypes.c_double,
}
CType: TypeAlias = "type[ctypes._SimpleCData[Any]] | type[ctypes.Structure]"


def structures(header: Header) -> dict[str, type[ctypes.Structure]]:
    """The header's structs by name."""
    made: dict[str, type[ctypes.Structure]] = {}
    for name, fields in header.structs.items():
        columns = [(field.name, _c_type(field.type, made)) for field in fields]
        made[name] = type(name, (ctypes.Structure,), {"_fields_": columns})
    return made


def declare(library: ctypes.CDLL, header: Header) -> None:
    """Gives the library's functions the header's signatures; AttributeError where it lacks one."""
    for name, signature in header.functions.items():
        function = getattr(library, name)
        function.restype = None if signature.result == "void" else _c_type(signature.result, {})
        function.argtypes = [_c_type(argument.type, {}) for argument in signature.arguments]


def _c_type(of: str, structs: dict[str, type[ctypes.Structure]]) -> CType:
    """An address is c_void_p, whatever lies there; text is c_char_p."""
    if of.endswith("*"):
        return ctypes.c_char_p if of == "const char*" else ctypes.c_void_p
    found = _SCALARS.get(of) or structs.get(of)
    if found is None:
        raise ValueError(f"stars.h: {of} is no type that stars.bindings.layouts knows; it has {', '.join(_SCALARS)}")
    return found


HEADER_TEXT = Path(__file__).with_name("stars.h").read_text(encoding="utf8")
HEADER = parse(HEADER_TEXT)
STRUCTURES = structures(HEADER)
OPERATIONS = {name.removeprefix("STARS_OP_").lower(): number for name, number in HEADER.constants.items()
              if name.startswith("STARS_OP_")}
"""The numbers of the operations, whose parameters are STRUCTURES[f"stars_{name}_params"]."""
