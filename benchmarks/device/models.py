"""Decoders of real shapes with random weights, made on the device, and transformers models over the same tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from timing import rehearsing
from torch import Tensor

from stars.kernels.linear import Weight, pack
from stars.kernels.quant import FP8, QuantWeight, of_blocks, quantize
from stars.kernels.quant_blocks import LAYOUTS
from stars.model.config import ModelConfig, parse_config
from stars.model.decoder import Decoder, LayerWeights
from stars.model.heads import RewardHead
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
    "tiny": dict(
        model_type="llama", vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, intermediate_size=96, max_position_embeddings=128, rms_norm_eps=1e-5,
        rope_theta=10000.0),
    "toy-qwen3": dict(
        model_type="qwen3", vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=128, intermediate_size=160, max_position_embeddings=2048, rms_norm_eps=1e-6,
        rope_theta=10000.0),
}
"""As in the config.json of the models of these names; the small ones are for the CPU and Triton's interpreter."""

LOGIT_SPREAD = 2.0  # standard deviation of the logits, about
Head = Literal["lm", "reward"]
Score = Literal["row", "mlp", "labels"]  # what a reward model ends with


def config_of(shape: str, head: Head = "lm", dtype: str = "bfloat16", layers: int | None = None) -> ModelConfig:
    """The configuration of a shape, with fewer layers if asked. Nothing ends a response: there is no EOS."""
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    return parse_config(SHAPES[shape] | fewer | {"id2label": {"0": "reward"}, "dtype": dtype}, {}, f"the shape {shape}")


def random_decoder(config: ModelConfig, device: torch.device | str, dtype: torch.dtype, head: Head = "lm", *,
                   seed: int | None = 0, deterministic: bool = False,
                   made_on: torch.device | str | None = None, scheme: str = "", score_by: Score = "row") -> Decoder:
    """A decoder with random weights, scaled so that activations stay near 1 and the head's outputs are spread.

    Drawn in float32 or, for the large ones, in `dtype`, on `made_on` (the device itself, unless the same weights are
    wanted on two devices). Every number is one that bfloat16 has, so that a model of another library holds the same.
    seed None leaves the drawing to torch's own generator. scheme: the layers' matrices and the head are quantised so,
    "fp8", "int8" or "int4-128". score_by: a reward of one row, of two products with ReLU between them, or the
    probability of the second of two labels that these end with.
    """
    made_on = torch.device(made_on if made_on is not None else device)
    generator = None if seed is None else torch.Generator(made_on).manual_seed(seed)
    drawn_in = torch.float32 if made_on.type == "cpu" else dtype

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.empty(rows, columns, dtype=drawn_in, device=made_on)
        return values.normal_(0.0, scale, generator=generator).to(device, dtype)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Weight:
        values = normal(rows, columns, scale / math.sqrt(columns))
        return pack(as_quantised(values, scheme) if scheme else values, deterministic=deterministic)

    def norm(size: int) -> Tensor:
        values = torch.empty(size, device=made_on).normal_(1.0, 0.1, generator=generator)
        return values.bfloat16().float().to(device)

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
        def product(rows: int, scale: float = 1.0) -> Weight:
            values = torch.empty(rows, hidden, device=made_on)
            values.normal_(0.0, scale / math.sqrt(hidden), generator=generator)
            return pack(values.bfloat16().float().to(device), deterministic=deterministic)

        if score_by == "row":
            score = product(1)
        else:  # ReLU leaves half of the squares
            labels = score_by == "labels"
            layers_of = product(hidden), product(2 if labels else 1, math.sqrt(2))
            score = RewardHead(layers_of, "softmax" if labels else "none", label=int(labels))
    else:
        out = embedding if config.tie_word_embeddings else matrix(config.vocab_size, hidden, LOGIT_SPREAD)
    cos, sin = rope_tables(config.rope, config.head_dim, config.max_position_embeddings, device)
    return Decoder(config, embedding, layers, final_norm, out, score, cos, sin, 64, dtype)


def as_quantised(matrix: Tensor, scheme: str) -> QuantWeight:
    """In the scheme that tables call so, a part of the rows at a time: float32 takes twice the room."""
    kind, _, group = scheme.partition("-")
    if rehearsing():  # whatever its values are
        rows, columns = matrix.shape
        stored = {"fp8": FP8, "int8": torch.int8, "int4": torch.uint8}[kind]
        values = torch.empty(rows, columns // (2 if kind == "int4" else 1), dtype=stored, device=matrix.device)
        scales = torch.empty((rows, columns // int(group)) if group else (rows,), device=matrix.device,
                             dtype=torch.float16 if group else torch.float32)
        return QuantWeight(values, scales, None, int(group or 0), kind)
    parts = [quantize(rows, kind, int(group or 0)) for rows in matrix.split(1 << 15)]
    return parts[0]._replace(values=torch.cat([part.values for part in parts]),
                             scales=torch.cat([part.scales for part in parts]))


def random_blocks(scheme: str, rows: int, count: int) -> QuantWeight:
    """Blocks as GGUF files hold them, on the CPU: random bytes, and ordinary scales of either sign."""
    layout, draw = LAYOUTS[scheme], torch.Generator().manual_seed(rows)
    values = torch.randint(0, 256, (rows, count, layout.nbytes), generator=draw).to(torch.uint8)
    for first in [208] if scheme == "q6_k" else [0] if scheme in ("q8_0", "q4_0", "q5_0") else [0, 2]:
        scale = (0.01 * torch.randn(rows, count, 1, generator=draw)).half()
        values[:, :, first : first + 2] = scale.contiguous().view(torch.uint8)
    return of_blocks(values.flatten(1), scheme)


def scoring_over(decoder: Decoder) -> Decoder:
    """A reward model of the same layers, with a random head."""
    hidden = decoder.config.hidden_size
    score = torch.empty(1, hidden, device=decoder.device).normal_(0.0, 1 / math.sqrt(hidden))
    return Decoder(decoder.config, decoder.embedding, decoder.layers, decoder.final_norm, None, pack(score),
                   decoder.cos, decoder.sin, 64, decoder.dtype)


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
    return sum(stored_bytes(weight) for weight in weights)


def stored_bytes(weight: Weight) -> int:
    """What a product of few rows reads of its weight."""
    return weight.values.nbytes if weight.quant is None else weight.quant.nbytes


def kv_bytes_a_token(decoder: Decoder) -> int:
    """Keys and values of a token, all layers."""
    config = decoder.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * decoder.dtype.itemsize


def parameters(config: ModelConfig, head: Head) -> int:
    """Numbers that a model of this shape has, as its checkpoint would."""
    hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
    queries = config.num_heads * config.head_dim
    layer = hidden * (2 * queries + 2 * kv + 3 * config.intermediate_size + 2)
    layer += 2 * config.head_dim * config.qk_norm
    tables = 1 if head == "reward" or config.tie_word_embeddings else 2
    return config.num_layers * layer + hidden * (tables * config.vocab_size + 1 + (head == "reward"))


def hf_over(decoder: Decoder, shape: str, head: Head):
    """A transformers model of a llama or qwen3 shape over the decoder's own tensors: none is copied but the norms."""
    import transformers

    given = {name: value for name, value in SHAPES[shape].items() if name not in ("model_type", "rope_scaling",
                                                                                  "rope_theta")}
    given["num_hidden_layers"] = len(decoder.layers)
    given["rope_parameters"] = {"rope_theta": SHAPES[shape]["rope_theta"]} | (
        SHAPES[shape].get("rope_scaling") or {"rope_type": "default"})
    prefix = {"llama": "Llama", "qwen3": "Qwen3"}[SHAPES[shape]["model_type"]]
    config = getattr(transformers, f"{prefix}Config")(
        **given, bos_token_id=None, eos_token_id=None, pad_token_id=None, num_labels=1, attn_implementation="sdpa")
    kind = getattr(transformers, prefix + ("ForCausalLM" if head == "lm" else "ForSequenceClassification"))
    dtype, device = decoder.dtype, decoder.device
    with torch.device("meta"):
        model = kind(config)
    backbone = model.model
    backbone.rotary_emb = type(backbone.rotary_emb)(config=config).to(device)  # its table is no parameter

    def set_weight(module, values: Tensor) -> None:
        module.weight = torch.nn.Parameter(values.to(dtype), requires_grad=False)

    set_weight(backbone.embed_tokens, decoder.embedding.dense())
    set_weight(backbone.norm, decoder.final_norm)
    kv = decoder.config.num_kv_heads * decoder.config.head_dim
    queries = decoder.config.num_heads * decoder.config.head_dim
    for ours, theirs in zip(decoder.layers, backbone.layers, strict=True):
        set_weight(theirs.input_layernorm, ours.input_norm)
        set_weight(theirs.post_attention_layernorm, ours.mlp_norm)
        attention, mlp = theirs.self_attn, theirs.mlp
        for module, part in zip((attention.q_proj, attention.k_proj, attention.v_proj),
                                ours.qkv.dense().split((queries, kv, kv)), strict=True):
            set_weight(module, part)
        for module, part in zip((mlp.gate_proj, mlp.up_proj), ours.gate_up.dense().chunk(2), strict=True):
            set_weight(module, part)
        set_weight(attention.o_proj, ours.o.dense())
        set_weight(mlp.down_proj, ours.down.dense())
        if ours.q_norm is not None:
            set_weight(attention.q_norm, ours.q_norm)
            set_weight(attention.k_norm, ours.k_norm)
    if head == "reward":
        set_weight(model.score, decoder.score_head.dense())
    else:
        set_weight(model.lm_head, decoder.head.dense())
    return model.eval()
