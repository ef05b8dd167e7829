"""The product of libstars against torch.mm, at the shipped model's shapes.

    pytest benchmarks/bench_linear.py --benchmark-only

Compare minima: they are what the code can do, the rest is what else ran on the machine.
"""

from __future__ import annotations

import pytest
import torch

from stars import kernels
from stars.bindings import libstars

ROWS = (1, 8, 32, 128)
SHAPES = ((256, 512), (256, 1408), (704, 256), (256, 8192))  # in_features, out_features


@pytest.mark.parametrize("in_features, out_features", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("how", ["torch", "float32", "bfloat16", "bfloat16 products"])
def test_linear(benchmark, how, rows, in_features, out_features):
    benchmark.group = f"{rows} rows, {in_features} x {out_features}"
    matrix, x = torch.randn(out_features, in_features), torch.randn(rows, in_features)
    out = torch.empty(rows, out_features)
    if how == "torch":
        weight_bytes = matrix.numel() * 4
        benchmark(torch.mm, x, matrix.t(), out=out)
    else:
        if not libstars.available():
            pytest.skip("libstars was not built")
        if how == "bfloat16 products":  # those of a weight of that arithmetic, where the machine has them
            weight = kernels.pack(matrix, arithmetic="bfloat16")
        else:
            weight = kernels.pack(matrix.to(getattr(torch, how)))
        weight_bytes = weight.values.numel()
        benchmark(kernels.linear, x, weight, out)
    seconds = benchmark.stats.stats.min
    benchmark.extra_info["weight GB/s"] = round(weight_bytes / seconds * 1e-9, 1)
    benchmark.extra_info["GFLOP/s"] = round(2 * rows * matrix.numel() / seconds * 1e-9, 1)
    benchmark.extra_info["instructions"] = libstars.isa() if how != "torch" else None
    benchmark.extra_info["threads"] = libstars.num_threads() if how != "torch" else torch.get_num_threads()
