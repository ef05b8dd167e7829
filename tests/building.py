"""The engine's parts built by hand: settings of any sizes, unchecked, and what is made of them."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import torch

from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.kernels.linear import SCHEMES, Weight, as_stored
from stars.kernels.quant import quantize
from stars.kernels.triton.tuned import Table
from stars.model.config import ModelConfig
from stars.model.decoder import Decoder
from stars.model.low_rank import LayerAdapters, LowRank
from stars.sizes import ModelSizes
from stars.target import CPU, CUDA, Target
from toy import ToyModel

UNPADDED = CPU._replace(reward_lag=CUDA.reward_lag)
"""The CPU, whose rewards' pages hold what a GPU's hold: what follows has the same bits."""
PADDED = UNPADDED._replace(padded=True, chunk=CUDA.chunk, trailing=True)
"""The CPU, worked as a GPU is: idle rows, tiles, and scores that trail their drafts."""


def config_of(target: Target = CPU, **given: Any) -> EngineConfig:
    """An EngineConfig as it is given, without a look at whether it makes sense; small sizes for what is left out."""
    sizes = dict(device=target.device, dtype="float32", deterministic=False, cache_tokens=256,
                 gpu_memory_utilization=1.0, page_size=4, max_model_len=64, max_model_len_from="max_model_len",
                 max_num_seqs=4, max_num_lanes=8, max_segment_size=4, prefill_backend="auto")
    sizes |= given
    return EngineConfig(**sizes, least_cache_tokens=sizes["cache_tokens"], target=target)


def shape_of(num_layers: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    """A model whose cache has this shape; nothing else of it counts."""
    return dataclasses.replace(ToyModel().config, num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)


def cache_of(shape: ModelConfig, *, page_size: int, num_pages: int, num_slabs: int, slab_len: int,
             dtype: torch.dtype = torch.float32, target: Target = CPU) -> PagedCache:
    """The cache of a model of `shape`, of exactly these sizes."""
    config = config_of(target, cache_tokens=page_size * num_pages, page_size=page_size)
    return PagedCache(shape, config, ModelSizes(num_slabs, slab_len, 1, 1, 0), dtype)


def work_as(monkeypatch: Any, target: Target) -> None:
    """Engines that are built from now on, for the rest of a test, work as `target` says."""
    monkeypatch.setattr("stars.config.target_of", lambda device: target)


def as_on_a_gpu(decoder: Decoder, scheme: str = "fp32", deterministic: bool = False) -> Decoder:
    """The decoder with weights as a GPU has them, of a float type or quantised; its passes may be fused, see `fusing`.

    An embedding that is the head too is not quantised; a reward head is float32.
    """
    floats = {name: kind for kind, name in SCHEMES.items()}
    dtype = floats.get(scheme, torch.float32)

    def held(weight: Weight | None, stored: str) -> Weight | None:
        if weight is None:
            return None
        matrix = weight.dense().float()
        if stored not in floats:
            kind, _, group = stored.partition("-")
            return as_stored(quantize(matrix, kind, int(group or 0)), weight.bias)
        kind = floats[stored]
        return Weight(matrix.to(kind).contiguous(), None if weight.bias is None else weight.bias.to(kind),
                      weight.out_features, weight.in_features, deterministic=deterministic)

    def beside(adapters: LayerAdapters) -> LayerAdapters:
        return LayerAdapters(*(None if pair is None else LowRank(*(held(one, SCHEMES[dtype]) for one in pair))
                               for pair in adapters))

    layers = [layer._replace(adapters=beside(layer.adapters), **{
        name: held(getattr(layer, name), scheme) for name in ("qkv", "o", "gate_up", "down")})
        for layer in decoder.layers]
    embedding = held(decoder.embedding, SCHEMES[dtype])
    head = embedding if decoder.head is decoder.embedding else held(decoder.head, scheme)
    with patch("stars.model.decoder.target_of", lambda device: CUDA):
        return Decoder(decoder.config, embedding, layers, decoder.final_norm, head,
                       held(decoder.score_head, "fp32"), decoder.cos, decoder.sin, decoder.max_rows, dtype)


def fused_up_to(rows: int, *decoders: Decoder) -> Table:
    """The table of a card that was seen to be faster at fused passes of up to `rows` rows of these decoders."""
    return Table(chains={(one._fusing.shape, one._fusing.scheme): ((rows, True),) for one in decoders})
