"""The fused products: every end, in every type and every scheme of weights, against float64; the same bits when a
launch begins while the one before it still runs."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from compare import one_order, same, within
from kernel_rows import draw_from
from launchers import launchers
from models import as_quantised, random_blocks
from parallel import run_apart
from record import Record, Settings
from timing import rehearsing
from torch import Tensor

from stars.kernels.embedding_scaled import embedding_scaled_reference
from stars.kernels.gpu_schemes import served
from stars.kernels.linear import Weight, linear_reference, pack
from stars.kernels.linear_normed import linear_normed_reference
from stars.kernels.linear_residual import linear_residual_reference
from stars.kernels.linear_swiglu import linear_swiglu_reference
from stars.kernels.qkv_rope import qkv_rope_reference
from stars.kernels.quant import dequantize
from stars.kernels.quant_blocks import LAYOUTS
from stars.kernels.rope_write import rope_write_reference
from stars.kernels.triton import tuned
from stars.kernels.triton.tuned import Table
from stars.kernels.types import Batch, LayerKV, SplitSpace, Stream

EPS = 1e-5
SCHEMES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "int8": torch.bfloat16, "int4-128": torch.bfloat16,
           "int4-32": torch.float16, "fp16": torch.float16, "fp32": torch.float32}
"""And the type of the activations that it is checked with."""


class Sizes(SimpleNamespace):
    """Widths of a layer."""


ODD = Sizes(hidden=640, heads=5, kv_heads=1, head_dim=80, intermediate=384, vocab=333)
REAL = Sizes(hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocab=16003)
TOY = Sizes(hidden=128, heads=3, kv_heads=1, head_dim=16, intermediate=128, vocab=37)


def run(record: Record, settings: Settings) -> None:
    """A scheme a part, and matrices as files have them."""
    run_apart(record, settings, {scheme: partial(of_scheme, scheme=scheme) for scheme in SCHEMES} | {
        "matrices of files": of_files}, most=7)


def of_scheme(record: Record, settings: Settings, scheme: str) -> None:
    """Odd sizes; those of an 8B model at the rows of drafts and of scores; dependent launches."""
    cases = [(rows, TOY) for rows in (3, 17)] if settings.dry else [(rows, ODD) for rows in (1, 5, 33)]
    if not settings.dry and scheme not in ("fp16", "fp32", "int4-32"):
        cases += [(rows, REAL) for rows in ((16,) if settings.quick else (16, 128))]
    for rows, sizes in cases:
        layer(record, settings, scheme, rows, sizes)
    if not settings.dry and scheme != "fp32":
        dependents(record, settings, scheme)


def of_files(record: Record, settings: Settings) -> None:
    """Blocks are on the device what they are on the CPU, bit for bit; products with them, lookups in int8."""
    ops, dtype = launchers(settings.dry), torch.bfloat16
    for scheme in LAYOUTS:
        with record.checking(f"blocks of {scheme}"):
            stored = random_blocks(scheme, 333, 4)
            moved = stored._replace(values=stored.values.to(settings.device), scales=stored.scales.to(settings.device))
            [mine], [theirs] = served([moved], dtype), served([stored], dtype)
            fields = {"numbers": (mine, theirs)} if isinstance(mine, Tensor) else {
                "values": (mine.values, theirs.values), "scales": (mine.scales, theirs.scales)}
            for field, (got, wanted) in fields.items():
                same(record, f"blocks of {scheme}: {field}", got, wanted)
            weight = pack(mine)
            for rows in (5, 40):
                x = draw_from(settings.device, rows)(rows, weight.in_features).to(dtype)
                got, plain = (torch.full((rows, 333), torch.nan, dtype=dtype, device=settings.device) for _ in range(2))
                ops.linear(x, weight, got)
                linear_reference(x, weight, plain)
                exact = x.double() @ weight.dense().double().t()
                chain = 6 * exact.std().item() * (torch.finfo(dtype).eps / 2) * (2 / 3) ** 0.5  # as `Case.chain`
                within(record, f"blocks of {scheme}: a product of {rows} rows", got, plain, exact, chain=chain)
    table = as_quantised(draw_from(settings.device, 3)(333, 640), "int8")
    ids = torch.tensor([0, 332, 7, 7, 100], dtype=torch.int32, device=settings.device)
    for kind in (torch.bfloat16, torch.float32):
        ops.embedding(ids, pack(table), got := torch.full((5, 640), torch.nan, dtype=kind, device=settings.device))
        same(record, f"embedding of int8 to {str(kind)[6:]}", got, dequantize(table, kind)[ids.long()])
        stream = Stream(torch.full_like(got, torch.nan), torch.full_like(got, torch.nan),
                        torch.full((5, 20), torch.nan, device=settings.device))
        ops.embedding_scaled(ids, pack(table), torch.ones(640, device=settings.device), stream)
        same(record, f"embedding_scaled of int8 to {str(kind)[6:]}: residual", stream.residual, got)
        same(record, f"embedding_scaled of int8 to {str(kind)[6:]}: scaled", stream.scaled, got)


def first(record: Record, settings: Settings, scheme: str) -> None:
    """At first light: about the shape of an 8B model, one number of rows."""
    layer(record, settings, scheme, 16, TOY if settings.dry else ODD)


def layer(record: Record, settings: Settings, scheme: str, rows: int, sizes: Sizes) -> None:
    """Every end."""
    ops, name = launchers(settings.dry), f"{scheme}, {rows} rows, hidden {sizes.hidden}"
    for end in (normed, swiglu, residual, rope, plain_end, embedded):
        with record.checking(f"{end.__name__} {name}"):
            end(Case(record, ops, settings.device, scheme, rows, sizes, name))


class Case:
    """Inputs of one number of rows, and how outputs are held to float64."""

    def __init__(self, record: Record, ops: SimpleNamespace, device: str, scheme: str, rows: int, sizes: Sizes,
                 name: str):
        self.record, self.ops, self.device, self.scheme, self.sizes = record, ops, device, scheme, sizes
        self.rows, self.name, self.dtype = rows, name, SCHEMES[scheme]
        self.draw = draw_from(device, rows)
        # More than `tuned.room` says of any of these sizes: eight splits of 128 rows of 16,003 features.
        self.space = SplitSpace(torch.full((1 << (20 if device == "cpu" else 25),), torch.nan, device=device),
                                torch.zeros(1 << 14, dtype=torch.int32, device=device))

    def weight(self, out_features: int, in_features: int, bias: bool = False) -> Weight:
        """Random, so that products of normal numbers are normal numbers."""
        generator = torch.Generator(self.device).manual_seed(out_features)
        matrix = torch.empty(out_features, in_features, device=self.device)
        if not rehearsing():
            matrix.normal_(0.0, in_features**-0.5, generator=generator)
        given = self.draw(out_features).to(self.dtype) if bias else None
        if self.scheme in ("bf16", "fp16", "fp32"):
            return Weight(matrix.to(self.dtype), given, out_features, in_features)
        return pack(as_quantised(matrix, self.scheme), given)

    def stream(self, rows: int | None = None) -> Stream:
        """As `linear_residual` leaves it."""
        rows, hidden = self.rows if rows is None else rows, self.sizes.hidden
        made = torch.ones(rows, hidden, device=self.device)
        made = Stream(made.to(self.dtype), made.to(self.dtype), torch.empty(rows, hidden // 32, device=self.device))
        embedding_scaled_reference(torch.arange(rows, device=self.device), Weight(
            (2 * self.draw(rows, hidden)).to(self.dtype), None, rows, hidden), 1 + 0.1 * self.draw(hidden), made)
        return made

    def exact(self, x: Tensor, weight: Weight, stream: Stream | None = None) -> Tensor:
        """rstd * (x @ weight.T) + bias in float64."""
        if rehearsing():
            return torch.ones(x.shape[0], weight.out_features, dtype=torch.float64, device=x.device)
        product = x.double() @ weight.dense().double().t()
        if stream is not None:
            product *= torch.rsqrt(stream.squares.double().sum(1, keepdim=True) / self.sizes.hidden + EPS)
        return product if weight.bias is None else product + weight.bias.double()

    def chain(self, in_features: int, spread: float) -> float:
        """What a sum of so many products, together of that spread, is off by besides the rounding of the result.

        In float32, a sum in one order. Of int4, weights and scales are rounded to the activations' type: two errors of
        at most half a unit a weight, uniform, six standard deviations of their sum.
        """
        if self.scheme == "fp32":
            return one_order(in_features, spread * in_features**-0.5)
        if not self.scheme.startswith("int4"):
            return 0.0
        return 6 * spread * (torch.finfo(self.dtype).eps / 2) * (2 / 3) ** 0.5

    def holds(self, what: str, got: Tensor, plain: Tensor, exact: Tensor, in_features: int) -> None:
        """Beside the reference, which forms float32 and rounds once."""
        within(self.record, f"{what}, {self.name}", got, plain, exact,
               chain=self.chain(in_features, exact.std().item()))

    def free(self, what: str) -> None:
        """The tickets are as they were."""
        self.record.check(f"{what}, {self.name}: tickets are zero", not bool(self.space.tickets.any()))

    def nothing(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """NaN, to be written."""
        return torch.full(shape, torch.nan, dtype=dtype or self.dtype, device=self.device)


def normed(case: Case) -> None:
    stream, weight = case.stream(), case.weight(case.sizes.vocab, case.sizes.hidden)
    for dtype in dict.fromkeys((torch.float32, case.dtype)):
        got, plain = (case.nothing(case.rows, case.sizes.vocab, dtype=dtype) for _ in range(2))
        case.ops.linear_normed(stream, weight, EPS, got, case.space)
        rehearsing() or linear_normed_reference(stream, weight, EPS, plain, case.space)
        case.holds(f"linear_normed to {str(dtype)[6:]}", got, plain, case.exact(stream.scaled, weight, stream),
                   case.sizes.hidden)
    case.free("linear_normed")


def swiglu(case: Case) -> None:
    stream, weight = case.stream(), case.weight(2 * case.sizes.intermediate, case.sizes.hidden, bias=True)
    got, plain = (case.nothing(case.rows, case.sizes.intermediate) for _ in range(2))
    case.ops.linear_swiglu(stream, weight, EPS, got, case.space)
    rehearsing() or linear_swiglu_reference(stream, weight, EPS, plain, case.space)
    gate, up = case.exact(stream.scaled, weight, stream).chunk(2, 1)
    # silu's slope is below 1.1, so that an error of the gate counts as much, times up; and the other way round.
    wide = 2 * max(gate.abs().max().item(), up.abs().max().item())
    exact = gate / (1 + (-gate).exp()) * up
    chain = case.chain(case.sizes.hidden, max(gate.std().item(), up.std().item())) * wide
    within(case.record, f"linear_swiglu, {case.name}", got, plain, exact, chain=chain)
    case.free("linear_swiglu")


def residual(case: Case) -> None:
    hidden = case.sizes.hidden
    for in_features in (case.sizes.intermediate, case.sizes.heads * case.sizes.head_dim // 128 * 128 or 128):
        x, gain = case.draw(case.rows, in_features).to(case.dtype), 1 + 0.1 * case.draw(hidden)
        weight = case.weight(hidden, in_features, bias=in_features < hidden)
        before = case.draw(case.rows, hidden).to(case.dtype)
        got, plain = (Stream(before.clone(), case.nothing(case.rows, hidden), case.nothing(
            case.rows, hidden // 32, dtype=torch.float32)) for _ in range(2))
        case.ops.linear_residual(x, weight, gain, got, case.space)
        rehearsing() or linear_residual_reference(x, weight, gain, plain, case.space)
        product = case.exact(x, weight)
        within(case.record, f"linear_residual of {in_features}, {case.name}", got.residual, plain.residual,
               before.double() + product, chain=case.chain(in_features, product.std().item()))
        stored = got.residual.double()
        rounded = (stored.float() * gain).to(case.dtype)
        within(case.record, f"linear_residual of {in_features}, {case.name}: scaled", got.scaled, rounded,
               stored * gain.double())
        squares = stored.square().view(case.rows, -1, 32).sum(2)
        within(case.record, f"linear_residual of {in_features}, {case.name}: squares", got.squares, squares.float(),
               squares)
    case.free("linear_residual")


def rope(case: Case) -> None:
    heads, kv_heads, dim = case.sizes.heads, case.sizes.kv_heads, case.sizes.head_dim
    stream, weight = case.stream(), case.weight((heads + 2 * kv_heads) * dim, case.sizes.hidden)
    order = torch.Generator().manual_seed(case.rows)
    slots = torch.randperm(200, generator=order)[: case.rows].int()
    slots[1::3] = -1
    none = torch.zeros(1, dtype=torch.int32, device=case.device)
    positions = torch.randint(0, 90, (case.rows,), generator=order).int().to(case.device)
    angles = 6 * case.draw(90, dim // 2)
    for norms, into_slab in (((None, None), True), ((1 + 0.1 * case.draw(dim), 1 + 0.1 * case.draw(dim)), False)):
        batch = Batch(none, positions, slots.to(case.device), into_slab, none, none, none[None], none, none, none)

        def rotated(kind: torch.dtype, call) -> list[Tensor]:
            cache = [torch.full((200, kv_heads, dim), 7.0, dtype=kind, device=case.device) for _ in range(4)]
            q = case.nothing(case.rows, heads, dim, dtype=kind)
            call(batch, LayerKV(*cache, 16), q)
            return [q, *cache]

        def ours(op):
            return lambda batch, kv, q, norms=norms: op(stream, weight, EPS, batch, angles.cos(), angles.sin(), kv, q,
                                                        *norms, case.space)

        exact = case.exact(stream.scaled, weight, stream)
        truth = rotated(torch.float64, lambda batch, kv, q, norms=norms: rope_write_reference(
            exact, batch, angles.cos(), angles.sin(), kv, q, *norms, EPS))
        got, plain = rotated(case.dtype, ours(case.ops.qkv_rope)), rotated(case.dtype, ours(
            case.ops.qkv_rope if rehearsing() else qkv_rope_reference))
        for part, mine, theirs, right in zip(("q", "k pages", "v pages", "k slabs", "v slabs"), got, plain, truth,
                                             strict=True):
            # A norm of a head divides by its spread; a rotation adds two errors.
            chain = 2 * case.chain(case.sizes.hidden, 1.0 if norms[0] is not None else exact.std().item())
            within(case.record, f"qkv_rope{' with norms' * (norms[0] is not None)}, {case.name}: {part}", mine, theirs,
                   right, chain=chain)
    case.free("qkv_rope")


def plain_end(case: Case) -> None:
    """`linear` at any number of rows, also those that are not fused; no bits are claimed of a library's."""
    for rows in (case.rows, 3 * case.rows + 130 if case.sizes is not REAL else case.rows):
        x, weight = case.draw(rows, case.sizes.hidden).to(case.dtype), case.weight(case.sizes.vocab, case.sizes.hidden)
        got, plain = (case.nothing(rows, case.sizes.vocab) for _ in range(2))
        case.ops.linear(x, weight, got)
        rehearsing() or linear_reference(x, weight, plain)
        case.holds(f"linear, {rows} rows", got, plain, case.exact(x, weight), case.sizes.hidden)


def embedded(case: Case) -> None:
    vocab, hidden = case.sizes.vocab, case.sizes.hidden
    table = Weight(case.draw(vocab, hidden).to(case.dtype), None, vocab, hidden)
    tokens = (7 * torch.arange(case.rows) % vocab).int().to(case.device)
    gain = 1 + 0.1 * case.draw(hidden)
    got, plain = (Stream(case.nothing(case.rows, hidden), case.nothing(case.rows, hidden), case.nothing(
        case.rows, hidden // 32, dtype=torch.float32)) for _ in range(2))
    case.ops.embedding_scaled(tokens, table, gain, got)
    embedding_scaled_reference(tokens, table, gain, plain)
    same(case.record, f"embedding_scaled, {case.name}: residual", got.residual, plain.residual)
    same(case.record, f"embedding_scaled, {case.name}: scaled", got.scaled, plain.scaled)
    within(case.record, f"embedding_scaled, {case.name}: squares", got.squares, plain.squares,
           plain.residual.double().square().view(case.rows, -1, 32).sum(2))


def dependents(record: Record, settings: Settings, scheme: str) -> None:
    """A chain of launches that each read what the one before writes, many times over: with dependent launches and
    prefetching it has the bits that it has without."""
    sizes = Sizes(**vars(ODD) | dict(hidden=1024, intermediate=2048))
    case = Case(record, launchers(settings.dry), settings.device, scheme, 5, sizes, f"{scheme}, dependent launches")
    up, down = case.weight(2 * sizes.intermediate, sizes.hidden), case.weight(sizes.hidden, sizes.intermediate)
    gain, start = torch.ones(sizes.hidden, device=case.device), case.stream()
    gated = case.nothing(case.rows, sizes.intermediate)

    def outcome(pdl: bool) -> Stream:
        entries = {}
        for end, weight in (("swiglu", up), ("residual", down)):
            tile = tuned.default(end, scheme, case.rows, weight.out_features, weight.in_features)
            key = end, "bf16" if scheme == "fp16" else scheme, weight.out_features, weight.in_features
            entries[key] = ((1 << 20, tile._replace(pdl=pdl, prefetch=512 * pdl)),)
        stream = Stream(*(tensor.clone() for tensor in start))
        with tuned.using(Table(tiles=entries)):
            for _ in range(50):
                case.ops.linear_swiglu(stream, up, EPS, gated, case.space)
                case.ops.linear_residual(gated, down, gain, stream, case.space)
        return stream

    with record.checking(f"dependent launches, {scheme}"):
        plain, early = outcome(False), outcome(True)
        for field, mine, theirs in zip(Stream._fields, early, plain, strict=True):
            same(record, f"dependent launches, {scheme}: {field}", mine, theirs)
        record.check(f"dependent launches, {scheme}: numbers", bool(plain.residual.isfinite().all()))
        case.free("dependent launches")
