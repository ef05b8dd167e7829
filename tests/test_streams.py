"""Random streams to their ends: samples from 2048 on, whose counter word has its sign bit set, and seeds from 2^63 on.

And the sampler where noise decides alone: one peak over a flat tail of a large vocabulary, and tokens of equal score.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

import oracle
import stars
from instruction_sets import instruction_set  # noqa: F401  (a fixture)
from sampler_lanes import assert_same_lanes, copy_of, make_lanes, noise, tied_rows
from stars.bindings import libstars
from stars.kernels import philox
from stars.kernels.sample_step import sample_step_reference
from stars.kernels.types import LaneState
from toy import ids, table_reward, toy_engine, toy_pair

SAMPLES = (0, 1, 2047, 2048, 2049, 4095)
SEEDS = (0, 5, 2**31, 2**32 + 5, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1)
TWO_63 = 1 << 63

needs_libstars = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")


def step_of(operations: str):
    return libstars.sample_step if operations == "libstars" else sample_step_reference


# -- the counter ------------------------------------------------------------------------------------------------------


def test_every_stream_is_another_counter_word():
    """Unsigned, as the int32 of a tensor, and read back from either."""
    seen = set()
    for segment in (0, 1, philox.MAX_SEGMENT):
        for sample in range(philox.MAX_SAMPLE + 1):
            word = philox.pack_stream(segment, sample)
            bits = torch.tensor([philox.signed_stream(word)], dtype=torch.int32)
            assert int(bits.numpy().view(np.uint32)[0]) == word == segment + sample * 2**20
            for stream in (word, int(bits[0])):
                assert (stream & philox.MAX_SEGMENT, (stream & 0xFFFFFFFF) >> 20) == (segment, sample)
            seen.add(word)
    assert len(seen) == 3 * 4096


def test_every_seed_is_another_key():
    """All of its 64 bits count; a negative one is its two's complement."""
    keys = [philox.split_seed(seed) for seed in SEEDS]
    assert [low + (high << 32) for low, high in keys] == list(SEEDS)
    for seed in SEEDS:
        bits = torch.tensor([philox.signed_seed(seed)], dtype=torch.int64)
        assert int(bits.numpy().view(np.uint64)[0]) == seed
        assert philox.split_seed(int(bits[0])) == philox.split_seed(seed)
    assert philox.split_seed(-1) == philox.split_seed(2**64 - 1)
    with pytest.raises(ValueError, match="64 bits"):
        philox.split_seed(2**64)


def test_uniforms_of_all_samples_and_seeds_are_those_of_the_law(operations):
    accept = philox.accept_uniform if operations == "libstars" else philox.accept_uniform_reference
    seen = []
    for seed in SEEDS:
        for sample in SAMPLES:
            for attempt in (1, philox.MAX_ATTEMPT):
                u = accept(seed, attempt, 3, sample)
                assert u == oracle.uniforms(seed, 1, 0, attempt, oracle.ACCEPT_DRAW, 3, sample)[0]
                seen.append(u)
    assert len(set(seen)) == len(seen)  # 96 of 2^24


def test_noise_of_all_samples_and_seeds_is_that_of_the_law(operations):
    vocab, seen = 37, set()
    for seed in SEEDS:
        for sample in SAMPLES:
            if operations == "libstars":
                got = libstars.gumbel(seed, 2, 1, philox.pack_stream(3, sample), vocab).numpy()
            else:
                got = philox.gumbel_noise(seed, 2, 1, 3, sample, vocab)
            u = oracle.uniforms(seed, vocab, 2, 1, oracle.TOKEN_DRAW, 3, sample)
            np.testing.assert_allclose(got, -np.log(-np.log(u)), rtol=3e-7, atol=3e-7)  # two ulp, as in test_noise_…
            seen.add(got.tobytes())
    assert len(seen) == len(SEEDS) * len(SAMPLES)


def test_draws_of_all_samples_and_seeds_are_those_of_the_law(operations):
    """Of lanes side by side, on a flat distribution over 251 tokens: the argmax of the noise."""
    vocab, pairs = 251, [(seed, sample) for seed in SEEDS for sample in SAMPLES]
    lanes = make_lanes(len(pairs), max_steps=3)
    for lane, (seed, sample) in enumerate(pairs):
        lanes.seeds[lane] = philox.signed_seed(seed)
        lanes.streams[lane] = philox.signed_stream(philox.pack_stream(3, sample))
    for _ in range(3):
        step_of(operations)(torch.zeros(len(pairs), vocab), lanes)
    wanted = [[int(np.argmax(oracle.uniforms(seed, vocab, position, 1, oracle.TOKEN_DRAW, 3, sample)))
               for position in range(3)] for seed, sample in pairs]
    assert lanes.out_tokens.tolist() == wanted
    assert len(set(map(tuple, wanted))) == len(wanted)


# -- through the engine -----------------------------------------------------------------------------------------------

LM, RM = toy_pair(64, (1, 2), positions=32)
PROMPT = ids(5, 64)


def test_all_samples_of_a_request_are_different_streams():
    """4096 completions of four tokens; those at the ends and around 2048 are the oracle's, and hardly any two equal."""
    engine = toy_engine(LM, max_num_seqs=64)
    params = stars.SamplingParams(max_tokens=4, n=4096, seed=7, ignore_eos=True)
    [output] = engine.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    tokens = [completion.token_ids for completion in output.outputs]
    for sample in SAMPLES:
        wanted, _ = oracle.draw_segment(LM.logits, PROMPT, [], 4, set(), params, 7, 1, 0, sample)
        assert tokens[sample] == wanted
    # The most probable four tokens have some 1 in 500; with the upper half a copy of the lower one, all would repeat.
    assert sum(tokens[sample] == tokens[sample + 2048] for sample in range(2048)) < 20
    with pytest.raises(stars.RequestError, match="is 4097, the most is 4096"):
        stars.SamplingParams(n=4097)


@pytest.mark.parametrize("seed", [2**63, 2**63 + 7, 2**64 - 1, -3])
@pytest.mark.parametrize("causal", [False, True])
def test_a_seed_of_64_bits_is_the_oracles(seed, causal):
    """Tokens and verdicts of a soft threshold, also of a reward model's own rewards."""
    score = table_reward(3)
    reward = stars.CausalReward(RM.decoder()) if causal else stars.FunctionReward(
        lambda prompt, responses: [score(response) for response in responses], inputs="ids")
    engine = toy_engine(LM, reward)
    params = stars.SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)
    policy = stars.STARS(segment_size=3, max_attempts=6, beta=0.7, reward_threshold=1.0)
    [output] = engine.generate({"prompt_token_ids": PROMPT}, params, policy, use_tqdm=False)
    assert output.seed == seed
    judge = (lambda response: RM.reward(PROMPT + response)) if causal else score
    assert_oracle(output.outputs[0], oracle.run(LM.logits, judge, PROMPT, params, policy, seed))
    [other] = engine.generate({"prompt_token_ids": PROMPT}, stars.SamplingParams(
        max_tokens=12, seed=seed % 2**64 - TWO_63, ignore_eos=True), policy, use_tqdm=False)
    assert other.outputs[0].token_ids != output.outputs[0].token_ids


@pytest.mark.parametrize("causal", [False, True])
def test_verdicts_of_late_samples_are_the_oracles(causal):
    """Of a request with 2064 samples, those on both sides of 2048, word by word and verdict by verdict."""
    reward = stars.CausalReward(RM.decoder()) if causal else stars.FunctionReward(
        lambda prompt, responses: [RM.reward(prompt + response) for response in responses], inputs="ids")
    engine = toy_engine(LM, reward, max_num_seqs=64)
    params = stars.SamplingParams(max_tokens=4, n=2064, seed=11, ignore_eos=True)
    policy = stars.STARS(segment_size=2, max_attempts=3, beta=0.7, reward_threshold=1.0, width=1)
    [output] = engine.generate({"prompt_token_ids": PROMPT}, params, policy, use_tqdm=False)
    for sample in (0, *range(2046, 2064)):
        assert_oracle(output.outputs[sample], oracle.run(
            LM.logits, lambda response: RM.reward(PROMPT + response), PROMPT, params, policy, 11, sample))
    assert output.outputs[2048].segments != output.outputs[0].segments


def assert_oracle(completion: stars.CompletionOutput, wanted: list[oracle.OracleSegment]) -> None:
    assert completion.error is None and len(completion.segments) == len(wanted)
    for segment, expected in zip(completion.segments, wanted, strict=True):
        assert (segment.token_ids, segment.accepted) == (expected.token_ids, expected.accepted)
        for attempt, its in zip(segment.attempts, expected.attempts, strict=False):  # wider rounds draw more
            assert (attempt.token_ids, attempt.accepted) == (its.token_ids, its.accepted)
            assert attempt.reward == pytest.approx(its.reward, abs=1e-4)


# -- one peak over a flat tail ----------------------------------------------------------------------------------------

VOCAB = 128259  # no multiple of a vector, a block or a tile
PEAKS = ((0, 11.76), (VOCAB - 1, 11.76), (5, 0.5), (64001, 17.4))


def peak_rows() -> torch.Tensor:
    logits = torch.zeros(len(PEAKS), VOCAB)
    for row, (token, height) in zip(logits, PEAKS, strict=True):
        row[token] = height
    return logits


FILTERS = ((0, 1.0, 0.0), (2, 1.0, 0.0), (1, 1.0, 0.0), (0, 0.4, 0.0), (0, 0.6, 0.0), (0, 1.0, 1e-6), (0, 1.0, 1e-4))


@cache
def reference_of_peaks(filters: tuple) -> LaneState:
    lanes = make_lanes(len(PEAKS), 1.0, *filters, max_steps=1, seed=filters[0])
    sample_step_reference(peak_rows(), lanes)
    return lanes


def test_one_peak_over_a_flat_tail_equals_the_reference(instruction_set):  # noqa: F811
    """A peak of log(128k) weighs as much as all of the tail, of which the noise's largest values alone can win. To
    filters the tail is one tie of 128258 tokens: all of them are kept or none."""
    logits = peak_rows()
    for filters in FILTERS:
        lanes = make_lanes(len(PEAKS), 1.0, *filters, max_steps=1, seed=filters[0])
        before = copy_of(lanes)
        libstars.sample_step(logits, lanes)
        assert assert_same_lanes(logits, before, lanes, reference_of_peaks(filters)) == 0


@cache
def draws_of_a_kept_tail() -> tuple[torch.Tensor, LaneState, list[int]]:
    row = torch.zeros(1, VOCAB)
    row[0, 70001] = math.log(VOCAB - 1)
    logits, lanes = row.expand(24, VOCAB).contiguous(), make_lanes(24, top_p=0.6, max_steps=1, seed=2)
    reference = copy_of(lanes)
    sample_step_reference(logits, reference)
    return logits, lanes, reference.out_tokens[:, 0].tolist()


def test_a_tail_that_top_p_keeps_is_drawn_from(instruction_set):  # noqa: F811
    """Half the mass is one token's, the rest far below it: top_p = 0.6 keeps all of the tail, however low it lies.

    Of 24 draws none on the tail would come once in 2^24 seeds, and this one is fixed.
    """
    logits, lanes, wanted = draws_of_a_kept_tail()
    drawn = copy_of(lanes)
    libstars.sample_step(logits, drawn)
    assert drawn.out_tokens[:, 0].tolist() == wanted
    assert 3 < sum(token != 70001 for token in wanted) < 21


def test_the_reference_draws_what_the_law_says_of_a_peak():
    """The argmax of z + g and the log-probability, both in float64 from the words themselves."""
    logits, lanes = peak_rows(), make_lanes(len(PEAKS), seed=3)
    sample_step_reference(logits, lanes, filters=False)
    for lane, row in enumerate(logits.double()):
        score = row + noise(lanes, lane, VOCAB, step=0)
        token = int(lanes.out_tokens[lane, 0])
        assert token == int(score.argmax())
        assert float(lanes.out_logprobs[lane, 0]) == pytest.approx(float(row.log_softmax(0)[token]), abs=2e-6)


@needs_libstars
def test_a_peak_and_its_tail_are_drawn_as_often_as_they_weigh():
    """600 draws of a peak of half the mass; what falls on the tail is spread over all of it.

    The peak's count has mean 300 and deviation 12.2: beyond 5 deviations once in 2 * 10^6 seeds, and this one is fixed.
    The tail's counts over 8 stretches have 7 degrees of freedom: chi-square above 46 is as rare.
    """
    row = torch.zeros(1, VOCAB)
    row[0, 70001] = math.log(VOCAB - 1)
    lanes = make_lanes(600, max_steps=1, seed=1)
    for first in range(0, 600, 20):
        libstars.sample_step(row.expand(20, VOCAB).contiguous(),
                             LaneState(*(tensor[first : first + 20] for tensor in lanes)))
    tokens = lanes.out_tokens[:, 0]
    at_peak = int((tokens == 70001).sum())
    assert abs(at_peak - 300) < 61
    counts = torch.bincount(tokens[tokens != 70001] * 8 // VOCAB, minlength=8).double()
    wanted = (600 - at_peak) / 8
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 46
    at_peak, at_tail = -math.log(2), -math.log(2) - math.log(VOCAB - 1)
    torch.testing.assert_close(lanes.out_logprobs[:, 0], torch.where(tokens == 70001, at_peak, at_tail).float(),
                               rtol=0, atol=2e-5)


# -- ties -------------------------------------------------------------------------------------------------------------

TIED = ((3, 9), (9, 3), (0, 70001), (70001, 0), (2047, 2048), (2050, 2047, 100), (128258, 128256, 64000), (1, 2, 3),
        (4, 5, 131071 % VOCAB))


def test_of_tokens_with_equal_scores_the_lowest_wins(operations):
    """z + g equal to the last bit, whichever of them has the larger logit, whichever is looked at first."""
    for tied in TIED:
        logits, lanes = tied_rows(2, VOCAB, tied)
        step_of(operations)(logits, lanes)
        assert lanes.out_tokens[:, 0].tolist() == [min(tied)] * 2, tied


def test_of_equal_logits_the_lowest_wins_without_noise(operations):
    for tied in TIED:
        logits = torch.full((2, VOCAB), -1.0)
        logits[:, list(tied)] = 4.0
        lanes = make_lanes(2, 0.0, max_steps=1)
        step_of(operations)(logits, lanes)
        assert lanes.out_tokens[:, 0].tolist() == [min(tied)] * 2, tied


def test_ties_at_a_filters_edge_stay(operations):
    """top_k=2 over three tokens of one logit keeps all three, and the noise chooses among them."""
    logits = torch.full((600, 40), -9.0)
    logits[:, [7, 20, 39]] = 1.0
    for top_k, top_p in ((1, 1.0), (2, 1.0), (0, 0.5)):
        lanes = make_lanes(600, 1.0, top_k, top_p, max_steps=1)
        step_of(operations)(logits, lanes)
        assert set(lanes.out_tokens[:, 0].tolist()) == {7, 20, 39}
