"""Drafts of blended models on the host side of a GPU: padded, sent and waited for, captured and replayed."""

from __future__ import annotations

import pytest

import recorded_gpu
import stars
from held import tensors_of
from stars.bindings import libstars
from test_conservation import nothing_is_held
from toy import ToyModel, facts, ids, toy_engine

pytestmark = [pytest.mark.usefixtures("one_torch_thread"),
              pytest.mark.skipif(not libstars.available(), reason="libstars is not built")]

LM = ToyModel(vocab=29, seed=1, positions=192)
GUIDE = ToyModel(vocab=29, seed=2, positions=192, layers=1, hidden=24, heads=4, kv_heads=2, head_dim=6)
REFERENCE = ToyModel(vocab=29, seed=4, positions=192, layers=1)
RM = ToyModel(vocab=29, seed=3, positions=192, head="reward", sharpness=1.5)
SIZES = dict(cache_tokens=1024, page_size=4, max_num_seqs=7, max_num_lanes=21, max_segment_size=16)
JOBS = [(stars.STARS(8, 4, 0.5, 0.4, 1.0, 2), {}), (stars.TokenGuidance(score=True), dict(n=3)),
        (stars.TokenGuidance(weight=-0.8), dict(top_k=9, presence_penalty=0.5)),
        (stars.TokenGuidance(reference="reference", score=True), dict(temperature=0.7)),
        (stars.TokenGuidance(reference="lm"), {}), (stars.BlockwiseBestOfK(4, 8), {})]


def outputs(engine: stars.Engine) -> list:
    """One batch of all: rewards trail the drafts of some."""
    found = engine.generate([{"prompt_token_ids": ids(5 + 7 * place, 29, place)} for place in range(len(JOBS))],
                            [stars.SamplingParams(max_tokens=35, seed=place, **params)
                             for place, (_, params) in enumerate(JOBS)],
                            [policy for policy, _ in JOBS], use_tqdm=False)
    assert all(completion.error is None for output in found for completion in output.outputs)
    nothing_is_held(engine)
    return [[(tokens, finish, pytest.approx(reward, abs=1e-4) if reward is not None else None,
              [segment[0] for segment in segments]) for tokens, finish, reward, segments in facts(output)]
            for output in found]


def named() -> dict:
    return {"guide": GUIDE.decoder(), "reference": REFERENCE.decoder()}


@pytest.mark.parametrize("quick", [lambda works: 0, lambda works: works - 1, None], ids=["slow", "quick", "any"])
def test_a_gpu_is_given_what_the_cpu_computes(monkeypatch, quick):
    """Launched one by one, then captured, then replayed, beside drafts of the engine's own model."""
    wanted = outputs(toy_engine(LM, RM, models=named(), **SIZES))
    gpu = recorded_gpu.install(monkeypatch)
    if quick is not None:
        gpu.stream.quick = quick
    engine = recorded_gpu.build(gpu, LM.decoder(), stars.CausalReward(RM.decoder()), models=named(), **SIZES)
    drafters = [engine._models.drafter(*key) for key in (((0, 1), True), ((0, 1, 2), True), ((1,), False))]
    for member in engine._models.members[1:]:
        gpu.memory += tensors_of([member.passes._buffers], member.passes._rewards)
    for drafter in drafters:
        gpu.memory += tensors_of([drafter._buffers], drafter._logits, drafter._stacked)
    for _ in range(3):
        assert outputs(engine) == wanted
    assert gpu.replays > 100
    for drafter in drafters:
        assert drafter._graphs._later, "nothing of it was captured"
