"""Which skinny product brings an 8B decode step near the read bandwidth? Chains of 32 layers, timed in graphs.

    python3 benchmarks/device/skinny_products.py --out FILE [--seconds 110] [--dry-run]

A chain is a step without its embedding and sampling: 32 layers of norm, qkv, a stub for attention (a kernel of a few
microseconds), o, norm, gate_up, SwiGLU, down, then the head; every layer has weights of its own, 15 GB in all. The
same chain runs as the library's products with small kernels between them, as our products, with fused ends, with
programmatic dependent launch, with prefetched weights, and over a table of tiles, one product after the other. Each
chain's logits are held against a float32 reference: no more than twice the error of the library's chain, no NaN from
poisoned buffers, the same bits at every replay. A read of the same bytes is the limit.

Rows go to FILE as they are measured; what fails is a note. Hand-written CUDA (`skinny_cuda.py`) is timed last, in a
process of its own. With --dry-run everything runs in Triton's interpreter on toy shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

BEGIN = time.monotonic()
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from skinny_cuda import CASES, CudaTile, Library, finish, start  # noqa: E402
from skinny_kernels import (  # noqa: E402
    SUMMED,
    Buffers,
    Tile,
    begin_kernel,
    launch_now,
    norm_kernel,
    pdl_option,
    product,
    stub_kernel,
    swiglu_kernel,
)
from torch import Tensor  # noqa: E402

EPS = 1e-5
FOLDER = os.path.join(tempfile.gettempdir(), f"skinny-cuda-{os.getuid()}")
"""Where nvcc's libraries go."""
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
ENDS = {"qkv": "plain", "o": "residual", "gate_up": "swiglu", "down": "residual", "head": "plain"}
NORMED = ("qkv", "gate_up", "head")


class Shape(NamedTuple):
    """Widths of a model."""

    hidden: int
    qkv: int
    middle: int
    vocabulary: int
    layers: int

    def of(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a product."""
        return {"qkv": (self.qkv, self.hidden), "o": (self.hidden, self.hidden),
                "gate_up": (2 * self.middle, self.hidden), "down": (self.hidden, self.middle),
                "head": (self.vocabulary, self.hidden)}[name]


REAL = Shape(4096, 6144, 14336, 128256, 32)
TOY = Shape(256, 320, 384, 600, 2)


class Chain(NamedTuple):
    """How a step is formed."""

    name: str
    tiles: dict[str, Tile | CudaTile] | None = None  # none: the library
    fused: bool = False
    pdl: bool = False

    def but(self, name: str, **tiles: Tile | CudaTile) -> Chain:
        return self._replace(name=name, tiles={**(self.tiles or {}), **tiles})


# The first is what the card was seen to like best (without dependents); one program a processor and 80 to 120 KB each.
SEEN = {"qkv": Tile(64, 256, 4, 4), "o": Tile(32, 256, 4, 4), "gate_up": Tile(64, 256, 4, 4),
        "down": Tile(32, 512, 4, 3), "head": Tile(64, 256, 4, 4)}
# Two or three programs a processor, so that the next kernel's first programs find room beside the last of this one.
ROOMY = {"qkv": Tile(64, 256, 4, 3, prefetch=256), "o": Tile(32, 256, 4, 4, prefetch=1024),
         "gate_up": Tile(64, 256, 4, 3, prefetch=256), "down": Tile(32, 512, 4, 3, prefetch=1024),
         "head": Tile(64, 256, 4, 3, prefetch=256)}

_COMMON = (Tile(64, 256, 4, 3), Tile(64, 128, 4, 4), Tile(32, 256, 4, 4), Tile(32, 512, 4, 3),
           Tile(64, 128, 4, 4, swap=True), Tile(64, 256, 4, 3, tma=True), Tile(64, 128, 4, 4, swap=True, tma=True))
CANDIDATES = {
    "qkv": (*_COMMON, Tile(64, 256, 4, 3, splits=2), Tile(64, 256, 4, 4), Tile(32, 256, 4, 3, splits=2),
            Tile(64, 128, 4, 4, splits=4), Tile(32, 512, 4, 2)),
    "o": (*_COMMON, Tile(32, 256, 4, 3, splits=2), Tile(64, 256, 4, 3, splits=4), Tile(64, 128, 4, 4, splits=4),
          Tile(32, 512, 4, 2, splits=2), Tile(32, 512, 4, 4), Tile(64, 128, 4, 4, splits=4, swap=True)),
    "gate_up": (*_COMMON, Tile(64, 256, 4, 4), Tile(128, 128, 4, 3), Tile(64, 256, 4, 3, programs=264),
                Tile(64, 256, 4, 3, tma=True, programs=264), Tile(64, 256, 4, 3, swap=True, tma=True, programs=264),
                Tile(64, 256, 4, 3, evict=True)),
    "down": (*_COMMON, Tile(32, 512, 4, 3, splits=2), Tile(64, 256, 4, 3, splits=2), Tile(64, 256, 4, 3, splits=4),
             Tile(32, 512, 4, 4), Tile(64, 128, 4, 4, splits=4, swap=True), Tile(64, 256, 4, 3, splits=4, tma=True)),
    "head": (Tile(64, 256, 4, 3), Tile(64, 256, 4, 4), Tile(64, 256, 4, 3, tma=True),
             Tile(64, 256, 4, 3, programs=264), Tile(128, 128, 4, 3)),
}
BY_HAND = {"qkv": CudaTile(48, 2, 128, 5), "o": CudaTile(32, 4, 256, 3), "gate_up": CudaTile(64, 2, 128, 4),
           "down": CudaTile(32, 4, 256, 3), "head": CudaTile(64, 2, 128, 4, grid=132)}
TOY_TILES = {"qkv": Tile(64, 32, 4, 2, prefetch=32), "o": Tile(32, 32, 4, 2, splits=2), "gate_up": Tile(32, 32, 4, 2),
             "down": Tile(32, 32, 4, 2, splits=4), "head": Tile(64, 32, 4, 2)}
TOY_CANDIDATES = {
    "qkv": (Tile(32, 64, 4, 2, tma=True), Tile(64, 32, 4, 2, splits=4, swap=True)),
    "o": (Tile(64, 32, 4, 2, swap=True), Tile(64, 64, 4, 2, splits=4, tma=True)),
    "gate_up": (Tile(64, 32, 4, 2, programs=5, tma=True), Tile(64, 32, 4, 2, swap=True, programs=7)),
    "down": (Tile(64, 32, 4, 2, splits=4, swap=True, evict=True), Tile(32, 64, 4, 2, splits=2, programs=3)),
    "head": (Tile(128, 32, 4, 2, programs=4), Tile(64, 64, 4, 2, tma=True)),
}


class Model:
    """Weights of every layer, in one tensor; gains of every norm, the last of them before the head."""

    def __init__(self, shape: Shape, device: str):
        sizes = [(name, shape.of(name)) for _ in range(shape.layers) for name in PRODUCTS[:4]]
        sizes.append(("head", shape.of("head")))
        self.store = torch.empty(sum(rows * columns for _, (rows, columns) in sizes), dtype=torch.bfloat16,
                                 device=device)
        self.store.normal_(0.0, shape.hidden ** -0.5)
        self.weights: dict[str, list[Tensor]] = {name: [] for name in PRODUCTS}
        at = 0
        for name, (rows, columns) in sizes:
            self.weights[name].append(self.store[at : at + rows * columns].view(rows, columns))
            at += rows * columns
        self.gains = (1 + 0.1 * torch.randn(2 * shape.layers + 1, shape.hidden, device=device)).bfloat16()
        self.bytes = 2 * at


Launch = Callable[[object, tuple[int, ...], tuple, dict], None]


def step(model: Model, shape: Shape, chain: Chain, buffers: Buffers, cycles: int, launch: Launch = launch_now) -> None:
    """One step of `chain`, from buffers.hidden to buffers.logits (buffers.rounded where the library forms them)."""
    if chain.fused:
        _fused(model, shape, chain, buffers, cycles, launch)
    else:
        _separate(model, shape, chain, buffers, cycles, launch)


def begin(shape: Shape, gain: Tensor, buffers: Buffers, pdl: bool, launch: Launch) -> None:
    sums = shape.hidden // SUMMED
    launch(begin_kernel, (sums,), (buffers.hidden, gain, buffers.residual, buffers.scaled, buffers.sums, buffers.rows),
           dict(FEATURES=shape.hidden, SUMS=sums, SUMMED=SUMMED, BLOCK_ROWS=16, PDL=pdl))  # a graph begins with it


def stub(shape: Shape, buffers: Buffers, cycles: int, pdl: bool, launch: Launch) -> None:
    block = 512
    launch(stub_kernel, (buffers.rows, -(-shape.hidden // block)),
           (buffers.qkv, buffers.attended, buffers.rows, cycles),
           dict(QKV=shape.qkv, FEATURES=shape.hidden, BLOCK=block, SPIN=not dry(), PDL=pdl, **pdl_option(pdl)))


def one(name: str, x: Tensor, weight: Tensor, chain: Chain, buffers: Buffers, out: Tensor | None, gain: Tensor | None,
        launch: Launch) -> None:
    """A product with its fused end."""
    tile = chain.tiles[name]
    if isinstance(tile, CudaTile):
        by_hand().product(x, weight, tile, ENDS[name], buffers, out=out, gain=gain, eps=EPS, pdl=chain.pdl)
        return
    product(x, weight, tile, ENDS[name], buffers, norm=name in NORMED, out=out, gain=gain, eps=EPS,
            pdl=chain.pdl, launch=launch)


_by_hand: list[Library] = []


def by_hand() -> Library:
    """What nvcc built."""
    if not _by_hand:
        _by_hand.append(Library(FOLDER))
    return _by_hand[0]


def _fused(model: Model, shape: Shape, chain: Chain, buffers: Buffers, cycles: int, launch: Launch) -> None:
    weights, gains = model.weights, model.gains
    begin(shape, gains[0], buffers, chain.pdl, launch)
    for layer in range(shape.layers):
        one("qkv", buffers.scaled, weights["qkv"][layer], chain, buffers, buffers.qkv, None, launch)
        stub(shape, buffers, cycles, chain.pdl, launch)
        one("o", buffers.attended, weights["o"][layer], chain, buffers, None, gains[2 * layer + 1], launch)
        one("gate_up", buffers.scaled, weights["gate_up"][layer], chain, buffers, buffers.middle, None, launch)
        one("down", buffers.middle, weights["down"][layer], chain, buffers, None, gains[2 * layer + 2], launch)
    one("head", buffers.scaled, weights["head"][0], chain, buffers, buffers.logits, None, launch)


def _separate(model: Model, shape: Shape, chain: Chain, buffers: Buffers, cycles: int, launch: Launch) -> None:
    weights, gains, rows = model.weights, model.gains, (buffers.rows,)

    def multiply(name: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
        if chain.tiles is None:
            torch.mm(x, weight.t(), out=out)
        else:
            product(x, weight, chain.tiles[name], "plain", buffers, norm=False, out=out, launch=launch)

    def norm(index: int) -> None:
        source = buffers.residual if index else buffers.hidden
        if not index:
            buffers.residual.copy_(buffers.hidden)
        launch(norm_kernel, rows, (source, buffers.branch, gains[index], buffers.normed, EPS),
               dict(FEATURES=shape.hidden, BLOCK=power_of_two(shape.hidden), ADD=index > 0, num_warps=8))

    for layer in range(shape.layers):
        norm(2 * layer)
        multiply("qkv", buffers.normed, weights["qkv"][layer], buffers.qkv)
        stub(shape, buffers, cycles, False, launch)
        multiply("o", buffers.attended, weights["o"][layer], buffers.branch)
        norm(2 * layer + 1)
        multiply("gate_up", buffers.normed, weights["gate_up"][layer], buffers.up)
        launch(swiglu_kernel, (buffers.rows, -(-shape.middle // 1024)), (buffers.up, buffers.middle),
               dict(FEATURES=shape.middle, BLOCK=1024))
        multiply("down", buffers.middle, weights["down"][layer], buffers.branch)
    norm(2 * shape.layers)
    multiply("head", buffers.normed, weights["head"][0], buffers.rounded if chain.tiles is None else buffers.logits)


def reference(model: Model, shape: Shape, hidden: Tensor) -> Tensor:
    """The logits in float32, weights as they are."""
    stream = hidden.float()

    def normed(gain: Tensor) -> Tensor:
        return stream * torch.rsqrt(stream.square().mean(1, keepdim=True) + EPS) * gain.float()

    for layer in range(shape.layers):
        qkv = normed(model.gains[2 * layer]) @ model.weights["qkv"][layer].float().t()
        stream = stream + qkv[:, : shape.hidden] @ model.weights["o"][layer].float().t()
        gate, up = (normed(model.gains[2 * layer + 1]) @ model.weights["gate_up"][layer].float().t()).chunk(2, 1)
        stream = stream + (F.silu(gate) * up) @ model.weights["down"][layer].float().t()
    gained = normed(model.gains[2 * shape.layers])
    return torch.cat([gained @ part.float().t() for part in model.weights["head"][0].split(16384)], 1)


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def dry() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def error(got: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right; NaN stays NaN."""
    return float((got.float() - right).norm() / right.norm())


class Journal:
    """What was measured, written after each entry."""

    def __init__(self, path: str, seconds: float):
        self.path, self.end = Path(path), BEGIN + seconds
        self.content: dict = {"facts": {}, "chains": [], "products": [], "checks": [], "notes": []}

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, where: str, **entry) -> None:
        self.content[where].append({**entry, "at": round(time.monotonic() - BEGIN, 2)})
        self.save()

    def fact(self, **facts) -> None:
        self.content["facts"].update(facts)
        self.save()

    def note(self, text: str) -> None:
        print("NOTE", text, flush=True)
        self.add("notes", text=text)

    def save(self) -> None:
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.content, indent=1))
        partial.replace(self.path)


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """What replays `call` as a graph."""
    if dry():
        return call
    call()  # compiles what is not yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    stream = capture_stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph.replay


_stream: list[torch.cuda.Stream] = []


def capture_stream() -> torch.cuda.Stream:
    if not _stream:
        _stream.append(torch.cuda.Stream())
    return _stream[0]


def seconds(call: Callable[[], None], repeats: int = 5) -> tuple[float, float, float]:
    """Median, least and most seconds of one call on the device, after one that is not timed."""
    if dry():
        begin_at = time.perf_counter()
        call()
        took = time.perf_counter() - begin_at
        return took, took, took
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    call()
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    times = [first.elapsed_time(second) / 1e3 for first, second in zip(marks, marks[1:], strict=False)]
    return statistics.median(times), min(times), max(times)


class Bench:
    """Measures chains and products of one model."""

    def __init__(self, journal: Journal, shape: Shape, device: str):
        self.journal, self.shape, self.device = journal, shape, device
        torch.manual_seed(0)
        self.model = Model(shape, device)
        self.bandwidth = self._bandwidth()
        self.cycles = 9000  # some 5 us
        self.buffers: dict[int, Buffers] = {}
        self.right: dict[int, Tensor] = {}
        self.plain_error: dict[int, float] = {}
        journal.fact(weight_bytes=self.model.bytes, bandwidth=self.bandwidth,
                     limit_ms=1e3 * self.model.bytes / self.bandwidth, stub_cycles=self.cycles)
        print(f"read {self.bandwidth / 1e9:.0f} GB/s: {1e3 * self.model.bytes / self.bandwidth:.3f} ms a step",
              flush=True)

    def _bandwidth(self) -> float:
        """Bytes a second of the best of several plain readers over all weights."""
        words = self.model.store.view(torch.int32)
        if dry():
            took, *_ = seconds(lambda: words.sum())
            return 4 * words.numel() / took
        from reader import CHOICES, read

        words = words[: words.numel() // 65536 * 65536]
        out = torch.empty(1 << 24, dtype=torch.int32, device=self.device)
        found = {}
        for choice in CHOICES:
            call = captured(lambda choice=choice: read(words, out, choice))
            found[str(choice)] = 4 * words.numel() / seconds(call)[0]
        self.journal.fact(readers=found)
        return max(found.values())

    def prepare(self, rows: int) -> None:
        """Buffers, the right logits and the library's error at so many rows."""
        if rows in self.buffers:
            return
        self.buffers[rows] = Buffers(rows, self.shape, self.device)
        self.right[rows] = reference(self.model, self.shape, self.buffers[rows].hidden)

    def chain(self, chain: Chain, rows: int, cycles: int | None = None, quiet: bool = False) -> float | None:
        """Milliseconds of a step; None if it fails or is wrong."""
        if self.journal.left() < 3:
            return None
        cycles = self.cycles if cycles is None else cycles
        try:
            self.prepare(rows)
            buffers = self.buffers[rows]
            buffers.poison()
            replay = captured(lambda: step(self.model, self.shape, chain, buffers, cycles))
            buffers.poison()
            replay()
            got = (buffers.rounded if chain.tiles is None else buffers.logits).clone()
            wrong = error(got, self.right[rows])
            if chain.tiles is None:
                self.plain_error[rows] = wrong
            bound = 2 * self.plain_error.get(rows, 0.02)
            took = seconds(replay)
            again = (buffers.rounded if chain.tiles is None else buffers.logits)
            steady = bool(torch.equal(got, again))
        except Exception as problem:
            self.journal.note(f"chain {chain.name}, {rows} rows: {type(problem).__name__}: {str(problem)[:300]}")
            return None
        good = wrong <= bound and steady
        share = self.model.bytes / self.bandwidth / took[0]
        self.journal.add("chains", name=chain.name, rows=rows, cycles=cycles, ms=1e3 * took[0],
                         spread=[1e3 * took[1], 1e3 * took[2]], share=share, error=wrong, bound=bound, steady=steady,
                         good=good, tiles={name: tuple(tile) for name, tile in (chain.tiles or {}).items()})
        if not quiet or not good:
            print(f"{chain.name:42s} {rows:3d} rows {1e3 * took[0]:8.3f} ms  {share:5.3f} of read bandwidth  error "
                  f"{wrong:.2e}{'' if good else '  WRONG' if steady else '  NOT STEADY'}", flush=True)
        return 1e3 * took[0] if good else None

    def descend(self, chain: Chain, rows: int, candidates: dict[str, tuple[Tile | CudaTile, ...]], name: str,
                reserve: float) -> Chain:
        """The best tiles of each product in turn, in the chain itself, then how much is prefetched."""
        best = self.chain(chain._replace(name=name), rows, quiet=True)
        for which in ("gate_up", "down", "qkv", "o", "head"):
            in_features = self.shape.of(which)[1]
            for tile in candidates[which]:
                if self.journal.left() < reserve:
                    return chain
                part = in_features // tile.splits
                ahead = min(chain.tiles[which].prefetch, part)
                chain, best = self._better(chain, best, rows, which, tile._replace(prefetch=ahead), name)
            part = in_features // chain.tiles[which].splits
            for ahead in sorted({0, 256, 512, 1024, 2048, part} if not dry() else {0, part}):
                if ahead <= part and ahead != chain.tiles[which].prefetch and self.journal.left() > reserve:
                    tile = chain.tiles[which]._replace(prefetch=ahead)
                    chain, best = self._better(chain, best, rows, which, tile, name)
            print(f"{name}, {rows} rows: {which} {tuple(chain.tiles[which])}, {best} ms", flush=True)
        return chain

    def _better(self, chain: Chain, best: float | None, rows: int, which: str, tile: Tile | CudaTile,
                name: str) -> tuple[Chain, float | None]:
        tried = chain.but(name, **{which: tile})
        took = self.chain(tried, rows, quiet=True)
        if took is not None and (best is None or took < best):
            return tried, took
        return chain, best

    def products(self, rows: int, chains: list[Chain]) -> None:
        """Each product alone, over the weights of all layers."""
        self.prepare(rows)
        for name in PRODUCTS:
            weights = self.model.weights[name] if name != "head" else self.model.weights[name] * 4
            out_features, in_features = self.shape.of(name)
            limit = 2 * out_features * in_features / self.bandwidth
            x = torch.randn(rows, in_features, device=self.device).bfloat16()
            for chain in chains:
                if self.journal.left() < 3:
                    return
                try:
                    begin(self.shape, self.model.gains[0], self.buffers[rows], False, launch_now)
                    took = seconds(captured(lambda name=name, chain=chain, x=x, weights=weights: self._launch_all(
                        name, chain, x, weights, rows)))[0] / len(weights)
                except Exception as problem:
                    self.journal.note(f"product {name} of {chain.name}, {rows} rows: {str(problem)[:300]}")
                    continue
                self.journal.add("products", name=name, chain=chain.name, rows=rows, us=1e6 * took,
                                 share=limit / took,
                                 tile=None if chain.tiles is None else tuple(chain.tiles[name]))

    def _launch_all(self, name: str, chain: Chain, x: Tensor, weights: list[Tensor], rows: int) -> None:
        buffers = self.buffers[rows]
        out = {"qkv": buffers.qkv, "o": buffers.branch, "gate_up": buffers.up, "down": buffers.branch,
               "head": buffers.rounded}[name]
        for weight in weights:
            if chain.tiles is None:
                torch.mm(x, weight.t(), out=out)
            elif chain.fused:
                end = {"qkv": buffers.qkv, "gate_up": buffers.middle, "head": buffers.logits}.get(name)
                one(name, x, weight, chain, buffers, end, self.model.gains[0] if end is None else None, launch_now)
            else:
                product(x, weight, chain.tiles[name], "plain", buffers, norm=False, out=out)

    def check(self, rows: int, name: str, tile: Tile | CudaTile, pdl: bool) -> None:
        """One product with its end against float32, on fresh inputs."""
        label = f"{name} {tuple(tile)}, {rows} rows{', pdl' if pdl else ''}"
        if self.journal.left() < 3:
            return
        try:
            buffers = Buffers(rows, self.shape, self.device)
            out_features, in_features = self.shape.of(name)
            weight = torch.randn(out_features, in_features, device=self.device).mul_(in_features ** -0.5).bfloat16()
            gain = (1 + 0.1 * torch.randn(self.shape.hidden, device=self.device)).bfloat16()
            chain = Chain("check", {name: tile}, True, pdl)
            if name in NORMED:
                begin(self.shape, gain, buffers, pdl, launch_now)
                stream = buffers.hidden.float()
                x = stream * torch.rsqrt(stream.square().mean(1, keepdim=True) + EPS) * gain.float()
                out = {"qkv": buffers.qkv, "gate_up": buffers.middle, "head": buffers.logits}[name]
                one(name, buffers.scaled, weight, chain, buffers, out, None, launch_now)
                right = x @ weight.float().t()
                if name == "gate_up":
                    gate, up = right.chunk(2, 1)
                    right = F.silu(gate) * up
                pairs = [(out, right)]
            else:
                x = torch.randn(rows, in_features, device=self.device).bfloat16()
                buffers.residual.normal_()
                before = buffers.residual.float()
                one(name, x, weight, chain, buffers, None, gain, launch_now)
                right = before + x.float() @ weight.float().t()
                squares = right.square().view(rows, -1, SUMMED).sum(2)
                pairs = [(buffers.residual, right), (buffers.scaled, right * gain.float()), (buffers.sums, squares)]
            wrong = max(error(got, right) for got, right in pairs)
            good = bool(wrong < (1.2e-2 if dry() else 6e-3)) and int(buffers.tickets.abs().sum()) == 0
        except Exception as problem:
            self.journal.note(f"check {label}: {type(problem).__name__}: {str(problem)[:300]}")
            return
        self.journal.add("checks", what=label, error=wrong, good=good)
        if not good:
            self.journal.note(f"WRONG: {label}: error {wrong}")


def fixed_chains(tiles: dict[str, Tile], seen: dict[str, Tile]) -> list[Chain]:
    """From the library to everything at once."""
    bare = {name: tile._replace(prefetch=0) for name, tile in tiles.items()}
    return [
        Chain("library"),
        Chain("ours, ends apart", seen),
        Chain("fused", seen, fused=True),
        Chain("fused, dependents, prefetch", tiles, fused=True, pdl=True),
        Chain("fused, dependents", bare, fused=True, pdl=True),
        Chain("fused, roomy tiles", bare, fused=True),
        Chain("fused, dependents, seen tiles", seen, fused=True, pdl=True),
    ]


def jobs(shape: Shape, tiles: dict[str, Tile], seen: dict[str, Tile],
         candidates: dict[str, tuple[Tile, ...]]) -> list[tuple[str, Tile, bool, bool]]:
    """(product, tile, fused, pdl) of all that will be launched, the first needed first."""
    found = [(name, seen[name], fused, False) for fused in (False, True) for name in PRODUCTS]
    found += [(name, tiles[name], True, pdl) for pdl in (True, False) for name in PRODUCTS]
    found += [(name, seen[name], True, True) for name in PRODUCTS]
    found += [(name, tile, True, True) for name in PRODUCTS for tile in candidates[name]]
    found += [(name, tile._replace(lines=True), True, True) for name, tile in tiles.items()]
    return list(dict.fromkeys((name, tile._replace(prefetch=0), fused, pdl) for name, tile, fused, pdl in found))


def compile_one(job: tuple[str, Tile, bool, bool] | str, arch: int = 90) -> float:
    """In a worker: compiles what a launch on the card will ask for, into Triton's cache."""
    from compile_pool import Driver
    from triton.runtime import driver

    began = time.perf_counter()
    driver.set_active(Driver(arch))

    def launch(kernel, grid, args, kwargs) -> None:
        compiled = kernel.warmup(*args, grid=(1,), **kwargs)
        try:  # what launches it is C, and compiled as well; where there is no driver it does not load
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(compiled.src, compiled.metadata)
        except Exception:
            pass

    small = {dtype: torch.empty(16, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.int32)}

    class Fake:
        rows = 1
        sums = partial = logits = small[torch.float32]
        tickets = small[torch.int32]
        hidden = residual = scaled = normed = branch = attended = qkv = up = middle = rounded = small[torch.bfloat16]

    if job == "others":
        for pdl in (False, True):
            begin(REAL, Fake.hidden, Fake, pdl, launch)
            stub(REAL, Fake, 9000, pdl, launch)
        for add in (False, True):
            launch(norm_kernel, (1,), (Fake.residual, Fake.branch, Fake.hidden, Fake.normed, EPS),
                   dict(FEATURES=REAL.hidden, BLOCK=power_of_two(REAL.hidden), ADD=add, num_warps=8))
        launch(swiglu_kernel, (1, 14), (Fake.up, Fake.middle), dict(FEATURES=REAL.middle, BLOCK=1024))
        from reader import CHOICES, read_kernel

        for block, steps, warps in CHOICES:
            launch(read_kernel, (1,), (small[torch.int32], small[torch.int32]),
                   dict(BLOCK=block, STEPS=steps, num_warps=warps))
        return time.perf_counter() - began
    name, tile, fused, pdl = job
    weight = small[torch.bfloat16][:1].expand(*REAL.of(name))
    out = Fake.logits if name == "head" else Fake.hidden
    if fused:
        one(name, Fake.hidden, weight, Chain("", {name: tile}, True, pdl), Fake, out,
            Fake.hidden if ENDS[name] == "residual" else None, launch)
    else:
        product(Fake.hidden, weight, tile, "plain", Fake, norm=False, out=out, launch=launch)
    return time.perf_counter() - began


def compile_all(journal: Journal, work: list, workers: int) -> None:
    """All of `work` in forked processes; to be called before the GPU is touched. What fails is noted."""
    began = time.monotonic()
    pool = ProcessPoolExecutor(workers, get_context("fork"))
    tasks = {pool.submit(compile_one, job): job for job in ["others", *work]}
    try:
        for task in as_completed(tasks, timeout=max(5.0, min(60.0, journal.left() - 60))):
            if task.exception() is not None:
                journal.note(f"not compiled: {tasks[task]}: {str(task.exception())[:300]}")
    except TimeoutError:
        journal.note("compiling took too long: the rest is compiled where it is launched")
    pool.shutdown(wait=False, cancel_futures=True)
    journal.fact(compiled=len(tasks), compile_seconds=round(time.monotonic() - began, 1))
    print(f"{len(tasks)} kernels compiled in {time.monotonic() - began:.1f} s by {workers} processes", flush=True)


def measure_by_hand(journal: Journal) -> None:
    """The chains of hand-written CUDA, beside the library's."""
    bench = Bench(journal, REAL, "cuda")
    full = Chain("by hand, dependents", BY_HAND, fused=True, pdl=True)
    chains = [Chain("library"), full, full._replace(name="by hand", pdl=False)]
    chains.append(full.but("  by hand, o ahead", o=BY_HAND["o"]._replace(prefetch=REAL.hidden)))
    for rows in (1, 16):
        for chain in chains:
            bench.chain(chain, rows)
    candidates = {name: tuple(CudaTile(*case, grid) for case in CASES[end] for grid in (128, 132))
                  for name, end in {**ENDS, "head": "float"}.items()}
    best = {}
    for rows in (1, 16):
        name = f"by hand, tuned at {rows} rows"
        best[rows] = bench.descend(best.get(1, chains[3]), rows, candidates, name,
                                   5 + (0.5 * journal.left() if rows == 1 else 0))._replace(name=name)
    for rows in (1, 4, 8, 16):
        bench.chain(best[1 if rows < 16 else 16], rows)
    for rows in (1, 16):
        for cycles in (0, 18000):
            bench.chain(best[rows]._replace(name=f"{best[rows].name}, stub of {cycles} cycles"), rows, cycles)
    for rows in (1, 16, 4, 8):
        bench.products(rows, [best[1 if rows < 16 else 16]])
    for rows in (1, 5, 16):
        for name in PRODUCTS:
            bench.check(rows, name, best[1].tiles[name], True)


def run_by_hand(journal: Journal, builders: list) -> None:
    """`measure_by_hand` in a process of its own, which is ended if it hangs; its rows join ours."""
    if not builders:
        return
    problems = finish(builders, 20)
    for which, said in problems.items():
        journal.note(f"nvcc, {which}: {said}")
    path = journal.path.with_suffix(".cuda.json")
    given = min(32.0, journal.left() - 40)
    if given < 12:
        journal.note("no time for the products by hand")
        return
    child = subprocess.Popen([sys.executable, __file__, "--by-hand", "--out", str(path), "--seconds", str(given)])
    try:
        child.wait(given + 6)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        journal.note("the products by hand took too long and were ended")
    if path.exists():
        theirs = json.loads(path.read_text())
        journal.fact(by_hand={key: theirs["facts"].get(key) for key in ("bandwidth", "limit_ms")})
        for kind in ("chains", "products", "checks", "notes"):
            journal.content[kind] += [{**entry, "by_hand": True} for entry in theirs[kind]]
        journal.save()


def measure(journal: Journal, reserve: float) -> None:
    """All of it; `reserve` seconds are left."""
    builders = []
    if not dry():
        try:
            builders = start(FOLDER)
        except Exception as problem:
            journal.note(f"nvcc: {problem}")
    shape = TOY if dry() else REAL
    tiles, seen = (TOY_TILES, TOY_TILES) if dry() else (ROOMY, SEEN)
    candidates = TOY_CANDIDATES if dry() else CANDIDATES
    if not dry():
        compile_all(journal, jobs(shape, tiles, seen, candidates), max(1, len(os.sched_getaffinity(0)) - 1))
    device = "cpu" if dry() else "cuda"
    journal.fact(device="none" if dry() else torch.cuda.get_device_name(), torch=torch.__version__)
    pdl_here = not dry()
    bench = Bench(journal, shape, device)
    chains = [chain._replace(pdl=chain.pdl and pdl_here) for chain in fixed_chains(tiles, seen)]
    for rows in (1, 16) if not dry() else (1, 5):
        for chain in chains:
            bench.chain(chain, rows)
    full = chains[3]
    in_features = {name: shape.of(name)[1] for name in PRODUCTS}
    variants = [full.but("  whole of o ahead", o=tiles["o"]._replace(prefetch=in_features["o"] // tiles["o"].splits)),
                full._replace(name="  ahead by lines", tiles={name: tile._replace(lines=True)
                                                              for name, tile in tiles.items()})]
    for rows in (1, 16) if not dry() else (3,):
        for chain in variants:
            bench.chain(chain, rows)
    run_by_hand(journal, builders)
    best: dict[int, Chain] = {}
    for rows in (1, 16) if not dry() else (3,):
        start_at = best.get(1, full) if not dry() else full
        name = f"tuned at {rows} rows"
        # Half of what is left for the one, and some for the tables at the end.
        spare = reserve + 12 + (0.45 * max(0.0, journal.left() - reserve - 12) if rows == 1 else 0)
        best[rows] = bench.descend(start_at, rows, candidates, name, spare if not dry() else 1)._replace(name=name)
    winner = next(iter(best.values()))
    for rows in (1, 4, 8, 16) if not dry() else (5,):
        for chain in (chains[0], chains[2], *best.values()):
            bench.chain(chain, rows)
    for cycles in (0, 18000):
        for rows in (1, 16) if not dry() else ():
            for chain in (chains[0], best[rows]):
                bench.chain(chain._replace(name=f"{chain.name}, stub of {cycles} cycles"), rows, cycles)
    for rows in (1, 16, 4, 8) if not dry() else (2,):
        if journal.left() > reserve + 2:
            chosen = best[16] if rows == 16 else winner
            bench.products(rows, [chains[0], Chain("ours", seen), chosen])
    for rows in (1, 5, 16) if not dry() else (1, 5, 16):
        for name in PRODUCTS:
            for tile in {tiles[name], winner.tiles[name], *(candidates[name] if dry() else ())}:
                if journal.left() > reserve + 1:
                    bench.check(rows, name, tile, pdl_here)


def table(journal: Journal) -> None:
    """What there is to see at the end."""
    content = journal.content
    facts = content["facts"]
    print(f"\n{facts.get('device')}: read {facts.get('bandwidth', 0) / 1e9:.0f} GB/s, a step's weights "
          f"{facts.get('limit_ms', 0):.3f} ms")
    counts = sorted({entry["rows"] for entry in content["chains"]})
    print("\nchain: ms a step (share of read bandwidth)" + "".join(f"{f'{rows} rows':>17s}" for rows in counts))
    names = list(dict.fromkeys(entry["name"] for entry in content["chains"]))
    for name in names:
        cells = []
        for rows in counts:
            found = [entry for entry in content["chains"] if (entry["name"], entry["rows"]) == (name, rows)
                     and entry["good"]]
            least = min(found, key=lambda entry: entry["ms"], default=None)
            cells.append(f"{least['ms']:9.3f} ({least['share']:.3f})" if least else " " * 16)
        print(f"{name:42s}" + " ".join(cells))
    print("\nproduct alone: us (share)")
    for name in PRODUCTS:
        for chain in dict.fromkeys(entry["chain"] for entry in content["products"]):
            found = [entry for entry in content["products"] if (entry["name"], entry["chain"]) == (name, chain)]
            if found:
                print(f"{name:8s} {chain:24s}" + " ".join(
                    f"{entry['rows']:3d} rows {entry['us']:7.1f} ({entry['share']:.2f})"
                    for entry in sorted(found, key=lambda entry: entry["rows"])))
    bad = [entry["what"] for entry in content["checks"] if not entry["good"]]
    wrong = [f"{entry['name']} at {entry['rows']}" for entry in content["chains"] if not entry["good"]]
    print(f"\n{len(content['checks'])} checks, wrong: {bad or 'none'}; chains that are wrong: {wrong or 'none'}; "
          f"{len(content['notes'])} notes; {time.monotonic() - BEGIN:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--dry-run", action="store_true", help="toy shapes in Triton's interpreter")
    parser.add_argument("--by-hand", action="store_true", help="only the hand-written CUDA, built before")
    options = parser.parse_args()
    journal = Journal(options.out, options.seconds)
    try:
        if options.by_hand:
            measure_by_hand(journal)
        else:
            measure(journal, 0)
    except Exception as problem:
        import traceback

        traceback.print_exc()
        journal.note(f"stopped: {type(problem).__name__}: {str(problem)[:500]}")
    if not options.by_hand:
        table(journal)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
