"""A model's shape and switches, read from config.json and generation_config.json in either dialect."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars.errors import ModelError
from stars.model.bases import model_directory
from stars.model.checkpoint import Checkpoint
from stars.model.families import FAMILIES, Family
from stars.model.files import is_directory, is_file, is_finite, is_gguf, read_json, shown
from stars.model.gguf_config import gguf_settings
from stars.model.quantised_config import storage_of
from stars.model.rope import RopeConfig, parse_rope

HEADS = ("ForCausalLM", "ForSequenceClassification", "Model")
"""What may follow the family's class prefix in `architectures`."""
REWARD_HEADS = ("ForTokenClassification", "ForRewardModel", "ForProcessRewardModel", "ForRewardModelWithGating",
                "ForRewardModelWithGating3", "ForRewardModelWithGating31", "RewardModel", "ForScore", "ModelForScore")
"""The same, of reward models whose classes transformers has not; what they end with is told by their tensors."""
REWARD_CLASSES = ("INFORMForSequenceClassification", "EurusRewardModel", "GRewardModel")
"""Of such models, classes that are not called after the family."""
PAIRWISE = re.compile("pair.?(rm|wise|preference)", re.IGNORECASE)
"""What is in the names of models that compare two responses."""
MOST = 2**31 - 1
"""Sizes, positions and token ids are int32 in the kernels."""
SURE_LAYERS = 1000
"""Layers that are believed without a look at the tensors: few enough to be compared one by one afterwards."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder needs to know, checked once. Sizes are in elements, positions and windows in tokens."""

    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    sliding_window: tuple[int | None, ...]  # one entry a layer; None sees everything
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]  # config.json's and generation_config.json's together
    bos_token_id: int | None
    num_labels: int
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    attention_scale: float
    attention_softcap: float | None = None
    quantization: str | None = None  # how config.json says that the checkpoint is stored: its quant_method

    @property
    def is_reward(self) -> bool:
        """Whether `architectures` names the class of a reward model."""
        prefix = FAMILIES[self.model_type].class_prefix
        return any(name not in (f"{prefix}ForCausalLM", f"{prefix}Model") for name in self.architectures)

    @property
    def context_length(self) -> int:
        """Most tokens of a text: max_position_embeddings, or more where the rotation is stretched beyond it."""
        return min(self.rope.context_length(self.max_position_embeddings), MOST)


def load_config(directory: str | Path) -> ModelConfig:
    """Reads DIRECTORY/config.json, and generation_config.json where there is one, or a GGUF file's metadata; of an
    adapter, its base's.

    Raises ModelError for a missing or broken file, an unsupported model type, architecture, rope type, activation or
    quantisation, for sizes that do not fit together, and for more layers than the weights' headers hold.
    """
    directory = Path(directory)
    if not is_directory(directory) and not is_gguf(directory):
        raise ModelError(f"{directory} is not a directory: give the path of a model in Hugging Face format")
    directory = model_directory(directory)
    if is_gguf(directory):
        try:
            return parse_config(gguf_settings(directory), {}, str(directory))
        except ModelError as error:  # there is no config.json to repair
            raise ModelError(str(error).replace("repair config.json", "use another file")) from error
    path = directory / "config.json"
    if not is_file(path):
        raise ModelError(f"{directory} has no config.json: give the path of a model in Hugging Face format")
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if is_file(generation_path) else {}
    config = read_json(path)
    if _size(config, "num_hidden_layers", str(path)) > SURE_LAYERS:
        _check_layers(config["num_hidden_layers"], Checkpoint(directory))
    return parse_config(config, generation, str(path))


def refuse_pairwise(config: dict[str, Any], where: str) -> None:
    """Raises ModelError for a model that compares two responses; `where` names its config.json."""
    architectures = config.get("architectures")
    named = [*(architectures if isinstance(architectures, list) else ()), config.get("model_type")]
    pairwise = [name for name in named if isinstance(name, str) and PAIRWISE.search(name)]
    if pairwise:
        raise ModelError(f"{where} is of a pairwise model ({shown(pairwise[0])}), which compares two responses and has "
                         "no reward of one: use a reward model with one score")


def _check_layers(count: int, checkpoint: Checkpoint) -> None:
    """Raises ModelError where config.json's num_hidden_layers is not the number of layers that there are tensors of."""
    held = checkpoint.num_layers
    if count != held:
        raise ModelError(
            f"{checkpoint.directory / 'config.json'} has num_hidden_layers = {count} and the tensors beside it are of "
            f"{held} layers: use config.json of the same checkpoint, or copy the model again"
        )


def parse_config(config: dict[str, Any], generation: dict[str, Any], where: str) -> ModelConfig:
    """The configuration from the objects of config.json and generation_config.json; `where` names the first."""
    family = _family(config, where)
    _refuse_unsupported(config, family, where)
    hidden_size = _size(config, "hidden_size", where)
    num_heads = _size(config, "num_attention_heads", where)
    num_layers = _size(config, "num_hidden_layers", where)
    # null means one KV head per query head, an absent key means the family's default
    num_kv_heads = config.get("num_key_value_heads", family.default_num_kv_heads)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    head_dim = config.get("head_dim")
    head_dim = (family.default_head_dim or hidden_size // num_heads) if head_dim is None else head_dim
    for name, value in (("num_key_value_heads", num_kv_heads), ("head_dim", head_dim)):
        _size({name: value}, name, where)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{where} has {num_heads} attention heads, not a multiple of its {num_kv_heads} key-value heads: "
            "repair config.json"
        )
    if head_dim % 2:
        raise ModelError(f"{where} has an odd head_dim {head_dim}, which cannot be rotated: repair config.json")
    storage = storage_of(config, where)
    max_positions = _size(config, "max_position_embeddings", where)
    bos_token_id = _token_ids(config.get("bos_token_id"), "bos_token_id", where)
    eos_token_ids = _token_ids(config.get("eos_token_id"), "eos_token_id", where)
    beside = str(Path(where).with_name("generation_config.json"))
    eos_token_ids += _token_ids(generation.get("eos_token_id"), "eos_token_id", beside)
    eps = config.get("rms_norm_eps", 1e-6)
    if not is_finite(eps) or not 0 <= eps < 1:
        raise ModelError(f"{where} has rms_norm_eps = {shown(eps)} where a small number is needed: repair config.json")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(dtype, str):
        raise ModelError(f"{where} has dtype = {shown(dtype)} where a name such as bfloat16 is needed: repair "
                         "config.json")
    return ModelConfig(
        model_type=config["model_type"],
        architectures=tuple(config.get("architectures") or ()),
        vocab_size=_size(config, "vocab_size", where),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_size(config, "intermediate_size", where),
        rms_norm_eps=float(eps),
        max_position_embeddings=max_positions,
        rope=parse_rope(config, max_positions, where),
        sliding_window=_windows(config, family, num_layers, where),
        tie_word_embeddings=_switch("tie_word_embeddings", config, where),
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        bos_token_id=bos_token_id[0] if bos_token_id else None,
        num_labels=_num_labels(config, where),
        dtype=dtype.removeprefix("torch."),
        qkv_bias=_switch(family.qkv_bias, config, where),
        o_bias=_switch(family.o_bias, config, where),
        mlp_bias=_switch(family.mlp_bias, config, where),
        qk_norm=family.qk_norm,
        attention_scale=head_dim**-0.5,
        quantization=None if storage is None else storage.method,
    )


def _family(config: dict[str, Any], where: str) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"{where} has model_type {shown(model_type)}, which is not supported: use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _refuse_unsupported(config: dict[str, Any], family: Family, where: str) -> None:
    known = [family.class_prefix + head for head in HEADS]
    others = [*(family.class_prefix + head for head in REWARD_HEADS), *REWARD_CLASSES]
    architectures = config.get("architectures") or ()
    if not isinstance(architectures, (list, tuple)):
        raise ModelError(f"{where} has architectures = {shown(architectures)} where a list of class names is needed: "
                         "repair config.json")
    refuse_pairwise(config, where)
    for architecture in architectures:
        if architecture not in known and architecture not in others:
            raise ModelError(
                f"{where} has architecture {shown(architecture)}, which is not supported: use one of {', '.join(known)}"
            )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{where} has activation {shown(activation)}, which is not supported: use a model with silu")


def _windows(config: dict[str, Any], family: Family, num_layers: int, where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens, None for full attention."""
    if family.window == "none":
        return (None,) * num_layers
    window = config.get("sliding_window", family.default_window)
    if family.window == "layer_types" and not _switch("use_sliding_window", config, where):
        window = None
    if window is not None:
        _size({"sliding_window": window}, "sliding_window", where)
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.get("max_window_layers", family.default_max_window_layers)
        first = 0 if family.window == "every_layer" or first is None else first
        if not isinstance(first, int):
            raise ModelError(f"{where} has max_window_layers = {shown(first)} where a number of layers is needed: "
                             "repair config.json")
        return tuple(window if index >= first else None for index in range(num_layers))
    if not isinstance(layer_types, (list, tuple)):
        raise ModelError(f"{where} has layer_types = {shown(layer_types)} where a list is needed: repair config.json")
    if len(layer_types) != num_layers:
        raise ModelError(f"{where} has {len(layer_types)} layer_types for {num_layers} layers: repair config.json")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"{where} has layers of type {shown(layer_type)}, which is not supported: use a model whose layers are "
                "all full_attention or sliding_attention"
            )
    if family.window == "every_layer" and window is not None and "full_attention" in layer_types:
        raise ModelError(
            f"{where} mixes full and sliding layers, which a {config['model_type']} model does not have: "
            "remove layer_types, or set sliding_window to null"
        )
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _num_labels(config: dict[str, Any], where: str) -> int:
    """How many scores a classification head gives: id2label says so, and transformers' default is 2."""
    labels = config.get("id2label")
    if labels is not None and not isinstance(labels, dict):
        raise ModelError(f"{where} has id2label = {shown(labels)} where an object is needed: repair config.json")
    return len(labels) if labels else _size({"num_labels": 2, **config}, "num_labels", where)


def _switch(switch: bool | str, config: dict[str, Any], where: str) -> bool:
    """A family's switch, or what config.json says under its name; absent and null are off."""
    value = config.get(switch) if isinstance(switch, str) else switch
    if value not in (None, False, True):
        raise ModelError(f"{where} has {switch} = {shown(value)} where true or false is needed: repair config.json")
    return bool(value)


def _size(config: dict[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{where} has {name} = {shown(value)} where a positive integer is needed: repair config.json")
    if value > MOST:
        raise ModelError(f"{where} has {name} = {shown(value)}, beyond the {MOST} that fit in 32 bits: repair "
                         "config.json")
    return value


def _token_ids(value: Any, name: str, where: str) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ModelError(f"{where} has {name} = {shown(value)} where token ids are needed: repair that file")
    # An id that no model has is one that is never drawn, as in transformers; it must only fit 32 bits here.
    return tuple(token_id for token_id in ids if 0 <= token_id <= MOST)
