"""The page ledger alone: references, prefix index, order of reuse. Page tokens here are tuples of any length."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from stars.errors import IntegrityError, OutOfPages
from stars.page_pool import PagePool

A, B, C, D = (1, 2), (3, 4), (5, 6), (7, 8)


def published(pool: PagePool, *chunks: tuple[int, ...]) -> list[int]:
    """Allocates and publishes one page for each of `chunks`; the caller holds them."""
    pages = pool.alloc(len(chunks))
    pool.publish(pages, chunks)
    return pages


def test_alloc_takes_everything_and_no_more():
    pool = PagePool(5)
    pages = pool.alloc(5)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    with pytest.raises(OutOfPages) as error:
        pool.alloc(1)
    assert (error.value.needed, error.value.free) == (1, 0)
    pool.free(pages)
    pool.check_integrity(Counter())
    assert pool.num_available == 5


def test_alloc_of_too_many_changes_nothing():
    pool = PagePool(4)
    kept = published(pool, A, B)
    pool.free(kept)
    with pytest.raises(OutOfPages):
        pool.alloc(5)
    assert pool.match([A, B]) == kept and pool.num_available == 4
    pool.check_integrity(Counter())


def test_an_empty_pool_serves_empty_requests():
    pool = PagePool(0)
    assert pool.alloc(0) == [] and pool.match([A]) == []
    pool.check_integrity(Counter())


def test_match_finds_the_longest_prefix_and_compares_tokens():
    pool = PagePool(8)
    pages = published(pool, A, B, C)
    assert pool.match([A, B, C, D]) == pages
    assert pool.match([A, B]) == pages[:2]
    assert pool.match([A, D, C]) == pages[:1]
    assert pool.match([B]) == []  # B is published below A only
    # hash(-1) == hash(-2) in CPython: equal hashes, different tokens
    (page,) = published(pool, (-1,))
    assert hash((-1,)) == hash((-2,))
    assert pool.match([(-1,)]) == [page] and pool.match([(-2,)]) == []


def test_a_cached_page_is_shared_again_and_private_until_released_by_all():
    pool = PagePool(3)
    pages = published(pool, A)
    pool.free(pages)
    assert (pool.num_cached, pool.num_available) == (1, 3)
    pool.share(pages)
    pool.share(pages)
    assert (pool.num_cached, pool.num_available, pool.references(pages[0])) == (0, 2, 2)
    pool.free(pages)
    assert pool.num_available == 2
    pool.free(pages)
    assert pool.num_available == 3
    pool.check_integrity(Counter())


def test_reuse_takes_unpublished_pages_first_then_the_least_recently_released():
    pool = PagePool(4)
    first, second = published(pool, A), published(pool, B)
    pool.free(first)
    pool.free(second)
    pool.share(first)  # a hit makes it the most recent one
    pool.free(first)
    assert set(pool.alloc(2)).isdisjoint(first + second)
    assert pool.alloc(1) == second
    assert pool.match([A]) == first and pool.match([B]) == []
    pool.check_integrity()


def test_a_chain_is_reused_from_its_end():
    pool = PagePool(3)
    pages = published(pool, A, B, C)
    pool.free(pages)
    assert pool.alloc(1) == [pages[2]]
    assert pool.match([A, B, C]) == pages[:2]
    assert pool.alloc(1) == [pages[1]]
    assert pool.match([A, B, C]) == pages[:1]


def test_reuse_of_a_parent_forgets_its_descendants():
    """The trap: the parent's page number comes back for another prefix, and stale children below it would hit."""
    pool = PagePool(6)
    parent = published(pool, A)
    # Another holder computed A by itself: its first page stays private, its second is published below `parent`.
    other = pool.alloc(3)
    pool.publish(other, [A, B, C])
    assert pool.match([A, B, C]) == parent + other[1:]
    pool.free(parent)
    pool.alloc(2)
    assert pool.alloc(1) == parent  # reused while its descendants are still in use
    pool.check_integrity()
    pool.publish(parent, [D])
    assert pool.match([D, B, C]) == parent
    assert pool.match([A, B]) == []
    assert not pool.is_published(other[1]) and not pool.is_published(other[2])
    pool.free(other)
    assert pool.num_available == 3 and pool.num_cached == 0
    pool.check_integrity()


def test_cached_descendants_of_a_forgotten_page_become_free():
    pool = PagePool(4)
    pages = published(pool, A, B, C)
    pool.free(pages)
    pool.share(pages[:1])
    pool.unpublish(pages[0])
    assert (pool.num_cached, pool.num_published, pool.num_available) == (0, 0, 3)
    pool.check_integrity(Counter(pages[:1]))


def test_a_very_long_chain_is_forgotten_without_recursion():
    pool = PagePool(5000)
    pages = pool.alloc(5000)
    pool.publish(pages, [(i,) for i in range(5000)])
    pool.unpublish(pages[0])
    assert pool.num_published == 0
    pool.check_integrity(Counter(pages))


def test_publishing_twice_keeps_the_first_page():
    pool = PagePool(4)
    first, second = published(pool, A, B), published(pool, A, B)
    assert pool.match([A, B]) == first
    pool.publish(first, [A, B])
    assert pool.num_published == 2
    pool.free(second)
    assert pool.num_cached == 0
    pool.check_integrity(Counter(first))


def test_misuse_is_named():
    pool = PagePool(3)
    pages = published(pool, A)
    with pytest.raises(IntegrityError, match=f"page {pages[0]} is free or published"):
        pool.publish(pages, [B])
    pool.free(pages)
    with pytest.raises(IntegrityError, match=f"page {pages[0]} was released more often"):
        pool.free(pages)
    with pytest.raises(IntegrityError, match="page 2 is free and cannot be shared"):
        pool.share([2])


def test_check_integrity_sees_planted_errors():
    def fresh() -> tuple[PagePool, list[int]]:
        pool = PagePool(6)
        return pool, published(pool, A, B)

    pool, pages = fresh()
    pool._references[pages[0]] += 1
    with pytest.raises(IntegrityError, match="2 references and 1 holders"):
        pool.check_integrity(Counter(pages))
    pool, pages = fresh()
    pool._free.pop()
    with pytest.raises(IntegrityError, match="lost or doubled: 3 free \\+ 0 cached \\+ 2 in use of 6"):
        pool.check_integrity()
    pool, pages = fresh()
    pool._free[0] = pool._free[1]
    with pytest.raises(IntegrityError, match="free twice"):
        pool.check_integrity()
    pool, pages = fresh()
    pool._index[(3, C)] = 4
    with pytest.raises(IntegrityError, match="3 entries for 2"):
        pool.check_integrity()
    pool, pages = fresh()
    pool._children[pages[0]].clear()
    with pytest.raises(IntegrityError, match="does not lead to it"):
        pool.check_integrity()


def test_nothing_grows():
    """Random requests, ten thousand of them, through a small pool: the index never exceeds the pages."""
    pool, rng, held = PagePool(24), random.Random(7), []
    for step in range(10_000):
        if held and (len(held) > 4 or rng.random() < 0.4):
            pool.free(held.pop(rng.randrange(len(held))))
            continue
        chunks = [(rng.randrange(3),) for _ in range(rng.randrange(1, 7))]
        shared = pool.match(chunks)
        if len(chunks) - len(shared) > pool.num_available - pool.cost(shared):
            continue
        pool.share(shared)
        held.append(shared + pool.alloc(len(chunks) - len(shared)))
        pool.publish(held[-1], chunks)
        assert pool.num_published <= pool.num_pages
        if step % 50 == 0:
            pool.check_integrity(Counter(page for pages in held for page in pages))
    for pages in held:
        pool.free(pages)
    pool.check_integrity(Counter())
    assert pool.num_available == 24
    assert sum(len(children) for children in pool._children) <= 24
