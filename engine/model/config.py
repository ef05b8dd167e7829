"""A model's shape and switches, read from config.json and generation_config.json in either dialect."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars.errors import ModelError
from stars.model.families import FAMILIES, Family
from stars.model.rope import RopeConfig, parse_rope

HEADS = ("ForCausalLM", "ForSequenceClassification", "Model")
"""What may follow the family's class prefix in `architectures`."""


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
    final_softcap: float | None = None


def load_config(directory: str | Path) -> ModelConfig:
    """Reads DIRECTORY/config.json, and generation_config.json where there is one.

    Raises ModelError for a missing or broken file, an unsupported model type, architecture, rope type, activation or
    quantisation, and for sizes that do not fit together.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory: give the path of a model in Hugging Face format")
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json: give the path of a model in Hugging Face format")
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return parse_config(read_json(path), generation, str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError where it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): copy the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object: copy the model again")
    return value


def parse_config(config: dict[str, Any], generation: dict[str, Any], where: str) -> ModelConfig:
    """The configuration from the objects of config.json and generation_config.json; `where` names the first."""
    family = _family(config, where)
    _refuse_unsupported(config, family, where)
    hidden_size = _size(config, "hidden_size", where)
    num_heads = _size(config, "num_attention_heads", where)
    num_layers = _size(config, "num_hidden_layers", where)
    # null means one KV head per query head, an absent key means the family's default
    num_kv_heads = config.get("num_key_value_heads", family.default_num_kv_heads) or num_heads
    head_dim = config.get("head_dim") or family.default_head_dim or hidden_size // num_heads
    for name, value in (("num_key_value_heads", num_kv_heads), ("head_dim", head_dim)):
        _size({name: value}, name, where)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{where} has {num_heads} attention heads, not a multiple of its {num_kv_heads} key-value heads: "
            "repair config.json"
        )
    if head_dim % 2:
        raise ModelError(f"{where} has an odd head_dim {head_dim}, which cannot be rotated: repair config.json")
    max_positions = _size(config, "max_position_embeddings", where)
    bos_token_id = _token_ids(config.get("bos_token_id"), "bos_token_id", where)
    eos_token_ids = _token_ids(config.get("eos_token_id"), "eos_token_id", where)
    eos_token_ids += _token_ids(generation.get("eos_token_id"), "eos_token_id", where)
    eps = config.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, (int, float)) or eps < 0:
        raise ModelError(f"{where} has rms_norm_eps = {eps!r} where a small number is needed: repair config.json")
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
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        bos_token_id=bos_token_id[0] if bos_token_id else None,
        num_labels=_num_labels(config),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        qkv_bias=_switch(family.qkv_bias, config),
        o_bias=_switch(family.o_bias, config),
        mlp_bias=_switch(family.mlp_bias, config),
        qk_norm=family.qk_norm,
        attention_scale=head_dim**-0.5,
    )


def _family(config: dict[str, Any], where: str) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"{where} has model_type {model_type!r}, which is not supported: use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _refuse_unsupported(config: dict[str, Any], family: Family, where: str) -> None:
    known = [family.class_prefix + head for head in HEADS]
    for architecture in config.get("architectures") or ():
        if architecture not in known:
            raise ModelError(
                f"{where} has architecture {architecture!r}, which is not supported: use one of {', '.join(known)}"
            )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{where} has activation {activation!r}, which is not supported: use a model with silu")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise ModelError(
            f"{where} is quantised with {method}, which is not supported: use the float32, bfloat16 or float16 model"
        )


def _windows(config: dict[str, Any], family: Family, num_layers: int, where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens, None for full attention."""
    if family.window == "none":
        return (None,) * num_layers
    window = config.get("sliding_window", family.default_window)
    if family.window == "layer_types" and not config.get("use_sliding_window", False):
        window = None
    if window is not None:
        _size({"sliding_window": window}, "sliding_window", where)
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.get("max_window_layers", family.default_max_window_layers)
        first = 0 if family.window == "every_layer" or first is None else first
        return tuple(window if index >= first else None for index in range(num_layers))
    if len(layer_types) != num_layers:
        raise ModelError(f"{where} has {len(layer_types)} layer_types for {num_layers} layers: repair config.json")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"{where} has layers of type {layer_type!r}, which is not supported: use a model whose layers are all "
                "full_attention or sliding_attention"
            )
    if family.window == "every_layer" and window is not None and "full_attention" in layer_types:
        raise ModelError(
            f"{where} mixes full and sliding layers, which a {config['model_type']} model does not have: "
            "remove layer_types, or set sliding_window to null"
        )
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _num_labels(config: dict[str, Any]) -> int:
    """How many scores a classification head gives: id2label says so, and transformers' default is 2."""
    labels = config.get("id2label")
    return len(labels) if labels else int(config.get("num_labels") or 2)


def _switch(switch: bool | str, config: dict[str, Any]) -> bool:
    return bool(config.get(switch, False)) if isinstance(switch, str) else switch


def _size(config: dict[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{where} has {name} = {value!r} where a positive integer is needed: repair config.json")
    return value


def _token_ids(value: Any, name: str, where: str) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ModelError(f"{where} has {name} = {value!r} where token ids are needed: repair config.json")
    return tuple(token_id for token_id in ids if token_id >= 0)
