"""Whose attention runs long prompts on a GPU."""

from __future__ import annotations

import torch

from stars.errors import RequestError
from stars.kernels.prefill_attention import Case, choose_backend
from stars.model.config import ModelConfig
from stars.target import Target


def choose_prefill(model: ModelConfig, dtype: torch.dtype, target: Target, asked: str, deterministic: bool) -> str:
    """Whose attention serves the model's long prefill passes: a backend of `stars.kernels.prefill_attention`.

    RequestError or ModelError for one that is unknown, not installed, or does not suit model and settings.
    """
    if not target.triton:
        if asked != "auto":
            raise RequestError(f'prefill_backend is {asked!r}, and on the CPU there is no choice: use "auto"')
        return "triton"  # which stands for our own, as on a GPU
    windowed = any(window is not None for window in model.sliding_window)
    case = Case(torch.cuda.get_device_capability(), dtype, model.head_dim, model.attention_softcap, windowed,
                deterministic)
    return choose_backend(case, asked)
