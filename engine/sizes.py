"""How much of everything an engine allocates: formulas of its settings and of its models' shapes, and nothing else."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from stars.config import EngineConfig
from stars.kernels.graph import LAUNCH_BYTES
from stars.kernels.linear import SCHEMES
from stars.kernels.top_tokens import launches, scratch_bytes
from stars.kernels.triton.tiles import Kind, max_workspace
from stars.model.config import ModelConfig
from stars.model.fusing import split_bytes
from stars.model.low_rank import LAUNCHES as LOW_RANK_LAUNCHES
from stars.model.workspace import workspace_bytes

LIBRARIES = 1 << 30
"""Bytes that nothing of ours is to take: cuBLAS' workspaces, loaded kernels, what torch's allocator rounds up. An
estimate."""

MAX_CLOSING = 32
"""Closing tokens that are reckoned with where a chat template says them: of a span which trails a draft at most."""


LATER_PASSES = 2
"""Passes, or steps, of a model whose graphs may be kept besides those of start-up, by its passes and by its drafts.
Few: all that an engine's rounds run is captured at the start, or too long to be captured at all."""


class ModelSizes(NamedTuple):
    """What one model of an engine is given, beyond what `EngineConfig` says of both alike."""

    num_slabs: int
    slab_len: int  # tokens
    max_sequences: int  # of a prefill or scoring pass
    max_positions: int  # tokens of the longest text it is ever run on
    max_lanes: int  # of a draft; 0: nothing is drawn from it
    readings: int = 1  # of a reward, for each sequence of a scoring pass


def language_model(config: EngineConfig) -> ModelSizes:
    """The sizes of the model that drafts."""
    return ModelSizes(config.num_slabs, config.max_segment_size, config.max_num_seqs, config.max_model_len,
                      config.max_num_lanes)


def reward_model(shape: ModelConfig, config: EngineConfig, slab_len: int, readings: int = 1) -> ModelSizes:
    """The sizes of a reward model with a cache of its own, and slabs as of `slab_length`; readings: of a candidate."""
    positions = longest_text(shape, config.num_pages * config.page_size, slab_len)
    return ModelSizes(config.num_slabs, slab_len, config.max_num_lanes, positions, 0, readings)


def slab_length(config: EngineConfig, reencodes: bool, closing: int) -> int:
    """Tokens of a reward model's slab: a segment, and so many closing tokens. One that is encoded again may be longer.

    What is longer than a slab is run into pages.
    """
    if reencodes:
        return 2 * config.max_segment_size + 32
    return config.target.reward_lag + config.max_segment_size + closing


def longest_text(shape: ModelConfig, cache_tokens: int, slab_len: int) -> int:
    """Tokens of the longest text that a reward model is ever run on: its context's, or what cache and slab hold."""
    return min(shape.context_length, cache_tokens + slab_len)


def pass_rows(config: EngineConfig, sizes: ModelSizes) -> int:
    """Rows of a prefill or scoring pass at most, idle ones apart: a chunk, or a slab that is longer."""
    return max(config.chunk, sizes.slab_len)


def score_rows(config: EngineConfig, sizes: ModelSizes) -> int:
    """Rows of a scoring pass at most, idle ones apart: no sequence has more than a slab."""
    return min(pass_rows(config, sizes), sizes.max_sequences * sizes.slab_len)


def padded_rows(config: EngineConfig, sizes: ModelSizes) -> int:
    """The same, idle ones included."""
    return max(config.target.rows(pass_rows(config, sizes), kind) for kind in ("prefill", "score"))


def table_width(config: EngineConfig, sizes: ModelSizes) -> int:
    """Pages of the longest text: entries of a row of the block tables."""
    return math.ceil(sizes.max_positions / config.page_size)


def captured_passes(config: EngineConfig, sizes: ModelSizes) -> int:
    """Passes of one model that are captured at start-up: two widths of attention's tiles for each number of rows."""
    most: dict[Kind, int] = {"prefill": pass_rows(config, sizes)}
    most |= {"draft": sizes.max_lanes} if sizes.max_lanes else {"score": score_rows(config, sizes)}
    return 2 * sum(len(config.target.shapes(kind, rows)) for kind, rows in most.items())


def graph_bytes(config: EngineConfig, shape: ModelConfig, sizes: ModelSizes, more: int = 0) -> int:
    """Of a GPU's memory for what is captured of a model of this shape, at most: at start-up, and what its passes and
    its drafts may capture later. more: launches of a pass that an adapter adds."""
    ranked = [launches(rows, shape.vocab_size) for rows in ranked_rows(config, sizes)] if sizes.max_lanes else []
    lanes = len(config.target.shapes("draft", sizes.max_lanes)) if sizes.max_lanes else 0
    shaped = 2 * lanes * EDIT_LAUNCHES  # with penalties and without
    return (captured_passes(config, sizes) * _pass_bytes(shape, more)
            + later_bytes(shape, more) * (2 if sizes.max_lanes else 1)
            + 2 * sum(ranked) * LAUNCH_BYTES  # with filters and without
            + shaped * LAUNCH_BYTES)


def ranked_rows(config: EngineConfig, sizes: ModelSizes) -> list[int]:
    """Rows of the draft that are ranked together where shapes are captured: one response, a few, or all."""
    most = config.target.rows(sizes.max_lanes, "draft")
    return [rows for rows in (1, 8) if rows < most] + [most]


def later_bytes(shape: ModelConfig, more: int = 0) -> int:
    """Of a GPU's memory for graphs that the passes, or the drafts, of a model of this shape capture after start-up."""
    return LATER_PASSES * _pass_bytes(shape, more)


def _pass_bytes(shape: ModelConfig, more: int) -> int:
    """Of one captured pass, at most: ten launches a layer and ten besides, among which are those of a draw."""
    return (10 * (shape.num_layers + 1) + more) * LAUNCH_BYTES


def history_entries(config: EngineConfig, vocab_size: int) -> int:
    """Distinct words that the histories of all responses may have; two int32 each."""
    return config.max_num_seqs * min(config.max_model_len, vocab_size)


MAX_EDITED = 1024
"""Tokens of a request that have a bias, or are banned for a while."""

MAX_WORD, MAX_WORDS = 16, 1024
"""Tokens of a text that is banned, and such texts of two tokens or more of a request."""

EDIT_LAUNCHES = 3
"""On a GPU, at most, of what shapes the logits of a step by itself: a blend, the edits, penalties."""


def edit_entries(config: EngineConfig, vocab_size: int) -> int:
    """Tokens of all responses that have a bias, or are banned for a while; three int32 each."""
    return config.max_num_seqs * min(MAX_EDITED, vocab_size)


def edit_words(config: EngineConfig) -> int:
    """Banned texts of all responses; MAX_WORD int32 each."""
    return config.max_num_seqs * MAX_WORDS


def mask_words(vocab_size: int) -> int:
    """int32 of a mask."""
    return -(-vocab_size // 32)


class AdapterSizes(NamedTuple):
    """Low-rank products beside those of a model, of all its layers."""

    products: int = 0
    rank: int = 0  # of one, at most
    features: int = 0  # of one, at most

    @property
    def launches(self) -> int:
        """On a GPU, of a pass."""
        return LOW_RANK_LAUNCHES * self.products


NO_ADAPTER = AdapterSizes()


class Occupant(NamedTuple):
    """A model that is to be held on the GPU."""

    config: ModelConfig
    dtype: torch.dtype  # of activations, keys and values
    weight_bytes: int  # that are still to be read
    drafts: bool  # whether tokens are drawn from it
    slab_len: int = 0  # of a reward model, as of `slab_length`
    prefill_backend: str = "triton"  # whose attention runs its long prompts, as of `choose_prefill`
    adapter: AdapterSizes = NO_ADAPTER


def needed_bytes(config: EngineConfig, models: dict[str, Occupant], reward: int = 0) -> dict[str, int]:
    """Bytes of GPU memory that an engine over `models` takes, by what for; `reward`: of one in no cache of ours."""
    target = config.target
    needed, graphs = {}, 0
    for name, (shape, dtype, weight_bytes, drafts, slab_len, backend, adapter) in models.items():
        sizes = language_model(config) if drafts else reward_model(shape, config, slab_len)
        rows, lanes = padded_rows(config, sizes), target.rows(sizes.max_lanes, "draft") if drafts else 0
        graphs += graph_bytes(config, shape, sizes, adapter.launches)
        needed[f"{name}'s weights"] = weight_bytes
        needed[f"{name}'s cache"] = cache_bytes(shape, config.cache_tokens + sizes.num_slabs * sizes.slab_len, dtype)
        needed[f"{name}'s activations"] = workspace_bytes(shape, max(rows, lanes), lanes, dtype, not drafts) + 4 * sum(
            max_workspace(count, shape.num_heads, shape.head_dim, config.deterministic) for count in (rows, lanes))
        if adapter.products:
            needed[f"{name}'s activations"] += max(rows, lanes) * (adapter.rank + adapter.features) * dtype.itemsize
        elif not config.deterministic:
            needed[f"{name}'s activations"] += split_bytes(shape, dtype, SCHEMES[dtype], not drafts)
        # Tables of the rotation in float32, the sampler's lists, and what a library's prefill gathers of a layer.
        rotations = len({shape.rope, *shape.ropes})
        needed[f"{name}'s activations"] += 4 * (
            rotations * sizes.max_positions * shape.head_dim + lanes * shape.vocab_size)
        if backend != "triton":
            needed[f"{name}'s activations"] += cache_bytes(shape, config.cache_tokens, dtype) // shape.num_layers
        if drafts:  # of a draft whose tokens are ranked
            needed[f"{name}'s activations"] += scratch_bytes(lanes, shape.vocab_size)
            words = "the words that penalties count"
            needed[words] = needed.get(words, 0) + 8 * history_entries(config, shape.vocab_size)
            edits = "biases, bans and masks"
            needed[edits] = needed.get(edits, 0) + 4 * (
                3 * edit_entries(config, shape.vocab_size) + MAX_WORD * edit_words(config)
                + lanes * mask_words(shape.vocab_size))
    needed["the reward"] = reward
    needed["captured graphs"] = graphs
    needed["libraries"] = LIBRARIES
    return needed


def cache_bytes(config: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """Keys and values of `rows` page and slab rows, all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * rows * dtype.itemsize
