"""What a reward model ends with: from the normed hidden state of a row to one float, in float32 throughout.

A head is a list of products with ReLU between them. What its last product gives is one reading, or labels of which one
is read, or objectives that are weighted by a gate. All that is fixed is folded into the products when they are read: a
normalisation, a sign, a mean over quantiles, a transform of objectives. A head of one row and nothing else is a Weight,
whose product is fused with the norm (`stars.kernels.score`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stars.kernels import linear
from stars.kernels.linear import Weight

Activation = Literal["none", "sigmoid", "softmax"]


class Gate(NamedTuple):
    """How objectives are weighted, by the prompt alone: softmax(layers(h) / temperature) * scale.

    h is the hidden state at the first token of the last occurrence of `pattern` in the prompt.
    """

    layers: tuple[Weight, ...]  # float32, ReLU between them; the last one's rows are objectives
    temperature: float
    scale: float
    pattern: tuple[int, ...]  # token ids

    @property
    def objectives(self) -> int:
        """How many weights it gives."""
        return self.layers[-1].out_features

    def position(self, token_ids: Sequence[int]) -> int | None:
        """The row of a prompt at which it is read; None where the pattern does not occur."""
        length, wanted = len(self.pattern), list(self.pattern)
        starts = range(len(token_ids) - length, -1, -1)
        return next((start for start in starts if list(token_ids[start : start + length]) == wanted), None)

    def weights(self, hidden: Tensor) -> Tensor:
        """float32 [rows, objectives] of hidden float32 [rows, hidden]."""
        room = [torch.empty(hidden.shape[0], layer.out_features, device=hidden.device) for layer in self.layers]
        return torch.softmax(_through(self.layers, hidden, room) / self.temperature, dim=-1) * self.scale


class RewardHead(NamedTuple):
    """A head that is more than one row."""

    layers: tuple[Weight, ...]  # float32 [out, in], ReLU between them
    activation: Activation = "none"  # of the labels
    label: int = 0  # the one that is read
    gate: Gate | None = None  # the reading is the sum of the labels by its weights, and `label` says nothing

    @property
    def products(self) -> tuple[Weight, ...]:
        """Every product of head and gate."""
        return self.layers + (self.gate.layers if self.gate is not None else ())

    def room(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """What `read` writes on the way, of up to `rows` rows: float32 [rows, out] for each product, and once more."""
        widths = [layer.out_features for layer in (*self.layers, self.layers[-1])]
        return tuple(torch.zeros(rows, width, device=device) for width in widths)

    def read(self, hidden: Tensor, room: Sequence[Tensor], rewards: Tensor, gates: Tensor | None = None) -> None:
        """Writes rewards float32 [rows], of hidden float32 [rows, hidden] behind the model's last norm.

        gates float32 [rows, objectives]: what the gate gave for each row's prompt. Operations of torch are among it, so
        that it is run behind a program of libstars and not in it; a CUDA graph may hold it, as nothing is allocated.
        """
        *wide, spare = [one[: rewards.shape[0]] for one in room]
        labels = _through(self.layers, hidden, wide)  # [rows, labels]
        if self.gate is not None:
            assert gates is not None
            torch.mul(labels, gates, out=spare)
            torch.sum(spare, dim=-1, out=rewards)
        elif self.activation == "softmax":
            torch.softmax(labels, dim=-1, out=spare)
            rewards.copy_(spare[:, self.label])
        elif self.activation == "sigmoid":
            torch.sigmoid(labels, out=spare)
            rewards.copy_(spare[:, self.label])
        else:
            rewards.copy_(labels[:, self.label])


def _through(layers: Sequence[Weight], x: Tensor, room: Sequence[Tensor]) -> Tensor:
    """What the products give, float32 [rows, the last one's rows], with ReLU between them; each into its `room`."""
    for index, (layer, out) in enumerate(zip(layers, room, strict=True)):
        linear(x.relu_() if index else x, layer, out)
        x = out
    return x
