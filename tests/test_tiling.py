"""The list of work of attention on a GPU: every key of every row once, few shapes, and memory's bounds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from stars.kernels.triton import tiles as tiling
from stars.kernels.triton.tiles import FIELDS, Plan
from stars.target import CPU
from stars.tiling import Tiling, shape

CAPACITY = 32768
KINDS = ("draft", "score", "prefill")


def random_batch(draw: np.random.Generator, kind: str, most_rows: int = 600):
    """(row_start, seq_group, keys): lanes of one row or spans of many, few groups or many, contexts alike or not."""
    sequences = int(draw.integers(1, 40))
    counts = np.ones(sequences, int) if kind == "draft" else draw.integers(
        1, draw.choice([2, 34, most_rows]), sequences)
    groups = np.unique(np.sort(draw.integers(0, draw.choice([1, 3, sequences]), sequences)), return_inverse=True)[1]
    longest = np.minimum(draw.lognormal(6, draw.choice([0, 1, 3]), sequences), CAPACITY - counts).astype(int)
    keys = longest * (draw.random(sequences) < 0.9)  # some see no page key
    if kind == "prefill":
        groups, keys = np.arange(sequences), keys + counts
    return [0, *np.cumsum(counts).tolist()], groups.tolist(), keys.tolist()


def check_work(work, plan: Plan, row_start, seq_group, keys, kind, heads_per_kv) -> None:
    """From the meaning of the fields alone."""
    rows, into_slab = row_start[-1], kind != "prefill"
    sequence_of = np.repeat(np.arange(len(seq_group)), np.diff(row_start))
    seen = np.array(keys)[sequence_of]
    if not into_slab:
        seen = seen - (np.array(row_start[1:])[sequence_of] - np.arange(rows) - 1)
    covered = [np.zeros(count, int) for count in seen]
    slabs, taken, tiles = np.zeros(rows, int), set(), {}
    for owner, first, count, begin, end, split, splits, place, tile_row, tile_rows, arrivals, _ in work.items.tolist():
        parts = splits + into_slab
        said = place, tile_rows, parts, arrivals
        assert tiles.setdefault(tile_row, [said, 0])[0] == said
        tiles[tile_row][1] += 1
        assert tile_row <= first and first + count <= tile_row + tile_rows and 0 < count and 0 <= split <= splits
        assert count * heads_per_kv <= plan.width and (split < splits or not plan.lanes or count <= plan.lanes)
        for row in range(first, first + count):
            if split < splits:
                assert seq_group[sequence_of[row]] == owner and begin % tiling.KEYS_MULTIPLE == 0
                covered[row][begin : min(end, seen[row])] += 1
            else:
                assert into_slab and sequence_of[row] == owner + (row - first if plan.lanes else 0)
                slabs[row] += 1
            if parts > 1:
                at = place + split * tile_rows + row - tile_row
                assert at < work.places and at not in taken
                taken.add(at)
                if work.row_parts is not None:
                    assert work.row_parts[row].tolist() == [at - split * tile_rows, tile_rows, parts]
            elif work.row_parts is not None:
                assert work.row_parts[row, 2] == 1
    assert all((row == 1).all() for row in covered) and (slabs == into_slab).all()
    assert all(said[3] == found for said, found in tiles.values())
    assert sum(said[1] for said, _ in tiles.values()) == rows


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_every_row_is_covered_once_within_the_bounds(kind, deterministic):
    draw = np.random.default_rng(KINDS.index(kind))
    for _ in range(60):
        kv_heads, heads_per_kv = int(draw.choice([1, 2, 8])), int(draw.choice([1, 3, 4, 7, 8, 16]))
        head_dim, float32 = int(draw.choice([64, 128, 256])), bool(draw.random() < 0.2)
        row_start, seq_group, keys = random_batch(draw, kind, 200)
        rows, heads = row_start[-1], kv_heads * heads_per_kv
        idle = rows + int(draw.integers(0, rows + 1))
        groups = tiling.groups_of(seq_group, keys)
        plan = tiling.plan(idle, row_start, groups, kind, heads_per_kv, head_dim, float32, CAPACITY, deterministic)
        possible = tiling.widths(idle, kind, heads_per_kv, head_dim, float32, deterministic)
        assert len(possible) <= 2 and plan.width in possible and max(possible) <= 128
        work = tiling.work(row_start, groups, kind, heads, kv_heads, plan, int(draw.choice([1, 40, 132, 148, 1000])))
        check_work(work, plan, row_start, seq_group, keys, kind, heads_per_kv)
        assert len(work.items) <= tiling.max_items(rows, kv_heads, deterministic)
        assert work.places * heads * (head_dim + 1) <= tiling.max_workspace(rows, heads, head_dim, deterministic)
        assert work.items[:, 6].max() <= (tiling.FIXED_SPLITS if deterministic else tiling.MAX_SPLITS)


@pytest.fixture
def tiling_of(monkeypatch):
    """Of an 8B model for so many rows, on an H100."""
    monkeypatch.setattr(tiling, "processors", lambda device: 132)

    def make(rows: int, deterministic: bool = False) -> Tiling:
        config = SimpleNamespace(target=CPU._replace(float32=False), dtype="bfloat16", deterministic=deterministic)
        return Tiling(SimpleNamespace(num_heads=32, num_kv_heads=8, head_dim=128), config, rows, CAPACITY)

    return make


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_number_of_rows_and_a_kind_have_two_shapes_at_most(tiling_of, deterministic):
    """And `shapes` knows them, whatever the mix: also the tensors and the number of programs are those of the
    capture."""
    draw = np.random.default_rng(5)
    made = tiling_of(1024, deterministic)
    for kind in KINDS:
        for rows in (1, 4, 5, 16, 64, 144, 512):
            known = {shape(tiles): tiles for tiles in made.shapes(rows, kind)}
            assert 1 <= len(known) <= (1 if deterministic else 2)
            assert all(int(tiles.items[0, 0]) == 0 and not tiles.row_parts.any() for tiles in known.values())
            seen = set()
            for _ in range(20):
                row_start, seq_group, keys = random_batch(draw, kind)
                while row_start[-1] > rows:
                    row_start, seq_group, keys = row_start[:-1], seq_group[:-1], keys[:-1]
                if not seq_group:
                    continue
                tiles = made.fill(rows, row_start, seq_group, kind, keys)
                seen.add(shape(tiles))
                captured = known[shape(tiles)]
                assert [one.data_ptr() for one in tiles[:3]] == [one.data_ptr() for one in captured[:3]]
                assert [one.shape for one in tiles[:3]] == [one.shape for one in captured[:3]]
                assert tiles.programs == captured.programs
            assert seen <= set(known)


def test_what_is_sent_is_the_list_and_an_older_longer_one_does_not_show(tiling_of):
    made = tiling_of(64)
    made.fill(64, list(range(65)), list(range(64)), "draft", [9000] * 64)
    starts, groups, keys = [0, 1, 2, 3], [0, 0, 1], [1000, 990, 17]
    tiles = made.fill(4, starts, groups, "draft", keys)
    count = int(tiles.items[0, 0])
    plan = Plan(tiles.width, tiles.lanes, tiles.split_keys)
    work = tiling.work(starts, tiling.groups_of(groups, keys), "draft", 32, 8, plan, 132)
    assert tiles.items[1 : 1 + count].tolist() == work.items.tolist()
    assert tiles.row_seq[:3].tolist() == [0, 1, 2] and tiles.items.shape[1] == FIELDS
    spare = len(tiles.items) - 1 - tiling.max_items(64, 8, False)
    assert spare * 8 >= tiles.programs + 8  # what every program reads ahead is in the list's buffer


def test_deterministic_plans_do_not_depend_on_the_batch():
    for kind, rows in (("draft", (1,)), ("score", (1, 2, 33)), ("prefill", (1, 2, 500))):
        plans = {tiling.plan(lanes * count, list(range(0, lanes * count + 1, count)),
                             tiling.groups_of([0] * lanes, [keys] * lanes), kind, 4, 128, False, 8192, True)
                 for lanes in (1, 3, 64) for keys in (1, 500, 8000) for count in rows}
        assert len(plans) == 1
        plan = plans.pop()
        assert plan.split_keys % tiling.SPLIT_MULTIPLE == 0 and tiling.FIXED_SPLITS * plan.split_keys >= 8192


def divided(lanes, owners, keys, kind="draft", per=1, processors=132):
    """(width, units over page keys, keys of the longest range) for 32 heads over 8."""
    starts, groups = list(range(0, lanes * per + 1, per)), tiling.groups_of(owners, keys)
    plan = tiling.plan(starts[-1], starts, groups, kind, 4, 128, False, CAPACITY)
    items = tiling.work(starts, groups, kind, 32, 8, plan, processors).items
    ranges = items[items[:, 5] < items[:, 6]]
    return plan.width, 8 * len(ranges), int((ranges[:, 4] - ranges[:, 3]).max())


def test_contexts_are_divided_so_that_a_card_is_full():
    assert divided(1, [0], [1024]) == (16, 64, 128)
    assert divided(1, [0], [16384]) == (16, 128, 1024)
    assert divided(16, [0] * 16, [1024] * 16) == (64, 64, 128)
    assert divided(64, [0] * 64, [16384] * 64) == (128, 128, 2048)
    assert divided(4, [0] * 4, [1024] * 4, "score", 33) == (128, 120, 384)
    assert divided(1, [0], [1536], "prefill", 512) == (128, 128, 1536)
    # One long context among many short ones is spread, and they are not divided.
    assert divided(32, range(32), [100] * 31 + [16384]) == (16, 8 * 31 + 8 * 13, 1280)


def test_tiles_are_narrow_where_few_lanes_share_pages():
    for lanes, group_size, width in ((16, 1, 16), (16, 4, 16), (16, 5, 64), (16, 16, 64), (64, 16, 128), (64, 2, 16)):
        owners = [lane // group_size for lane in range(lanes)]
        assert divided(lanes, owners, [1000] * lanes)[0] == width
    assert divided(17, [0] * 16 + [1], [100] * 16 + [30000])[0] == 16  # most keys are those of a single lane
