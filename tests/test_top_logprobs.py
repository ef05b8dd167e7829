"""What stands beside drawn tokens: the CPU's operation and the reference."""

from __future__ import annotations

import math

import pytest
import torch

from logprob_cases import assert_same_top, hard_draws, make_draws
from sampler_lanes import make_lanes
from stars import kernels
from stars.bindings import libstars
from stars.kernels.dispatch import references_only
from stars.kernels.top_logprobs import top_logprobs_reference
from stars.kernels.types import TopLogprobs

needs_libstars = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")


@needs_libstars
@pytest.mark.parametrize(("lanes", "vocab", "most"), [
    (7, 5, 5), (13, 37, 3), (6, 257, 0), (9, 1025, 20), (3, 49153, 20), (1, 17, 1)])
def test_the_cpu_agrees_with_the_reference(lanes, vocab, most):
    for own in (False, True):
        assert_same_top(kernels.top_logprobs, *make_draws(vocab + lanes, lanes, vocab, most, own=own))


@needs_libstars
def test_rows_that_are_hard():
    assert_same_top(kernels.top_logprobs, *hard_draws())


def test_the_definition():
    """By hand: of softmax probabilities 0.5, 0.25, 0.125, 0.125, where the last two are equal."""
    logits = torch.tensor([[0.125, 0.5, 0.0, 0.25, 0.125]]).log()
    one = torch.ones(1, dtype=torch.int32)
    top = TopLogprobs(one * 5, one * 0, one[None] * 9, torch.zeros(1, 1, 5, dtype=torch.int32), torch.zeros(1, 1, 5),
                      torch.zeros(1, 1))
    top_logprobs_reference(logits, one, one[None] * 4, top)
    assert top.token_ids.tolist() == [[[1, 3, 0, 4, -1]]] and top.ranks.item() == 4 and top.told.item() == 1
    assert top.logprobs[0, 0].tolist() == pytest.approx([math.log(p) if p else -math.inf
                                                         for p in (0.5, 0.25, 0.125, 0.125, 0.0)], abs=1e-6)
    assert top.own.item() == pytest.approx(math.log(0.125), abs=1e-6)


@needs_libstars
@pytest.mark.parametrize("reference", [False, True])
def test_a_draft_step_is_told_once_and_with_the_samplers_bits(reference):
    """Behind the sampler, step by step: a lane that has ended, or was cut, is told no further, and what the sampler
    says of its token has the bits that stand in the list."""
    lanes = make_lanes(4, max_steps=3)
    lanes.max_tokens[0] = 1
    lanes.entropy_cut[1] = 0.0  # at once
    top = TopLogprobs(torch.tensor([7, 7, 7, -1], dtype=torch.int32), torch.zeros(4, dtype=torch.int32),
                      *(torch.full((4, 3, *more), -7, dtype=dtype) for more, dtype in (
                          ((), torch.int32), ((7,), torch.int32), ((7,), torch.float32))))
    draw = torch.Generator().manual_seed(5)
    for step in range(3):
        logits = torch.randn(4, 7, generator=draw)
        for run in ([references_only()] if reference else [torch.no_grad()]):
            with run:
                kernels.sample_step(logits, lanes)
                kernels.top_logprobs(logits, lanes.steps, lanes.out_tokens, top)
        assert top.told.tolist() == [1, 0, step + 1, 0] == [*lanes.steps.tolist()[:3], 0]
    assert (top.ranks[1] == -7).all() and (top.ranks[3] == -7).all() and (top.ranks[0, 1:] == -7).all()
    for lane, step in ((0, 0), (2, 0), (2, 1), (2, 2)):
        token, place = lanes.out_tokens[lane, step], top.ranks[lane, step] - 1
        assert top.token_ids[lane, step, place] == token
        assert top.logprobs[lane, step, place] == lanes.out_logprobs[lane, step]
        assert sorted(top.token_ids[lane, step].tolist()) == list(range(7))
