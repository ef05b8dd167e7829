"""The tensors of a model directory: safetensors files, their headers read at once and their contents when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stars.errors import ModelError
from stars.model.files import INDEX, SINGLE, is_file, printed, read_json, shown
from stars.model.source import TensorInfo, layers_of

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""The element types a weight may have, by their safetensors names."""


class Checkpoint:
    """The safetensors files of DIRECTORY, each opened once; pickled weights are never read. beside: one more of them,
    if there is one of this name.

    Raises ModelError where there are none, where an index and its files disagree and where a file is damaged.
    """

    def __init__(self, directory: str | Path, beside: str | None = None):
        self.directory = Path(directory)
        self.shards, mapped = _find_shards(self.directory)
        if beside is not None and is_file(self.directory / beside):
            self.shards = [*self.shards, *({beside} - set(self.shards))]
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Any] = {}
        for shard in self.shards:
            path = self.directory / shard
            if not is_file(path):
                raise ModelError(f"{self.directory} lacks {shard}, which {INDEX} names: copy the model again")
            try:
                file = safe_open(path, framework="pt")
                for name in file.keys():  # noqa: SIM118 it is no dictionary
                    if name in self.tensors:
                        raise ModelError(
                            f"{printed(name)} is in both {self.tensors[name].shard} and {shard} of {self.directory}: "
                            "copy the model again"
                        )
                    part = file.get_slice(name)
                    self.tensors[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), shard)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is damaged or cut short ({error}): copy the model again") from error
            self._files[shard] = file
        for name, shard in mapped.items():
            if name not in self.tensors or self.tensors[name].shard != shard:
                raise ModelError(f"{INDEX} of {self.directory} says {printed(name)} is in {shard}, which it is not: "
                                 "copy again")

    @property
    def num_layers(self) -> int:
        """Layers that there are tensors of."""
        return layers_of(self.tensors)

    def read(self, name: str) -> Tensor:
        """Tensor `name` in the file's own type; it may be a view of the file, so keep only copies of it."""
        try:
            tensor: Tensor = self._files[self.tensors[name].shard].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"{name} cannot be read from {self.file_of(name)} ({error}): copy again") from error
        return tensor

    def file_of(self, name: str) -> Path:
        """The file that tensor `name` is in."""
        return self.directory / self.tensors[name].shard


def _find_shards(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the safetensors files, and the index's map of tensor to file where there is one."""
    if is_file(directory / SINGLE):
        return [SINGLE], {}
    if is_file(directory / INDEX):
        mapped = read_json(directory / INDEX).get("weight_map")
        if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
            raise ModelError(f"{directory / INDEX} holds no weight_map of tensors to files: copy the model again")
        for shard in mapped.values():
            if Path(shard).name != shard or not shard.isprintable():
                raise ModelError(f"{directory / INDEX} names {shown(shard)}, which is not a file beside it: refused")
        return sorted(set(mapped.values())), mapped
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory} has its weights in {pickles[0]}, a pickle, which is never read: convert them to {SINGLE} "
            "(transformers' save_pretrained does) and use that directory"
        )
    raise ModelError(f"{directory} has neither {SINGLE} nor {INDEX}: copy the model again with its weights")
