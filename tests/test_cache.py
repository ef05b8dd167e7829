"""Pages and slabs with their tensors: what is written is what is read, whoever shares pages with whom."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from building import cache_of, shape_of
from stars.cache import BlockTable, CommitMove, PagedCache
from stars.errors import IntegrityError, OutOfPages
from stars.kernels.copy_rows import copy_rows, copy_rows_reference

LAYERS, KV_HEADS, HEAD_DIM = 2, 1, 3
SHAPE = shape_of(LAYERS, KV_HEADS, HEAD_DIM)


def make_cache(page_size: int = 4, num_pages: int = 12, num_slabs: int = 3, slab_len: int = 9) -> PagedCache:
    cache = cache_of(SHAPE, page_size=page_size, num_pages=num_pages, num_slabs=num_slabs, slab_len=slab_len)
    for tensor in (cache.k_pages, cache.v_pages, cache.k_slabs, cache.v_slabs):
        tensor.fill_(float("nan"))  # what was never written must never be read
    return cache


def rows_for(values: list[int]) -> torch.Tensor:
    """Keys that name (value, layer, head, dim), all exact in float32: [layers, rows, kv_heads, head_dim]."""
    base = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) * 64
    inner = torch.arange(LAYERS * KV_HEADS * HEAD_DIM, dtype=torch.float32).view(LAYERS, 1, KV_HEADS, HEAD_DIM)
    return base + inner


def opened(cache: PagedCache, tokens: list[int], room: int) -> BlockTable:
    """A table for `tokens` with room for so many positions."""
    table = cache.open(tokens)
    cache.reserve(table, room - table.length)
    return table


def page_rows(cache: PagedCache, table: BlockTable, start: int, stop: int) -> torch.Tensor:
    """`cache.rows` as a tensor, int64 [stop - start]."""
    return torch.tensor(list(cache.rows(table, start, stop)), dtype=torch.int64)


def write(cache: PagedCache, table: BlockTable, start: int, values: list[int]) -> None:
    """What a prefill does: asks for rows, writes them, sets the length."""
    slots = page_rows(cache, table, start, start + len(values))
    assert slots.shape == (len(values),)
    cache.k_pages[:, slots] = rows_for(values)
    cache.v_pages[:, slots] = -rows_for(values) - 1
    table.length = start + len(values)


def fill_slab(cache: PagedCache, slab: int, values: list[int], offset: int = 0) -> int:
    """What a draft does; returns the flat row of the first value."""
    start = slab * cache.slab_len + offset
    cache.k_slabs[:, start : start + len(values)] = rows_for(values)
    cache.v_slabs[:, start : start + len(values)] = -rows_for(values) - 1
    return start


def assert_holds(cache: PagedCache, table: BlockTable, values: list[int]) -> None:
    """The table's valid rows, read through the block table as attention reads them, are `values` in every layer."""
    assert table.length == len(values)
    pages = cache.block_tables([table])[0].tolist()
    size = cache.page_size
    slots = torch.tensor([pages[p // size] * size + p % size for p in range(len(values))], dtype=torch.int64)
    expected = rows_for(values)
    for i in range(LAYERS):
        assert torch.equal(cache.layer(i).k_pages[slots], expected[i])
        assert torch.equal(cache.layer(i).v_pages[slots], -expected[i] - 1)


def books(cache: PagedCache) -> tuple:
    """Everything that a refused call must leave as it was."""
    pool = cache.pool
    return (
        list(pool._free), list(pool._references), list(pool._cached), dict(pool._index), list(pool._keys),
        [set(children) for children in pool._children],
        sorted((list(table.pages), table.length) for table in cache._tables),
        cache.k_pages.view(torch.int32).clone(), cache.v_pages.view(torch.int32).clone(),
    )  # fmt: skip


def assert_unchanged(cache: PagedCache, before: tuple) -> None:
    now = books(cache)
    assert now[:-2] == before[:-2]
    assert torch.equal(now[-2], before[-2]) and torch.equal(now[-1], before[-1])
    cache.check_integrity()


# -- geometry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("delta", ["zero", "one", "below", "page", "above", "two pages and one"])
def test_write_read_share_at_page_boundaries(page_size, delta):
    length = {"zero": 0, "one": 1, "below": page_size - 1, "page": page_size, "above": page_size + 1,
              "two pages and one": 2 * page_size + 1}[delta]  # fmt: skip
    cache = make_cache(page_size)
    tokens = list(range(100, 100 + length))
    first = opened(cache, tokens, length)
    assert first.length == 0 and len(first.pages) == -(-length // page_size)
    write(cache, first, 0, tokens)
    cache.publish(first, tokens)
    assert_holds(cache, first, tokens)
    free = cache.num_free_pages
    second = opened(cache, tokens, length + 1)
    full = length // page_size
    assert second.length == full * page_size and second.pages[:full] == first.pages[:full]
    assert free - cache.num_free_pages == -(-(length + 1) // page_size) - full
    write(cache, second, second.length, tokens[second.length :] + [7])
    assert_holds(cache, second, tokens + [7])
    assert_holds(cache, first, tokens)
    cache.check_integrity()
    cache.close(first)
    cache.close(second)
    cache.check_integrity()
    assert cache.num_free_pages == cache.num_pages


def test_layers_are_views_with_fixed_addresses():
    cache = make_cache()
    layer = cache.layer(1)
    assert layer is cache.layer(1) and layer.page_size == 4
    assert layer.k_pages.data_ptr() == cache.k_pages[1].data_ptr()
    assert layer.k_pages.shape == (48, KV_HEADS, HEAD_DIM) and layer.v_slabs.shape == (27, KV_HEADS, HEAD_DIM)


def test_rows_are_page_rows():
    cache = make_cache()
    table = opened(cache, [], 11)
    table.pages[:] = table.pages[::-1]  # pages need not be in order
    assert list(cache.rows(table, 2, 9)) == [table.pages[p // 4] * 4 + p % 4 for p in range(2, 9)]
    assert list(cache.rows(table, 5, 5)) == []


def test_block_tables_are_padded_and_fit_a_given_buffer():
    cache = make_cache()
    tables = [opened(cache, [], 9), opened(cache, [], 0), opened(cache, [], 4)]
    result = cache.block_tables(tables)
    assert result.dtype == torch.int32
    assert result.tolist() == [tables[0].pages, [0, 0, 0], tables[2].pages + [0, 0]]
    assert cache.block_tables([]).shape == (0, 0)
    out = torch.full((4, 5), 99, dtype=torch.int32)
    for host in (out.numpy(), None):
        out.fill_(99)
        cache.write_block_tables(tables, out, host)
        assert out[:3, :3].tolist() == result.tolist()
        assert out[:, 3:].eq(99).all() and out[3].eq(99).all()  # wide buffers are not written to their end
    for bad in (torch.zeros(2, 5, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 5).long()):
        for host in (bad.numpy(), None):
            with pytest.raises(IntegrityError, match="cannot hold 3 tables of 3 pages"):
                cache.write_block_tables(tables, bad, host)


def test_a_cache_of_impossible_size_is_refused():
    with pytest.raises(ValueError, match="page_size is 0"):
        make_cache(page_size=0)
    with pytest.raises(ValueError, match="int32"):
        cache_of(shape_of(1, 1, 1), page_size=16, num_pages=2**28, num_slabs=0, slab_len=1)
    with pytest.raises(ValueError, match="8 heads, numbered in int32"):  # heads of rows are numbered, too
        cache_of(shape_of(1, 8, 1), page_size=16, num_pages=2**24, num_slabs=0, slab_len=1)


# -- sharing ------------------------------------------------------------------------------------------------------


def test_only_full_published_pages_of_the_same_tokens_are_shared():
    cache = make_cache()
    tokens = list(range(10))
    first = opened(cache, tokens, 16)
    write(cache, first, 0, tokens)
    assert opened(cache, tokens, 12).length == 0  # not published yet
    cache.publish(first, tokens)
    write(cache, first, 10, [50, 51])  # the page of positions 8 .. 11 is full now, but was not offered
    assert opened(cache, tokens + [50, 51], 12).length == 8
    assert opened(cache, tokens[:7], 8).length == 4
    assert opened(cache, [9] + tokens[1:], 12).length == 0
    cache.check_integrity()


def test_sharers_diverge_after_the_prefix():
    cache = make_cache()
    prefix = [1, 2, 3, 4, 5]
    first = opened(cache, prefix, 12)
    write(cache, first, 0, prefix)
    cache.publish(first, prefix)
    second = opened(cache, prefix, 12)
    write(cache, second, 4, [5])
    assert second.pages[0] == first.pages[0]
    slabs = [cache.take_slab(), cache.take_slab()]
    starts = [fill_slab(cache, slabs[0], [60, 61, 62, 63]), fill_slab(cache, slabs[1], [70, 71, 72], offset=2)]
    cache.commit([CommitMove(first, starts[0], 4, 5), CommitMove(second, starts[1], 3, 5)])
    assert_holds(cache, first, prefix + [60, 61, 62, 63])
    assert_holds(cache, second, prefix + [70, 71, 72])
    assert second.pages[0] == first.pages[0]
    cache.check_integrity(slabs_out=2)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8])
def test_forks_are_isolated(length):
    cache = make_cache()
    values = list(range(10, 10 + length))
    table = opened(cache, [], 12)
    write(cache, table, 0, values)
    free = cache.num_free_pages
    forked = cache.fork(table)
    assert forked.pages == table.pages[: -(-length // 4)] and cache.num_free_pages == free
    assert_holds(cache, forked, values)
    cache.reserve(forked, 2)
    assert forked.pages[: length // 4] == table.pages[: length // 4]
    assert not set(forked.pages[length // 4 :]) & set(table.pages[length // 4 :])
    assert free - cache.num_free_pages == len(forked.pages) - length // 4
    write(cache, forked, length, [70, 71])
    write(cache, table, length, [80])
    assert_holds(cache, forked, values + [70, 71])
    assert_holds(cache, table, values + [80])
    # Rewound into shared pages, each still writes for itself.
    cache.truncate(forked, 0)
    write(cache, forked, 0, [90])
    assert_holds(cache, table, values + [80])
    assert_holds(cache, forked, [90])
    cache.check_integrity()
    cache.close(table)
    assert_holds(cache, forked, [90])
    cache.check_integrity()


def test_one_commit_into_a_page_of_three_forks_copies_it_twice():
    cache = make_cache(num_pages=6)
    table = opened(cache, [], 8)
    write(cache, table, 0, [1, 2, 3, 4])
    tables = [table, cache.fork(table), cache.fork(table)]
    for each in tables:
        cache.truncate(each, 3)
    start = fill_slab(cache, cache.take_slab(), [71, 72, 73])
    assert cache.num_free_pages == 4
    cache.commit([CommitMove(each, start + i, 1, 3) for i, each in enumerate(tables)])
    for i, each in enumerate(tables):
        assert_holds(cache, each, [1, 2, 3, 71 + i])
    assert cache.num_free_pages == 2
    cache.check_integrity()


def test_overwriting_a_published_page_ends_its_sharing():
    cache = make_cache()
    tokens = list(range(12))
    table = opened(cache, tokens, 12)
    write(cache, table, 0, tokens)
    cache.publish(table, tokens)
    cache.truncate(table, 6)
    pages = list(table.pages)
    write(cache, table, 6, [66])
    assert table.pages == pages  # a sole holder overwrites in place
    assert opened(cache, tokens, 12).length == 4
    assert_holds(cache, table, [0, 1, 2, 3, 4, 5, 66])
    cache.check_integrity()


def test_a_closed_prefix_is_found_until_its_pages_are_needed():
    cache = make_cache(num_pages=6)
    tokens = list(range(8))
    table = opened(cache, tokens, 8)
    write(cache, table, 0, tokens)
    cache.publish(table, tokens)
    cache.close(table)
    assert cache.num_free_pages == 6
    again = opened(cache, tokens, 8)
    assert_holds(cache, again, tokens)
    cache.close(again)
    other = opened(cache, [], 20)  # five of six pages: the last page of the prefix goes first
    write(cache, other, 0, [9] * 20)
    assert not cache.can_open(tokens)
    short = opened(cache, tokens[:4], 4)
    assert_holds(cache, short, tokens[:4])
    cache.close(other)
    cache.check_integrity()


def test_reuse_of_a_parent_page_gives_no_wrong_hit():
    """Two requests computed one prompt at once, so the second's pages are published below the first's."""
    cache = make_cache(num_pages=6)
    prompt, other = [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 5, 6, 7, 8]
    first, second = opened(cache, prompt[:4], 4), opened(cache, prompt, 8)
    write(cache, first, 0, prompt[:4])
    write(cache, second, 0, prompt)
    cache.publish(first, prompt[:4])
    cache.publish(second, prompt)
    parent = first.pages[0]
    probe = opened(cache, prompt, 8)
    assert probe.pages == [parent, second.pages[1]]
    assert_holds(cache, probe, prompt)
    cache.close(probe)
    cache.close(first)
    table = opened(cache, other, 16)  # takes every page left, the parent among them
    assert parent in table.pages
    write(cache, table, 0, other)
    table.pages.insert(0, table.pages.pop(table.pages.index(parent)))
    write(cache, table, 0, other)
    cache.publish(table, other)
    cache.close(second)
    probe = opened(cache, other, 8)
    assert probe.pages[0] == parent
    assert_holds(cache, probe, other)
    assert opened(cache, prompt, 8).length == 0
    cache.check_integrity()


def test_no_growth_over_time():
    cache, rng, held = make_cache(num_pages=20, num_slabs=0), random.Random(3), []
    for _ in range(4000):
        if held and (len(held) > 3 or rng.random() < 0.4):
            cache.close(held.pop(rng.randrange(len(held))))
            continue
        tokens = [rng.randrange(2) for _ in range(rng.randrange(20))]
        if cache.can_open(tokens, [len(tokens) + 5]):
            table = opened(cache, tokens, len(tokens) + 5)
            cache.publish(table, tokens)
            held.append(table)
        assert cache.pool.num_published <= cache.num_pages
    cache.check_integrity()
    for table in held:
        cache.close(table)
    assert cache.num_free_pages == 20 and not cache._tables
    cache.check_integrity(slabs_out=0)


# -- rewind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("keep", [0, 1, 3, 4, 5, 15, 16, 17])
def test_rewind_and_redo_equals_never_happened(page_size, keep):
    caches = [make_cache(page_size, slab_len=9) for _ in range(2)]
    base, segment = list(range(20)), [500, 501, 502, 503, 504]
    tables = []
    for detour, cache in zip((True, False), caches):
        table = opened(cache, [], 40)
        write(cache, table, 0, base if detour else base[:keep])
        slab = cache.take_slab()
        if detour:
            cache.commit([CommitMove(table, fill_slab(cache, slab, [900] * 9), 9, 20)])
            cache.truncate(table, keep)
        cache.commit([CommitMove(table, fill_slab(cache, slab, segment), 5, keep)])
        tables.append(table)
    assert tables[0].pages == tables[1].pages
    for cache, table in zip(caches, tables):
        assert_holds(cache, table, base[:keep] + segment)
    rows = [cache._rows(table, 0, keep + 5) for cache, table in zip(caches, tables)]
    for name in ("k_pages", "v_pages"):
        got = [getattr(cache, name)[:, list(r)].view(torch.int32) for cache, r in zip(caches, rows)]
        assert torch.equal(*got)


def test_a_commit_may_rewind_and_may_be_empty():
    cache = make_cache()
    table = opened(cache, [], 12)
    write(cache, table, 0, [1, 2, 3, 4, 5, 6])
    start = fill_slab(cache, cache.take_slab(), [70, 71, 72])
    cache.commit([CommitMove(table, start, 2, 3)])
    assert_holds(cache, table, [1, 2, 3, 70, 71])
    cache.commit([CommitMove(table, start, 0, 4)])
    assert_holds(cache, table, [1, 2, 3, 70])
    cache.commit([CommitMove(table, start, 1, 4), CommitMove(table, start + 1, 2, 5)])
    assert_holds(cache, table, [1, 2, 3, 70, 70, 71, 72])
    cache.commit([])
    cache.check_integrity()


# -- refusals -----------------------------------------------------------------------------------------------------


def test_out_of_pages_changes_nothing():
    cache = make_cache(num_pages=6)
    tokens = list(range(8))
    closed = opened(cache, tokens, 8)
    write(cache, closed, 0, tokens)
    cache.publish(closed, tokens)
    cache.close(closed)
    table = opened(cache, tokens[:4], 12)  # one shared page and two fresh ones; one page of the prefix stays cached
    write(cache, table, 4, [1, 2, 3])
    before = books(cache)
    assert cache.num_free_pages == 3
    with pytest.raises(OutOfPages) as error:
        cache.open([9] * 16)
    assert (error.value.needed, error.value.free) == (4, 3)
    assert not cache.can_open([9] * 16) and cache.can_open([9] * 12)
    assert not cache.can_open([], [16]) and cache.can_open([], [12]) and not cache.can_open([], [12, 1])
    with pytest.raises(OutOfPages) as error:
        cache.open(tokens + [9] * 12)  # shares the cached page too, so that only two are left for three
    assert (error.value.needed, error.value.free) == (3, 2)
    assert not cache.can_open(tokens, [20]) and cache.can_open(tokens, [16]) and cache.can_open(tokens, [12, 9])
    with pytest.raises(OutOfPages) as error:
        cache.reserve(table, 18)
    assert (error.value.needed, error.value.free) == (4, 3)
    assert_unchanged(cache, before)


def test_a_private_copy_that_cannot_be_had_changes_nothing():
    cache = make_cache(num_pages=3)
    table = opened(cache, [], 8)
    write(cache, table, 0, [1, 2, 3, 4, 5])
    forked = cache.fork(table)
    cache.open([9])
    start = fill_slab(cache, cache.take_slab(), [70, 71, 72])
    before = books(cache)
    with pytest.raises(OutOfPages):
        page_rows(cache, forked, 2, 6)
    with pytest.raises(OutOfPages):
        cache.commit([CommitMove(table, start, 1, 5), CommitMove(forked, start + 1, 2, 3)])
    assert_unchanged(cache, before)
    cache.close(table)
    cache.commit([CommitMove(forked, start + 1, 2, 3)])
    assert_holds(cache, forked, [1, 2, 3, 71, 72])


def test_reserve_makes_room_for_a_segment():
    cache = make_cache(num_pages=4)
    table = cache.open([1, 2, 3])
    write(cache, table, 0, [1, 2, 3])
    cache.reserve(table, 1)
    assert len(table.pages) == 1
    cache.reserve(table, 6)
    pages = list(table.pages)
    assert len(pages) == 3
    cache.reserve(table, 6)  # which is there
    cache.reserve(table, 0)
    assert table.pages == pages and table.length == 3
    write(cache, table, 3, [4, 5, 6])
    assert_holds(cache, table, [1, 2, 3, 4, 5, 6])
    cache.check_integrity()


@pytest.mark.parametrize("length", [5, 7, 8])
def test_reserve_leaves_a_shared_tail_to_the_other(length):
    """The first of two forks takes a copy of the tail, where there is one, the second keeps the page."""
    cache, values = make_cache(num_pages=6), list(range(10, 18))
    table = opened(cache, values[:length], length)
    write(cache, table, 0, values[:length])
    forked, tail = cache.fork(table), length % 4
    for each, taken in ((table, 1 if tail < 3 else 2), (forked, 0 if 0 < tail < 3 else 1)):
        free = cache.num_free_pages
        cache.reserve(each, 2)
        assert free - cache.num_free_pages == taken
    assert (table.pages[1] == forked.pages[1]) == (tail == 0) and table.pages[0] == forked.pages[0]
    free = cache.num_free_pages
    start = fill_slab(cache, cache.take_slab(), [70, 71, 80, 81])
    cache.commit([CommitMove(table, start, 2, length), CommitMove(forked, start + 2, 2, length)])
    assert cache.num_free_pages == free  # a commit takes nothing more
    assert_holds(cache, table, values[:length] + [70, 71])
    assert_holds(cache, forked, values[:length] + [80, 81])
    cache.check_integrity()


def test_reserve_after_a_rewind_into_shared_pages():
    """All pages that are to be written become private, those after the tail too; what lacks a page changes nothing."""
    cache, prompt = make_cache(num_pages=6), list(range(12))
    first = published_table(cache, prompt, 12)
    second = cache.open(prompt)
    cache.truncate(second, 6)
    before = books(cache)
    with pytest.raises(OutOfPages) as error:
        cache.reserve(second, 11)  # a copy of two pages and two more
    assert (error.value.needed, error.value.free) == (4, 3)
    assert_unchanged(cache, before)
    cache.reserve(second, 10)
    assert second.pages[0] == first.pages[0] and not set(second.pages[1:]) & set(first.pages)
    assert_holds(cache, first, prompt)
    assert_holds(cache, second, prompt[:6])
    assert cache.num_free_pages == 0 and cache.shared_length(prompt) == 12
    cache.check_integrity()


def test_nobody_finds_what_is_reserved_to_be_overwritten():
    """A rewound table's pages are published: between reserve and commit nobody may come to share one, or the commit
    would need a page that was not reserved."""
    cache, prompt = make_cache(num_pages=4), list(range(8))
    table = published_table(cache, prompt, 8)
    cache.truncate(table, 4)
    assert cache.shared_length(prompt) == 8
    cache.reserve(table, 4)
    assert cache.shared_length(prompt) == 4
    other = cache.open(prompt + [8] * 4)
    assert other.pages[0] == table.pages[0] and table.pages[1] not in other.pages and not cache.num_free_pages
    start = fill_slab(cache, cache.take_slab(), [70, 71, 72, 73])
    cache.commit([CommitMove(table, start, 4, 4)])
    assert_holds(cache, table, prompt[:4] + [70, 71, 72, 73])
    cache.check_integrity()


def test_a_closed_table_is_refused_everywhere():
    cache, other = make_cache(), make_cache()
    closed, foreign = opened(cache, [], 4), opened(other, [], 4)
    cache.close(closed)
    for table, reason in ((closed, "is closed"), (foreign, "of another cache")):
        for use in (
            lambda: cache.close(table),
            lambda: page_rows(cache, table, 0, 0),
            lambda: cache.fork(table),
            lambda: cache.reserve(table, 4),
            lambda: cache.reserve(table, 0),
            lambda: cache.truncate(table, 0),
            lambda: cache.publish(table, []),
            lambda: cache.block_tables([table]),
            lambda: cache.commit([CommitMove(table, 0, 1, 0)]),
        ):
            with pytest.raises(IntegrityError, match=reason):
                use()
    cache.check_integrity()


def test_misuse_is_refused_before_anything_changes():
    cache = make_cache()
    table = opened(cache, [], 8)
    write(cache, table, 0, [1, 2, 3])
    before = books(cache)
    for use, message in (
        (lambda: page_rows(cache, table, 5, 9), "exceed a table of 8"),
        (lambda: page_rows(cache, table, 3, 2), "exceed a table of 8"),
        (lambda: page_rows(cache, table, -1, 2), "exceed a table of 8"),
        (lambda: cache.truncate(table, 4), "cannot be rewound to 4"),
        (lambda: cache.truncate(table, -1), "cannot be rewound to -1"),
        (lambda: cache.publish(table, list(range(9))), "exceed a table of 8"),
        (lambda: cache.commit([CommitMove(table, 0, 2, 4)]), "leaves a gap after 3"),
        (lambda: cache.commit([CommitMove(table, 0, 6, 3)]), "exceed a table of 8"),
        (lambda: cache.commit([CommitMove(table, 7, 3, 3)]), "lie in no one slab"),
        (lambda: cache.commit([CommitMove(table, 27, 0, 3)]), "lie in no one slab"),
        (lambda: cache.commit([CommitMove(table, -1, 1, 3)]), "lie in no one slab"),
    ):
        with pytest.raises(IntegrityError, match=message):
            use()
        assert_unchanged(cache, before)


def test_slabs_are_counted():
    cache = make_cache(num_slabs=2)
    slabs = [cache.take_slab(), cache.take_slab()]
    assert sorted(slabs) == [0, 1] and cache.num_free_slabs == 0
    with pytest.raises(IntegrityError, match="all 2 slabs are taken"):
        cache.take_slab()
    cache.return_slab(1)
    for bad in (1, 2, -1):
        with pytest.raises(IntegrityError, match=f"slab {bad} is not taken"):
            cache.return_slab(bad)
    cache.check_integrity(slabs_out=1)
    with pytest.raises(IntegrityError, match="1 slabs are taken and 0 are held"):
        cache.check_integrity(slabs_out=0)
    assert cache.take_slab() == 1


def test_check_integrity_sees_planted_errors():
    cache = make_cache()
    table = opened(cache, [], 5)
    table.length = 9
    with pytest.raises(IntegrityError, match="does not satisfy"):
        cache.check_integrity()
    table.length = 5
    cache.pool.share(table.pages)
    with pytest.raises(IntegrityError, match="2 references and 1 holders"):
        cache.check_integrity()
    cache.pool.free(table.pages)
    cache._free_slabs.pop()
    with pytest.raises(IntegrityError, match="slabs were lost or doubled: 2 free \\+ 0 taken of 3"):
        cache.check_integrity()


# -- everything at once -------------------------------------------------------------------------------------------


class CacheMachine(RuleBasedStateMachine):
    """Random calls on a small cache beside a model: for every open table the list of values it must hold.

    Values are a function of the whole prefix, as keys are, so a page shared for the wrong prefix shows: the value at a
    position numbers the prefix that ends there. Every table is read back after every step, and unwritten rows are NaN.
    """

    tables = Bundle("tables")

    @initialize(page_size=st.sampled_from([1, 4, 5]), num_pages=st.sampled_from([5, 9, 14]))
    def build(self, page_size, num_pages):
        self.cache = make_cache(page_size, num_pages, num_slabs=5, slab_len=9)
        self.tokens: dict[BlockTable, list[int]] = {}
        self.numbers: dict[tuple[int, ...], int] = {}
        self.slabs: list[int] = []

    def values(self, tokens: list[int]) -> list[int]:
        prefixes = [tuple(tokens[: i + 1]) for i in range(len(tokens))]
        return [self.numbers.setdefault(prefix, len(self.numbers)) for prefix in prefixes]

    def refused(self, call):
        """Runs `call`; on OutOfPages checks that nothing changed and returns None."""
        before = books(self.cache)
        try:
            return call()
        except OutOfPages as error:
            assert error.needed > error.free
            assert_unchanged(self.cache, before)
            return None

    def opened(self, table: BlockTable | None, tokens: list[int]):
        if table is None:
            return multiple()
        self.tokens[table] = tokens
        return table

    def room(self, table: BlockTable) -> int:
        return len(table.pages) * self.cache.page_size

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), max_size=13), offer=st.booleans())
    def open(self, tokens, offer):
        can = self.cache.can_open(tokens)
        table = self.refused(lambda: self.cache.open(tokens))
        assert can == (table is not None)
        if table is not None:
            assert table.length % self.cache.page_size == 0 and table.length <= len(tokens)
            assert 0 <= self.room(table) - len(tokens) < self.cache.page_size
            assert_holds(self.cache, table, self.values(tokens)[: table.length])
            write(self.cache, table, table.length, self.values(tokens)[table.length :])
            if offer:
                self.cache.publish(table, tokens)
        return self.opened(table, tokens)

    @rule(target=tables, prompt=st.lists(st.integers(0, 1), max_size=9),
          rests=st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=3), spare=st.integers(0, 9))
    def open_together(self, prompt, rests, spare):
        """A population: where can_open says that it fits, it does, each with its segment."""
        prompts, tables = [prompt + rest for rest in rests], []
        if not self.cache.can_open(prompt, [len(tokens) + spare for tokens in prompts]):
            return multiple()
        for tokens in prompts:
            table = self.cache.open(tokens)
            self.cache.reserve(table, len(tokens) + spare - table.length)
            write(self.cache, table, table.length, self.values(tokens)[table.length :])
            self.cache.publish(table, prompt)
            tables.append(self.opened(table, tokens))
        return multiple(*tables)

    @rule(table=tables, share=st.integers(0, 20))
    def publish(self, table, share):
        self.cache.publish(table, self.tokens[table][:share])

    @rule(target=tables, table=tables)
    def fork(self, table):
        free = self.cache.num_free_pages
        forked = self.cache.fork(table)
        assert self.cache.num_free_pages == free
        return self.opened(forked, list(self.tokens[table]))

    @rule(table=tables, back=st.integers(0, 6), more=st.lists(st.integers(0, 1), max_size=9))
    def prefill(self, table, back, more):
        start = max(0, table.length - back)
        more = more[: self.room(table) - start]
        tokens = self.tokens[table][:start] + more
        rows = self.refused(lambda: self.cache.rows(table, start, len(tokens)))
        if rows is not None:
            write(self.cache, table, start, self.values(tokens)[start:])
            self.tokens[table] = tokens

    @rule(
        chosen=st.lists(tables, min_size=1, max_size=3, unique_by=id),
        backs=st.lists(st.integers(0, 6), min_size=3, max_size=3),
        segments=st.lists(st.lists(st.integers(0, 1), max_size=7), min_size=3, max_size=3),
    )
    def commit(self, chosen, backs, segments):
        moves, results, slabs = [], [], []
        for table, back, segment in zip(chosen, backs, segments):
            if not self.cache.num_free_slabs:
                break
            at = max(0, table.length - back)
            segment = segment[: self.room(table) - at]
            tokens = self.tokens[table][:at] + segment
            slabs.append(self.cache.take_slab())
            start = fill_slab(self.cache, slabs[-1], self.values(tokens)[at:], 2)
            moves.append(CommitMove(table, start, len(segment), at))
            results.append(tokens)
        if self.refused(lambda: self.cache.commit(moves) or True):
            for move, tokens in zip(moves, results):
                self.tokens[move.table] = tokens
        for slab in slabs:
            self.cache.return_slab(slab)

    @rule(table=tables, length=st.integers(0, 13))
    def truncate(self, table, length):
        length = min(length, table.length)
        self.cache.truncate(table, length)
        self.tokens[table] = self.tokens[table][:length]

    @rule(table=tables, tokens=st.integers(0, 9))
    def reserve(self, table, tokens):
        """After it a commit of so many positions takes no page and reaches nobody else's."""
        if self.refused(lambda: self.cache.reserve(table, tokens) or True) and tokens and self.cache.num_free_slabs:
            assert self.room(table) >= table.length + tokens
            free, tail = self.cache.num_free_pages, self.tokens[table] + [1] * tokens
            slab = self.cache.take_slab()
            start = fill_slab(self.cache, slab, self.values(tail)[table.length :])
            self.cache.commit([CommitMove(table, start, tokens, table.length)])
            self.cache.return_slab(slab)
            self.tokens[table] = tail
            assert self.cache.num_free_pages >= free  # what it ended the sharing of is free

    @rule(table=consumes(tables), share=st.sampled_from([0, 3, 20, 20]))
    def close(self, table, share):
        """With what it holds, or only the first of that: what is found afterwards is read back by who opens it."""
        tokens, size = self.tokens.pop(table), self.cache.page_size
        self.cache.close(table, tokens[:share])
        assert self.cache.shared_length(tokens) >= min(share, len(tokens)) // size * size

    @rule(table=tables, more=st.lists(st.integers(0, 1), max_size=9))
    def adopt(self, table, more):
        """What is published of a longer text, of which only shared pages are there yet."""
        tokens, free = self.tokens[table] + more, self.cache.num_free_pages
        if self.cache.adopt(table, tokens):
            assert table.length % self.cache.page_size == 0 and len(self.tokens[table]) < table.length <= len(tokens)
            assert self.cache.shared_length(tokens) == table.length
            self.tokens[table] = tokens[: table.length]
        else:
            assert self.cache.num_free_pages == free

    @rule(tokens=st.lists(st.integers(0, 1), max_size=13), kept=st.integers(0, 13))
    def forget(self, tokens, kept):
        """Nobody who holds something loses it, which the invariant sees; and no page is lost."""
        before, size = self.cache.shared_length(tokens), self.cache.page_size
        self.cache.forget(tokens, kept)
        assert min(before, kept // size * size) <= self.cache.shared_length(tokens) <= before

    @rule(table=tables, back=st.integers(0, 6), tokens=st.integers(0, 9))
    def try_reserve(self, table, back, tokens):
        """So many positions can be written then without a page more, whatever others share."""
        start = max(0, table.length - back)
        room = min(tokens, self.cache.try_reserve(table, start, tokens))
        if not room or not self.cache.num_free_slabs:
            return
        held = Counter(page for other in self.tokens for page in other.pages)
        text = self.tokens[table][:start] + [1] * room
        slab = self.cache.take_slab()
        first = fill_slab(self.cache, slab, self.values(text)[start:])
        self.cache.commit([CommitMove(table, first, room, start)])
        self.cache.return_slab(slab)
        self.tokens[table] = text
        assert held == Counter(page for other in self.tokens for page in other.pages)

    @rule()
    def slab(self):
        if len(self.slabs) < 2:
            self.slabs.append(self.cache.take_slab())
        else:
            self.cache.return_slab(self.slabs.pop(0))

    @invariant()
    def everything_is_as_it_must_be(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity(slabs_out=len(self.slabs))
        for table, tokens in self.tokens.items():
            assert_holds(self.cache, table, self.values(tokens))
        self.assert_index()

    def assert_index(self):
        """Each page that may be found holds what a model would compute after the pages that lead to it."""
        pool, size = self.cache.pool, self.cache.page_size
        pages, values = [], []
        for key, page in pool._index.items():
            tokens: list[int] = []
            while key is not None:
                tokens[:0] = key[1]
                key = pool._keys[key[0]] if key[0] >= 0 else None
            pages += range(page * size, (page + 1) * size)
            values += self.values(tokens)[-size:]
        assert torch.equal(self.cache.k_pages[:, pages], rows_for(values))

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for table in list(self.tokens):
            self.cache.close(table)
        self.cache.check_integrity(slabs_out=len(self.slabs))
        assert self.cache.num_free_pages == self.cache.num_pages


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    derandomize=True, deadline=None, database=None, max_examples=300, stateful_step_count=50
)


def test_copy_rows_agrees_with_its_reference_bit_for_bit():
    """Commits go through libstars where it is built: rows of every layer, and nothing else, must move."""
    generator = torch.Generator().manual_seed(3)
    source = [torch.randn(3, 17, 2, 10, generator=generator) for _ in range(2)]
    before = [torch.randn(3, 37, 2, 10, generator=generator) for _ in range(2)]
    picked = torch.tensor([16, 0, 3, 3, 9], dtype=torch.int32)
    target = torch.tensor([36, 1, 0, 20, 19], dtype=torch.int32)
    results = []
    for copy in (copy_rows, copy_rows_reference):
        after = [tensor.clone() for tensor in before]
        copy(source[0], source[1], picked, after[0], after[1], target)
        results.append(after)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0][:, 36], source[0][:, 16]) and torch.equal(results[0][1][:, 2], before[1][:, 2])


def test_a_commit_of_more_rows_than_one_copy_holds(monkeypatch):
    """In parts, and replayed: every row arrives."""
    monkeypatch.setattr("stars.cache.MAX_MOVES", 5)
    cache = make_cache()
    for _ in range(2):
        tables, moves = [], []
        for index in range(3):
            table, slab = opened(cache, [], 12), cache.take_slab()
            rows = slice(slab * cache.slab_len, slab * cache.slab_len + 4)
            cache.k_slabs[:, rows] = torch.randn(cache.k_slabs[:, rows].shape)
            cache.v_slabs[:, rows] = -cache.k_slabs[:, rows]
            tables.append((table, slab, rows))
            moves.append(CommitMove(table, rows.start, 4, 0))
        cache.commit(moves)
        for table, slab, rows in tables:
            places = page_rows(cache, table, 0, 4)
            assert torch.equal(cache.k_pages[:, places], cache.k_slabs[:, rows])
            assert torch.equal(cache.v_pages[:, places], cache.v_slabs[:, rows])
            cache.return_slab(slab)
            cache.close(table)
    cache.check_integrity(slabs_out=0)


# -- commits that rewind: what the machine above may or may not come upon ---------------------------------------------


def published_table(cache: PagedCache, tokens: list[int], capacity: int) -> BlockTable:
    """A table that holds `tokens` and offers its full pages."""
    table = opened(cache, tokens, capacity)
    write(cache, table, table.length, tokens[table.length :])
    cache.publish(table, tokens)
    return table


def test_a_commit_rewinds_two_published_tables():
    """Sole holders overwrite in place, and of neither what was offered from there on is found again."""
    cache = make_cache()
    prompts = [list(range(10)), list(range(100, 110)), list(range(200, 210))]
    tables = [published_table(cache, prompt, 12) for prompt in prompts]
    pages, start = [list(table.pages) for table in tables], fill_slab(cache, cache.take_slab(), [70, 71, 72])
    cache.commit([CommitMove(tables[0], start, 1, 2), CommitMove(tables[1], start + 1, 1, 5),
                  CommitMove(tables[2], start + 2, 1, 7)])
    assert [table.pages for table in tables] == pages
    for table, values in zip(tables, (prompts[0][:2] + [70], prompts[1][:5] + [71], prompts[2][:7] + [72])):
        assert_holds(cache, table, values)
    assert [cache.shared_length(prompt) for prompt in prompts] == [0, 4, 4]
    cache.check_integrity()


@pytest.mark.parametrize("through", ["commit", "rows"])
@pytest.mark.parametrize("at, count", [(4, 1), (4, 3), (5, 2), (3, 2), (2, 5), (1, 1)])
def test_a_shared_last_page_that_is_written_in_part_becomes_private(through, at, count):
    """Up to the page's end it is not written; to its other holder it belongs all the same."""
    cache = make_cache()
    prompt, new = list(range(8)), list(range(70, 70 + count))
    first, second = published_table(cache, prompt, 8), opened(cache, prompt, 8)
    assert second.pages == first.pages
    if through == "commit":
        cache.commit([CommitMove(second, fill_slab(cache, cache.take_slab(), new), count, at)])
    else:
        cache.truncate(second, at)
        write(cache, second, at, new)
    assert_holds(cache, first, prompt)
    assert_holds(cache, second, prompt[:at] + new)
    touched = range(at // 4, (at + count - 1) // 4 + 1)
    assert [second.pages[i] != first.pages[i] for i in range(2)] == [i in touched for i in range(2)]
    third = opened(cache, prompt, 8)
    assert third.pages == first.pages and cache.shared_length(prompt) == 8
    assert_holds(cache, third, prompt)
    cache.check_integrity()


def test_two_holders_of_a_published_page_rewind_in_one_commit():
    """One leaves with a copy, the last to write keeps the page, and it is not offered any more."""
    cache = make_cache(num_pages=7)
    prompt = list(range(8))
    first, second = published_table(cache, prompt, 8), opened(cache, prompt, 8)
    start = fill_slab(cache, cache.take_slab(), [70, 71, 72])
    free = cache.num_free_pages
    cache.commit([CommitMove(first, start, 1, 5), CommitMove(second, start + 1, 2, 6)])
    assert_holds(cache, first, prompt[:5] + [70])
    assert_holds(cache, second, prompt[:6] + [71, 72])
    assert first.pages[0] == second.pages[0] and first.pages[1] != second.pages[1]
    assert cache.num_free_pages == free - 1
    assert cache.shared_length(prompt) == 4
    third = opened(cache, prompt, 8)
    assert third.length == 4 and third.pages[1] not in first.pages + second.pages
    cache.check_integrity()


def test_two_moves_into_one_shared_page_copy_it_once():
    cache = make_cache(num_pages=6)
    prompt = list(range(8))
    first, second = published_table(cache, prompt, 8), opened(cache, prompt, 8)
    start, free = fill_slab(cache, cache.take_slab(), [70, 71, 72]), cache.num_free_pages
    cache.commit([CommitMove(second, start, 1, 5), CommitMove(second, start + 1, 2, 6)])
    assert_holds(cache, second, prompt[:5] + [70, 71, 72])
    assert_holds(cache, first, prompt)
    assert cache.num_free_pages == free - 1 and cache.shared_length(prompt) == 8
    cache.check_integrity()


@pytest.mark.parametrize("at", [8, 6, 4, 0])
def test_a_commit_of_nothing_rewinds_and_copies_nothing(at):
    """A page that nothing is written to stays shared and on offer, whatever the commit writes elsewhere."""
    cache = make_cache(num_pages=5)
    prompt, other = list(range(8)), list(range(50, 58))
    first, second, alone = published_table(cache, prompt, 8), opened(cache, prompt, 9), published_table(cache, other, 8)
    assert cache.num_free_pages == 0
    start = fill_slab(cache, cache.take_slab(), [70])
    cache.commit([CommitMove(second, 0, 0, at), CommitMove(alone, start, 1, 6)])
    assert_holds(cache, alone, other[:6] + [70])
    assert second.pages[:2] == first.pages and cache.shared_length(prompt) == 8
    assert_holds(cache, second, prompt[:at])
    assert_holds(cache, first, prompt)
    cache.check_integrity()


def test_a_commit_that_lacks_a_page_leaves_published_ones_on_offer():
    """The table that could have been overwritten in place, before and behind the one that needs a copy."""
    cache = make_cache(num_pages=4)
    prompt, other = list(range(8)), list(range(50, 58))
    first, second, alone = (published_table(cache, tokens, 8) for tokens in (prompt, prompt, other))
    start, before = fill_slab(cache, cache.take_slab(), [70, 71, 72]), books(cache)
    moves = [CommitMove(alone, start, 1, 6), CommitMove(second, start + 1, 1, 6)]
    for order in (moves, moves[::-1]):
        with pytest.raises(OutOfPages):
            cache.commit(order)
        assert_unchanged(cache, before)
    assert cache.shared_length(other) == cache.shared_length(prompt) == 8
    cache.close(first)
    cache.commit(moves)
    assert_holds(cache, alone, other[:6] + [70])
    assert_holds(cache, second, prompt[:6] + [71])
    cache.check_integrity()


def test_a_slab_has_as_many_holders_as_take_it():
    """It is free once the last has returned it; every holding counts in the books."""
    cache = make_cache(num_slabs=2)
    slab = cache.take_slab(holders=3)
    cache.check_integrity(slabs_out=3)
    cache.share_slab(slab, 2)
    for held in (4, 3, 2, 1):
        cache.return_slab(slab)
        cache.check_integrity(slabs_out=held)
        assert cache.num_free_slabs == 1
    with pytest.raises(IntegrityError, match="1 slabs are taken and 2 are held"):
        cache.check_integrity(slabs_out=2)
    cache.return_slab(slab)
    cache.check_integrity(slabs_out=0)
    assert cache.num_free_slabs == 2
    with pytest.raises(IntegrityError, match=f"slab {slab} is not taken: return each slab once for each"):
        cache.return_slab(slab)
    with pytest.raises(IntegrityError, match=f"slab {slab} is not taken and cannot be shared by 1 more"):
        cache.share_slab(slab, 1)
    with pytest.raises(IntegrityError, match="a slab for 0 holders"):
        cache.take_slab(holders=0)
    slab = cache.take_slab(holders=2)
    cache.reset()
    cache.check_integrity(slabs_out=0)
    assert cache.num_free_slabs == 2
    cache._slab_holders[slab] = 1
    with pytest.raises(IntegrityError, match="slabs were lost or doubled|a slab is free and held"):
        cache.check_integrity()


# -- what stays of tables that were closed ----------------------------------------------------------------------------


def test_full_pages_stay_as_far_as_every_store_holds_them():
    """A store that is behind has nothing in the last pages, and who shares them would read that."""
    cache = make_cache(4, 16, num_slabs=2, slab_len=12)
    other = cache.add_store(shape_of(2, 1, 4), torch.float32)
    tokens = list(range(14))
    table = cache.open(tokens, (0, other))
    slab = cache.take_slab()
    cache.commit([CommitMove(table, slab * 12, 6, 0, (0, other))])
    cache.commit([CommitMove(table, slab * 12, 8, 6, (0,))])
    assert table.length == 14 and table.held(other) == 6
    cache.close(table, tokens)
    assert cache.shared_length(tokens, (0, other)) == 4 and cache.shared_length(tokens) == 0
    cache.check_integrity()


def test_a_prefix_goes_after_what_continues_it():
    """Two read one prompt at once. The first one's page is what the second one's response continues: it was used when
    that ended, and not when the first one did."""
    cache, prompt = make_cache(4, 6), [1, 2, 3, 4]
    first, second = opened(cache, prompt, 4), opened(cache, prompt + [5, 6, 7, 8], 8)
    for table in (first, second):
        write(cache, table, 0, (prompt + [5, 6, 7, 8])[: len(table.pages) * 4])
    cache.close(first, prompt)
    cache.close(second, prompt + [5, 6, 7, 8])
    assert cache.pool.num_published == 2  # the second one's own first page is free
    cache.close(opened(cache, [], 4 * 5))  # all that is free, and the last page of the response
    assert cache.shared_length(prompt + [5, 6, 7, 8]) == 4
    cache.check_integrity()


def test_what_is_counted_of_lookups():
    cache, tokens = make_cache(4, 16), list(range(11))
    table = opened(cache, tokens, 11)
    write(cache, table, 0, tokens)
    cache.close(table, tokens)
    assert (cache.prefix_queries, cache.prefix_hits) == (11, 0)
    before = cache.prefix_queries, cache.prefix_hits
    cache.open(tokens + [1])
    assert (cache.prefix_queries - before[0], cache.prefix_hits - before[1]) == (12, 8)
    cache.reset()
    assert cache.prefix_queries == before[0] + 12


def test_what_others_go_on_from_is_not_forgotten():
    """Of two texts with one beginning that of the one that is kept stays, and so does what somebody holds."""
    cache, one, other = make_cache(4, 16), list(range(12)), [*range(8), 90, 91, 92, 93]
    for tokens in (one, other):
        table = opened(cache, tokens, 12)
        write(cache, table, table.length, tokens[table.length :])
        cache.close(table, tokens)
    cache.forget(other, 4)
    assert (cache.shared_length(other), cache.shared_length(one)) == (8, 12)
    held = cache.open(one)
    cache.forget(one, 4)
    assert cache.shared_length(one) == 12
    cache.close(held)
    cache.forget(one, 6)
    assert cache.shared_length(one) == 4 and cache.pool.num_published == 1
    cache.check_integrity()
