"""Which passes of a decoder are fused on a GPU, and the room in which the programs of their products share tiles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from stars.kernels.linear import Weight
from stars.kernels.triton import tuned
from stars.kernels.triton.tuned import ModelShape, Product
from stars.kernels.types import SplitSpace
from stars.model.config import ModelConfig


class Fusing(NamedTuple):
    """What tuned tables are asked for a decoder by."""

    shape: ModelShape
    scheme: str  # of the layers' weights, of the quantised ones where there are some
    products: frozenset[Product]

    def fuses(self, rows: int) -> bool:
        """Whether a pass of `rows` rows is fused by the table in force."""
        return rows <= tuned.MAX_FUSED_ROWS and tuned.fused(self.shape, self.scheme, rows)

    def room(self) -> tuple[int, int]:
        """(floats, tickets) that every pass that is fused by the table in force finds its room in; zeros for none."""
        most = next((rows for rows in range(tuned.MAX_FUSED_ROWS, 0, -1) if self.fuses(rows)), 0)
        return tuned.room(most, self.products) if most else (0, 0)

    def split_space(self, device: torch.device) -> SplitSpace:
        """That room."""
        floats, tickets = self.room()
        return SplitSpace(torch.empty(floats, device=device), torch.zeros(tickets, dtype=torch.int32, device=device))


def fusing(config: ModelConfig, dtype: torch.dtype, weights: Iterable[tuple[str, Weight]]) -> Fusing | None:
    """Of a decoder with activations of `dtype`, and with these weights and ends of their products, the layers' first.

    None: no pass is ever fused, see `fusable`. The products take weights of the activations' type and quantised ones.
    Deterministic weights promise one order of sums at any number of rows. The single operations keep it up to a whole
    prefill, and the fused products are made for few rows, so such a decoder takes the one list for all.
    """
    weights = list(weights)
    if not fusable(config, dtype) or any(weight.deterministic or (weight.quant is None and weight.values.dtype != dtype)
                                         for _, weight in weights):
        return None
    products = {Product(end, weight.scheme, weight.out_features, weight.in_features,
                        config.head_dim if end == "qkv" else 0) for end, weight in weights}
    layers = [weight for end, weight in weights if end != "normed"]
    stored = next((weight for weight in layers if weight.quant is not None), layers[0])
    scores = all(end != "normed" for end, _ in weights)
    return Fusing(_shape(config, scores), stored.scheme, frozenset(products))


def fusable(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the fused list serves a model at all.

    Its products end with what layers like llama's have. Squares are added up by blocks of features. And what the fused
    products read is the residual stream times a norm's weight, not divided by its length yet: in float16 that may be
    beyond the largest number where the norm is not.
    """
    return config.llama_like and config.hidden_size % tuned.SUMMED == 0 and dtype != torch.float16


def split_bytes(config: ModelConfig, dtype: torch.dtype, scheme: str, scores: bool = False) -> int:
    """Bytes of the room that a decoder on a GPU reserves, all of its matrices stored in `scheme`; `scores`: a reward
    model's.
    """
    shape = _shape(config, scores)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    products = {Product("qkv", scheme, shape.qkv, hidden, config.head_dim),
                Product("residual", scheme, hidden, config.num_heads * config.head_dim),
                Product("swiglu", scheme, 2 * intermediate, hidden), Product("residual", scheme, hidden, intermediate)}
    if not scores:
        products.add(Product("normed", scheme, config.vocab_size, hidden))
    return 4 * sum(Fusing(shape, scheme, frozenset(products)).room()) if fusable(config, dtype) else 0


def _shape(config: ModelConfig, scores: bool) -> ModelShape:
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return ModelShape(config.hidden_size, qkv, config.intermediate_size, 0 if scores else config.vocab_size)
