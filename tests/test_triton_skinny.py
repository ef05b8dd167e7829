"""The fused products in the interpreter: every end, at odd sizes, against float64 and the torch references."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stars.kernels.embedding_scaled import embedding_scaled_reference
from stars.kernels.linear import Weight, linear_reference
from stars.kernels.linear_normed import linear_normed_reference
from stars.kernels.linear_residual import linear_residual_reference
from stars.kernels.linear_swiglu import linear_swiglu_reference
from stars.kernels.qkv_rope import qkv_rope_reference
from stars.kernels.types import Batch, LayerKV, SplitSpace, Stream
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    from stars.kernels.triton import skinny, tuned
    from stars.kernels.triton.tuned import Tile

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Bounded(NamedTuple):
    """A tensor in float64, and how far from it a kernel may be that adds up in float32."""

    exact: Tensor
    bound: Tensor

    def holds(self, got: Tensor) -> None:
        """Rounding to bfloat16 costs a whole unit: the interpreter cuts where the card rounds."""
        bound = self.bound + torch.finfo(got.dtype).eps * (self.exact.abs() + self.bound)
        assert got.isfinite().all() and bool(((got.double() - self.exact).abs() <= bound).all())


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(out_features: int, in_features: int, dtype: torch.dtype, bias: bool, **options) -> Weight:
    return Weight((numbers(out_features, in_features, seed=11) * in_features**-0.5).to(dtype),
                  numbers(out_features, seed=12, dtype=dtype) if bias else None, out_features, in_features, **options)


def stream_of(rows: int, hidden: int, dtype: torch.dtype, seed: int = 21) -> Stream:
    """As `linear_residual` leaves it."""
    residual, gain = 3 * numbers(rows, hidden, seed=seed), 1 + 0.1 * numbers(hidden, seed=seed + 1)
    residual = residual.to(dtype)
    squares = residual.float().square().view(rows, hidden // 32, 32).sum(2)
    return Stream(residual, (residual.float() * gain).to(dtype), squares)


def space_of(floats: int = 1 << 17, tickets: int = 1 << 10) -> SplitSpace:
    return SplitSpace(torch.full((floats,), torch.nan), torch.zeros(tickets, dtype=torch.int32))


def forced(end: str, weight: Weight, tile: Tile) -> AbstractContextManager[None]:
    key = (end, weight.scheme.replace("fp16", "bf16"), weight.out_features, weight.in_features)
    return tuned.using(tuned.Table(tiles={key: ((1 << 20, tile),)}))


def product_of(x: Tensor, weight: Weight, rstd: Tensor | None = None) -> Bounded:
    """rstd * (x @ weight.T) + bias. Each of the sums takes in_features roundings at the most; so do the squares."""
    matrix, bias = weight.dense().double(), 0 if weight.bias is None else weight.bias.double()
    factor = 1 if rstd is None else rstd
    size = factor * (x.double().abs() @ matrix.abs().T) + (0 if weight.bias is None else bias.abs())
    return Bounded(factor * (x.double() @ matrix.T) + bias, size * (2 * weight.in_features + 16) * 2.0**-24)


def rstd_of(stream: Stream) -> Tensor:
    return torch.rsqrt(stream.squares.double().sum(1, keepdim=True) / stream.residual.shape[1] + EPS)


def tiles_of(rows: int, dtype: torch.dtype, features: tuple[int, ...]) -> list[Tile]:
    """Two of four, by the number of rows and the type: blocks of rows of two sizes, both orders of the operands, one to
    four splits, blocks of the inner dimension that leave a remainder."""
    several = [Tile(16, features[0], 64, 4, 2), Tile(32, features[-1], 32, 4, 2, splits=2, swap=True),
               Tile(16, features[-1], 128, 4, 2, splits=3, swap=True), Tile(16, features[0], 32, 4, 2, splits=4)]
    chosen = several[(rows + DTYPES.index(dtype)) % 2 :: 2]
    return chosen if dtype != torch.float32 else [tile._replace(swap=False) for tile in chosen]


def in_turns(*sizes: tuple) -> list[tuple]:
    """Each size in two of the types, which take turns."""
    return [(*size, DTYPES[(index + more) % 3]) for index, size in enumerate(sizes) for more in (0, 1)]


@pytest.mark.parametrize("rows, hidden, in_features, dtype", in_turns(
    (1, 96, 160), (4, 96, 1000), (17, 96, 544), (33, 96, 160)))
def test_linear_residual(rows, hidden, in_features, dtype):
    x, gain = numbers(rows, in_features, seed=1, dtype=dtype), 1 + 0.1 * numbers(hidden, seed=2)
    for tile in tiles_of(rows, dtype, (32, 64)):
        weight = weight_of(hidden, in_features, dtype, bias=tile.splits > 2)
        before = numbers(rows, hidden, seed=3, dtype=dtype)
        stream = Stream(before.clone(), *(torch.full_like(before, torch.nan), torch.full((rows, hidden // 32),
                                                                                       torch.nan)))
        space = space_of()
        with forced("residual", weight, tile):
            skinny.linear_residual(x, weight, gain, stream, space)
        product = product_of(x, weight)
        Bounded(before.double() + product.exact, product.bound + before.abs() * 2.0**-24).holds(stream.residual)
        stored = stream.residual.double()
        Bounded(stored * gain.double(), torch.zeros_like(stored)).holds(stream.scaled)
        squares = stored.square().view(rows, -1, 32).sum(2)
        Bounded(squares, squares * 32 * 2.0**-24).holds(stream.squares)
        assert not space.tickets.any()
        wanted = stream._replace(residual=before.clone(), scaled=torch.empty_like(before),
                                 squares=torch.empty_like(stream.squares))
        linear_residual_reference(x, weight, gain, wanted, space)
        Bounded(wanted.residual.double(), product.bound + wanted.residual.abs() * torch.finfo(dtype).eps).holds(
            stream.residual)


@pytest.mark.parametrize("rows, hidden, features, dtype", in_turns(
    (1, 96, 100), (5, 160, 37), (18, 96, 64), (33, 160, 70)))
def test_linear_normed(rows, hidden, features, dtype):
    stream = stream_of(rows, hidden, dtype)
    for tile in tiles_of(rows, dtype, (32, 64)):
        weight = weight_of(features, hidden, dtype, bias=tile.splits > 2)
        wanted = product_of(stream.scaled, weight, rstd_of(stream))
        for out_dtype in {torch.float32, dtype}:
            out, space = torch.full((rows, features), torch.nan, dtype=out_dtype), space_of()
            with forced("normed", weight, tile):
                skinny.linear_normed(stream, weight, EPS, out, space)
            wanted.holds(out)
            assert not space.tickets.any()
    linear_normed_reference(stream, weight, EPS, out, space)
    wanted.holds(out)


@pytest.mark.parametrize("rows, hidden, intermediate, dtype", in_turns(
    (1, 96, 50), (5, 160, 37), (18, 96, 64), (33, 160, 35)))
def test_linear_swiglu(rows, hidden, intermediate, dtype):
    stream = stream_of(rows, hidden, dtype)
    for tile in tiles_of(rows, dtype, (32, 64)):
        weight = weight_of(2 * intermediate, hidden, dtype, bias=tile.splits > 2)
        product = product_of(stream.scaled, weight, rstd_of(stream))
        (gate, up), (off_gate, off_up) = product.exact.chunk(2, 1), product.bound.chunk(2, 1)
        exact = torch.nn.functional.silu(gate) * up
        # silu's slope is below 1.1; its exponential and division cost some roundings more.
        bound = 1.1 * off_gate * up.abs() + (gate.abs() + off_gate) * off_up + exact.abs() * 16 * 2.0**-24
        out, space = torch.full((rows, intermediate), torch.nan, dtype=dtype), space_of()
        with forced("swiglu", weight, tile):
            skinny.linear_swiglu(stream, weight, EPS, out, space)
        Bounded(exact, bound).holds(out)
        assert not space.tickets.any()
    linear_swiglu_reference(stream, weight, EPS, out, space)
    Bounded(exact, bound).holds(out)


@pytest.mark.parametrize("rows, in_features, features, dtype", in_turns((1, 160, 37), (18, 1000, 40), (33, 544, 64)))
def test_plain(rows, in_features, features, dtype):
    x = numbers(rows, in_features, seed=1, dtype=dtype)
    for tile in tiles_of(rows, dtype, (16, 64)):
        weight = weight_of(features, in_features, dtype, bias=tile.swap)
        out = torch.full((rows, features), torch.nan, dtype=dtype)
        with forced("plain", weight, tile._replace(splits=1)):
            skinny.plain(x, weight, out)
        product_of(x, weight).holds(out)
    linear_reference(x, weight, out)
    Bounded(out.double(), product_of(x, weight).bound).holds(out)


class Heads(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


def rope_case(rows: int, shape: Heads, dtype: torch.dtype, into_slab: bool) -> tuple[Batch, Tensor, Tensor, LayerKV]:
    """Rows that are written to slots in no order, some of them nowhere."""
    draw = torch.Generator().manual_seed(rows)
    slots = torch.randperm(64, generator=draw)[:rows].int()
    slots[1::3] = -1
    positions = torch.randint(0, 90, (rows,), generator=draw).int()
    none = torch.zeros(0, dtype=torch.int32)
    batch = Batch(torch.zeros(rows, dtype=torch.int32), positions, slots, into_slab, none, none, none[None], none, none,
                  none)
    angle = torch.rand(90, shape.head_dim // 2, generator=draw) * 6.3
    kv = LayerKV(*(torch.full((64, shape.kv_heads, shape.head_dim), 7.0, dtype=dtype) for _ in range(4)), 16)
    return batch, angle.cos(), angle.sin(), kv


@pytest.mark.parametrize("rows, hidden, shape, qk_norm, features, dtype", in_turns(
    (1, 96, Heads(4, 2, 16), False, (16, 16)), (5, 160, Heads(2, 1, 80), True, (32, 128)),
    (17, 96, Heads(2, 1, 48), True, (32, 64)), (33, 64, Heads(3, 1, 32), False, (16, 32)),
    (5, 96, Heads(2, 1, 96), False, (64, 128)), (2, 96, Heads(1, 1, 64), True, (32, 64)),
    (2, 64, Heads(1, 1, 256), True, (128, 256))))
def test_qkv_rope(rows, hidden, shape, qk_norm, features, dtype):
    """Heads in one tile, in several and in one wider than they are; the last halves of tiles of 80 and 48 are empty."""
    heads, kv_heads, head_dim = shape
    stream = stream_of(rows, hidden, dtype)
    norms = (1 + 0.1 * numbers(head_dim, seed=5), 1 + 0.1 * numbers(head_dim, seed=6)) if qk_norm else (None, None)
    for index, tile in enumerate(tiles_of(rows, dtype, features)):
        batch, cos, sin, kv = rope_case(rows, shape, dtype, into_slab=index % 2 == 0)
        weight = weight_of((heads + 2 * kv_heads) * head_dim, hidden, dtype, bias=tile.splits != 2)
        q, space = torch.full((rows, heads, head_dim), torch.nan, dtype=dtype), space_of()
        with forced("qkv", weight, tile):
            skinny.qkv_rope(stream, weight, EPS, batch, cos, sin, kv, q, *norms, space)
        assert not space.tickets.any()
        product = product_of(stream.scaled, weight, rstd_of(stream))
        exact, off = (one.view(rows, -1, head_dim) for one in product)
        if qk_norm:
            # A head is off by its own error over its size, twice: once in the number, once in the size.
            size = (exact[:, : heads + kv_heads].square().mean(2, keepdim=True) + EPS).sqrt()
            gain = torch.cat([norms[0].expand(heads, -1), norms[1].expand(kv_heads, -1)]).double()
            turned = exact[:, : heads + kv_heads] / size * gain
            relative = off[:, : heads + kv_heads].amax(2, keepdim=True) / size + 2.0**-20
            off = relative * (gain.abs() + turned.abs())
        else:
            turned = exact[:, : heads + kv_heads]
            off = off[:, : heads + kv_heads]
        c, s = (one[batch.positions.long()].double()[:, None] for one in (cos, sin))
        low, high = turned.chunk(2, 2)
        turned = torch.cat([low * c - high * s, high * c + low * s], 2)
        off = (sum(off.chunk(2, 2)) + (low.abs() + high.abs()) * 4 * 2.0**-24).repeat(1, 1, 2)
        Bounded(turned[:, :heads], off[:, :heads]).holds(q)
        written = batch.slots >= 0
        slots = batch.slots[written].long()
        keys, values = (kv.k_slabs, kv.v_slabs) if batch.into_slab else (kv.k_pages, kv.v_pages)
        Bounded(turned[written, heads:], off[written, heads:]).holds(keys[slots])
        value = Bounded(*(one.view(rows, -1, head_dim)[written, heads + kv_heads :] for one in product))
        value.holds(values[slots])
        untouched = torch.ones(64, dtype=torch.bool)
        untouched[slots] = False
        others = (kv.k_pages, kv.v_pages) if batch.into_slab else (kv.k_slabs, kv.v_slabs)
        assert all(bool((cache[untouched] == 7).all()) for cache in (keys, values))
        assert all(bool((cache == 7).all()) for cache in others)
    # The reference in float32 is held to the same bounds.
    batch, cos, sin, kv = rope_case(rows, shape, dtype, into_slab=False)
    qkv_rope_reference(stream, weight, EPS, batch, cos, sin, kv, q, *norms, space)
    Bounded(turned[:, :heads], off[:, :heads]).holds(q)
    Bounded(turned[written, heads:], off[written, heads:]).holds(kv.k_pages[slots])


@pytest.mark.parametrize("dtype, stored", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                           (torch.float16, torch.float32)])
@pytest.mark.parametrize("rows, hidden", [(1, 96), (5, 1120), (3, 1024)])
def test_embedding_scaled(rows, hidden, dtype, stored):
    table = Weight(numbers(17, hidden, seed=1, dtype=stored), None, 17, hidden)
    gain, tokens = 1 + 0.1 * numbers(hidden, seed=2), torch.tensor([16, 0, 3, 3, 9][:rows], dtype=torch.int32)

    def fresh() -> Stream:
        none = torch.full((2, rows, hidden), torch.nan, dtype=dtype)
        return Stream(*none, torch.full((rows, hidden // 32), torch.nan))

    got, wanted = fresh(), fresh()
    skinny.embedding_scaled(tokens, table, gain, got)
    embedding_scaled_reference(tokens, table, gain, wanted)
    assert torch.equal(got.residual, wanted.residual)
    Bounded(wanted.scaled.double(), torch.zeros(1)).holds(got.scaled)
    Bounded(wanted.squares.double(), wanted.squares * 32 * 2.0**-24).holds(got.squares)
    skinny.embedding_scaled(torch.full_like(tokens, 17), table, gain, got)  # outside the vocabulary
    assert all(bool(one.isnan().all()) for one in got)


def test_two_launches_give_the_same_bits():
    """From other remains in the room where parts meet."""
    weight, stream = weight_of(50, 256, torch.bfloat16, bias=True), stream_of(17, 256, torch.bfloat16)
    found, space = [], space_of()
    with forced("normed", weight, Tile(16, 32, 64, 4, 2, splits=4)):
        for remains in (torch.nan, 0.0, -1e30):
            space.partial.fill_(remains)
            skinny.linear_normed(stream, weight, EPS, out := torch.full((17, 50), torch.nan), space)
            found.append(out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_parts_are_added_in_their_order():
    """2**24 - 2**24 + 1 and not 1 + 2**24 - 2**24, which is 0 in float32: parts of one block of 32 each."""
    matrix = torch.zeros(32, 96)
    matrix[:, 0], matrix[:, 32], matrix[:, 64] = 2.0**24, -(2.0**24), 1.0
    weight = Weight(matrix, None, 32, 96)
    stream = Stream(*torch.ones(2, 16, 96), torch.full((16, 3), 32.0))
    with forced("normed", weight, Tile(16, 32, 32, 4, 2, splits=3)):
        skinny.linear_normed(stream, weight, 0.0, out := torch.full((16, 32), torch.nan), space_of())
    assert out.tolist() == [[1.0] * 32] * 16


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_default_tiles_in_the_room_that_is_reserved_for_them(dtype):
    """Every default tile up to 130 rows, in exactly the floats and tickets that `tuned.room` gives."""
    heads, kv_heads, head_dim = shape = Heads(2, 1, 48)
    hidden, scheme = 96, SCHEMES[dtype]
    inner = 288 if dtype == torch.float32 else 1056
    weights = {"qkv": weight_of(192, hidden, dtype, False), "swiglu": weight_of(100, hidden, dtype, False),
               "residual": weight_of(hidden, inner, dtype, False), "normed": weight_of(37, hidden, dtype, False)}
    floats, tickets = tuned.room(130, [
        tuned.Product(end, scheme, weight.out_features, weight.in_features, head_dim if end == "qkv" else 0)
        for end, weight in weights.items()])
    assert floats > 1 and tickets > 1
    space = space_of(floats, tickets)
    for rows in (1, 33) if dtype == torch.float32 else (1, 17, 33, 130):
        stream = stream_of(rows, hidden, dtype)
        batch, cos, sin, kv = rope_case(min(rows, 64), shape, dtype, True)
        if rows <= 64:
            q = torch.full((rows, heads, head_dim), torch.nan, dtype=dtype)
            skinny.qkv_rope(stream, weights["qkv"], EPS, batch, cos, sin, kv, q, None, None, space)
            assert q.isfinite().all()
        out = torch.full((rows, 50), torch.nan, dtype=dtype)
        skinny.linear_swiglu(stream, weights["swiglu"], EPS, out, space)
        assert out.isfinite().all()
        skinny.linear_normed(stream, weights["normed"], EPS, logits := torch.full((rows, 37), torch.nan), space)
        product_of(stream.scaled, weights["normed"], rstd_of(stream)).holds(logits)
        before = stream.residual.double()
        x = numbers(rows, inner, seed=rows, dtype=dtype)
        skinny.linear_residual(x, weights["residual"], torch.ones(hidden), stream, space)
        product = product_of(x, weights["residual"])
        Bounded(before + product.exact, product.bound + before.abs() * 2.0**-24).holds(stream.residual)
        assert not space.tickets.any()


def test_rows_of_deterministic_weights_do_not_depend_on_their_company():
    weight = weight_of(100, 1056, torch.bfloat16, bias=True, deterministic=True)
    whole = stream_of(130, 1056, torch.bfloat16)
    skinny.plain(whole.scaled, weight, together := torch.full((130, 100), torch.nan))
    for first, rows in ((0, 1), (129, 1), (20, 17), (60, 64)):
        part = whole.scaled[first : first + rows].contiguous()
        skinny.plain(part, weight, alone := torch.full((rows, 100), torch.nan))
        assert torch.equal(alone, together[first : first + rows])


def test_no_more_is_asked_for_ahead_than_a_part_has():
    """By hand: 1000 columns of 2 bytes in blocks of 128 are 7 whole blocks and 104 columns, in parts of 2 blocks each;
    the smallest part has one block and 104 columns, and what is asked for is a piece a thread, of 16 bytes at least."""
    tile = Tile(16, 64, 128, 4, 4, splits=4, pdl=True, prefetch=4096)
    assert skinny._chunks(tile) == 2
    assert skinny._ahead(tile, 1000, 2000) == 2 * (128 + 104)
    assert skinny._ahead(tile._replace(prefetch=256), 1000, 2000) == 256
    assert skinny._ahead(tile._replace(prefetch=31), 1000, 2000) == 0
    assert skinny._ahead(tile, 1024, 512) == 128  # four bits each
    assert skinny._ahead(tile, 1001, 2002) == 0  # rows that do not begin at a multiple of 16 bytes


def test_what_does_not_fit_is_refused():
    stream, weight = stream_of(5, 96, torch.float32), weight_of(64, 96, torch.float32, bias=False)
    out = torch.empty(5, 64)
    with forced("normed", weight, Tile(16, 32, 32, 4, 2, splits=2)):
        with pytest.raises(ValueError, match="meet in 2048 numbers and 2 tickets: reserve what `tuned.room` says"):
            skinny.linear_normed(stream, weight, EPS, out, space_of(2047, 2))
        skinny.linear_normed(stream, weight, EPS, out, space_of(2048, 2))
    with pytest.raises(ValueError, match="out is \\[5, 63\\], expected \\[5, 64\\]"):
        skinny.linear_normed(stream, weight, EPS, torch.empty(5, 63), space_of())
    with pytest.raises(ValueError, match="x is torch.bfloat16 and the weight torch.float32"):
        skinny.linear_normed(stream._replace(scaled=stream.scaled.bfloat16()), weight, EPS, out, space_of())
    with pytest.raises(ValueError, match="takes contiguous tensors: x, scaled"):
        skinny.linear_normed(stream._replace(scaled=numbers(96, 5, seed=1).T), weight, EPS, out, space_of())
    with pytest.raises(ValueError, match="squares are \\[5, 3\\] beside a residual of .*, expected one for 32"):
        skinny.linear_normed(stream._replace(residual=torch.empty(5, 95)), weight, EPS, out, space_of())
    with pytest.raises(ValueError, match="rows of 64 beside a weight of 96"):
        skinny.linear_residual(torch.ones(5, 64), weight_of(96, 96, torch.float32, False), torch.ones(96), stream,
                               space_of())
    skinny.linear_normed(Stream(*(one[:0] for one in stream)), weight, EPS, out[:0], space_of())  # nothing to do


run_in_interpreter(globals())
