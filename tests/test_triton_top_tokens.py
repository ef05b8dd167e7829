"""The ranking of a GPU in Triton's interpreter, torch's part on the CPU: order, ties and filters as the reference's."""

from __future__ import annotations

import pytest
import torch

from ranking_cases import CASES, assert_same_ranking, hard_rows, make_ranking
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    from stars.kernels.triton import top_tokens as ours


@pytest.mark.parametrize(("name", "vocab"), [*((name, 37) for name in CASES), ("all, cooler", 5), ("top_p", 2049)])
def test_as_the_reference(name, vocab):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    logits[1] = (logits[1] * 2).round() / 2 + 0.0  # many ties
    assert_same_ranking(ours.top_tokens, logits, make_ranking(3, most=9, ranks=(7, 9, 0), **CASES[name]))


def test_rows_that_are_hard():
    logits, ranks = hard_rows()
    for filters in (False, True):
        given = make_ranking(len(logits), most=9, ranks=ranks, **(dict(top_p=0.95) if filters else {}))
        assert_same_ranking(ours.top_tokens, logits, given, filters)


def test_many_lanes_are_selected_from_in_parts(monkeypatch):
    monkeypatch.setattr(ours, "selection_rows", lambda vocab: 2)
    logits = torch.randn(5, 41, generator=torch.Generator().manual_seed(1))
    assert_same_ranking(ours.top_tokens, logits, make_ranking(5, most=4, ranks=(4, 0, 3, 1, 2)))


def test_what_cannot_be_ranked():
    with pytest.raises(ValueError, match=r"logits are torch.float64 \[2, 5\]"):
        ours.top_tokens(torch.zeros(2, 5).double(), make_ranking(2, most=3, ranks=(1, 1)))


run_in_interpreter(globals())
