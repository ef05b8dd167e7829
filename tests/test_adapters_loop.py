"""The adapters' loop: with a stack that recomputes everything it makes the engine's texts, attempts and decisions."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from stars import CARDS, STARS, BlockwiseBestOfK, Engine, RewardError, Sample, SamplingParams
from stars.adapters.drawing import Drawing, Proposal
from stars.adapters.law import law_of
from stars.adapters.loop import Loop, Response
from stars.adapters.scoring import Scoring
from stars.errors import RequestError
from stars.prompt import parse_prompt
from stars.reward import FunctionReward
from toy import EOS, ToyModel


class Recomputing:
    """A stack without a cache: every step runs the whole text, by the toy's own formulas."""

    def __init__(self, toy: ToyModel, proposal: Proposal):
        self.toy, self.proposal = toy, proposal
        self.open_sequences = 0
        self.kept: list[list[int]] = []

    def open(self, responses):
        for one in responses:
            one.sequence = object()
            self.open_sequences += 1

    def draft(self, asked):
        drawing = Drawing(asked, self.proposal)
        texts = [one.prompt.token_ids + one.token_ids for one, attempts in asked for _ in attempts]
        while not all(drawing.done):
            logits = torch.stack([torch.tensor(self.toy.logits(text)).float() for text in texts])
            before = drawing.done
            drawing.draw(logits)
            for text, token, done in zip(texts, drawing.token_ids, before, strict=True):
                if not done:
                    text.append(token)
        return drawing.drafts()

    def settle(self, settled):
        self.kept += [one for one in settled if one.kept]

    def close(self, response):
        self.open_sequences -= 1


def summed(prompt, responses):
    """A reward that any text has: higher for rarer tokens, with ties."""
    return [round(0.3 * sum((token * 7 + place) % 5 - 2 for place, token in enumerate(ids)), 3) for ids in responses]


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("policy", [
    STARS(segment_size=3, max_attempts=5, beta=0.4, reward_threshold=1.5, alpha=0.5),
    STARS(segment_size=4, max_attempts=3, beta=0.0, reward_threshold=0.5, alpha=1.0),
    BlockwiseBestOfK(k=4, segment_size=3), Sample()], ids=["soft", "hard", "best_of_k", "sample"])
def test_the_loop_makes_the_engines_texts(policy, width):
    toy = ToyModel(vocab=7, seed=3)
    params = [SamplingParams(max_tokens=11, seed=seed, temperature=0.9, top_k=5) for seed in range(4)]
    prompts = [[1, 2, 3], [4], [5, 6, 1, 2, 2], [3, 3]]
    engine = Engine(toy.decoder(), FunctionReward(summed, inputs="ids"))
    wanted = [engine.generate({"prompt_token_ids": ids}, one, policy=policy, use_tqdm=False)[0].outputs[0]
              for ids, one in zip(prompts, params, strict=True)]
    law = law_of(policy, "the test")
    scoring = Scoring(FunctionReward(summed, inputs="ids"), None, 7, max_model_len=64,
                      segment_size=law.segment_size) if law.scores else None
    stack = Recomputing(toy, Proposal(0.9, 5, stop_ids=(EOS,)))
    responses = [Response(parse_prompt({"prompt_token_ids": ids}, None, 7), one.seed, 0, 11)
                 for ids, one in zip(prompts, params, strict=True)]
    loop = Loop(stack, scoring, law, None, frozenset({EOS}), width if law.scores else None)
    assert [len(changed) for changed in loop.run(responses)]
    assert stack.open_sequences == 0
    for response, output in zip(responses, wanted, strict=True):
        found = response.output()
        assert found.token_ids == output.token_ids
        assert found.finish_reason == output.finish_reason
        if not law.scores:
            continue
        assert found.metrics.accepted == output.metrics.accepted
        assert found.metrics.attempts_counted == output.metrics.attempts_counted
        for mine, theirs in zip(found.segments, output.segments, strict=True):
            assert (mine.token_ids, mine.reward, mine.accepted, mine.winner) == (
                theirs.token_ids, theirs.reward, theirs.accepted, theirs.winner)
            for one, other in zip(mine.attempts, theirs.attempts, strict=False):  # widths draw more or fewer beyond
                assert one.token_ids == other.token_ids
                if one.reward is not None and other.reward is not None:
                    assert (one.reward, one.threshold, one.accepted) == (other.reward, other.threshold, other.accepted)
                    assert one.accept_probability == other.accept_probability


def test_a_failing_reward_ends_its_own_response_alone():
    def fails(prompt, responses):
        if prompt == [4]:
            raise RuntimeError("no reward today")
        return summed(prompt, responses)

    toy, law = ToyModel(vocab=7, seed=3), law_of(STARS(segment_size=3, reward_threshold=1.0, alpha=1.0), "the test")
    scoring = Scoring(FunctionReward(fails, inputs="ids"), None, 7, max_model_len=64, segment_size=3)
    stack = Recomputing(toy, Proposal(stop_ids=(EOS,)))
    responses = [Response(parse_prompt({"prompt_token_ids": ids}, None, 7), 5, 0, 9) for ids in ([1, 2], [4], [3])]
    for _ in Loop(stack, scoring, law, None, frozenset({EOS})).run(responses):
        pass
    assert [one.finish_reason == "error" for one in responses] == [False, True, False]
    assert isinstance(responses[1].error, RewardError) and "no reward today" in str(responses[1].error)
    assert stack.open_sequences == 0


def test_a_caller_that_stops_early_gives_everything_back():
    toy, law = ToyModel(vocab=7, seed=3), law_of(STARS(segment_size=2, reward_threshold=1.0, alpha=1.0), "the test")
    scoring = Scoring(FunctionReward(summed, inputs="ids"), None, 7, max_model_len=64, segment_size=2)
    stack = Recomputing(toy, Proposal())
    run = Loop(stack, scoring, law, None).run([Response(parse_prompt({"prompt_token_ids": [1]}, None, 7), 5, 0, 9)])
    next(run)
    assert stack.open_sequences == 1
    run.close()
    assert stack.open_sequences == 0


@pytest.mark.parametrize("policy", [None, STARS, CARDS(reward_threshold=1.0),
                                    BlockwiseBestOfK(k=(4, 2)), STARS(reward_threshold=1.0, exhaust="refuse")])
def test_policies_of_other_laws_are_refused_by_name(policy):
    with pytest.raises(RequestError, match="policy is|the test"):
        law_of(policy, "the test")


class Small(Recomputing):
    """The same with room for one response at a time."""

    def reserve(self, response):
        if self.open_sequences == 0:
            response.sequence, self.open_sequences = object(), 1
        return response.sequence is not None

    def open(self, responses):
        assert all(one.sequence is not None for one in responses)

    def draft(self, asked):
        assert len(asked) == 1
        return super().draft(asked)


def test_who_finds_no_room_waits_and_gets_the_same_text():
    toy, law = ToyModel(vocab=7, seed=3), law_of(STARS(segment_size=2, reward_threshold=1.0, alpha=1.0), "the test")
    found = []
    for kind in (Recomputing, Small):
        scoring = Scoring(FunctionReward(summed, inputs="ids"), None, 7, max_model_len=64, segment_size=2)
        stack = kind(toy, Proposal(stop_ids=(EOS,)))
        responses = [Response(parse_prompt({"prompt_token_ids": ids}, None, 7), 5, 0, 9) for ids in ([1], [2], [3])]
        for _ in Loop(stack, scoring, law, None, frozenset({EOS}), reserve=getattr(stack, "reserve", None)).run(
                responses):
            pass
        assert stack.open_sequences == 0
        found.append([one.token_ids for one in responses])
    assert found[0] == found[1]


def test_responses_have_proposals_and_stop_tokens_of_their_own():
    toy, law = ToyModel(vocab=7, seed=3), law_of(Sample(), "the test")
    proposals = {1: Proposal(0.5, 3, stop_ids=(EOS, 4)), 2: Proposal(1.3, stop_ids=(EOS,))}

    class Several(Recomputing):
        def draft(self, asked):
            self.proposal = [proposals[one.prompt.token_ids[0]] for one, _ in asked]
            return super().draft(asked)

    def run(*ids):
        stack = Several(toy, Proposal())
        responses = [Response(parse_prompt({"prompt_token_ids": [one]}, None, 7), 5, 0, 9) for one in ids]
        for one in responses:
            one.stop_ids = frozenset(proposals[one.prompt.token_ids[0]].stop_ids)
            one.decode = lambda token_ids: " ".join(map(str, token_ids))
        for _ in Loop(stack, None, law, None).run(responses):
            pass
        return [(one.token_ids, one.text) for one in responses]

    together = run(1, 2)
    assert together == [*run(1), *run(2)]
    assert together[0][0][-1] == 4 and "4" not in together[0][1] and together[1][0].count(4)


def test_what_was_being_opened_is_given_back_when_that_fails():
    class Fails(Recomputing):
        def open(self, responses):
            super().open(responses[:1])
            raise RuntimeError("the stack fell over")

    toy, law = ToyModel(vocab=7, seed=3), law_of(STARS(segment_size=2, reward_threshold=1.0, alpha=1.0), "the test")
    scoring = Scoring(FunctionReward(summed, inputs="ids"), None, 7, max_model_len=64, segment_size=2)
    stack = Fails(toy, Proposal())
    responses = [Response(parse_prompt({"prompt_token_ids": [1]}, None, 7), 5, 0, 9) for _ in range(2)]
    with pytest.raises(RuntimeError, match="fell over"):
        next(Loop(stack, scoring, law, None).run(responses))
    assert stack.open_sequences == 0 and all(one.session is None and one.controller is None for one in responses)


def engines_and_ours(policy, params, fn=summed, prompts=([1, 2], [4], [3, 5])):
    """Outputs of the engine, and of the loop over the stack that recomputes, of the same prompts."""
    toy, law = ToyModel(vocab=7, seed=3), law_of(policy, "the test")
    engine = Engine(toy.decoder(), FunctionReward(fn, inputs="ids"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of requests that end with an error
        wanted = [one.outputs[0] for one in engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, policy=policy, use_tqdm=False)]
    scoring = Scoring(FunctionReward(fn, inputs="ids"), None, 7, max_model_len=64, segment_size=law.segment_size)
    stack = Recomputing(toy, Proposal(params.temperature, stop_ids=(EOS,)))
    responses = [Response(parse_prompt({"prompt_token_ids": ids}, None, 7), params.seed, 0, params.max_tokens,
                          params.temperature == 0.0) for ids in prompts]
    for _ in Loop(stack, scoring, law, None, frozenset({EOS})).run(responses):
        pass
    assert stack.open_sequences == 0
    return wanted, [one.output() for one in responses]


def test_greedy_responses_draw_one_attempt_a_segment_as_the_engine_does():
    policy = STARS(segment_size=3, max_attempts=9, beta=0.4, reward_threshold=1.5)
    wanted, found = engines_and_ours(policy, SamplingParams(max_tokens=9, seed=1, temperature=0.0))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert [(len(one.attempts), one.accepted) for one in mine.segments] == [
            (len(one.attempts), one.accepted) for one in theirs.segments]
        assert {len(one.attempts) for one in mine.segments} == {1}


class Raises(FunctionReward):
    """Of a call that has a candidate after the prompt [4]."""

    def score(self, candidates):
        if any(one.session.prompt == [4] for one in candidates):
            raise RuntimeError("boom")
        return super().score(candidates)


def test_a_reward_that_raises_in_a_common_call_ends_its_own_response_alone():
    toy, law = ToyModel(vocab=7, seed=3), law_of(STARS(segment_size=3, reward_threshold=1.0, alpha=1.0), "the test")
    outputs = {}
    for reward in (Raises(summed, inputs="ids"), FunctionReward(summed, inputs="ids")):
        stack = Recomputing(toy, Proposal(stop_ids=(EOS,)))
        responses = [Response(parse_prompt({"prompt_token_ids": ids}, None, 7), 5, 0, 9) for ids in ([1, 2], [4], [3])]
        scoring = Scoring(reward, None, 7, max_model_len=64, segment_size=3)
        for _ in Loop(stack, scoring, law, None, frozenset({EOS})).run(responses):
            pass
        outputs[type(reward)] = [one.output() for one in responses]
        assert stack.open_sequences == 0
    raised, fine = outputs[Raises], outputs[FunctionReward]
    assert [one.error for one in raised] == [None, "the reward raised RuntimeError: boom", None]
    assert [raised[place].token_ids for place in (0, 2)] == [fine[place].token_ids for place in (0, 2)]


def test_logits_that_are_none_end_their_own_response_alone():
    """As in the engine, with its words."""

    class Broken(ToyModel):
        def logits(self, text):
            found = super().logits(text)
            return found * float("nan") if text[0] == 4 else found - float("inf") if text[0] == 3 else found

    toy, law = Broken(vocab=7, seed=3), law_of(STARS(segment_size=3, reward_threshold=1.0, alpha=1.0), "the test")
    stack = Recomputing(toy, Proposal(stop_ids=(EOS,)))
    responses = [Response(parse_prompt({"prompt_token_ids": ids}, None, 7), 5, 0, 9) for ids in ([1, 2], [4], [3])]
    scoring = Scoring(FunctionReward(summed, inputs="ids"), None, 7, max_model_len=64, segment_size=3)
    for _ in Loop(stack, scoring, law, None, frozenset({EOS})).run(responses):
        pass
    assert [one.finish_reason == "error" for one in responses] == [False, True, True]
    assert "NaN" in str(responses[1].error) and "no token" in str(responses[2].error)
    assert stack.open_sequences == 0


def test_an_output_stays_as_it_was():
    """Metrics go on counting while a response grows; those of an output that was handed out do not."""
    toy, law = ToyModel(vocab=7, seed=3), law_of(STARS(segment_size=2, reward_threshold=1.0, alpha=1.0), "the test")
    scoring = Scoring(FunctionReward(summed, inputs="ids"), None, 7, max_model_len=64, segment_size=2)
    response = Response(parse_prompt({"prompt_token_ids": [1]}, None, 7), 5, 0, 9)
    outputs = []
    for changed in Loop(Recomputing(toy, Proposal()), scoring, law, None).run([response]):
        outputs += [one.output() for one in changed]
    assert [one.metrics.segments for one in outputs] == [1, 2, 3, 4, 5]


def test_another_vllm_is_refused_by_name(tmp_path):
    """Before anything is imported that another version may not have."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("__version__ = '0.99.1'\n")
    done = subprocess.run([sys.executable, "-c", "import stars.adapters; stars.adapters.vllm_scheduler"], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "StarsError" in last and "0.99.1" in last, done.stderr
