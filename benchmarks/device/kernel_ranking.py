"""Rankings of the vocabulary: the reference's tokens in its order, and the same when a captured graph is replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from launchers import launchers
from parallel import Part
from record import Record, Settings
from timing import captured, rehearsing
from torch import Tensor

from stars.kernels.top_tokens import selection_rows, top_tokens_reference
from stars.kernels.types import Ranking

RANKS = 40  # columns: more than top_k, min_p or a small vocabulary leave
SIZES = ((37, 35), (5003, 33), (128256, 40))
"""(vocabulary, lanes); of the last, more lanes than one selection takes."""


def parts(settings: Settings) -> dict[str, Part]:
    """A part for every size, small and odd, and real."""
    sizes = [size for size in SIZES if size[0] < 10000 or not settings.quick]
    return {f"rankings of {vocab}": partial(ranked, vocab=vocab, lanes=lanes) for vocab, lanes in sizes}


def ranking(lanes: int, device: str, ranks: int = RANKS) -> Ranking:
    """Lanes that want 0 to `ranks` tokens, with every filter and none; what nobody may leave there in the columns."""
    index = torch.arange(lanes)

    def given(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(device, dtype)

    return Ranking(
        given(index * 7 % (ranks + 1), torch.int32),
        given(torch.where(index % 8 == 7, 0.0, 0.5 + index % 3 * 0.5), torch.float32),
        given(torch.where(index % 4 == 1, 11, 0), torch.int32),
        given(torch.where(index % 4 == 2, 0.9, 1.0), torch.float32),
        given(torch.where(index % 8 == 3, 0.05, 0.0), torch.float32),
        torch.full((lanes, ranks), -7, dtype=torch.int32, device=device),
        torch.full((lanes, ranks), 9.0, device=device))


def hard_logits(lanes: int, vocab: int, seed: int) -> Tensor:
    """float32 [lanes, vocab]: usual ones; of every nine rows one with ties and zeros of both signs, one with half of
    them forbidden, one with a single word, one all alike, and one each with NaN, with +inf and with nothing allowed."""
    logits = 3 * torch.randn(lanes, vocab, generator=torch.Generator().manual_seed(seed))
    kind = torch.arange(lanes) % 9
    logits[kind == 1] = (logits[kind == 1] * 2).round() / 2  # -0.0 among them, which is no less than 0.0
    logits[kind == 2, ::2] = -math.inf
    logits[kind == 3] = -math.inf
    logits[kind == 3, vocab // 2] = 1.0
    logits[kind == 4] = 3.0
    logits[kind == 5, vocab // 3] = math.nan
    logits[kind == 6, vocab // 3] = math.inf
    logits[kind == 7] = -math.inf
    return logits


def ranked(record: Record, settings: Settings, vocab: int, lanes: int) -> None:
    """With filters and without, launched and replayed on other logits than it was captured on."""
    ops, device = launchers(settings.dry), settings.device
    for filters in (True, False):
        name = f"top_tokens {vocab}{'' if filters else ', no filters'}"
        with record.checking(name):
            given = ranking(lanes, device)
            if not filters:
                given.top_k.zero_()
                given.top_p.fill_(1.0)
                given.min_p.zero_()
            logits = torch.empty(lanes, vocab, device=device)
            run: Callable[[], object] = partial(ops.top_tokens, logits, given, filters)
            logits.copy_(hard_logits(lanes, vocab, 1))
            run()
            _compare(record, name, logits, given, filters)
            if not settings.dry and not rehearsing():
                run = captured([run]).replay
            logits.copy_(hard_logits(lanes, vocab, 2))
            run()
            _compare(record, f"{name}, replayed", logits, given, filters)
    record.check(f"top_tokens {vocab}: several selections", lanes > selection_rows(vocab) or vocab < 10000)


def _compare(record: Record, name: str, logits: Tensor, given: Ranking, filters: bool) -> None:
    """Tokens in order, but where a sum of exponentials lies on top_p; log-probabilities; nothing where none is wanted.
    """
    mine, wanted = (Ranking(*(tensor.cpu().clone() for tensor in given)) for _ in range(2))
    rows = logits.cpu()
    top_tokens_reference(rows, wanted, filters)
    wrong, ties, worst = [], 0, 0.0
    for lane, ranks in enumerate(wanted.ranks.tolist()):
        got, right = mine.token_ids[lane].tolist(), wanted.token_ids[lane].tolist()
        tokens, others = ([token for token in row if token != -1] for row in (got, right))
        if not ranks:  # nobody reads the lane, but no token must be taken for one
            if max(got) >= 0:
                wrong.append((lane, got[:12], "none"))
            continue
        if got != right:
            short, long = sorted((tokens, others), key=len)
            if float(wanted.top_p[lane]) < 1.0 and got == tokens + [-1] * (len(got) - len(tokens)) and long[
                    : len(short)] == short and len({float(rows[lane, token]) for token in long[len(short) :]}) == 1:
                ties += 1
            else:
                wrong.append((lane, got[:12], right[:12]))
            continue
        apart = mine.logprobs[lane, : len(tokens)] - wanted.logprobs[lane, : len(tokens)]
        worst = max(worst, float(apart.abs().max()) if len(tokens) else 0.0)
        if not bool((mine.logprobs[lane, len(tokens) :] == -math.inf).all()):
            wrong.append((lane, "log-probabilities of no token"))
    record.check(f"{name}, tokens", not wrong and ties <= 1 + len(rows) // 16, wrong=wrong[:4], ties=ties)
    record.check(f"{name}, log-probabilities", worst < 1e-4, worst=worst)
