"""What stands beside drawn tokens, on a GPU's kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from logprob_cases import assert_same_top, hard_draws, make_draws
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    from stars.kernels.triton import top_logprobs as ours


@pytest.mark.parametrize(("lanes", "vocab", "most"), [(7, 5, 5), (13, 37, 3), (3, 2049, 20), (1, 4100, 1), (2, 17, 0)])
def test_as_the_reference(lanes, vocab, most):
    for own in (False, True):
        assert_same_top(ours.top_logprobs, *make_draws(vocab, lanes, vocab, most, own=own))


def test_rows_that_are_hard():
    assert_same_top(ours.top_logprobs, *hard_draws())


def test_many_tiles_whose_best_lie_in_one():
    logits, steps, tokens, top = make_draws(3, 1, 3 * 2048 + 5, most=20)
    logits[0, 2048 : 2048 + 20] = 50.0  # equal ones, in order
    wanted = assert_same_top(ours.top_logprobs, logits, steps, tokens, top)
    assert wanted.token_ids[0, 0].tolist() == list(range(2048, 2068))


def test_what_cannot_be_read():
    logits, steps, tokens, top = make_draws(1, 2, 5)
    with pytest.raises(ValueError, match=r"logits are torch.float64 \[2, 5\]"):
        ours.top_logprobs(logits.double(), steps, tokens, top)
    with pytest.raises(ValueError, match=r"told is \[1\], expected contiguous \[2\]"):
        ours.top_logprobs(logits, steps, tokens, top._replace(told=top.told[:1]))
    assert torch.equal(top.ranks, torch.full((2, 3), -7, dtype=torch.int32))


run_in_interpreter(globals())
