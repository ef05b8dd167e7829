"""GGUF files that only llama.cpp reads: the toy of the tests of laws, a recurrent model, a LoRA adapter."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from toy import ToyModel


def write_toy(path: Path, toy: ToyModel) -> Path:
    """Its weights in float32, rows of queries and keys in the order of llama's files."""
    config = toy.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(toy.layers[0]["gate"].shape[0])
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(toy.embedding))
    writer.add_tokenizer_model("none")
    writer.add_tensor("token_embd.weight", toy.embedding)
    writer.add_tensor("output.weight", toy.out)
    writer.add_tensor("output_norm.weight", toy.final_norm)
    for index, layer in enumerate(toy.layers):
        for name, value in {
            "attn_norm": layer["input_norm"], "attn_q": _permuted(layer["q"], config.num_heads),
            "attn_k": _permuted(layer["k"], config.num_kv_heads), "attn_v": layer["v"], "attn_output": layer["o"],
            "ffn_norm": layer["mlp_norm"], "ffn_gate": layer["gate"], "ffn_up": layer["up"], "ffn_down": layer["down"],
        }.items():
            writer.add_tensor(f"blk.{index}.{name}.weight", np.ascontiguousarray(value, np.float32))
    return _written(writer, path)


def _permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_mamba(path: Path, vocab: int = 5, width: int = 32) -> Path:
    """A recurrent model of one layer."""
    generator = np.random.default_rng(0)
    inner, state, rank = 2 * width, 8, 4
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    for name, shape in {
        "token_embd.weight": (vocab, width), "output_norm.weight": (width,), "blk.0.attn_norm.weight": (width,),
        "blk.0.ssm_in.weight": (2 * inner, width), "blk.0.ssm_conv1d.weight": (inner, 4),
        "blk.0.ssm_conv1d.bias": (inner,), "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_dt.weight": (inner, rank), "blk.0.ssm_dt.bias": (inner,), "blk.0.ssm_a": (inner, state),
        "blk.0.ssm_d": (inner,), "blk.0.ssm_out.weight": (width, inner),
    }.items():
        writer.add_tensor(name, -np.abs(generator.standard_normal(shape)).astype(np.float32))
    return _written(writer, path)


def write_lora(path: Path, width: int, rank: int = 2) -> Path:
    """An adapter of the first layer's values, large enough to be seen. Of a model with 2 of 4 heads for keys."""
    generator = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for end, shape in {"a": (rank, width), "b": (width // 2, rank)}.items():
        writer.add_tensor(f"blk.0.attn_v.weight.lora_{end}", generator.standard_normal(shape).astype(np.float32))
    return _written(writer, path)


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
