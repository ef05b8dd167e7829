"""Ranking the vocabulary: the CPU's way beside the reference and beside a sort by hand, ties and filters to the letter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
import stars
from ranking_cases import CASES, assert_same_ranking, hard_rows, make_ranking
from stars.kernels import top_tokens
from stars.kernels.top_tokens import _on_the_host, top_tokens_reference

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("vocab", [1, 5, 37, 997, 6000])
@pytest.mark.parametrize("name", CASES)
def test_the_host_agrees_with_the_reference(name, vocab):
    """Odd sizes; from some 2,000 tokens on, maxima of groups bound what is looked at, which does not divide evenly."""
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    logits[1] = (logits[1] * 2).round() / 2  # many ties, zeros of both signs
    logits[2, ::2] = -torch.inf
    assert_same_ranking(_on_the_host, logits, make_ranking(4, most=9, ranks=(7, 9, 9, 0), **CASES[name]))


def test_rows_that_are_hard():
    logits, ranks = hard_rows()
    assert_same_ranking(_on_the_host, logits, make_ranking(len(logits), most=9, ranks=ranks))
    given = make_ranking(len(logits), most=9, ranks=ranks)
    top_tokens_reference(logits, given)
    found = [[token for token in row if token >= 0] for row in given.token_ids.tolist()]
    assert found == [[2, 5, 0, 1, 3, 4, 6], [1, 4], [], [], [], [0, 1, 2, 3], [2, 3, 5, 4, 0, 1, 6]]
    wanted = [-0.00671535, -5.00671535, -np.inf]
    np.testing.assert_allclose(given.logprobs[1, :3].numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("filters", [{}, dict(top_k=5), dict(top_p=0.8), dict(min_p=0.1), dict(
    temperature=0.6, min_p=0.05, top_k=7, top_p=0.9)], ids=str)
@pytest.mark.parametrize("rank", [top_tokens, top_tokens_reference])
def test_what_is_found_is_what_may_be_drawn(rank, filters):
    """The tokens of the proposal as the oracle of the law has it, the most probable first."""
    logits = torch.randn(1, 23, generator=torch.Generator().manual_seed(3)) * 1.5
    given = make_ranking(1, most=23, ranks=(23,), **filters)
    rank(logits, given)
    proposal = oracle.proposal(logits[0].double().numpy(), stars.SamplingParams(**filters))
    kept = [token for token in np.argsort(-proposal, kind="stable").tolist() if proposal[token] > -np.inf]
    assert given.token_ids[0].tolist() == kept + [-1] * (23 - len(kept))
    wanted = oracle.log_softmax(logits[0].numpy())[kept]
    np.testing.assert_allclose(given.logprobs[0, : len(kept)].numpy(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [_on_the_host, top_tokens_reference])
def test_what_cannot_be_ranked(rank):
    with pytest.raises(ValueError, match=r"logits are torch.float64 \[2, 5\], expected float32 \[2, vocab\]"):
        rank(torch.zeros(2, 5).double(), make_ranking(2, most=3, ranks=(1, 1)))
    with pytest.raises(ValueError, match="a lane wants 4 tokens and there are columns for 3"):
        rank(torch.zeros(2, 5), make_ranking(2, most=3, ranks=(1, 4)))
    with pytest.raises(ValueError, match="call it with filters=True"):
        top_tokens_reference(torch.zeros(2, 5), make_ranking(2, most=3, ranks=(1, 0), top_p=0.5), filters=False)
