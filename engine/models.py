"""The language models of an engine: its own, and others by name. They read the same tokens, in the rows of one ledger.

Each has its own keys and values (a KVStore), passes and drafters. Who drafts, blends, judges or redraws says so by the
numbers of their stores; 0 is the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stars.arguments import shown
from stars.cache import OWN_STORE, BlockTable, CommitMove, PagedCache
from stars.config import EngineConfig
from stars.draft import Drafter
from stars.errors import ModelError, RequestError
from stars.model.decoder import Decoder
from stars.model.loader import load_model
from stars.model.tokenizer import Tokenizer
from stars.passes import Passes, Span
from stars.plan import OWN, Plan
from stars.request import Drafts, Hypothesis
from stars.sizes import language_model


class Member(NamedTuple):
    """One of the models, and what runs it."""

    decoder: Decoder
    store: int  # of the cache: where its keys and values are
    passes: Passes


class Models:
    """All models that an engine drafts with or reads by; each is loaded once, whatever names it has."""

    def __init__(self, config: EngineConfig, cache: PagedCache, own: Member, drafter: Drafter,
                 named: Mapping[str, Decoder]):
        self._config = config
        self._cache = cache
        self.members = [own]
        self._stores = {OWN: 0}
        self._drafters: dict[tuple[int, ...], Drafter] = {OWN_STORE: drafter}
        known = {id(own.decoder): 0}
        for name, decoder in named.items():
            if id(decoder) not in known:
                store = cache.add_store(decoder.config, decoder.dtype)
                known[id(decoder)] = store
                with decoder.lock:
                    self.members.append(Member(decoder, store, Passes(decoder, cache, config, language_model(config),
                                                                      store)))
            self._stores[name] = known[id(decoder)]

    @property
    def own(self) -> Member:
        """The engine's own model."""
        return self.members[0]

    def store_of(self, name: str) -> int:
        """The store of a named model; RequestError where there is none of that name."""
        if name in self._stores:
            return self._stores[name]
        given = ", ".join(repr(one) for one in self._stores if one != OWN) or "none"
        raise RequestError(f"there is no model named {shown(name)} (those given: {given}): build the engine with "
                           f"Engine(model, models={{{shown(name)}: DIR}})")

    def drafts_of(self, weights: Sequence[tuple[str, float]]) -> Drafts:
        """Named models with their weights as stores; those of one model are added up, and what is 0 is left out."""
        totals: dict[int, float] = {}
        for name, weight in weights:
            store = self.store_of(name)
            totals[store] = totals.get(store, 0.0) + weight
        kept = {store: weight for store, weight in totals.items() if weight} or totals
        stores = tuple(sorted(kept))
        return Drafts(stores, tuple(kept[store] for store in stores))

    def stores_of(self, plan: Plan) -> tuple[int, ...]:
        """The stores of all models that a plan's responses are read by, without doubles, rising."""
        drafting = self.drafts_of(plan.drafts_with).stores
        return tuple(sorted({*drafting, *(self.store_of(name) for name in plan.reads_with)}))

    def drafter(self, stores: tuple[int, ...]) -> Drafter:
        """What draws from the sum of these models' logits; made where it is first asked for."""
        if stores not in self._drafters:
            first, *others = (self.members[store] for store in stores)
            with first.decoder.lock:
                self._drafters[stores] = Drafter(first.decoder, self._cache, self._config, first.store,
                                                 [(other.decoder, other.store) for other in others])
        return self._drafters[stores]

    def prefill(self, jobs: Sequence[tuple[BlockTable, Sequence[int], int]], max_rows: int | None = None) -> int:
        """As `Passes.prefill`, in every store of each table; returns the rows that each model has run."""
        by_stores: dict[tuple[int, ...], list[tuple[BlockTable, Sequence[int], int]]] = {}
        for job in jobs:
            by_stores.setdefault(job[0].stores, []).append(job)
        rows = 0
        for stores, those in by_stores.items():
            left = None if max_rows is None else max(0, max_rows - rows)
            for store in stores[:-1]:
                self.members[store].passes.prefill(those, left, advance=False)
            rows += self.members[stores[-1]].passes.prefill(those, left)
            for table, _, stop in those:
                if table.length == stop:
                    table.behind.clear()
        return rows

    def catch_up(self, hypotheses: Sequence[Hypothesis], stores: tuple[int, ...]) -> None:
        """Each of `stores` holds all that was committed of the responses afterwards: what it lacks, as other models
        have drawn since, is run by one pass for all of them. In deterministic mode it is run as it is where a response
        that gave way is read again, a segment at a time in slabs, some of which must be free."""
        for store in stores:
            behind = [one for one in hypotheses if store in one.pages.behind]
            while behind and self._config.deterministic:
                pieces = [(one.pages, one.request.prompt.token_ids + one.token_ids, _next_end(one, store))
                          for one in behind[: max(1, self._cache.num_free_slabs)]]
                slabs = [self._cache.take_slab() for _ in pieces]
                self.redraft(store, pieces, slabs)
                for slab in slabs:
                    self._cache.return_slab(slab)
                behind = [one for one in behind if store in one.pages.behind]
            if behind:
                jobs = [(one.pages, one.request.prompt.token_ids + one.token_ids, one.pages.length) for one in behind]
                self.members[store].passes.prefill(jobs, advance=False)
                for table, _, stop in jobs:
                    self._cache.catch_up(table, store, stop)

    def redraft(self, store: int, pieces: Sequence[tuple[BlockTable, Sequence[int], int]],
                slabs: Sequence[int]) -> None:
        """For each (table, token_ids, stop): runs token_ids from where `store` is up to `stop`, which the table has, in
        a slab as a draft had, and copies it into the pages."""
        spans = [self._span(table, token_ids, table.held(store), stop, slab)
                 for (table, token_ids, stop), slab in zip(pieces, slabs, strict=True)]
        self.members[store].passes.redraft(spans)
        self._cache.bring_up([CommitMove(span.table, span.slots[0], len(span.slots), span.start, (store,))
                              for span in spans])

    def draft_again(self, table: BlockTable, token_ids: Sequence[int], stop: int, slab: int,
                    stores: tuple[int, ...]) -> None:
        """Runs token_ids from the table's length up to `stop` as a draft had, and commits it, in `stores`."""
        span = self._span(table, token_ids, table.length, stop, slab)
        for store in stores:
            self.members[store].passes.redraft([span])
        self._cache.commit([CommitMove(table, span.slots[0], len(span.slots), span.start, stores)])

    def _span(self, table: BlockTable, token_ids: Sequence[int], first: int, stop: int, slab: int) -> Span:
        start = slab * self._cache.slab_len
        return Span(table, token_ids[first:stop], first, range(start, start + stop - first))


def _next_end(hypothesis: Hypothesis, store: int) -> int:
    """Up to where a store that is behind is run at once in deterministic mode: what was committed together."""
    begin, held = len(hypothesis.request.prompt.token_ids) - 1, hypothesis.pages.held(store)
    return next(begin + end for end in hypothesis.ends if begin + end > held)


def load_named(models: Any, own: Any, own_decoder: Decoder, tokenizer: Tokenizer | None, config: EngineConfig
               ) -> dict[str, Decoder]:
    """The decoders of Engine(models=…) by name: one a directory, the engine's own where it is that.

    Raises ModelError or RequestError."""
    if models is None:
        return {}
    if not isinstance(models, Mapping):
        raise RequestError(f"models is {shown(models)}, it must be a dictionary of directories by name")
    loaded: dict[Path, Decoder] = {}
    if isinstance(own, (str, Path)):
        loaded[Path(own).resolve()] = own_decoder
    named: dict[str, Decoder] = {}
    for name, model in models.items():
        if not isinstance(name, str) or not name or name == OWN:
            raise RequestError(f"models has the name {shown(name)}, it must be a text other than {OWN!r}")
        if isinstance(model, (str, Path)):
            path = Path(model).resolve()
            if path not in loaded:
                loaded[path] = load_model(model, dtype=config.dtype, device=config.device, head="lm",
                                          deterministic=config.deterministic, max_rows=1,
                                          max_model_len=config.max_model_len)
            model = loaded[path]
        if model.config.vocab_size != own_decoder.config.vocab_size:
            raise ModelError(f"the model {name!r} has a vocabulary of {model.config.vocab_size} and the engine's own "
                             f"one of {own_decoder.config.vocab_size}: use models of one vocabulary")
        named[name] = model
    return named
