"""The tensors that a checkpoint must have: names and shapes by configuration."""

from __future__ import annotations

from typing import Literal, NamedTuple

from stars.model.config import ModelConfig
from stars.model.families import Norms
from stars.model.head_files import LM_HEAD

Head = Literal["lm", "reward", "none"]
KEYS = {
    "embed_tokens": "vocab_size, hidden_size", "lm_head": "vocab_size, hidden_size",
    "q_proj": "num_attention_heads * head_dim, hidden_size", "k_proj": "num_key_value_heads * head_dim, hidden_size",
    "v_proj": "num_key_value_heads * head_dim, hidden_size", "o_proj": "hidden_size, num_attention_heads * head_dim",
    "gate_proj": "intermediate_size, hidden_size", "up_proj": "intermediate_size, hidden_size",
    "down_proj": "hidden_size, intermediate_size", "q_norm": "head_dim", "k_norm": "head_dim",
    "qkv_proj": "(num_attention_heads + 2 * num_key_value_heads) * head_dim, hidden_size",
    "gate_up_proj": "2 * intermediate_size, hidden_size",
}
"""What of config.json gives the shape of a layer's weight; that of the others is hidden_size."""


class LayerNorms(NamedTuple):
    """Names of a layer's norms by where they stand; None where there is none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


NORMS: dict[Norms, LayerNorms] = {
    "pre": LayerNorms("input_layernorm", None, "post_attention_layernorm", None),
    "post": LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": LayerNorms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                       "post_feedforward_layernorm"),
}


class Products(NamedTuple):
    """Names of the matrices that lie one below the other in a layer's products."""

    qkv: tuple[str, ...]
    gate_up: tuple[str, ...]


def products_of(config: ModelConfig) -> Products:
    """Those of a checkpoint of this configuration."""
    if config.fused:
        return Products(("self_attn.qkv_proj",), ("mlp.gate_up_proj",))
    return Products(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def expected_tensors(config: ModelConfig, head: Head) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this configuration must have, by its full name."""
    hidden, middle = config.hidden_size, config.intermediate_size
    heads_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = (("self_attn.q_proj", heads_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width))
    gate_up = (("mlp.gate_proj", middle), ("mlp.up_proj", middle))
    products = products_of(config)
    wide = {"self_attn.qkv_proj": heads_width + 2 * kv_width, "mlp.gate_up_proj": 2 * middle, **dict(qkv + gate_up)}
    matrices = (
        *((name, wide[name], hidden, config.qkv_bias) for name in products.qkv),
        ("self_attn.o_proj", hidden, heads_width, config.o_bias),
        *((name, wide[name], hidden, config.mlp_bias) for name in products.gate_up),
        ("mlp.down_proj", hidden, middle, config.mlp_bias),
    )
    norms = {name: (hidden,) for name in NORMS[config.norms] if name is not None}
    if config.qk_norm:
        whole = config.qk_norm_whole
        norms |= {"self_attn.q_norm": (heads_width if whole else config.head_dim,),
                  "self_attn.k_norm": (kv_width if whole else config.head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        shapes |= {f"{layer}{name}.weight": shape for name, shape in norms.items()}
        for name, rows, columns, bias in matrices:
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}{name}.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    if head == "lm" and not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def keys_of(name: str, shape: tuple[int, ...]) -> str:
    """What of config.json gives the shape of a tensor, for error messages."""
    keys = KEYS.get(name.split(".")[-2], "hidden_size")
    return keys.split(",")[0] if len(shape) == 1 else keys
