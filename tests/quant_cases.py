"""Random matrices of every scheme of few bits that libstars multiplies by."""

from __future__ import annotations

import torch

from stars.kernels.quant import LAYOUTS, QuantWeight, of_blocks, quantize

BLOCKS = tuple(LAYOUTS)
FORMATS = ("int8", "int4-32", "int4-64", "int4-128", "int4-32 zeros", "int4-128 zeros", "int4-32 float32",
           "int4-32 zeros float32", *BLOCKS)
"""All that libstars has a kernel or a layout of its own for."""


def columns_of(name: str) -> int:
    """What in_features must be a multiple of."""
    if name in LAYOUTS:
        return LAYOUTS[name].columns
    return 1 if name == "int8" else int(name.split()[0].removeprefix("int4-"))


def random_quant(name: str, out_features: int, in_features: int, seed: int = 0) -> QuantWeight:
    """A matrix of a format: rows of different sizes, all codes, scales of both signs where the format has them."""
    generator = torch.Generator().manual_seed(seed * 7919 + out_features * 101 + in_features)
    if name in LAYOUTS:
        return _blocks(name, out_features, in_features, generator)
    matrix = torch.randn(out_features, in_features, generator=generator)
    matrix *= torch.logspace(-2, 1, out_features)[:, None]
    if name == "int8":
        return quantize(matrix, "int8")
    quant = quantize(matrix, "int4", columns_of(name), "zeros" in name)
    return quant._replace(scales=quant.scales.float() * 1.0001 if "float32" in name else quant.scales.half())


def _blocks(name: str, out_features: int, in_features: int, generator: torch.Generator) -> QuantWeight:
    layout = LAYOUTS[name]
    shape = (out_features, in_features // layout.columns)
    blocks = torch.randint(0, 256, (*shape, layout.nbytes), generator=generator, dtype=torch.uint8)
    scales = {208 if name == "q6_k" else 0: torch.randn(shape, generator=generator) * 0.01}
    if name.endswith("_1") or name in ("q4_k", "q5_k"):
        scales[2] = torch.randn(shape, generator=generator) * 0.05
    for at, values in scales.items():
        blocks[:, :, at : at + 2] = values.half().view(torch.uint8).view(*shape, 2)
    return of_blocks(blocks.flatten(1), name)
