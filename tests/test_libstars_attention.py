"""Attention and rope_write of libstars: right against float64, and the same bits in any company."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from instruction_sets import instruction_set  # noqa: F401  (a fixture)
from libstars_threads import threads
from stars.bindings import libstars
from stars.kernels.attention import attention_reference
from stars.kernels.rope_write import rope_write_reference
from stars.kernels.types import Batch, LayerKV

pytestmark = [pytest.mark.threads, pytest.mark.skipif(not libstars.available(), reason="libstars was not built")]

SLAB_LEN = 80


class Sequence(NamedTuple):
    group: int
    prefix: int
    slab_used: int
    count: int


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_batch(sequences: list[Sequence], tables: torch.Tensor, into_slab: bool, slabs: list[int]) -> Batch:
    starts = [0]
    for sequence in sequences:
        starts.append(starts[-1] + sequence.count)
    groups = sorted({sequence.group for sequence in sequences})
    empty = int32([0] * starts[-1])
    return Batch(
        empty, empty, empty, into_slab, int32(starts), int32([groups.index(s.group) for s in sequences]),
        tables[groups].contiguous(), int32([s.prefix for s in sequences]), int32([slab * SLAB_LEN for slab in slabs]),
        int32([s.slab_used for s in sequences]),
    )


def make_case(
    sequences: list[Sequence], into_slab: bool, heads: int = 4, kv_heads: int = 2, head_dim: int = 64,
    page_size: int = 16, seed: int = 0,
) -> tuple[torch.Tensor, LayerKV, Batch, torch.Tensor]:
    """Queries, cache and batch with shuffled pages, and the block tables of all groups."""
    draw = torch.Generator().manual_seed(seed)
    longest = max(s.prefix + (0 if into_slab else s.count) for s in sequences)
    groups, pages = max(s.group for s in sequences) + 1, longest // page_size + 1
    tables = torch.randperm(groups * pages, generator=draw).int().view(groups, pages)
    shapes = [groups * pages * page_size] * 2 + [len(sequences) * SLAB_LEN] * 2
    kv = LayerKV(*(torch.randn(rows, kv_heads, head_dim, generator=draw) for rows in shapes), page_size)
    q = torch.randn(sum(s.count for s in sequences), heads, head_dim, generator=draw)
    return q, kv, make_batch(sequences, tables, into_slab, list(range(len(sequences)))), tables


def run(q, kv, batch, window=None, softcap=None) -> torch.Tensor:
    out = torch.full_like(q, math.nan)
    libstars.attention(q, kv, batch, q.shape[-1] ** -0.5, out, window, softcap)
    return out


def exact(q, kv, batch, scale, window=None, softcap=None) -> torch.Tensor:
    """Row by row in float64, from the definition at `Batch`."""
    out = torch.empty(q.shape, dtype=torch.float64)
    repeat = q.shape[1] // kv.k_pages.shape[1]
    for sequence, group in enumerate(batch.seq_group.tolist()):
        first, last = batch.row_start[sequence : sequence + 2].tolist()
        prefix, used = int(batch.prefix_len[sequence]), int(batch.slab_used[sequence])
        for row in range(first, last):
            i = row - first
            at = torch.arange(prefix if batch.into_slab else prefix + i + 1)
            rows = batch.block_tables[group].long()[at // kv.page_size] * kv.page_size + at % kv.page_size
            keys, values = kv.k_pages[rows], kv.v_pages[rows]
            if batch.into_slab:
                start = int(batch.slab_start[sequence])
                slab = slice(start, start + used + i + 1)
                keys, values = torch.cat((keys, kv.k_slabs[slab])), torch.cat((values, kv.v_slabs[slab]))
            if window is not None:
                keys, values = keys[-window:], values[-window:]
            keys = keys.double().repeat_interleave(repeat, dim=1)  # [keys, heads, head_dim]
            values = values.double().repeat_interleave(repeat, dim=1)
            scores = torch.einsum("hd,khd->hk", q[row].double(), keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
    return out


def assert_close(q, kv, batch, window=None, softcap=None) -> None:
    """The largest error against float64 is at most twice that of torch in float32, plus a floor.

    The floor is 16 half-ulps of the largest value: weights sum to 1, so what is lost in one rounding of the result is
    half an ulp of it. torch may be lucky where only a few keys are seen.
    """
    scale = q.shape[-1] ** -0.5
    truth = exact(q, kv, batch, scale, window, softcap)
    reference = torch.empty_like(q)
    attention_reference(q, kv, batch, scale, reference, window, softcap)
    floor = 16 * 2.0**-24 * float(kv.v_pages.abs().max())
    error = float((run(q, kv, batch, window, softcap) - truth).abs().max())  # NaN if a row was not written
    assert error <= 2 * float((reference - truth).abs().max()) + floor


# One lane without prefix, lanes that share pages and differ in how much of them is valid, a lane that holds one page
# and one token more. Two have several rows (scoring), and one has ended and only repeats itself.
SLAB_SEQUENCES = [
    Sequence(0, 0, 0, 1), Sequence(1, 100, 17, 1), Sequence(1, 97, 3, 5), Sequence(1, 100, 0, 1),
    Sequence(2, 17, 37, 37), Sequence(3, 16, 0, 2), Sequence(4, 15, 63, 1),
]
PAGE_SEQUENCES = [Sequence(0, 0, 0, 37), Sequence(1, 17, 0, 15), Sequence(2, 63, 0, 1), Sequence(3, 0, 0, 1)]


@pytest.mark.parametrize("head_dim", [18, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_slab_batches_against_float64(head_dim, repeat):
    q, kv, batch, _ = make_case(SLAB_SEQUENCES, True, 2 * repeat, 2, head_dim, page_size=17 if repeat == 2 else 16)
    assert_close(q, kv, batch)


@pytest.mark.parametrize("head_dim", [18, 64, 80, 256])
@pytest.mark.parametrize("window, softcap", [(None, None), (17, None), (64, 3.0)])
def test_page_batches_against_float64(head_dim, window, softcap):
    q, kv, batch, _ = make_case(PAGE_SEQUENCES, False, 4, 2, head_dim)
    assert_close(q, kv, batch, window, softcap)


@pytest.mark.parametrize("window", [1, 16, 17, 37, 101, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_and_softcap_against_float64(window, softcap):
    q, kv, batch, _ = make_case(SLAB_SEQUENCES, True)
    assert_close(q, kv, batch, window, softcap)


@pytest.mark.parametrize("into_slab", [True, False])
def test_every_instruction_set_against_float64(instruction_set, into_slab):  # noqa: F811
    for head_dim in (18, 80, 128):
        q, kv, batch, _ = make_case(SLAB_SEQUENCES if into_slab else PAGE_SEQUENCES, into_slab, head_dim=head_dim)
        assert_close(q, kv, batch, 64, 20.0)
        assert_close(q, kv, batch)


def test_long_contexts_and_large_scores_against_float64():
    sequences = [Sequence(0, 1300, 5, 1), Sequence(0, 1290, 0, 2), Sequence(1, 512, 0, 1), Sequence(2, 513, 70, 1)]
    q, kv, batch, _ = make_case(sequences, True)
    assert_close(q, kv, batch)
    assert_close(q, kv, batch, window=600)
    assert_close(q * 30, kv, batch)  # the softmax is all but one key


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("into_slab", [True, False])
def test_bits_do_not_depend_on_the_company(into_slab, window):
    sequences = SLAB_SEQUENCES + [Sequence(5, 700, 9, 3)] if into_slab else PAGE_SEQUENCES + [Sequence(4, 600, 0, 40)]
    q, kv, batch, tables = make_case(sequences, into_slab, heads=8)
    together = run(q, kv, batch, window)
    for index, sequence in enumerate(sequences):
        own = slice(int(batch.row_start[index]), int(batch.row_start[index + 1]))
        alone = run(q[own].contiguous(), kv, make_batch([sequence], tables, into_slab, [index]), window)
        assert torch.equal(together[own], alone), f"sequence {index}"


def test_bits_do_not_depend_on_the_number_of_lanes():
    lanes = [Sequence(0, 300, i % 7, 1) for i in range(40)]
    q, kv, batch, tables = make_case(lanes, True)
    together = run(q, kv, batch)
    for count in (1, 2, 3, 5, 31):
        some = run(q[:count].contiguous(), kv, make_batch(lanes[:count], tables, True, list(range(count))))
        assert torch.equal(together[:count], some), f"{count} lanes"


@pytest.mark.parametrize("sequences", [
    [Sequence(0, 1300, 5, 1)],  # one lane: its splits run side by side
    [Sequence(0, 1300, 5, 1), Sequence(0, 1200, 0, 1), Sequence(1, 30, 7, 1)],
    SLAB_SEQUENCES,
])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_bits_do_not_depend_on_the_threads(sequences, kv_heads):
    q, kv, batch, _ = make_case(sequences, True, 4, kv_heads)
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append((run(q, kv, batch), run(q, kv, batch, window=600)))
    for plain, windowed in results[1:]:
        assert torch.equal(plain, results[0][0]) and torch.equal(windowed, results[0][1])


@pytest.mark.parametrize("window, softcap", [(None, None), (100, 5.0)])
def test_bits_do_not_depend_on_the_chunks_of_a_prefill(window, softcap):
    length = 613
    q, kv, batch, tables = make_case([Sequence(0, 0, 0, length)], False)
    whole = run(q, kv, batch, window, softcap)
    for chunk in (17, 64, 100, 512):
        for begin in range(0, length, chunk):
            count = min(chunk, length - begin)
            part = make_batch([Sequence(0, begin, 0, count)], tables, False, [0])
            rows = q[begin : begin + count].contiguous()
            got = run(rows, kv, part, window, softcap)
            assert torch.equal(got, whole[begin : begin + count]), f"chunk {chunk} at {begin}"


def test_unseen_memory_is_not_touched_by_the_result():
    sequences = [Sequence(0, 100, 17, 1), Sequence(0, 90, 3, 2)]
    q, kv, batch, tables = make_case(sequences, True)
    expected = run(q, kv, batch)
    for slab, sequence in enumerate(sequences):
        for slabs in (kv.k_slabs, kv.v_slabs):
            slabs[slab * SLAB_LEN + sequence.slab_used + sequence.count : (slab + 1) * SLAB_LEN] = math.nan
    last_page = int(tables[0, 100 // 16]) * 16
    kv.k_pages[last_page + 100 % 16 : last_page + 16] = math.nan
    kv.v_pages[last_page + 100 % 16 : last_page + 16] = math.nan
    assert torch.equal(run(q, kv, batch), expected)


@pytest.mark.parametrize("head_dim", [2, 18, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("norm", [True, False])
def test_rope_write_against_the_reference(instruction_set, head_dim, norm):  # noqa: F811
    heads, kv_heads, rows, max_positions = 4, 2, 17, 50
    draw = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=draw)
    angles = torch.rand(max_positions, head_dim // 2, generator=draw) * 6
    cos, sin = angles.cos(), angles.sin()
    norms = [1 + 0.1 * torch.randn(head_dim, generator=draw) for _ in range(2)] if norm else [None, None]
    for into_slab in (True, False):
        slots = torch.randperm(40, generator=draw)[:rows].int()
        slots[[0, 5]] = -1
        empty = int32([0])
        positions = torch.randint(max_positions, (rows,), generator=draw).int()
        batch = Batch(positions, positions, slots, into_slab, int32([0, rows]), empty, empty[None], empty, empty, empty)
        ours, expected = (
            (LayerKV(*torch.full((4, 40, kv_heads, head_dim), 7.0), 8), torch.empty(rows, heads, head_dim))
            for _ in range(2)
        )
        libstars.rope_write(qkv, batch, cos, sin, *ours, *norms, 1e-6)
        rope_write_reference(qkv, batch, cos, sin, *expected, *norms, 1e-6)
        # A handful of roundings apart: values of size 5 at most, 2^-24 each.
        for got, wanted in zip((*ours[0][:4], ours[1]), (*expected[0][:4], expected[1])):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=2e-6)
        for row in range(1, rows):  # a row alone has the same bits
            one = batch._replace(positions=positions[row : row + 1], slots=int32([-1]), row_start=int32([0, 1]))
            alone = torch.empty(1, heads, head_dim)
            libstars.rope_write(qkv[row : row + 1], one, cos, sin, ours[0], alone, *norms, 1e-6)
            assert torch.equal(alone[0], ours[1][row])
