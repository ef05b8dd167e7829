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
from stars.kernels.linear import Weight, pack

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
        return torch.softmax(_through(self.layers, hidden) / self.temperature, dim=-1) * self.scale


class RewardHead(NamedTuple):
    """A head that is more than one row. `prm` and others make one of packed float32 products, or with `two_labels`."""

    layers: tuple[Weight, ...]  # float32 [out, in], ReLU between them
    activation: Activation = "none"  # of the labels
    label: int = 0  # the one that is read
    gate: Gate | None = None  # the reading is the sum of the labels by its weights, and `label` says nothing

    @property
    def products(self) -> tuple[Weight, ...]:
        """Every product of head and gate."""
        return self.layers + (self.gate.layers if self.gate is not None else ())

    def read(self, hidden: Tensor, rewards: Tensor, gates: Tensor | None = None) -> None:
        """Writes rewards float32 [rows], of hidden float32 [rows, hidden] behind the model's last norm.

        gates float32 [rows, objectives]: what the gate gave for each row's prompt. Operations of torch are among it, so
        that it is run behind a program of libstars and not in it; a CUDA graph may hold it.
        """
        labels = _through(self.layers, hidden)  # [rows, labels]
        if self.gate is not None:
            assert gates is not None
            torch.sum(labels * gates, dim=-1, out=rewards)
        elif self.activation == "softmax":
            rewards.copy_(torch.softmax(labels, dim=-1)[:, self.label])
        elif self.activation == "sigmoid":
            torch.sigmoid(labels[:, self.label], out=rewards)
        else:
            rewards.copy_(labels[:, self.label])


def two_labels(matrix: Tensor, bias: Tensor | None = None, good: int = 1, deterministic: bool = False) -> RewardHead:
    """The probability of label `good`: softmax of matrix @ h + bias; matrix [2, hidden], bias [2]."""
    weight = pack(matrix.float(), None if bias is None else bias.float(), deterministic)
    return RewardHead((weight,), "softmax", good)


def _through(layers: Sequence[Weight], x: Tensor) -> Tensor:
    """What the products give, float32 [rows, the last one's rows], with ReLU between them."""
    for index, layer in enumerate(layers):
        out = torch.empty(x.shape[0], layer.out_features, device=x.device)
        linear(x.relu_() if index else x, layer, out)
        x = out
    return x
