"""libstars' ledger of pages beside the engine's: the same page numbers, refusals and counts at every step."""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest

from stars.bindings import libstars
from stars.bindings.ledger import Ledger
from stars.errors import IntegrityError, OutOfPages
from stars.page_pool import PagePool

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")


class Beside:
    """Both ledgers, and what a host holds. Every operation runs on both, and is compared."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.num_pages = rng.choice((0, 1, 2, 5, 12, 24, 40))
        self.size = rng.choice((1, 2, 3, 16))
        self.alphabet = rng.choice((1, 2, 3))
        self.keys = rng.choice(((0,), (0, 1, -(2**63))))
        self.pool, self.ledger = PagePool(self.num_pages), Ledger(self.num_pages, self.size)
        self.held: list[tuple[int, list[int], list[int]]] = []  # key, tokens, pages
        self.done: Counter[str] = Counter()

    # -- what is done to both --------------------------------------------------------------------------------------

    def both(self, name: str, ours: Callable[[], object], theirs: Callable[[], object], bad: bool = False) -> object:
        """The result of both; None where both refuse. bad: the pool may raise half way, and is put back then."""
        before = copy.deepcopy(self.pool) if bad else None
        expected, refused = attempt(ours)
        found, refused_too = attempt(theirs)
        assert (found, refused_too) == (expected, refused), name
        if refused and before is not None:
            self.pool = before
        self.done[name + " refused" * bool(refused)] += 1
        return expected

    def alloc(self, count: int) -> list[int] | None:
        return self.both("alloc", lambda: self.pool.alloc(count), lambda: self.ledger.alloc(count))

    def share(self, pages: list[int], bad: bool = False) -> None:
        self.both("share", lambda: self.pool.share(pages), lambda: self.ledger.share(pages), bad)

    def release(self, pages: list[int], bad: bool = False) -> None:
        self.both("release", lambda: self.pool.free(pages), lambda: self.ledger.release(pages), bad)

    def match(self, key: int, tokens: list[int]) -> list[int]:
        found = self.both("match", lambda: self.pool.match(self.chunks(key, tokens)),
                          lambda: self.ledger.match(tokens, key))
        self.done["pages found"] += len(found)
        return found

    def publish(self, key: int, pages: list[int], tokens: list[int], bad: bool = False) -> None:
        self.both("publish", lambda: self.pool.publish(pages, self.chunks(key, tokens)),
                  lambda: self.ledger.publish(pages, tokens, key), bad)

    # -- what a host does ------------------------------------------------------------------------------------------

    def step(self) -> None:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.3:
            self.admit()
        elif kind < 0.5 and self.held:
            key, tokens, pages = self.held.pop(rng.randrange(len(self.held)))
            self.release(pages)
        elif kind < 0.6 and self.held:
            key, tokens, pages = rng.choice(self.held)
            self.share(pages)
            self.held.append((key, tokens, list(pages)))
        elif kind < 0.7 and self.held:
            key, tokens, pages = rng.choice(self.held)
            # Under another key, pages that are published already are refused.
            self.publish(rng.choice((key, *self.keys)), pages, tokens, bad=True)
        elif kind < 0.76:
            found = self.match(*self.text())
            self.both("cost", lambda: self.pool.cost(found), lambda: self.ledger.cost(found))
            if rng.random() < 0.3:
                found = found[rng.randrange(len(found) + 1):]
                self.both("forget", lambda: self.pool.forget(found), lambda: self.ledger.forget(found))
        elif kind < 0.8 and self.num_pages:
            page = rng.randrange(self.num_pages)
            if rng.random() < 0.4:
                self.both("unpublish", lambda: self.pool.unpublish(page), lambda: self.ledger.unpublish(page))
            self.both("page", lambda: (self.pool.references(page), self.pool.is_published(page)),
                      lambda: self.ledger.page(page)[:2])
        elif kind < 0.84:
            self.wrong()
        elif kind < 0.9:
            fresh = self.alloc(rng.randrange(self.num_pages + 3))
            if fresh:
                self.release(fresh)
        else:
            counts = self.ledger.counts()
            assert (counts.free + counts.cached, counts.cached, counts.published) == (
                self.pool.num_available, self.pool.num_cached, self.pool.num_published)
            assert counts.used == sum(count > 0 for count in self.pool._references) and counts.sequences == 0

    def admit(self) -> None:
        """Shares what is there of a text, takes pages for the rest, and mostly publishes them."""
        key, tokens = self.text()
        found = self.match(key, tokens)
        self.share(found)
        fresh = self.alloc(len(tokens) // self.size - len(found))
        if fresh is None:
            self.release(found)
            return
        self.held.append((key, tokens, found + fresh))
        if self.rng.random() < 0.8:
            self.publish(key, found + fresh, tokens)

    def wrong(self) -> None:
        """What mostly must be refused, and must have changed nothing then."""
        rng = self.rng
        if not self.num_pages:
            return
        pages = [rng.randrange(self.num_pages) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.4:
            self.publish(rng.choice(self.keys), pages, self.text()[1], bad=True)
            return
        references, held = self.pool._references, Counter(pages)
        if any(not references[page] and not self.pool.is_published(page) for page in pages):
            self.share(pages, bad=True)
        if any(references[page] < count for page, count in held.items()):
            self.release(pages, bad=True)

    def text(self) -> tuple[int, list[int]]:
        pages = self.rng.randrange(5)
        tokens = [self.rng.randrange(-1, self.alphabet) for _ in range(pages)]
        # Few texts, which begin alike often: a page's tokens differ in one place alone.
        spread = [token if i == self.size - 1 else 7 for token in tokens for i in range(self.size)]
        return self.rng.choice(self.keys), spread

    def chunks(self, key: int, tokens: list[int]) -> list[tuple[int, ...]]:
        size = self.size
        return [(*tokens[i : i + size], key) for i in range(0, len(tokens) - size + 1, size)]

    def check(self) -> None:
        holders = Counter(page for _, _, pages in self.held for page in pages)
        self.pool.check_integrity(holders)
        self.ledger.check_integrity(holders)
        if self.num_pages:  # and where one is wrong, both say so
            holders[self.rng.randrange(self.num_pages)] += 1
            for check in (self.pool.check_integrity, self.ledger.check_integrity):
                with pytest.raises(IntegrityError, match="references and [0-9]+ holders"):
                    check(holders)


def attempt(call: Callable[[], object]) -> tuple[object, tuple[str, ...]]:
    """The result, or what was refused, with the numbers in it."""
    try:
        return call(), ()
    except OutOfPages as error:
        return None, ("OutOfPages", str(error.needed), str(error.free))
    except IntegrityError as error:
        return None, ("IntegrityError", *re.findall(r"page (\d+)", str(error)))


class Totals(NamedTuple):
    steps: int
    done: Counter[str]


def run(seed: int, steps: int, length: int = 400, every: int = 20) -> Totals:
    """So many steps, over many pairs of ledgers."""
    rng, done = random.Random(seed), Counter[str]()
    for _ in range(steps // length):
        beside = Beside(rng)
        for step in range(length):
            beside.step()
            if step % every == 0:
                beside.check()
        for _, _, pages in beside.held:
            beside.release(pages)
        beside.held.clear()
        beside.check()
        done += beside.done
    return Totals(steps, done)


def all_was_tried(done: Counter[str], operations: int) -> None:
    assert done.total() - done["pages found"] >= operations
    few = {name: done[name] for name in (
        "alloc", "alloc refused", "share", "share refused", "release", "release refused", "publish", "publish refused",
        "forget", "unpublish", "cost", "page", "pages found") if done[name] < operations // 1000}
    assert not few, few


def test_both_ledgers_take_the_same_pages():
    steps, done = run(seed=18, steps=60_000)
    all_was_tried(done, 100_000)


@pytest.mark.slow
def test_both_ledgers_take_the_same_pages_over_millions_of_operations():
    done = Counter[str]()
    for seed in range(40):
        done += run(seed=seed, steps=60_000).done
    all_was_tried(done, 4_000_000)


class TestARealisticPool:
    def test_long_texts_in_two_thousand_pages(self):
        """Conversations that go on, until pages are reused many times over."""
        rng, size = random.Random(3), 16
        pool, ledger = PagePool(2000), Ledger(2000, size)
        texts = [[rng.randrange(50_000) for _ in range(size * 12)] for _ in range(30)]
        for turn in range(3000):
            tokens = texts[rng.randrange(len(texts))]
            if rng.random() < 0.3:
                tokens += [rng.randrange(50_000) for _ in range(size * rng.randrange(1, 5))]
            chunks = [tuple(tokens[i : i + size]) for i in range(0, len(tokens), size)]
            found = pool.match(chunks)
            assert ledger.match(tokens) == found
            pool.share(found)
            ledger.share(found)
            try:
                fresh = pool.alloc(len(chunks) - len(found))
            except OutOfPages:
                with pytest.raises(OutOfPages):
                    ledger.alloc(len(chunks) - len(found))
                fresh, chunks, tokens = [], chunks[: len(found)], tokens[: len(found) * size]
                texts = [text[: size * 8] for text in texts]
            else:
                assert ledger.alloc(len(chunks) - len(found)) == fresh
            pages = found + fresh
            assert ledger.publish(pages, tokens) == pool.publish(pages, chunks)
            pool.free(pages)
            ledger.release(pages)
        pool.check_integrity(Counter())
        ledger.check_integrity(Counter())
        assert pool.num_cached == ledger.counts().cached > 1000
