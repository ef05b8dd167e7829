"""GGUF files of tiny models, written with the gguf package, and the directories of what stands in them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

ARCHITECTURES = {"gemma3_text": "gemma3"}  # of other model types their names
K_TYPES = ("Q4_K", "Q5_K", "Q6_K")


def write_gguf(path: Path, directory: Path, kind: str = "F32", kinds: Mapping[str, str] | None = None,
               **metadata: Any) -> Path:
    """The model in DIRECTORY as a GGUF file. kind: the type of its matrices; kinds: that of others, by a part of their
    Hugging Face names. metadata: more of it, or other values, by keys with "__" for "."; None leaves one out.

    Beside it, under the same name without its suffix, lies the model in Hugging Face format with the numbers that the
    file stands for, by the gguf package's arithmetic.
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    enum = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(enum, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, architecture)
    fields = _metadata(config, architecture, directory) | {
        key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in fields.items():
        _add(writer, key, value)
    numbers = {}
    for name, tensor in sorted(load_file(directory / "model.safetensors").items()):
        stem, _, suffix = name.rpartition(".")
        given = "cls.output" if stem == "score" else names.get_name(stem)
        chosen = next((one for part, one in (kinds or {}).items() if part in name), kind) if tensor.dim() > 1 else "F32"
        order = _row_order(name, tensor.shape[0], config) if architecture == "llama" else None
        plus_one = architecture.startswith("gemma") and "norm" in name  # the files hold what such norms multiply by
        array = tensor.float().numpy() + plus_one
        stored, read = _stored(array if order is None else array[order], chosen)
        writer.add_tensor(f"{given}.{suffix}", stored, raw_dtype=GGMLQuantizationType[chosen])
        read = read if order is None else read[np.argsort(order)]
        numbers[name] = torch.from_numpy(np.ascontiguousarray(read - plus_one))
    for name, factors in _factors(config).items():
        writer.add_tensor(f"{name}.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    twin = path.with_suffix("")
    shutil.copytree(directory, twin, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(numbers, twin / "model.safetensors", metadata={"format": "pt"})
    (twin / "config.json").write_text(json.dumps(config | _understood(config, architecture) | {"dtype": "float32"}))
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


def _metadata(config: dict[str, Any], architecture: str, directory: Path) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    fields: dict[str, Any] = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "vocab_size": config["vocab_size"],
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if architecture != "llama":
        fields |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    else:
        fields |= {"rope.dimension_count": head_dim}
    if "rope_theta" in rope:
        fields["rope.freq_base"] = float(rope["rope_theta"])
    if config.get("sliding_window"):
        fields["attention.sliding_window"] = config["sliding_window"]
    if architecture == "gemma2":
        fields |= {"attn_logit_softcapping": config["attn_logit_softcapping"],
                   "final_logit_softcapping": config["final_logit_softcapping"]}
    if architecture == "gemma3":
        fields |= {"rope.freq_base": float(rope["full_attention"]["rope_theta"]),
                   "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}
    if architecture == "phi3":
        fields["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        if rope["rope_type"] == "longrope":
            original = rope["original_max_position_embeddings"]
            factor = config["max_position_embeddings"] / original
            fields |= {"rope.scaling.original_context_length": original,
                       "rope.scaling.attn_factor": math.sqrt(1 + math.log(factor) / math.log(original))}
    fields = {f"{architecture}.{key}": value for key, value in fields.items()}
    return fields | (_tokenizer(directory) if (directory / "tokenizer.json").is_file() else {})


def _factors(config: dict[str, Any]) -> dict[str, list[float]]:
    """What the converter writes of rotations as tensors: llama 3's rule as one list, longrope's two."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return {"rope_factors_long": rope["long_factor"], "rope_factors_short": rope["short_factor"]}
    if rope.get("rope_type") != "llama3":
        return {}
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    length, low, high = (rope[name] for name in ("original_max_position_embeddings", "low_freq_factor",
                                                 "high_freq_factor"))
    factors = []
    for index in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / dim)
        smooth = min(1.0, max(0.0, (length / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs": factors}


def _understood(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What readers of these files take as known of an architecture, and no key says."""
    layers = config["num_hidden_layers"]
    if architecture not in ("gemma2", "gemma3"):
        return {}
    period = 2 if architecture == "gemma2" else 6
    return {"query_pre_attn_scalar": config["head_dim"], "layer_types": [
        "full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(layers)]}


def _tokenizer(directory: Path) -> dict[str, Any]:
    """What converters write of a byte-level tokenizer."""
    state = json.loads((directory / "tokenizer.json").read_text())
    ids = {**state["model"]["vocab"], **{token["content"]: token["id"] for token in state["added_tokens"]}}
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    tokens = sorted(ids, key=ids.__getitem__)
    fields: dict[str, Any] = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [3 if one in special else 1 for one in tokens],
        "merges": [" ".join(merge) for merge in state["model"]["merges"]], "bos_token_id": 1, "eos_token_id": 2,
        "padding_token_id": 0, "add_bos_token": True,
    }
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    template = directory / "chat_template.jinja"
    return fields | ({"tokenizer.chat_template": template.read_text()} if template.is_file() else {})


def _row_order(name: str, rows: int, config: dict[str, Any]) -> np.ndarray | None:
    """The rows of queries and keys in the order of llama's files, as its converter permutes them."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    return None if heads is None else np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _stored(array: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A tensor as it is stored in a type, and the numbers that it then stands for."""
    if kind == "F32":
        return array, array
    if kind in K_TYPES:  # the package reads these types and does not write them
        blocks = _random_blocks(kind, array)
        return blocks, gguf.quants.dequantize(blocks, GGMLQuantizationType[kind])
    stored = gguf.quants.quantize(array, GGMLQuantizationType[kind])
    read = stored.astype(np.float32) if kind == "F16" else gguf.quants.dequantize(stored, GGMLQuantizationType[kind])
    return stored, read


def _random_blocks(kind: str, array: np.ndarray) -> np.ndarray:
    """Any bytes are blocks once their float16 scales are numbers: of the size that gives weights as large as these."""
    columns, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(array.size)
    blocks = generator.integers(0, 256, (array.shape[0], array.shape[1] // columns, nbytes), dtype=np.uint8)
    places = (208,) if kind == "Q6_K" else (0, 2)
    for place in places:
        size = float(array.std()) / (1200 if kind == "Q6_K" else 300 if kind == "Q4_K" else 600)
        scales = (size * generator.uniform(0.5, 1.5, blocks.shape[:2])).astype(np.float16)
        blocks[:, :, place : place + 2] = scales.view(np.uint8).reshape(*blocks.shape[:2], 2)
    return blocks.reshape(array.shape[0], -1)


def write_vocabulary(path: Path, architecture: str, fields: dict[str, Any]) -> Path:
    """A GGUF file with a tokenizer and no model: `fields` without "tokenizer.ggml."."""
    writer = gguf.GGUFWriter(path, architecture)
    shape = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
             "attention.head_count": 1, "vocab_size": len(fields["tokens"])}
    for key, value in shape.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in fields.items():
        _add(writer, key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_fields(pre: str, texts: list[str], **more: Any) -> dict[str, Any]:
    """A vocabulary of bytes and their merges, learnt from whole texts, so that how they are split shows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<pad>", "<s>", "</s>", "<|eot_id|>", "<think>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    learnt.train_from_iterator(texts, trainer)
    model = json.loads(learnt.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = [4 if token == "<think>" else 3 if token in special else 1 for token in tokens]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds,
            "merges": [" ".join(merge) for merge in model["merges"]], "bos_token_id": 1, "eos_token_id": 2,
            "padding_token_id": 0, "add_bos_token": False} | more


def sentencepiece_fields(texts: list[str], **more: Any) -> dict[str, Any]:
    """A vocabulary with a token for each byte, and scores by which merges are to be found again."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    learnt.train_from_iterator(texts, trainer)
    vocab = learnt.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "[multimodal]"]
    tokens = first + [f"<0x{byte:02X}>" for byte in range(256)] + ["  ", "    "] + pieces
    kinds = [3, 3, 3, 2, 3, 3, 3, 4] + [6] * 256 + [4, 4] + [1] * len(pieces)
    return {"model": "llama", "pre": "default", "tokens": tokens, "token_type": kinds,
            "scores": [-1000.0] * (8 + 256 + 2) + [-float(index) for index in range(len(pieces))], "bos_token_id": 2,
            "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0} | more


def transformers_model(path: Path):
    """transformers' model of a GGUF file in float32, by its own names and order of rows; without accelerate, which its
    from_pretrained wants for these files."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()
