"""Which matrices of a model are rounded to fewer bits as they are read, to what, and what is held of them then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from stars.arguments import shown
from stars.errors import ModelError, StarsError
from stars.kernels.quant import Rounded
from stars.kernels.quant_blocks import LAYOUTS
from stars.model.head_files import LM_HEAD
from stars.model.source import TensorInfo, TensorSource
from stars.target import Target

INT4_GROUP = 32
"""Columns that share a scale where matrices are rounded to int4 as they are read."""
EMBEDDING = "embed_tokens.weight"
TIED: Rounded = "int8"
"""What an embedding is rounded to that is the language model's head, too, whatever the other matrices are."""


def checked_quantization(value: Any, target: Target, name: str = "quantization", stored: str | None = None,
                         error: type[StarsError] = ModelError) -> Rounded | None:
    """`value` as what matrices are rounded to on a device; None where it says how the model is `stored` already.

    Raises `error` for what is no name of that.
    """
    if value is None or (stored is not None and value == stored):
        return None
    if stored is not None:
        raise error(f"{name} is {shown(value)}, and the model is stored as {stored} already: leave {name} out")
    if not isinstance(value, str) or value not in target.quantizations:
        choices = " or ".join(f'"{one}"' for one in target.quantizations)
        elsewhere = "" if value != "fp8" else ": no CPU multiplies its numbers"
        raise error(f'{name} is {shown(value)}, it must be None, {choices} on device "{target.device}"{elsewhere}')
    return cast(Rounded, value)


def scheme_of(name: str, rounded: Rounded | None, tied: bool) -> Rounded | None:
    """What the tensor `name` is rounded to in a model that is `rounded`: the layers' products and the head are; an
    embedding only where it is `tied` to the head; norms, biases and heads of rewards never."""
    if rounded is None or not name.endswith(("_proj.weight", LM_HEAD, EMBEDDING)):
        return None
    if name.endswith(EMBEDDING):
        return TIED if tied else None
    return rounded


def rounding(source: TensorSource, matrices: Iterable[str], value: Rounded | None, stored: str | None,
             tied: bool) -> Rounded | None:
    """What a model's matrices are rounded to, where `value` is asked for: None where they are so already.

    matrices: their names in the source. Raises ModelError for a model that is quantised otherwise, and for columns that
    do not divide into groups, by the name of the tensor: nothing is read.
    """
    if value is None:
        return None
    infos = {name: source.tensors[name] for name in matrices}
    kinds = sorted({info.dtype for info in infos.values() if info.quantised})
    if kinds:
        if all(kind.lower().split("-")[0] == value for kind in kinds):
            return None
        raise ModelError(f"{source.directory} is quantised already ({stored or ', '.join(kinds)}): leave quantization "
                         "out, or give the model as it was before")
    for name, info in infos.items():
        if scheme_of(name, value, tied) == "int4" and info.shape[1] % INT4_GROUP:
            raise ModelError(f"{name} of {source.directory} has {info.shape[1]} columns, which int4 cannot divide into "
                             f"groups of {INT4_GROUP}: use quantization=\"int8\", or leave it out")
    return value


def held_bytes(info: TensorInfo, scheme: Rounded | None, itemsize: int) -> int:
    """Bytes that a GPU holds of a tensor; itemsize: of a plain number there. Of what is stored in blocks only Q4_0 is
    kept so: its kernels read no others."""
    name, *group = info.dtype.lower().split("-")
    if info.quantised and name not in LAYOUTS:
        return _quantised_bytes(info, name, int(group[0]) if group else 0)
    if name == "q4_0":
        return _quantised_bytes(info, "int4", LAYOUTS["q4_0"].columns)
    if info.quantised or scheme is None:
        return info.size * itemsize
    return _quantised_bytes(info, scheme, INT4_GROUP if scheme == "int4" else 0)


def _quantised_bytes(info: TensorInfo, scheme: str, group: int) -> int:
    """With scales, and zeros as if there were some: of groups of 128 both are float32, see `kernels.pack`."""
    if scheme != "int4":
        return info.size + 4 * info.shape[0]
    return info.size // 2 + info.size // group * (8 if group == 128 else 4)
