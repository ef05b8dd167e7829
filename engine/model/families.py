"""The one table of differences between the supported model families.

Everything that is not in a row is the same for all of them: pre-norm decoder layers, RMS norm, rotary positions,
grouped-query attention, a gated SiLU MLP, no bias on the output head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """How one family differs. A switch is a bool, or the config.json key that holds it (absent means False)."""

    class_prefix: str  # the transformers class name is <class_prefix>ForCausalLM and so on
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False  # an RMS norm over head_dim on every query and key head, before the rotation
    window: Literal["none", "every_layer", "layer_types"] = "none"
    default_window: int | None = None  # where config.json says nothing; null there means no window
    default_max_window_layers: int = 0
    default_head_dim: int | None = None  # None: hidden_size // num_attention_heads
    default_num_kv_heads: int | None = None  # None: one per query head


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family("Mistral", window="every_layer", default_window=4096, default_num_kv_heads=8),
    "qwen2": Family(
        "Qwen2",
        qkv_bias=True,
        window="layer_types",
        default_window=4096,
        default_max_window_layers=28,
        default_num_kv_heads=32,
    ),
    "qwen3": Family(
        "Qwen3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        window="layer_types",
        default_window=4096,
        default_max_window_layers=28,
        default_head_dim=128,
        default_num_kv_heads=32,
    ),
}
"""By the `model_type` of config.json."""
