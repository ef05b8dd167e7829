"""A model's shape and switches, read from config.json and generation_config.json in either dialect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stars.errors import ModelError
from stars.kernels.types import Activation
from stars.model.bases import model_directory
from stars.model.checkpoint import Checkpoint
from stars.model.families import FAMILIES, Family, Norms
from stars.model.files import is_directory, is_file, is_finite, is_gguf, read_json, shown
from stars.model.gguf_config import gguf_settings
from stars.model.loaded import LoadedModel
from stars.model.quantised_config import storage_of
from stars.model.rope import RopeConfig, check_head_dim, head_order, parse_rope, parse_ropes

HEADS = ("ForCausalLM", "ForSequenceClassification", "Model")
"""What may follow the family's class prefix in `architectures`."""
REWARD_HEADS = ("ForTokenClassification", "ForRewardModel", "ForProcessRewardModel", "ForRewardModelWithGating",
                "ForRewardModelWithGating3", "ForRewardModelWithGating31", "RewardModel", "ForScore", "ModelForScore")
"""The same, of reward models whose classes transformers has not; what they end with is told by their tensors."""
REWARD_CLASSES = ("INFORMForSequenceClassification", "EurusRewardModel", "GRewardModel")
"""Of such models, classes that are not called after the family."""
PAIRWISE = re.compile("pair.?(rm|wise|preference)", re.IGNORECASE)
"""What is in the names of models that compare two responses."""
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""Of the MLP's gate, by transformers' names."""
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
    logit_softcap: float | None = None  # of the language model head
    activation: Activation = "silu"
    norms: Norms = "pre"
    norm_offset: float = 0.0  # what is added to every norm's weight
    qk_norm_whole: bool = False  # the norms of queries and keys span all heads
    embedding_scale: float = 1.0  # to be rounded to the activations' type
    fused: bool = False  # the checkpoint has qkv_proj and gate_up_proj
    layer_ropes: tuple[RopeConfig, ...] = ()  # one entry a layer; none: `rope` in all of them

    @property
    def is_reward(self) -> bool:
        """Whether `architectures` names the class of a reward model."""
        causal = FAMILIES[self.model_type].class_prefix + "ForCausalLM"
        return any(name != causal and name not in _classes(FAMILIES[self.model_type], ("Model",))
                   for name in self.architectures)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotation of each layer."""
        return self.layer_ropes or (self.rope,) * self.num_layers

    @property
    def llama_like(self) -> bool:
        """Whether layers differ from llama's in biases, norms of heads, rotations and windows alone."""
        return (self.norms == "pre" and self.activation == "silu" and not self.qk_norm_whole
                and self.embedding_scale == 1 and self.logit_softcap is None)

    def head_order(self) -> list[int] | None:
        """In which order a head's dimensions lie in queries and keys; None: as in the checkpoint."""
        return head_order(self.rope, self.head_dim)

    def reaching(self, max_model_len: int | None) -> ModelConfig:
        """The configuration for texts of up to `max_model_len` tokens: of longrope, which of its factors are taken.

        None is the length that the model was trained on before stretching, with the short ones.
        """
        return replace(self, rope=self.rope.reaching(max_model_len),
                       layer_ropes=tuple(rope.reaching(max_model_len) for rope in self.layer_ropes))

    @property
    def context_length(self) -> int:
        """Most tokens of a text: max_position_embeddings, or more where the rotation is stretched beyond it; of
        longrope what `reaching` has chosen.
        """
        return min(self.rope.context_length(self.max_position_embeddings), MOST)


def load_config(directory: str | Path | LoadedModel) -> ModelConfig:
    """Reads DIRECTORY/config.json, and generation_config.json where there is one, or a GGUF file's metadata; of an
    adapter, its base's; of a LoadedModel, what it would write there.

    Raises ModelError for a missing or broken file, an unsupported model type, architecture, rope type, activation or
    quantisation, for sizes that do not fit together, and for more layers than the weights' headers hold.
    """
    if isinstance(directory, LoadedModel):
        try:
            return parse_config(directory.settings, directory.generation, f"the config of {directory}")
        except ModelError as error:
            raise ModelError(str(error).replace("repair config.json", "correct model.config")) from error
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
    config = {**family.defaults, **config}
    _refuse_unsupported(config, family, where)
    hidden_size = _size(config, "hidden_size", where)
    num_heads = _size(config, "num_attention_heads", where)
    num_layers = _size(config, "num_hidden_layers", where)
    # null means one KV head per query head, an absent key means the family's default
    num_kv_heads = config.get("num_key_value_heads")
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    head_dim = config.get("head_dim")
    head_dim = family.defaults.get("head_dim", hidden_size // num_heads) if head_dim is None else head_dim
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
    layer_types = _layer_types(config, family, num_layers, where)
    rope, layer_ropes = _ropes(config, family, layer_types, max_positions, where)
    check_head_dim(rope, head_dim, where)
    scale = _positive(config, "query_pre_attn_scalar", where) if "query_pre_attn_scalar" in family.defaults else None
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
        rope=rope,
        sliding_window=_windows(config, family, layer_types, where),
        tie_word_embeddings=_switch("tie_word_embeddings", config, where),
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        bos_token_id=bos_token_id[0] if bos_token_id else None,
        num_labels=_num_labels(config, where),
        dtype=dtype.removeprefix("torch."),
        qkv_bias=_switch(family.qkv_bias, config, where),
        o_bias=_switch(family.o_bias, config, where),
        mlp_bias=_switch(family.mlp_bias, config, where),
        quantization=None if storage is None else storage.method,
        qk_norm=family.qk_norm != "none",
        attention_scale=(head_dim if scale is None else scale) ** -0.5,
        attention_softcap=_softcap("attn_logit_softcapping", config, family, where),
        logit_softcap=_softcap("final_logit_softcapping", config, family, where),
        activation=_activation(config, family, where),
        norms=family.norms,
        norm_offset=family.norm_offset,
        qk_norm_whole=family.qk_norm == "projection",
        embedding_scale=hidden_size**0.5 if family.embedding_scale else 1.0,
        fused=family.fused,
        layer_ropes=layer_ropes,
    )


def _family(config: dict[str, Any], where: str) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"{where} has model_type {shown(model_type)}, which is not supported: use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _refuse_unsupported(config: dict[str, Any], family: Family, where: str) -> None:
    known = _classes(family, HEADS)
    others = [*_classes(family, REWARD_HEADS), *REWARD_CLASSES]
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
    _activation(config, family, where)
    if config.get("use_bidirectional_attention"):
        raise ModelError(f"{where} has use_bidirectional_attention, by which tokens see those that follow: use a model "
                         "that reads from left to right")


def _classes(family: Family, heads: tuple[str, ...]) -> list[str]:
    """Names of the family's classes with these heads."""
    prefixes = [family.class_prefix] + ([family.classifier_prefix] if family.classifier_prefix else [])
    return [prefix + head for prefix in prefixes for head in heads]


def _activation(config: Mapping[str, Any], family: Family, where: str) -> Activation:
    name = config.get(family.activation_key, "silu")
    if family.legacy_gelu and name == "gelu":
        return "gelu_tanh"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelError(f"{where} has activation {shown(name)}, which is not supported: use a model with one of "
                         f"{', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _positive(config: Mapping[str, Any], name: str, where: str) -> float:
    value = config[name]
    if not is_finite(value) or not 1e-12 < value < 1e12:
        raise ModelError(f"{where} has {name} = {shown(value)} where a positive number is needed: repair config.json")
    return float(value)


def _softcap(name: str, config: Mapping[str, Any], family: Family, where: str) -> float | None:
    """What scores or logits are kept within, by a family that has such a bound; null means none."""
    return _positive(config, name, where) if name in family.defaults and config[name] is not None else None


def _layer_types(config: dict[str, Any], family: Family, num_layers: int, where: str) -> tuple[str, ...]:
    """full_attention or sliding_attention for each layer."""
    given = config.get("layer_types")
    if family.window == "none" or given is None:
        return tuple("sliding_attention" if sliding else "full_attention"
                     for sliding in _sliding(config, family, num_layers, where))
    if not isinstance(given, (list, tuple)):
        raise ModelError(f"{where} has layer_types = {shown(given)} where a list is needed: repair config.json")
    if len(given) != num_layers:
        raise ModelError(f"{where} has {len(given)} layer_types for {num_layers} layers: repair config.json")
    for layer_type in given:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"{where} has layers of type {shown(layer_type)}, which is not supported: use a model whose layers are "
                "all full_attention or sliding_attention"
            )
    return tuple(given)


def _sliding(config: dict[str, Any], family: Family, num_layers: int, where: str) -> list[bool]:
    """Which layers slide where layer_types does not say it."""
    if family.window == "pattern":
        pattern = _size(config, "sliding_window_pattern", where)
        return [(index + 1) % pattern != 0 for index in range(num_layers)]
    if family.window == "no_rope":
        return [not rotates for rotates in _rotating(config, num_layers, where)]
    first = config.get("max_window_layers") if family.window == "layer_types" else 0
    first = 0 if first is None else first
    if not isinstance(first, int):
        raise ModelError(f"{where} has max_window_layers = {shown(first)} where a number of layers is needed: "
                         "repair config.json")
    return [family.window != "none" and index >= first for index in range(num_layers)]


def _windows(config: dict[str, Any], family: Family, layer_types: tuple[str, ...], where: str,
             ) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens, None for full attention."""
    window = config.get("sliding_window") if family.window != "none" else None
    if family.window in ("layer_types", "no_rope") and not _switch("use_sliding_window", config, where):
        window = None
    if window is not None:
        _size({"sliding_window": window}, "sliding_window", where)
    if family.window == "every_layer" and window is not None and "full_attention" in layer_types:
        raise ModelError(
            f"{where} mixes full and sliding layers, which a {config['model_type']} model does not have: "
            "remove layer_types, or set sliding_window to null"
        )
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _rotating(config: dict[str, Any], num_layers: int, where: str) -> list[bool]:
    """Which layers rotate, of a family in which some do not."""
    given = config.get("no_rope_layers")
    if given is None:
        interval = _size(config, "no_rope_layer_interval", where)
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if not isinstance(given, (list, tuple)) or len(given) < num_layers or any(one not in (0, 1) for one in given):
        raise ModelError(f"{where} has no_rope_layers = {shown(given)} where a 1 (rotated) or 0 for each of "
                         f"{num_layers} layers is needed: repair config.json")
    return [bool(one) for one in given[:num_layers]]


def _ropes(config: dict[str, Any], family: Family, layer_types: tuple[str, ...], max_positions: int, where: str,
           ) -> tuple[RopeConfig, tuple[RopeConfig, ...]]:
    """The rotation that bounds the context, and that of each layer where they differ."""
    if family.ropes == "layer_types":
        by_type = parse_ropes(config, max_positions, where)
        return by_type["full_attention"], tuple(by_type[layer_type] for layer_type in layer_types)
    rope = parse_rope(config, max_positions, where, family.partial_rotation, family.yarn_is_longrope)
    if family.ropes == "one":
        return rope, ()
    return rope, tuple(rope if rotates else RopeConfig("none")
                       for rotates in _rotating(config, len(layer_types), where))


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
