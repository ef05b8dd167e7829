"""The ledger of the KV cache's pages: who refers to which page, and which token prefix a page holds. No tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from stars.errors import IntegrityError, OutOfPages

ROOT = -1
"""Parent of the first page of every prefix."""


class PagePool:
    """Reference counts of `num_pages` pages and an index from token prefixes to the pages that hold them.

    A page is free (nobody refers to it, its content is worthless), in use (one reference per holder), or cached:
    nobody refers to it, but it is published, and a later request with the same prefix can share it. Cached pages count
    as available: `alloc` reuses the least recently released one when no page is free.

    The index maps (parent page, the page's tokens) to a page, so a hit compares every token and is exact. Its size is
    bounded by the number of pages: a page has one entry or none.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        # Low page numbers are handed out first and reused first: memory that was never written stays untouched.
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._index: dict[tuple[int, tuple[int, ...]], int] = {}
        self._keys: list[tuple[int, tuple[int, ...]] | None] = [None] * num_pages
        # By page, those published below it, in the order in which they came: `unpublish` frees them by it.
        self._children: list[dict[int, None]] = [{} for _ in range(num_pages)]

    @property
    def num_available(self) -> int:
        """Pages that `alloc` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages without a reference that are still shareable."""
        return len(self._cached)

    @property
    def num_published(self) -> int:
        """Entries of the prefix index."""
        return len(self._index)

    def references(self, page: int) -> int:
        """Number of holders of `page`."""
        return self._references[page]

    def is_published(self, page: int) -> bool:
        """Whether `page` can be found by its prefix."""
        return self._keys[page] is not None

    def alloc(self, count: int) -> list[int]:
        """Hands out `count` private pages with one reference each; raises OutOfPages and then has changed nothing."""
        if count > self.num_available:
            raise OutOfPages(count, self.num_available)
        pages = []
        for _ in range(count):
            if not self._free:
                self.unpublish(next(iter(self._cached)))
            page = self._free.pop()
            self._references[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds one reference to each of `pages`, which are in use or cached."""
        for page in pages:
            if self._references[page] == 0:
                if page not in self._cached:
                    raise IntegrityError(f"page {page} is free and cannot be shared: share pages that match() found")
                del self._cached[page]
            self._references[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Drops one reference to each of `pages`, given in prefix order; published pages stay shareable."""
        # The last page is released first, hence reused first: a prefix shrinks from its end and never loses its root.
        for page in reversed(pages):
            if self._references[page] == 0:
                raise IntegrityError(f"page {page} was released more often than it was taken: release each page once")
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def match(self, chunks: Iterable[tuple[int, ...]]) -> list[int]:
        """Pages that hold the longest published prefix of `chunks`, the tokens of one page each."""
        pages: list[int] = []
        parent = ROOT
        for tokens in chunks:
            page = self._index.get((parent, tokens))
            if page is None:
                break
            pages.append(page)
            parent = page
        return pages

    def cost(self, shared: Sequence[int]) -> int:
        """Available pages that `share(shared)` would take out of reach of `alloc`."""
        return sum(1 for page in shared if self._references[page] == 0)

    def publish(self, pages: Sequence[int], chunks: Iterable[tuple[int, ...]]) -> list[int]:
        """Offers `pages`, all in use and holding `chunks` from position 0, for sharing.

        Where another page is published for the same prefix already, that one stays and continues the prefix. Returns
        the pages by which `chunks` are found now.
        """
        found: list[int] = []
        parent = ROOT
        for page, tokens in zip(pages, chunks):
            key = (parent, tokens)
            known = self._index.get(key)
            if known is None:
                if self._references[page] == 0 or self._keys[page] is not None:
                    raise IntegrityError(
                        f"page {page} is free or published for other tokens: publish the tokens the table holds"
                    )
                self._index[key] = page
                self._keys[page] = key
                if parent != ROOT:
                    self._children[parent][page] = None
                known = page
            found.append(known)
            parent = known
        return found

    def forget(self, pages: Sequence[int]) -> None:
        """Gives up `pages`, a chain that `match` found, from its end on: as far as nobody refers to them and no prefix
        goes on from them, they are free."""
        for page in pages[::-1]:
            if self._references[page] or self._children[page]:
                return
            self.unpublish(page)

    def unpublish(self, page: int) -> None:
        """Removes `page` and every page reached through it from the index; cached ones among them become free.

        The number of a reused page may stand for another prefix later: entries below it would be wrong hits then.
        """
        stack = [page]
        while stack:
            page = stack.pop()
            key = self._keys[page]
            if key is None:
                continue
            stack.extend(self._children[page])
            self._children[page].clear()
            if key[0] != ROOT:
                self._children[key[0]].pop(page, None)
            del self._index[key]
            self._keys[page] = None
            if self._references[page] == 0:
                del self._cached[page]
                self._free.append(page)

    def check_integrity(self, expected: Counter[int] | None = None) -> None:
        """Raises IntegrityError unless the books balance; `expected` counts the references that holders really have."""
        used = sum(1 for count in self._references if count > 0)
        counts = f"{len(self._free)} free + {len(self._cached)} cached + {used} in use of {self.num_pages} pages"
        if len(self._free) + len(self._cached) + used != self.num_pages:
            raise IntegrityError(f"pages were lost or doubled: {counts}")
        idle = set(self._free) | self._cached.keys()
        if len(idle) != len(self._free) + len(self._cached) or any(self._references[page] for page in idle):
            raise IntegrityError(f"a page is free twice or free and in use: {counts}")
        if expected is not None:
            for page, count in enumerate(self._references):
                if count != expected[page]:
                    raise IntegrityError(f"page {page} has {count} references and {expected[page]} holders: {counts}")
        published = sum(1 for key in self._keys if key is not None)
        if published != len(self._index):
            raise IntegrityError(f"the prefix index has {len(self._index)} entries for {published} published pages")
        for key, page in self._index.items():
            parent = key[0]
            reachable = parent == ROOT or (self._keys[parent] is not None and page in self._children[parent])
            if self._keys[page] != key or not reachable:
                raise IntegrityError(f"the prefix index holds page {page} under {parent}, which does not lead to it")
        linked = sum(len(children) for children in self._children)
        below = sum(1 for key in self._index if key[0] != ROOT)
        if linked != below:
            raise IntegrityError(f"the prefix index links {linked} pages to parents and holds {below} with a parent")
        for page in self._cached:
            if self._keys[page] is None:
                raise IntegrityError(f"page {page} is kept for sharing but cannot be found: {counts}")
