"""Products of weights of arithmetic "bfloat16": pairs of bfloat16 values where the machine multiplies such, else as
before in float32.

Tolerances are derived. A product of two bfloat16 values is exact in float32. So a sum of K of them, in any order, errs
by at most K u / (1 - K u) times the sum of their magnitudes with u = 2^-24. (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1.) Rounding a value to bfloat16 changes it by at most 2^-8 of itself.
"""

from __future__ import annotations

import pytest
import torch

from instruction_sets import load_copy
from libstars_threads import threads
from random_products import random_case
from random_products import run_linear as product
from stars import kernels
from stars.bindings import library, libstars
from stars.bindings.library import loaded

pytestmark = [pytest.mark.threads, pytest.mark.skipif(not libstars.available(), reason="libstars was not built")]

U = 2.0**-24
ROUNDING = 2.0**-8
SHAPES = ((1, 1), (2, 3), (7, 3), (31, 33), (33, 31), (100, 65), (255, 129), (513, 70), (641, 333), (256, 2048))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A library of each instruction set that this machine has."""
    found = {name: load_copy(name, tmp_path_factory.mktemp(name)) for name in ("base", "avx2", "avx512", "avx512_bf16")}
    return {name: library for name, library in found.items() if library is not None}


@pytest.fixture(params=["base", "avx2", "avx512", "avx512_bf16"])
def instruction_set(request, libraries, monkeypatch):
    if request.param not in libraries:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(library, "_lib", libraries[request.param])
    return request.param


def packed(matrix: torch.Tensor, bias: torch.Tensor | None = None) -> kernels.Weight:
    return kernels.pack(matrix, bias, arithmetic="bfloat16")


@pytest.mark.parametrize("in_features, out_features", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 17, 123])
def test_products_are_within_the_bound_of_a_float32_sum(rows, in_features, out_features, instruction_set):
    x, matrix, bias = random_case(in_features, out_features, torch.float32, rows)
    used = x.bfloat16() if instruction_set == "avx512_bf16" else x
    for given in (None, bias):
        rounded = matrix.bfloat16().double()
        exact, magnitude = used.double() @ rounded.T, used.double().abs() @ rounded.abs().T
        if given is not None:
            exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
        terms = in_features + (given is not None)
        error = (product(x, packed(matrix, given)).double() - exact).abs()
        assert (error <= terms * U / (1 - terms * U) * magnitude).all()


@pytest.mark.parametrize("in_features, out_features", [(37, 33), (300, 100), (257, 1409), (704, 256)])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(in_features, out_features, instruction_set):
    x, matrix, bias = random_case(in_features, out_features, torch.float32, 150)
    weight = packed(matrix, bias)
    everything = product(x, weight)
    for rows in (*range(1, 41), 64, 65, 127):
        assert torch.equal(product(x[:rows], weight), everything[:rows])
        assert torch.equal(product(x[-rows:], weight), everything[-rows:])


@pytest.mark.parametrize("in_features", [300, 301])
@pytest.mark.parametrize("rows", [1, 2, 9, 33, 200])
def test_bits_do_not_depend_on_the_number_of_threads(rows, in_features, instruction_set):
    x, matrix, bias = random_case(in_features, 1409, torch.float32, rows)
    weight = packed(matrix, bias)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count):
            results.append(product(x, weight))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("in_features, out_features", SHAPES)
def test_without_the_instruction_nothing_but_the_matrix_is_rounded(in_features, out_features, instruction_set):
    """Those products have the bits of the rounded matrix in float32; the others are as far off as x was rounded."""
    x, matrix, bias = random_case(in_features, out_features, torch.float32, 37)
    expected, got = product(x, kernels.pack(matrix.bfloat16(), bias)), product(x, packed(matrix, bias))
    if instruction_set != "avx512_bf16":
        assert torch.equal(got, expected)
        return
    terms = in_features + 1
    magnitude = x.double().abs() @ matrix.bfloat16().double().abs().T + bias.double().abs()
    bound = ROUNDING + 2 * terms * U / (1 - terms * U) * (1 + ROUNDING)
    assert ((got.double() - expected.double()).abs() <= bound * magnitude).all()
    assert in_features < 100 or not torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_have_the_same_bits_as_before(dtype, libraries, monkeypatch):
    if "avx512_bf16" not in libraries:
        pytest.skip("this machine has no avx512_bf16")
    for rows in (1, 3, 8, 13, 70):
        x, matrix, bias = random_case(257, 333, torch.float32, rows)
        results = []
        for name in ("avx512", "avx512_bf16"):
            monkeypatch.setattr(library, "_lib", libraries[name])
            results.append(product(x, kernels.pack(matrix.to(dtype), bias)))
        assert torch.equal(*results)


def test_activations_are_rounded_to_nearest_even(instruction_set):
    """Through the unit matrix: what comes out is what x was rounded to."""
    if instruction_set != "avx512_bf16":
        pytest.skip("x is rounded by avx512_bf16 alone")
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3e38, 1e-30, -0.0]
    x = torch.cat((torch.tensor(ties), torch.randn(34)))[None]
    assert torch.equal(product(x, packed(torch.eye(41))), x.bfloat16().float())
    subnormal = torch.tensor([[1e-39]])
    assert product(subnormal, packed(torch.ones(1, 1))).item() == 0.0
    assert product(torch.tensor([[torch.nan]]), packed(torch.ones(1, 1))).isnan().all()
    assert product(torch.tensor([[torch.inf]]), packed(torch.ones(1, 1))).isinf().all()


@pytest.mark.parametrize("in_features, out_features", SHAPES)
def test_pack_rounds_the_matrix(in_features, out_features, instruction_set):
    _, matrix, bias = random_case(in_features, out_features, torch.float32, 1)
    weight = packed(matrix, bias)
    assert (weight.arithmetic, weight.dtype, kernels.pack(matrix).arithmetic) == ("bfloat16", torch.bfloat16, "float32")
    assert torch.equal(weight.dense(), matrix.bfloat16()) and torch.equal(weight.bias, bias)
    token_ids = torch.arange(out_features, dtype=torch.int32)
    out = torch.empty(out_features, in_features)
    kernels.embedding(token_ids, weight, out)
    assert torch.equal(out, matrix.bfloat16().float())


def test_the_name_of_the_instruction_set(instruction_set):
    assert libstars.isa() == instruction_set


def test_float32_matrices_and_unknown_types_are_refused():
    with pytest.raises(ValueError, match="pack: matrix is float32"):
        libstars.pack(torch.ones(2, 2), arithmetic="bfloat16")
    assert loaded().stars_packed_bytes(4, 4, 3) == 0
    assert loaded().stars_packed_bytes(4, 3, 2) == loaded().stars_packed_bytes(4, 4, 2) > 0
