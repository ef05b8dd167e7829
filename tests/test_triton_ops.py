"""The Triton kernels in the interpreter against their torch references: norms, products, rows, sampler, verdicts."""

from __future__ import annotations

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch

from sampler_lanes import assert_same_step as same_step
from sampler_lanes import copy_of
from sampler_lanes import make_lanes as fresh_lanes
from stars.kernels import philox
from stars.kernels.copy_rows import copy_rows_reference
from stars.kernels.embedding import embedding_reference
from stars.kernels.linear import Weight, linear_reference
from stars.kernels.rms_norm import rms_norm_reference
from stars.kernels.sample_step import sampling_threshold
from stars.kernels.score_and_decide import decide_reference, score_and_decide_reference
from stars.kernels.swiglu import swiglu_reference
from stars.kernels.take_rows import take_rows_reference
from stars.kernels.types import DecideState, LaneState
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    import triton
    import triton.language as tl

    from stars.kernels.triton import copy_rows, embedding, linear, rms_norm, sample_step, swiglu, take_rows
    from stars.kernels.triton import score_and_decide as verdicts
    from stars.kernels.triton.noise import gumbel, token_words

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
        for out_dtype in {dtype, torch.float32}:
            out = torch.empty(rows, out_features, dtype=out_dtype)
            linear.linear(x, weight, out)
            exact = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
            size = x.double().abs() @ matrix.double().abs().T + 4
            # in_features float32 roundings of the sum at most, and one of the result.
            bound = size * in_features * 2**-24 + exact.abs() * torch.finfo(out_dtype).eps
            assert bool(((out.double() - exact).abs() <= bound).all())
        wanted = torch.empty(rows, out_features, dtype=dtype)
        linear_reference(x, weight, wanted)
        linear.linear(x, Weight(matrix, bias, out_features, in_features), out := torch.empty_like(wanted))
        assert_near(out, wanted, 4)  # torch's own product, by another call


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


def test_the_operations_reach_their_kernels(monkeypatch):
    """What CUDA tensors would do, in the interpreter: each operation's own branch, with its arguments in order."""
    from stars import kernels

    names = ("copy_rows", "embedding", "linear", "rms_norm", "sample_step", "score_and_decide", "swiglu", "take_rows")
    modules = [sys.modules[f"stars.kernels.{name}"] for name in names]
    for module in modules:
        monkeypatch.setattr(module, "on_triton", lambda tensor: True)
        monkeypatch.setattr(module, "on_libstars", lambda tensor: False, raising=False)
        for name in list(vars(module)):
            if name.endswith("_reference"):
                monkeypatch.setattr(module, name, None)
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
    state, rows = random_state(np.random.default_rng(1), 2)
    rows[:] = 1
    kernels.score_and_decide(x, None, rows, torch.ones(20), 0.0, torch.ones(20), None, state)
    torch.testing.assert_close(state.rewards, torch.nn.functional.rms_norm(x[1], (20,)).sum().expand(rows.shape[0]))


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
    words = torch.from_numpy((numerators.astype(np.uint32) << 8).view(np.int32))
    noise = torch.empty(4096)

    @triton.jit
    def kernel(source, target):
        at = tl.arange(0, 4096)
        tl.store(target + at, gumbel(tl.load(source + at).to(tl.uint32, bitcast=True)))

    kernel[(1,)](words, noise)
    assert np.abs(noise.double().numpy() - philox.gumbel(words.numpy().view(np.uint32))).max() < 4e-6


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
    set_filters(lanes, [(0.0, 7, 0.5, 0.3), (1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (2.0, 5000, 1.0, 0.0)])
    assert assert_same_step(logits, lanes, filters=False) == 0
    space = sample_step.make_workspace(4, 5000, logits.device, filters=False)
    assert assert_same_step(logits, lanes, filters=False, workspace=space) == 0
    with pytest.raises(ValueError, match="workspace"):
        sample_step.sample_step(logits, lanes, space)


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
        sample_step.sample_step(logits, lanes, space)
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
    sample_step.sample_step(logits, lanes, space)
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
    sample_step.sample_step(logits, lanes, space)
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
    lanes.limits[2] = 2
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


# -- rewards and verdicts ---------------------------------------------------------------------------------------------

EDGES = (0.0, 1.0, -1.0, 0.5, 1e300, -1e300, 1e-300)


def random_state(draw: np.random.Generator, requests: int) -> tuple[DecideState, torch.Tensor]:
    """Requests of 0 to 5 lanes with common values and all edges mixed, so that equal rewards and bounds occur."""
    counts = draw.integers(0, 6, requests)
    starts = np.concatenate(([0], np.cumsum(counts)))
    lanes = int(starts[-1])

    def pick(values, size, edges, chance):
        return np.where(draw.random(size) < chance, draw.choice(np.array(edges), size), draw.choice(values, size))

    common = np.concatenate((draw.normal(size=20), [0.0, 1.0, 1.0]))
    rewards = pick(common, lanes, (math.nan, math.inf, -math.inf, 0.0, 3e38), 0.25)
    max_tokens = draw.integers(1, 200, requests)
    tokens = np.concatenate([draw.integers(1, n + 1, c) for n, c in zip(max_tokens, counts)] + [[]])
    attempts = np.concatenate([draw.integers(1, 1 << 20) + np.arange(c) for c in counts] + [[]])
    streams = np.array([philox.pack_stream(int(draw.integers(1 << 20)), int(draw.integers(1 << 12)))
                        for _ in range(requests)], dtype=np.uint32).view(np.int32)
    record = np.full((requests, 3), -1)
    record[draw.random(requests) < 0.1, 0] = 0  # decided before
    record[draw.random(requests) < 0.1, 2] = 0
    best_attempt = draw.integers(0, 2, requests) * 3
    state = DecideState(
        lane_start=torch.tensor(starts, dtype=torch.int32),
        seeds=torch.tensor(draw.integers(-2**63, 2**63, requests)),
        streams=torch.tensor(streams), max_tokens=torch.tensor(max_tokens, dtype=torch.int32),
        start=torch.tensor(pick(common, requests, EDGES, 0.2)),
        reward_threshold=torch.tensor(pick(common, requests, EDGES + (math.inf, -math.inf), 0.4)),
        beta=torch.tensor(pick(np.array([0.1, 1.0, 3.0]), requests, (0.0, 1e-300, 1e300), 0.4)),
        attempts=torch.tensor(attempts, dtype=torch.int32), tokens=torch.tensor(tokens, dtype=torch.int32),
        slabs=torch.arange(2 * lanes, dtype=torch.int32).view(2, lanes),
        best_reward=torch.tensor(pick(common, requests, (-math.inf,), 0.2)),
        best_attempt=torch.tensor(best_attempt, dtype=torch.int32),
        best_slab=torch.arange(1000, 1000 + 2 * requests, dtype=torch.int32).view(2, requests),
        record=torch.tensor(record, dtype=torch.int32), rewards=torch.tensor(rewards, dtype=torch.float32))
    scored = torch.tensor(np.where(draw.random(lanes) < 0.8, np.arange(lanes), -1), dtype=torch.int32)
    return state, scored


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_are_those_of_the_law(seed):
    state, rows = random_state(np.random.default_rng(seed), 100)
    expected = DecideState(*(tensor.clone() for tensor in state))
    verdicts.decide(rows, state)
    decide_reference(rows, expected)
    for name, got, wanted in zip(DecideState._fields, state, expected):
        assert torch.equal(got, wanted) or name == "rewards", f"{name}: {got[got != wanted]} {wanted[got != wanted]}"
    if seed == 0:  # all kinds of ends occur
        assert all(bool((state.record[:, column] > 0).any()) for column in range(3))


def test_the_law_at_its_own_thresholds():
    """beta = 0 with a reward that equals tau exactly, as float64 forms it, is accepted, the next lower one is not."""
    from stars import law

    draw = np.random.default_rng(3)
    state, _ = random_state(draw, 60)
    lanes = state.rewards.shape[0]
    state.beta[:] = 0.0
    state.record[:] = -1
    request_of = torch.repeat_interleave(torch.arange(60), state.lane_start.diff())
    for lane in range(lanes):
        request = int(request_of[lane])
        reward = float(np.float32(draw.normal()))
        if lane == int(state.lane_start[request]):  # tau(n) = reward at this lane: start there, end higher
            state.start[request], state.reward_threshold[request] = reward, reward
        state.rewards[lane] = reward if draw.random() < 0.5 else float(np.nextafter(np.float32(reward), np.float32(-9)))
    expected = DecideState(*(tensor.clone() for tensor in state))
    rows = torch.arange(lanes, dtype=torch.int32)
    verdicts.decide(rows, state)
    decide_reference(rows, expected)
    for got, wanted in zip(state, expected):
        assert torch.equal(got, wanted)
    assert law.accepts(0.5, 1.0, 1.0, 0.0) and bool((state.record[:, 0] >= 0).any())


def test_a_round_in_two_calls_equals_one():
    for seed in range(2):
        state, _ = random_state(np.random.default_rng(100 + seed), 20)
        state.record[:] = -1
        apart = DecideState(*(tensor.clone() for tensor in state))
        lanes = torch.arange(state.rewards.shape[0], dtype=torch.int32)
        first = torch.repeat_interleave(state.lane_start[:-1], state.lane_start.diff())
        early = lanes - first < 2
        verdicts.decide(lanes, state)
        verdicts.decide(torch.where(early, lanes, -1), apart)
        verdicts.decide(torch.where(early, -1, lanes), apart)
        undecided = state.record[:, [0, 2]].max(dim=1).values < 0
        for name in ("record", "best_reward", "best_attempt"):
            assert torch.equal(getattr(state, name)[undecided], getattr(apart, name)[undecided])
        assert torch.equal(state.record[:, [0, 2]], apart.record[:, [0, 2]])
        for pool in range(2):  # slab ids are moved, never lost
            ids = torch.cat((apart.slabs[pool], apart.best_slab[pool]))
            assert ids.unique().numel() == ids.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [17, 64, 1030])
def test_rewards(hidden, dtype):
    for requests, weight_dtype in ((1, torch.float32), (7, dtype)):
        state, _ = random_state(np.random.default_rng(hidden), requests)
        lanes = state.rewards.shape[0]
        rows = torch.randperm(50, generator=generator(1))[:lanes].int()
        rows[lanes // 2 : lanes // 2 + 1] = -1
        residual, branch = (torch.randn(50, hidden, generator=generator(i)).to(dtype) for i in (2, 3))
        weight = (torch.rand(hidden, generator=generator(4)) + 0.5).to(weight_dtype)
        head = torch.randn(hidden, generator=generator(5)) / hidden**0.5
        for added, bias in ((branch, None), (None, torch.tensor([0.25]))):
            ours = DecideState(*(tensor.clone() for tensor in state))
            wanted = DecideState(*(tensor.clone() for tensor in state))
            verdicts.score_and_decide(residual, added, rows, weight, 1e-6, head, bias, ours)
            score_and_decide_reference(residual, added, rows, weight, 1e-6, head, bias, wanted)
            # float32: sums of up to 1030 in another order. Otherwise casts in between may go the other way, by a unit
            # in each of the terms, which add up to about 1.
            torch.testing.assert_close(ours.rewards, wanted.rewards, rtol=0, equal_nan=True,
                                       atol=1e-5 + (0 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps))
            assert torch.equal(ours.rewards[rows < 0], wanted.rewards[rows < 0]) or lanes == 0
            if dtype == torch.float32:
                assert torch.equal(ours.record, wanted.record)


run_in_interpreter(globals())
