"""Directories of LoRA adapters, as peft writes them: low-rank matrices beside the weights of a base model.

    y = W x + scale * B (A x),  scale = lora_alpha / r, or with rank-stabilised adapters lora_alpha / sqrt(r)

A [r, in_features] and B [out_features, r] of a module are its tensors lora_A and lora_B (Hu et al., arXiv 2106.09685;
Kalajdzievski, arXiv 2312.03732). Modules that were trained whole lie beside them under their own names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stars.errors import ModelError
from stars.kernels.quant import QuantWeight
from stars.model.bases import CONFIG, MERGE
from stars.model.checkpoint import ITEM_BYTES
from stars.model.files import is_file, is_finite, printed, read_json, shown
from stars.model.source import TensorInfo, TensorSource

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PRODUCTS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
"""The modules of a layer that may have an adapter, by the product that they are formed in."""
ADAPTED = [module for modules in PRODUCTS for module in modules]
MODULE = re.compile(r"model\.layers\.[0-9]+\.(?:" + "|".join(map(re.escape, ADAPTED)) + ")")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,), "bias": ("none",), "fan_in_fan_out": (False,),
    "layer_replication": ([],), "alora_invocation_tokens": ([],), "trainable_token_indices": ([], {}),
    "target_parameters": ([],), "arrow_config": (), "use_bdlora": (False,)}
"""Keys of adapter_config.json by which more than the products changes, with the values that change nothing."""
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of init_lora_weights by which the base's own weights were changed, too."""


class Pair(NamedTuple):
    """The two matrices of one module."""

    down: str  # names of tensors: lora_A
    up: str  # lora_B
    rank: int
    in_features: int
    out_features: int
    scale: float  # of their product


class AdaptedCheckpoint:
    """The tensors of an adapter's base, whatever source that is, with those modules that the adapter brings whole in
    their place, and the pairs of its low-rank matrices by module.

    Raises ModelError for what cannot be kept beside the base: other kinds of adapters, modules that have no adapters
    here, damaged files.
    """

    def __init__(self, adapter: Path, base: TensorSource):
        self.directory, self.shards, self.num_layers = base.directory, base.shards, base.num_layers
        self.tensors = dict(base.tensors)
        self.adapter = adapter
        self._base = base
        self._aliases: dict[str, str] = {}  # of modules that were trained whole, what the adapter's file calls them
        self._low: dict[str, TensorInfo] = {}
        path = adapter / WEIGHTS
        if not is_file(path):
            pickled = ", and a pickle is never read" if is_file(adapter / "adapter_model.bin") else ""
            raise ModelError(f"{adapter} lacks {WEIGHTS}{pickled}: save the adapter with peft's save_pretrained")
        config = read_json(adapter / CONFIG)
        _check(config, adapter)
        bare = not any(name.startswith("model.") for name in self.tensors)
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 it is no dictionary
                part = file.get_slice(name)
                info = TensorInfo(tuple(part.get_shape()), part.get_dtype(), WEIGHTS)
                if not name.startswith(PREFIX):
                    raise ModelError(f"{path} has {printed(name)}, and names of an adapter's tensors begin with "
                                     f"{PREFIX}: save the adapter with peft's save_pretrained")
                if ".lora_" in name:
                    self._low[name] = info
                else:
                    self._take(name, info, bare)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged or cut short ({error}): copy the adapter again") from error
        self._file = file
        self.pairs = _pairs(self._low, config, adapter)

    def read(self, name: str) -> Tensor | QuantWeight:
        """A tensor of the adapter's, or of its base as that reads it."""
        return self._own(self._aliases[name]) if name in self._aliases else self._base.read(name)

    def file_of(self, name: str) -> Path:
        """The adapter's file, or the base's."""
        return self.adapter / WEIGHTS if name in self._aliases else self._base.file_of(name)

    def low_rank(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """lora_A [rank, in_features], and lora_B [out_features, rank] times the scale: float32."""
        return self._own(pair.down).float(), self._own(pair.up).float() * pair.scale

    def _own(self, name: str) -> Tensor:
        """A tensor of the adapter's file, by its name there."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"{name} cannot be read from {self.adapter / WEIGHTS} ({error}): copy again") from error
        return tensor

    def _take(self, name: str, info: TensorInfo, bare: bool) -> None:
        """A tensor of a module that was trained whole; `bare`: the base leaves "model." out of its names."""
        full = name.removeprefix(PREFIX)
        own = full.removeprefix("model.") if bare else full
        if own not in self.tensors and full.startswith("model.layers."):
            raise ModelError(f"{self.adapter} has {printed(name)}, and its base has no such tensor: use the adapter "
                             "with the base model that it was trained on")
        self.tensors[own] = info
        self._aliases[own] = name


def _check(config: Mapping[str, Any], adapter: Path) -> None:
    """Raises ModelError unless an adapter's settings are of plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{adapter / CONFIG} has peft_type = {shown(kind)}, and LORA adapters are read: {MERGE}")
    for name, neutral in NEUTRAL.items():
        value = config.get(name)
        if value is not None and value not in neutral:
            raise ModelError(f"{adapter} is an adapter with {name} = {shown(value)}, which is not supported: {MERGE}")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGED_BASE):
        raise ModelError(f"{adapter} has init_lora_weights = {shown(begun)}, by which its base was changed, too: "
                         f"{MERGE}")
    if not isinstance(config.get("use_rslora", False), (bool, type(None))):
        raise ModelError(f"{adapter / CONFIG} has use_rslora = {shown(config['use_rslora'])} where true or false is "
                         "needed: repair it")


def _pairs(low: Mapping[str, TensorInfo], config: Mapping[str, Any], adapter: Path) -> dict[str, Pair]:
    """The matrices of every adapted module by its full name."""
    pairs: dict[str, Pair] = {}
    downs: dict[str, str] = {}
    for name in low:
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        module = module if module.startswith("model.") else f"model.{module}"
        if MODULE.fullmatch(module) is None or part not in ("A.weight", "B.weight"):
            raise ModelError(f"{adapter} has {printed(name)}, and adapters are read of "
                             f"{', '.join(one.split('.')[1] for one in ADAPTED)} alone: {MERGE}")
        if part == "A.weight":
            if module in downs:
                raise ModelError(f"{adapter} has both {printed(downs[module])} and {printed(name)}: save the adapter "
                                 "with peft's save_pretrained")
            downs[module] = name
    if not low:
        raise ModelError(f"{adapter / WEIGHTS} has no lora_A and lora_B: save the adapter with peft's save_pretrained")
    for module, down in downs.items():
        up = down.replace(".lora_A.", ".lora_B.")
        if up not in low or len(low[down].shape) != 2 or len(low[up].shape) != 2 or (
                low[down].shape[0] != low[up].shape[1]) or not low[down].shape[0]:
            raise ModelError(f"{adapter} has {printed(down)} without a lora_B that goes with it: copy the adapter "
                             "again")
        wrong = next((low[one].dtype for one in (down, up) if low[one].dtype not in ITEM_BYTES), None)
        if wrong is not None:
            raise ModelError(f"{printed(down)} of {adapter} is stored as {wrong}, which is not supported: save the "
                             "adapter in float32, bfloat16 or float16")
        rank, in_features = low[down].shape
        pairs[module] = Pair(down, up, rank, in_features, low[up].shape[0], _scale(module, rank, config, adapter))
    if len(low) != 2 * len(pairs):
        orphan = next(name for name in low if name.replace(".lora_B.", ".lora_A.") not in downs.values())
        raise ModelError(f"{adapter} has {printed(orphan)} without its lora_A: copy the adapter again")
    return pairs


def _scale(module: str, rank: int, config: Mapping[str, Any], adapter: Path) -> float:
    """What a module's product of matrices is multiplied by."""
    where = adapter / CONFIG
    if not config.get("rank_pattern") and config.get("r") != rank:
        raise ModelError(f"{where} has r = {shown(config.get('r'))} and {module} has matrices of rank {rank}: use the "
                         f"{CONFIG} that was saved with them")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in patterns):
        raise ModelError(f"{where} has alpha_pattern = {shown(patterns)}, and names of modules are read, no patterns: "
                         f"{MERGE}")
    alpha = next((value for name, value in patterns.items() if module == name or module.endswith(f".{name}")),
                 config.get("lora_alpha"))
    if not is_finite(alpha):
        raise ModelError(f"{where} has lora_alpha = {shown(alpha)} where a number is needed: repair it")
    assert isinstance(alpha, (int, float))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
