"""Keys and values of lanes in transformers' caches: rows are lanes, columns are tokens, histories end side by side.

A response's lanes share its history, which lies in all of their rows; what they draft lies behind it. Rejecting them is
a number of columns, accepting one copies what it drafted into the others' rows. Histories are right-aligned and have no
holes, so that attention that counts columns, as a sliding window does, counts tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from stars.errors import RequestError

try:
    from transformers.cache_utils import (
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        StaticCache,
        StaticLayer,
    )
except ImportError as error:
    raise ImportError("stars.adapters.transformers needs transformers 4.57 or later: pip install -U transformers"
                      ) from error

SPARE = 256
"""Columns that are allocated beyond those that are needed: what grows doubles, and begins with so many."""


class Buffers(DynamicLayer):  # type: ignore[misc]  # transformers' types are not read
    """A layer that appends in place, where transformers' own copies its history at every step.

    It stands in for layers with a sliding window too, and keeps all: the mask says what is seen of it.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__()
        self.room = room  # columns to begin with, where nobody calls `allocate`
        self.buffers: tuple[Tensor, ...] = ()  # keys and values, [rows, heads, columns, head_dim]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [rows, heads, n, head_dim]; all keys and values of these rows."""
        rows, _, new, _ = key_states.shape
        if not self.buffers:
            self.allocate((key_states, value_states), rows, self.room)
        begin = self.get_seq_length()
        if begin + new > self.buffers[0].shape[2]:
            raise RequestError("the model appends more keys than it was given tokens, so that its cache cannot be "
                               "rewound by tokens: use another model")
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, begin : begin + new] = states
        self.show(rows, begin + new)
        return self.keys, self.values

    def allocate(self, like: Sequence[Tensor], rows: int, columns: int) -> None:
        """New buffers of this size, with the heads, dtype and device of `like`."""
        self.is_initialized, self.device, self.dtype = True, like[0].device, like[0].dtype
        # Zeros: attention multiplies values that the mask hides by 0, and garbage may be NaN.
        self.buffers = tuple([one.new_zeros((rows, one.shape[1], columns, one.shape[3])) for one in like])
        self.show(rows, 0)

    def show(self, rows: int, columns: int) -> None:
        """What a forward pass sees, and appends behind."""
        self.keys, self.values = (buffer[:rows, :, :columns] for buffer in self.buffers)


class Static:
    """The same of a layer of a StaticCache, which shows all of its columns and counts those in use."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.buffers: tuple[Tensor, ...] = ()

    def allocate(self, like: Sequence[Tensor], rows: int, columns: int) -> None:
        """As `Buffers.allocate`, of at least the columns that the cache was made with."""
        self.layer.max_cache_len = max(columns, self.layer.max_cache_len)
        self.layer.lazy_initialization(*(one[:1].expand(rows, -1, -1, -1) for one in like))
        self.buffers = self.layer.keys, self.layer.values

    def show(self, rows: int, columns: int) -> None:
        """As `Buffers.show`."""
        self.layer.keys, self.layer.values = (buffer[:rows] for buffer in self.buffers)
        self.layer.batch_size = rows
        self.layer.cumulative_length.fill_(columns)


class History(NamedTuple):
    """Where one response's keys and values lie."""

    lanes: Lanes
    row: int
    start: int
    stop: int  # columns start to stop of `row`
    first: int = 0  # the rows first to first + rows hold the same up to column `known`
    rows: int = 0
    known: int = 0

    def cut(self, stop: int) -> History:
        """Its columns before `stop`."""
        return self._replace(stop=stop, known=min(self.known, stop))


class Lanes:
    """A cache whose rows are lanes. cache: what the model is given. layers: those that hold something."""

    def __init__(self, cache: Any, layers: Sequence[Any]):
        self.cache = cache
        self.layers = layers
        self._rows = self._columns = 0  # allocated

    def place(self, histories: Sequence[History], rows: Sequence[int], room: int) -> list[History]:
        """Puts each history into so many rows, one response's behind another's, so that all end at one column; where
        they are then. room: columns that are free behind them.

        What is there already stays. A history that moves is read once, whatever the number of its rows.
        """
        end, count = max([one.stop - one.start for one in histories]), sum(rows)
        fits = count <= self._rows and end + room <= self._columns
        copies, placed, first = [], [], 0
        for one, number in zip(histories, rows, strict=True):
            start = end - (one.stop - one.start)
            stays = fits and (one.lanes, one.stop, one.first) == (self, end, first) and number <= one.rows
            # Alone it has all rows for itself: those that are not asked for now are wanted again.
            filled = one.rows if stays and len(rows) == 1 else number
            begin = one.known if stays else start
            if begin < end:
                copies.append((one, slice(first, first + filled), begin))
            placed.append(History(self, first, start, end, first, filled, end))
            first += number
        if not fits:
            self._rows, self._columns = max(count, self._rows), end + room + max(end, SPARE)
        for index, layer in enumerate(self.layers):
            old = [one.lanes.layers[index].buffers for one, _, _ in copies]
            if not fits and (like := histories[0].lanes.layers[index].buffers):
                layer.allocate(like, self._rows, self._columns)
            for (one, target, begin), buffers in zip(copies, _read(copies, old, end, fits), strict=True):
                for buffer, states in zip(layer.buffers, buffers, strict=True):
                    buffer[target, :, begin:end] = states
            if layer.buffers:
                layer.show(count, end)
        return placed

    def take(self, row: int, start: int, stop: int) -> list[list[Tensor]]:
        """A copy of these columns of a row, by layer."""
        return [[buffer[row, :, start:stop].clone() for buffer in layer.buffers] for layer in self.layers]

    def put(self, row: int, start: int, states: Sequence[Sequence[Tensor]]) -> None:
        """Writes what was taken, where `place` has left room."""
        for layer, taken in zip(self.layers, states, strict=True):
            for buffer, part in zip(layer.buffers, taken, strict=True):
                buffer[row, :, start : start + part.shape[1]] = part


def _read(copies: Sequence[tuple[History, slice, int]], buffers: Sequence[Sequence[Tensor]], end: int,
          aside: bool) -> list[list[Tensor]]:
    """What each copy reads. aside: what is written may lie where another one is still to be read from."""
    found = []
    for (one, _, begin), parts in zip(copies, buffers, strict=True):
        views = [part[one.row : one.row + 1, :, one.stop - (end - begin) : one.stop] for part in parts]
        found.append([view.clone() for view in views] if aside else views)
    return found


def growing(given: Any, model: Any, room: int = 0) -> Lanes:
    """An empty cache of the layers of `given`, which generate has prepared; RequestError for one that cannot rewind.

    room: columns that can be appended to it as it is.
    """
    if given is None:
        raise RequestError(f"{type(model).__name__} gets no key-value cache from generate, which the adapter would "
                           "rewind: leave use_cache on, and use a model of attention layers")
    if type(given) not in (DynamicCache, StaticCache) or given.offloading:
        offloaded = "offloading " if getattr(given, "offloading", False) else ""
        raise RequestError(f"the adapter cannot rewind this {offloaded}{type(given).__name__}: leave "
                           "cache_implementation at its default")
    layers: list[Any] = []
    kinds = given.layers or [DynamicLayer()] * model.config.get_text_config(decoder=True).num_hidden_layers
    for layer in kinds:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or (
                type(layer) is StaticLayer and hasattr(layer, "cumulative_length")):
            layers.append(Buffers(room))
        elif type(layer).__name__ == "DummyLayer":  # reads another layer's, in the same pass
            layers.append(type(layer)())
        else:
            raise RequestError(f"{type(layer).__name__}, in the cache of {type(model).__name__}, cannot be rewound: "
                               f"{_advice(layer)}")
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    return Lanes(cache, [layer for layer in layers if isinstance(layer, Buffers)])


def drafting(given: Any, model: Any) -> Lanes:
    """Where lanes are drafted: a StaticCache itself, an own one in place of a DynamicCache."""
    if not isinstance(given, StaticCache):
        return growing(given, model)
    return Lanes(given, [Static(layer) for layer in given.layers if isinstance(layer, StaticLayer)])


def _advice(layer: Any) -> str:
    if "Static" in type(layer).__name__:  # with a window, or before transformers 5, where it does not count columns
        return "leave cache_implementation at its default"
    return "the adapter runs models of attention layers that keep every token's keys and values"
