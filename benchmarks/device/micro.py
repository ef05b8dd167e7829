"""Every kernel but the products at the shapes of an 8B model: microseconds, bytes, and its share of the bandwidth.

Launches are captured in a graph and rotate through buffers that hold 256 MB together (at most 64 sets, so that small
ones, which real passes find in the cache too, still do: `beyond_l2` says which).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import kernel_prefill
import kernel_ranking
import torch
from kernel_attention import SLAB_LEN, Span, make_case, with_plan
from kernel_sampler import lane_state
from launchers import launchers
from record import Record, Settings
from rehearse import compile_first
from timing import Seconds, seconds_a_call, sets

from stars.kernels.linear import Weight
from stars.kernels.triton import tiles as tiling
from stars.kernels.types import Batch, Draft, LayerKV, TrailingRows

L2_BYTES = 60 << 20


class Shape(SimpleNamespace):
    """Sizes of the model whose kernels are measured."""


REAL = Shape(hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, layers=32, vocab=128256, lanes=64)
TOY = Shape(hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, layers=2, vocab=1000, lanes=4)


def run(record: Record, settings: Settings) -> None:
    """All of them, what has an aim first; where one fails, the others go on."""
    shape = TOY if settings.dry else REAL
    measures = (sampler, verdict, commit, ranking, attention, row_kernels, follow, prefill)
    compile_first(record, settings, [
        lambda silent, measure=measure: measure(silent, settings, launchers(settings.dry), shape)
        for measure in measures if measure.__name__ not in record.done])
    for measure in measures:
        record.part(measure.__name__, measure, record, settings, launchers(settings.dry), shape, least=1)


def _time(record: Record, settings: Settings, name: str, make: Callable[[int], Callable[[], object]], moved: float,
          aim: str = "", writes: bool = False, **detail) -> None:
    """Times `make(i)` over sets of buffers; `moved` bytes at least, which it reads, or with `writes` also writes."""
    count = sets(moved, settings.dry)
    seconds = seconds_a_call([make(index) for index in range(count)], settings.device)
    bandwidth, kind = (settings.copy_bandwidth, "copy") if writes else (settings.bandwidth, "read")
    record.figure(name, 1e6 * seconds, "us", None if bandwidth is None else 1e6 * moved / bandwidth,
                  f"its bytes at {kind} bandwidth", aim, bytes=moved, gb_s=moved / seconds / 1e9,
                  beyond_l2=count * moved > L2_BYTES, sets=count, spread=_us(seconds), **detail)


def _us(seconds: Seconds) -> list[float]:
    """The spread in microseconds."""
    return [1e6 * one for one in seconds.spread]


def attention(record: Record, settings: Settings, ops, shape: Shape) -> None:
    contexts = (64, 100) if settings.dry else (1024, 16384)
    for lanes in (1, 4) if settings.dry else (1, 16, 64):
        for context in contexts:
            _drafts(record, settings, ops, shape, lanes, context, True)
    if not settings.quick or settings.dry:
        _drafts(record, settings, ops, shape, 4 if settings.dry else 16, contexts[0], False)
        short, long = (7, contexts[0]) if settings.dry else (100, contexts[-1])
        spans = [Span(lane, short, 15, 1) for lane in range(3 if settings.dry else 15)]
        _attend(record, settings, ops, shape, [*spans, Span(len(spans), long, 15, 1)], True,
                f"attention, {len(spans)} lanes of {short} keys and one of {long}")
    # One scoring pass: a candidate, and four of them, of the token before the segment and its 32.
    for candidates in (1, 4):
        for context in contexts:
            rows = 4 if settings.dry else 33
            _attend(record, settings, ops, shape, [Span(0, context, 0, rows)] * candidates, True,
                    f"attention, scoring {candidates} x {rows} rows after {context}")
    chunk = 16 if settings.dry else 256
    _attend(record, settings, ops, shape, [Span(0, contexts[0], 0, chunk)], False,
            f"attention, prefill {chunk} rows after {contexts[0]}")


def _drafts(record: Record, settings: Settings, ops, shape: Shape, lanes: int, context: int, shared: bool) -> None:
    spans = [Span(0 if shared else lane, context, 15, 1) for lane in range(lanes)]
    _attend(record, settings, ops, shape, spans, True,
            f"attention, {lanes} lanes, {context} {'shared' if shared else 'own'} keys")


def _attend(record: Record, settings: Settings, ops, shape: Shape, spans: list[Span], into_slab: bool,
            name: str) -> None:
    groups = len({span.group for span in spans})
    in_pages = sum(max(s.prefix + (0 if into_slab else s.count) for s in spans if s.group == g) for g in range(groups))
    in_slabs = sum(span.slab_used + span.count for span in spans) if into_slab else 0
    rows = sum(span.count for span in spans)
    row = 2 * shape.heads * shape.head_dim
    read = 4 * shape.kv_heads * shape.head_dim * (in_pages + in_slabs) + 2 * rows * row
    case = make_case(spans, into_slab, shape.heads, shape.kv_heads, shape.head_dim, torch.bfloat16, settings.device,
                     made_on=settings.device)
    count = min(sets(read, settings.dry), 24)
    caches = [LayerKV(*(tensor.clone() for tensor in case.kv[:4]), case.kv.page_size) for _ in range(count)]
    starts = case.batch.row_start.tolist()
    keys = [span.prefix + (0 if into_slab else span.count) for span in spans]
    lanes = into_slab and max(span.count for span in spans) == 1
    kind = "draft" if lanes else "score" if into_slab else "prefill"
    plan = tiling.plan(rows, starts, tiling.groups_of([span.group for span in spans], keys), kind,
                       shape.heads // shape.kv_heads, shape.head_dim, False, 1 << 17)
    batch = with_plan(case, plan, kind).batch
    out = torch.empty_like(case.q)
    flops = sum(4 * shape.heads * shape.head_dim * span.count * (span.prefix + span.slab_used + span.count / 2)
                for span in spans)
    peak = settings.facts.get("matmul_tflop_s")
    _time(record, settings, name, lambda index: lambda: ops.attention(
        case.q, caches[index % count], batch, shape.head_dim**-0.5, out), read, flops=flops, width=plan.width,
        arithmetic_us=None if not peak else flops / peak / 1e6, slab_len=SLAB_LEN)


def prefill(record: Record, settings: Settings, ops, shape: Shape) -> None:
    kernel_prefill.times(record, settings, ops, shape.heads, shape.kv_heads, shape.head_dim)


def sampler(record: Record, settings: Settings, ops, shape: Shape) -> None:
    for dtype in (torch.float32,) if settings.quick else (torch.float32, torch.bfloat16):  # the engine's first
        size = shape.lanes * shape.vocab * dtype.itemsize
        rows = [(3 * torch.randn(shape.lanes, shape.vocab, device=settings.device)).to(dtype)
                for _ in range(min(16, sets(size, settings.dry)))]
        for name, top_k, top_p, cuts, aim in (
                ("temperature", 0, 1.0, False, "sampler"),
                ("top-k 50 and top-p 0.9", 50, 0.9, False, "sampler-filters"),
                ("temperature, cuts", 0, 1.0, True, "sampler-cuts"),
                ("top-k 50 and top-p 0.9, cuts", 50, 0.9, True, ""),
                ("top-k 50", 50, 1.0, False, ""), ("top-p 0.9", 0, 0.9, False, "")):
            state = lane_state(shape.lanes, settings.device, steps=1 << 12)
            state.temperature.fill_(0.8)
            state.top_k.fill_(top_k)
            state.top_p.fill_(top_p)
            state.min_p.zero_()
            if cuts:  # that no entropy reaches
                state.entropy_cut.fill_(100.0)
            filters = name != "temperature"  # as the engine calls it, with cuts too
            _time(record, settings, f"sample_step, {shape.lanes} lanes, {shape.vocab} tokens, {str(dtype)[6:]}, {name}",
                  lambda index, state=state, rows=rows, filters=filters, cuts=cuts: lambda: ops.sample_step(
                      rows[index % len(rows)], state, filters=filters, cuts=cuts), size,
                  aim if dtype == torch.float32 else "")


def verdict(record: Record, settings: Settings, ops, shape: Shape) -> None:
    lanes, device = shape.lanes, settings.device
    size = 2 * lanes * shape.hidden * 2
    count = sets(size, settings.dry)
    pairs = [[torch.randn(lanes, shape.hidden, device=device).bfloat16() for _ in range(2)] for _ in range(count)]
    weight = torch.randn(shape.hidden, device=device)
    head = Weight(torch.randn(1, shape.hidden, device=device), None, 1, shape.hidden)
    hidden, rewards = torch.empty(lanes, shape.hidden, device=device), torch.empty(lanes, device=device)
    seconds = seconds_a_call([lambda pair=pair: ops.score(*pair, weight, 1e-6, head, hidden, rewards)
                              for pair in pairs], device)
    record.figure(f"score_and_decide, {lanes} lanes of {shape.hidden}", 1e6 * seconds, "us", 10.0, "10 us", "score",
                  bytes=size, spread=_us(seconds))


def ranking(record: Record, settings: Settings, ops, shape: Shape) -> None:
    """Ten tokens of every lane, as ARGS asks for them: of all lanes, a few and one, as they are captured."""
    for lanes, top_p, aim in ((shape.lanes, 1.0, "ranking"), (shape.lanes, 0.9, ""), (8, 1.0, ""), (1, 1.0, "")):
        rows = [3 * torch.randn(lanes, shape.vocab, device=settings.device)
                for _ in range(min(4, sets(4 * lanes * shape.vocab, settings.dry)))]
        given = kernel_ranking.ranking(lanes, settings.device, ranks=10)
        given.ranks.fill_(10)
        given.temperature.fill_(0.8)
        given.top_k.zero_()
        given.top_p.fill_(top_p)
        given.min_p.zero_()
        seconds = seconds_a_call([lambda one=one, given=given, filters=top_p < 1: ops.top_tokens(one, given, filters)
                                  for one in rows], settings.device)
        name = f"top_tokens, {lanes} lanes, {shape.vocab} tokens, 10 of each{'' if top_p == 1 else f', top-p {top_p}'}"
        record.figure(name, 1e6 * seconds, "us", 500.0, "500 us", aim, bytes=4 * lanes * shape.vocab,
                      spread=_us(seconds))


def follow(record: Record, settings: Settings, ops, shape: Shape) -> None:
    lanes, tokens, device = shape.lanes, 32, settings.device

    def ints(*shape_of: int) -> torch.Tensor:
        return torch.zeros(shape_of, dtype=torch.int32, device=device)

    draft = Draft(ints(lanes, tokens), ints(lanes) + tokens, ints(lanes, 16) - 1)
    starts = torch.arange(0, lanes * (tokens + 2) + 1, tokens + 2, dtype=torch.int32, device=device)
    trailing = TrailingRows(torch.arange(lanes, dtype=torch.int32, device=device), starts, ints(lanes, 1),
                            ints(lanes * (tokens + 2)), ints(lanes))
    seconds = seconds_a_call([lambda: ops.append_draft(draft, trailing, shape.vocab)], device)
    record.figure(f"append_draft, {lanes} segments of {tokens}", 1e6 * seconds, "us",
                  spread=_us(seconds))


def commit(record: Record, settings: Settings, ops, shape: Shape) -> None:
    tokens, size = 32, 1024
    moved = 4 * shape.layers * tokens * shape.kv_heads * shape.head_dim * 2
    pairs = [[torch.randn(shape.layers, size, shape.kv_heads, shape.head_dim, device=settings.device).bfloat16()
              for _ in range(4)] for _ in range(2)]

    def make(index: int) -> Callable[[], object]:
        k_source, v_source, k_target, v_target = pairs[index % 2]
        order = torch.Generator().manual_seed(index)
        source, target = (torch.randperm(size, generator=order)[:tokens].int().to(settings.device) for _ in range(2))
        return lambda: ops.copy_rows(k_source, v_source, source, k_target, v_target, target)

    seconds = seconds_a_call([make(index) for index in range(2 if settings.dry else 16)], settings.device)
    record.figure(f"commit of {tokens} tokens, {shape.layers} layers", 1e6 * seconds, "us", 10.0, "10 us", "commit",
                  bytes=moved, spread=_us(seconds), gb_s=moved / seconds / 1e9)


def row_kernels(record: Record, settings: Settings, ops, shape: Shape) -> None:
    device = settings.device
    weight = torch.ones(shape.hidden, device=device)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    angles = torch.randn(4096, shape.head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    for rows in (1, 64) if settings.quick else (1, 64, 256):
        def some(columns: int, read: float, rows: int = rows) -> list[torch.Tensor]:
            return [torch.randn(rows, columns, device=device).bfloat16() for _ in range(sets(read, settings.dry))]

        size = 4 * rows * shape.hidden * 2
        x, residual = some(shape.hidden, size), some(shape.hidden, size)
        out = torch.empty_like(x[0])
        _time(record, settings, f"rms_norm with residual, {rows} rows",
              lambda i, x=x, r=residual, out=out: lambda: ops.rms_norm(x[i], weight, 1e-5, out, r[i]), size,
              writes=True)
        size = 3 * rows * shape.intermediate * 2
        gate_up = some(2 * shape.intermediate, size)
        gated = torch.empty(rows, shape.intermediate, device=device, dtype=torch.bfloat16)
        _time(record, settings, f"swiglu, {rows} rows",
              lambda i, g=gate_up, out=gated: lambda: ops.swiglu(g[i], out), size, writes=True)
        size = 2 * rows * width * 2
        qkv = some(width, size)
        at = torch.arange(rows, dtype=torch.int32, device=device)
        batch = Batch(at, at, at, True, at, at, at[None], at, at, at)
        cache = LayerKV(*(torch.empty(512, shape.kv_heads, shape.head_dim, device=device, dtype=torch.bfloat16)
                          for _ in range(4)), 16)
        q = torch.empty(rows, shape.heads, shape.head_dim, device=device, dtype=torch.bfloat16)

        def rope(index: int, qkv=qkv, batch=batch, q=q, cache=cache) -> Callable[[], object]:
            return lambda: ops.rope_write(qkv[index], batch, cos, sin, cache, q)

        _time(record, settings, f"rope_write, {rows} rows", rope, size, writes=True)
