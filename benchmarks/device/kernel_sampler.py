"""The sampler, its entropy cuts, what trails a draft, and rewards: the CPU's random words bit for bit, its tokens, and
float64."""

from __future__ import annotations

import math
from functools import partial

import kernel_ranking
import numpy as np
import torch
from compare import same, within
from launchers import launchers
from parallel import run_apart
from record import Record, Settings
from torch import Tensor

from stars.kernels import philox
from stars.kernels.append_draft import append_draft_reference
from stars.kernels.apply_penalties import apply_penalties_reference
from stars.kernels.blend_logits import blend_logits_reference
from stars.kernels.edit_logits import edit_logits_reference
from stars.kernels.linear import Weight
from stars.kernels.sample_step import sample_step_reference, sampling_threshold
from stars.kernels.token_logprobs import token_logprobs_reference
from stars.kernels.types import Draft, Edits, LaneState, Penalties, TrailingRows

CUT = ((37, 80, torch.float32), (1000, 83, torch.bfloat16), (128256, 80, torch.float32))
"""(vocabulary, lanes, type of the logits) where lanes are cut: 80 have every pair of a filter and a kind of cut."""
TIE = 4e-5  # scores closer than this, at |z| < 32, may change places: twice what kernels/triton/sample_step.py states


def run(record: Record, settings: Settings) -> None:
    """Words, draws at small and real vocabularies, all filters and none, cuts, ends, rankings, what trails a draft,
    rewards."""
    bf16, fp32 = torch.bfloat16, torch.float32
    parts = {} if settings.dry else {"philox words": words}
    # Every size and type is compiled anew, eight kernels each. 16 lanes have every filter; the reference takes a second
    # for each million logits.
    sizes = [] if settings.quick else [(128256, 16, bf16), (128256, 16, fp32)]
    sizes += [(37, 9, fp32), (1000, 17, bf16)] + ([] if settings.dry else [(5003, 33, fp32)])
    parts |= {f"draws of {vocab}, {str(dtype)[6:]}": partial(draws, vocab=vocab, lanes=lanes, dtype=dtype)
              for vocab, lanes, dtype in sizes}
    parts |= {f"cuts of {vocab}, {str(dtype)[6:]}": partial(cuts, vocab=vocab, lanes=lanes, dtype=dtype)
              for vocab, lanes, dtype in CUT if not (settings.quick and vocab > 10000)}
    parts |= kernel_ranking.parts(settings)
    parts |= {"penalties": penalised, "blends": blended, "logprobs": given_tokens,
              "followers": appended, "ends": ends, "verdicts": rewards}
    run_apart(record, settings, parts, most=5)


def words(record: Record, settings: Settings) -> None:
    """Random123's words and the noise made of them, beside the host's."""
    from words import words_kernel

    for seed, position, attempt, stream in ((1, 0, 1, 0), (-5, 31, 7, 1 << 20), (2**63 - 1, 127, 2**24 - 1, -1)):
        given = [torch.tensor([value], dtype=kind, device="cuda") for value, kind in (
            (seed, torch.int64), (position, torch.int32), (attempt, torch.int32), (stream, torch.int32))]
        count = 1 << 17
        words = torch.empty(count, dtype=torch.int32, device="cuda")
        noise = torch.empty(count, device="cuda")
        words_kernel[(count // 4 // 256,)](words, noise, *given, BLOCKS=256)
        wanted = philox.token_words(seed, position, attempt, stream, count)
        record.check(f"philox words, seed {seed}", np.array_equal(words.cpu().numpy().view(np.uint32), wanted))
        error = np.abs(noise.cpu().numpy() - philox.gumbel(wanted)).max()
        record.check(f"Gumbel noise, seed {seed}", bool(error < 1e-5), error=float(error))


def lane_state(lanes: int, device: str, steps: int = 16, seed: int = 0) -> LaneState:
    """Lanes with every combination of filters, none of them done.

    steps: like an engine's segment a multiple of 16, so that Triton compiles the same kernels.
    """
    draw = np.random.default_rng(seed)

    def ints(values, kind=torch.int32) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=kind, device=device)

    index = np.arange(lanes)
    zero = np.zeros(lanes, dtype=np.int32)
    return LaneState(
        ints(zero), ints(index), ints(index), ints(zero), ints(zero), ints(zero + steps), ints(zero),
        torch.zeros(lanes, steps, dtype=torch.int32, device=device), torch.zeros(lanes, steps, device=device),
        ints(draw.integers(-(2**62), 2**62, lanes), torch.int64), ints(1 + index), ints(index * 3),
        ints(np.where(index % 8 == 7, 0.0, 0.5 + index % 3 * 0.5), torch.float32),
        ints(np.where(index % 4 == 1, 11, np.where(index % 16 == 6, 40, 0))),
        ints(np.where(index % 4 == 2, 0.9, 1.0), torch.float32),
        ints(np.where(index % 8 == 3, 0.05, 0.0), torch.float32),
        torch.full((lanes, 16), -1, dtype=torch.int32, device=device),
        torch.full((lanes,), math.inf, device=device), ints(zero))


def _told(lanes: int, device: str) -> Tensor:
    """Where the host reads which lanes ended: on a card pinned memory, which the kernel writes by the host's address.
    """
    return torch.zeros(lanes, dtype=torch.int32, pin_memory=device != "cpu")


def _drop_filters(state: LaneState) -> None:
    state.top_k.zero_()
    state.min_p.zero_()
    state.top_p.fill_(1.0)


def on_cpu(state):
    """A copy of all its tensors on the CPU."""
    return type(state)(*(tensor.cpu().clone() for tensor in state))


def draws(record: Record, settings: Settings, vocab: int, lanes: int, dtype: torch.dtype) -> None:
    """Two steps with every filter and two without."""
    for filters in (True, False):
        with record.checking(f"sample_step {vocab} {dtype}"):
            _draws(record, launchers(settings.dry), settings.device, vocab, lanes, dtype, filters)


def _draws(record: Record, ops, device: str, vocab: int, lanes: int, dtype: torch.dtype, filters: bool) -> None:
    """Tokens of several steps; another token than the reference's is explained by a tie, or is wrong."""
    state = lane_state(lanes, device, seed=vocab)
    if not filters:
        _drop_filters(state)
    generator = torch.Generator().manual_seed(vocab)
    wrong, ties, worst, ended = [], 0, 0.0, _told(lanes, device)
    for step in range(2):
        logits = (3 * torch.randn(lanes, vocab, generator=generator)).to(dtype)
        before = on_cpu(state)
        wanted = on_cpu(state)
        sample_step_reference(logits.float(), wanted)
        ops.sample_step(logits.to(device), state, filters=filters, ended=ended, cuts=filters and step == 1)
        tokens, theirs = state.out_tokens[:, step].tolist(), wanted.out_tokens[:, step].tolist()
        logprobs = torch.log_softmax(logits.float(), -1)
        for lane, (token, other) in enumerate(zip(tokens, theirs, strict=True)):
            if token != other:
                if 0 <= token < vocab and _tied(logits[lane].float(), before, lane, token, other):
                    ties += 1
                else:
                    wrong.append((step, lane, token, other))
                    continue
            worst = max(worst, abs(float(state.out_logprobs[lane, step]) - float(logprobs[lane, token])))
        if device != "cpu":  # go on from the reference's state
            for mine, right in zip(state, wanted, strict=True):
                mine.copy_(right)
    name = f"sample_step {vocab} {str(dtype)[6:]}{'' if filters else ', no filters'}"
    record.check(f"{name}, tokens", not wrong and ties <= 1 + lanes // 16, wrong=wrong[:8], ties=ties, draws=2 * lanes)
    record.check(f"{name}, log-probabilities", worst < 1e-4, worst=worst)


def _tied(row: Tensor, state: LaneState, lane: int, token: int, other: int) -> bool:
    """Whether the two tokens' scores are too close to tell apart, or one of them lies on a filter's threshold."""
    temperature = float(state.temperature[lane])
    if temperature == 0:
        return bool(row[token] == row[other])
    z = row / temperature
    words = philox.token_words(int(state.seeds[lane]), int(state.steps[lane]), int(state.attempts[lane]),
                               int(state.streams[lane]), len(row))
    scores = z.double() + torch.from_numpy(philox.gumbel(words))
    tie = TIE * max(1.0, float(z.abs().max()) / 32)
    if abs(float(scores[token] - scores[other])) < tie:
        return True
    if float(state.top_p[lane]) == 1.0 and float(state.min_p[lane]) == 0.0:
        return False
    threshold = sampling_threshold(z, int(state.top_k[lane]), float(state.top_p[lane]), float(state.min_p[lane]))
    # A sum of exponentials within 1e-5 of top_p moves the threshold by one value: the nearest one beside it.
    order = z.sort().values
    place = int(torch.searchsorted(order, torch.tensor(threshold)))
    near = {float(order[i]) for i in range(max(0, place - 1), min(len(order), place + 2))}
    return float(z[token]) in near or float(z[other]) in near


def rows_of_entropies(lanes: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """[lanes, vocab] logits of seven kinds in turn: uniform, certain, half of them forbidden, far from 0, peaked, with
    a tail that exp cannot hold, and usual."""
    draw = torch.Generator().manual_seed(vocab)
    logits, kind = 3 * torch.randn(lanes, vocab, generator=draw), torch.arange(lanes) % 7
    logits[kind == 0] = 0.0
    logits[kind == 1] = -math.inf
    logits[kind == 1, vocab // 2] = 2.5
    logits[kind == 2, ::2] = -math.inf
    logits[kind == 3] -= 1e4 if dtype == torch.float32 else 100.0
    logits[kind == 4] *= 4
    logits[kind == 5] = -80.0
    logits[kind == 5, vocab - 1] = 20.0
    return logits.to(dtype)


def cuts(record: Record, settings: Settings, vocab: int, lanes: int, dtype: torch.dtype) -> None:
    """Lanes whose cut is just below their entropy in float64 end without a draw, and all others draw what they draw
    without cuts; with filters and without."""
    for filters in (True, False):
        with record.checking(f"sample_step {vocab} {dtype}, cuts"):
            _cuts(record, launchers(settings.dry), settings.device, vocab, lanes, dtype, filters)


def _cuts(record: Record, ops, device: str, vocab: int, lanes: int, dtype: torch.dtype, filters: bool) -> None:
    logits = rows_of_entropies(lanes, vocab, dtype)
    state, index = lane_state(lanes, "cpu", seed=vocab), torch.arange(lanes)
    if not filters:
        _drop_filters(state)
    kind = index % 5  # its cut is just below the entropy, just above, below and just reached, below but too early, off
    state.steps.copy_(index % 4 + 1)
    state.least_tokens.copy_(state.steps - 1 + (kind == 2).int() + 2 * (kind == 3).int())
    for lane in range(lanes):
        nats, error = entropy_within(logits[lane].float())
        away = error + 2.0**-23 * nats  # a cut is a float32
        state.entropy_cut[lane] = (max(0.0, nats - away), nats + away + 1e-30)[int(kind[lane] == 1)]
    state.entropy_cut[kind == 4] = math.inf
    state.done[-1] = 1
    cut = ((kind == 0) | (kind == 2)) & (state.done == 0)
    mine, plain = (type(state)(*(tensor.to(device, copy=True) for tensor in state)) for _ in range(2))
    plain.entropy_cut.fill_(math.inf)
    given, ended = logits.to(device), _told(lanes, device)
    ops.sample_step(given, plain, filters=filters, ended=_told(lanes, device), cuts=False)
    ops.sample_step(given, mine, filters=filters, ended=ended, cuts=True)
    if device != "cpu":
        torch.cuda.synchronize()
    name = f"sample_step {vocab} {str(dtype)[6:]}{'' if filters else ', no filters'}, cuts"
    mine, plain = on_cpu(mine), on_cpu(plain)
    undrawn = mine.done.bool() & (mine.steps == state.steps) & (state.done == 0)
    wrong = torch.nonzero(undrawn != cut).flatten().tolist()
    record.check(f"{name}: lanes that end undrawn", not wrong and bool(cut.any()), wrong=wrong[:8], kinds=[
        int(kind[lane]) for lane in wrong[:8]], cut=int(cut.sum()))
    for field, now, was, drawn in zip(LaneState._fields, mine, state, plain, strict=True):
        if field != "entropy_cut":
            here = cut.reshape(-1, *(1,) * (now.dim() - 1))
            wanted = torch.where(here, torch.ones_like(was) if field == "done" else was, drawn)
            if field == "out_logprobs":  # another kernel may add up in another order
                worst = float((now - wanted).abs().nan_to_num().max())
                record.check(f"{name}: {field}", worst < 1e-5, worst=worst)
            else:
                same(record, f"{name}: {field}", now, wanted)
    same(record, f"{name}: told to the host", ended, ((plain.done.bool() | cut) & (state.done == 0)).int())


def entropy_within(row: Tensor) -> tuple[float, float]:
    """(nats of softmax(row) in float64, what a sampler in float32 may be off by), row float32 [vocab].

    The bound is reckoned in tests/sampler_lanes.py, in units of 2^-24: 54 + 2.5 a of the sum S of e = exp(d) and
    55 a + 2.5 b of the sum of e * d over it, with a = E|d| and b = E d^2, d the logit below the highest.
    """
    logprobs = row.double().log_softmax(0)
    p = logprobs.exp()
    away = torch.where(p > 0, row.double().max() - row.double(), 0.0)
    a, b, nats = float((p * away).sum()), float((p * away**2).sum()), float(torch.special.entr(p).sum())
    return nats, 2.0**-24 * ((54 + 2.5 * a) * (1 + a) + 55 * a + 2.5 * b + nats)


def ends(record: Record, settings: Settings) -> None:
    """NaN, +inf and nothing but -inf end a lane with token -1, whatever its cut; stop ids, max_tokens and a cut of 0
    end it; done lanes stay."""
    ops, device, vocab, lanes = launchers(settings.dry), settings.device, 50, 8
    logits = torch.randn(lanes, vocab, generator=torch.Generator().manual_seed(1))
    logits[0, 7], logits[1, 7], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 20] = 100.0
    state = lane_state(lanes, device)
    state.temperature.fill_(1.0)
    _drop_filters(state)
    state.stop_ids[3, 0] = 20
    state.max_tokens[4] = 1
    state.done[5] = 1
    state.entropy_cut[[0, 1, 2, 5, 6]] = 0.0  # all of them reach it, and what is no distribution has no entropy
    wanted = on_cpu(state)
    sample_step_reference(logits, wanted)
    ended = _told(lanes + 3, device)
    ops.sample_step(logits.to(device), state, ended=ended)
    if device != "cpu":
        torch.cuda.synchronize()
    told = wanted.done.clone()
    told[5] = 0  # it had ended before
    record.check("sample_step, lanes that end are told to the host", ended.tolist() == [*told.tolist(), 0, 0, 0],
                 ended=ended.tolist())
    for field, mine, right in zip(LaneState._fields, state, wanted, strict=True):
        equal = torch.equal(mine.cpu(), right) if mine.dtype != torch.float32 else torch.allclose(
            mine.cpu(), right, atol=1e-5, equal_nan=True)
        record.check(f"sample_step, ends of lanes: {field}", equal)


def appended(record: Record, settings: Settings) -> None:
    """Segments that ended with a stop token, with NaN, empty, full, of lanes in any order and of none."""
    ops, device = launchers(settings.dry), settings.device
    draw = np.random.default_rng(0)
    lanes, steps, vocab, sequences = 20, 70, 500, 37

    def make(values) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)

    drawn = draw.integers(-2, vocab + 3, (lanes, steps))
    count = np.where(np.arange(lanes) % 5 == 0, steps, draw.integers(0, steps, lanes))
    stop_ids = np.full((lanes, 16), -1)
    stop_ids[:, 0] = 7
    for lane in np.flatnonzero(count):
        drawn[lane, count[lane] - 1] = (7, -1, 8)[lane % 3]
    closing = np.where(np.arange(3) < draw.integers(0, 4, (sequences, 1)), draw.integers(0, vocab, (sequences, 3)), -1)
    starts = np.arange(sequences + 1) * (steps + 5)
    draft = Draft(make(drawn), make(count), make(stop_ids))
    trailing = TrailingRows(make(draw.integers(-1, lanes, sequences)), make(starts), make(closing),
                            make(draw.integers(0, vocab, starts[-1])), make(np.full(sequences, -9)))
    wanted = on_cpu(trailing)
    append_draft_reference(on_cpu(draft), wanted, vocab)
    ops.append_draft(draft, trailing, vocab)
    for field, mine, right in zip(TrailingRows._fields, trailing, wanted, strict=True):
        same(record, f"append_draft, {field}", mine, right)


def penalised(record: Record, settings: Settings) -> None:
    """Histories of no, few and a thousand words, drawn words in them and not: the reference's bits."""
    ops, device = launchers(settings.dry), settings.device
    draw, lanes, vocab = np.random.default_rng(5), 33, 5003
    state = lane_state(lanes, device)
    state.steps.copy_(torch.tensor(np.arange(lanes) % (state.out_tokens.shape[1] + 1)))
    state.out_tokens.copy_(torch.tensor(draw.integers(0, 40, state.out_tokens.shape)))
    words = [np.flatnonzero(draw.random(vocab) < (0.0, 0.002, 0.2)[lane % 3]) for lane in range(lanes)]
    count = np.array([len(one) for one in words])
    history = np.stack((np.concatenate(words), draw.integers(0, 4, count.sum())), axis=1)

    def make(values, kind=torch.float32) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=kind, device=device)

    penalties = Penalties(
        make(history, torch.int32), make(np.cumsum(count) - count, torch.int32), make(count, torch.int32),
        make(draw.choice([1.0, 0.7, 1.3], lanes)), make(draw.choice([0.0, 0.3, -1.1], lanes)),
        make(draw.choice([0.0, -0.4, 1.7], lanes)))
    logits = 3 * torch.randn(lanes, vocab, generator=torch.Generator().manual_seed(5))
    got = logits.to(device)
    ops.apply_penalties(got, state, penalties)
    apply_penalties_reference(logits, on_cpu(state), on_cpu(penalties))
    same(record, "apply_penalties", got, logits)


def blended(record: Record, settings: Settings) -> None:
    """Weights of both signs and zeros beside logits that are no numbers: the reference's bits."""
    ops, draw, lanes, room, vocab = launchers(settings.dry), np.random.default_rng(6), 33, 37, 5003
    for models in (1, 2, 3):
        weights = torch.tensor(draw.choice(np.array([0.0, 0.3, 1.0, -0.4], np.float32), (models, room)))
        logits = torch.tensor(draw.normal(size=(models, room, vocab)).astype(np.float32) * 3)
        logits[torch.tensor(draw.random(logits.shape) < 0.05)] = -torch.inf
        logits[weights == 0.0] = torch.nan
        done = torch.tensor(draw.random(lanes) < 0.2, dtype=torch.int32)
        wanted = logits[0, :lanes].clone()
        on_device = [tensor.to(settings.device, copy=True) for tensor in (logits, weights, done)]
        ops.blend_logits(*on_device, on_device[0][0, :lanes])  # in the first model's place
        blend_logits_reference(logits, weights, done, wanted)
        same(record, f"blend_logits of {models}", on_device[0][0, :lanes].nan_to_num(nan=9.0),
             wanted.nan_to_num(nan=9.0))


def edited(record: Record, settings: Settings) -> None:
    """Biases, bans, words that follow and words that do not, masks of few tokens and of all: the reference's bits."""
    ops, draw, lanes, vocab, length = launchers(settings.dry), np.random.default_rng(7), 33, 5003, 5
    state = lane_state(lanes, settings.device)
    state.steps.copy_(torch.tensor(np.arange(lanes) % (state.out_tokens.shape[1] + 1)))
    state.out_tokens.copy_(torch.tensor(draw.integers(0, 3, state.out_tokens.shape)))
    tokens = [np.flatnonzero(draw.random(vocab) < (0.0, 0.002, 0.2)[lane % 3]) for lane in range(lanes)]
    count = np.array([len(one) for one in tokens])
    bias = draw.normal(size=count.sum()).astype(np.float32).view(np.int32)
    words = draw.integers(-1, 3, (40 * lanes, length))
    words[:, -1] = draw.integers(0, vocab, len(words))
    bits = draw.random((lanes, (vocab + 31) // 32 * 32)) < draw.choice([0.01, 0.5, 1.0], (lanes, 1))

    def make(values) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=settings.device)

    edits = Edits(
        make(np.stack((np.concatenate(tokens), draw.choice([0, 0, 9, 1 << 30], count.sum()), bias), axis=1)),
        make(np.cumsum(count) - count), make(count), make(draw.integers(0, 12, lanes)), make(words),
        make(40 * np.arange(lanes)), make(draw.integers(0, 41, lanes)),
        make(draw.integers(-1, 3, (lanes, length - 1))), make(np.packbits(bits, 1, "little").view("<i4")),
        make(draw.choice(np.arange(-1, lanes), lanes)))
    logits = 3 * torch.randn(lanes, vocab, generator=torch.Generator().manual_seed(7))
    got = logits.to(settings.device)
    ops.edit_logits(got, state, edits)
    edit_logits_reference(logits, on_cpu(state), on_cpu(edits))
    same(record, "edit_logits", got, logits)


def given_tokens(record: Record, settings: Settings) -> None:
    """Of tokens and of none, of such as are forbidden, and beside logits that are no numbers."""
    ops = launchers(settings.dry)
    for vocab, rows in ((37, 9), (5003, 33)) if settings.dry else ((37, 9), (5003, 33), (128256, 33)):
        draw = torch.Generator().manual_seed(vocab)
        logits = 3 * torch.randn(rows, vocab + 3, generator=draw)[:, :vocab]  # rows lie apart
        logits[torch.rand(rows, vocab, generator=draw) < 0.05] = -torch.inf
        logits[3, vocab // 2], logits[4, vocab - 1] = torch.nan, torch.inf
        targets = torch.randint(0, vocab, (rows, 3), generator=draw).int()
        targets[::2, 1] = -1
        logits[5, targets[5, 0].item()] = -torch.inf
        exact = torch.log_softmax(logits.double(), dim=-1).gather(1, targets.long().clamp(min=0))
        exact = exact.where(targets >= 0, 0.0)
        plain, got = (torch.full((rows, 3), -77.0, device=settings.device) for _ in range(2))
        on_device = logits.to(settings.device), targets.to(settings.device)
        token_logprobs_reference(*on_device, plain)
        ops.token_logprobs(*on_device, got)
        name, numbers = f"token_logprobs of {vocab}", exact.isfinite()
        same(record, f"{name}: zeros, no numbers and what is forbidden", got.cpu().where(~numbers, 0.0).nan_to_num(9.0),
             exact.float().where(~numbers, 0.0).nan_to_num(9.0))
        within(record, name, got.cpu()[numbers], plain.cpu()[numbers], exact[numbers], 8.0)


def rewards(record: Record, settings: Settings) -> None:
    """Six seeds, small and large."""
    for seed in range(2 if settings.quick else 6):
        for dtype, hidden in ((torch.float32, 64), (torch.bfloat16, 64 if settings.dry else 4096)):
            with record.checking(f"score_and_decide {seed} {dtype}"):
                _rewards(record, launchers(settings.dry), settings.device, seed, dtype, hidden)


def _rewards(record: Record, ops, device: str, seed: int, dtype: torch.dtype, hidden: int) -> None:
    """Rewards against float64."""
    lanes = 45
    generator = torch.Generator().manual_seed(seed)
    residual, branch = ((torch.randn(lanes, hidden, generator=generator)).to(device, dtype) for _ in range(2))
    norm_weight = (1 + 0.1 * torch.randn(hidden, generator=generator)).to(device)
    head = (torch.randn(1, hidden, generator=generator) / math.sqrt(hidden)).to(device)
    rewards = torch.full((lanes,), -77.0, device=device)
    y = (residual + branch).double()
    ops.score(residual.clone(), branch, norm_weight, 1e-6, Weight(head, None, 1, hidden),
              torch.empty(lanes, hidden, device=device), rewards)
    exact = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm_weight.double() @ head[0].double()
    within(record, f"score_and_decide {seed} {str(dtype)[6:]}, rewards", rewards, exact.float(), exact, 8.0)
