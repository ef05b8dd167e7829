"""The tensors that an object holds on to."""

from __future__ import annotations

import types
from typing import Any

import torch

ATOMS = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.FunctionType,
         types.BuiltinFunctionType, torch.dtype, torch.device)


def tensors_of(*roots: Any) -> list[torch.Tensor]:
    """Every tensor that can be reached from `roots` through attributes, slots and containers, one for each storage."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, ATOMS):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            known = found.get(one.untyped_storage().data_ptr())
            if known is None or known.nbytes < one.nbytes:
                found[one.untyped_storage().data_ptr()] = one
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
        else:
            waiting += list(getattr(one, "__dict__", {}).values())
            waiting += [getattr(one, name) for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())
                        if hasattr(one, name)]
    return list(found.values())


def bytes_of(*roots: Any) -> int:
    """Bytes of the storages that can be reached from `roots`."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(*roots))
