"""Random streams to their ends, flat tails and ties in the Triton sampler and interpreter; as in test_streams.py."""

from __future__ import annotations

import pytest
import torch

import oracle
from sampler_lanes import assert_same_step, make_lanes, tied_rows
from stars.kernels import philox
from stars.kernels.sample_step import sampling_threshold
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    from stars.kernels.triton import sample_step

SAMPLES = (0, 2048, 4095)
SEEDS = (5, 2**63 + 5, 2**64 - 1)
PAIRS = [(seed, sample) for seed in SEEDS for sample in SAMPLES]
VOCAB = 9001  # five tiles, the last one in part


def test_draws_of_all_samples_and_seeds_are_those_of_the_law():
    """The argmax of the noise over 251 tokens of one probability."""
    lanes = make_lanes(len(PAIRS), max_steps=1)
    for lane, (seed, sample) in enumerate(PAIRS):
        lanes.seeds[lane] = philox.signed_seed(seed)
        lanes.streams[lane] = philox.signed_stream(philox.pack_stream(3, sample))
    sample_step.sample_step(torch.zeros(len(PAIRS), 251), lanes, filters=False)
    wanted = [[int(oracle.uniforms(seed, 251, 0, 1, oracle.TOKEN_DRAW, 3, sample).argmax())] for seed, sample in PAIRS]
    assert lanes.out_tokens.tolist() == wanted


@pytest.mark.parametrize("vocab", [VOCAB, 128259])
def test_one_peak_over_a_flat_tail_equals_the_reference(vocab):
    """The tail is one tie of all tokens but one: filters keep all of it or nothing."""
    rows = [(0, 1.0, 0.0), (2, 1.0, 0.0), (1, 1.0, 0.0), (0, 0.4, 0.0), (0, 0.6, 0.0), (0, 1.0, 1e-6)]
    rows = rows if vocab == VOCAB else rows[::4]
    logits, lanes = torch.zeros(len(rows), vocab), make_lanes(len(rows), max_steps=1)
    for lane, row in enumerate(rows):
        logits[lane, (vocab - 1) * lane // len(rows)] = torch.tensor(float(vocab)).log()  # half of all probability
        for tensor, value in zip((lanes.top_k, lanes.top_p, lanes.min_p), row, strict=True):
            tensor[lane] = value
    assert assert_same_step(sample_step.sample_step, logits, lanes) == 0
    if vocab != VOCAB:
        return
    space = sample_step.make_workspace(len(rows), vocab, logits.device)
    sample_step.sample_step(logits, lanes, space)
    for lane, (top_k, top_p, min_p) in enumerate(rows):
        if (top_k, top_p, min_p) != (0, 1.0, 0.0):
            wanted = sampling_threshold(logits[lane], top_k, float(lanes.top_p[lane]), float(lanes.min_p[lane]))
            assert torch.equal(logits[lane] >= float(space.bounds[lane, 3]), logits[lane] >= wanted)


@pytest.mark.parametrize("tied", [(3, 9), (0, 9000), (9000, 0), (2047, 2048), (4100, 2047, 100)])
def test_of_tokens_with_equal_scores_the_lowest_wins(tied):
    """In one block, in one tile and in several, whichever tile is looked at first; without noise too."""
    logits, lanes = tied_rows(3, VOCAB, tied)
    lanes.temperature[2], logits[2, list(tied)] = 0.0, 4.0
    sample_step.sample_step(logits, lanes, filters=False)
    assert lanes.out_tokens[:, 0].tolist() == [min(tied)] * 3


run_in_interpreter(globals())
