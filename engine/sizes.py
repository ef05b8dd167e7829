"""How much of everything an engine allocates: formulas of its settings and of its models' shapes, and nothing else."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from stars.config import EngineConfig
from stars.kernels.linear import SCHEMES
from stars.kernels.triton.tiles import max_workspace
from stars.model.config import ModelConfig
from stars.model.fusing import split_bytes
from stars.model.loader import DTYPES
from stars.model.workspace import workspace_bytes

RESERVE = 2 << 30
"""Bytes that nothing of ours is to take: cuBLAS' workspaces, loaded kernels, captured graphs, torch's allocator."""


class ModelSizes(NamedTuple):
    """What one model of an engine is given, beyond what `EngineConfig` says of both alike."""

    num_slabs: int
    slab_len: int  # tokens
    max_sequences: int  # of a prefill or scoring pass
    max_positions: int  # tokens of the longest text it is ever run on
    max_lanes: int  # of a draft; 0: nothing is drawn from it


def language_model(config: EngineConfig) -> ModelSizes:
    """The sizes of the model that drafts."""
    return ModelSizes(config.num_slabs, config.max_segment_size, config.max_num_seqs, config.max_model_len,
                      config.max_num_lanes)


def reward_model(shape: ModelConfig, config: EngineConfig) -> ModelSizes:
    """The sizes of a reward model with a cache of its own."""
    slab_len = slab_length(config.max_segment_size)
    positions = longest_text(shape, config.num_pages * config.page_size, slab_len)
    return ModelSizes(config.num_slabs, slab_len, config.max_num_lanes, positions, 0)


def slab_length(max_segment_size: int) -> int:
    """Tokens of a reward model's slab: a segment may re-encode to more tokens, and closing tokens come after it."""
    return 2 * max_segment_size + 32


def longest_text(shape: ModelConfig, cache_tokens: int, slab_len: int) -> int:
    """Tokens of the longest text that a reward model is ever run on: its context's, or what cache and slab hold."""
    return min(shape.context_length, cache_tokens + slab_len)


def pass_rows(config: EngineConfig, sizes: ModelSizes) -> int:
    """Rows of a prefill or scoring pass at most, idle ones apart: a chunk, or a slab that is longer."""
    return max(config.chunk, sizes.slab_len)


def padded_rows(config: EngineConfig, sizes: ModelSizes) -> int:
    """The same, idle ones included."""
    return max(config.target.rows(pass_rows(config, sizes), kind) for kind in ("prefill", "score"))


def table_width(config: EngineConfig, sizes: ModelSizes) -> int:
    """Pages of the longest text: entries of a row of the block tables."""
    return math.ceil(sizes.max_positions / config.page_size)


def history_entries(config: EngineConfig, vocab_size: int) -> int:
    """Distinct words that the histories of all responses may have; two int32 each."""
    return config.max_num_seqs * min(config.max_model_len, vocab_size)


class Occupant(NamedTuple):
    """A model that is to be held on the GPU."""

    config: ModelConfig
    parameters: int
    drafts: bool  # whether tokens are drawn from it
    prefill_backend: str = "triton"  # whose attention runs its long prompts, as of `choose_prefill`


def needed_bytes(config: EngineConfig, models: dict[str, Occupant]) -> dict[str, int]:
    """Bytes of GPU memory that an engine over `models` takes, by what for."""
    dtype, target = DTYPES[config.dtype], config.target
    needed = {}
    for name, (shape, parameters, drafts, backend) in models.items():
        sizes = language_model(config) if drafts else reward_model(shape, config)
        rows, lanes = padded_rows(config, sizes), target.rows(sizes.max_lanes, "draft") if drafts else 0
        needed[f"{name}'s weights"] = parameters * dtype.itemsize
        needed[f"{name}'s cache"] = cache_bytes(shape, config.cache_tokens + sizes.num_slabs * sizes.slab_len, dtype)
        needed[f"{name}'s activations"] = workspace_bytes(shape, max(rows, lanes), lanes, dtype, not drafts) + 4 * sum(
            max_workspace(count, shape.num_heads, shape.head_dim, config.deterministic) for count in (rows, lanes))
        if not config.deterministic:
            needed[f"{name}'s activations"] += split_bytes(shape, dtype, SCHEMES[dtype], not drafts)
        # Tables of the rotation in float32, the sampler's lists, and what a library's prefill gathers of a layer.
        needed[f"{name}'s activations"] += 4 * (sizes.max_positions * shape.head_dim + lanes * shape.vocab_size)
        if backend != "triton":
            needed[f"{name}'s activations"] += cache_bytes(shape, config.cache_tokens, dtype) // shape.num_layers
        if drafts:
            needed["the words that penalties count"] = 8 * history_entries(config, shape.vocab_size)
    needed["libraries and captured graphs"] = RESERVE
    return needed


def cache_bytes(config: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """Keys and values of `rows` page and slab rows, all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * rows * dtype.itemsize
