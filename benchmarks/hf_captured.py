"""transformers over static buffers, its passes captured by hand as CUDA graphs: as fast as it is without a compiler.

Keys and values lie in buffers of the final size and are read whole, under a mask that is made from the length on the
device, so that one graph serves every length. Without a GPU the same calls run as they are, and so they are tested.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class CapturedHistory:
    """A model and its static KV cache: up to `rows` rows that share one history between rounds.

    Its graphs belong to one (rows, tokens) each and are captured at the second use: capture before you time.
    """

    def __init__(self, backbone, rows: int, capacity: int):
        self.backbone, self.rows, self.capacity = backbone, rows, capacity
        self.device = next(backbone.parameters()).device
        self.length = torch.zeros(1, dtype=torch.int64, device=self.device)  # tokens that all rows hold
        self.count = 0  # the same, on the host
        self.layers = [_StaticLayer(rows, capacity, self.length) for _ in range(backbone.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.at = torch.arange(capacity, device=self.device)
        self._passes: dict[tuple, _Pass] = {}

    def clear(self) -> None:
        """An empty history."""
        self._set_count(0)

    def extend(self, ids: Tensor) -> Tensor:
        """Runs ids [rows, n] after the history; hidden state [rows, hidden] of the last one."""
        rows, new = ids.shape
        one = self._passes.get(("extend", rows, new))
        if one is None:
            inputs = ids.clone()
            one = self._passes["extend", rows, new] = _Pass(inputs, lambda: self._forward(inputs))
        one.inputs.copy_(ids)
        states = one.run()
        self._set_count(self.count + new)
        return states[:, -1]

    def draft(self, head, last: int, lanes: int, size: int, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        """[lanes, size] token ids, drawn from logits float32 [lanes, vocab] by draw(logits, position).

        On a GPU `draw` is captured at its first positions and its later arguments are not looked at.
        """
        one = self._passes.get(("draft", lanes, size))
        if one is None:
            inputs = torch.zeros(lanes, 1, dtype=torch.int64, device=self.device)
            one = self._passes["draft", lanes, size] = _Pass(inputs, lambda: self._forward(inputs))
            one.drawn = torch.zeros(lanes, size, dtype=torch.int64, device=self.device)
            one.place = torch.zeros(1, dtype=torch.int64, device=self.device)

        def step() -> None:
            logits = head(self._forward(one.inputs)[:, -1]).float()  # [lanes, vocab]
            token = draw(logits, self._position)
            one.drawn.index_copy_(1, one.place, token[:, None])
            one.inputs.copy_(token[:, None])
            one.place.add_(1)
            self.length.add_(1)

        one.step = step
        one.inputs.fill_(last)
        one.place.zero_()
        for self._position in range(size):
            one.run()
        self.count += size
        return one.drawn.clone()

    def expand(self) -> None:
        """From one row to all of them."""
        self._spread(0, self.count)

    def set_rows(self, rows: int) -> None:
        """Every history is in place for any number of rows."""

    def rewind(self, tokens: int) -> None:
        """Forgets the last `tokens` of every row."""
        self._set_count(self.count - tokens)

    def keep(self, row: int, tokens: int) -> None:
        """Row `row`, whose last `tokens` are new, becomes the history of all rows."""
        self._spread(row, tokens)

    def _set_count(self, count: int) -> None:
        self.count = count
        self.length.fill_(count)

    def _spread(self, row: int, tokens: int) -> None:
        for layer in self.layers if self.rows > 1 and tokens else ():
            for buffer in (layer.all_keys, layer.all_values):
                part = buffer[:, :, self.count - tokens : self.count]
                part.copy_(part[row : row + 1].clone())

    def _forward(self, ids: Tensor) -> Tensor:
        """Hidden states [rows, n, hidden]."""
        place = self.length + self.at[: ids.shape[1]]  # [n]
        mask = self.at[None, :] <= place[:, None]  # [n, capacity]
        return self.backbone(input_ids=ids, attention_mask=mask[None, None], position_ids=place[None],
                             past_key_values=self.cache, use_cache=True).last_hidden_state


class _Pass:
    """One shape of pass: plain at its first call, captured at its second, replayed from then on."""

    def __init__(self, inputs: Tensor, step: Callable[[], Tensor | None]):
        self.inputs, self.step = inputs, step
        self.drawn: Tensor | None = None
        self.place: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._seen = False

    def run(self) -> Tensor | None:
        if not self.inputs.is_cuda:
            return self.step()
        if not self._seen:
            self._seen = True
            return self.step()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self.step()
        self._graph.replay()
        return self._result


class _StaticLayer(DynamicLayer):
    """Keys and values of one layer, at the place that `length` int64 [1] says, on the device."""

    def __init__(self, rows: int, capacity: int, length: Tensor):
        super().__init__()
        self.rows, self.capacity, self.length = rows, capacity, length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes [rows, heads, n, head_dim]; all of the buffers, what comes after is for the mask to hide."""
        rows, heads, new, dim = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (self.rows, heads, self.capacity, dim)
            self.all_keys, self.all_values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        place = self.length + torch.arange(new, device=key_states.device)
        self.all_keys[:rows].index_copy_(2, place, key_states)
        self.all_values[:rows].index_copy_(2, place, value_states)
        return self.all_keys[:rows], self.all_values[:rows]

    def get_seq_length(self, *args) -> int:
        """Positions are given with every call."""
        return 0
