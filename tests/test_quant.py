"""Weights in 8 and 4 bits: rounding within derived bounds, layouts, what is refused, and products on the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from stars import kernels
from stars.bindings import libstars
from stars.kernels import quant as quant_module
from stars.kernels.dispatch import references_only
from stars.kernels.graph import Graphs, Part
from stars.kernels.quant import FP8, QuantWeight, check, dequantize, quantize

SCHEMES = [("fp8", 0, False), ("int8", 0, False), ("int4", 32, False), ("int4", 128, False), ("int4", 32, True),
           ("int4", 128, True)]
NAMES = [f"{scheme}-{group}{' zeros' if zeros else ''}" for scheme, group, zeros in SCHEMES]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, one of positive numbers only."""
    matrix = numbers(rows, columns, seed=seed) * torch.logspace(-3, 2, rows)[:, None]
    matrix[rows // 2] = 0.0
    matrix[rows // 3] = matrix[rows // 3].abs() + 1.0
    return matrix


# -- rounding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme, group, asymmetric", SCHEMES, ids=NAMES)
def test_no_weight_is_further_away_than_half_a_step(scheme, group, asymmetric, dtype):
    matrix = weights(17, 384).to(dtype)
    quant = quantize(matrix, scheme, group, asymmetric)
    check(quant)
    error = (dequantize(quant) - matrix.float()).abs()
    scales = quant.scales.float()[:, None] if group == 0 else quant.scales.float().repeat_interleave(group, 1)
    if scheme == "fp8":  # three bits behind the point; below the normal numbers, 2^-6, steps of 2^-9
        bound = torch.maximum(matrix.float().abs() * 2.0**-4, scales * 2.0**-10)
    else:  # a scale in float16 is off by 2^-11, and with it the ends of the range, by no more than 15 steps of that
        bound = scales / 2 + (15 * 2.0**-11 * scales if group else 0.0)
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert bool((dequantize(quant)[17 // 2] == 0).all())


def test_the_largest_weight_of_a_row_is_kept():
    matrix = weights(17, 96)
    for scheme in ("fp8", "int8"):
        kept = dequantize(quantize(matrix, scheme)).abs().amax(1)
        torch.testing.assert_close(kept, matrix.abs().amax(1), rtol=1e-6, atol=0)


def test_zeros_use_the_whole_range():
    """Weights of one sign: sixteen steps between 0 and the largest, where a symmetric group has eight."""
    matrix = numbers(9, 128).abs() + 1.0
    off = [(dequantize(quantize(matrix, "int4", 32, asymmetric)) - matrix).abs().max() for asymmetric in (False, True)]
    assert off[1] < 0.6 * off[0]
    assert bool((quantize(matrix, "int4", 32, True).zeros == 0).all())
    assert bool((quantize(-matrix, "int4", 32, True).zeros == 15).all())


def test_scales_of_groups_are_float16_where_that_holds_them():
    assert quantize(numbers(5, 64), "int4", 32).scales.dtype == torch.float16
    for factor in (1e-6, 1e6):
        quant = quantize(numbers(5, 64) * factor, "int4", 32)
        assert quant.scales.dtype == torch.float32
        off = (dequantize(quant) - numbers(5, 64) * factor).abs().view(5, 2, 32)
        assert bool((off <= 0.5001 * quant.scales[:, :, None]).all())


def test_tiny_weights_stay_finite():
    matrix = torch.tensor([[1e-45, -1e-40, 1e-38, 0.0] * 32])
    for scheme, group, asymmetric in SCHEMES:
        assert bool(dequantize(quantize(matrix, scheme, group, asymmetric)).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group, asymmetric", [(32, False), (128, True)])
def test_rounding_the_scales_of_groups_costs_a_product_little(group, asymmetric, dtype):
    """A GPU multiplies steps by scales in the activations' type: two roundings of a weight, where a matrix of that type
    has one. Independent errors, so about 1.4 times as large together; twice is what a kernel may have."""
    x, matrix = numbers(8, 1024, seed=3).to(dtype).double(), numbers(256, 1024, seed=4)
    quant = quantize(matrix, "int4", group, asymmetric)
    exact = dequantize(quant)
    steps = (exact.view(256, -1, group) / quant.scales.float()[:, :, None]).round()
    ours = (steps.to(dtype) * quant.scales.to(dtype)[:, :, None]).view(256, 1024)
    wanted = x @ exact.double().T
    error, plain = ((x @ rounded.double().T - wanted).square().mean().sqrt() for rounded in (ours, exact.to(dtype)))
    assert 0 < error < 1.6 * plain and plain < 2 * torch.finfo(dtype).eps * wanted.square().mean().sqrt()


# -- layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "group", "asymmetric"), [("int8", 0, False), ("fp8", 0, False), ("int4", 32, True)])
def test_rows_are_rounded_alike_however_many_at_once(monkeypatch, scheme, group, asymmetric):
    """As torch.round does, ties to even: half steps of int8 are exact in rows whose largest weight is 127."""
    matrix = torch.randn(13, 96, generator=torch.Generator().manual_seed(3)) * 40
    matrix[:, :32] = torch.arange(32) - 15.5
    matrix[:, 32] = 127.0
    matrix.clamp_(-127.0, 127.0)
    whole = quantize(matrix, scheme, group, asymmetric)
    monkeypatch.setattr(quant_module, "PIECE", 5 * 96)
    for ours, expected in zip(quantize(matrix, scheme, group, asymmetric)[:3], whole[:3], strict=True):
        assert ours is None and expected is None or torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))
    if scheme == "int8":
        assert torch.equal(whole.values, matrix.round().to(torch.int8))


def test_the_low_nibble_is_the_even_column():
    values = torch.zeros(2, 16, dtype=torch.uint8)
    values[1, 3] = 0x2F  # column 6: 15, column 7: 2
    quant = QuantWeight(values, torch.full((2, 1), 0.5), None, 32, "int4")
    wanted = torch.full((2, 32), -4.0)
    wanted[1, 6], wanted[1, 7] = 3.5, -3.0
    assert torch.equal(dequantize(quant), wanted)
    zeros = torch.tensor([[0], [15]], dtype=torch.uint8)
    shifted = dequantize(quant._replace(zeros=zeros))
    assert float(shifted[0, 0]) == 0.0 and float(shifted[1, 0]) == -7.5 and float(shifted[1, 6]) == 0.0


def test_each_group_has_its_own_scale_and_zero():
    values = torch.full((1, 32), 0x19, dtype=torch.uint8)  # 9 in even columns, 1 in odd ones
    quant = QuantWeight(values, torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 9]], dtype=torch.uint8), 32, "int4")
    dense = dequantize(quant, torch.float16)
    assert dense.dtype == torch.float16
    assert dense[0, :32].tolist() == [8.0, 0.0] * 16 and dense[0, 32:].tolist() == [0.0, -16.0] * 16


def test_what_a_matrix_takes():
    shapes = {"fp8": 17 * 384 + 17 * 4, "int8": 17 * 384 + 17 * 4, "int4-32": 17 * 192 + 17 * 12 * 2,
              "int4-128": 17 * 192 + 17 * 3 * 2}
    for scheme, group, asymmetric in SCHEMES:
        quant = quantize(numbers(17, 384), scheme, group, asymmetric)
        assert (quant.out_features, quant.in_features) == (17, 384)
        assert quant.nbytes == shapes[quant.name] + (17 * 384 // group if asymmetric else 0)


# -- what is refused ----------------------------------------------------------------------------------------------

EIGHT, FOUR = quantize(numbers(3, 64), "int8"), quantize(numbers(3, 64), "int4", 32, asymmetric=True)


@pytest.mark.parametrize("message, call", [
    ("scheme is 'nf4', it must be one of fp8, int8, int4", lambda: quantize(numbers(3, 64), "nf4")),
    ("int4: group is 48, it must be 32 or 64 or 128", lambda: quantize(numbers(3, 96), "int4", 48)),
    ("int8: group is 32, it must be 0", lambda: quantize(numbers(3, 64), "int8", 32)),
    ("int4-128: in_features is 192, it must be a multiple of the group of 128",
     lambda: quantize(numbers(3, 192), "int4", 128)),
    ("fp8 has no zeros", lambda: quantize(numbers(3, 64), "fp8", asymmetric=True)),
    ("matrix is torch.int64 [2, 2]", lambda: quantize(torch.ones(2, 2, dtype=torch.int64), "fp8")),
    ("matrix is torch.float32 [4]", lambda: quantize(torch.ones(4), "fp8")),
    ("matrix has NaN or infinity", lambda: quantize(torch.tensor([[1.0, float("inf")]]), "int8")),
    ("int8: values are torch.uint8", lambda: check(EIGHT._replace(values=EIGHT.values.view(torch.uint8)))),
    ("int8: scales are torch.float32 [2], give torch.float32 [3]", lambda: check(EIGHT._replace(scales=torch.ones(2)))),
    ("int8: scales are torch.float16", lambda: check(EIGHT._replace(scales=EIGHT.scales.half()))),
    ("int8: zeros are torch.uint8 [3, 2], give None", lambda: check(EIGHT._replace(zeros=FOUR.zeros))),
    ("int4-32: scales are torch.float32 [3]", lambda: check(FOUR._replace(scales=torch.ones(3)))),
    ("int4-32: zeros are torch.int8 [3, 2], give torch.uint8 [3, 2]",
     lambda: check(FOUR._replace(zeros=FOUR.zeros.to(torch.int8)))),
    ("int4-128: in_features is 64", lambda: kernels.pack(FOUR._replace(group=128))),
    ("int4-32: values are not contiguous", lambda: check(FOUR._replace(values=FOUR.values.t().contiguous().t()))),
])
def test_what_does_not_fit_is_named(message, call):
    with pytest.raises(ValueError) as raised:
        call()
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("scheme, group, asymmetric", SCHEMES, ids=NAMES)
def test_an_embedding_gives_rows_of_the_dequantised_matrix(scheme, group, asymmetric):
    """Of what libstars packed, of what it has no format for, and by the reference."""
    quant, ids = quantize(weights(35, 128), scheme, group, asymmetric), torch.tensor([33, 0, 2, 0], dtype=torch.int32)
    for column in (nullcontext(), references_only()):
        out = torch.full((4, 128), torch.nan)
        with column:
            kernels.embedding(ids, kernels.pack(quant), out)
        assert torch.equal(out, dequantize(quant)[ids.long()])


# -- products on the CPU (libstars' own: test_quant_products.py) ----------------------------------------------------


@pytest.mark.parametrize("scheme, group, asymmetric", SCHEMES, ids=NAMES)
def test_the_reference_multiplies_by_the_dequantised_matrix(scheme, group, asymmetric):
    quant, bias, x = quantize(weights(17, 384), scheme, group, asymmetric), numbers(17, seed=1), numbers(5, 384, seed=2)
    weight = kernels.pack(quant, bias.to(torch.bfloat16))
    assert torch.equal(weight.dense(), dequantize(quant))
    out = torch.empty(5, 17)
    with references_only():
        kernels.linear(x, weight, out)
    assert torch.equal(out, torch.nn.functional.linear(x, dequantize(quant), bias.to(torch.bfloat16).float()))


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
def test_a_recording_does_not_forget_what_libstars_has_no_operation_for():
    """A step with a quantised product runs whole every time, beside one of libstars' own products alone."""
    quant = quantize(numbers(3, 64), "fp8")
    first, second = kernels.pack(numbers(64, 64)), kernels.pack(quant)
    x, between, out = torch.empty(2, 64), torch.empty(2, 64), torch.empty(2, 3)
    done = torch.zeros(1, dtype=torch.int32)

    def step() -> None:
        kernels.linear(x, first, between)
        kernels.linear(between, second, out)

    graphs = Graphs()
    for seed in range(3):
        x.copy_(numbers(2, 64, seed=seed))
        assert graphs.run([Part("a step", step)], done) == 1
        wanted = torch.nn.functional.linear(between, dequantize(quant))
        assert torch.equal(out, wanted)
    with libstars.record() as program:
        kernels.linear(x, first, between)
    assert len(program) == 1
    with libstars.record() as program:
        step()
    assert len(program) == 0
    with pytest.raises(RuntimeError, match="left out an operation"):
        program.run(1, done)


def test_values_of_fp8_are_the_format_of_the_cards():
    assert quantize(torch.tensor([[448.0, 1.0, -0.3]]), "fp8").values.dtype == FP8
    assert quantize(torch.tensor([[448.0, 1.0, -0.3]]), "fp8").values.float().tolist() == [[448.0, 1.0, -0.3125]]
