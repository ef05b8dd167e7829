"""Attention and rope_write in Triton: against float64, the same bits in any company. On a GPU where there is one, else
in the interpreter; TRITON_INTERPRET=1 forces that.

bfloat16 products are beyond Triton's interpreter, which holds that type as integers: they are checked on a GPU only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


def with_plan(case: Case, plan: Plan, processors: int | None = None, kind: str | None = None) -> Case:
    """The case under a given plan for a card of so many processors; what nobody writes of the workspace is NaN."""
    q, kv, batch = case.q, case.kv, case.batch
    if kind is None:
        kind = "prefill" if not batch.into_slab else "draft" if max(s.count for s in case.sequences) == 1 else "score"
    keys = [s.prefix + (0 if batch.into_slab else s.count) for s in case.sequences]
    tiles = tiling.build_as(plan, case.row_start, tiling.groups_of(batch.seq_group.tolist(), keys), kind, q.shape[1],
                            kv.k_pages.shape[1], q.shape[2], DEVICE, processors)
    tiles.workspace.fill_(math.nan)
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


@pytest.mark.parametrize("dtype, sequences, into_slab, width, lanes", [
    (torch.float16, DRAFT, True, 16, 4), (torch.float16, DRAFT, True, 64, 4), (torch.float16, DRAFT, True, 128, 4),
    (torch.float16, SCORING, True, 64, 0), (torch.float16, SCORING, True, 16, 0),
    (torch.float16, SCORING, True, 128, 0), (torch.float16, PREFILL, False, 128, 0),
    (torch.float16, PREFILL, False, 16, 0), (torch.float32, DRAFT, True, 16, 1),
    (torch.float32, PREFILL, False, 16, 0)])
def test_every_width_and_division_against_float64(dtype, sequences, into_slab, width, lanes):
    """One range a tile and several, on few processors and on more than there is work: tickets are zero again, and a
    second launch over the same list gives the same bits."""
    case = make_case(sequences, into_slab, heads=3, kv_heads=1, dtype=dtype)
    planned = with_plan(case, Plan(width, lanes, 0), 50)
    assert_close(planned)
    planned = with_plan(case, Plan(width, lanes, 64), 2)
    assert_close(planned, 37)
    assert not planned.batch.tiles.tickets.any()
    assert torch.equal(run(planned, 37), run(planned, 37))


@pytest.mark.parametrize("window", [None, 100])
def test_a_long_context_is_divided_among_programs_beside_short_ones(window):
    long = [Sequence(0, 1100, 3, 1), Sequence(1, 17, 0, 1), Sequence(2, 129, 1, 1), Sequence(2, 128, 2, 1)]
    case = make_case(long, True, dtype=torch.float16)
    planned = with_plan(case, Plan(16, 4, 0), 24)
    items = planned.batch.tiles.items
    assert items[1 : 1 + int(items[0, 0]), 6].max() == 9  # of 128 keys, the last one of 76
    assert_close(planned, window)
    assert_close(with_plan(case, Plan(64, 4, 0), 24), window)


@pytest.mark.parametrize("width, lanes, head_dim, window", [(16, 4, 64, None), (64, 4, 80, 9), (128, 8, 96, None)])
def test_lanes_of_a_request_take_a_warp_each(width, lanes, head_dim, window):
    """Eleven lanes, of slabs of 1 to 33 keys: pieces of 3 to 8 of them."""
    sequences = [Sequence(0, 20 + lane % 3, lane * lane * 32 // 100, 1) for lane in range(11)]
    case = make_case(sequences, True, heads=3, kv_heads=1, head_dim=head_dim, dtype=torch.float16)
    assert_close(with_plan(case, Plan(width, lanes, 0)), window)


def test_many_parts_are_merged_in_several_loads():
    """31 ranges and a slab of 2 x 4 vectors, more than a thread loads at once."""
    case = make_case([Sequence(0, 31 * 128 - 5, 2, 1), Sequence(0, 31 * 128 - 9, 0, 1)], True, heads=8, kv_heads=2,
                     head_dim=128, dtype=torch.float16)
    planned = with_plan(case, Plan(16, 4, 0), 200)
    assert planned.batch.tiles.items[1, 6] == 31
    assert_close(planned)
    assert_close(with_plan(case, Plan(64, 4, 0), 200))


def test_rows_of_one_part_are_written_directly_and_idle_ones_not_at_all():
    """No workspace is needed for a prompt's rows, and an idle row after them stays as it was."""
    case = make_case(PREFILL, False, dtype=torch.float16)
    for width in (16, 64):
        planned = with_plan(case, Plan(width, 0, 0))
        tiles = planned.batch.tiles
        assert tiles.workspace.numel() == 0
        parts = torch.cat((tiles.row_parts, torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)))
        longer = planned._replace(q=torch.cat((case.q, case.q[:1])),
                                  batch=planned.batch._replace(tiles=tiles._replace(row_parts=parts)))
        out = run(longer)
        assert torch.equal(out[:-1], run(planned)) and bool(out[-1].isnan().all())


def test_empty_prefixes_leave_the_slab_alone():
    sequences = [Sequence(0, 0, 3, 1), Sequence(1, 0, 0, 1), Sequence(2, 0, 20, 1)]
    case = make_case(sequences, True, dtype=torch.float16)
    for width in (16, 64):
        assert_close(with_plan(case, Plan(width, 4, 0)), 4)


def test_an_empty_list_touches_nothing():
    """What a graph is captured with."""
    case = with_plan(make_case(DRAFT, True, dtype=torch.float16), Plan(64, 4, 0))
    tiles = case.batch.tiles
    tiles.items[0] = 0
    tiles.row_parts.zero_()
    assert bool(run(case).isnan().all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sequences, into_slab, plan", [
    (DRAFT, True, Plan(64, 4, 64)), (SCORING, True, Plan(64, 0, 64)), (PREFILL, False, Plan(64, 0, 1 << 30))])
def test_a_sequence_alone_has_the_bits_it_has_in_company(dtype, sequences, into_slab, plan):
    if dtype == torch.float32:
        plan = plan._replace(width=16, lanes=min(1, plan.lanes))
    case = make_case(sequences, into_slab, dtype=dtype)
    kind = "prefill" if not into_slab else "draft" if sequences is DRAFT else "score"
    together = run(with_plan(case, plan, 3, kind), 37)
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
        # Another card's number of programs changes nothing either.
        assert torch.equal(run(with_plan(alone, plan, 11, kind), 37), together[rows])


def test_wrong_types_and_plans_are_refused():
    case = with_plan(make_case(DRAFT[:2], True), Plan(16, 1, 0))
    with pytest.raises(TypeError, match="float16"):
        run(case._replace(q=case.q.half()))
    with pytest.raises(ValueError, match="page_size"):
        run(case._replace(kv=case.kv._replace(page_size=24)))
    with pytest.raises(ValueError, match="split_keys"):
        run(with_plan(case, Plan(16, 1, 8)))
    with pytest.raises(ValueError, match="slabs of 4 lanes are no item"):
        run(with_plan(case, Plan(16, 4, 0)))
    with pytest.raises(ValueError, match="float32 takes tiles of 16"):
        run(with_plan(case, Plan(64, 1, 0)))


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
        starts, owners = case.row_start, case.batch.seq_group.tolist()
        groups = tiling.groups_of(owners, [700] * len(owners))
        plan = tiling.plan(starts[-1], starts, groups, "score", 4, 64, False, 4096, True)
        results.append(run(with_plan(case, plan, kind="score"))[0])
    assert torch.equal(*results)


if DEVICE == "cpu":
    run_in_interpreter(globals())
