"""The language models of an engine: its own, and others by name. They read the same tokens, in the rows of one ledger.

Each has its own keys and values (a KVStore), passes and drafters. Who drafts, blends, judges or redraws says so by the
numbers of their stores; 0 is the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stars.arguments import shown
from stars.cache import OWN_STORE, BlockTable, PagedCache
from stars.config import EngineConfig
from stars.draft import Drafter
from stars.errors import ModelError, RequestError
from stars.model.decoder import Decoder
from stars.model.loader import load_model
from stars.model.tokenizer import Tokenizer
from stars.passes import Passes
from stars.plan import OWN, Plan
from stars.request import Drafts
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
        self._drafters: dict[tuple[tuple[int, ...], bool], Drafter] = {(OWN_STORE, False): drafter}
        known = {id(own.decoder): 0}
        for name, decoder in named.items():
            if id(decoder) not in known:
                store = cache.add_store(decoder.config, decoder.dtype)
                known[id(decoder)] = store
                with decoder.lock:
                    self.members.append(Member(decoder, store, Passes(decoder, cache, config, language_model(config),
                                                                      store)))
            self._stores[name] = known[id(decoder)]

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

    def drafter(self, stores: tuple[int, ...], blends: bool = False) -> Drafter:
        """What draws from one model, or, where it `blends`, from the weighted sum of these models' logits, by each
        lane's weights; made where it is first asked for, by whoever has the turn and with it the models' locks."""
        drafter = self._drafters.get((stores, blends))
        if drafter is None:
            first, *others = (self.members[store] for store in stores)
            beside = [(other.decoder, other.store) for other in others] if blends else None
            try:
                with torch.inference_mode(False):  # a caller's own: what is allocated is written outside of it, too
                    drafter = Drafter(first.decoder, self._cache, self._config, first.store, beside)
            except torch.OutOfMemoryError as error:
                raise ModelError(f"there is no memory to draft from {self._named(stores)}: lower max_num_lanes or "
                                 "cache_tokens") from error
            self._drafters[stores, blends] = drafter
        return drafter

    def _named(self, stores: Sequence[int]) -> str:
        """Models by a name of each."""
        names = {store: name for name, store in reversed(self._stores.items())}
        return " and ".join(repr(names[store]) for store in stores)

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
        return rows


def load_named(models: Any, own: Any, own_decoder: Decoder, tokenizer: Tokenizer | None, config: EngineConfig
               ) -> dict[str, Decoder]:
    """The decoders of Engine(models=…) by name: one a directory, the engine's own where it is that. Raises ModelError or
    RequestError."""
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
