"""What a GPU has memory for, by files' headers: caches are made as large, and what does not fit is refused in one
sentence, before any weight is read."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch

from stars.config import MAX_SIZE, EngineConfig
from stars.device import check_model
from stars.errors import ModelError, RequestError, text_of
from stars.kernels.quant import Rounded
from stars.model.loaded import READABLE, LoadedModel, same
from stars.model.loader import followed, inspect_model
from stars.model.quantization import held_bytes, scheme_of
from stars.model.reader import DTYPES
from stars.model.tokenizer import Tokenizer
from stars.prefill import choose_prefill
from stars.reward.base import Reward, with_parts
from stars.sizes import AdapterSizes, Occupant, needed_bytes


def fit(config: EngineConfig, model: Any, reward: Reward | None, tokenizer: Tokenizer | None, vocab_size: int,
        named: Mapping[str, Any] | None = None) -> EngineConfig:
    """`config` with as many cache_tokens as a GPU has memory for, at most its own; on the CPU as it is.

    model: a directory or a Decoder, whose tokenizer and vocabulary the others are; named: others beside it. Raises
    ModelError where weights, caches, slabs, activations and graphs of all models do not fit, RequestError for a
    reward_quantization of no reward model. Weights that several of them read from one file are counted once, as they
    are held once.
    """
    held = [one.holds(tokenizer, vocab_size, config) for one in (with_parts(reward) if reward is not None else ())]
    if config.reward_quantization is not None and not any(isinstance(one.model, READABLE) for one in held):
        raise RequestError(f'reward_quantization is "{config.reward_quantization}", and there is no reward model whose '
                           "weights are read here: leave it out")
    if not config.target.own_memory:
        return config
    read: set[Hashable] = set()
    models = {"the language model": occupant(config, model, config.max_segment_size, True, read=read,
                                             quantization=config.quantization)}
    others = {same(model)}
    for given, other in (named or {}).items():
        if same(other) not in others:
            others.add(same(other))
            try:
                models[f"the model {given!r}"] = occupant(config, other, config.max_segment_size, True, read=read,
                                                          quantization=followed(other, config.quantization))
            except ModelError as error:
                raise ModelError(f"models[{given!r}]: {text_of(error)}") from error
    rewards = [one for one in held if one.model is not None]
    for number, one in enumerate(rewards, 1):
        name = "the reward model" if len(rewards) == 1 else f"reward model {number}"
        models[name] = occupant(config, one.model, one.slab_len, False, one.reward_head, one.head, read,
                                one.quantization)
    torch.cuda.empty_cache()  # what an engine before this one left with torch's allocator is free
    free, total = torch.cuda.mem_get_info()
    return fit_memory(config, models, sum(one.other_bytes for one in held), free, total)


def occupant(config: EngineConfig, model: Any, slab_len: int, drafts: bool, reward_head: Any = "auto",
             head: Literal["lm", "reward"] = "reward", read: set[Hashable] | None = None,
             quantization: Rounded | None = None) -> Occupant:
    """What a model of a directory or a Decoder needs; ModelError where the GPU at hand cannot run it. head: of one that
    nothing is drawn from. read: tensors that are held already, to which its own are added. quantization: what those of
    a directory are rounded to."""
    target, dtype, beside = config.target, DTYPES.get(config.dtype, torch.float32), AdapterSizes()
    read = set() if read is None else read
    if isinstance(model, READABLE):
        summary = inspect_model(model, "lm" if drafts else head, reward_head)
        shape = summary.config
        rounded = {(*key, scheme_of(key[1], quantization, shape.tie_word_embeddings)): info
                   for key, info in summary.tensors.items()}
        stay = {key for key in rounded if isinstance(model, LoadedModel) and key[2] is None
                and model.stays(key[1], dtype, config.device, shape.head_order() is not None)}  # and need no more
        weight_bytes = sum(held_bytes(info, key[2], dtype.itemsize) for key, info in rounded.items()
                           if key not in read and key not in stay)
        read.update(rounded)
        if summary.adapter is not None:
            beside = AdapterSizes(summary.adapter.products, *summary.adapter.widest)
        if summary.reward_head is not None:
            weight_bytes += summary.reward_head.float32_parameters * (torch.float32.itemsize - dtype.itemsize)
    else:
        shape, weight_bytes, dtype = model.config, 0, model.dtype
        if model.adapters:
            beside = AdapterSizes(len(model.adapters), max(pair.down.out_features for pair in model.adapters),
                                  max(pair.up.out_features for pair in model.adapters))
    if target.triton:
        check_model(shape, sampled=drafts)
    backend = choose_prefill(shape, dtype, target, config.prefill_backend, config.deterministic)
    return Occupant(shape, dtype, weight_bytes, drafts, slab_len, backend, beside)


def fit_memory(config: EngineConfig, models: dict[str, Occupant], reward: int, free: int, total: int) -> EngineConfig:
    """`config` with as many tokens as `free` bytes of `total` hold beside all else; ModelError where its least do not.

    reward: bytes of one that is none of the models.
    """
    share, least = config.gpu_memory_utilization, config.least_cache_tokens
    budget = free - round((1.0 - share) * total)

    def needed(tokens: int) -> dict[str, int]:
        return needed_bytes(config.fitted(tokens), models, reward)

    most = config.cache_tokens
    if least < most:  # rows of a cache are numbered in int32, one for each key head
        most = max(least, min([most] + [MAX_SIZE // model.config.num_kv_heads for model in models.values()]))
    sizes = range(config.page_size, most + 1, config.page_size)
    fitting = bisect_right(sizes, budget, key=lambda tokens: sum(needed(tokens).values())) * config.page_size
    if fitting >= least:
        return config.fitted(fitting)
    parts = needed(least)
    total_needed = sum(parts.values())
    listed = ", ".join(f"{_amount(size)} for {name}" for name, size in parts.items() if size > total_needed // 1000)
    usable = "" if share == 1.0 else f", {_amount(max(0, budget))} of it within gpu_memory_utilization={share:g},"
    raise ModelError(f"the GPU has {_amount(free)} free{usable} and lacks {_amount(total_needed - budget)} ({listed}): "
                     f"{_advice(config, fitting, total_needed <= free)}")


def _advice(config: EngineConfig, fitting: int, more_is_free: bool) -> str:
    """Which setting to change where only `fitting` tokens fit; `more_is_free`: all would, in the whole of the GPU."""
    ways = ["raise gpu_memory_utilization"] if more_is_free else []
    if fitting:
        given = config.least_cache_tokens == config.cache_tokens and config.gpu_memory_utilization == 1.0
        name = "cache_tokens" if given else "max_model_len"
        ways.append(f"lower {name} to {fitting}")
    else:
        ways.append("lower max_num_lanes, max_num_seqs or max_segment_size, or use smaller models")
    return ", or ".join(ways)


def _amount(size: int) -> str:
    """Bytes as they are said."""
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{math.ceil(size / 2**20)} MiB"
