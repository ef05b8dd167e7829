"""Blended logits: the reference against the formula in numpy, libstars against the reference's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blend_cases import STRANGE, make_blend, make_strange_blend
from stars.bindings import libstars
from stars.kernels import blend_logits
from stars.kernels.blend_logits import blend_logits_reference

CASES = [(1, 1, 1, 1), (2, 5, 5, 37), (3, 9, 4, 513), (2, 3, 2, 40_000), (4, 2, 2, 7)]
EITHER = [blend_logits_reference, pytest.param(blend_logits, marks=pytest.mark.skipif(
    not libstars.available(), reason="libstars was not built"))]


@pytest.mark.parametrize("models, room, lanes, vocab", CASES)
@pytest.mark.parametrize("blend", EITHER)
def test_the_weighted_sum_of_the_models_that_are_read(blend, models, room, lanes, vocab):
    """Rounded once from float64; lanes that are done, and rows beyond the lanes, are left as they are."""
    logits, weights, done, out = make_blend(vocab, models, room, lanes, vocab)
    blend(logits, weights, done, out)
    for lane in range(lanes):
        read = [model for model in range(models) if weights[model, lane] != 0]
        if done[lane]:
            assert bool((out[lane] == 7.0).all())
            continue
        rows = logits[read, lane].double().numpy()  # [read, vocab]
        with np.errstate(invalid="ignore"):
            total = sum((float(weights[model, lane]) * row for model, row in zip(read, rows)), np.zeros(vocab))
        total[(rows == -np.inf).any(axis=0)] = -np.inf
        assert np.array_equal(out[lane].numpy(), total.astype(np.float32))


@pytest.mark.parametrize("blend", EITHER)
def test_what_is_no_number_or_infinite(blend):
    logits, weights, done, out = make_strange_blend()
    blend(logits, weights, done, out)
    assert [str(float(value)) for value in out[:, 1]] == STRANGE
    expected = weights[0] * logits[0, :, 0] + weights[1] * logits[1, :, 0]
    assert torch.equal(out[:, 0], expected)


@pytest.mark.parametrize("blend", EITHER)
def test_the_result_may_lie_where_a_model_has_its_logits(blend):
    for own in (0, 1, 2):
        logits, weights, done, out = make_blend(3, 3, 6, 4, 1030)
        blend(logits, weights, done, out)
        out[done != 0] = logits[own, :4][done != 0]
        blend(logits, weights, done, logits[own, :4])
        assert torch.equal(logits[own, :4].nan_to_num(nan=9.0), out.nan_to_num(nan=9.0))


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
@pytest.mark.parametrize("models, room, lanes, vocab", CASES)
def test_bits_of_the_reference(models, room, lanes, vocab):
    for seed in range(3):
        given = make_blend(seed, models, room, lanes, vocab)
        wanted = given[3].clone()
        blend_logits(*given)
        blend_logits_reference(*given[:3], wanted)
        assert torch.equal(given[3], wanted)


@pytest.mark.parametrize("blend", EITHER)
@pytest.mark.parametrize("wrong", ["weights", "done", "out"])
def test_what_does_not_fit_is_refused(blend, wrong):
    logits, weights, done, out = make_blend(0, 2, 3, 3, 11)
    given = {"weights": weights, "done": done, "out": out}
    given[wrong] = torch.zeros(3, 12, dtype=given[wrong].dtype)
    with pytest.raises(ValueError, match=wrong):
        blend(logits, given["weights"], given["done"], given["out"])
