"""The config.json that the metadata of a GGUF file stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stars.errors import ModelError
from stars.model.files import shown
from stars.model.gguf_header import Array, Header, read_header

CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3": "Gemma3", "phi3": "Phi3"}
"""Architectures that are read, and what transformers calls their classes."""
HEAD = "cls.output.weight"
"""Of a model that ranks texts."""
TURN_ENDS = (b"<|eot_id|>", b"<|im_end|>", b"<|end|>", b"<end_of_turn>")
"""Control tokens that end an assistant's turn, whether or not the file says so."""
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens: those that no text is made of, and those that are never split."""
ROTATION = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of factors that the wavelengths of rotations are stretched by: of every text, of long ones, of short ones."""
_REQUIRED = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings", "attention.head_count": "num_attention_heads",
}


def architecture_of(header: Header) -> str:
    """What general.architecture says; ModelError where it is not read."""
    name = header.get("general.architecture", str)
    if name not in CLASSES:
        raise ModelError(f"{header.path} is of architecture {shown(name)}, which is not supported: use one of "
                         f"{', '.join(CLASSES)}")
    if header.integer("split.count", 1) != 1:
        raise ModelError(f"{header.path} is one part of a model in several files: join them with llama-gguf-split "
                         "--merge")
    checked: str = name
    return checked


def gguf_settings(path: Path) -> dict[str, Any]:
    """What config.json would say of the model in GGUF file `path`. Raises ModelError."""
    header = read_header(path)
    architecture = architecture_of(header)
    settings: dict[str, Any] = {}
    for key, name in _REQUIRED.items():
        settings[name] = _positive(header, f"{architecture}.{key}")
    _check_layers(header, architecture, settings["num_hidden_layers"])
    if header.integer(f"{architecture}.expert_count", 0):
        raise ModelError(f"{path} is a mixture of experts, which is not supported: use a dense model")
    heads = settings["num_attention_heads"]
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{path} has no token_embd.weight: copy the file again")
    head_dim = header.integer(f"{architecture}.attention.key_length", settings["hidden_size"] // heads)
    if header.integer(f"{architecture}.attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{path} has values of another length than its keys, which is not supported: use another "
                         "model")
    scores = header.tensors.get(HEAD)
    prefix = CLASSES[architecture]
    settings |= {
        "model_type": "gemma3_text" if architecture == "gemma3" else architecture,
        "architectures": [f"{prefix}ForCausalLM" if scores is None else
                          f"{'Gemma3Text' if architecture == 'gemma3' else prefix}ForSequenceClassification"],
        "vocab_size": embedding.shape[0], "head_dim": head_dim,
        "num_key_value_heads": header.integer(f"{architecture}.attention.head_count_kv", heads),
        "rms_norm_eps": header.get(f"{architecture}.attention.layer_norm_rms_epsilon", (float, int), 1e-6),
        "tie_word_embeddings": "output.weight" not in header.tensors, "dtype": _dtype(header),
        "bos_token_id": header.integer("tokenizer.ggml.bos_token_id"), "eos_token_id": eos_ids(header),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors, "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        **_rotation(header, architecture, head_dim or 0, settings["max_position_embeddings"]),
        **_windows(header, architecture, settings["num_hidden_layers"]),
    }
    if scores is not None:
        settings["num_labels"] = scores.shape[0]
    if architecture.startswith("gemma"):
        settings |= _gemma(header, architecture, settings)
    return settings


def _positive(header: Header, key: str) -> int:
    value = header.integer(key)
    if value is None or value < 1:
        raise ModelError(f"{header.path} has {key} = {shown(value)} where a positive integer is needed: use another "
                         "file")
    return value


def _check_layers(header: Header, architecture: str, count: int) -> None:
    """Raises ModelError where the file has not as many layers as it says: what is made for each is made for these."""
    numbers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.") and name.count(".") > 1}
    if len(numbers) != count:
        raise ModelError(f"{header.path} has {architecture}.block_count = {count} and tensors of {len(numbers)} "
                         "layers: copy the file again")


def _dtype(header: Header) -> str:
    """The type that a model on a GPU computes in: that of its matrices, and bfloat16 of quantised ones."""
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return plain.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def eos_ids(header: Header) -> list[int]:
    """Every token that ends a text."""
    ids = [header.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens, kinds = header.get("tokenizer.ggml.tokens", Array), header.numbers("tokenizer.ggml.token_type")
    if tokens is not None and tokens.kind == "s" and len(kinds) == tokens.length:
        ids += [index for index in (kinds == CONTROL).nonzero()[0].tolist()
                if header.string(tokens.strings[index]) in TURN_ENDS]
    return list(dict.fromkeys(one for one in ids if one is not None))


def _rotation(header: Header, architecture: str, head_dim: int, positions: int) -> dict[str, Any]:
    path = header.path
    rotated = header.integer(f"{architecture}.rope.dimension_count", head_dim)
    number = (float, int)
    theta = header.get(f"{architecture}.rope.freq_base", number, 10000.0)
    settings: dict[str, Any] = {"rope_theta": theta}
    if rotated != head_dim:
        settings["partial_rotary_factor"] = (rotated or 0) / head_dim if head_dim else 0.0
    scaling = f"{architecture}.rope.scaling."
    kind, factor = header.get(scaling + "type", str, "none"), header.get(scaling + "factor", number)
    if kind == "none" and header.get(f"{architecture}.rope.scale_linear", number, 1.0) != 1.0:
        kind, factor = "linear", header.get(f"{architecture}.rope.scale_linear", number)
    stretched = {"rope_type": kind, "factor": factor,
                 "original_max_position_embeddings": header.integer(scaling + "original_context_length")}
    every, longer, shorter = (header.floats(name) for name in ROTATION)
    if every is not None:  # one list of factors at every length is a longrope that never changes over
        longer, shorter = every, every
        stretched["original_max_position_embeddings"] = positions
    if longer is not None or shorter is not None:
        if longer is None or shorter is None:
            raise ModelError(f"{path} has only one of {' and '.join(ROTATION[1:])}: copy the file again")
        original = stretched["original_max_position_embeddings"]
        stretched = {"rope_type": "longrope", "attention_factor": header.get(scaling + "attn_factor", number, 1.0),
                     "long_factor": longer.tolist(), "short_factor": shorter.tolist(),
                     "original_max_position_embeddings": original}
        settings["original_max_position_embeddings"] = original
    elif kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return settings
    elif header.get(scaling + "attn_factor", number, 1.0) != 1.0:
        raise ModelError(f"{path} has {scaling}attn_factor, which is not supported: use another model")
    settings["rope_scaling"] = {name: value for name, value in stretched.items() if value is not None}
    return settings


def _windows(header: Header, architecture: str, layers: int) -> dict[str, Any]:
    """Sliding windows: none of llama and the qwens, of every layer or of all but each second or sixth one else."""
    window = header.integer(f"{architecture}.attention.sliding_window") or None
    if architecture == "phi3":
        return {"sliding_window": window}
    if not architecture.startswith("gemma"):
        return {"use_sliding_window": False}
    period = 2 if architecture == "gemma2" else 6
    return {"sliding_window": window, "layer_types": [
        "full_attention" if window is None or (index + 1) % period == 0 else "sliding_attention"
        for index in range(layers)]}


def _gemma(header: Header, architecture: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the two gemmas have besides. Those of 27 billion weights, told by their layers, scale queries otherwise."""
    largest = settings["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture]
    number = (float, int)
    scalar = settings["hidden_size"] // settings["num_attention_heads"] if largest else settings["head_dim"]
    own: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}
    if architecture == "gemma2":
        return own | {"attn_logit_softcapping": header.get("gemma2.attn_logit_softcapping", number, 50.0),
                      "final_logit_softcapping": header.get("gemma2.final_logit_softcapping", number, 30.0)}
    return own | {"rope_local_base_freq": header.get("gemma3.rope.freq_base_swa", number, 10000.0)}
