"""Biases, bans and masks of single tokens: the formula, and libstars bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from edit_cases import make_case, make_strange_case
from stars.bindings import libstars
from stars.kernels.edit_logits import edit_logits_reference
from stars.kernels.types import Edits, LaneState


def by_hand(logits: torch.Tensor, state: LaneState, edits: Edits) -> torch.Tensor:
    """The definition, token by token."""
    wanted = logits.clone()
    for lane in range(logits.shape[0]):
        if state.done[lane]:
            continue
        drawn = state.out_tokens[lane, : int(state.steps[lane])].tolist()
        start, first, mask_row = int(edits.start[lane]), int(edits.first_word[lane]), int(edits.mask_row[lane])
        entries = {token: (until, bias) for token, until, bias
                   in edits.entries[start : start + int(edits.count[lane])].tolist()}
        text = [token for token in edits.tail[lane].tolist() if token >= 0] + drawn
        words = [[token for token in word if token >= 0]
                 for word in edits.words[first : first + int(edits.word_count[lane])].tolist()]
        for token in range(logits.shape[1]):
            until, bits = entries.get(token, (0, 0))
            bias = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
            banned = until > int(edits.base[lane]) + len(drawn)
            if mask_row >= 0:
                banned |= not int(edits.masks[mask_row, token // 32]) >> (token % 32) & 1
            for word in words:
                banned |= word[-1] == token and text[len(text) - len(word) + 1 :] == word[:-1] \
                    and len(text) >= len(word) - 1
            wanted[lane, token] = -math.inf if banned else logits[lane, token] + bias
    return wanted


@pytest.mark.parametrize("seed", range(8))
def test_the_reference_is_the_definition(seed):
    logits, state, edits = make_case(seed, lanes=6, vocab=61)
    got = logits.clone()
    edit_logits_reference(got, state, edits)
    assert torch.equal(got, by_hand(logits, state, edits))
    assert not torch.equal(got, logits)


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("lanes, vocab, steps, max_entries",
                         [(1, 17, 1, 10), (5, 257, 7, 60), (37, 1000, 33, 900), (3, 33000, 128, 4000)])
def test_libstars_forms_the_same_bits(seed, lanes, vocab, steps, max_entries):
    logits, state, edits = make_case(seed, lanes, vocab, steps, max_entries)
    got, wanted = logits.clone(), logits.clone()
    libstars.edit_logits(got, state, edits)
    edit_logits_reference(wanted, state, edits)
    assert torch.equal(got, wanted)


EITHER = [edit_logits_reference, pytest.param(lambda *given: libstars.edit_logits(*given), marks=pytest.mark.skipif(
    not libstars.available(), reason="libstars was not built"))]


@pytest.mark.parametrize("run", EITHER)
def test_what_is_not_in_the_vocabulary_is_passed_over(run):
    logits, state, edits = make_strange_case()
    run(logits, state, edits)
    wanted = torch.ones(2, 11)
    wanted[:, 3], wanted[:, 4] = 1.5, -math.inf
    assert torch.equal(logits, wanted)


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
def test_libstars_reads_no_further_than_its_arrays():
    logits, state, edits = make_strange_case()
    huge = torch.tensor([1 << 30, 1 << 30], dtype=torch.int32)
    wanted = logits.clone()
    edit_logits_reference(wanted, state, edits)
    libstars.edit_logits(logits, state, edits._replace(count=huge, word_count=huge, mask_row=huge))
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize("run", EITHER)
def test_a_ban_holds_whatever_the_logit(run):
    logits, state, edits = make_strange_case()
    logits[:, 4] = math.nan
    run(logits, state, edits)
    assert logits[:, 4].tolist() == [-math.inf] * 2
