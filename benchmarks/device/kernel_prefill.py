"""Long prompts through the libraries that are installed: against float64, and their time beside our own kernel's."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from compare import within
from kernel_attention import PREFILL, Case, Span, make_case, plain
from record import Record, Settings
from timing import median_seconds

from stars.kernels import prefill_attention
from stars.kernels.prefill_attention import BACKENDS, Prefill
from stars.kernels.triton import tiles as tiling

CHUNKS = [Span(0, 0, 0, 300), Span(1, 130, 0, 129), Span(2, 511, 0, 2)]


def run(record: Record, settings: Settings) -> None:
    """Ragged prompts, later chunks, windows and softcaps in each backend that takes them."""
    record.part("backends", backends, record, settings)


def backends(record: Record, settings: Settings) -> None:
    """Those that are here."""
    heads = ((8, 2),) if settings.quick else ((8, 2), (4, 4))
    for backend in usable(record, settings):
        for spans in (PREFILL, CHUNKS):
            for window, softcap in ((None, None), (40, None), (None, 30.0)):
                if softcap is not None and not backend.startswith("flash"):
                    continue
                for queries, keys in heads:
                    name = f"prefill, {backend}, {len(spans)} prompts, heads {queries}/{keys}, window {window}"
                    name += f", softcap {softcap}"
                    with record.checking(name):
                        case = make_case(spans, False, queries, keys, 128, torch.bfloat16, settings.device)
                        exact, theirs = (plain(case, window, softcap, dtype) for dtype in (torch.float64,
                                                                                         torch.bfloat16))
                        within(record, name, attended(case, backend, window, softcap), theirs, exact)


def usable(record: Record, settings: Settings) -> list[str]:
    """The libraries that are here and serve this card; torch's SDPA also without one."""
    if settings.dry:
        return ["sdpa"]
    case = prefill_attention.Case(torch.cuda.get_device_capability(), torch.bfloat16, 128)
    found = []
    for name in BACKENDS:
        try:
            found.append(prefill_attention.choose_backend(case, name))
        except prefill_attention.BackendError as error:
            record.note(str(error))
    return found


def prefill_of(case: Case, backend: str) -> Prefill:
    """What the engine's passes would build for this batch."""
    tables = case.batch.block_tables.tolist()
    return prefill_attention.build(backend, [tables[span.group] for span in case.spans],
                                   [span.prefix for span in case.spans], [span.count for span in case.spans],
                                   case.kv.page_size, case.q.device)


def attended(case: Case, backend: str, window: int | None, softcap: float | None) -> torch.Tensor:
    """The backend's output, over NaN."""
    out = torch.full_like(case.q, math.nan)
    prefill_attention.prefill_attention(case.q, case.kv, prefill_of(case, backend), case.q.shape[-1] ** -0.5, out,
                                        window, softcap)
    return out


def times(record: Record, settings: Settings, ops: SimpleNamespace, heads: int, kv_heads: int, head_dim: int) -> None:
    """Each backend beside our own kernel; host time included, as the engine pays it: these passes are not captured."""
    backends = usable(record, settings)
    peak = settings.facts.get("matmul_tflop_s")
    for rows, prefix in ((16, 16),) if settings.dry else ((512, 1024), (2048, 14336)):
        case = make_case([Span(0, prefix, 0, rows)], False, heads, kv_heads, head_dim, torch.bfloat16, settings.device,
                         made_on=settings.device)
        tiles = tiling.build(case.batch, heads, kv_heads, head_dim, case.kv.page_size, float32=False)
        case = case._replace(batch=case.batch._replace(tiles=tiles))
        out = torch.empty_like(case.q)
        scale = head_dim**-0.5
        flops = 4 * heads * head_dim * rows * (prefix + rows / 2)

        def through(backend: str, case=case, out=out, scale=scale) -> Callable[[], object]:
            prefill = prefill_of(case, backend)
            return lambda: prefill_attention.prefill_attention(case.q, case.kv, prefill, scale, out)

        def ours(case=case, out=out, scale=scale) -> None:
            ops.attention(case.q, case.kv, case.batch, scale, out)

        for name, call in ({"triton": ours} | {name: through(name) for name in backends}).items():
            seconds = median_seconds(call, settings.device, 5, 2)
            record.figure(f"attention of {rows} prompt rows after {prefix}, {name}", 1e6 * seconds, "us",
                          flops / peak / 1e6 if peak else None, "measured bf16 product", flops=flops,
                          spread=[1e6 * one for one in seconds.spread])
