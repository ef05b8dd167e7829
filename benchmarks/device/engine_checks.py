"""The engine on the device beside itself on the CPU; replays, rewinds, and one text in any company."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from compare import same
from models import Score, config_of, random_decoder
from parallel import run_apart
from record import Record, Settings

import stars
from stars.cache import CommitMove
from stars.draft import LaneSpec
from stars.errors import ModelError
from stars.kernels.graph import Part
from stars.kernels.philox import pack_stream
from stars.passes import Span
from stars.plan import Policy
from stars.reward import CausalReward
from stars.sampling import SamplingParams

PROMPTS = [[5, 9, 2], list(range(10, 50)), [7] * 17, list(range(200, 233)), [299, 3, 4, 5, 6, 7, 8, 9]]
METHODS = {
    # Lanes that an entropy ends beside some that are drawn to their end; tokens that are ranked, not drawn; responses
    # that fork; whole responses.
    "CARDS": stars.CARDS(entropy_threshold=4.8, min_segment=2, max_segment=12, max_attempts=6, beta=0.5,
                         reward_threshold=0.8, width=3),
    "ARGS": stars.ARGS(topk=10),
    "ParticleFilter": stars.ParticleFilter(particles=4, beta=0.5, segment_size=8),
    "RejectionSampling": stars.RejectionSampling(reward_threshold=0.8, beta=0.5, max_attempts=6, width=3),
}
MODELS = {"guide": 3, "small": 4}  # and the seeds of their weights: one layer each, of the language model's vocabulary
SEVERAL = {
    # Blends of two and of three models; drafts of a small one that the large one redraws, and ratios of both.
    "TokenGuidance": stars.TokenGuidance(),
    "TokenGuidance with a reference": stars.TokenGuidance(reference="small", weight=0.7),
    "RewardGuidedSpeculation": stars.RewardGuidedSpeculation(reward_threshold=0.8, beta=0.5, segment_size=8),
    "GSI": stars.RewardGuidedSpeculation(variant="gsi", reward_threshold=0.8, beta=2.0, segment_size=8, n=3),
}
IMPLICIT = stars.STARS(segment_size=8, max_attempts=6, beta=0.3, reward_threshold=0.3, width=3)
SCHEMES = ("fp8", "int8", "int4-32")
LIMITS = dict(cache_tokens=8192, page_size=16, max_model_len=512, max_num_seqs=16, max_num_lanes=32,
              max_segment_size=16)


def run(record: Record, settings: Settings) -> None:
    """float32 everywhere, so that the device and the CPU differ by the order of sums alone; bits in bfloat16, too."""
    parts = {}
    for dtype in (torch.float32,) if settings.dry else (torch.bfloat16, torch.float32):
        parts |= {f"replay and rewind, {dtype}": partial(replay_and_rewind, dtype=dtype),
                  f"deterministic, {dtype}": partial(same_text, dtype=dtype)}
    parts |= {"heads beside the CPU": heads, "several models beside the CPU": several_models,
              "quantised beside the CPU": quantised}
    for shape in ("toy",) if settings.quick else ("toy", "toy-qwen3"):
        parts[f"{shape} beside the CPU"] = partial(parity, shape=shape)
    run_apart(record, settings, parts, most=7)  # a minute and a half of compiling, for two cores


def engine(device: str, shape: str, dtype: torch.dtype, deterministic: bool = False, score_by: Score = "row",
           scheme: str = "", several: bool = False, implicit: bool = False) -> stars.Engine:
    """A pair of random models, the same weights on every device. several: and MODELS beside them; implicit: the reward
    is how much more probable a response is to one of these than to the other."""
    pair = [random_decoder(config_of(shape, head, "float32"), device, dtype, head, seed=seed, made_on="cpu",
                           deterministic=deterministic and device != "cpu", score_by=score_by, scheme=scheme)
            for seed, head in ((1, "lm"), (2, "reward"))]
    others = {name: random_decoder(config_of(shape, "lm", "float32", layers=1), device, dtype, seed=seed, made_on="cpu")
              for name, seed in MODELS.items() if several or implicit}
    reward = stars.ImplicitReward(*others.values(), beta=0.3) if implicit else CausalReward(pair[1])
    return stars.Engine(pair[0], reward, device=device, deterministic=deterministic, models=others if several else None,
                        dtype=str(dtype)[6:] if device != "cpu" else "auto", **LIMITS)


def complete(of: stars.Engine, prompts: list[list[int]], width: int | None = 3, tokens: int = 40,
             policy: Policy | None = None) -> list:
    """Completions under STARS with rejections, or another policy, with filters in half of the prompts."""
    params = [SamplingParams(temperature=1.0, top_k=0 if index % 2 else 30, top_p=0.95 if index % 3 == 2 else 1.0,
                             max_tokens=tokens, seed=11 + sum(prompt)) for index, prompt in
              ((PROMPTS.index(prompt), prompt) for prompt in prompts)]
    policy = policy or stars.STARS(segment_size=8, max_attempts=6, beta=0.5, reward_threshold=0.8, width=width)
    outputs = of.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, policy, use_tqdm=False)
    of.check_integrity()
    return [output.outputs[0] for output in outputs]


def parity(record: Record, settings: Settings, shape: str) -> None:
    prompts = PROMPTS[:3] if settings.dry else PROMPTS
    ours = complete(engine(settings.device, shape, torch.float32), prompts)
    _beside(record, settings, shape, ours, complete(engine("cpu", shape, torch.float32), prompts))
    _decided(record, shape, ours)


def methods(record: Record, settings: Settings) -> None:
    """What STARS does not use of the sampler and of the loop."""
    of, on_cpu = (engine(device, "toy", torch.float32) for device in (settings.device, "cpu"))
    prompts, found = PROMPTS[:2] if settings.dry else PROMPTS, {}
    for name, policy in METHODS.items():
        with record.checking(f"{name}: runs"):
            found[name] = complete(of, prompts, policy=policy)
            _beside(record, settings, name, found[name], complete(on_cpu, prompts, policy=policy))
    cards, args = METHODS["CARDS"], METHODS["ARGS"]
    lengths = [len(segment.token_ids) for one in found.get("CARDS", ()) for segment in one.segments[:-1]]
    record.check("CARDS: some segments were cut and some were not", bool(lengths) and max(lengths) == cards.max_segment
                 > min(lengths) >= cards.min_segment, lengths=lengths)
    counts = {len(segment.attempts) for one in found.get("ARGS", ()) for segment in one.segments}
    record.check("ARGS: a token a segment, of ten or of as many as a filter keeps", max(counts, default=0) == args.topk
                 and all(len(one.segments) == len(one.token_ids) for one in found["ARGS"]), counts=sorted(counts))


def heads(record: Record, settings: Settings) -> None:
    """Reward heads that are read behind a pass, by products of their own; several readings of one span."""
    prompts, kinds = PROMPTS[:2] if settings.dry else PROMPTS, ("mlp", "labels")
    for kind in kinds:
        with record.checking(f"head {kind}: runs"):
            pair = [engine(device, "toy", torch.float32, score_by=kind) for device in (settings.device, "cpu")]
            ours, theirs = (complete(of, prompts) for of in pair)
            _beside(record, settings, f"head {kind}", ours, theirs)
            _decided(record, f"head {kind}", ours)
            together, apart = _readings(pair[0])
            _, wanted = _readings(pair[1])
            worst = max(abs(one - other) for one, other in zip(together * 2, apart + wanted, strict=True))
            record.check(f"head {kind}: several readings of a span as one by one, and as on the CPU",
                         worst < 2e-3 < max(wanted) - min(wanted), worst=worst, readings=together)


def several_models(record: Record, settings: Settings) -> None:
    """Blended draws, drafts of another model that are kept or drawn anew, log-probabilities of what was drawn."""
    prompts = PROMPTS[:2] if settings.dry else PROMPTS
    of, on_cpu = (engine(device, "toy", torch.float32, several=True) for device in (settings.device, "cpu"))
    for name, policy in SEVERAL.items():
        with record.checking(f"{name}: runs"):
            ours, theirs = (complete(one, prompts, policy=policy) for one in (of, on_cpu))
            _beside(record, settings, name, ours, theirs, rewarded="Guidance" not in name)
            mean = [one.cumulative_logprob / len(one.token_ids) for side in (ours, theirs) for one in side]
            worst = max(abs(a - b) for a, b, mine, other in zip(
                mean[: len(ours)], mean[len(ours) :], ours, theirs, strict=True) if mine.token_ids == other.token_ids)
            record.check(f"{name}: log-probabilities as on the CPU", worst < 1e-3, worst=worst)
            if "Guidance" not in name:
                redrawn = [segment.redrawn for one in ours for segment in one.segments]
                record.check(f"{name}: some drafts were kept and some drawn anew", len(set(redrawn)) == 2,
                             redrawn=sum(redrawn), of=len(redrawn))
    with record.checking("ImplicitReward: runs"):
        ours, theirs = (complete(engine(device, "toy", torch.float32, implicit=True), prompts, policy=IMPLICIT)
                        for device in (settings.device, "cpu"))
        _beside(record, settings, "ImplicitReward", ours, theirs)
        _decided(record, "ImplicitReward", ours)


def quantised(record: Record, settings: Settings) -> None:
    """Fused passes over weights of 8 and 4 bits, in float32 activations, beside the dequantised ones of the CPU."""
    prompts = PROMPTS[:2] if settings.dry else PROMPTS
    for scheme in SCHEMES[1:2] if settings.dry else SCHEMES:
        with record.checking(f"{scheme}: runs"):
            ours, theirs = (complete(engine(device, "toy", torch.float32, scheme=scheme), prompts)
                            for device in (settings.device, "cpu"))
            _beside(record, settings, scheme, ours, theirs)
            _decided(record, scheme, ours)


def _readings(of: stars.Engine) -> tuple[list[float], list[float]]:
    """Rewards at three tokens of a span: of one pass, and of a pass each that ends there."""
    passes, cache = of.reward._passes, of.reward.cache
    table, slab = cache.open([]), cache.take_slab()
    cache.reserve(table, 64)
    prompt, tokens, first = PROMPTS[1], list(range(60, 69)), slab * cache.slab_len
    passes.prefill([(table, prompt, len(prompt))])

    def span(rows: int, reads: tuple[int, ...] = ()) -> Span:
        return Span(table, tokens[:rows], len(prompt), range(first, first + rows), reads=reads)

    together = passes.score([span(len(tokens), (0, 3, 7))])
    apart = [reward for rows in (1, 4, 8) for reward in passes.score([span(rows)])]
    cache.return_slab(slab)
    cache.close(table)
    return together, apart


def _beside(record: Record, settings: Settings, name: str, ours: list, theirs: list, rewarded: bool = True) -> None:
    """Tokens and, if there are any, rewards as those of the CPU's engine."""
    errors = [one.error for one in ours if one.error]
    record.check(f"{name}: no request failed", not errors, errors=errors)
    apart = [index for index, (mine, other) in enumerate(zip(ours, theirs, strict=True))
             if mine.token_ids != other.token_ids]
    # A draw within rounding of another may fall either way: once in some 10^4 draws.
    record.check(f"{name}: tokens as on the CPU", len(apart) <= (0 if settings.dry else 1), prompts_apart=apart)
    differences = [abs(a.reward - b.reward) for mine, other in zip(ours, theirs, strict=True)
                   if mine.token_ids == other.token_ids
                   for mine_segment, other_segment in zip(mine.segments, other.segments, strict=True)
                   for a, b in zip(mine_segment.attempts, other_segment.attempts, strict=True)
                   if a.reward is not None and b.reward is not None]
    if not rewarded:
        return
    worst = max(differences, default=float("nan"))
    record.check(f"{name}: rewards as on the CPU", worst < 2e-3, worst=worst, rewards=len(differences))


def _decided(record: Record, name: str, ours: list) -> None:
    """A rule that accepts all, or nothing, would show little."""
    attempts = [attempt for one in ours for segment in one.segments for attempt in segment.attempts]
    accepted = sum(attempt.accepted for attempt in attempts)
    rejected = sum(attempt.reward is not None and not attempt.accepted for attempt in attempts)
    record.check(f"{name}: some attempts were accepted and some rejected", accepted > 0 and rejected > 0,
                 accepted=accepted, rejected=rejected)


def runs_in_bfloat16(record: Record, settings: Settings) -> None:
    """No request fails in the type of the large models, and the same engine gives the same texts twice."""
    of = engine(settings.device, "toy", torch.float32 if settings.dry else torch.bfloat16)
    first, second = complete(of, PROMPTS[:3]), complete(of, PROMPTS[:3])
    record.check("toy, bfloat16: no request failed", not any(one.error for one in (*first, *second)),
                 errors=[one.error for one in (*first, *second) if one.error])
    record.check("toy, bfloat16: the same texts again", [one.token_ids for one in first] == [
        one.token_ids for one in second])


def _lanes(of: stars.Engine, table, token: int, slabs: list[int], attempts: range, segment: int) -> list[LaneSpec]:
    return [LaneSpec(table, token, slab, 8, 77, attempt, pack_stream(segment, 0), SamplingParams(top_k=50), ())
            for slab, attempt in zip(slabs, attempts, strict=True)]


class _Eager:
    """Stands in for the graphs of a drafter: every step is launched."""

    def run(self, parts: Sequence[Part], done, times: int = 1, rare: bool = False) -> int:
        for _ in range(times):
            for part in parts:
                part.call()
        return times


def replay_and_rewind(record: Record, settings: Settings, dtype: torch.dtype) -> None:
    of = engine(settings.device, "toy", dtype)
    drafter, cache, passes = of._round.drafter, of._cache, of._models.own.passes
    prompt = PROMPTS[1]
    name = str(dtype)[6:]

    def opened():
        table = cache.open([])  # nothing shared: two tables have the same text in different pages
        cache.reserve(table, 200)
        passes.prefill([(table, prompt, len(prompt) - 1)])
        return table

    table = opened()
    slabs = [cache.take_slab() for _ in range(5)]
    used = torch.cat([torch.arange(slab * cache.slab_len, slab * cache.slab_len + 8) for slab in slabs])

    def drafted() -> tuple[list, torch.Tensor]:
        cache.k_slabs[:, used.to(cache.device)] = 0
        result = drafter.draft(_lanes(of, table, prompt[-1], slabs, range(1, 6), 0))
        return result, cache.k_slabs[:, used.to(cache.device)].clone()

    first, second, third = drafted(), drafted(), drafted()
    graphs, drafter._graphs = drafter._graphs, _Eager()
    eager = drafted()
    drafter._graphs = graphs
    for which, other in (("second", second), ("third", third), ("eager", eager)):
        record.check(f"{name}: the {which} draft has the first one's tokens and log-probabilities",
                     other[0] == first[0])
        same(record, f"{name}: the {which} draft has the first one's keys", other[1], first[1])
    # Rewind and redo: a table that rejected five lanes and one that never saw them commit the same lane.
    fresh = opened()
    pages = []
    for which in (table, fresh):
        again = drafter.draft(_lanes(of, which, prompt[-1], slabs[:1], range(3, 4), 0))
        if dtype == torch.float32:  # outside deterministic mode bfloat16's roundings depend on the company
            record.check(f"{name}: lane 3 alone draws as in company", again[0].token_ids == first[0][2].token_ids)
        cache.commit([CommitMove(which, slabs[0] * cache.slab_len, 8, which.length)])
        rows = torch.tensor(list(cache.rows(which, 0, which.length)), device=cache.device)
        pages.append([cache.k_pages[:, rows].clone(), cache.v_pages[:, rows].clone()])
    for kind, mine, theirs in zip(("keys", "values"), *pages, strict=True):
        same(record, f"{name}: committed {kind} after rejected lanes equal those without", mine, theirs)
    slab = cache.k_slabs[:, slabs[0] * cache.slab_len : slabs[0] * cache.slab_len + 8]
    same(record, f"{name}: committed pages equal the slab", pages[1][0][:, -8:], slab)
    following = [drafter.draft(_lanes(of, which, 9, slabs[:2], range(1, 3), 1)) for which in (table, fresh)]
    record.check(f"{name}: what follows is the same", following[0] == following[1])
    for slab in slabs:
        cache.return_slab(slab)
    for which in (table, fresh):
        cache.close(which)
    of.check_integrity()


def same_text(record: Record, settings: Settings, dtype: torch.dtype) -> None:
    """deterministic=True: every width and every batch mix gives the same tokens, rewards and verdicts."""
    name = str(dtype)[6:]
    try:
        of = engine(settings.device, "toy", dtype, deterministic=True)
    except ModelError as error:
        record.check(f"{name}: deterministic mode can be had", settings.dry, error=str(error))
        return
    tokens = 24 if settings.dry else 40

    def facts(completions: list) -> list:
        return [(one.token_ids, [(s.token_ids, s.reward, s.accepted) for s in one.segments]) for one in completions]

    alone = {width: [facts(complete(of, [prompt], width, tokens))[0] for prompt in PROMPTS[:3]] for width in (1, 3, 8)}
    for width in (3, 8):
        record.check(f"{name}: width {width} has the text of width 1", alone[width] == alone[1])
    together = facts(complete(of, PROMPTS, 3, tokens))
    record.check(f"{name}: a batch of {len(PROMPTS)} has the texts of single prompts", together[:3] == alone[1])
    turned = facts(complete(of, PROMPTS[2::-1], 8, tokens))
    record.check(f"{name}: another order and width, too", turned[::-1] == alone[1])
