"""Families whose layers are not llama's over the Triton kernels, in the interpreter: the CPU's text and rewards."""

from __future__ import annotations

import pytest

import stars
from building import PADDED, as_on_a_gpu, work_as
from stars.kernels import dispatch, graph
from stars.model.decoder import Decoder
from stars.model.loader import load_model
from stars.reward import CausalReward
from tiny_models import TinyModel
from triton_process import run_in_interpreter

SHAPE = dict(hidden=32, heads=2, kv_heads=1, intermediate=28, vocab=31)
MODELS = {
    "gemma2": TinyModel("gemma2", head_dim=24, window=6, tied=True, **SHAPE),
    "gemma": TinyModel("gemma", head_dim=24, tied=True, **SHAPE),
    "gemma3": TinyModel("gemma3_text", head_dim=24, window=6, tied=True, **SHAPE),
    "olmo2": TinyModel("olmo2", **SHAPE),
    "olmo3": TinyModel("olmo3", layers=4, window=6, rope="yarn", **SHAPE),
    "phi3": TinyModel("phi3", rope="partial", window=7, **SHAPE),
    "smollm3": TinyModel("smollm3", layers=4, **SHAPE),
}
FAST = ("gemma2", "olmo2")  # they have every operation that another family has
PROMPT = list(range(5, 17))


def completion(lm: Decoder, rm: Decoder | None) -> stars.CompletionOutput:
    engine = stars.Engine(lm, None if rm is None else CausalReward(rm), cache_tokens=64, page_size=16, max_num_seqs=1,
                          max_num_lanes=2, max_segment_size=16, max_model_len=32)
    params = stars.SamplingParams(max_tokens=2, seed=5, ignore_eos=True)
    law = stars.STARS(segment_size=2, max_attempts=2, beta=0.3, reward_threshold=9.0, width=2)
    policy = None if rm is None else law
    [output] = engine.generate([{"prompt_token_ids": PROMPT}], params, policy, use_tqdm=False)
    engine.check_integrity()
    return output.outputs[0]


def same_text(monkeypatch, lm: Decoder, rm: Decoder | None) -> None:
    theirs = completion(lm, rm)
    monkeypatch.setattr(dispatch, "column", lambda tensor: "cuda")
    monkeypatch.setattr(graph, "column", lambda done: "reference")
    work_as(monkeypatch, PADDED)
    ours = completion(as_on_a_gpu(lm), None if rm is None else as_on_a_gpu(rm))
    assert ours.error is None and ours.token_ids == theirs.token_ids and len(ours.token_ids) == 2
    assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-4)
    for segment, same in zip(ours.segments, theirs.segments, strict=True):
        assert [one.token_ids for one in segment.attempts] == [one.token_ids for one in same.attempts]
        for attempt, its in zip(segment.attempts, same.attempts, strict=True):
            assert attempt.reward == pytest.approx(its.reward, abs=1e-4)


@pytest.mark.slow
def test_a_language_model_and_a_reward_give_the_cpus_text(monkeypatch, tiny_model):
    """Norms in all places, heads normalised together, GELU, both softcaps, scaled embeddings, alternating windows."""
    reward = TinyModel("olmo2", "reward", **SHAPE)
    same_text(monkeypatch, load_model(tiny_model(MODELS["gemma2"])), load_model(tiny_model(reward), head="reward"))


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS
                                           if name not in FAST)])
def test_language_models_give_the_cpus_text(name, monkeypatch, tiny_model):
    same_text(monkeypatch, load_model(tiny_model(MODELS[name])), None)


run_in_interpreter(globals())
