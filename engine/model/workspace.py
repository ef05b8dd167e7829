"""The buffers that a decoder's passes run in, and how many bytes they take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stars.kernels.triton.tuned import SUMMED
from stars.model.config import ModelConfig


class Workspace(NamedTuple):
    """Every intermediate of a pass, in the decoder's dtype unless said otherwise; n rows use the first n of each."""

    residual: Tensor  # [max_rows, hidden]
    picked: Tensor  # [max_rows, hidden] the residual stream of the selected rows
    normed: Tensor  # [max_rows, hidden]; Stream.scaled of the fused list
    squares: Tensor  # float32 [max_rows, hidden / 32] Stream.squares of the fused list
    qkv: Tensor  # [max_rows, (heads + 2 * kv_heads) * head_dim]
    q: Tensor  # [max_rows, heads * head_dim]
    attended: Tensor  # [max_rows, heads * head_dim]
    branch: Tensor  # [max_rows, hidden] what attention or MLP adds to the residual stream
    gate_up: Tensor  # [max_rows, 2 * intermediate]
    gated: Tensor  # [max_rows, intermediate]
    hidden: Tensor  # [max_rows, hidden] after the final norm; float32 before a reward head


def make_workspace(config: ModelConfig, max_rows: int, dtype: torch.dtype, device: torch.device, scores: bool,
                   ) -> Workspace:
    """Room for passes of `max_rows` rows; `scores`: of a reward model's."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    heads_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def buffer(width: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(max_rows, width, dtype=kind, device=device)

    return Workspace(
        residual=buffer(hidden),
        picked=buffer(hidden),
        normed=buffer(hidden),
        squares=buffer(hidden // SUMMED, torch.float32),
        qkv=buffer(heads_width + 2 * kv_width),
        q=buffer(heads_width),
        attended=buffer(heads_width),
        branch=buffer(hidden),
        gate_up=buffer(2 * intermediate),
        gated=buffer(intermediate),
        hidden=buffer(hidden, torch.float32 if scores else dtype),
    )


def workspace_bytes(config: ModelConfig, rows: int, logits_rows: int, dtype: torch.dtype, scores: bool = False) -> int:
    """Bytes that a decoder reserves for passes of `rows` rows and logits of `logits_rows`; `scores`: a reward model's.

    Logits are float32 whatever the dtype. What a fused pass needs beyond is said by `split_bytes`.
    """
    heads_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = 5 * config.hidden_size + 3 * heads_width + 2 * kv_width + 3 * config.intermediate_size
    # A reward head reads float32 hidden states.
    wider = (torch.float32.itemsize - dtype.itemsize) * config.hidden_size if scores else 0
    logits = logits_rows * config.vocab_size * torch.float32.itemsize
    squares = config.hidden_size // SUMMED * torch.float32.itemsize
    return rows * (width * dtype.itemsize + wider + squares) + logits
