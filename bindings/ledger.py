"""The ledger of pages of libstars: whose the pages of a KV cache are. The engine keeps its own, stars.page_pool."""

from __future__ import annotations

import ctypes
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from stars.bindings.layouts import HEADER, STRUCTURES
from stars.bindings.library import check_status, last_error, last_status, loaded
from stars.errors import IntegrityError, OutOfPages

_EXHAUSTED = HEADER.constants["STARS_EXHAUSTED"]
_REFUSALS = {HEADER.constants[f"STARS_{name}"] for name in ("INVALID", "CLOSED", "CORRUPT")}
_ADVICE = "release some, or open the ledger with more"


class PageCounts(NamedTuple):
    """Pages of a ledger: free + cached + used are all there are."""

    free: int
    cached: int  # published, without a holder
    used: int
    published: int  # cached or in use
    sequences: int  # open PageTables


class PageState(NamedTuple):
    """One page of a ledger."""

    references: int
    published: bool
    cached: bool


class PageCopy(NamedTuple):
    """Rows 0 .. rows - 1 of page `source` are to be copied to page `target`, before any row is written."""

    source: int
    target: int
    rows: int


class Ledger:
    """Reference counts of `num_pages` pages of `page_size` positions, and an index from token prefixes to pages.

    The same as stars.page_pool.PagePool, page number for page number; tokens are given flat, page_size a page. `key`,
    a signed 64-bit number, keeps apart what the same tokens give in other models. See "The ledger of pages" in stars.h.

    OutOfPages: more pages were asked for than are free or cached. IntegrityError names what is refused, a page that is
    not there or a closed ledger among it, and books that do not balance. What raises has changed nothing. MemoryError,
    and RuntimeError where libstars was not built, or another thread is at work with the ledger.
    """

    def __init__(self, num_pages: int, page_size: int):
        self._handle: int | None = None
        params = STRUCTURES["stars_ledger_params"]
        self._library = loaded()
        self._handle = self._library.stars_ledger_open(
            ctypes.byref(params(ctypes.sizeof(params), num_pages, page_size)))
        if not self._handle:
            check_status(last_status())
        self.num_pages = num_pages
        self.page_size = page_size
        self._out = array("i", bytes(4 * max(1, num_pages)))  # of none, the address would be null
        self._into = self._out.buffer_info()[0]
        self._page = STRUCTURES["stars_page"](ctypes.sizeof(STRUCTURES["stars_page"]))
        self._counts = STRUCTURES["stars_page_counts"](ctypes.sizeof(STRUCTURES["stars_page_counts"]))

    def alloc(self, count: int) -> list[int]:
        """`count` private pages with one reference each."""
        status = self._library.stars_ledger_alloc(self._handle, count, self._into)
        if status == _EXHAUSTED:
            counts = self.counts()
            raise OutOfPages(count, counts.free + counts.cached, _ADVICE)
        _check(status)
        return self._out[:count].tolist()

    def share(self, pages: Sequence[int]) -> None:
        """One reference more to each of `pages`, which are in use or cached."""
        given = array("i", pages)
        _check(self._library.stars_ledger_share(self._handle, given.buffer_info()[0], len(given)))

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each of `pages`, given in prefix order; published ones stay shareable."""
        given = array("i", pages)
        _check(self._library.stars_ledger_release(self._handle, given.buffer_info()[0], len(given)))

    def match(self, token_ids: Sequence[int], key: int = 0) -> list[int]:
        """Pages that hold the longest published prefix of the whole pages of `token_ids`."""
        tokens = array("i", token_ids)
        count = min(len(tokens) // self.page_size, self.num_pages)  # no more can be found
        found = self._library.stars_ledger_match(self._handle, key, tokens.buffer_info()[0], count, self._into)
        if found < 0:
            _check(-found)
        return self._out[:found].tolist()

    def publish(self, pages: Sequence[int], token_ids: Sequence[int], key: int = 0) -> list[int]:
        """Offers `pages`, all in use and holding the whole pages of `token_ids` from position 0, for sharing. Returns
        the pages by which these are found now."""
        tokens = array("i", token_ids)
        given = array("i", pages[: len(tokens) // self.page_size])
        count = len(given)
        found = array("i", bytes(4 * count))
        _check(self._library.stars_ledger_publish(self._handle, key, given.buffer_info()[0], tokens.buffer_info()[0],
                                                  count, found.buffer_info()[0]))
        return found.tolist()

    def forget(self, pages: Sequence[int]) -> None:
        """Gives up `pages`, a chain that `match` found, as far as nobody refers to them and nothing continues them."""
        given = array("i", pages)
        _check(self._library.stars_ledger_forget(self._handle, given.buffer_info()[0], len(given)))

    def unpublish(self, page: int) -> None:
        """Removes `page` and every page that continues it from the index."""
        _check(self._library.stars_ledger_unpublish(self._handle, page))

    def cost(self, pages: Sequence[int]) -> int:
        """Available pages that `share(pages)` would take out of reach of `alloc`."""
        given = array("i", pages)
        cost = int(self._library.stars_ledger_cost(self._handle, given.buffer_info()[0], len(given)))
        if cost < 0:
            _check(-cost)
        return cost

    def page(self, page: int) -> PageState:
        """What is known of one page."""
        out = self._page
        _check(self._library.stars_ledger_page(self._handle, page, ctypes.byref(out)))
        return PageState(out.references, bool(out.published), bool(out.cached))

    def counts(self) -> PageCounts:
        """How many pages there are of each kind."""
        out = self._counts
        _check(self._library.stars_ledger_counts(self._handle, ctypes.byref(out)))
        return PageCounts(out.free, out.cached, out.used, out.published, out.sequences)

    def check_integrity(self, expected: Counter[int] | None = None) -> None:
        """Raises IntegrityError unless the books balance; `expected` counts the references that callers hold by
        themselves, PageTables left aside."""
        holders = None if expected is None else array("q", [expected[page] for page in range(self.num_pages)])
        _check(self._library.stars_ledger_check(self._handle, None if holders is None else holders.buffer_info()[0]))

    def open(self, token_ids: Sequence[int] = (), key: int = 0) -> PageTable:
        """A table that shares the longest published prefix of `token_ids` in whole pages, the last token left out."""
        tokens = array("i", token_ids)
        return self._table(self._library.stars_sequence_open(self._handle, key, tokens.buffer_info()[0], len(tokens)))

    def close(self) -> None:
        """Gives the memory back; its tables must be closed before. A second call does nothing."""
        if self._handle:
            _check(self._library.stars_ledger_close(self._handle))
            self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.stars_ledger_close(self._handle)

    def _table(self, handle: int | None) -> PageTable:
        if not handle:
            _check(last_status())
        return PageTable(self, handle)


class PageTable:
    """The pages of one text, made by `Ledger.open`: position p lies in pages[p // page_size]. Errors: see Ledger."""

    def __init__(self, ledger: Ledger, handle: int | None):
        self._ledger = ledger  # which lives as long
        self._library = ledger._library
        self._handle = handle
        self._copy = STRUCTURES["stars_page_copy"](ctypes.sizeof(STRUCTURES["stars_page_copy"]))

    @property
    def pages(self) -> list[int]:
        """As many as its positions need."""
        count = _value(self._library.stars_sequence_pages(self._handle, None, 0))
        pages = array("i", bytes(4 * count))
        _value(self._library.stars_sequence_pages(self._handle, pages.buffer_info()[0] if count else None, count))
        return pages.tolist()

    @property
    def length(self) -> int:
        """Positions."""
        return _value(self._library.stars_sequence_length(self._handle))

    @property
    def shared(self) -> int:
        """Positions that were there when it was opened or forked."""
        return _value(self._library.stars_sequence_shared(self._handle))

    def extend(self, tokens: int) -> PageCopy | None:
        """Makes it `tokens` positions longer; what must be copied before any of them is written."""
        copies = self._library.stars_sequence_extend(self._handle, tokens, ctypes.byref(self._copy))
        if copies == -_EXHAUSTED:
            raise OutOfPages(*self._lacking(tokens), _ADVICE)
        return PageCopy(self._copy.source, self._copy.target, self._copy.rows) if _value(copies) else None

    def fork(self) -> PageTable:
        """A second table with the same positions, in the same pages."""
        return self._ledger._table(self._library.stars_sequence_fork(self._handle))

    def rewind(self, length: int) -> None:
        """Shortens it to `length` positions; pages beyond are given back."""
        _check(self._library.stars_sequence_rewind(self._handle, length))

    def publish(self, token_ids: Sequence[int]) -> None:
        """Offers the whole pages of `token_ids`, which its first positions hold, for sharing."""
        tokens = array("i", token_ids)
        _check(self._library.stars_sequence_publish(self._handle, tokens.buffer_info()[0], len(tokens)))

    def close(self, token_ids: Sequence[int] = ()) -> None:
        """Gives its pages back, after `publish(token_ids)`. A second call does nothing."""
        if self._handle:
            tokens = array("i", token_ids)
            _check(self._library.stars_sequence_close(self._handle, tokens.buffer_info()[0], len(tokens)))
            self._handle = None

    def __del__(self) -> None:
        if self._handle:
            self._library.stars_sequence_close(self._handle, None, 0)

    def _lacking(self, tokens: int) -> tuple[int, int]:
        """Pages that so many more positions need, and those that there are."""
        size, length, pages, counts = self._ledger.page_size, self.length, self.pages, self._ledger.counts()
        shared = bool(length % size) and self._ledger.page(pages[-1]).references > 1
        return -(-(length + tokens) // size) - len(pages) + shared, counts.free + counts.cached


def _check(status: int) -> None:
    if status in _REFUSALS:
        raise IntegrityError(last_error())
    check_status(status)


def _value(result: int) -> int:
    if result < 0:
        _check(-result)
    return result
