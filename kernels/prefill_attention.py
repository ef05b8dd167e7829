"""Attention of a prefill pass on a GPU through a library: flash-attn 4, flash-attn 2, or torch's own.

A prefill has many rows and is bound by arithmetic, where these kernels are nearest to what a card can do. What they do
not take (softcap in torch's, float32, `deterministic=True`), our own kernel does: `stars.kernels.triton.attention`.

- They take pages of 256 keys or none, so the keys and values of a pass are gathered into one tensor first. That costs
  a read and a write of them a layer, little besides the products of a pass of many rows.
- float32 is left to our kernel: torch may round float32 products to TF32, by a setting of the process that is not
  ours, and this type is there for comparisons.
- Their bits may depend on the other sequences: flash-attn 2 divides the keys of a pass of single rows by how many
  sequences there are. So `deterministic=True` is left to our kernel too.

**No card has run flash-attn's calls yet.** torch's SDPA is tested on the CPU, the others against stand-ins with the
signatures of flash-attn 2.6 to 2.8, flash-attn-4 4.0.0b4 to b36 and torch 2.10 to 2.13, which were read. Those of
flash-attn-4 b36 compile for sm_90 and sm_100, at the first call of a kind (type, head_dim, heads, window), for seconds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stars.kernels.types import LayerKV, Prefill


class BackendError(Exception):
    """A backend that is not there, or does not suit the case."""


def build(backend: str, pages: Sequence[Sequence[int]], starts: Sequence[int], lengths: Sequence[int], page_size: int,
          device: torch.device | str) -> Prefill:
    """Sequence s runs lengths[s] tokens after its first starts[s] keys, all in pages[s]; one copy to the device.

    ValueError for a sequence without rows, which flash-attn 2 would read beyond the end for.
    """
    if min(lengths) < 1:
        raise ValueError(f"a prefill of {list(lengths)} rows has a sequence without any: leave it out")
    device = torch.device(device)
    k_lengths = [start + length for start, length in zip(starts, lengths, strict=True)]
    parts = [np.cumsum([0, *lengths]), np.cumsum([0, *k_lengths])]
    for held, keys in zip(pages, k_lengths, strict=True):
        used = np.asarray(held[: -(-keys // page_size)])  # [pages]
        parts.append((used[:, None] * page_size + np.arange(page_size)).reshape(-1)[:keys])
    host = torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="same_kind"))
    if device.type == "cuda":  # from pageable memory the copy would wait for the passes before this one
        host = host.pin_memory()
    cu_seqlens_q, cu_seqlens_k, key_rows = host.to(device, non_blocking=True).split(
        (len(parts[0]), len(parts[1]), sum(k_lengths)))
    return Prefill(backend, key_rows, cu_seqlens_q, cu_seqlens_k, tuple(lengths), tuple(k_lengths), sum(lengths),
                   max(lengths), max(k_lengths))


def prefill_attention(
    q: Tensor, kv: LayerKV, prefill: Prefill, scale: float, out: Tensor,
    window: int | None = None, softcap: float | None = None,
) -> None:
    """`attention_reference` of a batch into pages, by `prefill.backend`; out after `prefill.rows` is left alone.

    q, out [at least prefill.rows, heads, head_dim], float16 or bfloat16 like the pages; only SDPA takes float32 too.
    """
    if window is not None and window >= prefill.max_k:  # no key has left it, and without one the kernels do less
        window = None
    keys = kv.k_pages.index_select(0, prefill.key_rows)  # [total_k, kv_heads, head_dim]
    values = kv.v_pages.index_select(0, prefill.key_rows)
    BACKENDS[prefill.backend](q[: prefill.rows], keys, values, prefill, scale, out[: prefill.rows], window, softcap)


# -- the libraries ------------------------------------------------------------------------------------------------
# q, out [rows, heads, head_dim]; k, v [total_k, kv_heads, head_dim]. A library's window counts the keys to the left of
# a row, the row's own not among them; all of them align the last row with the last key.


def _flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, prefill: Prefill, scale: float, out: Tensor,
    window: int | None, softcap: float | None,
) -> None:
    result = _function("flash-attn-4")(
        q, k, v, cu_seqlens_q=prefill.cu_seqlens_q, cu_seqlens_k=prefill.cu_seqlens_k, max_seqlen_q=prefill.max_q,
        max_seqlen_k=prefill.max_k, softmax_scale=scale, causal=True,
        # No window is None here: releases differ in what a -1 next to a 0 means, and some return zeros.
        window_size=(None, None) if window is None else (window - 1, 0), softcap=softcap or 0.0)
    out.copy_(result[0] if isinstance(result, tuple) else result)  # (output, log of the sum of weights or None)


def _flash_attn_2(
    q: Tensor, k: Tensor, v: Tensor, prefill: Prefill, scale: float, out: Tensor,
    window: int | None, softcap: float | None,
) -> None:
    out.copy_(_function("flash-attn-2")(
        q, k, v, prefill.cu_seqlens_q, prefill.cu_seqlens_k, prefill.max_q, prefill.max_k, softmax_scale=scale,
        causal=True, window_size=(-1, -1) if window is None else (window - 1, 0), softcap=softcap or 0.0))


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, prefill: Prefill, scale: float, out: Tensor,
    window: int | None, softcap: float | None,
) -> None:
    _refuse_softcap("varlen", softcap)
    function = _function("varlen")
    takes = _arguments(function)
    options: dict[str, Any]
    if "window_size" in takes:
        options = {"scale": scale, "window_size": (-1, 0) if window is None else (window - 1, 0)}
    else:  # torch 2.10, which divides by the root of head_dim
        options = {"is_causal": True}
        if scale != q.shape[-1] ** -0.5:
            q = q * (scale * q.shape[-1] ** 0.5)
    if "enable_gqa" in takes:  # before torch 2.12 it was not asked for
        options["enable_gqa"] = True
    out.copy_(function(q, k, v, prefill.cu_seqlens_q, prefill.cu_seqlens_k, prefill.max_q, prefill.max_k, **options))


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, prefill: Prefill, scale: float, out: Tensor,
    window: int | None, softcap: float | None,
) -> None:
    """One call a sequence. Where keys leave the window, torch stores the scores of grouped heads."""
    from torch.nn.attention.bias import causal_lower_right  # takes a second to import

    _refuse_softcap("sdpa", softcap)
    row = key = 0
    for rows, keys in zip(prefill.q_lengths, prefill.k_lengths, strict=True):
        # Keys that have left the window of the first row are seen by none.
        unseen = 0 if window is None else max(0, keys - rows - window + 1)
        seen = keys - unseen
        mask: Tensor
        if window is None or seen <= window:
            mask = causal_lower_right(rows, seen)
        else:
            distance = torch.arange(seen - rows, seen, device=q.device)[:, None] - torch.arange(seen, device=q.device)
            mask = (distance >= 0) & (distance < window)  # [rows, seen]
        queries, seen_keys, seen_values = (  # [1, heads, rows or keys, head_dim]
            part.transpose(0, 1)[None] for part in (q[row : row + rows], k[key + unseen : key + keys],
                                                    v[key + unseen : key + keys]))
        attended = scaled_dot_product_attention(queries, seen_keys, seen_values, attn_mask=mask, scale=scale,
                                                enable_gqa=q.shape[1] != k.shape[1])
        out[row : row + rows] = attended[0].transpose(0, 1)
        row, key = row + rows, key + keys


def _refuse_softcap(name: str, softcap: float | None) -> None:
    if softcap is not None:
        raise ValueError(f"{name} has no softcap: choose a backend with choose_backend")


BACKENDS: dict[str, Callable[..., None]] = {
    "flash-attn-4": _flash_attn_4, "flash-attn-2": _flash_attn_2, "varlen": _varlen, "sdpa": _sdpa,
}
"""The libraries, the preferred ones first."""

CHOICES = ("auto", *BACKENDS, "triton")


# -- the choice ---------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What a backend is chosen for."""

    capability: tuple[int, int]  # of the GPU
    dtype: torch.dtype
    head_dim: int
    softcap: float | None = None
    windowed: bool = False  # some layer has a sliding window
    deterministic: bool = False


def choose_backend(case: Case, asked: str = "auto") -> str:
    """The backend asked for, or the first that serves the case; "triton" is our own kernel, which takes any.

    A library is imported only once the case suits it. ValueError for a name that is none of CHOICES, BackendError for
    a backend that is not there or does not suit the case.
    """
    if asked not in CHOICES:
        names = ", ".join(f'"{name}"' for name in CHOICES)
        raise ValueError(f"prefill_backend is {asked!r}, it must be one of {names}")
    if asked == "auto":
        return next((name for name in BACKENDS if _unsuitable(name, case) is None), "triton")
    reason = _unsuitable(asked, case)
    if reason is not None:
        install = f'pip install "stars-engine[{_SOURCES[asked].extra}]", or ' if reason == NOT_INSTALLED else ""
        raise BackendError(f'prefill_backend is "{asked}", which {reason}: {install}use prefill_backend="auto"')
    return asked


def problem(name: str) -> str | None:
    """What is the matter with an installed or missing library, as in "flash-attn-2 is not installed"; None is fine."""
    return None if name not in _SOURCES else _load(name)[1]


def _unsuitable(name: str, case: Case) -> str | None:
    """Why a backend cannot serve the case, after "which"; None where it can."""
    if name == "triton":
        return None
    major, minor = case.capability
    if case.deterministic:
        return "does not promise the same bits in any batch, as deterministic=True does"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(case.dtype).removeprefix('torch.')}"
    if case.softcap is not None and name in ("varlen", "sdpa"):
        return "has no softcap"
    if name == "flash-attn-4" and major not in (9, 10):
        return f"needs a GPU of compute capability 9 or 10, not {major}.{minor}"
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or more, not {major}.{minor}"
    # flash-attn 4 serves 256 on sm_100 by a kernel of its own that, in many releases, has no softcap and no window.
    widest = 128 if name == "flash-attn-4" and major == 10 else 256
    if name != "sdpa" and (case.head_dim > widest or case.head_dim % 8):
        return f"takes multiples of 8 up to {widest} as head_dim, not {case.head_dim}"
    if problem(name) is not None:
        return problem(name)
    if name == "varlen" and case.windowed and "window_size" not in _arguments(_function(name)):
        return "has no sliding window in this torch"
    return None


class _Source(NamedTuple):
    """Where a library's function is, and the arguments without which a release is too old."""

    module: str
    function: str
    arguments: frozenset[str]
    extra: str | None  # of our package, to install it with


_SOURCES = {
    # flash-attn 2.8 brings a flash_attn.cute of its own, an early one without max_seqlen_k.
    "flash-attn-4": _Source("flash_attn.cute", "flash_attn_varlen_func",
                            frozenset({"max_seqlen_q", "max_seqlen_k", "window_size", "softcap"}), "flash4"),
    "flash-attn-2": _Source("flash_attn", "flash_attn_varlen_func", frozenset({"window_size", "softcap"}), "flash"),
    "varlen": _Source("torch.nn.attention.varlen", "varlen_attn", frozenset(), None),
}

NOT_INSTALLED = "is not installed"


@functools.cache
def _load(name: str) -> tuple[Callable[..., Any] | None, str | None]:
    """A library's function, or None and what is the matter."""
    module, function, needed, _ = _SOURCES[name]
    try:
        # The parent first: of a module inside a package that is not there, find_spec raises.
        spec = importlib.util.find_spec(module.partition(".")[0]) and importlib.util.find_spec(module)
        if spec is None or spec.origin is None:  # flash-attn 4 alone leaves flash_attn a folder without a module
            return None, NOT_INSTALLED if name.startswith("flash") else "is not in this torch"
        found = getattr(importlib.import_module(module), function)
        lacking = needed - set(_arguments(found))
    except Exception as error:  # a wheel for another torch or CUDA fails in more ways than one
        return None, f"is not importable ({' '.join(str(error).split()) or type(error).__name__})"
    if lacking:
        return None, f"is too old (no {', '.join(sorted(lacking))})"
    if name == "varlen" and not torch.backends.cuda.is_flash_attention_available():
        return None, "is not in this build of torch"
    return found, None


def _function(name: str) -> Callable[..., Any]:
    """BackendError where the library is not there."""
    function, reason = _load(name)
    if function is None:
        raise BackendError(f'{name} {reason}: use prefill_backend="auto"')
    return function


@functools.cache
def _arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
