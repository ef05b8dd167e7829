"""A pass of a whole decoder as the engine runs it, in one graph: its seconds under a table of tiles, and whether it is
right beside torch in float32.

Every layer has weights of its own, so that each is read from memory once; attention and all else between the products
is the engine's. Draft passes go up to the logits, scoring passes up to the rewards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from record import Settings
from timing import capture_stream, rehearsing
from torch import Tensor

from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.kernels import dispatch
from stars.kernels.linear import Weight
from stars.kernels.triton import tuned
from stars.kernels.triton.tuned import Table, Tile
from stars.kernels.types import Batch, SplitSpace
from stars.model.decoder import Decoder
from stars.sizes import language_model
from stars.tiling import Tiling

PRODUCTS = ("gate_up", "down", "qkv", "o", "head")
"""In the order of their bytes in a step, the head's apart."""

ENDS = {"qkv": "qkv", "o": "residual", "gate_up": "swiglu", "down": "residual", "head": "normed"}
USED = 15  # keys of a lane's slab before a draft pass


class Shape(NamedTuple):
    """Sequences of one context, each with so many new rows."""

    sequences: int
    length: int  # 1: a draft

    @property
    def rows(self) -> int:
        """Of the pass."""
        return self.sequences * self.length


class Store:
    """A cache with random keys and values behind `context` positions, and the settings of an engine over it."""

    def __init__(self, decoder: Decoder, settings: Settings, rows: int, context: int, segment: int = 32):
        self.context = context
        self.config = EngineConfig.resolve(
            decoder.config, settings.device, str(decoder.dtype)[6:], cache_tokens=2 * max(context, segment),
            max_model_len=2 * max(context, segment), max_num_seqs=1, max_num_lanes=rows, max_segment_size=segment)
        self.cache = PagedCache(decoder.config, self.config, language_model(self.config), decoder.dtype)
        if not rehearsing():
            for tensor in (self.cache.k_pages, self.cache.v_pages, self.cache.k_slabs, self.cache.v_slabs):
                tensor.normal_()


class Pass:
    """One pass of `decoder`: a draft's forward pass and head, or for a decoder without a head a score."""

    def __init__(self, decoder: Decoder, store: Store, shape: Shape):
        self.decoder, self.store, self.shape = decoder, store, shape
        rows, length = shape.rows, shape.length
        device, cache, context = decoder.device, store.cache, store.context
        used = USED if length == 1 else 0

        def ints(values: list) -> Tensor:
            return torch.from_numpy(np.array(values, dtype=np.int32)).to(device)

        starts = [index * cache.slab_len for index in range(shape.sequences)]
        row_start, groups = [index * length for index in range(shape.sequences + 1)], [0] * shape.sequences
        pages = -(-context // cache.page_size)
        self.used = used
        # One list for all passes would be sent as far as the last of them goes.
        self._tiling = Tiling(decoder.config, store.config, rows, pages * cache.page_size)
        tiles = self._tiling.fill(rows, row_start, groups, "draft" if length == 1 else "score", [context] * len(groups))
        self.batch = Batch(
            ints([7 + 13 * row % 311 for row in range(rows)]),
            ints([context + used + row % length for row in range(rows)]),
            ints([starts[row // length] + used + row % length for row in range(rows)]), True, ints(row_start),
            ints(groups), ints([list(range(pages))]), ints([context] * len(groups)), ints(starts),
            ints([used] * len(groups)), tiles)
        self.last = ints([stop - 1 for stop in row_start[1:]])
        self.rewards = torch.empty(shape.sequences, device=device)
        decoder.reserve(rows)
        if decoder.head is not None:
            decoder.reserve_logits(rows)

    def run(self) -> None:
        """Launches it."""
        if self.decoder.head is None:
            self.decoder.score(self.batch, self.store.cache, self.last, self.rewards)
        else:
            self.decoder.draft_logits(self.batch, self.store.cache)

    def poison(self) -> None:
        """Fills what a pass writes with NaN."""
        space = (*self.decoder._space, self.decoder._logits, self.rewards)
        for tensor in space:
            if tensor is not None:
                tensor.fill_(torch.nan)

    def reference(self) -> Tensor:
        """The same by torch in float32, with the weights as they are (quantised ones dequantised), layer by layer."""
        decoder, batch, store = self.decoder, self.batch, self.store
        config, (count, length) = decoder.config, self.shape
        heads, kv_heads, dim, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps
        at = batch.positions.long()
        cos, sin = decoder.cos[at][:, None], decoder.sin[at][:, None]
        slabs = (torch.arange(count, device=at.device)[:, None] * store.cache.slab_len
                 + torch.arange(self.used, device=at.device))

        def normed(x: Tensor, gain: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()

        def times(x: Tensor, weight: Weight) -> Tensor:
            bias = 0 if weight.bias is None else weight.bias.float()
            return torch.cat([x @ rows.float().t() for rows in weight.dense().split(1 << 15)], 1) + bias

        def turned(x: Tensor) -> Tensor:
            low, high = x.chunk(2, -1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

        def seen(own: Tensor, in_pages: Tensor, in_slabs: Tensor) -> Tensor:
            """[sequences, heads, keys, dim]: the context, the slab, the pass' own."""
            context = in_pages[: store.context].float().expand(count, -1, -1, -1)
            keys = torch.cat((context, in_slabs[slabs].float(), own.view(count, length, kv_heads, dim)), 1)
            return keys.transpose(1, 2).repeat_interleave(heads // kv_heads, 1)

        hidden = decoder.embedding.dense()[batch.token_ids.long()].float()
        own = torch.ones(length, length, dtype=torch.bool, device=at.device).triu(1)
        unseen = F.pad(own, (store.context + self.used, 0))
        for index, layer in enumerate(decoder.layers):
            queries, keys, values = times(normed(hidden, layer.input_norm), layer.qkv).view(
                count * length, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), 1)
            if layer.q_norm is not None:
                queries, keys = normed(queries, layer.q_norm), normed(keys, layer.k_norm)
            queries, keys, kv = turned(queries), turned(keys), store.cache.layer(index)
            scores = queries.view(count, length, heads, dim).transpose(1, 2) @ seen(
                keys, kv.k_pages, kv.k_slabs).transpose(2, 3) * config.attention_scale
            attended = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ seen(values, kv.v_pages, kv.v_slabs)
            hidden = hidden + times(attended.transpose(1, 2).reshape(count * length, heads * dim), layer.o)
            gate, up = times(normed(hidden, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            hidden = hidden + times(F.silu(gate) * up, layer.down)
        hidden = normed(hidden, decoder.final_norm)
        return hidden if decoder.head is None else times(hidden, decoder.head)


def weights_of(decoder: Decoder) -> dict[str, Weight]:
    """The products of a pass, by name."""
    layer = decoder.layers[0]
    found = {"gate_up": layer.gate_up, "down": layer.down, "qkv": layer.qkv, "o": layer.o}
    return found if decoder.head is None else found | {"head": decoder.head}


def table_of(decoder: Decoder, tiles: dict[str, Tile] | None, plain: Table | None = None) -> Table:
    """What puts these tiles in force, fused at any number of rows; None: nothing is fused. plain: whose products
    without an end are used where nothing is fused."""
    kept = {} if plain is None else plain.plain
    if tiles is None:
        return Table(kept)
    of = weights_of(decoder)
    entries = {(ENDS[name], of[name].scheme, of[name].out_features, of[name].in_features): ((1 << 20, tile),)
               for name, tile in tiles.items() if name in of}
    return Table(kept, entries, {(decoder._fusing.shape, decoder._fusing.scheme): ((1 << 20, True),)})


def make_room(decoder: Decoder) -> None:
    """For any tile that is tried: larger than `tuned.room` would say of one table."""
    device = decoder.device
    decoder._split = SplitSpace(torch.empty(1 << 24, device=device),
                                torch.zeros(1 << 16, dtype=torch.int32, device=device))


class Replay:
    """A pass captured under a table; the graph's buffers live as long as this does."""

    def __init__(self, one: Pass, table: Table, dry: bool):
        self.one, self.table = one, table
        self._graph = None
        with in_force(table):
            if not dry:
                one.run()  # compiles what is not yet
                self._capture()

    def _capture(self) -> None:
        if rehearsing():
            return
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(capture_stream()):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.one.run()
            finally:
                self._graph.capture_end()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        if self._graph is None:
            with in_force(self.table):
                self.one.run()
        else:
            self._graph.replay()

    def outcome(self) -> Tensor:
        """float32: the logits of a draft; of a score the normed hidden state of all rows, by a pass launched anew."""
        one = self.one
        one.poison()
        if one.decoder.head is not None:
            self()
            return one.decoder._logits[: one.shape.rows].clone()
        with in_force(self.table):
            return one.decoder.forward(one.batch, one.store.cache).float().clone()


_interpreted = [False]


@contextmanager
def in_force(table: Table) -> Iterator[None]:
    """Inside, passes run by `table`; in a dry run those that are fused run in Triton's interpreter."""
    with tuned.using(table):
        if not _interpreted[0]:
            yield
            return
        kept = dispatch.column
        asked = "cuda" if table.chains else "reference"
        dispatch.column = lambda tensor: asked
        try:
            yield
        finally:
            dispatch.column = kept


def interpret() -> None:
    """For the rest of this process fused passes run in Triton's interpreter, over CPU tensors."""
    _interpreted[0] = True


def alternating(calls: list[Callable[[], None]], repeats: int, dry: bool) -> list[list[float]]:
    """Seconds of each repeat of each call, in turns: A B A B …, after one of each."""
    if dry or rehearsing():
        found = []
        for call in calls:
            begin = time.perf_counter()
            call()
            found.append([time.perf_counter() - begin])
        return found
    for call in calls:
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats * len(calls) + 1)]
    marks[0].record()
    for index, mark in enumerate(marks[1:]):
        calls[index % len(calls)]()
        mark.record()
    marks[-1].synchronize()
    seconds = [first.elapsed_time(second) / 1e3 for first, second in zip(marks, marks[1:], strict=False)]
    return [seconds[index :: len(calls)] for index in range(len(calls))]


def error(got: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right; NaN stays NaN."""
    return float((got.float() - right).norm() / right.norm())
