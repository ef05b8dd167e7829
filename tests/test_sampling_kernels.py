"""The random numbers and the sampler: known answers, the law of a draw, and libstars against the references."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from instruction_sets import instruction_set  # noqa: F401  (a fixture)
from sampler_lanes import assert_cuts, copy_of, entropy_within, make_lanes, rows_of_entropies
from sampler_lanes import assert_same_step as same_step
from stars.bindings import libstars
from stars.kernels import philox
from stars.kernels.sample_step import sample_step, sample_step_reference, sampling_threshold
from stars.kernels.types import LaneState

needs_libstars = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]

assert_same_step = partial(same_step, libstars.sample_step)


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert tuple(int(word) for word in philox.philox4x32(counter, key)) == words


@needs_libstars
@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers_of_libstars(counter, key, words):
    assert libstars.philox(key[0] | key[1] << 32, *counter) == words


@needs_libstars
def test_accept_uniforms_are_equal_bit_for_bit():
    draw = np.random.default_rng(0)
    edges = [(0, 1, 0, 0), (2**64 - 1, philox.MAX_ATTEMPT, philox.MAX_SEGMENT, philox.MAX_SAMPLE)]
    for seed, attempt, segment, sample in edges + [
        (int(draw.integers(2**63)), int(draw.integers(1, 1 << 24)), int(draw.integers(1 << 20)),
         int(draw.integers(1 << 12))) for _ in range(200)
    ]:
        uniform = philox.accept_uniform_reference(seed, attempt, segment, sample)
        assert libstars.accept_uniform(seed, attempt, segment, sample) == uniform and 0 < uniform < 1


@pytest.mark.parametrize("vocab", [1, 3, 17, 64, 8191, 1 << 20])
def test_noise_is_within_two_ulp(instruction_set, vocab):  # noqa: F811
    got = libstars.gumbel(2**63 + 12345, 7, 3, philox.pack_stream(5, 2), vocab).double().numpy()
    wanted = philox.gumbel(philox.token_words(2**63 + 12345, 7, 3, philox.pack_stream(5, 2), vocab))
    # Near 0 it is the uniform's logarithm that is rounded, which is near 1 there: an ulp of 1 is the smallest unit.
    unit = np.spacing(np.maximum(np.abs(wanted), 1).astype(np.float32)).astype(np.float64)
    assert (np.abs(got - wanted) <= 2 * unit).all()


@pytest.mark.parametrize("vocab", [1, 3, 17, 37, 64, 257, 1021])
def test_steps_equal_the_reference(instruction_set, vocab):  # noqa: F811
    draw = torch.Generator().manual_seed(vocab)
    ties = lanes_drawn = 0
    for temperature, top_k, top_p, min_p in [
        (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (3.0, 1, 1.0, 0.0), (0.8, 5, 1.0, 0.0),
        (0.8, 40, 1.0, 0.0), (1.0, 300, 1.0, 0.0), (1.5, 0, 0.9, 0.0), (1.0, 0, 0.999, 0.0), (1.0, 0, 1e-6, 0.0),
        (1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 1.0), (2.0, 20, 0.7, 0.02), (0.7, 7, 0.5, 0.2), (5.0, 0, 0.99, 0.001),
    ]:
        logits = torch.randn(6, vocab, generator=draw) * 3
        logits[1] = logits[1].round()  # many ties
        logits[2, torch.randperm(vocab, generator=draw)[: vocab // 2]] = -math.inf
        logits[3] = 0.0
        logits[4] -= 1e4
        lanes = make_lanes(6, temperature, top_k, top_p, min_p, seed=vocab)
        lanes.steps[:] = torch.randint(3, (6,), generator=draw)
        ties += assert_same_step(logits, lanes)
        lanes_drawn += 6
    assert ties <= lanes_drawn // 10


@pytest.mark.parametrize("vocab", [8192, 128256])
def test_large_vocabularies_equal_the_reference(instruction_set, vocab):  # noqa: F811
    draw = torch.Generator().manual_seed(vocab)
    logits = torch.randn(2, vocab, generator=draw)
    logits[0] *= 4
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (40, 1.0, 0.0), (5000, 0.95, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05)]:
        assert assert_same_step(logits, make_lanes(2, 0.8, top_k, top_p, min_p, seed=top_k)) == 0


@needs_libstars
@pytest.mark.parametrize("top_k, top_p, min_p", [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (60, 1.0, 0.0), (61, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.97, 0.0),
    (0, 0.01, 0.0), (0, 1.0, 0.5), (0, 1.0, 1.0), (20, 0.6, 0.0), (30, 0.9, 0.4), (0, 0.8, 0.3),
])
@pytest.mark.parametrize("ties", [False, True])
def test_the_kept_tokens_are_those_of_the_reference(top_k, top_p, min_p, ties):
    """All kept tokens are drawn in 8000 draws and no other: each is as probable as 1 in 350 at least, so the chance
    that one of 61 is missed is below 61 * exp(-8000 / 350) = 1e-8."""
    logits = torch.rand(61, generator=torch.Generator().manual_seed(4)) * 1.7
    logits = (logits * 4).round() / 4 if ties else logits
    lanes = make_lanes(8000, 1.0, top_k, top_p, min_p, max_steps=1)
    libstars.sample_step(logits.expand(8000, 61).contiguous(), lanes)
    threshold = sampling_threshold(logits, top_k, float(np.float32(top_p)), float(np.float32(min_p)))
    kept = (logits >= threshold).nonzero()[:, 0].tolist()
    assert sorted(set(lanes.out_tokens[:, 0].tolist())) == kept


def test_draws_follow_the_softmax(operations):
    """Chi-square over 11 tokens, 10 degrees of freedom: fails a right sampler once in 10^6 seeds; this one is fixed."""
    count = 40000 if operations == "libstars" else 4000
    logits = torch.linspace(-2, 2, 11)
    lanes = make_lanes(count, 0.7, max_steps=1, seed=11)
    step = libstars.sample_step if operations == "libstars" else sample_step_reference
    step(logits.expand(count, 11).contiguous(), lanes)
    seen = torch.bincount(lanes.out_tokens[:, 0], minlength=11).double()
    expected = (logits.double() / 0.7).softmax(0) * count
    half = float(((seen - expected) ** 2 / expected).sum()) / 2
    # The survival function of chi-square with 10 degrees of freedom.
    assert math.exp(-half) * sum(half**i / math.factorial(i) for i in range(5)) > 1e-6


def test_lanes_known_to_have_no_filter(operations):
    """filters=False changes nothing for them; the reference refuses a lane that has one all the same."""
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(1))
    lanes = make_lanes(4, 0.8)
    lanes.temperature[0] = 0.0
    known, unknown = copy_of(lanes), copy_of(lanes)
    sample_step(logits, known, filters=False)
    sample_step(logits, unknown)
    for a, b in zip(known, unknown):
        assert torch.equal(a, b)
    for name, value in (("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)):
        filtered = copy_of(lanes)
        getattr(filtered, name)[1] = value
        with pytest.raises(ValueError, match="filters=True"):
            sample_step_reference(logits, filtered, filters=False)
        filtered.done[1] = 1  # an idle lane has whatever was left in the buffers
        sample_step_reference(logits, filtered, filters=False)


@pytest.mark.parametrize("vocab", [1, 3, 17, 37, 64, 257, 1021, 4099])
def test_lanes_end_where_the_entropy_reaches_their_cut(instruction_set, vocab):  # noqa: F811
    """Within the error of float32 on either side of the entropy in float64: `entropy_within` derives it."""
    assert assert_cuts(libstars.sample_step, rows_of_entropies(vocab, vocab), seed=vocab) == 14
    assert assert_cuts(libstars.sample_step, rows_of_entropies(vocab, 1)[4:5], temperature=0.3, top_k=2) == 2


def test_the_reference_ends_lanes_where_the_entropy_reaches_their_cut():
    assert assert_cuts(sample_step_reference, rows_of_entropies(37, 3)) == 14
    assert assert_cuts(sample_step_reference, rows_of_entropies(257, 4), temperature=0.0) == 14


def test_steps_with_cuts_equal_the_reference(instruction_set):  # noqa: F811
    """Lanes that are cut beside those that are not, in a large vocabulary: none is within 1e-3 of its cut."""
    draw, vocab = torch.Generator().manual_seed(6), 128256
    logits = torch.randn(9, vocab, generator=draw) * torch.linspace(0.5, 8.0, 9)[:, None]
    lanes = make_lanes(9, 0.8, 40)
    nats = [entropy_within(row)[0] for row in logits]
    assert min(nats) < 2.0 and max(nats) > 11.0 and min(abs(one - 6.0) for one in nats) > 1e-3
    lanes.entropy_cut[:] = 6.0
    lanes.entropy_cut[4] = math.inf
    assert assert_same_step(logits, lanes) == 0
    one = LaneState(*(tensor[:1].clone() for tensor in lanes))  # alone a lane is drawn and added up at the same time
    assert assert_same_step(logits[:1], one) == 0
    for batch in (lanes, one):
        libstars.sample_step(logits[: len(batch.done)], batch)
    assert lanes.steps.tolist() == [int(n < 6.0 or lane == 4) for lane, n in enumerate(nats)]
    assert one.done.tolist() == [1] and one.steps.tolist() == [0]


def test_a_cut_needs_a_distribution(operations):
    """Logits that are none give token -1, whatever the cut; lanes that are done stay as they are."""
    step = libstars.sample_step if operations == "libstars" else sample_step_reference
    logits = torch.zeros(5, 70)
    logits[0, 3], logits[1, 69], logits[2] = math.nan, math.inf, -math.inf
    lanes = make_lanes(5)
    lanes.entropy_cut[:] = 0.0
    lanes.done[4] = 1
    step(logits, lanes)
    assert lanes.out_tokens[:, 0].tolist() == [-1, -1, -1, -9, -9] and lanes.done.tolist() == [1] * 5
    assert lanes.steps.tolist() == [1, 1, 1, 0, 0]


def test_lanes_known_to_have_no_cut(operations):
    """cuts=False changes nothing for them; the reference refuses a lane that has one all the same."""
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(1))
    known, unknown = make_lanes(4, 0.8), make_lanes(4, 0.8)
    sample_step(logits, known, cuts=False)
    sample_step(logits, unknown)
    for a, b in zip(known, unknown):
        assert torch.equal(a, b)
    cut = make_lanes(4, 0.8)
    cut.entropy_cut[1] = 0.0
    with pytest.raises(ValueError, match="cuts=True"):
        sample_step_reference(logits, copy_of(cut), cuts=False)
    told = torch.zeros(6, dtype=torch.int32)
    sample_step_reference(logits, same := copy_of(cut), ended=told)
    assert told.tolist() == [0, 1, 0, 0, 0, 0] and same.steps.tolist() == [1, 0, 1, 1]
    cut.done[1] = 1  # an idle lane has whatever was left in the buffers
    sample_step_reference(logits, cut, cuts=False)
    if operations == "libstars":
        cut.done[1] = 0
        libstars.sample_step(logits, cut, cuts=False)
        assert cut.steps.tolist() == [2, 1, 2, 2]


def test_forbidden_tokens_are_never_drawn(operations):
    step = libstars.sample_step if operations == "libstars" else sample_step_reference
    logits = torch.full((300, 37), -math.inf)
    logits[:, [5, 36]] = torch.tensor([0.0, -3.0])
    for top_k, top_p in [(0, 1.0), (20, 1.0), (0, 0.999999), (3, 0.99)]:
        lanes = make_lanes(300, 2.0, top_k, top_p)
        step(logits, lanes)
        assert set(lanes.out_tokens[:, 0].tolist()) == {5, 36}
    lanes = make_lanes(300, 2.0)
    logits[:, 5] = -math.inf
    step(logits, lanes)
    assert set(lanes.out_tokens[:, 0].tolist()) == {36} and bool((lanes.out_logprobs[:, 0] == 0).all())


def test_edges_of_temperature(operations):
    step = libstars.sample_step if operations == "libstars" else sample_step_reference
    logits = torch.zeros(4, 70)
    logits[0, [9, 33, 69]] = 4.0  # ties go to the lowest id
    logits[1, 69] = -1.0
    logits[2] = -1e30
    logits[2, 64] = -1e29
    logits[3, 11] = 3e38
    for temperature in (0.0, 1e-38, 1e-45):
        lanes = make_lanes(4, temperature)
        step(logits, lanes)
        # Where z does not overflow, zeros stay zeros and the noise decides.
        tokens = lanes.out_tokens[:, 0].tolist()
        assert tokens[2:] == [64, 11] and tokens[0] in (9, 33, 69)
        if temperature == 0.0:
            assert tokens[:2] == [9, 0]


def test_logits_that_are_no_distribution_end_the_lane(operations):
    step = libstars.sample_step if operations == "libstars" else sample_step_reference
    for vocab in (5, 64, 1000):
        logits = torch.zeros(6, vocab)
        logits[0, vocab - 1] = math.nan
        logits[1, vocab // 2] = math.inf
        logits[2] = -math.inf
        logits[3, 0], logits[3, 3] = math.nan, -math.inf
        logits[4] = math.nan
        lanes = make_lanes(6, 0.8, 3)
        before = copy_of(lanes)
        step(logits, lanes)
        assert lanes.out_tokens[:5, 0].tolist() == [-1] * 5
        assert [str(float(logprob)) for logprob in lanes.out_logprobs[:5, 0]] == ["nan", "nan", "-inf", "nan", "nan"]
        assert lanes.done.tolist() == [1] * 5 + [0] and lanes.steps.tolist() == [1] * 6
        for name in ("token_ids", "positions", "slots", "slab_used"):
            assert torch.equal(getattr(lanes, name)[:5], getattr(before, name)[:5])


def test_lanes_end_at_stop_ids_and_limits_and_stay_ended(operations):
    step = libstars.sample_step if operations == "libstars" else sample_step_reference
    logits = torch.full((4, 17), -math.inf)
    logits[:, 13] = 0.0
    lanes = make_lanes(4, 1.0, max_steps=3)
    lanes.stop_ids[1, 1] = 13
    lanes.max_tokens[2] = 2
    lanes.done[3] = 1
    ended = copy_of(lanes)
    for _ in range(3):
        step(logits, lanes)
    assert lanes.steps.tolist() == [3, 1, 2, 0] and lanes.done.tolist() == [1, 1, 1, 1]
    assert lanes.out_tokens.tolist() == [[13, 13, 13], [13, -9, -9], [13, 13, -9], [-9, -9, -9]]
    assert lanes.token_ids.tolist() == [13, 5, 13, 5]
    assert lanes.positions.tolist() == [102, 100, 101, 100] and lanes.slots.tolist() == [202, 200, 201, 200]
    assert lanes.slab_used.tolist() == [5, 3, 4, 3]
    for tensor, before in zip(lanes, ended):
        assert torch.equal(tensor[3], before[3])


@needs_libstars
def test_a_lane_without_a_column_is_ended_and_writes_nothing():
    logits = torch.zeros(3, 17)
    for step in (-1, 3, 2**31 - 1):
        lanes = make_lanes(3)
        lanes.steps[1] = step
        expected = copy_of(lanes)
        libstars.sample_step(logits, lanes)
        assert lanes.done.tolist() == [0, 1, 0]
        for name in set(LaneState._fields) - {"done"}:
            assert torch.equal(getattr(lanes, name)[1], getattr(expected, name)[1])


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_noise_that_is_left_out_could_not_have_won(instruction_set, spread):  # noqa: F811
    """The winner is, exactly, the first argmax over the whole vocabulary, with all noise computed."""
    logits = torch.randn(200, 4099, generator=torch.Generator().manual_seed(2)) * spread
    lanes = make_lanes(200, 1.0)
    libstars.sample_step(logits, lanes)
    for lane in range(200):
        z = logits[lane] + libstars.gumbel(int(lanes.seeds[lane]), 0, 1, int(lanes.streams[lane]), 4099)
        assert int(lanes.out_tokens[lane, 0]) == int((z == z.max()).nonzero()[0])


@needs_libstars
def test_a_lane_does_not_depend_on_its_company():
    draw = torch.Generator().manual_seed(8)
    logits = torch.randn(9, 1021, generator=draw) * 3
    lanes = make_lanes(9, 0.9, 50, 0.95)
    together, alone = copy_of(lanes), copy_of(lanes)
    libstars.sample_step(logits, together)
    for lane in range(9):
        one = LaneState(*(tensor[lane : lane + 1] for tensor in alone))
        libstars.sample_step(logits[lane : lane + 1], one)
    for a, b in zip(together, alone):
        assert torch.equal(a, b)
