"""The Triton kernels in the interpreter against their torch references: norms, products, rows, sampler, rewards."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from sampler_lanes import assert_cuts, copy_of, rows_of_entropies
from sampler_lanes import assert_same_step as same_step
from sampler_lanes import make_lanes as fresh_lanes
from stars import kernels
from stars.kernels import dispatch, philox
from stars.kernels.append_draft import append_draft_reference
from stars.kernels.copy_rows import copy_rows_reference
from stars.kernels.embedding import embedding_reference
from stars.kernels.linear import Weight, as_stored, linear_reference
from stars.kernels.quant import quantize
from stars.kernels.rescale import rescale_reference
from stars.kernels.rms_norm import rms_norm_reference
from stars.kernels.sample_step import sample_step_reference, sampling_threshold
from stars.kernels.score import score_reference
from stars.kernels.swiglu import swiglu_reference
from stars.kernels.take_rows import take_rows_reference
from stars.kernels.types import Draft, LaneState, TrailingRows
from stars.model import low_rank
from test_libstars_verdict import VOCAB, make_draft, make_trailing
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    import triton
    import triton.language as tl

    from stars.kernels.triton import append_draft as drafts
    from stars.kernels.triton import (
        copy_rows,
        embedding,
        linear,
        rescale,
        rms_norm,
        sample_step,
        score,
        swiglu,
        take_rows,
    )
    from stars.kernels.triton.noise import gumbel, log2_short, token_words

    @triton.jit
    def noise_kernel(words_out, noise_out, seed, position, attempt, stream, BLOCKS: tl.constexpr):
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        words = token_words(tl.load(seed), tl.load(position), tl.load(attempt), tl.load(stream), block)
        at = block[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(words_out + at, words.to(tl.int32, bitcast=True))
        tl.store(noise_out + at, gumbel(words))


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows that the kernels mean

ROWS = (1, 3, 17, 37)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
make_lanes = partial(fresh_lanes, sample=4001, stop_ids=3)  # a stream whose highest bit is set


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_near(got: torch.Tensor, wanted: torch.Tensor, ulps: float = 1.0) -> None:
    """Within `ulps` roundings, and 1e-6 of the largest for sums in another order.

    The interpreter cuts float32 to bfloat16 where the card rounds: twice the error, at each of two or three casts.
    """
    ulps += 3 if got.dtype == torch.bfloat16 else 0
    unit = torch.finfo(got.dtype).eps
    wanted = wanted.to(got.dtype)
    largest = float(wanted.float().abs().max())
    torch.testing.assert_close(got.float(), wanted.float(), rtol=ulps * unit, atol=1e-6 * max(1.0, largest))


# -- norms, gates, rows, products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, hidden", [(1, 17), (3, 64), (17, 257), (37, 33), (2, 1030)])
def test_rms_norm(rows, hidden, dtype):
    for weight_dtype in {dtype, torch.float32}:
        weight = torch.rand(hidden, generator=generator(1)).to(weight_dtype) + 0.5
        for given in (False, True):
            x = torch.randn(rows, 2 * hidden, generator=generator(rows)).to(dtype)[:, :hidden]  # rows lie apart
            residual = (torch.randn(rows, hidden, generator=generator(2)) * 3).to(dtype) if given else None
            expected_residual = None if residual is None else residual.clone()
            wanted, out = torch.empty(rows, hidden, dtype=dtype), torch.empty(rows, hidden, dtype=dtype)
            rms_norm_reference(x, weight, 1e-6, wanted, expected_residual)
            rms_norm.rms_norm(x, weight, 1e-6, out, residual)
            if residual is not None:
                assert_near(residual, expected_residual, 0)
                assert dtype == torch.bfloat16 or torch.equal(residual, expected_residual)
            assert_near(out, wanted, 2)
    in_place = x.clone()
    rms_norm.rms_norm(in_place, weight, 1e-6, in_place)
    rms_norm_reference(x, weight, 1e-6, wanted)
    assert_near(in_place, wanted, 2)


def test_a_row_of_a_norm_does_not_depend_on_its_company():
    x = torch.randn(37, 257, generator=generator(0))
    weight = torch.rand(257, generator=generator(1))
    together, alone = torch.empty_like(x), torch.empty(1, 257)
    rms_norm.rms_norm(x, weight, 1e-6, together)
    for row in (0, 5, 36):
        rms_norm.rms_norm(x[row : row + 1], weight, 1e-6, alone)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, intermediate", [(1, 17), (3, 1025), (17, 100)])
def test_swiglu(rows, intermediate, dtype):
    gate_up = (torch.randn(rows, 2 * intermediate, generator=generator(rows)) * 4).to(dtype)
    gate_up[0, :2] = torch.tensor([-100.0, 100.0])
    wanted, out = torch.empty(rows, intermediate, dtype=dtype), torch.empty(rows, intermediate, dtype=dtype)
    swiglu_reference(gate_up, wanted)
    swiglu.swiglu(gate_up, out)
    assert_near(out, wanted, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype):
    gate_up = (torch.randn(3, 2 * 1025, generator=generator(1)) * 2).to(dtype)
    wanted, out = torch.empty(3, 1025, dtype=dtype), torch.empty(3, 1025, dtype=dtype)
    swiglu_reference(gate_up.double(), exact := torch.empty(3, 1025, dtype=torch.float64), "gelu_tanh")
    swiglu_reference(gate_up, wanted, "gelu_tanh")
    swiglu.swiglu(gate_up, out, "gelu_tanh")
    # As far from it as torch's own, plus what 1 + tanh loses near -1.
    bound = 2 * (wanted.double() - exact).abs() + 2 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescale(dtype):
    for scale, softcap in ((25.25, None), (1.0, 30.0), (0.5, 3.0)):
        x = (torch.randn(3, 1027, generator=generator(2)) * 20).to(dtype)
        rescale_reference(exact := x.double(), scale, softcap)
        rescale.rescale(x, scale, softcap)
        # Two products, and of tanh an exponential, a difference, a sum and a quotient: six roundings of half an eps.
        assert bool(((x.double() - exact).abs() <= 3 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all())


def test_rows_of_a_norm_in_a_wider_matrix():
    wide = torch.randn(3, 61, generator=generator(3))
    weight, alone, before = torch.randn(19, generator=generator(4)), wide[:, 23:42].contiguous(), wide.clone()
    rms_norm.rms_norm(alone, weight, 1e-5, alone)
    rms_norm.rms_norm(wide[:, 23:42], weight, 1e-5, wide[:, 23:42])
    assert torch.equal(wide, torch.cat((before[:, :23], alone, before[:, 42:]), dim=1))


@pytest.mark.parametrize("source, target", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)])
def test_rows_of_matrices(source, target):
    matrix = torch.randn(101, 1027, generator=generator(0)).to(source)
    for rows in ROWS:
        index = torch.randint(0, 101, (rows,), dtype=torch.int32, generator=generator(rows))
        for launch, reference in ((take_rows.take_rows, take_rows_reference),
                                  (lambda x, i, out: embedding.embedding(i, Weight(x, None, 101, 1027), out),
                                   lambda x, i, out: embedding_reference(i, Weight(x, None, 101, 1027), out))):
            out, wanted = torch.empty(rows, 1027, dtype=target), torch.empty(rows, 1027, dtype=target)
            launch(matrix, index, out)
            reference(matrix, index, wanted)
            assert torch.equal(out, wanted)
    out = torch.empty(3, 1027, dtype=target)
    take_rows.take_rows(matrix, torch.tensor([101, -1, 5], dtype=torch.int32), out)
    assert out[:2].isnan().all() and torch.equal(out[2], matrix[5].to(target))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_rows_are_exact(dtype):
    for layers, heads, head_dim, count in ((1, 1, 17, 1), (3, 2, 20, 17), (2, 3, 400, 5)):
        source, target = (torch.randperm(40, generator=generator(i))[:count].int() for i in (1, 2))
        k_source, v_source = (torch.randn(layers, 40, heads, head_dim, generator=generator(i)).to(dtype)
                              for i in (3, 4))
        wanted = [torch.randn(layers, 50, heads, head_dim, generator=generator(i)).to(dtype) for i in (5, 6)]
        got = [tensor.clone() for tensor in wanted]
        copy_rows_reference(k_source, v_source, source, *wanted, target)
        padded_source = torch.cat((source, torch.tensor([-1, 3], dtype=torch.int32)))
        padded_target = torch.cat((target, torch.tensor([4, -1], dtype=torch.int32)))
        copy_rows.copy_rows(k_source, v_source, padded_source, *got, padded_target)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, out_features, in_features", [(1, 17, 33), (3, 100, 128), (37, 40, 300), (70, 33, 129)])
def test_linear(rows, out_features, in_features, dtype):
    x = torch.randn(rows, in_features, generator=generator(rows)).to(dtype)
    matrix = torch.randn(out_features, in_features, generator=generator(1)).to(dtype)
    for bias in (None, torch.randn(out_features, generator=generator(2)).to(dtype)):
        weight = Weight(matrix, bias, out_features, in_features, deterministic=True)
        exact = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
        size = x.double().abs() @ matrix.double().abs().T + 4
        for out_dtype in {dtype, torch.float32}:
            # in_features float32 roundings of the sum at most, and one of the result.
            bound = size * in_features * 2**-24 + exact.abs() * torch.finfo(out_dtype).eps
            for product in (linear.linear, linear_reference):
                for given in (weight, Weight(matrix, bias, out_features, in_features))[: 1 + (dtype != out_dtype)]:
                    product(x, given, out := torch.empty(rows, out_features, dtype=out_dtype))
                    assert bool(((out.double() - exact).abs() <= bound).all())
        wanted = torch.empty(rows, out_features, dtype=dtype)
        linear_reference(x, weight, wanted)
        linear.linear(x, Weight(matrix, bias, out_features, in_features), out := torch.empty_like(wanted))
        assert_near(out, wanted, 4)  # torch's own product, by another call


@pytest.mark.parametrize("tile", [(16, 32, 256, 4, 4), (16, 16, 512, 4, 4), (16, 128, 128, 8, 4), (128, 64, 64, 4, 4)])
def test_a_product_in_measured_tiles(monkeypatch, tile):
    """What a card's table may name is the same product; `linear` goes by it, but not where bits must not change."""
    from stars.kernels.triton import tuned

    rows, out_features, in_features = 17, 49, 304
    x = torch.randn(rows, in_features, generator=generator(3)).bfloat16()
    matrix = torch.randn(out_features, in_features, generator=generator(4)).bfloat16()
    asked = []
    monkeypatch.setattr(tuned, "plain", lambda *shape: asked.append(shape) or tuned.Tile(*tile))
    monkeypatch.setattr(torch, "mm", None)  # cuBLAS is not asked
    weight = Weight(matrix, None, out_features, in_features)
    linear.linear(x, weight, out := torch.empty(rows, out_features, dtype=torch.bfloat16))
    assert asked == [("bf16", rows, out_features, in_features, "bf16")]
    exact = x.double() @ matrix.double().T
    bound = (x.double().abs() @ matrix.double().abs().T + 4) * in_features * 2**-24
    bound += exact.abs() * torch.finfo(out.dtype).eps
    assert bool(((out.double() - exact).abs() <= bound).all())
    fixed = torch.empty_like(out)
    linear.linear(x, Weight(matrix, None, out_features, in_features, deterministic=True), fixed)
    linear.linear_invariant(x, weight, out)
    assert torch.equal(fixed, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_does_not_depend_on_its_company(dtype):
    x = torch.randn(130, 257, generator=generator(0)).to(dtype)
    weight = Weight(torch.randn(45, 257, generator=generator(1)).to(dtype), None, 45, 257, deterministic=True)
    whole = torch.empty(130, 45, dtype=dtype)
    linear.linear(x, weight, whole)
    for first, rows in ((0, 1), (129, 1), (3, 3), (20, 17), (1, 37), (60, 64), (0, 65)):
        part = torch.empty(rows, 45, dtype=dtype)
        linear.linear(x[first : first + rows], weight, part)
        assert torch.equal(part, whole[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [16384, 21])
def test_low_rank_products_are_added(monkeypatch, dtype, most):
    """What an adapter adds, composed of kernels, in one piece and in two: products and sum are rounded once each."""
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    monkeypatch.setattr(low_rank, "MAX_HIDDEN", most)
    made = generator(3)
    down, up = (torch.randn(shape, generator=made).to(dtype) for shape in ((5, 24), (42, 5)))
    pair = low_rank.LowRank(Weight(down, None, 5, 24), Weight(up, None, 42, 5))
    x, out = torch.randn(7, 24, generator=made).to(dtype), torch.randn(7, 42, generator=made).to(dtype)
    middle = (x.float() @ down.float().T).to(dtype)
    delta = (middle.float() @ up.float().T).to(dtype)
    wanted = out.float() + delta.float()
    low_rank.add_low_rank(x, pair, out, low_rank.adapter_room([pair], 9, dtype, x.device))
    assert_near(out, wanted, ulps=4)  # of the product, whose sums are in another order


def test_the_operations_reach_their_kernels(monkeypatch):
    """What CUDA tensors would do, in the interpreter: each operation's row, with its arguments in order."""
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    x = torch.randn(3, 20, generator=generator(0))
    index = torch.tensor([2, 0], dtype=torch.int32)
    weight = Weight(torch.randn(5, 20, generator=generator(1)), torch.randn(5, generator=generator(2)), 5, 20)
    kernels.linear(x, weight, out := torch.empty(3, 5))
    torch.testing.assert_close(out, x @ weight.values.T + weight.bias)
    kernels.embedding(index, weight, out := torch.empty(2, 20))
    assert torch.equal(out, weight.values[[2, 0]])
    kernels.take_rows(x, index, out)
    assert torch.equal(out, x[[2, 0]])
    kernels.swiglu(x, out := torch.empty(3, 10))
    torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :10]) * x[:, 10:])
    residual = x.clone()
    kernels.rms_norm(x, torch.ones(20), 0.0, out := torch.empty(3, 20), residual)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(2 * x, (20,)))
    k, v = torch.randn(2, 1, 3, 1, 4, generator=generator(3))
    kernels.copy_rows(k, v, index, k_out := torch.zeros(1, 3, 1, 4), v_out := torch.zeros(1, 3, 1, 4), index.flip(0))
    assert torch.equal(k_out[0, 0], k[0, 2]) and torch.equal(v_out[0, 2], v[0, 0]) and bool((k_out[0, 1] == 0).all())
    kernels.sample_step(x, lanes := make_lanes(3, temperature=0.0))
    assert lanes.out_tokens[:, 0].tolist() == x.argmax(1).tolist()
    head = Weight(torch.ones(1, 20), torch.tensor([2.5]), 1, 20)
    kernels.score(x, x, torch.ones(20), 0.0, head, torch.empty(3, 20), rewards := torch.empty(3))
    torch.testing.assert_close(rewards, torch.nn.functional.rms_norm(x, (20,)).sum(1) + 2.5)
    draft = make_draft(np.random.default_rng(1), 3, 4, 2)
    trailing = make_trailing(np.random.default_rng(1), draft, 5, 1)
    append_draft_reference(draft, wanted := copy_of(trailing), VOCAB)
    kernels.append_draft(draft, trailing, VOCAB)
    assert torch.equal(trailing.token_ids, wanted.token_ids)


# -- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, position, attempt, segment, sample", [
    (0, 0, 1, 0, 0), (2**64 - 1, 2**20, philox.MAX_ATTEMPT, philox.MAX_SEGMENT, philox.MAX_SAMPLE),
    (0x299F31D0A4093822, 31, 7, 12345, 4), (2**63, 5, 2, 1 << 19, 2048)])
def test_words_are_equal_bit_for_bit_and_noise_is_near(seed, position, attempt, segment, sample):
    stream = philox.pack_stream(segment, sample)

    def int32(value):
        return torch.tensor(np.array([value], dtype=np.uint32).view(np.int32))

    words, noise = torch.empty(8192, dtype=torch.int32), torch.empty(8192)
    seeds = torch.tensor(np.array([seed], dtype=np.uint64).view(np.int64))
    noise_kernel[(2,)](words, noise, seeds, int32(position), int32(attempt), int32(stream), BLOCKS=1024)
    wanted = philox.token_words(seed, position, attempt, stream, 8192)
    assert np.array_equal(words.numpy().view(np.uint32), wanted)
    assert np.abs(noise.double().numpy() - philox.gumbel(wanted)).max() < 4e-6


def test_noise_of_all_kinds_of_words():
    """Every magnitude of u, both ends and both sides of the seam at v = 1/16; words are fed through a kernel."""
    numerators = np.unique(np.concatenate(
        [np.clip(edge + np.arange(-40, 40), 0, 2**24 - 1) for edge in
         [0, 2**24 - 1, 2**23, 15 * 2**20] + [2**i for i in range(24)] + [2**24 - 2**i for i in range(24)]]))
    numerators = np.resize(numerators, 4096)
    words = torch.from_numpy((numerators.astype(np.uint32) << 8).view(np.int32)) | torch.arange(4096).int() % 256
    noise, short = torch.empty(2, 4096)

    @triton.jit
    def kernel(source, noise_out, short_out):
        at = tl.arange(0, 4096)
        words = tl.load(source + at).to(tl.uint32, bitcast=True)
        tl.store(noise_out + at, gumbel(words))
        tl.store(short_out + at, log2_short(words))

    kernel[(1,)](words, noise, short)
    wanted = philox.gumbel(words.numpy().view(np.uint32))
    assert np.abs(noise.double().numpy() - wanted).max() < 4e-6
    assert (wanted <= -math.log(2) * short.double().numpy() + 1e-6).all()  # no noise exceeds its bound
    away = (2.0**24 - 0.5 - numerators) / 2**24 - 2.0 ** short.double().numpy()
    assert -1e-6 < away.min() and away.max() < 2.0**-23 + 1e-6


# -- the sampler ------------------------------------------------------------------------------------------------------


def set_filters(lanes: LaneState, rows: list[tuple[float, int, float, float]]) -> None:
    for lane, row in enumerate(rows):
        for tensor, value in zip((lanes.temperature, lanes.top_k, lanes.top_p, lanes.min_p), row):
            tensor[lane] = value


def assert_same_step(logits: torch.Tensor, lanes: LaneState, **options) -> int:
    return same_step(sample_step.sample_step, logits, lanes, **options)


FILTERS = [
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (3.0, 1, 1.0, 0.0), (0.8, 5, 1.0, 0.0),
    (0.8, 40, 1.0, 0.0), (1.0, 900, 1.0, 0.0), (1.5, 0, 0.9, 0.0), (1.0, 0, 0.999, 0.0), (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 1.0), (2.0, 20, 0.7, 0.02), (0.7, 7, 0.5, 0.2), (5.0, 0, 0.99, 0.001),
    (0.1, 0, 0.95, 0.0), (1.0, 0, 0.3, 0.0), (0.0, 3, 0.5, 0.0),
]


def random_logits(kind: int, count: int, vocab: int, dtype=torch.float32) -> torch.Tensor:
    draw = generator(vocab + kind)
    logits = torch.randn(count, vocab, generator=draw) * 3
    if kind == 1:
        logits = logits.round()  # many ties
    elif kind == 2:
        logits[:, torch.randperm(vocab, generator=draw)[: vocab // 2]] = -math.inf
    elif kind == 3:
        logits[:] = 0.0
    elif kind == 4:
        logits -= 1e4
    return logits.to(dtype)


@pytest.mark.parametrize("vocab", [1, 5, 100, 1000, 4097])
def test_steps_equal_the_reference(vocab):
    ties = 0
    for kind in range(5 if vocab in (5, 4097) else 3):
        rows = FILTERS[kind % 3 :: 3]
        logits = random_logits(kind, len(rows), vocab, DTYPES[kind % 2])
        lanes = make_lanes(len(rows), seed=vocab)
        set_filters(lanes, rows)
        lanes.steps[:] = torch.randint(3, (len(rows),), generator=generator(kind))
        ties += assert_same_step(logits, lanes)
    assert ties <= 3


def test_steps_without_filters_leave_their_launches_out():
    logits = random_logits(0, 4, 5000, torch.float16)
    lanes = make_lanes(4)
    set_filters(lanes, [(temperature, 0, 1.0, 0.0) for temperature in (0.0, 1.0, 0.6, 2.0)])
    assert assert_same_step(logits, lanes, filters=False) == 0
    space = sample_step.make_workspace(4, 5000, logits.device, filters=False)
    assert assert_same_step(logits, lanes, filters=False, workspace=space) == 0
    with pytest.raises(ValueError, match="workspace"):
        sample_step.sample_step(logits, lanes, workspace=space)


@pytest.mark.parametrize("vocab", [5, 4097])
def test_lanes_end_where_the_entropy_reaches_their_cut(vocab):
    """In one tile and in several, with filters and without; a lane that draws draws what it drew without a cut."""
    logits = rows_of_entropies(vocab, vocab)
    assert assert_cuts(partial(sample_step.sample_step, filters=False), logits, ("below", "above")) == 7
    assert assert_cuts(sample_step.sample_step, logits[4:5].half(), temperature=0.4, top_p=0.8) == 2


def test_a_cut_needs_a_distribution_and_is_told_of():
    logits = torch.zeros(7, 2100)
    logits[0, 3], logits[1, 2099], logits[2], logits[4, :2048] = math.nan, math.inf, -math.inf, -math.inf
    lanes = make_lanes(7)
    lanes.entropy_cut[:6] = 0.0
    lanes.done[5] = 1
    ended = torch.zeros(9, dtype=torch.int32)
    sample_step.sample_step(logits, same := copy_of(lanes), filters=False, ended=ended)
    assert same.out_tokens[:, 0].tolist()[:6] == [-1, -1, -1, -9, -9, -9] and same.done.tolist() == [1] * 6 + [0]
    assert same.steps.tolist() == [1, 1, 1, 0, 0, 0, 1] and ended.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    sample_step.sample_step(logits, same := copy_of(lanes), cuts=False)  # who says so is believed
    assert same.steps.tolist() == [1, 1, 1, 1, 1, 0, 1]


def all_scores(logits: torch.Tensor, lanes: LaneState, lane: int) -> torch.Tensor:
    """float32 [vocab] z + g of a lane, with the noise of the kernels for every token."""
    vocab = logits.shape[1]
    blocks = triton.next_power_of_2(triton.cdiv(vocab, 4))
    words, noise = torch.empty(4 * blocks, dtype=torch.int32), torch.empty(4 * blocks)
    counter = (tensor[lane : lane + 1] for tensor in (lanes.seeds, lanes.steps, lanes.attempts, lanes.streams))
    noise_kernel[(1,)](words, noise, *counter, BLOCKS=blocks)
    return logits[lane].float() / lanes.temperature[lane] + noise[:vocab]


@pytest.mark.parametrize("vocab", [37, 2049, 9001])
@pytest.mark.parametrize("spread, offset", [(0.0, 0.0), (0.1, 9.0), (3.0, -30.0), (20.0, 0.0), (3.0, 1e4), (3.0, -1e6)])
def test_noise_that_is_left_out_could_not_have_won(vocab, spread, offset):
    """The winner is, exactly, the first argmax over the whole vocabulary, with all noise computed."""
    logits = torch.randn(8, vocab, generator=generator(2)) * spread + offset
    logits[::2, vocab // 2] += 4 * spread  # a token that has most of the probability
    lanes = make_lanes(8, seed=vocab)
    lanes.temperature[:] = torch.tensor([1.0, 1.0, 0.6, 0.6, 30.0, 0.01, 1e-31, 1e9])
    space = sample_step.make_workspace(8, vocab, logits.device, filters=False)
    sample_step.sample_step(logits, after := copy_of(lanes), filters=False, workspace=space)
    for lane in range(8):
        scores = all_scores(logits, lanes, lane)
        if not scores.isfinite().all():
            continue  # z overflows: another rule, tested elsewhere
        assert int(after.out_tokens[lane, 0]) == int((scores == scores.max()).nonzero()[0])
        of_tiles = torch.nn.functional.pad(scores, (0, -vocab % sample_step.TILE), value=-math.inf)
        of_tiles = of_tiles.view(-1, sample_step.TILE).amax(1)
        assert bool((of_tiles <= space.ceiling[lane]).all())


def test_few_tiles_need_their_noise():
    """Those whose bound reaches the winner's score: hardly more than the winner's, whatever the logits are like."""
    vocab, lanes = 12289, make_lanes(16, 0.7)
    logits = torch.randn(16, vocab, generator=generator(3)) * torch.tensor([0.0, 1.0, 3.0, 6.0]).repeat(4)[:, None]
    logits[8:, 999] = 6.0 + logits[8:].logsumexp(1)  # one token has all the probability
    space = sample_step.make_workspace(16, vocab, logits.device)
    reached = 0
    for _ in range(2):
        scores = torch.stack([all_scores(logits, lanes, lane).max() for lane in range(16)])
        sample_step.sample_step(logits, lanes, workspace=space)
        reached += int((space.ceiling >= scores[:, None]).sum())
    assert 32 <= reached <= 1.5 * 32


@pytest.mark.parametrize("vocab, kinds", [(5, (1, 2)), (100, (0, 3)), (1000, (1, 4)), (4097, (0, 2)), (9001, (0, 1)),
                                          (12288, (2,))])
def test_the_kept_tokens_are_those_of_the_reference(vocab, kinds):
    for kind in kinds:
        rows = [row for row in FILTERS if row[0] > 0 and row[1:] != (0, 1.0, 0.0)]
        rows += [(1.0, vocab - 1, 1.0, 0.0), (1.0, 0, 0.0, 0.0), (1.0, 30, 0.9, 0.4), (0.9, 500, 0.97, 0.0)]
        rows = rows[kind % 2 :: 2]
        logits = random_logits(kind, len(rows), vocab)
        lanes = make_lanes(len(rows))
        set_filters(lanes, rows)
        space = sample_step.make_workspace(len(rows), vocab, logits.device)
        sample_step.sample_step(logits, lanes, workspace=space)
        for lane, (temperature, top_k, top_p, min_p) in enumerate(rows):
            z = logits[lane] / lanes.temperature[lane]
            wanted = sampling_threshold(z, top_k, float(lanes.top_p[lane]), float(lanes.min_p[lane]))
            filtered = 0 < top_k < vocab or top_p < 1 or min_p > 0
            assert (int(space.mode[lane]) != 0) == filtered
            if filtered:
                got = float(space.bounds[lane, 3])
                assert torch.equal(z >= got, z >= wanted), f"{rows[lane]} {kind}: {got} instead of {wanted}"


def test_a_sample_that_misleads_is_found_out():
    """Every third of 12288 logits is looked at: first those are the largest of all, then the smallest."""
    vocab = 12288
    logits = torch.randn(2, vocab, generator=generator(5))
    logits[0, ::3] += 20
    logits[1, ::3] -= 3
    lanes = make_lanes(2)
    set_filters(lanes, [(1.0, 4200, 1.0, 0.0), (1.0, 0, 0.97, 0.0)])
    space = sample_step.make_workspace(2, vocab, logits.device)
    sample_step.sample_step(logits, lanes, workspace=space)
    for lane in range(2):
        assert torch.equal(space.values[lane], logits[lane]), "the interval was to miss the threshold"
        wanted = sampling_threshold(logits[lane], int(lanes.top_k[lane]), float(lanes.top_p[lane]), 0.0)
        assert torch.equal(logits[lane] >= float(space.bounds[lane, 3]), logits[lane] >= wanted)


def test_an_interval_of_a_sample_is_narrow():
    """What `collect` lists of 40000 logits: some multiples of top_k, a tenth of the vocabulary for top_p."""
    vocab = 40000
    logits = torch.randn(3, vocab, generator=generator(6)) * 2
    lanes = make_lanes(3)
    set_filters(lanes, [(1.0, 50, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (0.4, 0, 0.9, 0.0)])
    space = sample_step.make_workspace(3, vocab, logits.device)
    sample_step.sample_step(logits, lanes, workspace=space)
    assert space.count[0] < 1000 and space.count[1] < vocab // 5 and space.count[2] < vocab // 5
    for lane, top_k in enumerate((50, 0, 0)):
        z = logits[lane] / lanes.temperature[lane]
        wanted = sampling_threshold(z, top_k, float(lanes.top_p[lane]), 0.0)
        assert torch.equal(z >= float(space.bounds[lane, 3]), z >= wanted)


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((7, 37), -math.inf)
    logits[:, [5, 36]] = torch.tensor([0.0, -0.1])
    for top_k, top_p in [(0, 1.0), (20, 1.0), (0, 0.999999), (3, 0.99)]:
        lanes = make_lanes(7, 2.0, top_k, top_p)
        sample_step.sample_step(logits, lanes)
        assert set(lanes.out_tokens[:, 0].tolist()) == {5, 36}


def test_edges_of_temperature():
    logits = torch.zeros(4, 70)
    logits[0, [9, 33, 69]] = 4.0  # ties go to the lowest id
    logits[1, 69] = -1.0
    logits[2] = -1e30
    logits[2, 64] = -1e29
    logits[3, 11] = 3e38
    for temperature in (0.0, 1e-38, 1e-45):
        for top_k in (0, 3):
            assert assert_same_step(logits, make_lanes(4, temperature, top_k)) == 0


def test_logits_that_are_no_distribution_end_the_lane():
    for vocab in (5, 4100):
        logits = torch.zeros(6, vocab)
        logits[0, vocab - 1] = math.nan
        logits[1, vocab // 2] = math.inf
        logits[2] = -math.inf
        logits[3, 0], logits[3, 3] = math.nan, -math.inf
        logits[4] = math.nan
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9)):
            assert assert_same_step(logits, make_lanes(6, 0.8, top_k, top_p)) == 0


def test_lanes_end_at_stop_ids_and_limits_and_stay_ended():
    logits = torch.full((5, 17), -math.inf)
    logits[:, 13] = 0.0
    lanes = make_lanes(5, 1.0, max_steps=3)
    lanes.stop_ids[1, 1] = 13
    lanes.max_tokens[2] = 2
    lanes.done[3] = 1
    lanes.top_k[4] = 2
    for _ in range(3):
        ended = copy_of(lanes)
        assert assert_same_step(logits, lanes) == 0 if bool((lanes.done == 0).any()) else True
        sample_step.sample_step(logits, lanes)
        for tensor, before in zip(lanes, ended):
            assert torch.equal(tensor[3], before[3])
    assert lanes.steps.tolist() == [3, 1, 2, 0, 3] and lanes.done.tolist() == [1] * 5
    assert lanes.slab_used.tolist() == [5, 3, 4, 3, 5]


def test_a_lane_without_a_column_is_ended_and_writes_nothing():
    for step in (-1, 3, 2**31 - 1):
        lanes = make_lanes(3, top_k=2)
        lanes.steps[1] = step
        expected = copy_of(lanes)
        sample_step.sample_step(torch.zeros(3, 17), lanes)
        assert lanes.done.tolist() == [0, 1, 0]
        for name in set(LaneState._fields) - {"done"}:
            assert torch.equal(getattr(lanes, name)[1], getattr(expected, name)[1])


def test_lanes_that_a_draw_ends_are_told_of():
    """By a stop id, a limit, NaN, and where no column is left; not those that go on, or had ended before."""
    logits = torch.full((6, 2100), -math.inf)
    logits[:, 2099] = 0.0
    logits[2] = math.nan
    lanes = make_lanes(6, 1.0, max_steps=3)
    lanes.stop_ids[0, 2] = 2099
    lanes.max_tokens[1] = 1
    lanes.done[3] = 1
    lanes.steps[4] = 3
    for _ in range(2):  # what was told stays
        ended = torch.full((9,), -5, dtype=torch.int32)
        sample_step.sample_step(logits, same := copy_of(lanes), filters=False, ended=ended)
        assert ended.tolist() == [1, 1, 1, -5, 1, -5, -5, -5, -5] and same.done.tolist() == [1, 1, 1, 1, 1, 0]
    reference = torch.zeros(4, dtype=torch.int32)
    without = LaneState(*(tensor[:4].clone() for tensor in lanes))
    sample_step_reference(logits[:4], without, ended=reference)
    assert reference.tolist() == [1, 1, 1, 0]
    with pytest.raises(ValueError, match=r"ended is torch.int32 \[5\] for 6 lanes"):
        sample_step.sample_step(logits, lanes, ended=torch.zeros(5, dtype=torch.int32))


def test_a_lane_does_not_depend_on_its_company():
    logits = random_logits(0, 5, 4200)
    lanes = make_lanes(5)
    set_filters(lanes, [(0.9, 50, 0.95, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (0.0, 0, 1.0, 0.0),
                        (1.0, 0, 1.0, 0.05)])
    together = copy_of(lanes)
    sample_step.sample_step(logits, together)
    for lane in range(5):
        one = LaneState(*(tensor[lane : lane + 1].clone() for tensor in lanes))
        sample_step.sample_step(logits[lane : lane + 1], one)
        for a, b in zip(together, one):
            assert torch.equal(a[lane], b[0])


# -- rewards, drafts that a scoring pass trails -----------------------------------------------------------------------


def lanes_with_rewards(rewards: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Residual, branch, norm weight and head that give exactly these rewards (up to 1024) where eps is 0.

    Lane i is 32 at column i of 1024 and else 0, so that its mean square is 1, and its reward 32 times the head there.
    """
    residual = torch.eye(1024)[: len(rewards)] * 32
    residual[rewards.isnan()] = math.nan
    head = torch.zeros(1, 1024)
    # 32 times 3e38 is infinite; an infinity in the head would be NaN in all lanes.
    head[0, : len(rewards)] = torch.where(rewards.isinf(), 3e38 * rewards.sign(), rewards / 32).nan_to_num(0.0)
    return residual, torch.zeros_like(residual), torch.ones(1024), head


def test_rewards_at_the_edges_are_what_they_are():
    """NaN, infinities and the largest numbers reach the host as they are, and no other lane."""
    edges = torch.tensor([0.0, 1.0, math.nan, -0.5, math.inf, 3e38, -math.inf, -3e38, 2.0**-100, 384.0, math.nan, -1.0])
    residual, branch, weight, matrix = lanes_with_rewards(edges)
    rewards = torch.full((len(edges),), -9.0)
    score.score(residual, branch, weight, 0.0, Weight(matrix, None, 1, 1024), torch.empty(0), rewards)
    assert torch.equal(rewards.nan_to_num(-7.0), edges.nan_to_num(-7.0))
    assert torch.equal(rewards.isnan(), edges.isnan()) and torch.equal(rewards.isinf(), edges.isinf())


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_quantised_reward_head_is_refused(scheme):
    """Its numbers are as many as a head's, and without its scales they would be read as one."""
    head = as_stored(quantize(torch.randn(1, 64, generator=generator(0)), scheme, 0))
    rows = torch.ones(2, 64)
    rewards = torch.full((2,), -9.0)
    with pytest.raises(ValueError, match=f"^score: the head is stored as {scheme} and must be of floating point"):
        score.score(rows, None, torch.ones(64), 0.0, head, torch.empty(0), rewards)
    assert bool((rewards == -9.0).all())
    whole = Weight(torch.ones(1, 64, dtype=torch.int8), None, 1, 64)
    with pytest.raises(ValueError, match="^score: the head is stored as torch.int8 and must be"):
        score.score(rows, None, torch.ones(64), 0.0, whole, torch.empty(0), rewards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [17, 64, 1030])
def test_rewards(hidden, dtype):
    for lanes, weight_dtype, offset in ((1, torch.float32, None), (7, dtype, None), (37, torch.float32, -0.75)):
        residual, branch = (torch.randn(lanes, 2 * hidden, generator=generator(i)).to(dtype)[:, :hidden]  # rows apart
                            for i in (2, 3))
        weight = (torch.rand(hidden, generator=generator(4)) + 0.5).to(weight_dtype)
        head = torch.randn(1, hidden, generator=generator(5)) / hidden**0.5
        head = Weight(head, None if offset is None else torch.tensor([offset]), 1, hidden)
        ours, wanted, room = torch.full((lanes,), -9.0), torch.empty(lanes), torch.empty(lanes, hidden)
        given = residual.clone()
        score.score(residual, branch, weight, 1e-6, head, room, ours)
        assert torch.equal(residual, given)
        score_reference(given, branch, weight, 1e-6, head, room, wanted)
        # float32: sums of up to 1030 in another order. Otherwise casts in between may go the other way, by a unit
        # in each of the terms, which add up to about 1.
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 + (
            0 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps))
        added, alone = torch.empty_like(ours), (residual + branch)
        score.score(alone, None, weight, 1e-6, head, room, added)  # as behind the fused chain
        # The interpreter cuts a sum where torch rounds it; see assert_near.
        assert dtype == torch.bfloat16 or torch.equal(added, ours)
        score_reference(alone, None, weight, 1e-6, head, room, wanted)
        torch.testing.assert_close(added, wanted, rtol=0, atol=1e-5 + 6 * torch.finfo(dtype).eps)
        one = torch.full((1,), -9.0)
        score.score(residual[lanes // 2 :][:1], branch[lanes // 2 :][:1], weight, 1e-6, head, room, one)
        assert torch.equal(one[0], ours[lanes // 2]), "a lane depends on its company"


def test_what_trails_a_draft():
    """By hand, of a vocabulary of 50: who is left alone, what is dropped, what becomes 0."""
    draft = Draft(*(torch.tensor(values, dtype=torch.int32) for values in (
        [[7, 8, 9], [7, 2, 9], [7, -1, 9], [7, 50, -3], [-1, 9, 9], [3, 4, 2]], [3, 2, 2, 3, 0, 3],
        [[2, -1], [2, -1], [2, -1], [2, 1], [2, -1], [9, 8]])))
    cases = [  # lane, closing, what is written
        (0, [11, 12], [7, 8, 9, 11, 12]), (1, [11, -1], [7, 11]), (2, [-1, -1], [7]), (3, [11, -1], [7, 0, 0, 11]),
        (4, [11, 12], [11, 12]), (4, [-1, -1], []), (5, [-1, -1], [3, 4, 2]), (-1, [11, 12], []),
        (0, [-1, -1], [7, 8, 9])]
    starts = torch.arange(len(cases) + 1) * 7 + 2
    trailing = TrailingRows(
        torch.tensor([case[0] for case in cases], dtype=torch.int32), starts.int(),
        torch.tensor([case[1] for case in cases], dtype=torch.int32), torch.full((int(starts[-1]),), -9).int(),
        torch.full((len(cases),), -9).int())
    drafts.append_draft(draft, trailing, 50)
    rows = trailing.token_ids[2:].view(-1, 7)
    for sequence, (lane, _, written) in enumerate(cases):
        assert rows[sequence].tolist() == [-9, *written] + [-9] * (6 - len(written)), sequence
        assert int(trailing.last[sequence]) == (starts[sequence] + len(written) if lane >= 0 else -9)
    assert trailing.token_ids[:2].tolist() == [-9, -9]


@pytest.mark.parametrize("lanes, max_steps, stop_ids, sequences, max_closing", [
    (1, 1, 1, 1, 0), (4, 16, 16, 7, 4), (37, 5, 3, 37, 3), (3, 300, 2, 7, 1), (5, 3, 0, 37, 2), (3, 0, 2, 4, 2),
    (4, 6, 2, 0, 1)])
def test_drafts_are_appended_as_the_reference_does(lanes, max_steps, stop_ids, sequences, max_closing):
    draw = np.random.default_rng(max_steps)
    for _ in range(3):
        draft = make_draft(draw, lanes, max_steps, stop_ids)
        trailing = make_trailing(draw, draft, sequences, max_closing)
        expected, given = copy_of(trailing), copy_of(draft)
        drafts.append_draft(draft, trailing, VOCAB)
        append_draft_reference(draft, expected, VOCAB)
        for name, got, wanted in zip(TrailingRows._fields, trailing, expected, strict=True):
            assert torch.equal(got, wanted), name
        assert all(torch.equal(a, b) for a, b in zip(draft, given, strict=True))


run_in_interpreter(globals())
