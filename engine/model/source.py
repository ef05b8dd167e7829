"""What a loader reads from, whatever the format of the files: tensors by their Hugging Face names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Protocol, get_args

from torch import Tensor

from stars.kernels.quant import QuantWeight, Rounded
from stars.kernels.quant_blocks import LAYOUTS

SCHEMES = {scheme.upper() for scheme in (*get_args(Rounded), *LAYOUTS)}


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
        """Whether it is read as a QuantWeight."""
        return self.dtype.split("-")[0] in SCHEMES


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
