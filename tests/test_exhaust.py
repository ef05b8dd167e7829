"""What is done where a rule decides nothing: the engine against the oracle, and what a segment that is taken back leaves.

The oracle (oracle.py) keeps no cache and draws one attempt at a time. A wrong row in the pages of either model after an
attempt without a slab was kept, or after a segment was taken back, would move log-probabilities and rewards by far more
than the rounding (2e-4, as in test_oracle.py); soon the tokens would differ too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

import oracle
import stars
from building import PADDED, work_as
from stars.plan import Fixed, Lanes, Plan, Sampled, Score, Whole
from stars.rules import BackUp, BestSeen, Decision, Exhaustion, First, Judged, Last, Refuse, Relax, Softmax, State
from test_conservation import nothing_is_held
from test_oracle import FUNCTION, LM, RM, TOLERANCE, equals_oracle, rejecting
from toy import ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = {"prompt_token_ids": ids(6, seed=2)}
CASES = {
    "first": dict(segment_size=3, max_attempts=5, beta=0.1, reward_threshold=3.0, exhaust="first"),
    "last": dict(segment_size=3, max_attempts=5, beta=0.1, reward_threshold=3.0, exhaust="last"),
    "softmax": dict(segment_size=3, max_attempts=5, beta=0.1, reward_threshold=3.0, exhaust=Softmax(0.6)),
    "relax": dict(segment_size=2, max_attempts=6, beta=1.0, reward_threshold=6.0, exhaust=Relax(1.0, 3, "last")),
    "back up": dict(segment_size=2, max_attempts=2, beta=0.3, reward_threshold=2.5, exhaust=BackUp(2)),
    "back up again and again": dict(segment_size=1, max_attempts=2, alpha=0.0, beta=0.1, reward_threshold=4.0,
                                    exhaust=BackUp(9, Softmax(0.5))),
    "relax, back up, refuse": dict(segment_size=2, max_attempts=2, beta=0.2, reward_threshold=2.5,
                                   exhaust=Relax(0.3, 2, BackUp(3, Refuse()))),
    "back up, relax": dict(segment_size=2, max_attempts=3, beta=0.1, reward_threshold=2.5,
                           exhaust=BackUp(3, Relax(0.3, 2, "last"))),
    "refuse": dict(segment_size=2, max_attempts=4, beta=0.3, reward_threshold=2.0, exhaust="refuse"),
}
OTHERS = {  # SamplingParams of a case
    "back up": dict(ignore_eos=True), "back up again and again": dict(ignore_eos=True, repetition_penalty=1.3),
    "relax, back up, refuse": dict(ignore_eos=True), "refuse": dict(stop_token_ids=[2]),
}


class Counted:
    """What an engine did besides: segments that were taken back, rows of winners that had no slab."""

    def __init__(self, monkeypatch):
        self.taken_back: list[int] = []
        self.read_again = 0
        take_back, append = stars.request.Hypothesis.take_back, stars.request.Hypothesis.append

        def counting(hypothesis):
            self.taken_back.append(len(hypothesis.segments))
            take_back(hypothesis)

        def looking(hypothesis, winner):
            self.read_again += winner.finish_reason is None and not winner.rows
            append(hypothesis, winner)

        monkeypatch.setattr(stars.request.Hypothesis, "take_back", counting)
        monkeypatch.setattr(stars.request.Hypothesis, "append", looking)


def run_cases(reward, width: int | None, of: Callable[[str], Callable], **options) -> dict[str, stars.RequestOutput]:
    """All cases in one batch, compared with the oracle; `of` gives the reward of a case's responses."""
    engine = toy_engine(LM, reward, max_num_seqs=64, max_num_lanes=256, **options)
    policies = [stars.STARS(**case, width=width) for case in CASES.values()]
    params = [stars.SamplingParams(**dict(max_tokens=12, n=3, seed=50 + index) | OTHERS.get(name, {}))
              for index, name in enumerate(CASES)]
    prompts = [{"prompt_token_ids": ids(6 + index, seed=index)} for index in range(len(CASES))]
    outputs = engine.generate(prompts, params, policies, use_tqdm=False)
    for name, output, policy, sampling in zip(CASES, outputs, policies, params, strict=True):
        equals_oracle(output, LM, of(name, output.prompt_token_ids), policy, sampling)
    nothing_is_held(engine)
    return dict(zip(CASES, outputs, strict=True))


@pytest.mark.parametrize("width", [1, 3])
def test_a_function(width, monkeypatch):
    """All of the loop: which attempt is kept, at which threshold, which numbers a segment is drawn anew with."""
    counted = Counted(monkeypatch)
    rewards = {tuple(ids(6 + index, seed=index)): rejecting if name == "softmax" else FUNCTION
               for index, name in enumerate(CASES)}
    reached = run_cases(stars.FunctionReward(
        lambda prompt, responses: [rewards[tuple(prompt)](response) for response in responses], inputs="ids"), width,
        lambda name, prompt: rewards[tuple(prompt)])
    assert len(counted.taken_back) > 20 and max(counted.taken_back) > 3, counted.taken_back
    ends = {name: [one.finish_reason for one in output.outputs] for name, output in reached.items()}
    assert "refused" in ends["refuse"] and "refused" in ends["relax, back up, refuse"], ends
    segments = {name: [segment for one in output.outputs for segment in one.segments]
                for name, output in reached.items()}
    assert {segment.relaxed for segment in segments["relax"]} > {0, 1}
    assert any(segment.winner not in (0, 4) and not segment.accepted for segment in segments["softmax"])


@pytest.mark.parametrize("target", [None, PADDED], ids=["CPU", "as a GPU works"])
@pytest.mark.parametrize("width", [1, 4])
def test_a_reward_model(width, target, monkeypatch):
    """Its pages, too: of attempts that had given their slabs back, and of segments that were taken back."""
    if target is not None:
        work_as(monkeypatch, target)
    counted = Counted(monkeypatch)
    run_cases(stars.CausalReward(RM.decoder()), width,
              lambda name, prompt: lambda response: RM.reward(prompt + response))
    assert len(counted.taken_back) > 10, counted.taken_back
    assert counted.read_again > 0 or width > 1


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("other", [False, True], ids=["same tokenizer", "another tokenizer"])
def test_models_from_files(other, deterministic, tiny_model, monkeypatch):
    """The text is the same at any width and in pages that are scarce, the reward that of the text that is left."""
    counted = Counted(monkeypatch)
    lm = tiny_model(family="llama", tokenizer=True, chat_template=True)
    rm = tiny_model(tokenizer=True, chat_template=True, head="reward", tokenizer_seed=int(other))
    params = [stars.SamplingParams(max_tokens=14, n=2, seed=seed, ignore_eos=True) for seed in (1, 2)]
    prompts = ["The dog sleeps", "A quick brown fox jumps over"]

    def run(width: int, cache_tokens: int, threshold: float):
        engine = stars.Engine(str(lm), stars.CausalReward(str(rm)), cache_tokens=cache_tokens, page_size=4,
                              deterministic=deterministic, max_model_len=64, max_num_lanes=8, max_num_seqs=4)
        policies = [stars.STARS(3, 3, 1.0, 0.05, threshold, width, exhaust) for exhaust in (
            BackUp(4, Softmax(0.1)), BackUp(2, Relax(0.1, 2, "first")))]
        outputs = engine.generate(prompts, params, policies, use_tqdm=False)
        nothing_is_held(engine)
        plain = engine.generate(prompts, params, stars.Sample(score=True), use_tqdm=False)
        return outputs, sorted(one.reward for output in plain for one in output.outputs)[-1]

    _, threshold = run(2, 1024, 0.0)
    roomy, _ = run(1, 1024, threshold)
    assert len(counted.taken_back) > 4
    scarce, _ = run(3, 256 if other else 96, threshold)
    for one, same in zip(roomy, scarce, strict=True):
        for first, second in zip(one.outputs, same.outputs, strict=True):
            assert (first.text, first.finish_reason, first.error) == (second.text, second.finish_reason, None)
            assert first.reward == (second.reward if deterministic else pytest.approx(second.reward, abs=TOLERANCE))
    engine = stars.Engine(str(lm), stars.CausalReward(str(rm)), cache_tokens=1024, page_size=4, max_model_len=64)
    for prompt, output in zip(prompts, roomy, strict=True):
        for completion in output.outputs:  # scored from scratch: a response of its own, one segment, which is kept
            again = rescored(engine, prompt, completion.token_ids)
            assert completion.reward == pytest.approx(again, abs=TOLERANCE)


def rescored(engine: stars.Engine, prompt: str, token_ids: Sequence[int]) -> float:
    """The reward of a response, in a session of its own."""
    reward, text = engine.reward, engine.tokenizer.decode(list(token_ids))
    parsed = stars.prompt.parse_prompt(prompt, engine.tokenizer, 1 << 20)
    session = reward.open(parsed, 32)
    reward.start([session])
    [scored] = reward.score([stars.reward.base.Candidate(session, list(token_ids), text)])
    reward.discard(scored.handle)
    reward.close(session)
    return scored.reward
