"""The KV cache: committed history in pages, drafted segments in slabs. One ledger, and keys and values of every model
that reads the same tokens."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stars.buffers import Buffers
from stars.config import EngineConfig
from stars.errors import IntegrityError, OutOfPages
from stars.kernels.graph import Graphs, Part
from stars.kernels.types import LayerKV
from stars.kv_store import KVStore
from stars.model.config import ModelConfig
from stars.page_pool import PagePool
from stars.sizes import ModelSizes

MAX_MOVES = 2048
"""Rows of one copy: 64 responses that commit 32 tokens each. More are copied in parts."""

CLOSED = -1
"""Length of a closed table."""

OWN_STORE = (0,)
"""The stores of a table that only the cache's first model reads."""


class BlockTable:
    """The pages of one hypothesis: key position p lies in pages[p // page_size], and `length` positions are valid.

    It has room for len(pages) * page_size positions. Whoever writes keys by itself (a prefill) sets `length` after it.
    `own` belongs to the cache: no other table refers to pages[own:], and no index entry names them. `stores` are the
    KVStores whose rows hold the positions; one that does not hold the last ones yet has its own length in `behind`.
    """

    __slots__ = ("pages", "length", "own", "stores", "behind")

    def __init__(self, pages: list[int], length: int, own: int, stores: tuple[int, ...] = OWN_STORE):
        self.pages = pages
        self.length = length
        self.own = own
        self.stores = stores
        self.behind: dict[int, int] = {}  # by store, positions that it holds; absent: all of them

    def held(self, store: int) -> int:
        """Positions that `store` holds."""
        return self.behind.get(store, self.length) if self.behind else self.length

    def __repr__(self) -> str:
        return f"BlockTable(pages={self.pages}, length={self.length})"


class CommitMove(NamedTuple):
    """`rows` slab rows from flat slab row `slab_start` become positions `at` .. `at + rows - 1` of `table`, in
    `stores`: the table's other stores stay behind."""

    table: BlockTable
    slab_start: int
    rows: int
    at: int
    stores: tuple[int, ...] = OWN_STORE


class Opening(NamedTuple):
    """Tables that all begin with `token_ids` and are reserved up to `lengths` positions, each."""

    token_ids: Sequence[int]
    lengths: Sequence[int]


class PagedCache:
    """Pages and slabs, allocated once: addresses never change and nothing is zero-filled.

    Keys and values lie in KVStores, one a model: `shape` is the first one's, `add_store` makes others. A position of a
    table is the same row in each of its stores, so that models which read the same tokens need one table. Pages are
    shared between tables of the same stores.

    Rows that were not written hold arbitrary bytes; `length`, prefix_len and slab_used bound every read. All decisions
    are taken on the host; tensors only receive rows. A table belongs to one holder, a page to any number of tables:
    full pages are shared between requests whose tokens begin alike, all pages between forks, and every writer gets a
    private page first. Pages are taken for a prompt as it is opened and for a segment before it is drawn.
    """

    def __init__(self, shape: ModelConfig, config: EngineConfig, sizes: ModelSizes, dtype: torch.dtype):
        page_size, num_slabs, slab_len = config.page_size, sizes.num_slabs, sizes.slab_len
        for name, value, least in (("page_size", page_size, 1), ("num_slabs", num_slabs, 0), ("slab_len", slab_len, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}: the cache needs at least {least}")
        num_pages = config.num_pages
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_slabs = num_slabs
        self.slab_len = slab_len
        self.target = config.target
        self.device = device = torch.device(config.target.device)
        self.stores: list[KVStore] = []
        self.add_store(shape, dtype)
        own = self.stores[0]
        self.k_pages, self.v_pages, self.k_slabs, self.v_slabs = own.k_pages, own.v_pages, own.k_slabs, own.v_slabs
        self.pool = PagePool(num_pages)  # after the tensors, which fail at once where there is no memory for them
        self._max_moves = max(1, min(num_slabs * slab_len, MAX_MOVES))
        moves = (torch.int32, (self._max_moves,))
        self._moves = Buffers(self.target, source=moves, target=moves)
        self._move_source, self._move_target = self._moves.host("source"), self._moves.host("target")
        self._graphs = Graphs()
        self._never_done = torch.zeros(1, dtype=torch.int32, device=device)
        self._tables: set[BlockTable] = set()
        self._free_slabs = list(range(num_slabs - 1, -1, -1))
        self._slab_holders = [0] * num_slabs
        self.prefix_queries = 0  # tokens that `open` has looked for in published pages, since the cache was made
        self.prefix_hits = 0  # those of them that it found there

    @property
    def num_free_pages(self) -> int:
        """Pages that can be reserved now, those kept only for sharing included."""
        return self.pool.num_available

    @property
    def num_tables(self) -> int:
        """Tables that are open."""
        return len(self._tables)

    @property
    def num_free_slabs(self) -> int:
        """Slabs that can be taken now."""
        return len(self._free_slabs)

    def layer(self, i: int) -> LayerKV:
        """Views of layer `i` of the first store, always the same ones."""
        return self.stores[0].layer(i)

    def add_store(self, shape: ModelConfig, dtype: torch.dtype) -> int:
        """Allocates keys and values of another model for the rows there are; returns the number of its store."""
        self.stores.append(KVStore(shape, self.num_pages * self.page_size, self.num_slabs * self.slab_len,
                                   self.page_size, dtype, self.device))
        return len(self.stores) - 1

    # -- tables ---------------------------------------------------------------------------------------------------

    def open(self, token_ids: Sequence[int], stores: tuple[int, ...] = OWN_STORE, most: int | None = None
             ) -> BlockTable:
        """Takes pages for `token_ids`; those full ones that hold a prefix of them already, in `stores`, are shared, of
        the first `most` tokens alone where that is given.

        The table's length is the number of positions shared: a multiple of page_size, at most len(token_ids).
        Raises OutOfPages, and then has changed nothing.
        """
        shared = self.pool.match(self._chunks(token_ids[:most], stores))
        fresh = self._pages_for(len(token_ids)) - len(shared)
        free = self.pool.num_available - self.pool.cost(shared)
        if fresh > free:
            raise OutOfPages(fresh, free)
        self.pool.share(shared)
        table = BlockTable(shared + self.pool.alloc(fresh), len(shared) * self.page_size, len(shared), stores)
        self._tables.add(table)
        self.prefix_queries += len(token_ids)
        self.prefix_hits += table.length
        return table

    def can_open(self, token_ids: Sequence[int], lengths: Sequence[int] = (), stores: tuple[int, ...] = OWN_STORE,
                 beside: Sequence[Opening] = (), most: int | None = None, spare: int = 0) -> bool:
        """Whether `open(token_ids, stores, most)` would succeed now and leave `spare` pages.

        With `lengths`: whether as many tables could be opened that all begin with `token_ids`, one after the other as
        each is published, and be reserved up to so many positions each; and those `beside` them after that. Those
        behind the first share what was published before, too.
        """
        openings = [Opening(token_ids, lengths or [len(token_ids)]), *beside]
        shared = [self.pool.match(self._chunks(opening.token_ids, stores)) for opening in openings]
        found = [len(pages) for pages in shared]
        if most is not None:
            found[0] = min(found[0], most // self.page_size)
            if len(openings[0].lengths) == 1:
                shared[0] = shared[0][: found[0]]
        fresh = self._fresh(openings, found)
        return fresh + spare <= self.pool.num_available - self.pool.cost(list(dict.fromkeys(chain(*shared))))

    def pages_written(self, length: int, tokens: int) -> int:
        """Pages that a table of `length` positions needs to itself for `tokens` more."""
        return self._pages_for(length + tokens) - length // self.page_size if tokens else 0

    def could_open(self, openings: Sequence[Opening]) -> bool:
        """Whether the empty cache holds the tables of all `openings`, each of which shares what it can."""
        return self._fresh(openings, [0] * len(openings)) <= self.num_pages

    def could_hold(self, prefix: int, lengths: Sequence[int]) -> bool:
        """Whether the empty cache holds tables of `lengths` positions whose first `prefix` are the same."""
        return self._pages_together(prefix, lengths) <= self.num_pages

    def shared_length(self, token_ids: Sequence[int], stores: tuple[int, ...] = OWN_STORE) -> int:
        """Leading positions of `token_ids` that `open` would find in published pages now."""
        return len(self.pool.match(self._chunks(token_ids, stores))) * self.page_size

    def withdraw(self, token_ids: Sequence[int], stores: tuple[int, ...] = OWN_STORE) -> bool:
        """No page that holds a prefix of `token_ids` is found any more, nor what continues it; whether there was one.
        """
        published = self.pool.match(self._chunks(token_ids, stores))
        if published:
            self.pool.unpublish(published[0])
        return bool(published)

    def publish(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """Offers the full pages of `token_ids`, whose keys `table` now holds from position 0, for sharing.

        The table's length becomes len(token_ids) where it was less.
        """
        self._check(table)
        self._check_range(table, 0, len(token_ids))
        table.length = max(table.length, len(token_ids))
        table.own = max(table.own, len(token_ids) // self.page_size)
        self.pool.publish(table.pages, self._chunks(token_ids, table.stores))

    def adopt(self, table: BlockTable, token_ids: Sequence[int]) -> bool:
        """Shares the published pages of `token_ids` that the table lacks, whose positions are all shared ones, in the
        place of its own; its length becomes what they hold. False, and nothing changed, where there are none, or where
        what the table has is of other tokens."""
        self._check(table)
        found = self.pool.match(self._chunks(token_ids, table.stores))
        first = table.length // self.page_size
        if len(found) <= first or found[:first] != table.pages[:first]:
            return False
        beyond = found[len(table.pages) :]
        self._exchange(table, first, found[: len(table.pages)])
        self.pool.share(beyond)
        table.pages += beyond
        table.length, table.own = len(found) * self.page_size, max(table.own, len(found))
        table.behind.clear()
        return True

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table with the same content. It shares every page; who writes first to the last one copies it."""
        self._check(table)
        pages = table.pages[: self._pages_for(table.length)]
        self.pool.share(pages)
        table.own = max(table.own, len(pages))
        forked = BlockTable(pages, table.length, len(pages), table.stores)
        forked.behind = dict(table.behind)
        self._tables.add(forked)
        return forked

    def reserve(self, table: BlockTable, tokens: int) -> None:
        """Makes room for `tokens` positions after the table's last, in pages that no other table refers to or will.

        Raises OutOfPages, and then has changed nothing.
        """
        self._check(table)
        if not tokens:
            return
        start, stop = table.length // self.page_size, self._pages_for(table.length + tokens)
        missing = max(0, stop - len(table.pages))
        written = range(start, min(stop, table.own))
        shared = [(table, i) for i in written if self.pool.references(table.pages[i]) > 1]
        if missing or shared:
            fresh = self.pool.alloc(len(shared) + missing)
            self._replace(shared, fresh)
            table.pages += fresh[len(shared) :]
        for i in written:  # of a rewound table: whoever found one now would share it before it is overwritten
            self.pool.unpublish(table.pages[i])

    def reset(self) -> None:
        """Closes every table and gives every slab and page back, whatever an interrupted call left half done.

        The content is forgotten too. May itself be interrupted and called again.
        """
        self.pool = PagePool(self.num_pages)
        for table in list(self._tables):
            table.pages, table.length = [], CLOSED
        self._tables.clear()
        self._slab_holders = [0] * self.num_slabs
        self._free_slabs = list(range(self.num_slabs - 1, -1, -1))

    def truncate(self, table: BlockTable, length: int) -> None:
        """Rewinds to `length` valid positions; the pages stay reserved."""
        self._check(table)
        if not 0 <= length <= table.length:
            raise IntegrityError(f"a table of {table.length} positions cannot be rewound to {length}: only shorten it")
        table.length = length
        if table.behind:
            table.behind = {store: held for store, held in table.behind.items() if held < length}

    def try_reserve(self, table: BlockTable, start: int, tokens: int) -> int:
        """As `reserve`, for `tokens` positions from `start` on, which is not behind the table's last, where there are
        pages for that; how many positions from there on a commit can write then without taking any."""
        with suppress(OutOfPages):
            self.reserve(table, max(0, start + tokens - table.length))
        pages = len(table.pages)
        shared = (i for i in range(start // self.page_size, min(table.own, pages))
                  if self.pool.references(table.pages[i]) > 1)
        return max(0, next(shared, pages) * self.page_size - start)

    def close(self, table: BlockTable, token_ids: Sequence[int] = ()) -> None:
        """Gives the table's pages back; published ones stay shareable until they are needed, those first that were
        given back longest ago.

        token_ids: what the table's positions hold, from the first on. Its full pages are published then, as far as
        token_ids go and every store holds them.
        """
        self._check(table)
        held = min([len(token_ids), *map(table.held, table.stores)])
        if held >= self.page_size:
            found = self.pool.publish(table.pages, self._chunks(token_ids[:held], table.stores))
            # Pages that another one has published before count as used now, lest a prefix go before what continues it.
            self._exchange(table, 0, found)
        self._tables.remove(table)
        self.pool.free(table.pages)
        table.pages, table.length = [], CLOSED

    def forget(self, token_ids: Sequence[int], kept: int, stores: tuple[int, ...] = OWN_STORE) -> None:
        """Frees the published pages of `token_ids` beyond the first `kept` that nobody shares and nothing continues."""
        found = self.pool.match(self._chunks(token_ids, stores))
        self.pool.forget(found[kept // self.page_size :])

    def warm_up(self) -> None:
        """Compiles what a GPU copies rows with: nothing is moved."""
        nothing = self._to_device(array("i", [-1]))
        for store in self.stores:
            store.commit_rows(nothing, nothing)

    # -- rows -----------------------------------------------------------------------------------------------------

    def rows(self, table: BlockTable, start: int, stop: int, shared: bool = False) -> array[int]:
        """Page rows of positions start .. stop - 1, for a caller about to write them.

        Shared pages among them are replaced by private copies first; raises OutOfPages, and then has changed nothing.
        shared: they stay as they are, where a store that is behind catches up: whoever shares them has the same tokens.
        """
        self._check(table)
        self._check_range(table, start, stop)
        if not shared:
            self._make_private([(table, start, stop)])
        return self._rows(table, start, stop)

    def commit(self, moves: Sequence[CommitMove]) -> None:
        """Makes slab rows history: one copy for all moves and layers of a store, then table.length = at + count.

        An `at` below the table's length rewinds to it first. Shared pages are replaced by private copies first; raises
        OutOfPages, and then has changed nothing. A store that is behind must not be among a move's.
        """
        lengths: dict[BlockTable, int] = {}
        for table, slab_start, count, at, stores in moves:
            self._check(table)
            self._check_range(table, at, at + count)
            length = lengths.get(table, table.length)
            if at > length:
                raise IntegrityError(f"a commit at {at} leaves a gap after {length} positions: commit at the end")
            if any([store not in table.stores or table.behind.get(store, at) < at for store in stores]):
                raise IntegrityError(f"a commit at {at} in stores {stores} of {table}, which lack what comes before: "
                                     "let them catch up first")
            lengths[table] = at + count
            inside = 0 <= slab_start < self.num_slabs * self.slab_len
            if not inside or slab_start % self.slab_len + count > self.slab_len:
                raise IntegrityError(f"slab rows {slab_start} to {slab_start + count} lie in no one slab: check the id")
        self._make_private([(move.table, move.at, move.at + move.rows) for move in moves])
        copies: dict[tuple[int, ...], tuple[array[int], array[int]]] = {}  # rows from and to, by stores
        for table, slab_start, count, at, stores in moves:
            source, target = copies.setdefault(stores, (array("i"), array("i")))
            source.extend(range(slab_start, slab_start + count))
            target.extend(self._rows(table, at, at + count))
            if len(stores) < len(table.stores):
                table.behind |= {store: min(at, table.held(store)) for store in table.stores if store not in stores}
            table.length = at + count
        for stores, (source, target) in copies.items():
            for start in range(0, len(source), self._max_moves):
                self._run_moves(source[start : start + self._max_moves], target[start : start + self._max_moves],
                                stores)

    def bring_up(self, moves: Sequence[CommitMove]) -> None:
        """As `commit`, of positions that the tables have and the moves' stores lack: these hold them afterwards. Shared
        pages stay shared."""
        for table, slab_start, count, at, stores in moves:
            self._check(table)
            for store in stores:
                if table.held(store) != at or at + count > table.length:
                    raise IntegrityError(f"store {store} of {table} holds {table.held(store)} positions and cannot be "
                                         f"brought up from {at} to {at + count}: write what it lacks, in order")
        for table, slab_start, count, at, stores in moves:
            source = array("i", range(slab_start, slab_start + count))
            self._run_moves(source, self._rows(table, at, at + count), stores)
            for store in stores:
                self.catch_up(table, store, at + count)

    def catch_up(self, table: BlockTable, store: int, held: int) -> None:
        """`store` holds the first `held` positions of `table` now: whoever wrote them says so."""
        self._check(table)
        if not table.held(store) <= held <= table.length:
            raise IntegrityError(f"store {store} of {table} holds {table.held(store)} positions, and {held} cannot be "
                                 "what it has caught up to: write what is missing")
        if held < table.length:
            table.behind[store] = held
        else:
            table.behind.pop(store, None)

    def block_tables(self, tables: Sequence[BlockTable]) -> Tensor:
        """Page ids of `tables`, int32 [tables, most pages], padded with 0."""
        width = self._width(tables)
        flat = array("i")
        for table in tables:
            flat.extend(table.pages)
            flat.extend([0] * (width - len(table.pages)))
        return self._to_device(flat).view(len(tables), width)

    def write_block_tables(self, tables: Sequence[BlockTable], out: Tensor, host: np.ndarray | None) -> None:
        """As `block_tables`, into the leading entries of the rows of `out`, int32 [rows, width].

        host: the array of the memory of `out`, None where that is a device's own. What lies after the most pages of a
        table is left as it is.
        """
        width = self._width(tables)
        into = out if host is None else host
        if into.dtype not in (torch.int32, np.int32) or into.shape[0] < len(tables) or into.shape[1] < width:
            raise IntegrityError(
                f"a block table buffer of {out.dtype} {tuple(out.shape)} cannot hold {len(tables)} tables of "
                f"{width} pages: allocate it for the largest batch"
            )
        if host is None:
            out[: len(tables), :width].copy_(self.block_tables(tables))
            return
        # By way of numpy: after a draft, views and copies of torch have left the caches and cost more than this.
        for row, table in enumerate(tables):
            count = len(table.pages)
            host[row, :count] = table.pages
            if count < width:
                host[row, count:width] = 0

    # -- slabs ----------------------------------------------------------------------------------------------------

    def take_slab(self, holders: int = 1) -> int:
        """A free slab's id; its first flat row is id * slab_len. It is free again once each of `holders` returned it.
        """
        if holders < 1:
            raise IntegrityError(f"a slab for {holders} holders could never be returned: take it for one at least")
        if not self._free_slabs:
            raise IntegrityError(f"all {self.num_slabs} slabs are taken: return them or build the cache with more")
        slab = self._free_slabs.pop()
        self._slab_holders[slab] = holders
        return slab

    def share_slab(self, slab: int, holders: int) -> None:
        """So many more hold slab `slab`, which is taken."""
        if not 0 <= slab < self.num_slabs or not self._slab_holders[slab] or holders < 0:
            raise IntegrityError(f"slab {slab} is not taken and cannot be shared by {holders} more: take it first")
        self._slab_holders[slab] += holders

    def return_slab(self, slab: int) -> None:
        """Gives one holding of slab `slab` back."""
        if not 0 <= slab < self.num_slabs or not self._slab_holders[slab]:
            raise IntegrityError(f"slab {slab} is not taken: return each slab once for each of its holders")
        self._slab_holders[slab] -= 1
        if not self._slab_holders[slab]:
            self._free_slabs.append(slab)

    # -- books ----------------------------------------------------------------------------------------------------

    def check_integrity(self, slabs_out: int | None = None) -> None:
        """Raises IntegrityError, with the numbers, unless every page and slab is accounted for.

        `slabs_out` is how many slabs the caller believes to hold, each as often as it holds it; None does not compare.
        """
        self.pool.check_integrity(Counter(page for table in self._tables for page in table.pages))
        for table in self._tables:
            if not 0 <= table.length <= len(table.pages) * self.page_size:
                raise IntegrityError(f"{table} does not satisfy length <= pages * {self.page_size}")
            for page in table.pages[table.own :]:
                if self.pool.references(page) != 1 or self.pool.is_published(page):
                    raise IntegrityError(f"page {page} of {table} is shared, and the table takes it for its own")
        taken = sum(map(bool, self._slab_holders))
        if taken + len(self._free_slabs) != self.num_slabs or len(set(self._free_slabs)) != len(self._free_slabs):
            counts = f"{len(self._free_slabs)} free + {taken} taken of {self.num_slabs}"
            raise IntegrityError(f"slabs were lost or doubled: {counts}")
        if any([self._slab_holders[slab] for slab in self._free_slabs]):
            raise IntegrityError("a slab is free and held: it was given to two")
        held = sum(self._slab_holders)
        if slabs_out is not None and slabs_out != held:
            raise IntegrityError(f"{held} slabs are taken and {slabs_out} are held: return a slab where its lane ends")

    # -- internals ------------------------------------------------------------------------------------------------

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def _width(self, tables: Sequence[BlockTable]) -> int:
        """Most pages of one of the tables, which must be open here."""
        width = 0
        for table in tables:
            self._check(table)
            width = max(width, len(table.pages))
        return width

    def _pages_together(self, prefix: int, lengths: Sequence[int]) -> int:
        """Pages of tables of `lengths` positions that share the full pages of their first `prefix`."""
        return sum(map(self._pages_for, lengths)) - (len(lengths) - 1) * (prefix // self.page_size)

    def _fresh(self, openings: Sequence[Opening], shared: Sequence[int]) -> int:
        """Pages that all `openings` take, one after the other as each is published, besides so many of each that are
        published."""
        fresh, before = 0, list[Sequence[int]]()
        for (token_ids, lengths), found in zip(openings, shared, strict=True):
            common = max([self._common(token_ids, other) for other in before], default=0)
            fresh += self._pages_together(len(token_ids), lengths) - max(found, common)
            before.append(token_ids)
        return fresh

    def _common(self, one: Sequence[int], other: Sequence[int]) -> int:
        """Full pages with which both begin."""
        least = min(len(one), len(other))
        return next((index for index in range(least) if one[index] != other[index]), least) // self.page_size

    def _chunks(self, token_ids: Sequence[int], stores: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The tokens of each full page; what other stores hold is marked by what is no token."""
        size, mark = self.page_size, () if stores == OWN_STORE else tuple(-1 - store for store in stores)
        return (tuple(token_ids[i : i + size]) + mark for i in range(0, len(token_ids) - size + 1, size))

    def _check(self, table: BlockTable) -> None:
        if table not in self._tables:
            state = "closed" if table.length == CLOSED else "of another cache"
            raise IntegrityError(f"{table} is {state}: use a table only between its open and its close")

    def _check_range(self, table: BlockTable, start: int, stop: int) -> None:
        room = len(table.pages) * self.page_size
        if not 0 <= start <= stop <= room:
            raise IntegrityError(f"positions {start} to {stop} exceed a table of {room}: reserve more")

    def _rows(self, table: BlockTable, start: int, stop: int) -> array[int]:
        rows = array("i")
        size = self.page_size
        while start < stop:
            page, offset = divmod(start, size)
            count = min(size - offset, stop - start)
            first = table.pages[page] * size + offset
            rows.extend(range(first, first + count))
            start += count
        return rows

    def _make_private(self, writes: Sequence[tuple[BlockTable, int, int]]) -> None:
        """Lets each table alone refer to its pages of positions start .. stop - 1, and no index entry name them."""
        writes = [write for write in writes if write[1] < min(write[2], write[0].own * self.page_size)]
        if not writes:
            return
        seen: set[tuple[BlockTable, int]] = set()
        taken: Counter[int] = Counter()
        replaced: list[tuple[BlockTable, int]] = []
        published: list[int] = []
        for table, start, stop in writes:
            for i in range(start // self.page_size, self._pages_for(stop) if stop > start else 0):
                if (table, i) in seen:
                    continue
                seen.add((table, i))
                page = table.pages[i]
                if self.pool.references(page) - taken[page] > 1:
                    # The last holder to write keeps the page, the others before it leave with a copy.
                    taken[page] += 1
                    replaced.append((table, i))
                elif self.pool.is_published(page):
                    published.append(page)
        fresh = self.pool.alloc(len(replaced))
        # A sole holder overwrites in place: the index must forget the old content, and no page is needed for it.
        for page in published:
            self.pool.unpublish(page)
        self._replace(replaced, fresh)
        for table, start, stop in writes:
            if self._pages_for(stop) >= table.own:
                table.own = min(table.own, start // self.page_size)

    def _exchange(self, table: BlockTable, first: int, pages: Sequence[int]) -> None:
        """Lets `table` refer to pages[first:] in the place of its own of those indices, which hold nothing more."""
        for i in range(first, len(pages)):
            if pages[i] != table.pages[i]:
                self.pool.share([pages[i]])
                self.pool.free([table.pages[i]])
                table.pages[i] = pages[i]

    def _replace(self, replaced: Sequence[tuple[BlockTable, int]], fresh: Sequence[int]) -> None:
        """Gives each (table, index of a page) a copy of that page in one of the `fresh` pages."""
        if not replaced:
            return
        self._copy_pages([(table.pages[i], page) for (table, i), page in zip(replaced, fresh)])
        for (table, i), page in zip(replaced, fresh):
            self.pool.free([table.pages[i]])
            table.pages[i] = page

    def _run_moves(self, source: array[int], target: array[int], stores: tuple[int, ...]) -> None:
        """Copies slab rows `source` to page rows `target` in every layer of `stores`, from buffers at fixed addresses.
        """
        rows = len(source)
        self._moves.wait()
        self._move_source[:rows], self._move_target[:rows] = source, target
        self._moves.upload()

        def step() -> None:
            for store in stores:
                self.stores[store].commit_rows(self._moves["source"][:rows], self._moves["target"][:rows])

        # On a GPU it is one launch a store, of any rows.
        self._graphs.run([Part((rows, stores), step)], self._never_done, rare=True)

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        size = self.page_size
        source, target = array("i"), array("i")
        for old, new in copies:
            source.extend(range(old * size, (old + 1) * size))
            target.extend(range(new * size, (new + 1) * size))
        from_rows, to_rows = self._to_device(source), self._to_device(target)
        for store in self.stores:
            store.copy_pages(from_rows, to_rows)

    def _to_device(self, values: array[int]) -> Tensor:
        """int32 tensor of an int array, without a copy on the CPU and without waiting for a GPU."""
        if not values:
            return torch.empty(0, dtype=torch.int32, device=self.device)
        tensor = torch.frombuffer(values, dtype=torch.int32)
        # A copy from memory that is not pinned would wait for everything the GPU still has to do.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.target.own_memory else tensor
