"""First light: one kernel of each file beside its reference, and a small model through the whole engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import engine_checks
import kernel_attention
import kernel_fused
import kernel_prefill
import kernel_products
import kernel_ranking
import kernel_rows
import kernel_sampler
import torch
from launchers import launchers
from parallel import Part, run_apart
from record import Record, Settings

BF16 = torch.bfloat16


def kernels(record: Record, settings: Settings) -> None:
    """Every file of stars/kernels/triton, at the type and about the shape of an 8B model."""
    def of(check: Callable, *sizes: int) -> Part:
        return lambda record, settings: check(record, launchers(settings.dry), settings.device, BF16, *sizes)

    def attended(kind: str, heads: tuple[int, int] = (32, 8)) -> Part:
        return lambda record, settings: kernel_attention.check(
            record, settings, launchers(settings.dry), kernel_attention.Launch(kind, BF16, 128, heads))

    wide = 257 if settings.dry else 4096
    parts: dict[str, Part] = {
        "attention, draft": attended("draft"), "attention, scoring": attended("scoring"),
        "attention, prefill": attended("prefill"),
        "sample_step": partial(kernel_sampler.draws, vocab=1000, lanes=16, dtype=BF16),
        "sample_step, cuts": partial(kernel_sampler.cuts, vocab=1000, lanes=83, dtype=BF16),
        "top_tokens": partial(kernel_ranking.ranked, vocab=1000, lanes=19),
        "rms_norm": of(kernel_rows.rms_norm, 37, wide), "rope_write": of(kernel_products.rope_write, 128, False),
        "linear": of(kernel_products.linear, 16, 40, wide),
        **{f"fused, {scheme}": partial(kernel_fused.first, scheme=scheme) for scheme in ("bf16", "fp8", "int8")},
        "swiglu": of(kernel_rows.swiglu, 17, wide),
        "take_rows, embedding": of(kernel_rows.rows), "copy_rows": of(kernel_rows.copies),
        "score_and_decide": kernel_sampler.rewards, "append_draft": kernel_sampler.appended,
        "apply_penalties": kernel_sampler.penalised, "blend_logits": kernel_sampler.blended,
        "edit_logits": kernel_sampler.edited,
        "prefill of libraries": kernel_prefill.backends}
    if not settings.dry:
        parts["philox words"] = kernel_sampler.words
    run_apart(record, settings, parts, most=2 if settings.dry else 10)


def small_engine(record: Record, settings: Settings) -> None:
    """Tokens and rewards beside the CPU's, of STARS and of methods that cut, enumerate, resample and finish whole
    responses; then in bfloat16, as the large ones run."""
    run_apart(record, settings, {"beside the CPU": partial(engine_checks.parity, shape="toy"),
                                 "methods beside the CPU": engine_checks.methods,
                                 "bfloat16": engine_checks.runs_in_bfloat16}, most=3)
