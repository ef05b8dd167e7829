"""The Triton kernel that blends logits in the interpreter, against its torch reference."""

from __future__ import annotations

import pytest
import torch

from blend_cases import STRANGE, make_blend, make_strange_blend
from stars.kernels.blend_logits import blend_logits_reference
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    from stars.kernels.triton import blend_logits as blend_kernel


@pytest.mark.parametrize("models, room, lanes, vocab", [(1, 1, 1, 1), (2, 5, 5, 37), (3, 9, 4, 1025), (2, 2, 1, 5000)])
def test_bits_of_the_reference(models, room, lanes, vocab):
    for seed in range(3):
        logits, weights, done, wanted = make_blend(seed, models, room, lanes, vocab)
        wide = torch.full((lanes, vocab + 3), 7.0)  # rows lie apart
        blend_kernel.blend_logits(logits, weights, done, wide[:, :vocab])
        blend_logits_reference(logits, weights, done, wanted)
        assert torch.equal(wide[:, :vocab], wanted) and bool((wide[:, vocab:] == 7.0).all())


def test_the_result_may_lie_where_a_model_has_its_logits():
    logits, weights, done, wanted = make_blend(3, 2, 4, 3, 1030)
    blend_logits_reference(logits, weights, done, wanted)
    wanted[done != 0] = logits[0, :3][done != 0]
    blend_kernel.blend_logits(logits, weights, done, logits[0, :3])
    assert torch.equal(logits[0, :3].nan_to_num(nan=9.0), wanted.nan_to_num(nan=9.0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a float32 cannot hold
def test_what_is_no_number_or_infinite():
    logits, weights, done, out = make_strange_blend()
    blend_kernel.blend_logits(logits, weights, done, out)
    assert [str(float(value)) for value in out[:, 1]] == STRANGE


@pytest.mark.parametrize("wrong", ["logits", "weights", "done", "out"])
def test_what_does_not_fit_is_refused(wrong):
    given = dict(zip(("logits", "weights", "done", "out"), make_blend(0, 2, 3, 3, 11), strict=True))
    given[wrong] = given[wrong].double()
    with pytest.raises(ValueError, match=wrong):
        blend_kernel.blend_logits(**given)


run_in_interpreter(globals())
