"""Products alone, by how the matrix is stored: cold, out of memory far beyond the last cache, or warm.

    python benchmarks/cold_products.py [--shape 3072x576] [--rows 1,8] [--megabytes 1200] [--runs 9] [--warm]

Runs of all kinds and of a reader (the sum of an int64 tensor of as many bytes) are interleaved; a row has the best and
the median run. Shares are of the reader's best. Matrices are random; --warm multiplies by one of them over and over.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import NamedTuple

import torch

from stars import kernels
from stars.bindings import libstars
from stars.bindings.huge_pages import empty
from stars.kernels.quant import LAYOUTS, of_blocks, quantize

KINDS = ("bf16", "int8", "int4", *LAYOUTS)


class Timed(NamedTuple):
    """The products of one kind, recorded."""

    program: libstars.Program
    times: int
    nbytes: int  # of weights, of one run
    products: int
    seconds: list[float]


def weight_of(kind: str, out_features: int, in_features: int) -> kernels.Weight:
    """A random matrix as `kind` stores it."""
    if kind in LAYOUTS:
        layout = LAYOUTS[kind]
        codes = torch.randint(0, 60, (out_features, in_features // layout.columns * layout.nbytes), dtype=torch.uint8)
        return kernels.pack(of_blocks(codes, kind))
    matrix = torch.randn(out_features, in_features)
    if kind == "bf16":
        return kernels.pack(matrix.bfloat16())
    return kernels.pack(quantize(matrix, kind, 32 if kind == "int4" else 0))


def recorded(kind: str, shape: tuple[int, int], rows: int, nbytes: int, warm: bool) -> Timed:
    """Products with copies of one matrix, `nbytes` of them."""
    first = weight_of(kind, *shape)
    count = max(1, nbytes // first.values.numel())
    weights = [first]
    for _ in range(0 if warm else count - 1):
        values = empty(first.values.numel())
        values.copy_(first.values)
        weights.append(kernels.Weight(values, None, *shape, True, first.dtype, format=first.format))
    x, out = torch.randn(rows, shape[1]), torch.empty(rows, shape[0])
    with libstars.record() as program:
        for weight in weights:
            kernels.linear(x, weight, out)
    return Timed(program, count // len(weights), count * first.values.numel(), count, [])


def main() -> None:
    """Prints a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3072x576")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--megabytes", type=int, default=1200)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--warm", action="store_true")
    args = parser.parse_args()
    out_features, in_features = map(int, args.shape.split("x"))
    kinds = [kind for kind in args.kinds.split(",")
             if kind not in LAYOUTS or in_features % LAYOUTS[kind].columns == 0]
    done, nbytes = torch.zeros(1, dtype=torch.int32), args.megabytes * 10**6
    print(f"{libstars.isa()}, {libstars.num_threads()} threads, [{out_features}, {in_features}]")
    for rows in map(int, args.rows.split(",")):
        found = {kind: recorded(kind, (out_features, in_features), rows, nbytes, args.warm) for kind in kinds}
        memory = torch.ones(nbytes // 8, dtype=torch.int64)
        read: list[float] = []
        for _ in range(args.runs):
            begin = time.perf_counter()
            memory.sum()
            read.append(time.perf_counter() - begin)
            for timed in found.values():
                begin = time.perf_counter()
                timed.program.run(timed.times, done)
                timed.seconds.append(time.perf_counter() - begin)
        fastest = memory.nbytes / min(read) / 1e9
        print(f"{rows} rows; reader {fastest:.1f} GB/s, median {memory.nbytes / median(read) / 1e9:.1f}")
        for kind, timed in found.items():
            best = timed.nbytes / min(timed.seconds) / 1e9
            flops = 2 * rows * out_features * in_features * timed.products / min(timed.seconds) / 1e9
            print(f"  {kind:5} {best:6.1f} GB/s, {best / fastest:4.0%} of the reader, median "
                  f"{timed.nbytes / median(timed.seconds) / 1e9:6.1f}; {flops:5.0f} GFLOP/s; "
                  f"{min(timed.seconds) / timed.products * 1e6:.1f} us a product", flush=True)


if __name__ == "__main__":
    main()
