"""libstars' products with matrices of few bits: every format, instruction set and odd size within a derived bound.

x is rounded, in groups of 32 of a row, to multiples of amax / 32767 (amax: the group's largest magnitude, at least
2^-100). So a value is off by at most half of that, and by a rounding of the scale, 2^-24 of amax more at most, twice.
The sum of a group is an exact integer. It is rounded to float32, multiplied by two scales (rounded themselves at most
once) and added up: at most 5 roundings a group beside the one of each addition, as with the offsets, whose terms have
magnitudes of their own. Hence K u / (1 - K u), u = 2^-24 and K = groups + 7, times the sum of magnitudes; where codes
have an offset, |code * scale| and |offset| count instead of their sum, which may be less. (Higham, section 3.1.)
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from instruction_sets import instruction_set  # noqa: F401  (a fixture)
from libstars_threads import threads
from quant_cases import BLOCKS, FORMATS, columns_of, random_quant
from random_products import run_linear
from stars import kernels
from stars.bindings import libstars
from stars.bindings.library import loaded
from stars.kernels.dispatch import references_only
from stars.kernels.graph import Graphs, Part
from stars.kernels.quant import QuantWeight, dequantize, quantize
from stars.kernels.quant_blocks import take_apart

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")

U = 2.0**-24
STEP = 0.5 / 32767 + 4 * U
OUT_FEATURES = (1, 33, 70)
ROWS = (1, 2, 3, 8, 9, 33)


def sizes_of(name: str) -> list[int]:
    """in_features: the least, and some that a vector, a panel or eight groups do not divide."""
    columns = columns_of(name)
    return [1, 31, 45, 300] if columns == 1 else [columns, 3 * columns, 9 * 32] if columns == 32 else [
        columns, 3 * columns]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.logspace(-2, 2, shape[-1])[torch.randperm(shape[-1], generator=generator)]


def magnitudes(quant: QuantWeight) -> torch.Tensor:
    """|code * scale| + |offset|, float64 [out, in]."""
    if quant.scheme in BLOCKS:
        codes, scales, offsets = take_apart(quant.values, quant.scheme)
        parts = (codes.double() * scales[:, :, None].double()).abs()
        return (parts if offsets is None else parts + offsets.double().abs()[:, :, None]).flatten(1)
    if quant.scheme == "int8":
        return dequantize(quant).double().abs()
    steps = torch.stack((quant.values & 15, quant.values >> 4), 2).view(*quant.scales.shape, quant.group)
    zeros = torch.full_like(quant.scales, 8) if quant.zeros is None else quant.zeros
    scales = quant.scales.double().abs()[:, :, None]
    return ((steps.double() + zeros.double()[:, :, None]) * scales).flatten(1)


def bound(x: torch.Tensor, quant: QuantWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What a product may be off by, float64 [rows, out]."""
    rows, columns = x.shape
    groups = -(-columns // 32)
    padded = torch.nn.functional.pad(x.abs().double(), (0, groups * 32 - columns))
    largest = padded.view(rows, groups, 32).amax(2).clamp_min(2.0**-100).repeat_interleave(32, 1)[:, :columns]
    weight = magnitudes(quant)
    terms = groups + 7
    total = largest @ weight.T + (0 if bias is None else bias.double().abs())
    return largest @ dequantize(quant).double().abs().T * STEP + terms * U / (1 - terms * U) * total


@cache
def cases(name: str) -> list[tuple[QuantWeight, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of every size: the matrix, a bias, x, the product in float64 and what one may be off by."""
    found = []
    for in_features, out_features in itertools.product(sizes_of(name), OUT_FEATURES):
        quant, x = random_quant(name, out_features, in_features), numbers(max(ROWS), in_features, seed=in_features)
        bias = numbers(out_features, seed=1) if out_features % 2 else None
        exact = x.double() @ dequantize(quant).double().T + (0 if bias is None else bias.double())
        found.append((quant, bias, x, exact, bound(x, quant, bias)))
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_within_the_bound(name, instruction_set):  # noqa: F811
    for quant, bias, x, exact, most in cases(name):
        weight = kernels.pack(quant, bias)
        assert weight.packed and weight.quant is None
        for rows in ROWS:
            error = (run_linear(x[-rows:].clone(), weight).double() - exact[-rows:]).abs()
            assert bool((error <= most[-rows:]).all()), (quant.in_features, quant.out_features, rows)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_of_a_row_depend_on_the_row_alone(name, instruction_set):  # noqa: F811
    """Not on the other rows, their number, or the threads."""
    in_features = sizes_of(name)[-1]
    quant = random_quant(name, 161, in_features)
    weight, x = kernels.pack(quant, numbers(161, seed=2)), numbers(75, in_features, seed=3)
    everything = run_linear(x, weight)
    for rows in (*range(1, 10), 17, 65):
        assert torch.equal(run_linear(x[:rows].clone(), weight), everything[:rows])
        assert torch.equal(run_linear(x[-rows:].clone(), weight), everything[-rows:])
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(run_linear(x, weight), everything)
            assert torch.equal(run_linear(x[7:8].clone(), weight), everything[7:8])


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_packed_is_what_dequantize_makes(name, instruction_set):  # noqa: F811
    """To the bit, whole and row by row; in about as many bytes as it was stored in."""
    for in_features in sizes_of(name):
        quant = random_quant(name, 70, in_features)
        weight, matrix = kernels.pack(quant), dequantize(quant)
        assert torch.equal(weight.dense(), matrix)
        ids = torch.tensor([69, 0, 32, 31, -1, 70], dtype=torch.int32)
        out = torch.zeros(6, in_features)
        kernels.embedding(ids, weight, out)
        assert torch.equal(out[:4], matrix[ids[:4].long()]) and bool(out[4:].isnan().all())
    large = random_quant(name, 64, 768)
    weight = kernels.pack(large)
    assert weight.values.numel() == libstars.quant_bytes(64, 768, weight.format)
    # Groups of 64 and 128 have their scales once for each 32, and a zero is two bytes: 5 bits a weight, or 6.
    allowed = 1.25 if name == "int4-128 zeros" else 1.12
    assert weight.values.numel() <= allowed * large.nbytes


def test_the_instruction_sets_agree_on_the_integers(instruction_set):  # noqa: F811
    """x of whole steps and weights of powers of two: nothing is rounded, and every product is exact."""
    values = torch.randint(-128, 128, (40, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    quant = QuantWeight(values, torch.full((40,), 0.5), None, 0, "int8")
    x = torch.randint(-32767, 32768, (9, 96), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32] = 32767.0
    exact = x.double() @ dequantize(quant).double().T
    assert bool(((run_linear(x, kernels.pack(quant)).double() - exact).abs() <= exact.abs() * 2 * U + 3 * 2.0**8).all())
    extreme = torch.full((1, 96), -32767.0)
    lowest = QuantWeight(torch.full((3, 96), -128, dtype=torch.int8), torch.ones(3), None, 0, "int8")
    assert run_linear(extreme, kernels.pack(lowest)).tolist() == [[96 * 128 * 32767.0] * 3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_row_nan(value, instruction_set):  # noqa: F811
    for name in ("int8", "q4_1", "q6_k"):
        quant = random_quant(name, 33, 256)
        x = numbers(3, 256)
        x[1, 77] = value
        out, weight = run_linear(x, kernels.pack(quant)), kernels.pack(quant)
        assert bool(out[1].isnan().all()) and torch.equal(out[::2], run_linear(x[::2].contiguous(), weight))


def test_zeros_and_tiny_rows(instruction_set):  # noqa: F811
    weight = kernels.pack(random_quant("q5_0", 33, 64))
    assert bool((run_linear(torch.zeros(2, 64), weight) == 0).all())
    assert bool((run_linear(torch.full((1, 64), 1e-45), weight) == 0).all())
    assert run_linear(torch.zeros(0, 64), weight).shape == (0, 33)


@pytest.mark.parametrize("schemes", [("q4_k", "q6_k", "q5_0"), ("q4_0", "float32", "q8_0"), ("int8", "int8")])
def test_parts_write_side_by_side(schemes, instruction_set):  # noqa: F811
    """Matrices of several kinds below each other: every part has the bits of its own product, in a recording too."""
    parts = [random_quant(name, 33 + 8 * i, 256, i) if name != "float32" else torch.randn(41, 256)
             for i, name in enumerate(schemes)]
    sizes = [part.shape[0] if isinstance(part, torch.Tensor) else part.out_features for part in parts]
    bias, x = numbers(sum(sizes), seed=5), numbers(9, 256, seed=6)
    weight = kernels.pack_rows(parts, bias)
    assert bool(weight.parts) == (len(set(schemes)) > 1)
    out, done = torch.full((9, sum(sizes)), torch.nan), torch.zeros(1, dtype=torch.int32)
    Graphs().run([Part("side by side", lambda: kernels.linear(x, weight, out))], done)
    own = [run_linear(x, kernels.pack(part, own)) for part, own in zip(parts, bias.split(sizes), strict=True)]
    assert torch.equal(out, torch.cat(own, 1))
    with libstars.record() as program:
        kernels.linear(x, weight, out)
    assert len(program) == max(len(weight.parts), 1)
    with references_only():
        wanted = torch.empty_like(out)
        kernels.linear(x, weight, wanted)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_what_cannot_be_packed_is_refused():
    library, buffer = loaded(), torch.zeros(4096, dtype=torch.uint8)
    at = buffer.data_ptr()

    def refusal(*arguments: object) -> str:
        assert library.stars_pack_quant(*arguments) == 1
        return str(library.stars_last_error(), "utf8")

    assert refusal(at, None, None, 0, 1, 32, 2, at).startswith("pack_quant: dtype must be of 4 to 8 bits")
    assert "multiple of the 256" in refusal(at, None, None, 0, 1, 32, 9, at)
    assert "multiple of the 32" in refusal(at, None, None, 0, 1, 33, 5, at)
    assert "scales must not be null" in refusal(at, None, None, 0, 1, 32, 3, at)
    assert "scales are in the blocks" in refusal(at, at, None, 32, 1, 32, 6, at)
    assert "no zeros" in refusal(at, at, at, 32, 1, 32, 5, at)
    assert "group must be" in refusal(at, at, at, 48, 1, 96, 12, at)
    assert "must not be null" in refusal(None, None, None, 0, 1, 32, 5, at)
    assert "must be positive" in refusal(at, None, None, 0, 0, 32, 5, at)
    assert "too large" in refusal(at, None, None, 0, 2**40, 2**40, 5, at)
    with pytest.raises(ValueError, match="stars_quant_bytes: in_features must be a multiple of the 32"):
        libstars.quant_bytes(1, 33, "Q4_0")
    with pytest.raises(ValueError, match="libstars has no products of fp8"):
        libstars.pack_quant(quantize(torch.ones(1, 32), "fp8"))
    with pytest.raises(ValueError, match="linear: in_features must be a multiple"):
        weight = kernels.pack(random_quant("q4_0", 3, 64))
        libstars.linear(torch.zeros(1, 33), weight.__class__(weight.values, None, 3, 33, True, format="Q4_0"),
                        torch.zeros(1, 3))
