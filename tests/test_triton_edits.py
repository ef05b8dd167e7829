"""The Triton kernel of the edits in the interpreter, against its torch reference."""

from __future__ import annotations

import pytest
import torch

from edit_cases import make_case, make_strange_case
from stars.kernels.edit_logits import edit_logits_reference
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    from stars.kernels.triton import edit_logits as edits_kernel

CASES = [(1, 17, 1, 10), (5, 257, 7, 60), (37, 1000, 33, 900), (3, 9000, 16, 8000), (2, 300, 128, 250)]


@pytest.mark.parametrize("lanes, vocab, steps, max_entries", CASES)
def test_bits_of_the_reference(lanes, vocab, steps, max_entries):
    for seed in range(3):
        logits, state, edits = make_case(seed, lanes, vocab, steps, max_entries)
        wide = torch.full((lanes, vocab + 3), 7.0)
        got = wide[:, :vocab]  # rows lie apart
        got.copy_(logits)
        wanted = logits.clone()
        edits_kernel.edit_logits(got, state, edits)
        edit_logits_reference(wanted, state, edits)
        assert torch.equal(got, wanted)
        assert bool((wide[:, vocab:] == 7.0).all())


def test_what_is_not_in_the_vocabulary_is_passed_over():
    logits, state, edits = make_strange_case()
    wanted = logits.clone()
    edits_kernel.edit_logits(logits, state, edits)
    edit_logits_reference(wanted, state, edits)
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize("wrong", ["entries", "mask_row", "tail", "masks", "logits"])
def test_what_does_not_fit_is_refused(wrong):
    logits, state, edits = make_case(0, lanes=3, vocab=37)
    if wrong == "logits":
        logits = logits.double()
    else:
        edits = edits._replace(**{wrong: getattr(edits, wrong).T.reshape(-1)[:2]})
    with pytest.raises(ValueError, match=wrong):
        edits_kernel.edit_logits(logits, state, edits)


run_in_interpreter(globals())
