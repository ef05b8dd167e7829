"""The engine's own settings, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stars.device import check_gpu, check_model
from stars.errors import ModelError, RequestError
from stars.model.config import ModelConfig
from stars.model.loader import DTYPES
from stars.prefill import choose_prefill

DEFAULT_CACHE_TOKENS = 1 << 15


@dataclass(frozen=True)
class EngineConfig:
    """Sizes that are fixed when the engine is built. Names are vLLM's where it has one.

    cache_tokens: the budget of each model's KV cache in tokens (default 32768); memory is touched only as it is used.
    page_size: tokens of a page. max_model_len: most tokens of a prompt and its response together.
    max_num_seqs: responses decoded at once. max_num_lanes: candidates drafted at once, over all responses.
    max_segment_size: tokens of the longest segment a policy may ask for.
    prefill_backend: on a GPU, whose attention runs prompts of more than 256 tokens: "flash-attn-4", "flash-attn-2",
        "varlen" or "sdpa" (both torch's), "triton" (our own), or "auto", the first of these that suits the model.
    """

    device: str
    dtype: str
    deterministic: bool
    cache_tokens: int
    page_size: int
    max_model_len: int
    max_model_len_from: str
    max_num_seqs: int
    max_num_lanes: int
    max_segment_size: int
    prefill_backend: str

    @property
    def num_pages(self) -> int:
        """Pages of each model's cache."""
        return self.cache_tokens // self.page_size

    @property
    def padded(self) -> bool:
        """Whether passes are padded to the shapes of captured graphs."""
        return self.device != "cpu"

    @classmethod
    def resolve(cls, model: ModelConfig, device: str = "auto", dtype: str = "auto", deterministic: bool = False, *,
                cache_tokens: int | None = None, page_size: int = 16, max_model_len: int | None = None,
                max_num_seqs: int = 64, max_num_lanes: int = 64, max_segment_size: int = 128,
                prefill_backend: str = "auto") -> EngineConfig:
        """Fills in defaults and refuses what cannot work; RequestError."""
        if device not in ("auto", "cpu", "cuda"):
            raise RequestError(f'device is {device!r}, it must be "auto", "cpu" or "cuda"')
        device = "cpu" if device == "auto" else device
        dtypes = ("float32", "bfloat16") + (("float16",) if device == "cuda" else ())
        if dtype != "auto" and dtype not in dtypes:
            choices = ", ".join(f'"{name}"' for name in dtypes)
            raise RequestError(f'dtype is {dtype!r}, it must be "auto" or one of {choices} on device "{device}"')
        for name, value in (("cache_tokens", cache_tokens), ("page_size", page_size), ("max_model_len", max_model_len),
                            ("max_num_seqs", max_num_seqs), ("max_num_lanes", max_num_lanes),
                            ("max_segment_size", max_segment_size)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RequestError(f"{name} is {value!r}, it must be an integer of at least 1")
        if device == "cuda":
            check_gpu()
            check_model(model)
            if page_size < 16 or page_size & (page_size - 1):
                raise RequestError(f"page_size is {page_size}, on a GPU it must be a power of two of at least 16")
        if dtype == "auto":
            dtype = model.dtype if device == "cuda" else "float32"
            if dtype not in DTYPES:
                raise ModelError(f"the model is stored as {dtype}, which is not supported: choose a dtype")
        choose_prefill(model, DTYPES[dtype], device, prefill_backend, deterministic)
        if max_model_len is not None and max_model_len > model.context_length:
            raise RequestError(f"max_model_len is {max_model_len}, the model's context is "
                               f"{model.context_length}: lower it")
        tokens = DEFAULT_CACHE_TOKENS if cache_tokens is None else cache_tokens
        tokens = math.ceil(tokens / page_size) * page_size
        limits = {"the model's context": model.context_length, "cache_tokens": tokens}
        if max_model_len is not None:
            limits["max_model_len"] = max_model_len
        source = min(limits, key=lambda name: limits[name])
        return cls(device=device, dtype=dtype, deterministic=deterministic,
                   cache_tokens=tokens, page_size=page_size, max_model_len=limits[source], max_model_len_from=source,
                   max_num_seqs=min(max_num_seqs, max_num_lanes), max_num_lanes=max_num_lanes,
                   max_segment_size=max_segment_size, prefill_backend=prefill_backend)
