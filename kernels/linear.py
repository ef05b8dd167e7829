"""Matrix product with a weight in its device's best layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stars.kernels.dispatch import Implementation, operation
from stars.kernels.quant import QuantWeight, check, dequantize, stack, stacks

Arithmetic = Literal["float32", "bfloat16"]

SCHEMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""What unquantised matrices are called in tables of tiles."""


@dataclass(frozen=True)
class Weight:
    """A matrix [out_features, in_features] and its bias, as `pack` made them for one device.

    `values` is the matrix itself; where `packed`, libstars' layout of it; where there is a `quant`, its values. The
    matrix is not stored twice: `dense()` rebuilds it.
    """

    values: Tensor
    bias: Tensor | None  # float32 or the values' dtype [out_features]
    out_features: int
    in_features: int
    packed: bool = False
    dtype: torch.dtype | None = None  # of the matrix that `values` holds, where packed
    deterministic: bool = False  # on a GPU: the bits of a row do not depend on the number of rows
    arithmetic: Arithmetic = "float32"  # of libstars' products, see `pack`
    quant: QuantWeight | None = None
    parts: tuple[Weight, ...] = ()  # matrices of several kinds, one below the other, with their biases; then no values
    format: str | None = None  # of a matrix of few bits that libstars packed, as `libstars.format_of` names it

    @property
    def scheme(self) -> str:
        """How a GPU stores it, as tables of tiles call it: "bf16", "fp16", "fp32", or a QuantWeight's name."""
        return SCHEMES[self.values.dtype] if self.quant is None else self.quant.name

    def dense(self) -> Tensor:
        """The matrix [out_features, in_features]; of a quantised one in float32."""
        if self.parts:
            return torch.cat([part.dense().float() for part in self.parts])
        if self.quant is not None:
            return dequantize(self.quant)
        if not self.packed:
            return self.values
        from stars.bindings import libstars

        if self.format is not None:
            return libstars.unpack_quant(self.values, self.out_features, self.in_features, self.format)
        assert self.dtype is not None
        return libstars.unpack(self.values, self.out_features, self.in_features, self.dtype, self.arithmetic)


def pack(
    matrix: Tensor | QuantWeight, bias: Tensor | None = None, deterministic: bool = False,
    arithmetic: Arithmetic = "float32",
) -> Weight:
    """A Weight of `matrix` [out_features, in_features].

    On a GPU the bias takes the matrix's type, and with `deterministic` the product is formed in one order at any
    number of rows, by a kernel of our own instead of cuBLAS.

    On the CPU it is packed for libstars, as bfloat16 if that holds every value exactly (products are formed in float32
    either way, so the results have the same bits for half the memory traffic) and as float32 otherwise.

    With `arithmetic` "bfloat16" the matrix is rounded to bfloat16, and on a CPU that multiplies bfloat16 pairs
    (`libstars.isa()` is "avx512_bf16") so are the activations of every product; sums are float32 still. Other CPUs,
    and the references, multiply the rounded matrix in float32.

    Of a QuantWeight, `arithmetic` says nothing. On the CPU libstars packs it in about as many bytes, from where it lies
    (a mapped file's pages too). Its products round the activations of each row, in groups of 32, to 16 bits: by half of
    1 / 32767 of the group's largest at most. Sums within a group are exact, and those of groups are added up in float32
    in order. So the bits of a row depend on nothing but the row and the weight, with or without `deterministic`. A row
    with NaN or infinity becomes NaN. fp8 has no such products: it is dequantised for every one.

    On a GPU scales of groups of 128 become float32, and zeros take the scales' type: it asks for no less than four
    bytes ahead of time. Its kernels multiply by it at any number of rows. Raises ValueError where its tensors do not
    fit.
    """
    if isinstance(matrix, QuantWeight):
        check(matrix)
        if matrix.values.is_cpu and matrix.out_features and matrix.in_features:
            from stars.bindings import libstars

            if libstars.available() and libstars.format_of(matrix.scheme) is not None:
                packed, form = libstars.pack_quant(matrix)
                bias = None if bias is None else bias.float().contiguous()
                return Weight(packed, bias, matrix.out_features, matrix.in_features, True,
                              deterministic=deterministic, format=form)
        return as_stored(matrix, bias, deterministic)
    if arithmetic == "bfloat16":
        matrix = matrix.to(torch.bfloat16)
    out_features, in_features = matrix.shape
    if matrix.is_cuda:
        bias = None if bias is None else bias.to(matrix.dtype).contiguous()
        return Weight(matrix.contiguous(), bias, out_features, in_features, deterministic=deterministic)
    if not _packable(matrix):
        return Weight(matrix, bias, out_features, in_features, deterministic=deterministic)
    from stars.bindings import libstars

    stored = matrix if matrix.dtype == torch.bfloat16 else _narrowest(matrix)
    bias = None if bias is None else bias.float().contiguous()
    packed = libstars.pack(stored.contiguous(), arithmetic)
    return Weight(packed, bias, out_features, in_features, True, stored.dtype, deterministic, arithmetic)


def as_stored(quant: QuantWeight, bias: Tensor | None = None, deterministic: bool = False) -> Weight:
    """A Weight of a matrix that is not packed: as a GPU's kernels and the references take it."""
    scales = quant.scales.float() if quant.group == 128 else quant.scales
    quant = quant._replace(scales=scales, zeros=None if quant.zeros is None else quant.zeros.to(scales.dtype))
    bias = None if bias is None else bias.float().contiguous()
    return Weight(quant.values, bias, quant.out_features, quant.in_features, deterministic=deterministic, quant=quant)


def pack_rows(parts: Sequence[Tensor | QuantWeight], bias: Tensor | None = None, deterministic: bool = False,
              arithmetic: Arithmetic = "float32") -> Weight:
    """A Weight of matrices [rows, in_features] one below the other, as `pack` makes it of one; `bias` is that of all.

    Those of one kind are one product; else the Weight has `parts`.
    """
    quants = [part for part in parts if isinstance(part, QuantWeight)]
    if len(quants) == len(parts) and stacks(quants):
        return pack(stack(quants), bias, deterministic, arithmetic)
    if not quants:
        return _pack_plain([part for part in parts if isinstance(part, Tensor)], bias, deterministic, arithmetic)
    sizes = [part.out_features if isinstance(part, QuantWeight) else part.shape[0] for part in parts]
    biases = [None] * len(parts) if bias is None else list(bias.split(sizes))
    packed = tuple(pack(part, own, deterministic, arithmetic) for part, own in zip(parts, biases, strict=True))
    bias = None if bias is None else torch.cat([own for own in (part.bias for part in packed) if own is not None])
    return Weight(packed[0].values[:0], bias, sum(sizes), packed[0].in_features, deterministic=deterministic,
                  parts=packed)


def _pack_plain(parts: Sequence[Tensor], bias: Tensor | None, deterministic: bool, arithmetic: Arithmetic) -> Weight:
    """As `pack_rows`. What is bfloat16 already is packed from where it lies; all else is copied before."""
    if all(part.dtype == torch.bfloat16 and part.is_cpu and part.numel() for part in parts):
        from stars.bindings import libstars

        if libstars.available():
            packed = libstars.pack_rows([part.contiguous() for part in parts], arithmetic)
            bias = None if bias is None else bias.float().contiguous()
            return Weight(packed, bias, sum(part.shape[0] for part in parts), parts[0].shape[1], True, torch.bfloat16,
                          deterministic, arithmetic)
    # A matrix alone need not be copied for that, unless it would be kept as it is, perhaps in a file.
    alone = len(parts) == 1 and (parts[0].is_cuda or _packable(parts[0]))
    return pack(parts[0] if alone else torch.cat(list(parts)), bias, deterministic, arithmetic)


def _packable(matrix: Tensor) -> bool:
    """Whether `pack` makes libstars' layout of a matrix."""
    from stars.bindings import libstars

    return (matrix.dtype in (torch.float32, torch.bfloat16, torch.float16) and matrix.numel() > 0
            and matrix.device.type == "cpu" and libstars.available())


def _narrowest(matrix: Tensor) -> Tensor:
    """`matrix` as bfloat16 if that holds every value exactly, else as float32."""
    wide, narrow = matrix.float(), matrix.to(torch.bfloat16)
    return narrow if torch.equal(narrow.float(), wide) else wide


def linear_reference(x: Tensor, weight: Weight, out: Tensor) -> None:
    """out = x @ weight.T + bias. x [rows, in_features]; out [rows, out_features]: formed in the wider type."""
    kind = torch.promote_types(x.dtype, out.dtype)
    bias = None if weight.bias is None else weight.bias.to(x.dtype).to(kind)
    out.copy_(torch.nn.functional.linear(x.to(kind), weight.dense().to(x.dtype).to(kind), bias))


def _unquantised(x: Tensor, weight: Weight, out: Tensor) -> bool:
    return weight.quant is None and not weight.parts


def _all_packed(x: Tensor, weight: Weight, out: Tensor) -> bool:
    return bool(weight.parts) and all(part.packed for part in weight.parts)


def _side_by_side(x: Tensor, weight: Weight, out: Tensor) -> None:
    """Every part's product into its own columns."""
    from stars.bindings.libstars import linear_into

    column = 0
    for part in weight.parts:
        linear_into(x, part, out, column, weight.out_features)
        column += part.out_features


@operation(cpu=[Implementation("stars.bindings.libstars:linear", _unquantised),
                Implementation(_side_by_side, _all_packed)],
           cuda="stars.kernels.triton.linear:linear", reference=linear_reference)
def linear(x: Tensor, weight: Weight, out: Tensor) -> None:
    """out = x @ weight.T + bias. x [rows, in_features]; out [rows, out_features], of x's type or float32."""
