"""Whether both models fit a GPU's memory: refused in one sentence, by their files' headers, before weights are read."""

from __future__ import annotations

from pathlib import Path

import torch

from stars.config import EngineConfig
from stars.device import check_model
from stars.errors import ModelError
from stars.model.config import ModelConfig
from stars.model.loader import DTYPES, inspect_model
from stars.prefill import choose_prefill
from stars.reward.base import Reward
from stars.sizes import Occupant, needed_bytes


def check_fit(config: EngineConfig, model: str | Path, reward: Reward | None) -> None:
    """Raises ModelError unless weights, caches, slabs and activations of both models fit the GPU; the CPU is not asked.
    """
    if not config.target.own_memory:
        return
    directories = {"the language model": model}
    reward_model = getattr(reward, "model", None)
    if isinstance(reward_model, (str, Path)):
        directories["the reward model"] = reward_model
    models = {}
    for name, directory in directories.items():
        summary = inspect_model(directory)
        drafts = name == "the language model"
        check_model(summary.config, sampled=drafts)
        models[name] = occupant(config, summary.config, summary.parameters, drafts)
    torch.cuda.empty_cache()  # what an engine before this one left with torch's allocator is free
    check_memory(needed_bytes(config, models), torch.cuda.mem_get_info()[0])


def occupant(config: EngineConfig, shape: ModelConfig, parameters: int, drafts: bool) -> Occupant:
    """A model of that shape, and whose attention the GPU at hand has for its long prompts."""
    backend = choose_prefill(shape, DTYPES[config.dtype], config.target, config.prefill_backend, config.deterministic)
    return Occupant(shape, parameters, drafts, backend)


def check_memory(needed: dict[str, int], free: int) -> None:
    """Raises ModelError unless `free` bytes hold what is needed, by name: how much is missing, and what to lower."""
    missing = sum(needed.values()) - free
    if missing <= 0:
        return
    parts = ", ".join(f"{size / 2**30:.1f} GiB for {name}" for name, size in needed.items())
    raise ModelError(f"the GPU has {free / 2**30:.1f} GiB free and lacks {missing / 2**30:.1f} GiB ({parts}): lower "
                     "cache_tokens, max_num_lanes or max_segment_size, or use smaller models")
