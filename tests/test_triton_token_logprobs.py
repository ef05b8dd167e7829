"""Log-probabilities of given tokens by Triton's kernel, in the interpreter: values and rows that are hard."""

from __future__ import annotations

import math

import pytest
import torch

from stars.kernels.token_logprobs import _on_the_host, token_logprobs_reference
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    from stars.kernels.triton.token_logprobs import BLOCK, token_logprobs

INF, NAN = math.inf, math.nan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities that the kernel means


def test_as_the_reference():
    """Rows of one block and of several; logits lie apart, as those of a room for more."""
    for vocab in (1, 37, BLOCK, 2 * BLOCK + 5):
        logits = (torch.randn(4, vocab + 3, generator=torch.Generator().manual_seed(vocab)) * 4)[:, :vocab]
        targets = torch.tensor([[0, vocab - 1, -1], [vocab // 2, 0, 0]] * 2, dtype=torch.int32)
        ours, wanted = torch.full((4, 3), NAN), torch.full((4, 3), NAN)
        token_logprobs(logits, targets, ours)
        token_logprobs_reference(logits, targets, wanted)
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=4e-6)  # float32 sums in another order
        exact = torch.log_softmax(logits.double(), dim=-1).gather(1, targets.long().clamp(min=0)).float()
        torch.testing.assert_close(ours, torch.where(targets < 0, 0.0, exact), rtol=1e-6, atol=4e-6)


def test_rows_that_are_hard():
    rows = [[0.0, -INF, 0.0], [-INF, -INF, 1.0], [3e38, -3e38, 3e38], [NAN, 0.0, 0.0], [0.0, INF, 0.0],
            [-INF, -INF, -INF], [NAN, 0.0, INF]]
    targets = torch.tensor([[1], [2], [0], [1], [0], [0], [-1]], dtype=torch.int32)
    wanted = torch.tensor([[-INF], [0.0], [-math.log(2.0)], [NAN], [NAN], [NAN], [0.0]])
    for compute in (token_logprobs, token_logprobs_reference, _on_the_host):
        found = torch.zeros(len(rows), 1)
        compute(torch.tensor(rows), targets, found)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_what_has_no_log_probabilities():
    one = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"logits are torch.float64 \[2, 5\]"):
        token_logprobs(torch.zeros(2, 5).double(), one, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"targets are \[2, 1\] and logprobs \[2, 3\] for 2 rows"):
        token_logprobs(torch.zeros(2, 5), one, torch.zeros(2, 3))


run_in_interpreter(globals())
