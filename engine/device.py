"""Whether a GPU can run what is asked of it: refused here, in one sentence, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from stars.buffers import bucket
from stars.draft import history_entries
from stars.errors import ModelError
from stars.kernels.limits import MAX_HEADS_A_KEY, MAX_HIDDEN, MAX_VOCAB
from stars.kernels.triton.tiles import max_workspace
from stars.model.config import ModelConfig
from stars.model.decoder import workspace_bytes
from stars.model.loader import DTYPES, inspect_model
from stars.passes import CAPTURED_CHUNK
from stars.prefill import choose_prefill
from stars.reward.causal import longest_text, slab_length

if TYPE_CHECKING:
    from stars.config import EngineConfig
    from stars.reward.base import Reward

LEAST_CAPABILITY = (8, 0)  # bfloat16 tensor cores and asynchronous copies
LEAST_TRITON = (3, 6)
HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head sizes that attention has kernels for."""
RESERVE = 2 << 30
"""Bytes that nothing of ours is to take: cuBLAS' workspaces, loaded kernels, captured graphs, torch's allocator."""


def check_gpu() -> None:
    """Raises ModelError unless there is a GPU of a supported capability and a Triton that is new enough."""
    if not torch.cuda.is_available():
        raise ModelError('device="cuda" needs an NVIDIA GPU and a CUDA build of torch, and torch finds none: use '
                         'device="cpu"')
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise ModelError(f"the GPU has compute capability {capability[0]}.{capability[1]} and the kernels need "
                         f'{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more: use device="cpu"')
    try:
        import triton
    except ImportError:
        raise ModelError('device="cuda" needs triton: pip install triton') from None
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_TRITON:
        raise ModelError(f"triton is {triton.__version__} and the kernels need {LEAST_TRITON[0]}.{LEAST_TRITON[1]} or "
                         "more: pip install --upgrade triton")


def check_model(config: ModelConfig, sampled: bool = True) -> None:
    """Raises ModelError for a model whose shape the GPU's kernels do not serve; `sampled`: a language model's."""
    if config.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise ModelError(f"the model has head_dim {config.head_dim} and the GPU's attention has kernels for {sizes}: "
                         'use device="cpu"')
    for name, size, most in (("query heads for each key head", config.num_heads // config.num_kv_heads,
                              MAX_HEADS_A_KEY),
                             ("hidden columns", config.hidden_size, MAX_HIDDEN),
                             ("tokens in its vocabulary", config.vocab_size if sampled else 0, MAX_VOCAB)):
        if size > most:
            raise ModelError(f'the model has {size} {name} and the GPU\'s kernels take {most}: use device="cpu"')


class Occupant(NamedTuple):
    """A model that is to be held on the GPU."""

    config: ModelConfig
    parameters: int
    drafts: bool  # whether tokens are drawn from it


def check_fit(config: EngineConfig, model: str | Path, reward: Reward | None) -> None:
    """Raises ModelError unless weights, caches, slabs and activations of both models fit the GPU; the CPU is not asked.
    """
    if config.device == "cpu":
        return
    directories = {"the language model": model}
    if isinstance(getattr(reward, "model", None), (str, Path)):
        directories["the reward model"] = reward.model
    models = {}
    for name, directory in directories.items():
        summary = inspect_model(directory)
        models[name] = Occupant(summary.config, summary.parameters, name == "the language model")
        check_model(summary.config, sampled=models[name].drafts)
    torch.cuda.empty_cache()  # what an engine before this one left with torch's allocator is free
    check_memory(needed_bytes(config, models), torch.cuda.mem_get_info()[0])


def needed_bytes(config: EngineConfig, models: dict[str, Occupant]) -> dict[str, int]:
    """Bytes of GPU memory that an engine over `models` takes, by what for."""
    dtype = DTYPES[config.dtype]
    lanes = bucket(config.max_num_lanes)
    needed = {}
    for name, (shape, parameters, drafts) in models.items():
        slab_len = config.max_segment_size if drafts else slab_length(config.max_segment_size)
        drafted = lanes if drafts else 0
        prefill = choose_prefill(shape, dtype, config.device, config.prefill_backend, config.deterministic)
        slabs = config.max_num_lanes + config.max_num_seqs
        rows = bucket(max(CAPTURED_CHUNK, slab_len, drafted))
        needed[f"{name}'s weights"] = parameters * dtype.itemsize
        needed[f"{name}'s cache"] = cache_bytes(shape, config.cache_tokens + slabs * slab_len, dtype)
        needed[f"{name}'s activations"] = workspace_bytes(shape, rows, drafted, dtype, not drafts) + 4 * sum(
            max_workspace(count, shape.num_heads, shape.head_dim, config.deterministic) for count in (rows, drafted))
        # Tables of the rotation in float32, the sampler's lists, and what a library's prefill gathers of a layer.
        positions = config.max_model_len if drafts else longest_text(shape, config.cache_tokens, slab_len)
        needed[f"{name}'s activations"] += 4 * (positions * shape.head_dim + drafted * shape.vocab_size)
        if prefill != "triton":
            needed[f"{name}'s activations"] += cache_bytes(shape, config.cache_tokens, dtype) // shape.num_layers
        if drafts:
            needed["the words that penalties count"] = 8 * history_entries(
                config.max_num_seqs, config.max_model_len, shape.vocab_size)
    needed["libraries and captured graphs"] = RESERVE
    return needed


def check_memory(needed: dict[str, int], free: int) -> None:
    """Raises ModelError unless `free` bytes hold what is needed, by name: how much is missing, and what to lower."""
    missing = sum(needed.values()) - free
    if missing <= 0:
        return
    parts = ", ".join(f"{size / 2**30:.1f} GiB for {name}" for name, size in needed.items())
    raise ModelError(f"the GPU has {free / 2**30:.1f} GiB free and lacks {missing / 2**30:.1f} GiB ({parts}): lower "
                     "cache_tokens, max_num_lanes or max_segment_size, or use smaller models")


def cache_bytes(config: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """Keys and values of `rows` page and slab rows, all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * rows * dtype.itemsize
