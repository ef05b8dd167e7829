"""The engine's own settings, checked once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stars.arguments import flag, integer, real, shown
from stars.device import auto_device, check_gpu, check_model
from stars.errors import ModelError, RequestError
from stars.kernels.quant import Rounded
from stars.model.config import ModelConfig
from stars.model.quantization import checked_quantization
from stars.model.reader import DTYPES
from stars.prefill import choose_prefill
from stars.target import Target, target_of

DEFAULT_CACHE_TOKENS = 1 << 15
LEAST_CACHE_TOKENS = 1 << 11
"""What a GPU must have room for where no length is asked for: a prompt of a thousand tokens, and as long a response."""
MAX_SIZE = (1 << 31) - 1  # positions, slots and lanes are int32
DTYPE_NAMES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
"""Other names of dtypes, vLLM's among them."""
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory|ALLOC_FAILED")
"""What RuntimeErrors of torch, of CUDA and of its libraries say where memory is lacking. Other faults are about memory,
too: of an illegal access, or of a block's shared memory."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings that are fixed when the engine is built, for both of its models. Names are vLLM's where it has one.

    cache_tokens: the budget of each model's KV cache in tokens. Left out it is 32768 on the CPU, where memory is
        touched only as it is used, and on a GPU what there is memory for, by `gpu_memory_utilization`.
    gpu_memory_utilization: on a GPU, where cache_tokens is left out: the share of its memory, above 0 and at most 1,
        that may be in use once the engine is built, by whomever. Where it is given, all that is free may be (1).
    page_size: tokens of a page. max_model_len: most tokens of a prompt and its response together.
    max_num_seqs: responses decoded at once. max_num_lanes: candidates drafted at once, over all responses.
    max_segment_size: tokens of the longest segment a policy may ask for.
    max_num_batched_tokens: rows of prompts that each model runs in a round at most while other responses decode; longer
        prompts are read over several rounds. None: the device's default, 2048 on a GPU and no bound on the CPU. Where
        nothing decodes, where several users are active, and where requests come one by one, at most so many are run in
        a round too, and never more than a chunk: 2048, on the CPU 256.
    prefill_backend: on a GPU, whose attention runs prompts of more than 256 tokens: "flash-attn-4", "flash-attn-2",
        "varlen" or "sdpa" (both torch's), "triton" (our own), or "auto", the first of these that suits the model.
    quantization: what the language model's matrices are rounded to as they are read, as `load_model`'s: "int8", "int4"
        or, on a GPU, "fp8"; None leaves them as they are stored. Models beside it follow, unless they are quantised
        already. reward_quantization: the same of reward models, each of which may say its own.
    """

    device: str
    dtype: str  # on the CPU it may be "auto", as each model has its own then
    deterministic: bool
    cache_tokens: int
    least_cache_tokens: int  # below cache_tokens until `fitted` has said how many there is memory for
    gpu_memory_utilization: float
    page_size: int
    max_model_len: int
    max_model_len_from: str
    max_num_seqs: int
    max_num_lanes: int
    max_segment_size: int
    prefill_backend: str
    target: Target = field(repr=False)  # what follows from the device
    max_num_batched_tokens: int | None = None  # None: no bound
    quantization: Rounded | None = None
    reward_quantization: Rounded | None = None

    @property
    def num_pages(self) -> int:
        """Pages of each model's cache."""
        return math.ceil(self.cache_tokens / self.page_size)

    @property
    def num_slabs(self) -> int:
        """Slabs of each model's cache: one a lane, and one for what each response keeps between rounds."""
        return self.max_num_lanes + self.max_num_seqs

    @property
    def chunk(self) -> int:
        """Rows of a prefill pass, and of a prompt that is read in several: no more than a round may run."""
        rows = self.max_num_batched_tokens
        return self.target.chunk if rows is None else min(self.target.chunk, rows)

    @classmethod
    def resolve(cls, model: ModelConfig, device: str = "auto", dtype: str = "auto", deterministic: bool = False, *,
                cache_tokens: int | None = None, gpu_memory_utilization: float = 0.9, page_size: int = 16,
                max_model_len: int | None = None,
                max_num_seqs: int = 64, max_num_lanes: int = 64, max_segment_size: int = 128,
                prefill_backend: str = "auto", max_num_batched_tokens: int | None = None,
                quantization: str | None = None, reward_quantization: str | None = None) -> EngineConfig:
        """Fills in defaults and refuses what cannot work; RequestError."""
        device, dtype = _name(device), _name(dtype)
        dtype = DTYPE_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        if not isinstance(device, str) or device not in ("auto", "cpu", "cuda"):
            raise RequestError(f'device is {shown(device)}, it must be "auto", "cpu" or "cuda"')
        if not isinstance(prefill_backend, str):
            raise RequestError(f'prefill_backend is {shown(prefill_backend)}, it must be "auto" or a name')
        deterministic = flag("deterministic", deterministic)
        device = auto_device(model) if device == "auto" else device
        target = target_of(device)
        if not isinstance(dtype, str) or dtype not in ("auto", *target.dtypes):
            choices = ", ".join(f'"{name}"' for name in target.dtypes)
            raise RequestError(f'dtype is {shown(dtype)}, it must be "auto" or one of {choices} on device "{device}"')
        rounded = checked_quantization(quantization, target, stored=model.quantization, error=RequestError)
        rounded_reward = checked_quantization(reward_quantization, target, "reward_quantization", error=RequestError)
        cache_tokens = None if cache_tokens is None else _size("cache_tokens", cache_tokens)
        share = real("gpu_memory_utilization", gpu_memory_utilization, "above 0 and at most 1",
                     lambda value: 0.0 < value <= 1.0)
        max_model_len = None if max_model_len is None else _size("max_model_len", max_model_len)
        page_size, max_segment_size = _size("page_size", page_size), _size("max_segment_size", max_segment_size)
        max_num_seqs, max_num_lanes = _size("max_num_seqs", max_num_seqs), _size("max_num_lanes", max_num_lanes)
        batched_tokens = (target.batched_tokens if max_num_batched_tokens is None else
                          _size("max_num_batched_tokens", max_num_batched_tokens))
        if target.triton:
            check_gpu()
            check_model(model)
            if page_size < 16 or page_size & (page_size - 1):
                raise RequestError(f"page_size is {page_size}, on a GPU it must be a power of two of at least 16")
        if dtype == "auto" and not target.float32:
            dtype = model.dtype
            if dtype not in DTYPES:
                raise ModelError(f"the model is stored as {dtype}, which is not supported: choose a dtype")
        activations = torch.float32 if target.float32 else DTYPES[dtype]
        choose_prefill(model, activations, target, prefill_backend, deterministic)
        if max_model_len is not None and max_model_len > model.context_length:
            raise RequestError(f"max_model_len is {max_model_len}, the model's context is "
                               f"{model.context_length}: lower it")
        max_num_seqs = min(max_num_seqs, max_num_lanes)
        limits = {"the model's context": model.context_length}
        if cache_tokens is None and target.own_memory:
            longest = model.context_length if max_model_len is None else max_model_len
            most = MAX_SIZE // model.num_kv_heads - (max_num_lanes + max_num_seqs) * max_segment_size
            least = _pages(longest if max_model_len is not None else min(longest, LEAST_CACHE_TOKENS), page_size)
            # More than all responses can fill would never be used.
            tokens = max(least, min(_pages(max_num_seqs * longest, page_size), most // page_size * page_size))
        else:
            least = tokens = _pages(cache_tokens or DEFAULT_CACHE_TOKENS, page_size)
            share = share if cache_tokens is None else 1.0
            limits["cache_tokens"] = tokens
        if max_model_len is not None:
            limits["max_model_len"] = max_model_len
        source = min(limits, key=lambda name: limits[name])
        config = cls(
            device=device, dtype=dtype, deterministic=deterministic, cache_tokens=tokens, least_cache_tokens=least,
            gpu_memory_utilization=share, page_size=page_size, max_model_len=limits[source], max_model_len_from=source,
            max_num_seqs=max_num_seqs, max_num_lanes=max_num_lanes, max_segment_size=max_segment_size,
            prefill_backend=prefill_backend, target=target, max_num_batched_tokens=batched_tokens,
            quantization=rounded, reward_quantization=rounded_reward)
        rows = tokens + config.num_slabs * max_segment_size
        if rows * model.num_kv_heads > MAX_SIZE:
            raise RequestError(f"cache_tokens={tokens}, max_num_lanes={max_num_lanes} and max_segment_size="
                               f"{max_segment_size} make {rows} rows of {model.num_kv_heads} heads, which are numbered "
                               "in int32: lower them")
        return config

    def fitted(self, cache_tokens: int) -> EngineConfig:
        """The same with so many tokens, whole pages, for which there is memory: no text can be longer than they are."""
        if cache_tokens >= self.max_model_len:
            return replace(self, cache_tokens=cache_tokens, least_cache_tokens=cache_tokens)
        return replace(self, cache_tokens=cache_tokens, least_cache_tokens=cache_tokens, max_model_len=cache_tokens,
                       max_model_len_from="gpu_memory_utilization")


@contextmanager
def allocation(config: EngineConfig) -> Iterator[None]:
    """Around whatever allocates by these settings, caches, buffers and graphs: ModelError, which says what to lower,
    where the memory for it is not there."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch's CPU allocator raises RuntimeError.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY.search(str(error)):
            share = ", or gpu_memory_utilization where cache_tokens is left out" if config.target.own_memory else ""
            raise ModelError(f"there is no memory for an engine of cache_tokens={config.cache_tokens}, max_num_lanes="
                             f"{config.max_num_lanes} and max_segment_size={config.max_segment_size}: lower them{share}"
                             ) from error
        raise


def _pages(tokens: int, page_size: int) -> int:
    """`tokens`, filled up to whole pages."""
    return math.ceil(tokens / page_size) * page_size


def _size(name: str, value: Any) -> int:
    return integer(name, value, 1, MAX_SIZE)


def _name(value: Any) -> Any:
    """The name of a torch.dtype or torch.device; anything else as it is."""
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value
