"""Attention and rope_write in Triton: against float64, the same bits in any company. On a GPU where there is one, else
in the interpreter; TRITON_INTERPRET=1 forces that.

bfloat16 products are beyond Triton's interpreter, which holds that type as integers: they are checked on a GPU only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from stars.kernels.rope_write import rope_write_reference
from stars.kernels.triton import tiles as tiling
from stars.kernels.triton.tiles import Plan
from stars.kernels.types import Batch, LayerKV
from triton_process import INTERPRETED, run_in_interpreter

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
SLAB_LEN = 48
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


class Sequence(NamedTuple):
    group: int
    prefix: int
    slab_used: int
    count: int


# Lanes that share pages and differ in how much of them is valid, a lane without prefix, one whose prefix ends with a
# page, one short of it and one past it, and one that has ended and only repeats itself.
DRAFT = [Sequence(0, 37, 5, 1), Sequence(0, 37, 5, 1), Sequence(0, 35, 0, 1), Sequence(1, 0, 0, 1),
         Sequence(2, 123, 33, 1), Sequence(3, 16, 1, 1), Sequence(4, 15, 0, 1), Sequence(5, 17, 2, 1)]
SCORING = [Sequence(0, 37, 0, 3), Sequence(0, 33, 2, 17), Sequence(1, 1, 0, 1), Sequence(2, 64, 15, 5)]
PREFILL = [Sequence(0, 0, 0, 37), Sequence(1, 17, 0, 15), Sequence(2, 63, 0, 1), Sequence(3, 0, 0, 1)]


class Case(NamedTuple):
    q: torch.Tensor
    kv: LayerKV
    batch: Batch
    tables: torch.Tensor
    sequences: list[Sequence]

    @property
    def row_start(self) -> list[int]:
        return self.batch.row_start.tolist()


if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_this_numpy(tensor, scope) -> None:
        """The interpreter holds scalars as arrays of one element, which NumPy from 2.4 on does not convert by int():
        without this no loop may have bounds that a kernel computed (Triton 3.6)."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_for_this_numpy


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_case(
    sequences: list[Sequence], into_slab: bool, heads: int = 4, kv_heads: int = 2, head_dim: int = 64,
    dtype: torch.dtype = torch.float32, page_size: int = 16, seed: int = 0,
) -> Case:
    """Queries, a cache with shuffled pages, and a batch; whatever no row may see is NaN."""
    draw = torch.Generator().manual_seed(seed)
    longest = max(s.prefix + (0 if into_slab else s.count) for s in sequences)
    groups, pages = max(s.group for s in sequences) + 1, longest // page_size + 1
    tables = torch.randperm(groups * pages, generator=draw).int().view(groups, pages)
    shapes = [groups * pages * page_size] * 2 + [len(sequences) * SLAB_LEN] * 2
    kv = LayerKV(*(torch.randn(rows, kv_heads, head_dim, generator=draw) for rows in shapes), page_size)
    written = torch.zeros(shapes[0], dtype=torch.bool), torch.zeros(shapes[2], dtype=torch.bool)
    starts = [0]
    for index, s in enumerate(sequences):
        starts.append(starts[-1] + s.count)
        at = torch.arange(s.prefix + (0 if into_slab else s.count))
        written[0][tables[s.group].long()[at // page_size] * page_size + at % page_size] = True
        written[1][index * SLAB_LEN : index * SLAB_LEN + s.slab_used + s.count] = into_slab
    for tensor, rows in zip(kv[:4], (written[0], written[0], written[1], written[1]), strict=True):
        tensor[~rows] = math.nan
    q = torch.randn(starts[-1], heads, head_dim, generator=draw)
    empty = int32([0] * starts[-1])
    batch = Batch(
        empty, empty, empty, into_slab, int32(starts), int32([s.group for s in sequences]), tables.to(DEVICE),
        int32([s.prefix for s in sequences]), int32([i * SLAB_LEN for i in range(len(sequences))]),
        int32([s.slab_used for s in sequences]))
    kv = LayerKV(*(tensor.to(DEVICE, dtype) for tensor in kv[:4]), page_size)
    return Case(q.to(DEVICE, dtype), kv, batch, tables, sequences)


def with_plan(case: Case, plan: Plan, unused: int = 0) -> Case:
    """The case under a given plan, with `unused` tiles added."""
    q, kv, batch = case.q, case.kv, case.batch
    per_kv = q.shape[1] // kv.k_pages.shape[1]
    tiles = tiling.build_as(plan, case.row_start, batch.seq_group.tolist(), batch.into_slab, per_kv, DEVICE)
    more = torch.zeros(unused, 3, dtype=torch.int32, device=DEVICE)
    tiles = tiles._replace(prefix=torch.cat((tiles.prefix, more)), slab=torch.cat((tiles.slab, more)))
    return case._replace(batch=batch._replace(tiles=tiles))


def run(case: Case, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
    from stars.kernels.triton.attention import attention

    out = torch.full_like(case.q, math.nan)
    attention(case.q, case.kv, case.batch, case.q.shape[-1] ** -0.5, out, window, softcap)
    return out


def plain(case: Case, window: int | None, softcap: float | None, dtype: torch.dtype) -> torch.Tensor:
    """From the definition at `Batch`, sequence by sequence, every operation of torch in `dtype`."""
    q, kv, batch = case.q, case.kv, case.batch
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    starts = case.row_start
    for index, s in enumerate(case.sequences):
        rows = slice(starts[index], starts[index + 1])
        at = torch.arange(s.prefix + (0 if batch.into_slab else s.count))
        page_rows = case.tables[s.group].long()[at // kv.page_size] * kv.page_size + at % kv.page_size
        keys, values = (tensor[page_rows.to(q.device)] for tensor in (kv.k_pages, kv.v_pages))
        if batch.into_slab:
            slab = slice(index * SLAB_LEN, index * SLAB_LEN + s.slab_used + s.count)
            keys, values = torch.cat((keys, kv.k_slabs[slab])), torch.cat((values, kv.v_slabs[slab]))
        repeat = q.shape[1] // keys.shape[1]
        keys, values = (tensor.to(dtype).repeat_interleave(repeat, 1).transpose(0, 1) for tensor in (keys, values))
        scores = q[rows].to(dtype).transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5  # [heads, rows, keys]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        count = keys.shape[1]
        distance = torch.arange(count - s.count, count)[:, None] - torch.arange(count)[None, :]
        unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(unseen.to(q.device), -math.inf)
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


def assert_close(case: Case, window: int | None = None, softcap: float | None = None) -> None:
    """The largest error against float64 is at most twice that of torch in the same type, plus a floor.

    The floor is a few half-units in the last place of the largest value (16 in float32, where sums taken in another
    order lose as much; 2 in the short types, whose one rounding of weights and result is the larger part). torch may
    be lucky where only a few keys are seen.
    """
    dtype = case.q.dtype
    truth = plain(case, window, softcap, torch.float64)
    error = float((run(case, window, softcap) - truth).abs().max())  # NaN if a row was not written
    half_unit = torch.finfo(dtype).eps / 2 * float(case.kv.v_pages.nan_to_num().abs().max())
    allowed = float((plain(case, window, softcap, dtype).double() - truth).abs().max())
    assert error <= 2 * allowed + (16 if dtype == torch.float32 else 2) * half_unit


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sequences, into_slab", [(DRAFT, True), (SCORING, True), (PREFILL, False)])
@pytest.mark.parametrize("window, softcap", [(None, None), (17, 3.0)])
def test_against_float64(dtype, sequences, into_slab, window, softcap):
    assert_close(make_case(sequences, into_slab, dtype=dtype), window, softcap)


@pytest.mark.parametrize("head_dim, repeat, page_size", [(80, 1, 16), (96, 4, 32), (128, 8, 16), (256, 2, 64)])
def test_head_sizes_and_groups_against_float64(head_dim, repeat, page_size):
    # Scoring in the first half of the list would take long in the interpreter at every size: three sequences do.
    sequences = [Sequence(0, 33, 3, 1), Sequence(0, 31, 0, 2), Sequence(1, 65, 0, 1)]
    assert_close(make_case(sequences, True, 2 * repeat, 2, head_dim, torch.float16, page_size))
    prefill = [Sequence(0, 15, 0, 3)]
    assert_close(make_case(prefill, False, 2 * repeat, 2, head_dim, torch.float32, page_size))


@pytest.mark.parametrize("repeat", [3, 5, 7, 16])
def test_groups_that_do_not_divide_a_tile(repeat):
    sequences = [Sequence(0, 20, 3, 1)] * 7 + [Sequence(1, 9, 0, 6)]
    assert_close(make_case(sequences, True, repeat, 1, dtype=torch.float16))


@pytest.mark.parametrize("window", [1, 16, 101])
def test_windows(window):
    assert_close(make_case(DRAFT, True, heads=2, kv_heads=1), window)
    assert_close(make_case(PREFILL[:2], False, heads=2, kv_heads=1), window)


def test_softcap_of_small_and_large_scores():
    for softcap in (0.05, 50.0):
        case = make_case(DRAFT[:5], True, heads=2, kv_heads=1)
        assert_close(case, None, softcap)
        assert_close(case._replace(q=case.q * 30), None, softcap)


@pytest.mark.parametrize("sequences, into_slab", [(DRAFT, True), (PREFILL, False)])
def test_any_number_of_splits_agrees(sequences, into_slab):
    case = make_case(sequences, into_slab, heads=2, kv_heads=1)
    one = run(with_plan(case, Plan(32, 16, 1, 0)))
    for plan in (Plan(32, 16, 2, 0), Plan(32, 16, 5, 0), Plan(64, 16, 3, 64)):
        torch.testing.assert_close(run(with_plan(case, plan)), one, rtol=0, atol=2e-6)
    assert_close(with_plan(case, Plan(32, 16, 2, 64)), 37)


def test_unused_tiles_change_nothing():
    case = make_case(SCORING, True)
    plan = Plan(32, 16, 2, 0)
    assert torch.equal(run(with_plan(case, plan)), run(with_plan(case, plan, unused=3)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sequences, into_slab, plan", [
    (DRAFT, True, Plan(64, 16, 2, 64)), (SCORING, True, Plan(64, 64, 2, 64)), (PREFILL, False, Plan(64, 64, 1, 0))])
def test_a_sequence_alone_has_the_bits_it_has_in_company(dtype, sequences, into_slab, plan):
    case = make_case(sequences, into_slab, dtype=dtype)
    together = run(with_plan(case, plan), 37)
    starts = case.row_start
    for index in range(0, len(sequences), 2):
        rows = slice(starts[index], starts[index + 1])
        batch = case.batch
        alone = Case(
            case.q[rows].contiguous(), case.kv,
            batch._replace(row_start=int32([0, sequences[index].count]), seq_group=batch.seq_group[index : index + 1],
                           prefix_len=batch.prefix_len[index : index + 1].contiguous(),
                           slab_start=batch.slab_start[index : index + 1].contiguous(),
                           slab_used=batch.slab_used[index : index + 1].contiguous()),
            case.tables, [sequences[index]])
        # A table that has more tiles and parts than keys changes nothing either.
        splits = plan.splits if not into_slab else plan.splits + 1
        assert torch.equal(run(with_plan(alone, plan._replace(splits=splits), unused=1), 37), together[rows])


def test_a_workspace_too_small_and_wrong_types_are_refused():
    case = with_plan(make_case(DRAFT[:2], True), Plan(16, 16, 1, 0))
    tiles = case.batch.tiles._replace(workspace=torch.empty(10, device=DEVICE))
    with pytest.raises(ValueError, match="workspace"):
        run(case._replace(batch=case.batch._replace(tiles=tiles)))
    with pytest.raises(TypeError, match="float16"):
        run(case._replace(q=case.q.half()))
    with pytest.raises(ValueError, match="page_size"):
        run(case._replace(kv=case.kv._replace(page_size=24)))
    with pytest.raises(ValueError, match="split_keys"):
        run(with_plan(case, Plan(16, 16, 1, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("repeat", [1, 2, 4, 8])
@pytest.mark.parametrize("window, softcap", [(None, None), (37, None), (None, 20.0)])
def test_all_sizes_against_float64(dtype, head_dim, repeat, window, softcap):
    for sequences, into_slab in ((DRAFT, True), (SCORING, True), (PREFILL, False)):
        assert_close(make_case(sequences, into_slab, 2 * repeat, 2, head_dim, dtype, 32), window, softcap)


# -- rope_write -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, head_dim, norm", [
    (4, 2, 64, False), (3, 1, 80, True), (2, 2, 96, True), (8, 1, 128, False), (2, 1, 256, True)])
@pytest.mark.parametrize("into_slab", [True, False])
def test_rope_write_against_float64(dtype, heads, kv_heads, head_dim, norm, into_slab):
    draw = torch.Generator().manual_seed(1)
    slots = int32([5, -1, 0, 17])  # a row that is written nowhere, and the rest out of order
    rows, positions = 4, int32([0, 3, 99, 41])

    def case(kind):
        return torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=draw.manual_seed(1)).to(dtype).to(
            DEVICE, kind)

    angles = torch.arange(100)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    weights = [torch.rand(head_dim, generator=draw).to(DEVICE, dtype) for _ in range(2)] if norm else [None, None]
    batch = Batch(slots, positions, slots, into_slab, *[slots] * 6)
    results = {}
    for kind in (dtype, torch.float64, "kernel"):
        of = dtype if kind == "kernel" else kind
        kv = LayerKV(*(torch.full((20, kv_heads, head_dim), 7.0, dtype=of, device=DEVICE) for _ in range(4)), 16)
        q_out = torch.full((rows, heads, head_dim), math.nan, dtype=of, device=DEVICE)
        if kind == "kernel":
            from stars.kernels.triton.rope_write import rope_write as write
        else:
            write = rope_write_reference
        if kind == torch.float64:
            exact_rope(case(of), batch, cos.double(), sin.double(), kv, q_out, *weights)
        else:
            write(case(of), batch, cos, sin, kv, q_out, *weights)
        results[kind] = (q_out, *kv[:4])
    for name, got, plain_result, truth in zip(
            ("q", "k_pages", "v_pages", "k_slabs", "v_slabs"), results["kernel"], results[dtype],
            results[torch.float64], strict=True):
        if name[0] == "v":
            assert torch.equal(got, plain_result)
        floor = 2 * torch.finfo(dtype).eps * float(truth.abs().max())
        assert float((got - truth).abs().max()) <= 2 * float((plain_result - truth).abs().max()) + floor
        untouched = [row for row in range(20) if row not in (0, 5, 17)] if name.endswith(
            "slabs" if into_slab else "pages") else slice(None)
        if name != "q":
            assert bool((got[untouched] == 7).all())


def exact_rope(qkv, batch, cos, sin, kv, q_out, q_norm, k_norm) -> None:
    """rope_write in float64, row by row."""
    heads, head_dim = q_out.shape[1:]
    kv_heads = kv.k_pages.shape[1]
    keys, values = (kv.k_slabs, kv.v_slabs) if batch.into_slab else (kv.k_pages, kv.v_pages)
    for row, (slot, position) in enumerate(zip(batch.slots.tolist(), batch.positions.tolist(), strict=True)):
        for head, x in enumerate(qkv[row].view(-1, head_dim)):
            y = x
            if head < heads + kv_heads:
                if q_norm is not None:
                    y = y / torch.sqrt((y * y).mean() + 1e-6) * (q_norm if head < heads else k_norm).double()
                low, high = y.chunk(2)
                c, s = cos[position], sin[position]
                y = torch.cat((low * c - high * s, high * c + low * s))
            if head < heads:
                q_out[row, head] = y
            elif slot >= 0:
                (keys if head < heads + kv_heads else values)[slot, (head - heads) % kv_heads] = y


def test_a_score_of_one_row_has_the_same_bits_beside_longer_ones():
    """A candidate that is an EOS alone, say: under the plan of drafts its sums would run in another order."""
    long = [Sequence(0, 700, 0, 1), Sequence(0, 700, 0, 3)]
    alone, beside = (make_case(spans, True, 8, 2, dtype=torch.float16, seed=3) for spans in (long[:1], long))
    alone = alone._replace(q=beside.q[:1].contiguous())
    for cached, other in zip(alone.kv[:4], beside.kv[:4], strict=True):
        cached.copy_(other[: len(cached)])
    alone.batch.block_tables.copy_(beside.batch.block_tables)
    results = []
    for case in (alone, beside):
        starts, groups = case.row_start, case.batch.seq_group.tolist()
        plan = tiling.plan(starts, groups, "score", 8, 2, [700] * len(groups), 4096, deterministic=True)
        results.append(run(with_plan(case, plan))[0])
    assert torch.equal(*results)


# -- tiles -------------------------------------------------------------------------------------------------------------


def test_tiles_cover_every_row_once_and_cross_no_group():
    draw = np.random.default_rng(0)
    for _ in range(200):
        counts = draw.integers(1, 40, draw.integers(1, 12))
        row_start = [0, *np.cumsum(counts).tolist()]
        seq_group = np.cumsum(draw.integers(0, 2, len(counts)))
        seq_group = (seq_group - seq_group[0]).tolist()
        per_kv = int(draw.choice([1, 2, 3, 4, 7, 8, 16]))
        keys = draw.integers(0, 2049, len(counts))
        plan = tiling.plan(row_start, seq_group, "score", per_kv * 2, 2, keys, 2048, bool(draw.integers(2)))
        rows, sequences = row_start[-1], len(counts)
        buffers = [np.full(shape, -1, np.int32) for shape in (
            rows + 3, (tiling.max_tiles(rows, sequences, plan.packed, per_kv), 3),
            (tiling.max_tiles(rows, sequences, plan.packed_slab, per_kv), 3))]
        used = tiling.fill(row_start, seq_group, True, per_kv, plan, *buffers)
        assert buffers[0].tolist() == np.repeat(range(sequences), counts).tolist() + [0] * 3
        owners = np.array(seq_group)[buffers[0][:rows]], buffers[0][:rows]
        for table, owner, packed, count in zip(buffers[1:], owners, (plan.packed, plan.packed_slab), used, strict=True):
            covered = []
            for held_by, first, size in table[:count].tolist():
                assert 0 < size * per_kv <= packed
                assert (owner[first : first + size] == held_by).all()
                covered += range(first, first + size)
            assert covered == list(range(rows))
            assert not table[count:].any()


def test_too_short_a_buffer_of_tiles_is_refused():
    plan = Plan(16, 16, 1, 0)
    with pytest.raises(ValueError, match="do not fit"):
        tiling.fill([0, 1, 2], [0, 1], True, 1, plan, np.zeros(2, np.int32), *np.zeros((2, 1, 3), np.int32))


def test_deterministic_plans_do_not_depend_on_the_batch():
    for kind, rows in (("draft", (1,)), ("score", (1, 2, 33)), ("prefill", (1, 2, 500))):
        plans = {tiling.plan(list(range(0, lanes * count + 1, count)), [0] * lanes, kind, 32, 8, [keys] * lanes, 8192,
                             deterministic=True)
                 for lanes in (1, 3, 64) for keys in (1, 500, 8000) for count in rows}
        assert len(plans) == 1
        plan = plans.pop()
        if kind != "prefill":
            assert plan.splits * plan.split_keys >= 8192 and plan.split_keys % tiling.SPLIT_MULTIPLE == 0


def test_plans_fill_a_card_at_short_batches_and_stay_small_at_long_ones():
    one_request = tiling.plan(list(range(17)), [0] * 16, "draft", 32, 8, [1024] * 16, 8192)
    assert one_request == Plan(64, 16, 8, 0)
    scoring = tiling.plan(list(range(0, 513, 32)), [0] * 16, "score", 32, 8, [1024] * 16, 8192)
    assert scoring == Plan(128, 128, 1, 0)
    prefill = tiling.plan([0, 512], [0], "prefill", 32, 8, [1024], 8192)
    assert prefill == Plan(128, 128, 1, 0)
    many = tiling.plan(list(range(33)), range(32), "draft", 32, 8, [1000] * 32, 32768)
    assert many == Plan(16, 16, 1, 0)


def test_one_long_context_among_many_is_divided():
    """Eight programs, one a key head, would read it while the rest of the card waits."""
    keys = [100] * 31 + [16384]
    plan = tiling.plan(list(range(33)), range(32), "draft", 32, 8, keys, 32768)
    assert plan == Plan(16, 16, 16, 0)
    longer = tiling.plan(list(range(0, 32 * 33 + 1, 33)), range(32), "score", 32, 8, keys, 32768)
    assert longer.splits * 32 * 33 * 32 <= tiling.MAX_PARTIAL and longer.splits == 1


if DEVICE == "cpu":
    run_in_interpreter(globals())
