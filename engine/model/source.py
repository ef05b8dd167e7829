"""What a loader reads from, whatever the format of the files: tensors by their Hugging Face names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from stars.kernels.quant import QuantWeight


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    shape: tuple[int, ...]  # of the numbers that it stands for, however they are stored
    dtype: str  # a safetensors name such as "BF16"; of a QuantWeight its scheme's, such as "Q4_1" or "INT4-128"
    shard: str  # the file's name

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


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
