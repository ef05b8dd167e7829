"""The tensors that a checkpoint must have: names and shapes by configuration."""

from __future__ import annotations

from typing import Literal

from stars.model.config import ModelConfig
from stars.model.head_files import LM_HEAD

Head = Literal["lm", "reward", "none"]
KEYS = {
    "embed_tokens": "vocab_size, hidden_size", "lm_head": "vocab_size, hidden_size",
    "q_proj": "num_attention_heads * head_dim, hidden_size", "k_proj": "num_key_value_heads * head_dim, hidden_size",
    "v_proj": "num_key_value_heads * head_dim, hidden_size", "o_proj": "hidden_size, num_attention_heads * head_dim",
    "gate_proj": "intermediate_size, hidden_size", "up_proj": "intermediate_size, hidden_size",
    "down_proj": "hidden_size, intermediate_size", "q_norm": "head_dim", "k_norm": "head_dim",
}
"""What of config.json gives the shape of a layer's weight; that of the others is hidden_size."""


def expected_tensors(config: ModelConfig, head: Head) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this configuration must have, by its full name."""
    hidden, middle = config.hidden_size, config.intermediate_size
    heads_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = (
        ("self_attn.q_proj", heads_width, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_width, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_width, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, heads_width, config.o_bias),
        ("mlp.gate_proj", middle, hidden, config.mlp_bias),
        ("mlp.up_proj", middle, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, middle, config.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (config.head_dim,)
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
