"""Whatever mix of drafts, scores and prompts comes, what a GPU replays for it was captured at start-up."""

from __future__ import annotations

import math
import random

import pytest

from building import PADDED, config_of
from stars.cache import PagedCache
from stars.config import EngineConfig
from stars.draft import Drafter, LaneSpec
from stars.edits import Edited, edits_of
from stars.kernels.graph import Graphs, Part
from stars.model.decoder import Decoder
from stars.passes import DraftedPart, Passes, Span
from stars.sampling import SamplingParams
from stars.sizes import ModelSizes, language_model, reward_model, slab_length
from stars.target import CUDA
from toy import ToyModel

TARGET = PADDED._replace(float32=False, **{name: getattr(CUDA, name) for name in (
    "chunk", "captured_prefill", "captured_score", "ridge_rows")})
POSITIONS = 1024
ENGINES = {
    "usual": dict(max_num_seqs=64, max_num_lanes=64, max_segment_size=128),
    "one lane": dict(max_num_seqs=1, max_num_lanes=1, max_segment_size=32),
    "many lanes": dict(max_num_seqs=9, max_num_lanes=300, max_segment_size=5),
    "long segments": dict(max_num_seqs=3, max_num_lanes=7, max_segment_size=700),
    "few rows a round": dict(max_num_seqs=40, max_num_lanes=50, max_segment_size=17, max_num_batched_tokens=33),
    "deterministic": dict(max_num_seqs=20, max_num_lanes=33, max_segment_size=32, deterministic=True),
}
PARAMS = [SamplingParams(), SamplingParams(top_k=3), SamplingParams(presence_penalty=0.5),
          SamplingParams(top_p=0.5, repetition_penalty=1.1)]


class Shapes:
    """In place of graphs: which parts are captured at start-up, and which are run and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.captured: dict[Graphs, set] = {}
        self.ran: list[tuple[Graphs, Part, bool]] = []
        monkeypatch.setattr(Graphs, "warm_up", lambda graphs, part: self.captured.setdefault(graphs, set()).add(
            part.key))
        monkeypatch.setattr(Graphs, "run", lambda graphs, parts, done, times=1, rare=False: self.ran.extend(
            [(graphs, part, rare) for part in parts]))
        # What start-up only runs once.
        for name in ("forward", "score", "draft_logits"):
            monkeypatch.setattr(Decoder, name, lambda *given: None)
        monkeypatch.setattr(PagedCache, "warm_up", lambda cache: None)

    def check(self, longest: int | None = None) -> None:
        """All that ran since was captured, but passes of more than `longest` rows, which are said to be rare."""
        assert self.ran
        for graphs, part, rare in self.ran:
            if rare:
                assert longest is not None and part.key[1] > longest, part.key
            else:
                assert part.key in self.captured[graphs], part.key
        self.ran.clear()


def model_of(heads: int, kv_heads: int, head_dim: int, head: str) -> Decoder:
    return ToyModel(vocab=29, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=1, positions=POSITIONS,
                    head=head).decoder()


def built(decoder: Decoder, config: EngineConfig, sizes: ModelSizes) -> tuple[PagedCache, Passes]:
    cache = PagedCache(decoder.config, config, sizes, decoder.dtype)
    return cache, Passes(decoder, cache, config, sizes)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 1, 16), (3, 3, 128), (8, 1, 256)])
@pytest.mark.parametrize("name", ENGINES)
def test_what_is_not_rare_was_captured(monkeypatch, name, heads, kv_heads, head_dim):
    """Lanes of few responses and of many, contexts alike and not, filters, penalties, entropy cuts, one candidate or
    all, closing tokens, prompts of any length."""
    draw, shapes = random.Random(f"{name} {heads}"), Shapes(monkeypatch)
    config = config_of(TARGET, **(dict(cache_tokens=1 << 16, page_size=16, max_model_len=POSITIONS) | ENGINES[name]))
    sizes, closing = language_model(config), 6
    cache, passes = built(model_of(heads, kv_heads, head_dim, "lm"), config, sizes)
    drafter = Drafter(passes.decoder, cache, config)
    rm = model_of(heads, kv_heads, head_dim, "reward")
    reward_cache, scoring = built(rm, config, reward_model(rm.config, config, slab_length(config, False, closing)))
    drafter.warm_up()
    passes.warm_up()
    scoring.warm_up(drafter.device_draft)

    def table(of: PagedCache):
        """Of some length, up to what leaves room for a segment; its pages hold anything."""
        room = POSITIONS - sizes.slab_len - closing - 1
        length = draw.choice((1, draw.randint(1, 40), draw.randint(1, room)))
        made = of.open(draw.choices(range(29), k=min(length, room)))
        made.length = min(length, room)
        return made

    for _ in range(15):
        responses = draw.randint(1, min(config.max_num_seqs, draw.choice((1, 3, 64))))
        per = [draw.randint(1, draw.choice((1, 4, max(1, config.max_num_lanes // responses)))) for _ in range(
            responses)]
        while sum(per) > config.max_num_lanes:
            per[per.index(max(per))] -= 1
        params = [draw.choice(PARAMS) for _ in per]
        segment = draw.randint(1, draw.choice((8, config.max_segment_size)))

        tables = [table(cache) for _ in per]
        cuts = [draw.choice((math.inf, math.inf, 2.0)) for _ in per]
        edits = draw.choice((None, Edited(edits_of(SamplingParams(logit_bias={3: 1.0}), None, (), 29), 0, ())))
        drafter.launch([LaneSpec(own, 1, lane, segment, 3, lane + 1, 0, kind, (), None, cut, 1, edits=edits)
                        for own, count, kind, cut in zip(tables, per, params, cuts, strict=True)
                        for lane in range(count)])
        shapes.check()

        scored = [table(reward_cache) for _ in per]
        spans, slab_len = [], reward_cache.slab_len
        for own, count in zip(scored, per, strict=True):
            for _ in range(draw.randint(1, count)):
                rows = draw.randint(1, slab_len) if draw.random() < 0.3 else min(slab_len, segment + closing)
                first = len(spans) * slab_len
                spans.append(Span(own, [1] * rows, own.length, range(first, first + rows)))
        scoring.score(spans)
        shapes.check(CUDA.captured_score)
        while not scoring.fits([len(span.token_ids) for span in spans]):
            spans.pop()
        scoring.prepare(spans)
        scoring.launch_prepared()
        shapes.check(CUDA.captured_score)
        scoring.prepare_trailing(drafter.device_draft, [
            span._replace(drafted=DraftedPart(lane, 0, (1,) * draw.randint(0, min(closing, len(span.token_ids)))))
            for lane, span in enumerate(spans)])
        scoring.launch_prepared()
        shapes.check(CUDA.captured_score)

        for of, run, opened in ((cache, passes, tables), (reward_cache, scoring, scored)):
            for own in opened:
                of.close(own)
            jobs = []
            for _ in range(draw.randint(1, draw.choice((1, 4, config.max_num_seqs)))):
                length = draw.choice((draw.randint(1, 40), draw.randint(1, 300), draw.randint(1, POSITIONS)))
                own = of.open([draw.randrange(29) for _ in range(length)])
                own.length = draw.choice((0, draw.randrange(length)))
                jobs.append((own, [1] * length, length))
            run.prefill(jobs, draw.choice((None, config.chunk)))
            if shapes.ran:
                shapes.check(CUDA.captured_prefill)
            for own, *_ in jobs:
                of.close(own)
    assert len(shapes.captured) == 3
