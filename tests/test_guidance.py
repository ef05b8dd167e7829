"""Drafts of blended models, and TokenGuidance: against a written-out loop over transformers' models, and wherever a
response goes.

A model beside itself, each with half of the weight, has the logits of the one to the bit: 0.5 z + 0.5 z = z. So every
method must give what it gives without a blend, however responses fork, give way, are taken back or interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import stars
from stars import kernels
from stars.bindings import libstars
from stars.draft import Drafter
from stars.exhaustions import BackUp, Relax
from stars.kernels.philox import gumbel_noise
from stars.plan import Blend, Model, Plan
from test_conservation import nothing_is_held, stepped_through_interrupts
from tiny_models import EOS as TINY_EOS
from toy import ToyModel, facts, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

VOCAB = 23
LM, GUIDE, REFERENCE = (ToyModel(VOCAB, seed=1, layers=1), ToyModel(VOCAB, seed=2, layers=2, kv_heads=2),
                        ToyModel(VOCAB, seed=3, layers=1, hidden=20, heads=4, head_dim=6))
HALVES = Blend((("lm", 0.5), ("twin", 0.5)))


@dataclass(frozen=True)
class With:
    """A policy that draws from something else."""

    policy: Any
    propose: Any

    def plan(self) -> Plan:
        return self.policy.plan()._replace(propose=self.propose)


def reward() -> stars.FunctionReward:
    return stars.FunctionReward(lambda prompt, responses: [table_reward(5)(ids) for ids in responses], inputs="ids")


def prompt(length: int, seed: int = 0) -> dict[str, list[int]]:
    return {"prompt_token_ids": ids(length, VOCAB, seed)}


# -- the loop, written out ----------------------------------------------------------------------------------------


FORMS: dict[str, tuple[stars.TokenGuidance, tuple[float, float, float]]] = {
    "released": (stars.TokenGuidance(), (0.7, 0.3, 0.0)),
    "ratio": (stars.TokenGuidance(reference="reference", weight=1.5), (1.0, 1.5, -1.5)),
    "own reference": (stars.TokenGuidance(reference="lm", weight=0.6), (0.4, 0.6, 0.0)),
}
PARAMS = [dict(temperature=0.0), dict(temperature=0.8, top_k=20, top_p=0.9),
          dict(temperature=1.3, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2)]


def test_tokens_are_those_of_the_loop_over_transformers(tiny_model):
    """Three families, two completions each, every filter and penalty: token for token under the same draws."""
    import transformers

    import guidance_loop

    directories = [tiny_model(family="llama", vocab=97), tiny_model(family="qwen2", vocab=97, layers=3, seed=2),
                   tiny_model(family="qwen3", vocab=97, heads=3, kv_heads=1, seed=5)]
    engine = stars.Engine(directories[0], models={"guide": directories[1], "reference": str(directories[2])},
                          cache_tokens=2048, max_model_len=80)
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32, attn_implementation="eager")
              for one in directories]
    for number, (policy, weights) in enumerate(FORMS.values()):
        for settings in PARAMS:
            params = stars.SamplingParams(n=2, max_tokens=21, seed=40 + number, **settings)
            given = ids(9, 97, number)
            [output] = engine.generate({"prompt_token_ids": given}, params, policy, use_tqdm=False)
            for completion in output.outputs:
                def noise(place, vocab, sample=completion.index, seed=params.seed):
                    return gumbel_noise(seed, place % 16, 1, place // 16, sample, vocab)

                tokens, logprob = guidance_loop.run(list(zip(theirs, weights, strict=True)), given, 21,
                                                    guidance_loop.Settings(**settings), noise, (TINY_EOS,))
                assert completion.error is None and completion.token_ids == tokens
                assert completion.cumulative_logprob == pytest.approx(logprob, abs=2e-3)
    nothing_is_held(engine)


# -- a model beside itself ----------------------------------------------------------------------------------------


METHODS = {
    "sample": stars.Sample(score=True), "STARS": stars.STARS(4, 5, beta=0.5, reward_threshold=1.5, width=2),
    "STARS, backs up": stars.STARS(3, 2, beta=0.2, reward_threshold=3.0, width=2,
                                   exhaust=BackUp(2, Relax(1.0))),
    "CARDS": stars.CARDS(2.6, 1, 6, 4, beta=0.3, reward_threshold=1.0, width=3),
    "best of n": stars.BestOfN(3), "beams": stars.SegmentBeam(2, 3, segment_size=3),
    "particles": stars.ParticleFilter(5, 1.5, 4, final="sample"),
    "speculative rejection": stars.SpeculativeRejection(n=6, segment_size=3),
    "rejection sampling": stars.RejectionSampling(2.0, max_attempts=4, width=2),
}
PENALISED = stars.SamplingParams(max_tokens=17, seed=7, n=2, top_k=9, presence_penalty=0.4, repetition_penalty=1.2)
DRAWN = [stars.SamplingParams(max_tokens=17, seed=6, n=2), PENALISED]


def both(methods: list[Any], **sizes: Any) -> tuple[list[Any], list[Any], stars.Engine]:
    """What the engine's own model gives, and what two halves give: each method at two lengths of prompt."""
    prompts = [prompt(length, length) for length in (6, 21)] * len(methods)
    params = DRAWN * len(methods)
    policies = [policy for policy in methods for _ in range(2)]
    engine = toy_engine(LM, reward(), models={"twin": LM.decoder()}, **sizes)
    halves = engine.generate(prompts, params, [With(policy, HALVES) for policy in policies], use_tqdm=False)
    plain = toy_engine(LM, reward()).generate(prompts, params, policies, use_tqdm=False)
    nothing_is_held(engine)
    return [facts(one) for one in plain], [facts(one) for one in halves], engine


@pytest.mark.parametrize("sizes", [
    {}, dict(deterministic=True), dict(max_num_batched_tokens=5, page_size=3),
], ids=["plain", "deterministic", "prompts in chunks"])
def test_every_method_draws_from_a_blend(sizes):
    """All of them in one batch."""
    plain, halves, _ = both(list(METHODS.values()), **sizes)
    assert plain == halves


@pytest.mark.parametrize("deterministic", [False, True])
def test_responses_that_give_way_are_read_again_by_all_models(deterministic):
    plain, halves, engine = both([METHODS["STARS"], METHODS["particles"], METHODS["sample"]] * 2, cache_tokens=200,
                                 max_model_len=60, deterministic=deterministic)
    assert plain == halves
    plain, _, roomy = both([METHODS["STARS"], METHODS["particles"], METHODS["sample"]] * 2)
    assert plain == halves


def test_a_tight_cache_makes_responses_give_way():
    """What the test before stands on."""
    engine = toy_engine(LM, reward(), models={"twin": LM.decoder()}, cache_tokens=200, max_model_len=60)
    outputs = engine.generate([prompt(21, seed) for seed in range(12)], DRAWN[0], With(METHODS["STARS"], HALVES),
                              use_tqdm=False)
    assert sum(completion.metrics.num_preemptions for output in outputs for completion in output.outputs) > 0


@pytest.mark.parametrize("where", ["draft", "prefill", "commit"])
def test_an_interrupt_changes_nothing(where, monkeypatch):
    """In the draft of the blend, in the second model's prefill, in the commit of its rows."""
    params = stars.SamplingParams(max_tokens=17, seed=6, n=2)
    wanted = toy_engine(LM, reward()).generate(prompt(21), params, METHODS["particles"], use_tqdm=False)
    for first in (1, 2):
        engine = toy_engine(LM, reward(), models={"twin": LM.decoder()})
        holder: Any = {"draft": engine._models.drafter((0, 1), True), "prefill": engine._models.members[1].passes,
                       "commit": engine._cache.stores[1]}[where]
        name = {"draft": "draft", "prefill": "prefill", "commit": "commit_rows"}[where]
        method, calls = getattr(holder, name), []

        def interrupted(*given, **named):
            result = method(*given, **named)
            calls.append(None)
            if len(calls) in (first, first + 2):
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(holder, name, interrupted)
        engine.add_request(prompt(21), params, With(METHODS["particles"], HALVES))
        assert facts(stepped_through_interrupts(engine)) == facts(wanted[0])
        assert len(calls) >= first
        nothing_is_held(engine)


def test_a_named_model_alone_is_an_engine_of_its_own():
    """Drafted in its own store by itself: as if it were the engine's."""
    for policy in (METHODS["STARS"], METHODS["particles"], METHODS["CARDS"], METHODS["best of n"]):
        engine = toy_engine(LM, reward(), models={"guide": GUIDE.decoder()})
        wanted = toy_engine(GUIDE, reward()).generate([prompt(7), prompt(18)], DRAWN, policy, use_tqdm=False)
        for propose in (Model("guide"), Blend((("lm", 0.0), ("guide", 1.0)))):
            got = engine.generate([prompt(7), prompt(18)], DRAWN, With(policy, propose), use_tqdm=False)
            assert [facts(one) for one in got] == [facts(one) for one in wanted]
        nothing_is_held(engine)


# -- batches of several kinds -------------------------------------------------------------------------------------


MIXED = [stars.TokenGuidance(), stars.STARS(4, 5, beta=0.5, reward_threshold=1.5, width=2),
         stars.TokenGuidance(weight=-1.5),
         stars.Sample(), stars.TokenGuidance(reference="reference"), stars.TokenGuidance("reference", weight=0.5),
         stars.TokenGuidance(reference="lm"), stars.TokenGuidance("lm", weight=0.5, lm_weight=1.0, score=True)]


def mixed(engine: stars.Engine, policies: list[Any]) -> list[Any]:
    """Prompts that begin alike, so that pages could be shared."""
    prompts = [{"prompt_token_ids": ids(16, VOCAB) + [1 + place]} for place in range(len(MIXED))]
    params = [stars.SamplingParams(max_tokens=19, seed=3, temperature=0.9, top_p=0.97)] * len(MIXED)
    places = [MIXED.index(policy) for policy in policies]
    return [facts(one) for one in engine.generate([prompts[place] for place in places],
                                                  [params[place] for place in places], policies, use_tqdm=False)]


def mixed_engine() -> stars.Engine:
    return toy_engine(LM, reward(), models={"guide": GUIDE.decoder(), "reference": REFERENCE.decoder()})


@pytest.mark.usefixtures("operations")
def test_a_batch_gives_what_each_gives_alone():
    """With and without a guide, of several guides and weights; one after the other in one engine, too, which keeps
    pages of what came before."""
    engine = mixed_engine()
    together = mixed(engine, MIXED)
    for place, policy in enumerate(MIXED):
        assert mixed(engine, [policy]) == [together[place]]
        assert mixed(mixed_engine(), [policy]) == [together[place]]
    assert mixed(engine, MIXED[::-1]) == together[::-1]
    assert len({str(one) for one in together}) == len(MIXED)
    nothing_is_held(engine)


@pytest.mark.skipif(not libstars.available(), reason="it is planted in its program")
def test_weights_of_another_lane_are_seen(monkeypatch):
    fill = Drafter._fill

    def first_for_all(self, lanes):
        return fill(self, [lane._replace(weights=lanes[0].weights) for lane in lanes])

    engine = mixed_engine()
    alone = mixed(engine, [MIXED[2]])
    monkeypatch.setattr(Drafter, "_fill", first_for_all)
    assert mixed(engine, [MIXED[0], MIXED[2]])[1] != alone[0] and mixed(engine, [MIXED[2]]) == alone


def test_a_caller_may_be_in_inference_mode():
    """What a blend is drafted in is made then, and written outside of it, too."""
    engine = mixed_engine()
    with torch.inference_mode():
        inside = mixed(engine, MIXED)
    with kernels.dispatch.references_only():
        assert mixed(engine, MIXED) == inside


# -- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, word", [
    (dict(guide=""), "TokenGuidance.guide"), (dict(guide=3), "TokenGuidance.guide is 3"),
    (dict(reference=b"x"), "TokenGuidance.reference"), (dict(weight=math.inf), "TokenGuidance.weight"),
    (dict(lm_weight="much"), "TokenGuidance.lm_weight"), (dict(score=2), "TokenGuidance.score"),
    (dict(guide="a", reference="a"), "the guide itself"), (dict(alpha=1.0), "alpha"),
])
def test_parameters_that_cannot_be(given, word):
    with pytest.raises(stars.RequestError, match=word):
        stars.TokenGuidance(**given)


def test_what_is_refused_at_the_door():
    engine = mixed_engine()
    with pytest.raises(stars.RequestError, match="there is no model named 'tutor'.*'guide', 'reference'"):
        engine.generate(prompt(5), policy=stars.TokenGuidance("tutor"), use_tqdm=False)
    with pytest.raises(stars.RequestError, match="TokenGuidance needs a reward"):
        toy_engine(LM, models={"guide": GUIDE.decoder()}).generate(
            prompt(5), policy=stars.TokenGuidance(score=True), use_tqdm=False)
    with pytest.raises(stars.ModelError, match="vocabulary has 29 tokens and that of the engine's own model 23"):
        toy_engine(LM, models={"guide": ToyModel(29, seed=1).decoder()})


def test_no_memory_for_a_draft_is_said_at_the_door(monkeypatch):
    def full(*given) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = mixed_engine()
    monkeypatch.setattr("stars.models.Drafter", full)
    with pytest.raises(stars.RequestError, match="no memory to draft from 'lm' and 'guide': lower max_num_lanes"):
        engine.generate(prompt(5), policy=stars.TokenGuidance(), use_tqdm=False)
    monkeypatch.undo()
    assert engine.generate(prompt(5), policy=stars.TokenGuidance(), use_tqdm=False)[0].finished


def test_a_guide_without_numbers_ends_its_requests_alone():
    broken = GUIDE.decoder()
    broken.final_norm.fill_(math.nan)
    engine = toy_engine(LM, reward(), models={"guide": broken, "reference": REFERENCE.decoder()})
    guided, plain = engine.generate([prompt(5)] * 2, stars.SamplingParams(max_tokens=9, seed=2),
                                    [stars.TokenGuidance(), stars.Sample()], use_tqdm=False)
    assert guided.outputs[0].finish_reason == "error" and "the blend of the models' logits" in guided.outputs[0].error
    assert plain.outputs[0].error is None and len(plain.outputs[0].token_ids) > 0
    nothing_is_held(engine)
