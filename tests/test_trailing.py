"""The first scoring pass trails its draft, tokens handed on by the device: what the host would have handed on.

On a GPU the engine works so; here the same code runs in the shapes of captured graphs, with libstars and without it.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

import stars
from building import PADDED, UNPADDED, work_as
from stars.bindings import libstars
from stars.kernels.dispatch import references_only
from stars.passes import Passes
from stars.reward.causal import CausalReward
from stars.reward.scoring import ScoringReward
from test_invariance import LM, PREFIX, RM, decided, requests, run
from toy import ids, toy_engine

needs_libstars = pytest.mark.skipif(not libstars.available(), reason="libstars is not built")


@pytest.fixture
def trailed(monkeypatch) -> list[int]:
    """Engines built from now on let scoring trail drafts; the sizes of such passes."""
    sizes = []
    prepare_trailing = Passes.prepare_trailing

    def counted(self, draft, spans):
        sizes.append(len(spans))
        prepare_trailing(self, draft, spans)

    work_as(monkeypatch, PADDED)
    monkeypatch.setattr(Passes, "prepare_trailing", counted)
    return sizes


def engine(close: str = "none", **options) -> stars.Engine:
    return toy_engine(LM, CausalReward(RM.decoder(), close=close), page_size=16, **options)


@pytest.mark.parametrize("close", ["none", "eos"])
@pytest.mark.parametrize("implementation", [pytest.param("libstars", marks=needs_libstars), "references"])
def test_the_same_attempts_and_rewards(implementation, close, request, monkeypatch):
    """All policies and early ends, closing tokens or not, recorded and replayed; the pages of both models balance."""
    chosen = requests()
    work_as(monkeypatch, UNPADDED)
    with references_only() if implementation == "references" else contextlib.nullcontext():
        if implementation == "references":
            chosen = chosen[:3]
        before = run(engine(close), chosen)
        sizes = request.getfixturevalue("trailed")
        made = engine(close)
        for _ in range(2):
            after = run(made, chosen)
            made.check_integrity()
            if implementation == "libstars":
                assert after == before
            else:  # the bits of torch's products depend on the number of rows
                assert [[c[:2] for c in one[1:]] for one in after] == [[c[:2] for c in one[1:]] for one in before]
    assert len(sizes) > 8 and max(sizes) > 4
    assert any(reason == "stop" for one in before for _, reason, *_ in one[1:])  # some lanes end early


def test_rounds_that_go_on_are_fed_by_the_host(trailed):
    """Of many lanes the first few trail the draft; later passes give what one wide pass would."""
    params = stars.SamplingParams(max_tokens=24, seed=4)
    policy = stars.STARS(16, 12, 0.5, 0.2, 2.5, width=12)
    [output] = engine().generate({"prompt_token_ids": PREFIX}, params, policy, use_tqdm=False)
    [other] = engine().generate({"prompt_token_ids": PREFIX}, params, dataclasses.replace(policy, width=1),
                                use_tqdm=False)
    assert output.outputs[0].token_ids == other.outputs[0].token_ids
    assert any(len(segment.attempts) > max(trailed) for segment in output.outputs[0].segments)


def test_rewards_that_need_the_host_trail_nothing(trailed):
    made = toy_engine(LM, stars.FunctionReward(lambda prompt, responses: [1.0 for _ in responses], inputs="ids"))
    params = stars.SamplingParams(max_tokens=8, seed=1)
    policy = stars.STARS(4, 2, reward_threshold=0.0)
    [output] = made.generate({"prompt_token_ids": PREFIX}, params, policy, use_tqdm=False)
    assert output.outputs[0].error is None and not trailed


def test_a_token_that_the_reward_model_does_not_know_ends_its_request(trailed, monkeypatch):
    monkeypatch.setattr(ScoringReward, "_problem", lambda self, ids: (
        stars.RewardError("it is unknown") if len(ids) > 20 else None))
    made = engine()
    asked = [{"prompt_token_ids": ids(length, vocab=37, seed=length)} for length in (4, 15)]
    params = stars.SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    short, long = made.generate(asked, params, stars.STARS(4, 2, reward_threshold=0.0), use_tqdm=False)
    assert short.outputs[0].error is None and long.outputs[0].error == "it is unknown" and trailed
    made.check_integrity()


def test_logits_that_are_nan_end_the_request(trailed):
    """The draft leaves token -1, which the pass after it must survive."""
    made = engine()
    made._round.drafter.decoder.final_norm.fill_(float("nan"))
    [output] = made.generate({"prompt_token_ids": PREFIX}, stars.SamplingParams(max_tokens=8, seed=1),
                             stars.STARS(4, 2, reward_threshold=0.0), use_tqdm=False)
    assert "NaN" in output.outputs[0].error and trailed
    made.check_integrity()


def near(got, wanted) -> bool:
    """Equal, but for the last bits of numbers."""
    if isinstance(wanted, float):
        return abs(got - wanted) <= 1e-4
    if isinstance(wanted, (list, tuple)):
        return len(got) == len(wanted) and all(map(near, got, wanted))
    return got == wanted


@pytest.mark.parametrize("place", ["prepare_trailing", "launch_prepared", "rewards", "pace", "drafted"])
def test_an_interrupt_loses_nothing(trailed, monkeypatch, place):
    """Slabs go back, and the segment is drawn again from the same random numbers."""
    chosen = requests()[:2]
    before = run(engine(), chosen)
    made = engine()
    holder = Passes if hasattr(Passes, place) else type(made._round.drafter)
    whole, calls = getattr(holder, place), []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **named)

    monkeypatch.setattr(holder, place, interrupted)
    for prompt, params, policy in chosen:
        made.add_request(prompt, params, policy)
    done = {}
    while made.has_unfinished_requests():
        try:
            done |= {output.request_id: output for output in made.step()}
        except KeyboardInterrupt:
            made.check_integrity()
    made.check_integrity()
    assert len(calls) > 3
    # What had been committed was read again in longer passes, which round otherwise.
    for got, wanted in zip(map(decided, done.values()), before, strict=True):
        assert near(got, wanted)
