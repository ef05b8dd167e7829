"""The decoder: one class for language models and reward models, two fixed lists of operations over fixed buffers.

The list of single operations runs anywhere. The fused list, on a GPU, is five launches a layer (six where attention
merges in one of its own) instead of ten: norms, rotation, gate and residual stream are ends of the products. Which of
them a pass takes depends on its number of rows alone; both read the same weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stars import kernels
from stars.errors import IntegrityError, ModelError
from stars.kernels.linear import Weight
from stars.kernels.types import Batch, LayerKV, SplitSpace, Stream
from stars.model.config import ModelConfig
from stars.model.fusing import fusing
from stars.model.heads import RewardHead
from stars.model.low_rank import (
    LAUNCHES,
    NO_ADAPTERS,
    AdapterRoom,
    LayerAdapters,
    adapter_room,
    add_low_rank,
    low_rank_products,
)
from stars.model.rope import rope_tables
from stars.model.workspace import Workspace, make_workspace
from stars.target import target_of


class LayerWeights(NamedTuple):
    """One layer's weights; norms are float32."""

    input_norm: Tensor | None  # [hidden]; None: what attention reads is not normalised
    qkv: Weight  # [(heads + 2 * kv_heads) * head_dim, hidden]: queries, keys, values
    q_norm: Tensor | None  # [head_dim], or [heads * head_dim] where it spans all heads
    k_norm: Tensor | None  # [head_dim], or [kv_heads * head_dim]
    o: Weight  # [hidden, heads * head_dim]
    mlp_norm: Tensor | None  # [hidden]; None: what the MLP reads is not normalised
    gate_up: Weight  # [2 * intermediate, hidden]: gate, up
    down: Weight  # [hidden, intermediate]
    adapters: LayerAdapters = NO_ADAPTERS  # what is added to these products
    attention_post_norm: Tensor | None = None  # [hidden], of what attention adds to the residual stream
    mlp_post_norm: Tensor | None = None  # [hidden], of what the MLP adds to it


class KVCache(Protocol):
    """What a pass reads keys and values from, and writes them to."""

    def layer(self, i: int) -> LayerKV:
        """Those of layer `i`."""


class Decoder:
    """Decoder layers between an embedding and a head.

    `head` gives logits (for tied embeddings it is the embedding's own Weight), `score_head` rewards: one that is a row
    [1, hidden] is a Weight, any other a RewardHead. Either may be None. cos, sin float32 [positions, head_dim / 2], of
    config.rope: no row of a pass may stand at a later position. dtype: of activations, keys and values; float32 on the
    CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Weight,
        layers: Sequence[LayerWeights],
        final_norm: Tensor,
        head: Weight | None,
        score_head: Weight | RewardHead | None,
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
        self._rotations = self._layers_rotations()
        self.dtype = dtype
        # As transformers rounds it, to the type that it multiplies in.
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self.max_rows = self.max_logits = 0
        self._reserved: Workspace | None = None
        self._logits: Tensor | None = None
        self._outgrown: list[Workspace | SplitSpace | AdapterRoom | Tensor] = []
        self._split = SplitSpace(torch.empty(0), torch.empty(0))
        self.adapters = tuple(low_rank_products(layer.adapters for layer in self.layers))
        self._room: AdapterRoom | None = None
        # The fused products have no sums beside them.
        fusable = target_of(self.device.type).triton and not self.adapters
        self._fusing = fusing(config, dtype, self._ends()) if fusable else None
        self.reserve(max_rows)
        self.reserve_fused()
        if head is not None:
            self.reserve_logits(max_rows)

    def _ends(self) -> Iterator[tuple[str, Weight]]:
        """Every product of the fused list: what is fused into it, and its weight."""
        for layer in self.layers:
            yield from (("qkv", layer.qkv), ("residual", layer.o), ("swiglu", layer.gate_up), ("residual", layer.down))
        if self.head is not None:
            yield "normed", self.head

    @property
    def device(self) -> torch.device:
        """Where weights and workspace are."""
        return self.final_norm.device

    @property
    def arithmetic(self) -> str:
        """The type that its products multiply in: "float32" or "bfloat16" on the CPU, on a GPU the activations'."""
        if target_of(self.device.type).float32:
            qkv = self.layers[0].qkv
            return (qkv.parts[0] if qkv.parts else qkv).arithmetic
        return str(self.dtype).removeprefix("torch.")

    def check_device(self, device: str, name: str) -> None:
        """Raises ModelError unless `name`, this decoder, is on an engine's `device`: "cpu" or "cuda"."""
        if self.device.type != device:
            raise ModelError(f"{name} given is on {self.device.type} and the engine on {device}: load it with "
                             f"device={device!r}")

    def launches(self, rows: int) -> int:
        """Kernels that a pass of `rows` rows launches on a GPU, at most.

        A layer's are ten or, fused, six: attention's two, and its four products with all that is between them. Besides,
        there are the embedding and the final norm. Norms behind attention and MLP, and those of all heads, are two more
        each; embeddings and logits may be rescaled.
        """
        config = self.config
        fused = self._fusing is not None and self._fusing.fuses(rows)
        a_layer = 6 if fused else 10 + 2 * (config.norms == "both") + 2 * config.qk_norm_whole
        rescaled = (config.embedding_scale != 1) + (config.logit_softcap is not None)
        return a_layer * len(self.layers) + 2 + rescaled + self.adapter_launches

    @property
    def adapter_launches(self) -> int:
        """Of those, what an adapter adds."""
        return LAUNCHES * len(self.adapters)

    def reserve(self, max_rows: int) -> None:
        """Makes room for passes of `max_rows` rows; does nothing where there is room already.

        Growing takes new buffers; passes recorded before go on with the old ones, which are kept for them.
        """
        if max_rows <= self.max_rows:
            return
        self._outgrow(self._reserved)
        self._reserved = make_workspace(self.config, max_rows, self.dtype, self.device, self.score_head is not None)
        if self.adapters:
            self._outgrow(self._room)
            self._room = adapter_room(self.adapters, max_rows, self.dtype, self.device)
        self.max_rows = max_rows

    def reserve_fused(self) -> None:
        """Makes room for the passes that are fused by the table in force; to be called again where another is put."""
        if self._fusing is not None:
            self._outgrow(self._split)
            self._split = self._fusing.split_space(self.device)

    @property
    def _space(self) -> Workspace:
        """What was reserved, by the constructor at the latest."""
        assert self._reserved is not None
        return self._reserved

    def reserve_logits(self, rows: int) -> Tensor:
        """Makes room for float32 logits of `rows` rows: apart from `reserve`, as only drafts need them, of few rows.

        Returns that room, [at least `rows`, vocab]: growing it later leaves it to whoever holds it.
        """
        if self._logits is None or rows > self.max_logits:
            self._outgrow(self._logits)
            self._logits = torch.empty(rows, self.config.vocab_size, device=self.device)
            self.max_logits = rows
        return self._logits

    def reserve_positions(self, count: int) -> None:
        """Makes the tables of the rotation reach `count` positions; does nothing where they do already.

        Raises ModelError beyond the model's context.
        """
        if count <= self.cos.shape[0]:
            return
        if count > self.config.context_length:
            raise ModelError(f"{count} positions exceed the model's context of {self.config.context_length}: lower "
                             "max_model_len")
        for table in {id(table): table for pair in self._rotations for table in pair}.values():
            self._outgrow(table)
        self.cos, self.sin = rope_tables(self.config.rope, self.config.head_dim, count, self.device)
        self._rotations = self._layers_rotations()

    def _layers_rotations(self) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines for each layer; layers of one rotation share them."""
        tables = {self.config.rope: (self.cos, self.sin)}
        for rope in self.config.ropes:
            if rope not in tables:
                tables[rope] = rope_tables(rope, self.config.head_dim, self.cos.shape[0], self.device)
        return [tables[rope] for rope in self.config.ropes]

    def _outgrow(self, buffers: Workspace | SplitSpace | AdapterRoom | Tensor | None) -> None:
        """Programs of libstars hold what they use; a CUDA graph, of another engine perhaps, holds addresses only."""
        if buffers is not None and target_of(self.device.type).triton:
            self._outgrown.append(buffers)

    def forward(self, batch: Batch, cache: KVCache, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Runs all layers and writes the batch's keys and values; returns the hidden state after the final norm.

        [n, hidden], in `out` or a view of the workspace that the next pass overwrites: of all rows, or of `rows` int32
        [n] (indices into the batch's rows), in whose case all after the last layer's attention runs for those only.
        Raises IntegrityError for more rows than reserved.
        """
        if self._fuses(batch):
            residual = self._stream(batch, cache, rows).residual
            hidden = self._space.hidden[: residual.shape[0]] if out is None else out  # [n, hidden]
            kernels.rms_norm(residual, self.final_norm, self.config.rms_norm_eps, hidden)
        else:
            residual, branch = self._layers(batch, cache, rows)
            hidden = self._space.hidden[: residual.shape[0]] if out is None else out
            kernels.rms_norm(branch, self.final_norm, self.config.rms_norm_eps, hidden, residual)
        return hidden

    def score(self, batch: Batch, cache: KVCache, last: Tensor, rewards: Tensor) -> None:
        """As `forward` for the rows `last` int32 [n], and then their rewards, into `rewards` float32 [n].

        By a head of one row, which is fused with the norm. Any other reads what `forward` gives: `RewardHead.read`.
        Raises ModelError for a model without a head of one row.
        """
        if not isinstance(self.score_head, Weight):
            raise ModelError("this model has no reward head of one row: load it with head='reward', or read what "
                             "`forward` gives with its RewardHead")
        branch = None
        if self._fuses(batch):
            residual = self._stream(batch, cache, last).residual
        else:
            residual, branch = self._layers(batch, cache, last)
        kernels.score(residual, branch, self.final_norm, self.config.rms_norm_eps, self.score_head,
                      self._space.hidden[: residual.shape[0]], rewards)

    def _layers(self, batch: Batch, cache: KVCache, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The list of single operations: the residual stream and the last branch, not added to it yet, of all rows or
        of `rows`: both [n, hidden].
        """
        count, wanted = self._count(batch, rows)
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
        if self._embedding_scale != 1:
            kernels.rescale(residual, self._embedding_scale)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            kv = cache.layer(index)
            # The first layer's stream holds the embedding, and no branch is to be added yet.
            read = self._advance(None if index == 0 else branch, layer.input_norm, normed, residual)
            adapters = layer.adapters
            kernels.linear(read, layer.qkv, qkv)
            add_low_rank(read, adapters.qkv, qkv, self._room)
            q_norm, k_norm = layer.q_norm, layer.k_norm
            if config.qk_norm_whole:
                q_norm, k_norm = self._norm_whole(qkv, q_norm, k_norm)
            kernels.rope_write(qkv, batch, *self._rotations[index], kv, q, q_norm, k_norm, eps)
            self._attend(index, q, kv, batch, attended_heads)
            if rows is not None and index == last:
                attended, residual = self._pick(rows, attended, residual)
                normed = space.normed[:wanted]
                branch, gate_up, gated = space.branch[:wanted], space.gate_up[:wanted], space.gated[:wanted]
            kernels.linear(attended, layer.o, branch)
            add_low_rank(attended, adapters.o, branch, self._room)
            if layer.attention_post_norm is not None:
                kernels.rms_norm(branch, layer.attention_post_norm, eps, branch)
            read = self._advance(branch, layer.mlp_norm, normed, residual)
            kernels.linear(read, layer.gate_up, gate_up)
            add_low_rank(read, adapters.gate_up, gate_up, self._room)
            kernels.swiglu(gate_up, gated, config.activation)
            kernels.linear(gated, layer.down, branch)
            add_low_rank(gated, adapters.down, branch, self._room)
            if layer.mlp_post_norm is not None:
                kernels.rms_norm(branch, layer.mlp_post_norm, eps, branch)
        return residual, branch

    def _advance(self, branch: Tensor | None, norm: Tensor | None, normed: Tensor, residual: Tensor) -> Tensor:
        """Adds `branch` [n, hidden] to the residual stream, where there is one; returns what the next product reads:
        the stream, or where a norm stands in front `normed`, which gets it."""
        eps = self.config.rms_norm_eps
        if branch is not None:
            # The addition is part of the norm: without one, that of the end stands in, and `normed` is not read.
            kernels.rms_norm(branch, self.final_norm if norm is None else norm, eps, normed, residual)
        elif norm is not None:
            kernels.rms_norm(residual, norm, eps, normed)
        return residual if norm is None else normed

    def _norm_whole(self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> tuple[None, None]:
        """Normalises queries and keys in qkv [n, (heads + 2 * kv_heads) * head_dim], each row's over all heads; what
        is left to be normalised head by head: nothing."""
        start = 0
        for norm in (q_norm, k_norm):
            assert norm is not None
            part = qkv[:, start : start + norm.shape[0]]
            kernels.rms_norm(part, norm, self.config.rms_norm_eps, part)
            start += norm.shape[0]
        return None, None

    def _fuses(self, batch: Batch) -> bool:
        """Whether a pass takes the fused list; by its number of rows."""
        return self._fusing is not None and self._fusing.fuses(batch.token_ids.shape[0])

    def _stream(self, batch: Batch, cache: KVCache, rows: Tensor | None) -> Stream:
        """The fused list: the residual stream after the last layer, scaled for the final norm; all rows, or `rows`."""
        count, wanted = self._count(batch, rows)
        config, space, split = self.config, self._space, self._split
        eps = config.rms_norm_eps
        stream = Stream(space.residual[:count], space.normed[:count], space.squares[:count])
        q = space.q[:count].view(count, config.num_heads, config.head_dim)
        attended = space.attended[:count]  # [count, heads * head_dim]
        attended_heads = attended.view(count, config.num_heads, config.head_dim)
        gated = space.gated[:count]
        gains = [*(_present(layer.input_norm) for layer in self.layers), self.final_norm]

        kernels.embedding_scaled(batch.token_ids, self.embedding, gains[0], stream)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            kv = cache.layer(index)
            kernels.qkv_rope(stream, layer.qkv, eps, batch, *self._rotations[index], kv, q, layer.q_norm, layer.k_norm,
                             split)
            self._attend(index, q, kv, batch, attended_heads)
            if rows is not None and index == last:
                attended, residual = self._pick(rows, attended, stream.residual)
                stream = Stream(residual, space.normed[:wanted], space.squares[:wanted])
                gated = space.gated[:wanted]
            kernels.linear_residual(attended, layer.o, _present(layer.mlp_norm), stream, split)
            kernels.linear_swiglu(stream, layer.gate_up, eps, gated, split)
            kernels.linear_residual(gated, layer.down, gains[index + 1], stream, split)
        return stream

    def _attend(self, index: int, q: Tensor, kv: LayerKV, batch: Batch, out: Tensor) -> None:
        config = self.config
        kernels.attention(q, kv, batch, config.attention_scale, out, config.sliding_window[index],
                          config.attention_softcap)

    def _pick(self, rows: Tensor, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's results and the residual stream of `rows`, behind the last layer's attention."""
        # The queries are spent: their buffer takes the selected rows.
        taken = self._space.q[: rows.shape[0]], self._space.picked[: rows.shape[0]]
        kernels.take_rows(attended, rows, taken[0])
        kernels.take_rows(residual, rows, taken[1])
        return taken

    def _count(self, batch: Batch, rows: Tensor | None) -> tuple[int, int]:
        """Rows of a pass, and of what it returns; IntegrityError for more than reserved."""
        count = batch.token_ids.shape[0]
        wanted = count if rows is None else rows.shape[0]
        if max(count, wanted) > self.max_rows:
            raise IntegrityError(f"a pass of {max(count, wanted)} rows exceeds the {self.max_rows} reserved: "
                                 f"reserve({max(count, wanted)}) first")
        return count, wanted

    def draft_logits(self, batch: Batch, cache: KVCache, out: Tensor | None = None) -> Tensor:
        """The forward pass and the head, of all rows: logits float32 [rows, vocab], in `out` or where the next ones
        overwrite them.

        Raises IntegrityError for more rows than reserved, ModelError for a model without a language model head.
        """
        if not self._fuses(batch):
            return self.logits(self.forward(batch, cache), out)
        head, out = self._head(batch.token_ids.shape[0], out)
        kernels.linear_normed(self._stream(batch, cache, None), head, self.config.rms_norm_eps, out, self._split)
        return out

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of hidden [n, hidden]: float32 [n, vocab], in `out` or in the workspace.

        Raises IntegrityError for more rows than reserved, ModelError for a model without a language model head.
        """
        head, out = self._head(hidden.shape[0], out)
        kernels.linear(hidden, head, out)
        if self.config.logit_softcap is not None:
            kernels.rescale(out, 1.0, self.config.logit_softcap)
        return out

    def _head(self, rows: int, out: Tensor | None) -> tuple[Weight, Tensor]:
        """The language model head, and the room for its logits of `rows` rows: `out`, or the workspace's."""
        if self.head is None:
            raise ModelError("this model has no language model head: load it with head='lm'")
        if out is not None:
            return self.head, out
        if rows > self.max_logits:
            raise IntegrityError(f"logits of {rows} rows exceed the {self.max_logits} reserved: "
                                 f"reserve_logits({rows}) first")
        assert self._logits is not None
        return self.head, self._logits[:rows]


def _present(norm: Tensor | None) -> Tensor:
    """A norm of a layer that is like llama's, which has it."""
    assert norm is not None
    return norm
