"""Which tiles bring a fused step near the read bandwidth, and at how many rows is it ahead of the unfused one?

Tiles are chosen inside a pass of a whole 8B decoder (`chain.Pass`): what is fastest alone need not be in company. One
product after the other, each candidate in turns with the best so far, at 1 and at 16 rows; at others the same tiles, or
a few with other blocks of rows. Then what gains by dependent launches and by prefetching. Each pass is held against
torch in float32: no more than twice the error of the unfused pass, no NaN from poisoned buffers, the same bits again.

The outcome is the part of the tuned table (`tables.whole`) that says so; the stages after this one run by it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from typing import NamedTuple
from unittest.mock import patch

import torch
from chain import ENDS, PRODUCTS, Pass, Replay, Shape, Store, alternating, error, interpret, make_room, table_of
from chain import weights_of as products_of
from models import config_of, random_decoder, scoring_over, stored_bytes
from record import OutOfTime, Record, Settings, device_lost, seconds_left
from rehearse import compile_first
from tables import PREFIX, part
from torch import Tensor

from stars.kernels.linear import Weight, pack
from stars.kernels.quant import QuantWeight
from stars.kernels.triton import tuned
from stars.kernels.triton.tuned import Tile
from stars.model.decoder import Decoder
from stars.target import CUDA

Tiles = dict[str, Tile]

SWAPPED = Tile(16, 64, 128, 4, 4, swap=True)
COMMON = (Tile(16, 64, 256, 4, 3), Tile(16, 64, 128, 4, 4), Tile(16, 32, 256, 4, 4), Tile(16, 32, 512, 4, 3), SWAPPED)
FLOAT_16 = {
    "gate_up": (*COMMON, Tile(16, 64, 256, 4, 4), Tile(16, 128, 128, 4, 3), Tile(16, 128, 64, 4, 6, swap=True),
                Tile(16, 64, 128, 4, 5, swap=True)),
    "down": (*COMMON, Tile(16, 32, 512, 4, 3, 2), Tile(16, 64, 256, 4, 3, 2), Tile(16, 64, 256, 4, 3, 4),
             SWAPPED._replace(splits=4), SWAPPED._replace(splits=2)),
    "qkv": (*COMMON, Tile(16, 64, 256, 4, 3, 2), Tile(16, 64, 128, 4, 4, 4), SWAPPED._replace(splits=4),
            Tile(16, 128, 128, 4, 3, 4), Tile(16, 128, 128, 4, 3, 2), Tile(16, 128, 64, 4, 6, 4, swap=True)),
    "o": (*COMMON, Tile(16, 32, 256, 4, 3, 2), Tile(16, 64, 256, 4, 3, 4), Tile(16, 64, 128, 4, 4, 4),
          Tile(16, 32, 512, 4, 2, 2), SWAPPED._replace(splits=4), SWAPPED._replace(splits=8)),
    "head": (Tile(16, 64, 256, 4, 3), Tile(16, 64, 256, 4, 4), Tile(16, 128, 128, 4, 3), SWAPPED,
             Tile(16, 128, 128, 4, 4, swap=True)),
}
"""Of 16-bit weights, one block of rows. They fit 227 KiB of shared memory; those that a chain of products without
attention liked best on an H100 are among them (benchmarks/NOTES.md)."""

FLOAT_64 = {name: (Tile(64, 128, 64, 4, 4, splits, True), Tile(64, 64, 128, 4, 4, splits, True),
                   Tile(32, 128, 64, 4, 4, splits, True), Tile(64, 64, 64, 4, 5, splits))
            for name, splits in (("gate_up", 1), ("down", 4), ("qkv", 2), ("o", 4), ("head", 1))}
FLOAT_128 = {name: (Tile(128, 128, 64, 8, 4, splits, True), Tile(128, 64, 64, 8, 4, splits, True),
                    Tile(64, 128, 64, 4, 4, splits, True), Tile(128, 64, 64, 8, 5, splits))
             for name, splits in (("gate_up", 1), ("down", 4), ("qkv", 2), ("o", 4), ("head", 1))}
MORE = {
    "gate_up": (SWAPPED._replace(stages=3), SWAPPED._replace(splits=2), Tile(16, 128, 128, 4, 3, swap=True),
                Tile(16, 64, 256, 4, 3, swap=True)),
    "down": (SWAPPED._replace(splits=8), Tile(16, 64, 256, 4, 3, 4, True), Tile(16, 64, 128, 4, 5, 4, True)),
    "qkv": (SWAPPED._replace(splits=2), SWAPPED._replace(splits=8), Tile(16, 64, 128, 4, 5, 4, True),
            Tile(16, 64, 256, 4, 3, 4)),
    "o": (Tile(16, 64, 128, 4, 5, 4, True), Tile(16, 64, 256, 4, 2, 4, True)),
}
"""Beside those, of one row: what an H200's bandwidth may want, more bytes under way or programs that end together. They
are tried from what the other tiles led to, and so is what begins early and prefetches, in all products at once."""

PREFETCH = (512, 2048)
EIGHT = Tile(16, 64, 128, 2, 4, swap=True)
BITS_8 = {name: tuple(tile._replace(splits=splits) for splits in some for tile in (
    EIGHT, EIGHT._replace(stages=6), EIGHT._replace(inner=256, stages=3)))
    for name, some in (("gate_up", (1, 2)), ("down", (4, 8)), ("qkv", (4, 8)), ("o", (4, 8)), ("head", (1,)))}
"""Of weights of 8 bits; why two warps, `tuned.default` says."""

LARGE_8 = {name: tuple(tile._replace(splits=splits) for tile in (
    Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 8, 4), Tile(64, 128, 128, 8, 3), Tile(64, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4)))
    for name, splits in (("gate_up", 1), ("down", 4), ("qkv", 2), ("o", 4))}
"""The same at 128 rows: fewer rounds of a loop whose parts wait for each other, or more programs beside each other."""

TOY = {"down": (Tile(16, 64, 32, 4, 2, splits=2, swap=True),), "qkv": (Tile(16, 32, 64, 4, 2),)}

LENGTH = 32  # rows of a candidate that is scored
GAIN = 0.999  # a candidate has to be as much faster: pairs of replays differ by a thousandth


class Chosen(NamedTuple):
    """Tiles, and what they gave."""

    tiles: Tiles
    seconds: float
    unfused: float
    right: bool

    @property
    def fused(self) -> bool:
        """Whether passes are to be fused here."""
        return self.right and self.seconds < self.unfused


class Kind(NamedTuple):
    """What a part measures."""

    name: str
    shape: Shape
    scores: bool
    candidates: dict[str, tuple[Tile, ...]]
    again: bool = False  # from the tiles that were chosen for these rows before


def kinds(dry: bool, scheme: str = "") -> list[Kind]:
    """The most telling first; few for a quantised scheme."""
    if scheme:
        return [Kind("1 row", Shape(1, 1), False, BITS_8), Kind("16 rows", Shape(16, 1), False, {}),
                Kind("scores of 128 rows", Shape(4, LENGTH), True, LARGE_8)]
    if dry:
        return [Kind("1 row", Shape(1, 1), False, TOY), Kind("scores of 4 rows", Shape(2, 2), True, {})]
    return [Kind("1 row", Shape(1, 1), False, FLOAT_16), Kind("16 rows", Shape(16, 1), False, FLOAT_16),
            Kind("scores of 128 rows", Shape(4, LENGTH), True, FLOAT_128), Kind("4 rows", Shape(4, 1), False, {}),
            Kind("64 rows", Shape(64, 1), False, FLOAT_64), Kind("scores of 32 rows", Shape(1, LENGTH), True, {}),
            Kind("128 rows", Shape(128, 1), False, {}), Kind("scores of 64 rows", Shape(2, LENGTH), True, {}),
            Kind("1 row, more tiles", Shape(1, 1), False, MORE, again=True)]


def run(record: Record, settings: Settings) -> None:
    """One part for each number of rows; the table grows with each."""
    if settings.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        interpret()
    compile_first(record, settings, [lambda silent: rehearse(settings)])
    decoder, scorer = pair(settings)
    tuner = Tuner(record, settings, decoder, scorer)
    for kind in kinds(settings.dry):
        record.part(kind.name, tuner.measure, kind, least=2)


def pair(settings: Settings, layers: int | None = None, scheme: str = "") -> tuple[Decoder, Decoder]:
    """A language model of an 8B shape, and a reward model over the same layers. scheme: as of `random_decoder`."""
    dtype = torch.float32 if settings.dry else torch.bfloat16
    shape = "tiny" if settings.dry else "Llama-3.1-8B"
    # A dry run's passes are fused, too, and its weights as a GPU's.
    with patch("stars.model.decoder.target_of", lambda device: CUDA), patch("models.pack", plainly):
        decoder = random_decoder(config_of(shape, layers=layers), settings.device, dtype,
                                 seed=None, scheme=scheme)
        return decoder, scoring_over(decoder)


def plainly(matrix: Tensor | QuantWeight, **options) -> Weight:
    """A Weight as a GPU has it."""
    return pack(matrix) if isinstance(matrix, QuantWeight) else Weight(matrix, None, *matrix.shape)


def rehearse(settings: Settings, scheme: str = "") -> None:
    """Launches all that is tried, over one layer; in a rehearsal, where nothing but compiling comes of it."""
    decoder, scorer = pair(settings, 1, scheme)
    for kind in kinds(settings.dry, scheme):
        of = scorer if kind.scores else decoder
        make_room(of)
        one = Pass(of, Store(of, settings, kind.shape.rows, 64), kind.shape)
        Replay(one, table_of(of, None), settings.dry)
        start = defaults(of, kind.shape.rows)
        tried = [start, *({**start, name: tile} for name, some in kind.candidates.items() for tile in some
                          if name in start)]
        for tiles in tried:
            Replay(one, table_of(of, tiles), settings.dry)
            if kind.shape.rows in (1, 16) and not scheme:
                Replay(one, table_of(of, dependent(tiles)), settings.dry)


def defaults(decoder: Decoder, rows: int) -> Tiles:
    """What is in force without a measurement of this run: the card's table, or `tuned.default`."""
    return {name: tuned.tile(ENDS[name], weight.scheme, rows, weight.out_features, weight.in_features)
            for name, weight in products_of(decoder).items()}


def dependent(tiles: Tiles, prefetch: int = 0) -> Tiles:
    """The same, each started while the one before it still runs."""
    return {name: tile._replace(pdl=True, prefetch=prefetch) for name, tile in tiles.items()}


class Tuner:
    """Chooses tiles for the passes of one decoder, and of the scores over its layers."""

    def __init__(self, record: Record, settings: Settings, decoder: Decoder, scorer: Decoder | None, label: str = "8B"):
        self.record, self.settings, self.label = record, settings, label
        self.decoders = {False: decoder, True: scorer}
        self.scheme = decoder.layers[0].qkv.scheme
        self.quantised = decoder.layers[0].qkv.quant is not None
        self.known: dict[int, Tiles] = {}  # chosen, by rows
        self.stores: dict[bool, Store] = {}
        self.context = 32 if settings.dry else 1024
        own = record.content["facts"].get(f"{PREFIX}{self.scheme}", {})
        self.tiles: list[dict] = list(own.get("tiles", []))
        self.chains: list[dict] = list(own.get("chains", []))
        for entry in self.tiles:  # of a process before this one
            for name, weight in products_of(decoder).items():
                if (ENDS[name], weight.out_features, weight.in_features) == (
                        entry["end"], entry["out_features"], entry["in_features"]):
                    self.known.setdefault(entry["rows"], {})[name] = Tile(**entry["tile"])
        self.reserve = 0.0  # seconds that are left to the parts after this one

    def one(self, shape: Shape, scores: bool) -> Pass:
        """A pass over a common context."""
        decoder = self.decoders[scores]
        if scores not in self.stores:
            make_room(decoder)
            self.stores[scores] = Store(decoder, self.settings, 4 if self.settings.dry else 128, self.context)
        return Pass(decoder, self.stores[scores], shape)

    def measure(self, kind: Kind) -> None:
        """The tiles of one number of rows, and the rows of the table that come of them."""
        record, settings, decoder, rows = self.record, self.settings, self.decoders[kind.scores], kind.shape.rows
        self.reserve = seconds_left() * {"1 row": 0.55, "16 rows": 0.4}.get(kind.name, 0.1)
        one = self.one(kind.shape, kind.scores)
        right = one.reference()
        rivals = {"library": table_of(decoder, None), "unfused": table_of(decoder, None, tuned._table())}
        if self.quantised:  # there is no library, and they are always fused
            rivals = {"default tiles": table_of(decoder, None)}
        others = [Replay(one, table, settings.dry) for table in rivals.values()]
        theirs = error(others[-1].outcome(), right)
        errors = settings.facts.get("chain errors", {}) | record.content["facts"].get("chain errors", {})
        if not self.quantised:
            errors[kind.name] = theirs
            record.fact("chain errors", errors)
        self.bound = 2 * errors.get(kind.name, 0.01) + 1e-5
        self.wrong: list[str] = []
        tiles, replay = self._first(one, self._starts(kind), right)
        if replay is None:
            raise RuntimeError(f"no fused pass of {rows} rows ran: {'; '.join(self.wrong[-2:])}")
        # Scores and drafts share their layers, and what the table says of them.
        known = {} if kind.again else self.known.get(rows, {})
        try:
            for name in PRODUCTS:
                tiles, replay = self._descend(one, tiles, replay, right, (
                    {**tiles, name: tile} for tile in kind.candidates.get(name, ())
                    if name in tiles and name not in known))
            if rows in (1, 16) and not settings.dry and not kind.scores and not self.quantised:
                tiles, replay = self._dependents(one, tiles, replay, right)
        except OutOfTime as problem:
            self.record.note(f"{kind.name}: {problem}")
        final = dict(zip((*rivals, "fused"), alternating([*others, replay], 7, settings.dry), strict=True))
        seconds = {name: statistics.median(times) for name, times in final.items()}
        got = replay.outcome()
        wrong, steady = error(got, right), bool(torch.equal(got, replay.outcome()))
        good = wrong <= self.bound and steady
        name = f"{self.label}, {self.scheme}: chain, {kind.name}"
        record.check(f"{name}, fused beside float32", good, error=wrong, bound=self.bound, same_bits=steady)
        record.check(f"{name}, no tile was wrong", not self.wrong, wrong=self.wrong[:6])
        self._note(kind, Chosen(tiles, seconds["fused"], seconds[[*rivals][-1]], good), final, wrong)

    def _note(self, kind: Kind, chosen: Chosen, final: dict[str, list[float]], wrong: float) -> None:
        record, rows, decoder = self.record, kind.shape.rows, self.decoders[kind.scores]
        of, bandwidth = products_of(decoder), self.settings.bandwidth
        size = sum(stored_bytes(weight) for name, weight in of.items() if name != "head") * len(decoder.layers)
        size += stored_bytes(of["head"]) if "head" in of else 0
        limit = None if bandwidth is None else 1e3 * size / bandwidth
        name = f"{self.label}, {self.scheme}: chain, {kind.name}"
        aims = {"1 row": "chain", "1 row, more tiles": "chain", "16 rows": "chain-16"} if self.scheme == "bf16" else {}
        if kind.again and chosen.right:
            self.tiles = [entry for entry in self.tiles if entry["rows"] != rows]
            self.known.pop(rows, None)
        for what, times in final.items():
            detail = {} if what != "fused" else {
                "tiles": {product: tuple(tile) for product, tile in chosen.tiles.items()}}
            record.figure(f"{name}, {what}", 1e3 * statistics.median(times), "ms", limit,
                          "its weights at read bandwidth", aims.get(kind.name, "") if what == "fused" else "",
                          bytes=size, spread=[1e3 * min(times), 1e3 * max(times)], **detail)
        self.tiles += [] if not chosen.right else [{
            "end": ENDS[product], "scheme": self.scheme, "rows": rows,
            "out_features": of[product].out_features, "in_features": of[product].in_features, "tile": tile._asdict()}
            for product, tile in chosen.tiles.items() if product not in self.known.get(rows, {})]
        self.known[rows] = chosen.tiles | self.known.get(rows, {})
        shape = decoder._fusing.shape._asdict()
        self.chains = [entry for entry in self.chains if (entry["model"], entry["rows"]) != (shape, rows)]
        self.chains += [] if self.quantised else [{
            "model": shape, "scheme": self.scheme, "rows": rows, "fused": chosen.fused,
            "right": chosen.right, "error": wrong, "us": {what: round(1e6 * statistics.median(times), 1)
                                                                   for what, times in final.items()}}]
        gpu = "none" if self.settings.dry else torch.cuda.get_device_name()
        record.fact(f"{PREFIX}{self.scheme}", part(tuned.VERSION, gpu, f"{tuned.slug(gpu)}.json", tiles=self.tiles,
                                                   chains=self.chains))

    def _starts(self, kind: Kind) -> list[Tiles]:
        """What may be good at so many rows without a search: all of it is tried."""
        rows = kind.shape.rows
        usual = defaults(self.decoders[kind.scores], rows)
        if rows in self.known:
            return [{name: self.known[rows].get(name, tile) for name, tile in usual.items()}]
        near = [tiles for other, tiles in self.known.items() if (other <= 16) == (rows <= 16) and (
            rows <= 16 or other <= 2 * rows)]
        return [usual, *({name: tiles.get(name, tile) for name, tile in usual.items()} for tiles in near)]

    def _first(self, one: Pass, starts: list[Tiles], right: Tensor) -> tuple[Tiles, Replay | None]:
        """The best of some to begin with."""
        tiles, replay = starts[0], None
        for other in starts:
            tiles, replay = self._descend(one, tiles if replay else other, replay, right, [other])
        return tiles, replay

    def _descend(self, one: Pass, tiles: Tiles, replay: Replay | None, right: Tensor, tried: Iterable[Tiles],
                 ) -> tuple[Tiles, Replay | None]:
        """The best of `tiles` and those that are tried, each in turns with the best so far."""
        for other in tried:
            if replay is not None and other == tiles:
                continue
            if replay is not None and seconds_left() < max(1.5, self.reserve):
                raise OutOfTime("no time was left for the other tiles")
            try:
                new = Replay(one, table_of(one.decoder, other), self.settings.dry)
                wrong = error(new.outcome(), right)
            except Exception as problem:  # a tile that one card does not take is no reason to lose the others
                if device_lost() is not None:
                    raise
                self.record.note(f"{_changed(tiles, other)}: {type(problem).__name__}: {str(problem)[:160]}")
                continue
            if not wrong <= self.bound:
                self.wrong.append(f"{_changed(tiles, other)}: error {wrong:.2e} beyond {self.bound:.2e}")
                continue
            if replay is not None:
                ours, theirs = alternating([replay, new], 4, self.settings.dry)
                if statistics.median(b / a for a, b in zip(ours, theirs, strict=True)) > GAIN:
                    continue
            tiles, replay = other, new
        return tiles, replay

    def _dependents(self, one: Pass, tiles: Tiles, replay: Replay, right: Tensor) -> tuple[Tiles, Replay]:
        """Dependent launches for all of them or, where that gains nothing, for each by itself; then what is prefetched.
        """
        early, ahead = self._descend(one, tiles, replay, right, [dependent(tiles, size) for size in (0, *PREFETCH)])
        if early == tiles:  # not for all of them: for some?
            for name in PRODUCTS:
                early, ahead = self._descend(one, early, ahead, right, [
                    {**early, name: early[name]._replace(pdl=True)}])
        for name in PRODUCTS:
            if early[name].pdl:
                early, ahead = self._descend(one, early, ahead, right, (
                    {**early, name: early[name]._replace(prefetch=size)} for size in PREFETCH))
        return early, ahead


def _changed(before: Tiles, after: Tiles) -> str:
    return ", ".join(f"{name} {tuple(tile)}" for name, tile in after.items() if tile != before.get(name)) or "the same"
