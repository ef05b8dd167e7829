"""Takes tensors out of a source in the form that the decoder keeps them in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from stars import kernels
from stars.errors import ModelError
from stars.kernels.gpu_schemes import served
from stars.kernels.linear import Arithmetic, Weight
from stars.kernels.quant import QuantWeight, Rounded, dequantize, quantize
from stars.kernels.quant import rows as rows_of
from stars.model.adapters import PRODUCTS, AdaptedCheckpoint
from stars.model.config import ModelConfig
from stars.model.decoder import LayerWeights
from stars.model.head_files import LM_HEAD
from stars.model.loaded import place_of
from stars.model.low_rank import LayerAdapters, LowRank
from stars.model.quantization import INT4_GROUP, TIED
from stars.model.sharing import once
from stars.model.source import TensorSource
from stars.model.tensors import NORMS, products_of
from stars.target import target_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T = TypeVar("T")


class Reader:
    """Takes tensors out of a checkpoint in the form the decoder keeps them in."""

    def __init__(self, source: TensorSource, names: dict[str, str], dtype: str, device: torch.device,
                 deterministic: bool, quantization: Rounded | None = None):
        self.source = source
        self.names = names
        self.device = device
        self.deterministic = deterministic
        self.quantization = quantization  # of matrices that are plain numbers, as they are read
        float32 = target_of(device.type).float32
        self.rounded = float32 and dtype == "bfloat16"
        self.activations = torch.float32 if float32 else DTYPES[dtype]  # of keys and values, too
        self.kind = None if float32 else self.activations  # of matrices; None: the narrowest that is exact

    def matrix(self, *layers: str, order: Tensor | None = None) -> Weight:
        """The weights of `layers`, one below the other, packed, with their biases where they have some.

        order: int64 [rows] of all of them; it takes no row from one matrix to another.
        """
        return self._packed(layers, self.quantization, order)

    def embedding(self, tied: bool) -> Weight:
        """The embedding table. Where it is `tied` to the language model's head it is rounded, too; else its rows are
        looked up only, and stay as they are."""
        return self._packed(("model.embed_tokens",), TIED if tied and self.quantization else None)

    def vector(self, name: str, offset: float = 0.0) -> Tensor:
        """A norm's weight, `offset` added to it, or a bias, float32."""
        return self._once([name], lambda: self._plain(name).to(self.device, torch.float32, copy=True).add_(offset))

    def low_rank(self, *modules: str) -> LowRank | None:
        """What an adapter adds to the product of `modules`, in the activations' type; None where it adds nothing."""
        if not isinstance(self.source, AdaptedCheckpoint) or not any(
                module in self.source.pairs for module in modules):
            return None
        features = [self.source.tensors[self.names[module + ".weight"]].shape[0] for module in modules]
        pairs = [self.source.pairs.get(module) for module in modules]
        downs = []
        ups = torch.zeros(sum(features), sum(pair.rank for pair in pairs if pair is not None))
        row = column = 0
        for pair, count in zip(pairs, features, strict=True):
            if pair is not None:
                down, up = self.source.low_rank(pair)
                downs.append(down)
                ups[row : row + count, column : column + pair.rank] = up
                column += pair.rank
            row += count
        return LowRank(*(kernels.pack(matrix.to(self.device, self.kind), None, self.deterministic)
                         for matrix in (torch.cat(downs), ups)))

    def _packed(self, layers: tuple[str, ...], scheme: Rounded | None, order: Tensor | None = None) -> Weight:
        names = [layer + ".weight" for layer in layers] + [layer + ".bias" for layer in layers]
        return self._once(names, lambda: self._matrix(layers, scheme, order), scheme)

    def _once(self, names: Iterable[str], make: Callable[[], T], scheme: Rounded | None = None) -> T:
        """What is made of these tensors, once in a scope of shared weights."""
        held = [name for name in names if name in self.names]
        read = tuple((place_of(self.source, self.names[name]), name) for name in held)
        key: Hashable = (read, self.device, self.kind, self.rounded, self.deterministic, scheme)
        return once(key, make)

    def _matrix(self, layers: tuple[str, ...], scheme: Rounded | None, order: Tensor | None) -> Weight:
        parts = [self._rounded(layer + ".weight", scheme) for layer in layers]
        biases = [self.vector(layer + ".bias") for layer in layers if layer + ".bias" in self.names]
        bias = torch.cat(biases) if biases else None
        if order is not None:
            parts = _ordered(parts, order)
            bias = None if bias is None else bias[order.to(bias.device)]
        arithmetic: Arithmetic = "bfloat16" if self.rounded else "float32"
        plain = [part for part in parts if isinstance(part, Tensor)]
        if len(plain) < len(parts):
            moved = [self._moved(part) for part in parts]
            if self.kind is not None:
                moved = [*served(moved, self.kind, looked_up=layers[0].endswith("embed_tokens"))]
            return kernels.pack_rows(moved, bias, self.deterministic, arithmetic)
        # bfloat16 is kept as such: it is exact and half the bytes; all else becomes float32, which is exact too
        keep = self.rounded or {part.dtype for part in plain} == {torch.bfloat16}
        kind = self.kind or (torch.bfloat16 if keep else torch.float32)
        return kernels.pack_rows([part.to(self.device, kind) for part in plain], bias, self.deterministic, arithmetic)

    def _rounded(self, name: str, scheme: Rounded | None) -> Tensor | QuantWeight:
        """A tensor, rounded to a scheme where one is given: one matrix at a time, where it will be multiplied."""
        tensor = self._read(name)
        if isinstance(tensor, QuantWeight) and tensor.scheme == "fp8" and self.kind is None:
            return dequantize(tensor)  # exactly, as no CPU multiplies its numbers
        if scheme is None or isinstance(tensor, QuantWeight):
            return tensor
        try:
            return quantize(tensor.to(self.device), scheme, INT4_GROUP if scheme == "int4" else 0)
        except ValueError as error:
            raise ModelError(f"{self.names[name]} of {self.source.directory} cannot be rounded to {scheme} ({error}): "
                             "leave quantization out, or copy the model again") from error

    def _moved(self, part: Tensor | QuantWeight) -> Tensor | QuantWeight:
        """One of several matrices that are not all of one type, on the device."""
        if isinstance(part, Tensor):
            return part.to(self.device, self.kind)
        zeros = None if part.zeros is None else part.zeros.to(self.device)
        return part._replace(values=part.values.to(self.device), scales=part.scales.to(self.device), zeros=zeros)

    def check_tied(self) -> None:
        """Raises ModelError where the checkpoint has a head of its own although it should be the embedding."""
        if LM_HEAD not in self.source.tensors:
            return
        head, embedding = self.source.read(LM_HEAD), self._read("model.embed_tokens.weight")
        if not torch.equal(*(part if isinstance(part, Tensor) else part.values for part in (head, embedding))):
            raise ModelError(
                f"{self.source.directory} has tie_word_embeddings but a {LM_HEAD} that differs from the "
                "embeddings: set tie_word_embeddings to false in config.json if that head is wanted, else remove it"
            )

    def _read(self, name: str) -> Tensor | QuantWeight:
        return self.source.read(self.names[name])

    def _plain(self, name: str) -> Tensor:
        """A tensor that no source quantises."""
        tensor = self._read(name)
        assert isinstance(tensor, Tensor)
        return tensor


def read_layer(reader: Reader, config: ModelConfig, prefix: str) -> LayerWeights:
    """The weights of the layer whose tensors' names begin with `prefix`."""
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    norms, products = NORMS[config.norms], products_of(config)
    orders = _orders(config)

    def norm(name: str | None, order: Tensor | None = None) -> Tensor | None:
        if name is None:
            return None
        weight = reader.vector(f"{prefix}{name}.weight", config.norm_offset)
        return weight if order is None else weight[order.to(weight.device)]

    return LayerWeights(
        input_norm=norm(norms.before_attention),
        qkv=reader.matrix(*(prefix + name for name in products.qkv), order=orders.qkv),
        q_norm=norm("self_attn.q_norm", orders.head) if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm", orders.head) if config.qk_norm else None,
        o=reader.matrix(attention + "o_proj"),
        mlp_norm=norm(norms.before_mlp),
        gate_up=reader.matrix(*(prefix + name for name in products.gate_up)),
        down=reader.matrix(mlp + "down_proj"),
        adapters=LayerAdapters(*(reader.low_rank(*(prefix + module for module in modules)) for modules in PRODUCTS)),
        attention_post_norm=norm(norms.after_attention),
        mlp_post_norm=norm(norms.after_mlp),
    )


def _ordered(parts: Sequence[Tensor | QuantWeight], order: Tensor) -> list[Tensor | QuantWeight]:
    """Matrices one below the other with their rows in `order`, each matrix' among themselves."""
    taken: list[Tensor | QuantWeight] = []
    start = 0
    for part in parts:
        count = part.out_features if isinstance(part, QuantWeight) else part.shape[0]
        index = order[start : start + count] - start
        taken.append(rows_of(part, index) if isinstance(part, QuantWeight) else part[index])
        start += count
    return taken


class _Orders(NamedTuple):
    """In which order rows are taken; None: as they are."""

    head: Tensor | None  # int64 [head_dim]
    qkv: Tensor | None  # int64 [(heads + 2 * kv_heads) * head_dim]


def _orders(config: ModelConfig) -> _Orders:
    """Of queries and keys, whose pairs of dimensions are rotated: see `ModelConfig.head_order`."""
    order = config.head_order()
    if order is None:
        return _Orders(None, None)
    # No family has both parts that are not rotated and a norm over all heads.
    head, kept = torch.tensor(order), torch.arange(config.head_dim)
    starts = torch.arange(config.num_heads + 2 * config.num_kv_heads)[:, None] * config.head_dim
    rotated = torch.arange(len(starts))[:, None] < config.num_heads + config.num_kv_heads
    return _Orders(head, (starts + torch.where(rotated, head, kept)).flatten())
