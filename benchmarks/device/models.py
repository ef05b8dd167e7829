"""Decoders of real shapes with random weights, made on the device; or of the tensors of a transformers model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from stars.kernels.linear import Weight, pack
from stars.model.config import ModelConfig, parse_config
from stars.model.decoder import Decoder, LayerWeights
from stars.model.rope import rope_tables

LLAMA_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, intermediate_size=8192, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling=LLAMA_ROPE, tie_word_embeddings=True),
    "Llama-3.1-8B": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, intermediate_size=14336, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling=LLAMA_ROPE | {"factor": 8.0}),
    "Qwen3-8B": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, intermediate_size=12288, max_position_embeddings=40960, rms_norm_eps=1e-6,
        rope_theta=1000000.0),
    "toy": dict(
        model_type="llama", vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, intermediate_size=192, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_theta=10000.0),
    "toy-qwen3": dict(
        model_type="qwen3", vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=128, intermediate_size=160, max_position_embeddings=2048, rms_norm_eps=1e-6,
        rope_theta=10000.0),
}
"""As in the config.json of the models of these names."""

LOGIT_SPREAD = 2.0  # standard deviation of the logits, about
Head = Literal["lm", "reward"]


def config_of(shape: str, head: Head = "lm", dtype: str = "bfloat16") -> ModelConfig:
    """The configuration of a shape. Nothing ends a response: there is no EOS."""
    return parse_config(SHAPES[shape] | {"id2label": {"0": "reward"}, "dtype": dtype}, {}, f"the shape {shape}")


def random_decoder(config: ModelConfig, device: torch.device | str, dtype: torch.dtype, head: Head = "lm", *,
                   seed: int = 0, deterministic: bool = False, made_on: torch.device | str | None = None) -> Decoder:
    """A decoder with random weights, scaled so that activations stay near 1 and the head's outputs are spread.

    Drawn in float32 or, for the large ones, in `dtype`, on `made_on` (the device itself, unless the same weights are
    wanted on two devices).
    """
    made_on = torch.device(made_on if made_on is not None else device)
    generator = torch.Generator(made_on).manual_seed(seed)
    drawn_in = torch.float32 if made_on.type == "cpu" else dtype

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.empty(rows, columns, dtype=drawn_in, device=made_on)
        return values.normal_(0.0, scale, generator=generator).to(device, dtype)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Weight:
        return pack(normal(rows, columns, scale / math.sqrt(columns)), deterministic=deterministic)

    def norm(size: int) -> Tensor:
        values = torch.empty(size, device=made_on).normal_(1.0, 0.1, generator=generator)
        return values.to(device)

    hidden = config.hidden_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embedding = pack(normal(config.vocab_size, hidden, LOGIT_SPREAD / math.sqrt(hidden)), deterministic=deterministic)
    layers = [LayerWeights(
        norm(hidden), matrix(heads + 2 * kv_heads, hidden), norm(config.head_dim) if config.qk_norm else None,
        norm(config.head_dim) if config.qk_norm else None, matrix(hidden, heads), norm(hidden),
        matrix(2 * config.intermediate_size, hidden), matrix(hidden, config.intermediate_size),
    ) for _ in range(config.num_layers)]
    final_norm = norm(hidden)
    out = score = None
    if head == "reward":
        values = torch.empty(1, hidden, device=made_on).normal_(0.0, 1 / math.sqrt(hidden), generator=generator)
        score = pack(values.to(device), deterministic=deterministic)
    else:
        out = embedding if config.tie_word_embeddings else matrix(config.vocab_size, hidden, LOGIT_SPREAD)
    cos, sin = rope_tables(config.rope, config.head_dim, config.max_position_embeddings, device)
    return Decoder(config, embedding, layers, final_norm, out, score, cos, sin, 64, dtype)


def as_deterministic(decoder: Decoder) -> Decoder:
    """The same tensors under weights whose products do not depend on the number of rows."""
    def marked(weight: Weight | None) -> Weight | None:
        return None if weight is None else dataclasses.replace(weight, deterministic=True)

    layers = [layer._replace(qkv=marked(layer.qkv), o=marked(layer.o), gate_up=marked(layer.gate_up),
                             down=marked(layer.down)) for layer in decoder.layers]
    return Decoder(decoder.config, marked(decoder.embedding), layers, decoder.final_norm, marked(decoder.head),
                   marked(decoder.score_head), decoder.cos, decoder.sin, 64, decoder.dtype)


def weight_bytes(decoder: Decoder) -> int:
    """What a step reads of the weights: all but the embedding table, of which a row a token is read."""
    weights = [weight for layer in decoder.layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    weights += [weight for weight in (decoder.head, decoder.score_head) if weight is not None]
    return sum(weight.values.numel() * weight.values.element_size() for weight in weights)


def kv_bytes_a_token(decoder: Decoder) -> int:
    """Keys and values of a token, all layers."""
    config = decoder.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * decoder.dtype.itemsize


def hf_model(shape: str, head: Head, device: str, dtype: torch.dtype, seed: int = 0):
    """A transformers model of a llama or qwen3 shape with random weights, made on the device."""
    import transformers

    given = {name: value for name, value in SHAPES[shape].items() if name not in ("model_type", "rope_scaling",
                                                                                  "rope_theta")}
    given["rope_parameters"] = {"rope_theta": SHAPES[shape]["rope_theta"]} | (
        SHAPES[shape].get("rope_scaling") or {"rope_type": "default"})
    prefix = {"llama": "Llama", "qwen3": "Qwen3"}[SHAPES[shape]["model_type"]]
    config = getattr(transformers, f"{prefix}Config")(
        **given, bos_token_id=None, eos_token_id=None, pad_token_id=None, num_labels=1, attn_implementation="sdpa")
    kind = getattr(transformers, prefix + ("ForCausalLM" if head == "lm" else "ForSequenceClassification"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            spread = LOGIT_SPREAD if "embed_tokens" in name or "lm_head" in name else 1.0
            parameter.normal_(0.0, spread / math.sqrt(parameter.shape[1]), generator=generator)
    return model.eval()


def decoder_of(model, shape: str, head: Head) -> Decoder:
    """The engine's decoder over the tensors of `hf_model`; only the fused ones are copies."""
    config = config_of(shape, head)
    backbone = model.model

    def weight(*parts) -> Weight:
        return pack(parts[0].weight.data if len(parts) == 1 else torch.cat([part.weight.data for part in parts]))

    embedding = weight(backbone.embed_tokens)
    layers = [LayerWeights(
        layer.input_layernorm.weight.float(),
        weight(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        layer.self_attn.q_norm.weight.float() if config.qk_norm else None,
        layer.self_attn.k_norm.weight.float() if config.qk_norm else None,
        weight(layer.self_attn.o_proj), layer.post_attention_layernorm.weight.float(),
        weight(layer.mlp.gate_proj, layer.mlp.up_proj), weight(layer.mlp.down_proj)) for layer in backbone.layers]
    out = score = None
    if head == "reward":
        score = pack(model.score.weight.data.float())
    else:
        out = embedding if config.tie_word_embeddings else weight(model.lm_head)
    device, dtype = backbone.embed_tokens.weight.device, backbone.embed_tokens.weight.dtype
    cos, sin = rope_tables(config.rope, config.head_dim, config.max_position_embeddings, device)
    return Decoder(config, embedding, layers, backbone.norm.weight.float(), out, score, cos, sin, 64, dtype)
