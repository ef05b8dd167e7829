"""Attention over pages and slabs on the device: against float64, and the same bits in any company."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from compare import same, within
from launchers import launchers
from parallel import run_apart
from record import Record, Settings
from torch import Tensor

from stars.kernels.triton import tiles as tiling
from stars.kernels.types import Batch, LayerKV

SLAB_LEN = 48


class Span(NamedTuple):
    """One sequence of a batch."""

    group: int
    prefix: int
    slab_used: int
    count: int


# Shared pages with prefixes of different lengths, no prefix, page boundaries and one short of and past them.
DRAFT = [Span(0, 37, 5, 1), Span(0, 37, 5, 1), Span(0, 35, 0, 1), Span(1, 0, 0, 1), Span(2, 123, 33, 1),
         Span(3, 16, 1, 1), Span(4, 15, 0, 1), Span(5, 17, 2, 1)]
LONG = [Span(0, 1500, 20, 1)] * 5 + [Span(1, 777, 0, 1)]
SCORING = [Span(0, 37, 0, 3), Span(0, 33, 2, 17), Span(1, 1, 0, 1), Span(2, 64, 15, 5)]
PREFILL = [Span(0, 0, 0, 37), Span(1, 17, 0, 15), Span(2, 63, 0, 1), Span(3, 0, 0, 1)]
KINDS = {"draft": (DRAFT, True), "draft, long": (LONG, True), "scoring": (SCORING, True), "prefill": (PREFILL, False)}
PASSES = {"draft": "draft", "draft, long": "draft", "scoring": "score", "prefill": "prefill"}


class Case(NamedTuple):
    """Inputs of one launch; what no row may see is NaN."""

    q: Tensor
    kv: LayerKV
    batch: Batch
    spans: list[Span]


def make_case(spans: list[Span], into_slab: bool, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
              device: str, page_size: int = 16, seed: int = 0, made_on: str = "cpu") -> Case:
    """Queries, a cache with shuffled pages, and a batch. made_on: where the numbers are drawn."""
    shuffle, draw = torch.Generator().manual_seed(seed), torch.Generator(made_on).manual_seed(seed)
    longest = max(span.prefix + (0 if into_slab else span.count) for span in spans)
    groups, pages = max(span.group for span in spans) + 1, longest // page_size + 1
    tables = torch.randperm(groups * pages, generator=shuffle).int().view(groups, pages)
    cache = [torch.full((groups * pages * page_size, kv_heads, head_dim), math.nan, device=made_on) for _ in range(2)]
    cache += [torch.full((len(spans) * SLAB_LEN, kv_heads, head_dim), math.nan, device=made_on) for _ in range(2)]
    starts = [0]
    for group in range(groups):
        at = torch.arange(max(span.prefix + (0 if into_slab else span.count) for span in spans if span.group == group))
        rows = tables[group].long()[at // page_size] * page_size + at % page_size
        for pages_of in cache[:2]:
            pages_of[rows.to(made_on)] = torch.randn(len(at), kv_heads, head_dim, generator=draw, device=made_on)
    for index, span in enumerate(spans):
        starts.append(starts[-1] + span.count)
        if into_slab:
            slab = slice(index * SLAB_LEN, index * SLAB_LEN + span.slab_used + span.count)
            for slabs in cache[2:]:
                slabs[slab] = torch.randn(slab.stop - slab.start, kv_heads, head_dim, generator=draw, device=made_on)
    q = torch.randn(starts[-1], heads, head_dim, generator=draw, device=made_on)

    def ints(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    none = ints([0] * starts[-1])
    batch = Batch(none, none, none, into_slab, ints(starts), ints([span.group for span in spans]), tables.to(device),
                  ints([span.prefix for span in spans]), ints([i * SLAB_LEN for i in range(len(spans))]),
                  ints([span.slab_used for span in spans]))
    return Case(q.to(device, dtype), LayerKV(*(part.to(device, dtype) for part in cache), page_size), batch, spans)


def plain(case: Case, window: int | None, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """From the definition at `Batch`, sequence by sequence, every operation of torch in `dtype`."""
    q, kv, batch, _ = case
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    starts, tables = batch.row_start.tolist(), batch.block_tables.long()
    for index, span in enumerate(case.spans):
        rows = slice(starts[index], starts[index + 1])
        at = torch.arange(span.prefix + (0 if batch.into_slab else span.count), device=q.device)
        in_pages = tables[span.group][at // kv.page_size] * kv.page_size + at % kv.page_size
        keys, values = kv.k_pages[in_pages], kv.v_pages[in_pages]
        if batch.into_slab:
            slab = slice(index * SLAB_LEN, index * SLAB_LEN + span.slab_used + span.count)
            keys, values = torch.cat((keys, kv.k_slabs[slab])), torch.cat((values, kv.v_slabs[slab]))
        repeat = q.shape[1] // keys.shape[1]
        keys, values = (part.to(dtype).repeat_interleave(repeat, 1).transpose(0, 1) for part in (keys, values))
        scores = q[rows].to(dtype).transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5  # [heads, rows, keys]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        count = keys.shape[1]
        distance = (torch.arange(count - span.count, count, device=q.device)[:, None]
                    - torch.arange(count, device=q.device)[None, :])
        unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        out[rows] = (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    return out


def launched(ops, case: Case, window: int | None = None, softcap: float | None = None) -> Tensor:
    """The kernel's output, over NaN."""
    out = torch.full_like(case.q, math.nan)
    ops.attention(case.q, case.kv, case.batch, case.q.shape[-1] ** -0.5, out, window, softcap)
    return out


def run(record: Record, settings: Settings) -> None:
    """The kinds of pass in bfloat16 at the usual head sizes, ratios of heads, windows and softcaps; float32; bits."""
    bf16, fp32 = torch.bfloat16, torch.float32
    parts = {
        "bfloat16, 128": [Launch(kind, bf16, 128, (32, 8)) for kind in KINDS],
        "ratios of heads": [Launch("draft", bf16, 128, heads) for heads in ((4, 4), (8, 2), (16, 1))],
        "windows and softcaps": [Launch(kind, bf16, 128, window=33, softcap=50.0) for kind in KINDS],
        "float32": [Launch(kind, fp32, 64) for kind in ("draft", "scoring")]}
    if not settings.quick:
        parts |= {"64": [Launch(kind, bf16, 64) for kind in KINDS],
                  "windows": [Launch(kind, bf16, 128, window=20) for kind in KINDS]}
    checks = {name: partial(_check_all, launches=launches) for name, launches in parts.items()}
    if not settings.dry:
        checks |= {f"bits, {kind}": partial(_bits, kind=kind) for kind in ("draft", "draft, long", "scoring")}
    run_apart(record, settings, checks, most=3)


def more(record: Record, settings: Settings) -> None:
    """The other head sizes and types, softcaps alone, float32 with everything."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    parts = {str(head_dim): [Launch(kind, bf16, head_dim) for kind in KINDS] for head_dim in (80, 256, 96)}
    parts["float16"] = [Launch(kind, fp16, 128) for kind in KINDS]
    parts["float32"] = [Launch(kind, fp32, 128) for kind in KINDS]
    parts["float32 with all"] = [Launch("scoring", fp32, head_dim, (4, 2), 20, 30.0) for head_dim in (80, 256)]
    parts["softcaps"] = [Launch(kind, bf16, 128, softcap=30.0) for kind in KINDS]
    run_apart(record, settings, {name: partial(_check_all, launches=launches) for name, launches in parts.items()},
              most=4)


def _check_all(record: Record, settings: Settings, launches: list[Launch]) -> None:
    ops = launchers(settings.dry)
    for launch in launches:
        check(record, settings, ops, launch)


class Launch(NamedTuple):
    kind: str
    dtype: torch.dtype
    head_dim: int
    heads: tuple[int, int] = (8, 2)  # of queries, of keys
    window: int | None = None
    softcap: float | None = None


def check(record: Record, settings: Settings, ops, launch: Launch) -> None:
    kind, dtype, head_dim, heads, window, softcap = launch
    name = f"attention {kind}, {str(dtype)[6:]}, {head_dim}, heads {heads[0]}/{heads[1]}"
    name += "" if window is None else f", window {window}"
    name += "" if softcap is None else f", softcap {softcap:g}"
    with record.checking(name):
        case = make_case(*KINDS[kind], *heads, head_dim, dtype, settings.device)
        starts = case.batch.row_start.tolist()
        case = with_plan(case, tiling.plan(starts[-1], starts, _groups(case), PASSES[kind], heads[0] // heads[1],
                                           head_dim, dtype == torch.float32, 4096), PASSES[kind])
        exact, theirs = plain(case, window, softcap, torch.float64), plain(case, window, softcap, dtype)
        within(record, name, launched(ops, case, window, softcap), theirs, exact)


def _bits(record: Record, settings: Settings, kind: str) -> None:
    """Ranges of 64 keys to all, and narrow and wide tiles, agree with float64; under a deterministic plan a sequence
    alone has the same bits."""
    ops, device = launchers(settings.dry), settings.device
    spans, into_slab = KINDS[kind]
    case = make_case(spans, into_slab, 8, 2, 128, torch.bfloat16, device)
    exact, theirs = plain(case, None, None, torch.float64), plain(case, None, None, torch.bfloat16)
    for width in (16, 64, 128):
        for split_keys in (128, 256, 1024, 0):
            plan = tiling.Plan(width, tiling.lanes(width, PASSES[kind], 128, False), split_keys)
            name = f"attention {kind}, tiles of {width}, ranges of {split_keys or 'any'} keys"
            within(record, name, launched(ops, with_plan(case, plan, PASSES[kind])), theirs, exact)
    starts, groups = case.batch.row_start.tolist(), _groups(case)
    plan = tiling.plan(starts[-1], starts, groups, PASSES[kind], 4, 128, False, 4096, deterministic=True)
    together = launched(ops, with_plan(case, plan, PASSES[kind]))
    for index, span in enumerate(spans):
        batch = case.batch
        rows = slice(starts[index], starts[index + 1])
        one = batch._replace(
            row_start=torch.tensor([0, span.count], dtype=torch.int32, device=device),
            seq_group=batch.seq_group[index : index + 1] * 0,
            block_tables=batch.block_tables[span.group : span.group + 1],
            prefix_len=batch.prefix_len[index : index + 1], slab_start=batch.slab_start[index : index + 1],
            slab_used=batch.slab_used[index : index + 1])
        alone = Case(case.q[rows].contiguous(), case.kv, one, [span._replace(group=0)])
        same(record, f"attention {kind}, sequence {index} alone, deterministic plan",
             launched(ops, with_plan(alone, plan, PASSES[kind])), together[rows])


def with_plan(case: Case, plan: tiling.Plan, kind: tiling.Kind) -> Case:
    """The case under a given plan."""
    heads, head_dim = case.q.shape[1:]
    tiles = tiling.build_as(plan, case.batch.row_start.tolist(), _groups(case), kind, heads, case.kv.k_pages.shape[1],
                            head_dim, case.q.device)
    return case._replace(batch=case.batch._replace(tiles=tiles))


def _groups(case: Case) -> list[tiling.Group]:
    keys = [span.prefix + (0 if case.batch.into_slab else span.count) for span in case.spans]
    return tiling.groups_of([span.group for span in case.spans], keys)
