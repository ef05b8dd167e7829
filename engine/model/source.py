"""What a loader reads from, whatever the format of the files: tensors by their Hugging Face names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol, get_args

from torch import Tensor

from stars.kernels.quant import QuantWeight, Rounded, dequantize
from stars.kernels.quant_blocks import LAYOUTS

BLOCKS = {"F32": (1, 4), "BF16": (1, 2), "F16": (1, 2)} | {
    name.upper(): (layout.columns, layout.nbytes) for name, layout in LAYOUTS.items()}
"""Columns and bytes of a block, by the types that are read; plain numbers are blocks of one."""


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    shape: tuple[int, ...]  # of the numbers that it stands for, however they are stored
    dtype: str  # a safetensors name such as "BF16"; of a QuantWeight its scheme's, such as "Q4_1" or "INT4-128"
    shard: str  # the file's name

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def quantised(self) -> bool:
        """Whether it is read as a QuantWeight, where it is a matrix."""
        return self.dtype in BLOCKS and BLOCKS[self.dtype][0] > 1 or self._rounded in get_args(Rounded)

    @property
    def nbytes(self) -> int | None:
        """Bytes of it as stored; None where its type is not read."""
        if self.dtype in BLOCKS:
            columns, nbytes = BLOCKS[self.dtype]
            return self.size // columns * nbytes
        if self._rounded == "int4":  # with a scale and a zero in float16 and a byte
            return self.size // 2 + 3 * (self.size // int(self.dtype.split("-")[1]))
        return self.size + 4 * self.shape[0] if self._rounded in get_args(Rounded) else None

    @property
    def _rounded(self) -> str:
        return self.dtype.split("-")[0].lower()


class TensorSource(Protocol):
    """The tensors of one model, their headers read and their contents not yet."""

    directory: Path  # where the files are; of a model that is one file, the file
    shards: list[str]  # names of files
    tensors: dict[str, TensorInfo]

    @property
    def num_layers(self) -> int:
        """Layers that there are tensors of."""

    def read(self, name: str) -> Tensor | QuantWeight:
        """A tensor as it is stored; it may be a view of the file, so keep only copies of it. Vectors are plain."""

    def file_of(self, name: str) -> Path:
        """The file that a tensor is in."""


def layers_of(names: Iterable[str]) -> int:
    """Layers that there are tensors of, by the numbers in their names."""
    parts = [name.removeprefix("model.").split(".", 2) for name in names]
    return len({part[1] for part in parts if part[0] == "layers" and len(part) == 3})


def plain(source: TensorSource, name: str) -> Tensor:
    """A tensor of numbers, whatever it is stored as; it may be a view of the file."""
    tensor = source.read(name)
    return tensor if isinstance(tensor, Tensor) else dequantize(tensor)
