"""The one table of differences between the supported model families.

Everything that is not in a row is the same for all of them: decoder layers with RMS norms, rotary positions,
grouped-query attention, a gated MLP, no bias on the output head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Norms = Literal["pre", "post", "both"]
"""Where a layer's norms stand: before attention and MLP, behind them (before their results are added to the residual
stream), or both."""


@dataclass(frozen=True)
class Family:
    """How one family differs. A switch is a bool, or the config.json key that holds it (absent means False)."""

    class_prefix: str  # the transformers class name is <class_prefix>ForCausalLM and so on
    classifier_prefix: str | None = None  # of ForSequenceClassification and Model, where it is another
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    fused: bool = False  # the checkpoint has qkv_proj and gate_up_proj instead of q, k, v and gate, up
    norms: Norms = "pre"
    norm_offset: float = 0.0  # what is added to every norm's weight
    qk_norm: Literal["none", "head", "projection"] = "none"  # an RMS norm of queries and keys before the rotation
    embedding_scale: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    activation_key: str = "hidden_act"
    legacy_gelu: bool = False  # "gelu" means its approximation by tanh
    # Which layers see a sliding window only: all; those that use_sliding_window and max_window_layers say; all but
    # every n-th (sliding_window_pattern); those without a rotation, by use_sliding_window.
    window: Literal["none", "every_layer", "layer_types", "pattern", "no_rope"] = "none"
    ropes: Literal["one", "layer_types", "no_rope_layers"] = "one"  # of all layers; by type; none in some layers
    partial_rotation: bool = False  # partial_rotary_factor is heeded
    yarn_is_longrope: bool = False  # as "su" and "yarn" were early names of it
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that config.json leaves out


_QWEN_WINDOW = {"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family("Mistral", window="every_layer", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family("Qwen2", qkv_bias=True, window="layer_types", defaults=_QWEN_WINDOW),
    "qwen3": Family("Qwen3", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head", window="layer_types",
                    defaults=_QWEN_WINDOW | {"head_dim": 128}),
    "phi3": Family("Phi3", fused=True, window="every_layer", partial_rotation=True, yarn_is_longrope=True,
                   defaults={"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
    "gemma": Family("Gemma", qkv_bias="attention_bias", o_bias="attention_bias", norm_offset=1.0, embedding_scale=True,
                    legacy_gelu=True,
                    defaults=_GEMMA | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Family("Gemma2", qkv_bias="attention_bias", o_bias="attention_bias", norms="both", norm_offset=1.0,
                     embedding_scale=True, activation_key="hidden_activation", window="pattern",
                     defaults=_GEMMA | {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
                                        "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
                                        "final_logit_softcapping": 30.0, "sliding_window": 4096,
                                        "sliding_window_pattern": 2}),
    "gemma3_text": Family("Gemma3", "Gemma3Text", qkv_bias="attention_bias", o_bias="attention_bias", norms="both",
                          norm_offset=1.0, qk_norm="head", embedding_scale=True, activation_key="hidden_activation",
                          window="pattern", ropes="layer_types",
                          defaults=_GEMMA | {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
                                             "query_pre_attn_scalar": 256, "final_logit_softcapping": None,
                                             "sliding_window": 4096, "sliding_window_pattern": 6,
                                             "rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    "smollm3": Family("SmolLM3", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias",
                      window="no_rope", ropes="no_rope_layers",
                      defaults={"num_key_value_heads": 4, "no_rope_layer_interval": 4, "rope_theta": 2e6,
                                "tie_word_embeddings": True}),
    "olmo2": Family("Olmo2", qkv_bias="attention_bias", o_bias="attention_bias", norms="post", qk_norm="projection",
                    defaults={"rms_norm_eps": 1e-5}),
    "olmo3": Family("Olmo3", qkv_bias="attention_bias", o_bias="attention_bias", norms="post", qk_norm="projection",
                    window="pattern", ropes="layer_types",
                    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4,
                              "rope_theta": 5e5, "rope_local_base_freq": 5e5}),
}
"""By the `model_type` of config.json."""
