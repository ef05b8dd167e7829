"""The Triton kernel of the penalties in the interpreter, against its torch reference."""

from __future__ import annotations

import pytest
import torch

from penalty_cases import make_case, make_strange_case
from stars.kernels.apply_penalties import apply_penalties_reference
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    from stars.kernels.triton import apply_penalties as penalties_kernel

CASES = [(1, 17, 1, 10), (5, 257, 7, 60), (37, 1000, 33, 900), (3, 9000, 16, 8000), (2, 300, 128, 250)]


@pytest.mark.parametrize("lanes, vocab, steps, max_entries", CASES)
def test_bits_of_the_reference(lanes, vocab, steps, max_entries):
    for seed in range(3):
        logits, state, penalties = make_case(seed, lanes, vocab, steps, max_entries)
        wide = torch.full((lanes, vocab + 3), 7.0)
        got = wide[:, :vocab]  # rows lie apart
        got.copy_(logits)
        wanted = logits.clone()
        penalties_kernel.apply_penalties(got, state, penalties)
        apply_penalties_reference(wanted, state, penalties)
        assert torch.equal(got, wanted)
        assert bool((wide[:, vocab:] == 7.0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(dtype):
    """A rounding to float32 and one to the type, which the interpreter cuts instead: within two units."""
    logits, state, penalties = make_case(4, 7, 500, 9, 300)
    got, wanted = logits.to(dtype), logits.to(dtype)
    penalties_kernel.apply_penalties(got, state, penalties)
    apply_penalties_reference(wanted, state, penalties)
    torch.testing.assert_close(got.float(), wanted.float(), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_what_is_not_in_the_vocabulary_is_passed_over():
    logits, state, penalties = make_strange_case()
    got = logits.clone()
    penalties_kernel.apply_penalties(got, state, penalties)
    assert (got != logits).nonzero().tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize("wrong", ["history", "start", "logits"])
def test_what_does_not_fit_is_refused(wrong):
    logits, state, penalties = make_case(0, lanes=3, vocab=11)
    if wrong == "logits":
        logits = logits.double()
    else:
        penalties = penalties._replace(**{wrong: getattr(penalties, wrong)[:2].T})
    with pytest.raises(ValueError, match=wrong):
        penalties_kernel.apply_penalties(logits, state, penalties)


run_in_interpreter(globals())
