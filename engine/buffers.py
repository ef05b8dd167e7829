"""Tensors at fixed addresses on a device, filled on the host and moved in one transfer."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stars.target import Target

ALIGNMENT = 64  # bytes


class Buffers:
    """Named tensors in one block of memory on the target's device, and numpy views of the same block on the host.

    On the CPU both are the same memory, and `upload` and `fetch` do nothing. Elsewhere the host's block is pinned. All
    is 0 at first, unless `zeroed` is False: then it is what was there, and on the CPU not touched before it is used.

    hosts: blocks on the host. What is fetched into one stays there while others are fetched into; uploads come from
    block 0, and on the CPU that alone is the device's.
    """

    def __init__(self, target: Target, /, zeroed: bool = True, hosts: int = 1,
                 **fields: tuple[torch.dtype, tuple[int, ...]]):
        places: dict[str, tuple[int, int]] = {}
        total = 0
        for name, (dtype, shape) in fields.items():
            size = dtype.itemsize * math.prod(shape)
            places[name] = (total, total + size)
            total += -(-size // ALIGNMENT) * ALIGNMENT
        block = torch.zeros if zeroed else torch.empty
        self._there = block(total, dtype=torch.uint8, device=target.device)
        own = target.own_memory
        self._here = [self._there if not own and not index else
                      block(total, dtype=torch.uint8, device="cpu", pin_memory=own) for index in range(hosts)]
        self._sent = [torch.cuda.Event() for _ in self._here] if own else None
        self._moving = False  # whether a transfer was begun whose event is not recorded yet
        self._device: dict[str, Tensor] = {}
        self._host: list[dict[str, np.ndarray]] = [{} for _ in self._here]
        for name, (dtype, shape) in fields.items():
            start, stop = places[name]
            self._device[name] = self._there[start:stop].view(dtype).view(shape)
            for here, arrays in zip(self._here, self._host, strict=True):
                arrays[name] = here[start:stop].view(dtype).view(shape).numpy()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor on the device."""
        return self._device[name]

    def host(self, name: str, block: int = 0) -> np.ndarray:
        """The host's array of the same name."""
        return self._host[block][name]

    def wait(self, block: int = 0) -> None:
        """Returns once the block's last upload was read and its last `fetch` is there: it is the host's again."""
        if self._moving:  # whoever began it was interrupted
            torch.cuda.synchronize()
            self._moving = False
        if self._sent is not None:
            self._sent[block].synchronize()

    def upload(self, size: int | None = None) -> None:
        """Host to device, in stream order; the first `size` bytes only, where given."""
        if self._sent is not None:
            self._move(self._there[:size], self._here[0][:size], self._sent[0])

    def fetch(self, block: int = 0) -> None:
        """Device to host, in stream order; the values are there after `wait`."""
        if self._sent is not None:
            self._move(self._here[block], self._there, self._sent[block])
        elif self._here[block] is not self._there:
            self._here[block].copy_(self._there)

    def _move(self, into: Tensor, come_from: Tensor, sent: torch.cuda.Event) -> None:
        self._moving = True
        into.copy_(come_from, non_blocking=True)
        sent.record()
        self._moving = False
