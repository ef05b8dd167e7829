"""Log-probabilities of responses, of attempts and of prompts: against models without a cache, and in step with tokens.

A toy's logits are 24 float32 products of sums of at most 96 terms, values of order 1 to 10: 2e-4, as of `test_oracle`;
a rank may then be that of any token within twice that.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import stars
from letters import LETTERS, Language
from stars.exhaustions import BackUp
from stars.logit_reads import LogitReads
from stars.plan import Fixed, Lanes, Plan, Sampled, Score
from stars.policies import POLICIES
from stars.rules import Decision, Keep
from test_cli_methods import SETTINGS
from test_conservation import nothing_is_held, stepped_through_interrupts
from test_scheduler import preemptions, run
from toy import Digits, ToyModel, facts, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BOUND = 2e-4
MODEL = ToyModel(vocab=11, seed=5, layers=2, sharpness=1.3, positions=200)
STARS = stars.STARS(4, 6, 0.5, 0.4, 1.5, 2)


def engine(model=MODEL, reward="table", **options) -> stars.Engine:
    if reward == "table":
        table = table_reward(3)
        reward = stars.FunctionReward(lambda prompt, responses: [table(one) for one in responses], inputs="ids")
    return toy_engine(model, reward, **(dict(page_size=5, max_segment_size=16) | options))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    above = logits - logits.max()
    return above - np.log(np.exp(above).sum())


def check_entry(entry: dict[int, stars.Logprob], token: int, logprobs: np.ndarray, wanted: int, bound=BOUND) -> None:
    """An entry says what is true of a token that was drawn from exp(logprobs)."""
    first, *rest = entry
    assert first == token and entry[token].logprob == pytest.approx(logprobs[token], abs=bound)
    for key, (value, rank, _) in entry.items():
        assert value == pytest.approx(logprobs[key], abs=bound)
        assert (logprobs > logprobs[key] + 2 * bound).sum() < rank <= (logprobs >= logprobs[key] - 2 * bound).sum()
    possible = int((logprobs > -np.inf).sum())
    listed = sorted(entry, key=lambda key: entry[key].rank)
    tops = listed if entry[token].rank <= wanted else [key for key in listed if key != token]
    assert len(tops) == min(wanted, possible) and [entry[key].rank for key in tops] == list(range(1, len(tops) + 1))
    assert rest == [key for key in tops if key != token]


def check(output: stars.RequestOutput, params: stars.SamplingParams, logprobs_after=None, names=None) -> int:
    """Every token of a finished output, and of its attempts; how many entries there were."""
    logprobs_after = logprobs_after or (lambda token_ids: log_softmax(MODEL.logits(token_ids)))
    seen = 0

    def check_all(entries, before, token_ids) -> int:
        assert len(entries) == len(token_ids)
        for place, (entry, token) in enumerate(zip(entries, token_ids, strict=True)):
            check_entry(entry, token, logprobs_after([*before, *token_ids[:place]]), params.logprobs)
            for key, one in entry.items():
                assert one.decoded_token == (None if names is None else names(key))
        return len(entries)

    for completion in output.outputs:
        seen += check_all(completion.logprobs, output.prompt_token_ids, completion.token_ids)
        history = list(output.prompt_token_ids)
        for segment in completion.segments:
            for attempt in segment.attempts:
                if params.attempt_logprobs:
                    seen += check_all(attempt.logprobs, history, attempt.token_ids)
                    assert sum(entry[token].logprob for entry, token in zip(
                        attempt.logprobs, attempt.token_ids, strict=True)) == attempt.logprob
                else:
                    assert attempt.logprobs is None
            history += segment.token_ids
    return seen


def in_step(output: stars.RequestOutput, params: stars.SamplingParams) -> None:
    """One entry a token, the token first, none more than is asked for; what was drawn adds up to what is said."""
    for completion in output.outputs:
        assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
        assert all(len(entry) <= params.logprobs + 1 for entry in completion.logprobs)
        total, place = 0.0, 0
        for segment in completion.segments:
            drawn = [completion.logprobs[place + i][token].logprob for i, token in enumerate(segment.token_ids)]
            total += sum(drawn)  # as the engine adds: to the same bits
            place += len(segment.token_ids)
            assert sum(drawn) == segment.logprob
        assert place == len(completion.token_ids) and total == completion.cumulative_logprob


# -- what they say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0, 3, 20])
def test_of_responses_and_attempts(wanted):
    """Of 11 tokens 20 are all."""
    made, seen = engine(tokenizer=Digits()), 0
    for number, policy in enumerate((STARS, stars.Sample(), stars.BestOfN(3), stars.ParticleFilter(3, segment_size=4),
                                     stars.ARGS(topk=4))):
        params = stars.SamplingParams(max_tokens=17, n=2, seed=number, logprobs=wanted, attempt_logprobs=True,
                                      temperature=0.8, top_k=6)
        [output] = made.generate({"prompt_token_ids": ids(7, 11, number)}, params, policy, use_tqdm=False)
        if not isinstance(policy, stars.BestOfN):  # whose segment's attempts are whole responses
            in_step(output, params)
        seen += check(output, params, names=lambda key: Digits().decode([key]))
    assert seen > 250
    nothing_is_held(made)


def test_of_a_real_tokenizer_and_transformers(tiny_model):
    """Response and prompt beside log_softmax of one forward pass over everything; 36 features, two layers: the bound of
    `test_parity`, 2e-4. Tokens are named one by one, special ones too."""
    import transformers

    directory = tiny_model(family="qwen2", tokenizer=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(directory)
    params = stars.SamplingParams(max_tokens=30, seed=4, logprobs=5, prompt_logprobs=4, ignore_eos=True)
    made = stars.Engine(directory, device="cpu", cache_tokens=2048)
    [output] = made.generate("Once upon a time, Größe 東", params, use_tqdm=False)
    [completion] = output.outputs
    token_ids = output.prompt_token_ids + completion.token_ids
    with torch.no_grad():
        wanted = torch.log_softmax(theirs(torch.tensor([token_ids])).logits[0].double(), -1).numpy()
    for place, entry in enumerate(output.prompt_logprobs + completion.logprobs):
        if not place:
            assert entry is None
            continue
        check_entry(entry, token_ids[place], wanted[place - 1],
                    4 if place < len(output.prompt_token_ids) else 5)
        for key, one in entry.items():
            assert one.decoded_token == words.decode([key])
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) > 12 and len(completion.logprobs) == 30


@pytest.mark.parametrize("vocab", [5, 17, 49153])
def test_of_odd_vocabularies(vocab):
    model = ToyModel(vocab=vocab, seed=3, layers=1, positions=64)
    made = engine(model, None)
    params = stars.SamplingParams(max_tokens=6, seed=1, logprobs=20, prompt_logprobs=20, ignore_eos=True)
    [output] = made.generate({"prompt_token_ids": ids(9, vocab)}, params, use_tqdm=False)

    def after(token_ids):
        return log_softmax(model.logits(token_ids))

    assert check(output, params, after) == 6
    for place, entry in enumerate(output.prompt_logprobs[1:], 1):
        check_entry(entry, output.prompt_token_ids[place], after(output.prompt_token_ids[:place]), 20)


def test_with_penalties_and_edits():
    """What tokens are drawn from: bias before penalties; banned tokens are in no entry."""
    params = stars.SamplingParams(max_tokens=20, seed=2, logprobs=6, attempt_logprobs=True, repetition_penalty=1.3,
                                  presence_penalty=0.4, frequency_penalty=0.3, logit_bias={3: 1.5, 4: -2.0},
                                  allowed_token_ids=[1, 3, 4, 6, 7, 9], ignore_eos=True)
    prompt = ids(6, 11, 4)

    def after(token_ids):
        response = token_ids[len(prompt) :]
        z = MODEL.logits(token_ids).astype(np.float64).copy()
        for token, bias in params.logit_bias.items():
            z[token] += bias
        said = np.bincount(response, minlength=11)
        for token in {*token_ids}:
            z[token] = z[token] / 1.3 if z[token] > 0 else z[token] * 1.3
        z -= 0.3 * said + 0.4 * (said > 0)
        z[[token for token in range(11) if token not in params.allowed_token_ids]] = -np.inf
        return log_softmax(z)

    made = engine()
    [output] = made.generate({"prompt_token_ids": prompt}, params, STARS, use_tqdm=False)
    assert check(output, params, after) > 40
    assert all({*entry} <= {1, 3, 4, 6, 7, 9} for entry in output.outputs[0].logprobs)


@pytest.mark.parametrize("name", ["stars", "sample", "args"])
def test_under_a_grammar(name):
    """Of the allowed tokens alone, which make all of the probability; penalties come after the mask."""
    pytest.importorskip("llguidance")
    language = Language("((a|b)(a|b|c))*", 10)  # four tokens have at most eight letters
    policy = {"stars": STARS, "sample": stars.Sample(), "args": stars.ARGS(topk=3)}[name]
    params = stars.SamplingParams(max_tokens=4, n=8, seed=9, logprobs=4, attempt_logprobs=True, temperature=0.7,
                                  repetition_penalty=1.2, structured_outputs={"regex": language.regex})
    prompt = ids(5, 5, 4)

    def after(token_ids):
        z = MODEL.logits(token_ids).astype(np.float64).copy()
        z[[token for token in range(11) if token not in language.allowed(tuple(token_ids[len(prompt) :]))]] = -np.inf
        for token in {*token_ids}:
            z[token] = z[token] / 1.2 if z[token] > 0 else z[token] * 1.2
        return log_softmax(z)

    [output] = engine(tokenizer=LETTERS).generate({"prompt_token_ids": prompt}, params, policy, use_tqdm=False)
    assert check(output, params, after, lambda key: LETTERS.decode([key])) > 14
    in_step(output, params)


def test_of_a_blend_and_of_what_another_model_redrew():
    """Of a blend its own distribution; of a segment that the large model redrew, the large model's."""
    small = ToyModel(vocab=11, seed=8, layers=1, positions=200)
    made = engine(models={"small": small.decoder(), "guide": small.decoder()})
    params = stars.SamplingParams(max_tokens=16, seed=6, logprobs=4, attempt_logprobs=True, ignore_eos=True)
    [output] = made.generate({"prompt_token_ids": ids(6, 11, 4)}, params, stars.TokenGuidance(weight=0.4),
                             use_tqdm=False)

    def blend(token_ids):
        return log_softmax(0.6 * MODEL.logits(token_ids) + 0.4 * small.logits(token_ids))

    assert check(output, params, blend) > 16
    policy = stars.RewardGuidedSpeculation(reward_threshold=2.0, segment_size=4)
    [output] = made.generate({"prompt_token_ids": ids(6, 11, 4)}, params, policy, use_tqdm=False)
    [completion] = output.outputs
    place, seen = 0, set()
    for segment in completion.segments:
        model = {"small": small, "lm": MODEL}[segment.model]
        seen.add(segment.model)
        for token in segment.token_ids:
            before = output.prompt_token_ids + completion.token_ids[:place]
            check_entry(completion.logprobs[place], token, log_softmax(model.logits(before)), 4)
            place += 1
    assert seen == {"small", "lm"} and place == 16


class Forcing:
    """Keeps two tokens of the first attempt and puts 7, 8 after them."""

    in_order, uniforms = True, 0

    def __call__(self, judged, state):
        one = judged[0]
        return Decision([Keep(one.hypothesis, one.attempt, 2, (7, 8))], [], {})


class Forced:
    def plan(self) -> Plan:
        return Plan(Sampled(), Fixed(4), Lanes(1, 1), Score("never"), Forcing())


def test_tokens_that_a_rule_has_put_had_all_of_the_probability():
    params = stars.SamplingParams(max_tokens=16, seed=6, logprobs=3, ignore_eos=True)
    [output] = engine(tokenizer=Digits()).generate({"prompt_token_ids": ids(6, 11, 4)}, params, Forced(),
                                                   use_tqdm=False)
    [completion] = output.outputs
    in_step(output, params)
    for place, token in enumerate(completion.token_ids):
        if place % 4 < 2:
            before = output.prompt_token_ids + completion.token_ids[:place]
            check_entry(completion.logprobs[place], token, log_softmax(MODEL.logits(before)), 3)
        else:
            assert completion.logprobs[place] == {token: stars.Logprob(0.0, 1, str(token))}
    assert completion.token_ids[2:4] == [7, 8] and len(completion.token_ids) == 16


def test_of_a_judges_token_the_judge_says_it():
    """Drafted tokens in the draft's context, the one after them in the judge's; of them alone the sum is told."""
    made, put = engine(reward=None, tokenizer=Digits()), 0
    for seed in range(6):
        params = stars.SamplingParams(max_tokens=22, seed=seed, logprobs=3, prompt_logprobs=2, ignore_eos=True)
        policy = stars.PersonaJudge("812", "54", gamma=3, alternate=False)
        [output] = made.generate({"prompt_token_ids": [1, 2, 3]}, params, policy, use_tqdm=False)
        [completion] = output.outputs
        place, total = 0, 0.0
        for segment in completion.segments:
            drafted = segment.attempts[0].token_ids
            kept = next((i for i, (a, b) in enumerate(zip(segment.token_ids, drafted, strict=False)) if a != b),
                        min(len(segment.token_ids), len(drafted)))
            for number, token in enumerate(segment.token_ids):
                context = [8, 1, 2] if number < kept else [5, 4]
                before = [*context, 1, 2, 3, *completion.token_ids[:place]]
                check_entry(completion.logprobs[place], token, log_softmax(MODEL.logits(before)), 3)
                total += completion.logprobs[place][token].logprob if number < kept else 0.0
                put += number >= kept
                place += 1
        assert place == 22 and total == pytest.approx(completion.cumulative_logprob, abs=1e-5)
        read = [8, 1, 2, 1, 2, 3]  # the context that it drafts in, the preference among it
        assert [next(iter(entry)) for entry in output.prompt_logprobs[1:]] == read[1:]
        for count, entry in enumerate(output.prompt_logprobs[1:], 1):
            check_entry(entry, read[count], log_softmax(MODEL.logits(read[:count])), 2)
    assert put > 10
    nothing_is_held(made)


# -- in step with tokens --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> stars.Engine:
    from stars.cli.options import shipped_heads, shipped_models, shipped_pair

    models, heads = {}, {}
    for policy in (stars.MARA(), stars.TokenGuidance(), stars.RewardGuidedSpeculation(reward_threshold=0.5)):
        models |= shipped_models(policy) or {}
        heads |= shipped_heads(policy) or {}
    return stars.Engine(*shipped_pair(), models=models, heads=heads, device="cpu")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_them_in_step(shipped, name):
    """Of the shipped pair, streams and finished outputs."""
    _, given = SETTINGS[name]
    fields = {field.name for field in dataclasses.fields(POLICIES[name])}
    policy = POLICIES[name](**given, **(dict(reward_threshold=0.5) if "reward_threshold" in fields else {}))
    params = stars.SamplingParams(max_tokens=13, seed=3, n=2, logprobs=3, attempt_logprobs=True, prompt_logprobs=2)
    plain = dataclasses.replace(params, logprobs=None, attempt_logprobs=False, prompt_logprobs=None)
    outputs = list(shipped.stream("This film was", params, policy))
    for output in outputs:
        for completion in output.outputs:
            assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
            assert all(0 < len(entry) <= 4 for entry in completion.logprobs)
            for segment in completion.segments:
                for attempt in segment.attempts:
                    assert [next(iter(entry)) for entry in attempt.logprobs] == attempt.token_ids
        assert [entry and len(entry) >= 2 for entry in output.prompt_logprobs][:2] == [None, True]
    [alone] = shipped.generate("This film was", plain, policy, use_tqdm=False)
    for mine, other in zip(outputs[-1].outputs, alone.outputs, strict=True):
        assert (mine.token_ids, mine.reward, mine.finish_reason) == (other.token_ids, other.reward, other.finish_reason)
        assert other.logprobs is None and all(attempt.logprobs is None for segment in other.segments
                                              for attempt in segment.attempts)


def test_they_are_the_same_at_any_width_and_in_any_batch():
    """To the bit: a row does not depend on the others."""
    params = stars.SamplingParams(max_tokens=18, seed=2, logprobs=4, attempt_logprobs=True, prompt_logprobs=3,
                                  ignore_eos=True)
    prompt = {"prompt_token_ids": ids(23, 11, 4)}
    made, found = engine(max_num_batched_tokens=8), []
    for width, beside in ((1, 0), (3, 0), (5, 3)):
        others = [({"prompt_token_ids": ids(9 + i, 11, i)}, stars.SamplingParams(
            max_tokens=12, seed=i, logprobs=None if i else 7), stars.Sample()) for i in range(beside)]
        outputs = run(made, [*others, (prompt, params, stars.STARS(4, 6, 0.5, 0.4, 1.5, width))])
        [completion] = outputs[-1].outputs
        winners = [segment.attempts[segment.winner].logprobs for segment in completion.segments]
        found.append((completion.token_ids, completion.logprobs, winners, outputs[-1].prompt_logprobs))
        assert check(outputs[-1], params) > 18
    assert found[0] == found[1] == found[2]


def test_a_stop_string_cuts_them_with_the_segment():
    made, ended = engine(tokenizer=Digits()), 0
    for seed in range(12):
        params = stars.SamplingParams(max_tokens=30, seed=seed, stop=["32", "81", "5"], logprobs=2,
                                      attempt_logprobs=True)
        [output] = made.generate("12", params, STARS, use_tqdm=False)
        check(output, params, names=lambda key: Digits().decode([key]))
        in_step(output, params)
        ended += output.outputs[0].finish_reason == "stop"
    assert ended > 4


def test_segments_that_are_taken_back_take_theirs_along():
    policy = stars.STARS(3, 2, 1.0, 0.0, 2.5, 2, exhaust=BackUp(3))
    made, taken = engine(), 0
    for seed in range(8):
        params = stars.SamplingParams(max_tokens=15, seed=seed, logprobs=2, ignore_eos=True)
        for output in made.stream({"prompt_token_ids": ids(5, 11, 1)}, params, policy):
            [completion] = output.outputs
            assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
        in_step(output, params)
        assert check(output, params) == 15
        taken += completion.metrics.lm_tokens_drawn > 6 * completion.metrics.segments
    assert taken


def test_refused_and_aborted_ones_have_those_of_what_is_left():
    refusing = stars.RejectionSampling(1e9, 0.0, 2, exhaust="refuse")
    params = stars.SamplingParams(max_tokens=8, seed=1, logprobs=2, prompt_logprobs=1)
    made = engine()
    [output] = made.generate({"prompt_token_ids": ids(5, 11, 1)}, params, refusing, use_tqdm=False)
    assert output.outputs[0].finish_reason == "refused" and output.outputs[0].logprobs == []
    made.add_request({"prompt_token_ids": ids(5, 11, 1)}, dataclasses.replace(params, max_tokens=60, ignore_eos=True),
                     STARS, request_id="a")
    made.step()
    made.abort("a")
    [output] = made.step()
    assert output.outputs[0].finish_reason == "abort" and 0 < len(output.outputs[0].token_ids) < 60
    assert len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids) and len(output.prompt_logprobs) == 5
    made.add_request({"prompt_token_ids": ids(5, 11, 1)}, params, STARS, request_id="b")
    made.abort("b")
    [output] = made.step()
    assert output.outputs[0].logprobs == [] and output.prompt_logprobs is None  # nobody has read it
    nothing_is_held(made)


JOBS = [({"prompt_token_ids": ids(17 + 3 * index, 11, index)},
         stars.SamplingParams(max_tokens=14 + index, n=1 + index % 2, seed=index, ignore_eos=True,
                              logprobs=index % 4 or None, prompt_logprobs=3 if index % 2 else None,
                              attempt_logprobs=index == 2),
         (STARS, stars.Sample(), stars.ParticleFilter(3, segment_size=4), stars.BestOfN(3))[index % 4])
        for index in range(8)]


def said(output: stars.RequestOutput) -> list:
    return [output.prompt_logprobs, *([completion.token_ids, completion.logprobs] for completion in output.outputs)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_who_gives_way_says_the_same(deterministic, monkeypatch):
    """A small cache and chunks of prompts: what was told of a prompt is not told twice, and nothing is left out."""
    tops, rows_told = LogitReads.tops, []
    monkeypatch.setattr(LogitReads, "tops", lambda self, first, targets, wanted: (
        rows_told.append(len(targets)), tops(self, first, targets, wanted))[1])
    outputs = [run(engine(cache_tokens=size, max_num_batched_tokens=rows, deterministic=deterministic), JOBS)
               for size, rows in ((3000, 2048), (115, 8))]
    assert preemptions(outputs[0]) == 0 and preemptions(outputs[1]) >= 3
    asked = [len(prompt["prompt_token_ids"]) - 1 for prompt, params, _ in JOBS if params.prompt_logprobs is not None]
    assert sum(rows_told) == 2 * sum(asked) and len(rows_told) > 4 * len(asked)
    for one, other, (_, params, _) in zip(*outputs, JOBS, strict=True):
        if params.prompt_logprobs is not None:
            for place, entry in enumerate(other.prompt_logprobs):
                if place:
                    before = other.prompt_token_ids[:place]
                    check_entry(entry, other.prompt_token_ids[place], log_softmax(MODEL.logits(before)), 3)
            assert len(other.prompt_logprobs) == len(other.prompt_token_ids)
        else:
            assert other.prompt_logprobs is None
        if params.logprobs is not None:
            check(other, params)
        if deterministic:
            assert said(one) == said(other)
        else:
            assert facts(one)[0][0] == facts(other)[0][0]


def test_interrupts_leave_them_in_step(monkeypatch):
    """At every pass, draft and commit of a request: the output is that of an undisturbed one."""
    from stars.draft import Drafter
    from stars.passes import Passes
    from stars.request import Hypothesis

    def job():
        params = stars.SamplingParams(max_tokens=29, seed=3, n=2, logprobs=2, prompt_logprobs=2, ignore_eos=True)
        return {"prompt_token_ids": ids(14, 11, 2)}, params, STARS

    [wanted] = run(engine(max_num_batched_tokens=4, deterministic=True), [job()])
    counter = {"at": 0, "now": 0}

    def stopping(original):
        def call(self, *args, **kwargs):
            found = original(self, *args, **kwargs)
            counter["now"] += 1
            if counter["now"] == counter["at"]:
                raise KeyboardInterrupt
            return found
        return call

    monkeypatch.setattr(Drafter, "drafted", stopping(Drafter.drafted))
    monkeypatch.setattr(Passes, "tell", stopping(Passes.tell))
    monkeypatch.setattr(Passes, "prefill", stopping(Passes.prefill))
    monkeypatch.setattr(Hypothesis, "append", stopping(Hypothesis.append))
    for at in range(1, 16):
        counter.update(at=at, now=0)
        made = engine(max_num_batched_tokens=4, deterministic=True)
        made.add_request(*job())
        assert said(stepped_through_interrupts(made)) == said(wanted)
        assert counter["now"] > at
        nothing_is_held(made)


# -- prompts --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_anew_and_its_pages_are_shared_again():
    """One that is told shares nothing but what was told; its completions, and those after it, share it."""
    made, prompt = engine(max_num_batched_tokens=10), {"prompt_token_ids": ids(31, 11, 2)}
    plain = stars.SamplingParams(max_tokens=4, seed=1)
    asking = dataclasses.replace(plain, prompt_logprobs=2, n=3)
    cached = [made.generate(prompt, params, use_tqdm=False)[0] for params in (plain, asking, plain)]
    assert [[completion.metrics.prompt_tokens_cached for completion in output.outputs] for output in cached] == [
        [0], [0, 30, 30], [30]]
    for place, entry in enumerate(cached[1].prompt_logprobs[1:], 1):
        check_entry(entry, prompt["prompt_token_ids"][place],
                    log_softmax(MODEL.logits(prompt["prompt_token_ids"][:place])), 2)
    assert cached[0].prompt_logprobs is None


def test_a_population_whose_cache_holds_the_prompt_already():
    """There is room for the population, and not for that and pages that the prompt was left in: those are forgotten."""
    prompt = {"prompt_token_ids": ids(41, 11, 2)}
    params = stars.SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
    made = engine(cache_tokens=60)
    made.generate(prompt, params, use_tqdm=False)
    [output] = made.generate(prompt, dataclasses.replace(params, prompt_logprobs=1),
                             stars.ParticleFilter(2, segment_size=5), use_tqdm=False)
    assert len(output.prompt_logprobs) == 41 and output.outputs[0].finish_reason == "length"
    nothing_is_held(made)


def test_the_engines_own_model_reads_a_prompt_that_another_one_drafts_after():
    small = ToyModel(vocab=11, seed=8, layers=1, positions=200)
    made = engine(models={"small": small.decoder()}, reward=None)

    class BySmall:
        def plan(self) -> Plan:
            from stars.plan import Model
            from stars.rules import Always

            return Plan(Model("small"), Fixed(4), Lanes(1, 1), Score("never"), Always())

    params = stars.SamplingParams(max_tokens=9, seed=1, prompt_logprobs=3, logprobs=2, ignore_eos=True)
    [output] = made.generate({"prompt_token_ids": ids(12, 11, 3)}, params, BySmall(), use_tqdm=False)
    for place, entry in enumerate(output.prompt_logprobs[1:], 1):
        check_entry(entry, output.prompt_token_ids[place],
                    log_softmax(MODEL.logits(output.prompt_token_ids[:place])), 3)
    check(output, params, lambda token_ids: log_softmax(small.logits(token_ids)))
    nothing_is_held(made)


def test_prompts_of_one_token_and_what_is_not_asked_for():
    made = engine(reward=None)
    params = stars.SamplingParams(max_tokens=3, seed=1, prompt_logprobs=0)
    [output] = made.generate({"prompt_token_ids": [4]}, params, use_tqdm=False)
    assert output.prompt_logprobs == [None] and output.outputs[0].logprobs is None
    [output] = made.generate({"prompt_token_ids": [4, 5, 6]}, params, use_tqdm=False)
    assert [len(entry) for entry in output.prompt_logprobs[1:]] == [1, 1]
    assert all(math.isfinite(one.logprob) and one.rank >= 1 for entry in output.prompt_logprobs[1:]
               for one in entry.values())
    assert made._round.drafter._graphs._programs.keys() == {  # no part of a step that nobody asked for
        key for key in made._round.drafter._graphs._programs if not any("tell" in part for part in key)}


def test_the_command_line_has_them_in_its_rows(capsys):
    from stars.cli import main

    asked = ["generate", "This film was", "--max-tokens", "7", "--seed", "3", "--policy", "sample", "--json"]
    assert main([*asked, "--logprobs", "2"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert main(asked) == 0
    plain = json.loads(capsys.readouterr().out)
    [output] = row["outputs"]
    assert [entries[0]["token_id"] for entries in output["logprobs"]] == output["token_ids"] == (
        plain["outputs"][0]["token_ids"])
    assert sum(entries[0]["logprob"] for entries in output["logprobs"]) == output["cumulative_logprob"]
    assert all(2 <= len(entries) <= 3 and entries[0].keys() == {"token_id", "text", "logprob", "rank"}
               for entries in output["logprobs"])
    assert "logprobs" not in plain["outputs"][0]


def test_a_population_that_holds_its_prompt_twice_makes_room_for_itself():
    """Its first member reads the prompt anew, to tell of it, while the others share what a request before has left."""
    reward = stars.FunctionReward(lambda prompt, responses: [float(sum(one) % 7) for one in responses], "ids")
    made = toy_engine(ToyModel(vocab=11, seed=1, layers=1), reward, cache_tokens=196)
    for _ in range(2):
        [output] = made.generate({"prompt_token_ids": ids(57, 11)}, stars.SamplingParams(
            max_tokens=24, seed=1, ignore_eos=True, prompt_logprobs=1), stars.SpeculativeRejection(4, 0.01, 4),
            use_tqdm=False)
        assert output.outputs[0].error is None and len(output.prompt_logprobs) == 57
    nothing_is_held(made)
