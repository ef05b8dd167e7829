"""The language models of an engine: its own, and others by name. They read the same tokens, in the rows of one ledger.

Each has its own keys and values (a KVStore), passes and drafters. Who drafts, blends, judges or redraws says so by the
numbers of their stores; 0 is the engine's own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stars.arguments import shown
from stars.cache import OWN_STORE, BlockTable, CommitMove, PagedCache
from stars.config import MAX_SIZE, EngineConfig
from stars.determinism import check_row_invariance
from stars.draft import Drafter
from stars.errors import ModelError, RequestError, StarsError, text_of
from stars.logprobs import PromptLogprobs
from stars.model.config import ModelConfig, load_config
from stars.model.decoder import Decoder
from stars.model.files import is_directory, is_file
from stars.model.loaded import LoadedModel, own_tokenizer, same
from stars.model.loader import check_rounding, followed, load_model
from stars.model.tokenizer import Tokenizer
from stars.passes import Passes, Span
from stars.plan import OWN, Plan
from stars.request import Drafts, Hypothesis
from stars.sizes import language_model
from stars.sources import checked_model

Named = dict[str, str | Path | LoadedModel | Decoder]


class Member(NamedTuple):
    """One of the models, and what runs it."""

    decoder: Decoder
    store: int  # of the cache: where its keys and values are
    passes: Passes


class Piece(NamedTuple):
    """Tokens that follow those which `stores` hold of a table, and the slab that they are run in."""

    table: BlockTable
    token_ids: Sequence[int]
    slab: int
    stores: tuple[int, ...]


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

    @property
    def named(self) -> list[str]:
        """Names of all but the engine's own."""
        return [name for name in self._stores if name != OWN]

    @property
    def own(self) -> Member:
        """The engine's own model."""
        return self.members[0]

    def store_of(self, name: str) -> int:
        """The store of a named model; RequestError where there is none of that name."""
        if name in self._stores:
            return self._stores[name]
        given = ", ".join(map(repr, [OWN, *self.named]))
        raise RequestError(f"there is no model named {shown(name)} (there are: {given}): build the engine with "
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

    def proposal_of(self, plan: Plan) -> Drafts:
        """What the attempts of a plan are drawn from."""
        return self.drafts_of(plan.drafts_with)._replace(keeps_logits=plan.drawn_after > 0)

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
                raise ModelError(f"there is no memory to draft from {self.names_of(stores)}: lower max_num_lanes or "
                                 "cache_tokens") from error
            self._drafters[stores, blends] = drafter
        return drafter

    def names_of(self, stores: Sequence[int]) -> str:
        """Models by a name of each."""
        names = {store: name for name, store in reversed(self._stores.items())}
        return " and ".join(repr(names[store]) for store in stores)

    def recompute(self, pieces: Sequence[Piece]) -> None:
        """Runs each piece in its slab, as it was drafted token by token, and writes it into its table's pages."""
        moves = self._recompute(pieces)
        self._cache.commit(moves)

    def _recompute(self, pieces: Sequence[Piece]) -> list[CommitMove]:
        """Runs pieces in their slabs; what is to be copied then."""
        slab_len = self._cache.slab_len
        spans = [Span(table, token_ids, table.held(stores[0]), range(slab * slab_len, slab * slab_len + len(token_ids)))
                 for table, token_ids, slab, stores in pieces]
        for member in self.members:
            own = [span for span, piece in zip(spans, pieces, strict=True) if member.store in piece.stores]
            if own:
                member.passes.recompute(own)
        return [CommitMove(span.table, span.slots[0], len(span.token_ids), span.start, piece.stores)
                for span, piece in zip(spans, pieces, strict=True)]

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

    def tell(self, job: tuple[BlockTable, Sequence[int], int], told: PromptLogprobs, max_rows: int | None = None
             ) -> int:
        """As `prefill`, of one table that the engine's own model has a store of: what that says of the tokens is put
        into `told`."""
        table, token_ids, stop = job
        rows = 0
        for store in table.stores:
            passes, last = self.members[store].passes, store == table.stores[-1]
            rows = (passes.tell(table, token_ids, stop, told, max_rows, last) if store == 0
                    else passes.prefill([job], max_rows, last))
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
                some = behind[: max(1, self._cache.num_free_slabs)]
                slabs = [self._cache.take_slab() for _ in some]
                self._cache.bring_up(self._recompute([
                    Piece(one.pages, _next_piece(one, store), slab, (store,))
                    for one, slab in zip(some, slabs, strict=True)]))
                for slab in slabs:
                    self._cache.return_slab(slab)
                behind = [one for one in behind if store in one.pages.behind]
            if behind:
                jobs = [(one.pages, one.request.prompt.token_ids + one.token_ids, one.pages.length) for one in behind]
                self.members[store].passes.prefill(jobs, advance=False)
                for table, _, stop in jobs:
                    self._cache.catch_up(table, store, stop)


def _next_piece(hypothesis: Hypothesis, store: int) -> list[int]:
    """What of a response a store that is behind is run on at once in deterministic mode: what was committed together.
    """
    prompt, held = hypothesis.request.prompt.token_ids, hypothesis.pages.held(store)
    begin = len(prompt) - 1
    stop = next(begin + end for end in hypothesis.ends if begin + end > held)
    return (prompt + hypothesis.token_ids)[held:stop]


def check_named(models: Any, shape: ModelConfig, tokenizer: Tokenizer | None, config: EngineConfig) -> Named:
    """Engine(models=…) by name, once it is known that each of them can stand beside the engine's own model, whose
    shape and tokenizer these are: no weight is read. Raises RequestError for names, ModelError for models.
    """
    if models is None:
        return {}
    if not isinstance(models, Mapping):
        raise RequestError(f"models is {shown(models)}, it must be a dictionary of model directories by name")
    named: Named = {}
    for name, model in models.items():
        _check_name("models", name)
        if name == OWN:
            raise RequestError(f"models has the name {OWN!r}, which is the engine's own model: choose another")
        if isinstance(model, str) and (model == OWN or model in models) and not is_directory(Path(model)):
            raise RequestError(f"models[{name!r}] is {model!r}, a name and no directory: give the directory")
        try:
            model = checked_model(model)
            _check_beside(model, shape, tokenizer, config)
        except StarsError as error:
            raise ModelError(f"models[{name!r}]: {text_of(error)}") from error
        named[name] = model
    return named


def check_heads(heads: Any) -> dict[str, Path]:
    """The files of Engine(heads=…) by name; RequestError for what is no dictionary of names and files."""
    if heads is None:
        return {}
    if not isinstance(heads, Mapping):
        raise RequestError(f"heads is {shown(heads)}, it must be a dictionary of safetensors files by name")
    for name, file in heads.items():
        _check_name("heads", name)
        if not isinstance(file, (str, Path)):
            raise RequestError(f"heads[{name!r}] is {shown(file)}, it must be the path of a safetensors file")
        if not is_file(Path(file)):
            kind = "a directory" if is_directory(Path(file)) else "not there"
            raise RequestError(f"heads[{name!r}] is {shown(str(file))}, which is {kind}: give the path of a "
                               "safetensors file")
    return {name: Path(file) for name, file in heads.items()}


def load_named(named: Named, own: Any, own_decoder: Decoder, config: EngineConfig) -> dict[str, Decoder]:
    """The decoders of `check_named`'s models: one a directory, the engine's own where it is that. Raises ModelError."""
    loaded: dict[Hashable, Decoder] = {same(own): own_decoder}
    decoders: dict[str, Decoder] = {}
    for name, model in named.items():
        try:
            if isinstance(model, Decoder):
                decoder = model
            else:
                if same(model) not in loaded:
                    loaded[same(model)] = load_model(model, dtype=config.dtype, device=config.device, head="lm",
                                              deterministic=config.deterministic, max_rows=1,
                                              max_model_len=config.max_model_len,
                                              quantization=followed(model, config.quantization))
                decoder = loaded[same(model)]
            decoder.check_device(config.device, "the Decoder")
            if config.deterministic and decoder is not own_decoder:
                check_row_invariance(decoder, config.target)
        except StarsError as error:
            raise ModelError(f"models[{name!r}]: {text_of(error)}") from error
        decoders[name] = decoder
    return decoders


def _check_name(argument: str, name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise RequestError(f"{argument} has the name {shown(name)}, it must be a text that can be printed")


def _check_beside(model: str | Path | LoadedModel | Decoder, shape: ModelConfig, tokenizer: Tokenizer | None,
                  config: EngineConfig) -> None:
    """Raises ModelError unless a model draws from the same tokens as the engine's own does, ends texts by the same and
    reads texts as long."""
    own_eos = _eos_ids(shape, tokenizer)
    their = None
    if isinstance(model, Decoder):
        theirs = model.config
        if model.head is None:
            raise ModelError("it is a Decoder without a language model head: load it with head='lm'")
    else:
        theirs, their = load_config(model).reaching(config.max_model_len), own_tokenizer(model)
        check_rounding(model, "lm", "auto", followed(model, config.quantization), config.device)
        unnamed = isinstance(model, LoadedModel) and their is None  # as little is known of it as of a Decoder
        if (their is None) != (tokenizer is None) and not unnamed:
            side = "it" if their is None else "the engine's own model"
            raise ModelError(f"{side} has no tokenizer.json, so the vocabularies of both cannot be compared: add the "
                             "tokenizer to both directories or to neither")
    if theirs.vocab_size != shape.vocab_size:
        raise ModelError(f"its vocabulary has {theirs.vocab_size} tokens and that of the engine's own model "
                         f"{shape.vocab_size}: use models of one vocabulary")
    if their is not None and tokenizer is not None:
        _check_tokens(their, tokenizer)
    strange = sorted(_eos_ids(theirs, their) - own_eos)
    if strange:
        raise ModelError(f"it ends texts with token {strange[0]}, which the engine's own model does not: use models of "
                         "the same special tokens, or add it to eos_token_id in the own model's generation_config.json")
    rows = config.least_cache_tokens + config.num_slabs * config.max_segment_size
    if rows * theirs.num_kv_heads > MAX_SIZE:
        raise ModelError(f"its cache would have {rows} rows of {theirs.num_kv_heads} heads, which are numbered in "
                         "int32: lower cache_tokens, max_num_lanes or max_segment_size")
    if theirs.context_length < config.max_model_len:
        raise ModelError(f"its context is {theirs.context_length} tokens and max_model_len {config.max_model_len}: "
                         f"build the engine with max_model_len={theirs.context_length}")


def _check_tokens(their: Tokenizer, own: Tokenizer) -> None:
    """Raises ModelError unless the tokens of a model mean what they mean to the engine's own model."""
    if not own.same_vocabulary(their):
        raise ModelError("its tokenizer has another vocabulary than that of the engine's own model, though as many "
                         "tokens: use models of one tokenizer")
    pad = their.pad_token
    strange = next((token for token in their.special_tokens if token not in own.special_tokens and token != pad), None)
    if strange is not None:
        raise ModelError(f"its tokenizer has the special token {shown(strange)}, which that of the engine's own model "
                         "has not: use models of the same special tokens")


def _eos_ids(shape: ModelConfig, tokenizer: Tokenizer | None) -> set[int]:
    """Every token that ends a text of a model."""
    eos = None if tokenizer is None else getattr(tokenizer, "eos_token_id", None)
    return {*shape.eos_token_ids, *(() if eos is None else (eos,))}
