"""Penalties on what was said already: the formula, and libstars bit for bit."""

from __future__ import annotations

import pytest
import torch

from penalty_cases import make_case, make_strange_case
from stars.bindings import libstars
from stars.kernels.apply_penalties import apply_penalties_reference
from stars.kernels.types import LaneState, Penalties


def by_hand(logits: torch.Tensor, state: LaneState, penalties: Penalties) -> torch.Tensor:
    """The formula token by token, in Python's own float64."""
    wanted = logits.clone()
    for lane in range(logits.shape[0]):
        begin, count = int(penalties.start[lane]), int(penalties.count[lane])
        committed = {int(token): int(times) for token, times in penalties.history[begin : begin + count]}
        own = state.out_tokens[lane, : int(state.steps[lane])].tolist()
        for token in range(logits.shape[1]):
            if state.done[lane] or not (token in committed or token in own):
                continue
            said = committed.get(token, 0) + own.count(token)
            z, r = float(logits[lane, token]), float(penalties.repetition[lane])
            z = z / r if z > 0 else z * r
            z -= float(penalties.frequency[lane]) * said
            z -= float(penalties.presence[lane]) if said else 0.0
            wanted[lane, token] = z
    return wanted


@pytest.mark.parametrize("seed", range(6))
def test_the_reference_is_the_formula(seed):
    logits, state, penalties = make_case(seed, lanes=5, vocab=61)
    got = logits.clone()
    apply_penalties_reference(got, state, penalties)
    assert torch.equal(got, by_hand(logits, state, penalties))
    assert not torch.equal(got, logits)


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lanes, vocab, steps, max_entries",
                         [(1, 17, 1, 10), (5, 257, 7, 60), (37, 1000, 33, 900), (3, 5000, 128, 4000)])
def test_libstars_forms_the_same_bits(seed, lanes, vocab, steps, max_entries):
    logits, state, penalties = make_case(seed, lanes, vocab, steps, max_entries)
    got, wanted = logits.clone(), logits.clone()
    libstars.apply_penalties(got, state, penalties)
    apply_penalties_reference(wanted, state, penalties)
    assert torch.equal(got, wanted)


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
def test_libstars_passes_over_what_is_not_in_the_vocabulary():
    logits, state, penalties = make_strange_case()
    penalties.count[1] = 1 << 20  # nor beyond the entries
    got = logits.clone()
    libstars.apply_penalties(got, state, penalties)
    changed = (got != logits).nonzero().tolist()
    assert changed == [[0, 3], [1, 3]]
