"""The decoder: one class for language models and reward models, a fixed list of operations over fixed buffers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stars import kernels
from stars.errors import IntegrityError, ModelError
from stars.kernels.linear import Weight
from stars.kernels.types import Batch, LayerKV
from stars.model.config import ModelConfig
from stars.model.rope import rope_tables
from stars.target import target_of


class LayerWeights(NamedTuple):
    """One layer's weights; norms are float32."""

    input_norm: Tensor  # [hidden]
    qkv: Weight  # [(heads + 2 * kv_heads) * head_dim, hidden]: queries, keys, values
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    o: Weight  # [hidden, heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Weight  # [2 * intermediate, hidden]: gate, up
    down: Weight  # [hidden, intermediate]


class Workspace(NamedTuple):
    """Every intermediate of a pass, in the decoder's dtype unless said otherwise; n rows use the first n of each."""

    residual: Tensor  # [max_rows, hidden]
    picked: Tensor  # [max_rows, hidden] the residual stream of the selected rows
    normed: Tensor  # [max_rows, hidden]
    qkv: Tensor  # [max_rows, (heads + 2 * kv_heads) * head_dim]
    q: Tensor  # [max_rows, heads * head_dim]
    attended: Tensor  # [max_rows, heads * head_dim]
    branch: Tensor  # [max_rows, hidden] what attention or MLP adds to the residual stream
    gate_up: Tensor  # [max_rows, 2 * intermediate]
    gated: Tensor  # [max_rows, intermediate]
    hidden: Tensor  # [max_rows, hidden] after the final norm; float32 before a reward head


class KVCache(Protocol):
    """What a pass reads keys and values from, and writes them to."""

    def layer(self, i: int) -> LayerKV:
        """Those of layer `i`."""


def workspace_bytes(config: ModelConfig, rows: int, logits_rows: int, dtype: torch.dtype, scores: bool = False) -> int:
    """Bytes that a decoder reserves for passes of `rows` rows and logits of `logits_rows`; `scores`: a reward model's.

    Logits are float32 whatever the dtype.
    """
    heads_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = 5 * config.hidden_size + 3 * heads_width + 2 * kv_width + 3 * config.intermediate_size
    # A reward head reads float32 hidden states.
    wider = (torch.float32.itemsize - dtype.itemsize) * config.hidden_size if scores else 0
    logits = logits_rows * config.vocab_size * torch.float32.itemsize
    return rows * (width * dtype.itemsize + wider) + logits


class Decoder:
    """Pre-norm decoder layers between an embedding and a head.

    `head` gives logits (for tied embeddings it is the embedding's own Weight), `score_head` [1, hidden] rewards; either
    may be None. cos, sin float32 [positions, head_dim / 2]: no row of a pass may stand at a later position. dtype: of
    activations, keys and values; float32 on the CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Weight,
        layers: Sequence[LayerWeights],
        final_norm: Tensor,
        head: Weight | None,
        score_head: Weight | None,
        cos: Tensor,
        sin: Tensor,
        max_rows: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.lock = threading.RLock()  # for the engines that share this decoder, and with it the workspace
        self.config = config
        self.embedding = embedding
        self.layers = tuple(layers)
        self.final_norm = final_norm
        self.head = head
        self.score_head = score_head
        self.cos = cos
        self.sin = sin
        self.dtype = dtype
        self.max_rows = self.max_logits = 0
        self._reserved: Workspace | None = None
        self._logits: Tensor | None = None
        self._outgrown: list[Workspace | Tensor] = []
        self.reserve(max_rows)
        if head is not None:
            self.reserve_logits(max_rows)

    @property
    def device(self) -> torch.device:
        """Where weights and workspace are."""
        return self.final_norm.device

    def check_device(self, device: str, name: str) -> None:
        """Raises ModelError unless `name`, this decoder, is on an engine's `device`: "cpu" or "cuda"."""
        if self.device.type != device:
            raise ModelError(f"{name} given is on {self.device.type} and the engine on {device}: load it with "
                             f"device={device!r}")

    def launches(self, rows: int) -> int:
        """Kernels that a pass of `rows` rows launches on a GPU: ten a layer, the embedding and the final norm."""
        return 10 * len(self.layers) + 2

    def reserve(self, max_rows: int) -> None:
        """Makes room for passes of `max_rows` rows; does nothing where there is room already.

        Growing takes new buffers; passes recorded before go on with the old ones, which are kept for them.
        """
        if max_rows <= self.max_rows:
            return
        self._outgrow(self._reserved)
        config = self.config
        heads_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim

        def buffer(width: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(max_rows, width, dtype=dtype, device=self.device)

        self._reserved = Workspace(
            residual=buffer(config.hidden_size),
            picked=buffer(config.hidden_size),
            normed=buffer(config.hidden_size),
            qkv=buffer(heads_width + 2 * kv_width),
            q=buffer(heads_width),
            attended=buffer(heads_width),
            branch=buffer(config.hidden_size),
            gate_up=buffer(2 * config.intermediate_size),
            gated=buffer(config.intermediate_size),
            hidden=buffer(config.hidden_size, self.dtype if self.score_head is None else torch.float32),
        )
        self.max_rows = max_rows

    @property
    def _space(self) -> Workspace:
        """What was reserved, by the constructor at the latest."""
        assert self._reserved is not None
        return self._reserved

    def reserve_logits(self, rows: int) -> None:
        """Makes room for the float32 logits of `rows` rows: apart from `reserve`, as only drafts need them, of few rows.
        """
        if rows > self.max_logits:
            self._outgrow(self._logits)
            self._logits = torch.empty(rows, self.config.vocab_size, device=self.device)
            self.max_logits = rows

    def reserve_positions(self, count: int) -> None:
        """Makes the tables of the rotation reach `count` positions; does nothing where they do already.

        Raises ModelError beyond the model's context.
        """
        if count <= self.cos.shape[0]:
            return
        if count > self.config.context_length:
            raise ModelError(f"{count} positions exceed the model's context of {self.config.context_length}: lower "
                             "max_model_len")
        self._outgrow(self.cos)
        self._outgrow(self.sin)
        self.cos, self.sin = rope_tables(self.config.rope, self.config.head_dim, count, self.device)

    def _outgrow(self, buffers: Workspace | Tensor | None) -> None:
        """Programs of libstars hold what they use; a CUDA graph, of another engine perhaps, holds addresses only."""
        if buffers is not None and target_of(self.device.type).triton:
            self._outgrown.append(buffers)

    def forward(self, batch: Batch, cache: KVCache, rows: Tensor | None = None) -> Tensor:
        """Runs all layers and writes the batch's keys and values; returns the hidden state after the final norm.

        [n, hidden], a view of the workspace that the next pass overwrites: of all rows, or of `rows` int32 [n]
        (indices into the batch's rows), in whose case all after the last layer's attention runs for those rows only.
        Raises IntegrityError for more rows than reserved.
        """
        residual, branch = self._layers(batch, cache, rows)
        hidden = self._space.hidden[: residual.shape[0]]  # [n, hidden]
        kernels.rms_norm(branch, self.final_norm, self.config.rms_norm_eps, hidden, residual)
        return hidden

    def score(self, batch: Batch, cache: KVCache, last: Tensor, rewards: Tensor) -> None:
        """As `forward` for the rows `last` int32 [n], and then their raw rewards, into `rewards` float32 [n].

        Raises ModelError for a model without a reward head.
        """
        if self.score_head is None:
            raise ModelError("this model has no reward head: load it with head='reward'")
        residual, branch = self._layers(batch, cache, last)
        kernels.score(residual, branch, self.final_norm, self.config.rms_norm_eps, self.score_head,
                      self._space.hidden[: residual.shape[0]], rewards)

    def _layers(self, batch: Batch, cache: KVCache, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream and the last branch, not added to it yet, of all rows or of `rows`: both [n, hidden]."""
        count = batch.token_ids.shape[0]
        wanted = count if rows is None else rows.shape[0]
        self._check_rows(max(count, wanted))
        config, space = self.config, self._space
        eps = config.rms_norm_eps
        residual = space.residual[:count]  # [count, hidden]
        normed = space.normed[:count]  # [count, hidden]
        qkv = space.qkv[:count]  # [count, (heads + 2 * kv_heads) * head_dim]
        q = space.q[:count].view(count, config.num_heads, config.head_dim)
        attended = space.attended[:count]  # [count, heads * head_dim]
        attended_heads = attended.view(count, config.num_heads, config.head_dim)
        branch, gate_up, gated = space.branch[:count], space.gate_up[:count], space.gated[:count]

        kernels.embedding(batch.token_ids, self.embedding, residual)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            kv = cache.layer(index)
            if index == 0:  # the stream holds the embedding, and no branch is to be added yet
                kernels.rms_norm(residual, layer.input_norm, eps, normed)
            else:
                kernels.rms_norm(branch, layer.input_norm, eps, normed, residual)
            kernels.linear(normed, layer.qkv, qkv)
            kernels.rope_write(qkv, batch, self.cos, self.sin, kv, q, layer.q_norm, layer.k_norm, eps)
            kernels.attention(
                q, kv, batch, config.attention_scale, attended_heads, config.sliding_window[index],
                config.attention_softcap,
            )
            if rows is not None and index == last:
                picked_attended = space.q[:wanted]  # the queries are spent: their buffer takes the selected rows
                kernels.take_rows(attended, rows, picked_attended)
                kernels.take_rows(residual, rows, space.picked[:wanted])
                attended, residual, normed = picked_attended, space.picked[:wanted], space.normed[:wanted]
                branch, gate_up, gated = space.branch[:wanted], space.gate_up[:wanted], space.gated[:wanted]
            kernels.linear(attended, layer.o, branch)
            kernels.rms_norm(branch, layer.mlp_norm, eps, normed, residual)
            kernels.linear(normed, layer.gate_up, gate_up)
            kernels.swiglu(gate_up, gated)
            kernels.linear(gated, layer.down, branch)
        return residual, branch

    def draft_logits(self, batch: Batch, cache: KVCache) -> Tensor:
        """The forward pass and the head, of all rows: logits float32 [rows, vocab], which the next ones overwrite.

        Raises IntegrityError for more rows than reserved, ModelError for a model without a language model head.
        """
        return self.logits(self.forward(batch, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden [n, hidden]: float32 [n, vocab], in the workspace.

        Raises IntegrityError for more rows than reserved, ModelError for a model without a language model head.
        """
        head, out = self._head(hidden.shape[0])
        kernels.linear(hidden, head, out)
        return out

    def _head(self, rows: int) -> tuple[Weight, Tensor]:
        """The language model head, and the room for its logits of `rows` rows."""
        if self.head is None:
            raise ModelError("this model has no language model head: load it with head='lm'")
        if rows > self.max_logits:
            raise IntegrityError(f"logits of {rows} rows exceed the {self.max_logits} reserved: "
                                 f"reserve_logits({rows}) first")
        assert self._logits is not None
        return self.head, self._logits[:rows]

    def _check_rows(self, rows: int) -> None:
        if rows > self.max_rows:
            raise IntegrityError(f"a pass of {rows} rows exceeds the {self.max_rows} reserved: reserve({rows}) first")
