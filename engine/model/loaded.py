"""A model that transformers has loaded, as what a loader reads from: its tensors lie in memory already.

transformers is not imported here: whoever has such a model has it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stars.errors import ModelError
from stars.model.files import is_directory, printed, settings_of
from stars.model.source import TensorInfo, TensorSource, layers_of
from stars.model.tokenizer import Tokenizer, load_tokenizer
from stars.target import target_of

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What numbers a weight may have, by their safetensors names."""
PLAIN = (Tensor, torch.nn.Parameter)
"""Classes of tensors that hold what they stand for: others are quantised or distributed."""
ALONE = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight", ".gate_up_proj.weight")
"""Ends of the names of matrices that are products by themselves: of the others several become one, by one below the
other."""


def origin_of(model: Any) -> Path | None:
    """Where a PreTrainedModel was loaded from, if that is a directory here."""
    path = getattr(model.config, "_name_or_path", None)
    return Path(path) if isinstance(path, str) and path and is_directory(Path(path)) else None


class LoadedModel:
    """The tensors of a PreTrainedModel of transformers, where they lie: none is copied here, and none is written to.

    It holds the model's weights as long as it lives. Raises ModelError for what cannot be read from memory: weights on
    several devices or on none, quantised ones, adapters that are not merged.
    """

    def __init__(self, model: Any):
        self.name = type(model).__name__
        self.directory = Path(f"the {self.name} given")  # for errors; there is nothing of that name
        self.shards = ["memory"]
        self.number = id(model)
        self._tensors: dict[str, Tensor] = _checked_tensors(model, self.name)
        self.tensors = {name: TensorInfo(tuple(tensor.shape), TYPES[tensor.dtype], "memory")
                        for name, tensor in self._tensors.items()}
        self.device = next(iter(self._tensors.values())).device
        # What save_pretrained would write, with the class and the type that the model has by now.
        self.settings: dict[str, Any] = json.loads(model.config.to_json_string())
        self.settings |= {"architectures": [self.name], "dtype": str(model.dtype).removeprefix("torch.")}
        generation = getattr(model, "generation_config", None)
        self.generation: dict[str, Any] = {} if generation is None else generation.to_dict()
        self.origin = origin_of(model)

    def __str__(self) -> str:
        return str(self.directory)

    @property
    def num_layers(self) -> int:
        """Layers that there are tensors of."""
        return layers_of(self.tensors)

    def read(self, name: str) -> Tensor:
        """The tensor itself, without its gradient: whoever changes it changes the model."""
        return self._tensors[name]

    def file_of(self, name: str) -> Path:
        """No file: what stands for one in errors."""
        return self.directory

    def place_of(self, name: str) -> Hashable:
        """Where a tensor lies: the same for one that two models share."""
        tensor = self._tensors[name]
        return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    def stays(self, name: str, dtype: torch.dtype, device: str, ordered: bool) -> bool:
        """Whether a tensor is used on a "cpu" or "cuda" `device` in `dtype` from where it lies: of a GPU's, matrices
        that are in the type already and products by themselves. ordered: whether rows of queries and keys change their
        places."""
        tensor = self._tensors[name]
        alone = name.endswith(ALONE) or (name.endswith(".qkv_proj.weight") and not ordered)
        here = target_of(device).own_memory and tensor.device.type == device
        return alone and here and tensor.dtype == dtype and tensor.is_contiguous()


READABLE = (str, Path, LoadedModel)
"""What weights are read from: of a Decoder they have been."""


def taken(model: Any) -> Any:
    """`model`, as a LoadedModel where it is a PreTrainedModel of transformers. Raises ModelError for one that cannot be
    read, by what stands in the way."""
    if hasattr(model, "merge_and_unload"):
        raise ModelError(f"the model given is a {type(model).__name__}, with an adapter beside its weights: give what "
                         "its merge_and_unload() returns")
    modelling = sys.modules.get("transformers.modeling_utils")
    return LoadedModel(model) if modelling is not None and isinstance(model, modelling.PreTrainedModel) else model


def same(model: Any) -> Any:
    """What two models have in common that are one: a directory or file, a model in memory, or the Decoder itself."""
    if isinstance(model, (str, Path)):
        return Path(model).resolve()
    return ("memory", model.number) if isinstance(model, LoadedModel) else id(model)


def place_of(source: TensorSource, name: str) -> Hashable:
    """What two tensors have in common that are one: a place in memory, or a file; beside their names."""
    return source.place_of(name) if isinstance(source, LoadedModel) else source.file_of(name).resolve()


def settings_beside(source: TensorSource) -> dict[str, Any]:
    """What config.json says that belongs to these tensors; nothing of a model that is one file. Raises ModelError."""
    return source.settings if isinstance(source, LoadedModel) else settings_of(source.directory)


def own_tokenizer(model: Any) -> Tokenizer | None:
    """The tokenizer of a directory or GGUF file, or of the directory that a LoadedModel was loaded from; None where
    there is none. Raises TokenizerError."""
    if isinstance(model, LoadedModel):
        return None if model.origin is None else load_tokenizer(model.origin)
    return load_tokenizer(model) if isinstance(model, (str, Path)) else None


def _checked_tensors(model: Any, name: str) -> dict[str, Tensor]:
    """All tensors of a model, detached: the same memory."""
    stored = getattr(model.config, "quantization_config", None)
    if getattr(model, "hf_quantizer", None) is not None or stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        scheme = str(getattr(method, "value", method or "an unnamed method"))
        raise ModelError(f"the {name} given is quantised by transformers ({printed(scheme)}), in a layout that is not "
                         "read from memory: load it in bfloat16, with quantization=\"int8\" or \"int4\" here if it is "
                         "to be smaller, or give its directory")
    tensors: dict[str, Tensor] = model.state_dict()
    if getattr(model, "_hf_peft_config_loaded", False) or any(".lora_" in key for key in tensors):
        raise ModelError(f"the {name} given has an adapter beside its weights: give what peft's merge_and_unload() "
                         "returns, or the base model's directory and the adapter's")
    away = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
    if away is not None:
        raise ModelError(f"the {name} given has weights that are on no device ({printed(away)} is on \"meta\"): load "
                         "it whole, without offloading, or give its directory")
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1 or not devices:
        raise ModelError(f"the {name} given has its weights on {' and '.join(devices) or 'no device'}: load it on one, "
                         "without device_map=\"auto\"")
    if not devices[0].startswith(("cpu", "cuda")):
        raise ModelError(f"the {name} given is on {devices[0]}, where no engine runs: move it with model.to(\"cpu\")")
    for key, tensor in tensors.items():
        if tensor.dtype not in TYPES or type(tensor) not in PLAIN:
            what = str(tensor.dtype).removeprefix("torch.") if tensor.dtype not in TYPES else type(tensor).__name__
            raise ModelError(f"the {name} given has {printed(key)} as {what}, which is not read: give a model whose "
                             "weights are plain float32, bfloat16 or float16")
    return tensors
