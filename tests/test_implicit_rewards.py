"""The implicit reward of two language models: transformers' values, every method's, what counts, and what is refused.

Toy models say the expected values in float64, of whole texts, without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import stars
from building import PADDED, config_of, work_as
from editing import edit_config, edit_tensors
from stars.cache import PagedCache
from stars.model.tokenizer import load_tokenizer
from stars.passes import Passes, Span
from stars.plan import Fixed, Lanes, Plan, Sampled, Score, Whole
from stars.prompt import Prompt
from stars.reward.base import Candidate, Reward, Scored, with_parts
from stars.reward.logprobs import LogprobReward
from stars.rules import Decision, Judged, State, whole
from stars.sizes import ModelSizes
from test_conservation import nothing_is_held
from test_methods_outside import Breed
from toy import EOS, ToyModel, facts, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 2e-4  # of rewards, as in test_oracle.py
VOCAB = 7
LM, POLICY, REFERENCE = (ToyModel(VOCAB, seed, layers=1, positions=96) for seed in (1, 2, 3))
BETA = 0.75
PROMPTS = [{"prompt_token_ids": ids(length, VOCAB, seed)} for seed, length in enumerate((9, 3, 14, 9))]
PARAMS = stars.SamplingParams(max_tokens=14, n=2, seed=5, ignore_eos=True)
ENDING = stars.SamplingParams(max_tokens=14, n=3, seed=5)
STARS = stars.STARS(segment_size=4, max_attempts=5, alpha=0.4, beta=0.4, reward_threshold=1.0, width=3)
POLICIES = [
    STARS, stars.BlockwiseBestOfK(k=3, segment_size=5), stars.BestOfN(n=3), stars.SegmentBeam(2, 3, 4),
    stars.ParticleFilter(particles=3, segment_size=4), stars.ARGS(topk=4), stars.RAD(topk=3, beta=2.0),
    stars.RejectionSampling(reward_threshold=1.0, max_attempts=3), stars.SpeculativeRejection(n=3, segment_size=4),
    stars.CARDS(max_segment=6, max_attempts=3, reward_threshold=1.0), stars.Sample(score=True), Breed()]


def implicit(**options) -> stars.ImplicitReward:
    return stars.ImplicitReward(POLICY.decoder(), REFERENCE.decoder(), **({"beta": BETA} | options))


def logprob(model: ToyModel, before: Sequence[int], token: int) -> float:
    logits = model.logits(before)
    highest = logits.max()
    return float(logits[token] - highest - np.log(np.exp(logits - highest).sum()))


@cache
def ratio(before: tuple[int, ...], token: int) -> float:
    return logprob(POLICY, before, token) - logprob(REFERENCE, before, token)


def ratios(prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    text = (*prompt, *response)
    return [ratio(text[:place], text[place]) for place in range(len(prompt), len(text))]


def expected(prompt: Sequence[int], response: Sequence[int]) -> float:
    """Of a response with what ended it."""
    return BETA * sum(ratios(prompt, response))


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_log_probabilities_are_those_of_transformers(tiny_model, family):
    """At every beginning of a response, incrementally, with and without what ends it there; tokens of a segment each,
    as many as a slab holds, and more."""
    import transformers

    directory = tiny_model(family=family, tokenizer=True, window=6 if family == "mistral" else None)
    tokenizer = load_tokenizer(directory)
    text = tokenizer.encode("The quick brown fox sleeps near the forest, and on.", add_special_tokens=False)
    prompt, response = [1, *text[:5]], text[5:] + text[2:10]
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        logprobs = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0].double(), dim=-1)
    at = len(prompt) - 1  # row of the first token
    wanted = [float(logprobs[at + place, token]) for place, token in enumerate(response)]
    reward = LogprobReward(directory, "policy")
    reward.bind(tokenizer, tokenizer.vocab_size, config_of(cache_tokens=256, page_size=4, max_segment_size=4))
    session = reward.open(Prompt("x", prompt, "x"), 40)
    reward.start([session])
    done = 0
    for size in (1, 2, 4, 3, 0, 4, 7, 1):
        before, done = done, done + size
        [going, ended] = reward.score([Candidate(session, response[:done], None),
                                       Candidate(session, response[:done], None, stopped=2)])
        last = float(logprobs[at + done, 2])
        for scored, values in ((going, wanted[:done]), (ended, [*wanted[:done], last])):
            assert scored.reward == pytest.approx(sum(values), abs=2e-4)
            assert scored.per_token == pytest.approx(values[before:], abs=1e-4)
        assert (going.tokens_run, ended.tokens_run) == (size, size + 1)  # the last token's own row only for what ends
        reward.discard(ended.handle)
        reward.commit([(session, going.handle)])
        assert session.table.length == len(prompt) + done - 1
        assert session.logprobs == pytest.approx(wanted[:done], abs=1e-4)
    [final] = reward.score([Candidate(session, response, None, final=True, stopped=2)])
    assert final.reward == pytest.approx(sum(wanted) + float(logprobs[at + len(response), 2]), abs=2e-4)
    reward.discard(final.handle)
    reward.close(session)
    cache_ = reward.cache
    assert (cache_.num_free_pages, cache_.num_free_slabs) == (cache_.num_pages, cache_.num_slabs)


def generate(reward, policy=STARS, prompts=PROMPTS, params=PARAMS, **options) -> list[stars.RequestOutput]:
    engine = toy_engine(LM, reward, **options)
    outputs = engine.generate(prompts, params, policy, use_tqdm=False)
    nothing_is_held(engine)
    for part in with_parts(engine.reward):
        if isinstance(part, LogprobReward):
            held = part.cache
            assert held.num_free_pages == held.num_pages and held.num_free_slabs == held.num_slabs
    return outputs


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("params", [PARAMS, ENDING], ids=["whole length", "ending"])
def test_every_method_is_told_the_reward_of_whole_texts(policy, params):
    """Every reward of a run, and r(prompt), which is 0: the token that ends a response counts."""
    compared = ended = 0
    for output in generate(implicit(), policy, params=params):
        prompt = output.prompt_token_ids
        assert output.prompt_reward in (None, 0.0)
        for completion in output.outputs:
            assert completion.error is None
            ended += completion.token_ids[-1] == EOS and completion.finish_reason == "stop"
            assert completion.reward == pytest.approx(expected(prompt, completion.token_ids), abs=TOLERANCE)
            before: list[int] = []
            for segment in completion.segments if policy != Breed() else ():
                for attempt in segment.attempts:
                    if attempt.reward is not None:
                        wanted = expected(prompt, before + attempt.token_ids)
                        assert attempt.reward == pytest.approx(wanted, abs=TOLERANCE)
                        compared += 1
                before += segment.token_ids
    assert (compared >= 8 or policy == Breed()) and bool(ended) == (params is ENDING)


def test_what_is_enumerated_is_read_at_one_row():
    """Each model runs a row a token, however many tokens are asked about there."""
    for output in generate(implicit(), stars.ARGS(topk=6)):
        for one in output.outputs:
            assert one.metrics.rm_tokens_scored == 2 * len(one.token_ids) == 28
            assert {len(segment.attempts) for segment in one.segments} == {6}


def test_calibration_and_means():
    """A mean over tokens, what ended the response among them, is what plain samples are told too."""
    engine = toy_engine(LM, implicit(length_normalised=True))
    threshold = engine.calibrate(PROMPTS, stars.SamplingParams(max_tokens=8, seed=3), quantile=1.0, num_samples=4)
    outputs = engine.generate(PROMPTS, stars.SamplingParams(max_tokens=8, seed=3, n=4), stars.Sample(score=True),
                              use_tqdm=False)
    rewards = []
    for output in outputs:
        for one in output.outputs:
            rewards.append(one.reward)
            mean = expected(output.prompt_token_ids, one.token_ids) / len(one.token_ids)
            assert one.reward == pytest.approx(mean, abs=TOLERANCE)
    assert float(threshold) == pytest.approx(max(rewards), abs=1e-6)
    [output] = engine.generate(PROMPTS[0], ENDING, stars.STARS(4, 3, 0.5, reward_threshold=threshold), use_tqdm=False)
    assert output.prompt_reward == 0.0


FEW_PAGES = {"cache_tokens": 80, "max_num_seqs": 8}


@pytest.mark.parametrize("policy, options", [
    (STARS, FEW_PAGES), (Breed(), FEW_PAGES | {"cache_tokens": 72}), (STARS, {"max_num_batched_tokens": 3}),
    (stars.BestOfN(n=3), {"max_num_batched_tokens": 5})])
def test_responses_that_give_way_and_prompts_in_chunks(policy, options):
    """What was committed is read again, and the text and its rewards are those of a roomy cache."""
    roomy, scarce = generate(implicit(), policy), generate(implicit(), policy, **options)
    assert "cache_tokens" not in options or sum(one.metrics.num_preemptions for one in scarce)
    for one, other in zip(scarce, roomy, strict=True):
        for got, wanted in zip(one.outputs, other.outputs, strict=True):
            assert got.token_ids == wanted.token_ids and got.error is None
            assert got.reward == pytest.approx(expected(one.prompt_token_ids, got.token_ids), abs=TOLERANCE)


def test_deterministic_mode_keeps_every_bit():
    """At any width, alone and in a batch, in few pages and in chunks."""
    def run(width: int, prompts, **options) -> list:
        policy = stars.STARS(4, 5, 0.4, 0.4, 1.0, width)
        return [[(one.token_ids, one.reward) for one in output.outputs] for output in generate(
            implicit(), policy, prompts, deterministic=True, **options)]
    together = run(3, PROMPTS)
    assert together == [run(1, [prompt])[0] for prompt in PROMPTS]
    assert together == run(2, PROMPTS, max_num_batched_tokens=6, **FEW_PAGES)


@pytest.mark.parametrize("policy", [STARS, stars.ARGS(topk=4), Breed()], ids=lambda policy: type(policy).__name__)
def test_worked_as_a_gpu_is(policy, monkeypatch):
    """Idle rows, tiles, and pages that other rewards fill to their ends: the same texts."""
    here = generate(implicit(), policy)
    work_as(monkeypatch, PADDED)
    for one, other in zip(generate(implicit(), policy), here, strict=True):
        for got, wanted in zip(one.outputs, other.outputs, strict=True):
            assert got.token_ids == wanted.token_ids and got.reward == pytest.approx(wanted.reward, abs=TOLERANCE)


def test_a_response_that_no_slab_holds(monkeypatch):
    """Candidates far beyond the session's history are read in pages of their own, and committed from there; one that
    lacks room says so."""
    reward = implicit()
    reward.bind(None, VOCAB, config_of(cache_tokens=64, page_size=4, max_segment_size=4, max_model_len=64))
    prompt = ids(9, VOCAB, 3)
    texts = [ids(length, VOCAB, length) for length in (21, 23)]
    session = reward.open(Prompt("x", prompt, "x"), 40)
    reward.start([session])
    scored = reward.score([Candidate(session, texts[0], None), Candidate(session, texts[1], None, stopped=EOS),
                           Candidate(session, texts[0][:3], None)])
    for one, text in zip(scored, (texts[0], [*texts[1], EOS], texts[0][:3]), strict=True):
        assert one.reward == pytest.approx(expected(prompt, text), abs=TOLERANCE)
        assert one.per_token == pytest.approx([BETA * value for value in ratios(prompt, text)], abs=TOLERANCE)
    for one in scored[1:]:
        reward.discard(one.handle)
    reward.commit([(session, scored[0].handle)])
    [one] = reward.score([Candidate(session, texts[0] + [1, 2], None)])
    assert one.reward == pytest.approx(expected(prompt, texts[0] + [1, 2]), abs=TOLERANCE) and len(one.per_token) == 2
    reward.discard(one.handle)
    [fault] = reward.score([Candidate(session, ids(90, VOCAB, 1), None)])
    assert isinstance(fault.reward, stars.RewardError)
    assert str(fault.reward).startswith("policy of an ImplicitReward: the response re-encodes to 99 tokens")
    reward.close(session)
    for part in reward.parts:
        assert part.cache.num_free_pages == part.cache.num_pages and part.cache.num_free_slabs == part.cache.num_slabs


def test_a_session_that_takes_up_another_response():
    """It goes back to what both begin with, were it all but the last token, whose row the next one is read at."""
    reward = implicit()
    reward.bind(None, VOCAB, config_of(cache_tokens=64, page_size=4, max_segment_size=8))
    prompt = ids(5, VOCAB, 3)
    session = reward.open(Prompt("x", prompt, "x"), 20)
    reward.start([session])
    for response in ([3, 1, 4, 1, 5], [3, 1, 4, 2], [3, 1, 4, 2, 6, 6], [3, 1, 4, 2, 6, 5, 1], [2], [], [1, 1]):
        scored = reward.score([Candidate(session, response, None), Candidate(session, [*response, 3], None)])
        for one, text in zip(scored, (response, [*response, 3]), strict=True):
            assert one.reward == pytest.approx(expected(prompt, text), abs=TOLERANCE)
            reward.discard(one.handle)
        reward.resume(session, response, None)
        [again] = reward.score([Candidate(session, [*response, 3], None)])
        assert (again.reward, again.tokens_run) == (pytest.approx(scored[1].reward, abs=TOLERANCE), 2)
        reward.discard(again.handle)
        reward.check_integrity()


# -- what counts ------------------------------------------------------------------------------------------------------


class Noting(stars.FunctionReward):
    """Notes what candidates were ended by."""

    def __init__(self):
        super().__init__(lambda prompt, responses: [float(len(one)) for one in responses], inputs="ids")
        self.seen: list[tuple[list[int], int | None, bool]] = []

    def score(self, candidates):
        self.seen += [(list(one.token_ids), one.stopped, one.final) for one in candidates]
        return super().score(candidates)


@pytest.mark.parametrize("policy", [STARS, stars.BestOfN(n=3), stars.Sample(score=True), stars.ARGS(topk=4)],
                         ids=lambda policy: type(policy).__name__)
def test_a_candidate_says_what_ended_it(policy):
    """EOS and stop tokens, of segments and of finished responses; never a token that counts as text."""
    for params, ending in ((ENDING, {EOS, None}), (stars.SamplingParams(max_tokens=14, n=3, seed=5, ignore_eos=True,
                                                                      stop_token_ids=[3, 5]), {3, 5, None})):
        reward = Noting()
        outputs = generate(reward, policy, params=params)
        found = {stopped for _, stopped, _ in reward.seen}
        assert found == (ending if None in found else ending - {None})
        for token_ids, _, _ in reward.seen:
            assert not set(token_ids) & (ending - {None})
        asked = [(token_ids, stopped) for token_ids, stopped, final in reward.seen
                 if final or policy in (STARS, stars.ARGS(topk=4))]
        for output in outputs:
            for one in output.outputs:
                last = one.token_ids[-1]
                assert ((one.token_ids[:-1], last) if last in ending else (one.token_ids, None)) in asked


def test_a_sum_passes_on_what_ended_a_candidate():
    reward = Noting()
    generate(stars.WeightedReward([(stars.CachedReward(reward), 1.0)]), params=ENDING)
    assert EOS in {stopped for _, stopped, _ in reward.seen}


def test_what_spells_a_stop_string_counts(tiny_model):
    """Ids are read, and all of them were drawn: the reward is that of the response's ids, not of its text."""
    paths = [tiny_model(tokenizer=True, chat_template=True, seed=seed) for seed in (0, 5, 6)]
    tokenizer = load_tokenizer(paths[0])
    engine = stars.Engine(paths[0], stars.ImplicitReward(*paths[1:]), max_num_lanes=8, max_num_seqs=4,
                          cache_tokens=512)
    params = stars.SamplingParams(max_tokens=24, seed=3, n=4, stop=["e", "o"])
    [output] = engine.generate("The dog", params, stars.BlockwiseBestOfK(k=2, segment_size=6), use_tqdm=False)
    stopped = [one for one in output.outputs if isinstance(one.stop_reason, str)]
    assert stopped and all(tokenizer.decode(one.token_ids) != one.text for one in stopped)
    other = stars.Engine(paths[0], stars.ImplicitReward(*paths[1:]), max_num_lanes=8, max_num_seqs=4, cache_tokens=512)
    session = other.reward.open(Prompt("x", output.prompt_token_ids, "x"), 30)
    other.reward.start([session])
    for one in stopped:
        [scored] = other.reward.score([Candidate(session, one.token_ids, None)])
        assert one.reward == pytest.approx(scored.reward, abs=TOLERANCE)
        other.reward.discard(scored.handle)


# -- single tokens ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Safest:
    """Of three attempts, or responses, the one whose worst token has the highest log-ratio: a rule of a user's own."""

    seen: list[Judged]
    size: Fixed | Whole = Fixed(4)

    def plan(self) -> Plan:
        def rule(judged: Sequence[Judged], state: State) -> Decision | None:
            if state.left:
                return None
            self.seen.extend(judged)
            best = max(judged, key=lambda one: min(one.per_token))
            return Decision([whole(best)], [one.hypothesis for one in judged if isinstance(self.size, Whole)
                                            and one.hypothesis != best.hypothesis], {})
        rule.in_order, rule.uniforms = False, 0
        if isinstance(self.size, Whole):
            return Plan(Sampled(), self.size, Lanes(1, 1, 3), Score("end"), rule)
        return Plan(Sampled(), self.size, Lanes(3, 3), Score("segment"), rule)

    def __hash__(self) -> int:
        return id(self)


@pytest.mark.parametrize("size", [Fixed(4), Whole()], ids=["segments", "responses"])
@pytest.mark.parametrize("made", [
    implicit, lambda: stars.WeightedReward([(implicit(beta=1), 2.0), (implicit(beta=2), -0.625)])], ids=["one", "sum"])
def test_a_rule_sees_the_scores_of_tokens(made, size):
    """As many as were drawn, what ended the response among them; of a sum where every part has some."""
    policy = Safest([], size)
    outputs = generate(made(), policy, params=ENDING)
    assert len(policy.seen) > 30 and all(
        len(one.per_token) == (one.drafted if size == Fixed(4) else one.tokens) for one in policy.seen)
    for output in outputs:
        for completion in output.outputs:
            before: list[int] = []
            for segment in completion.segments:
                lowest = []
                for attempt in segment.attempts:
                    values = [BETA * value for value in ratios(output.prompt_token_ids, before + attempt.token_ids)]
                    lowest.append(min(values[len(before) :]))
                assert len(lowest) == 3 and lowest[segment.winner] == pytest.approx(max(lowest), abs=TOLERANCE)
                before += segment.token_ids


def test_scores_of_tokens_in_a_sum_where_a_part_has_none_and_from_a_cache():
    """None where a part has none; of equal texts the same, whichever was asked for."""
    reward = stars.WeightedReward([(implicit(), 1.0), (stars.FunctionReward(table_of, inputs="ids"), 0.0)])
    reward.bind(None, VOCAB, config_of(cache_tokens=64, page_size=4, max_segment_size=4))
    session = reward.open(Prompt("x", [1, 2], "x"), 4)
    reward.start([session])
    [scored] = reward.score([Candidate(session, [1, 2], None)])
    assert scored.per_token == () and scored.reward == pytest.approx(expected([1, 2], [1, 2]), abs=TOLERANCE)
    cached = stars.CachedReward(Says(2.0, (0.5, 1.5)))
    session = cached.open(Prompt("x", [1, 2], "x"), 4)
    for _ in range(2):
        assert [(one.reward, one.per_token) for one in cached.score([Candidate(session, [1, 2], None)] * 2)] == [
            (2.0, (0.5, 1.5))] * 2
    assert (cached.hits, cached.misses) == (3, 1)


def table_of(prompt: list[int], responses: list[list[int]]) -> list[float]:
    return [table_reward(seed=3)(response) for response in responses]


def test_the_log_ratio_is_what_a_blend_adds():
    """softmax(log pi + w (policy's logits - reference's logits)) is pi times exp(w * log-ratio), normalised: what
    decodes by the blend is tilted by this reward, token by token."""
    reward, weight = implicit(beta=1.0), 1.5
    reward.bind(None, VOCAB, config_of(cache_tokens=64, page_size=4, max_segment_size=4))
    prompt = ids(6, VOCAB, 3)
    session = reward.open(Prompt("x", prompt, "x"), 20)
    reward.start([session])
    for before in ([], [2], [2, 5], [2, 5, 1, 1]):
        scored = reward.score([Candidate(session, [*before, token], None) for token in range(VOCAB)])
        tilted = np.array([logprob(LM, prompt + before, token) + weight * one.per_token[-1]
                           for token, one in enumerate(scored)])
        own, policy, reference = (model.logits(prompt + before) for model in (LM, POLICY, REFERENCE))
        blend = own + weight * (policy - reference)
        for logits in (tilted, blend):
            logits -= np.log(np.exp(logits).sum())
        assert tilted.tolist() == pytest.approx(blend.tolist(), abs=TOLERANCE)
        for one in scored:
            reward.discard(one.handle)


def passes_logprobs(model: ToyModel, prompt: list[int], response: list[int]) -> np.ndarray:
    """[tokens of the response, vocabulary]: by Passes.logprobs, of every token behind every beginning."""
    decoder, config = model.decoder(), config_of(cache_tokens=64, page_size=4)
    sizes = ModelSizes(num_slabs=1, slab_len=1, max_sequences=2, max_positions=96, max_lanes=0)
    cache = PagedCache(decoder.config, config, sizes, decoder.dtype)
    passes, found = Passes(decoder, cache, config, sizes), []
    for place in range(len(response)):
        text = prompt + response[:place]
        table = cache.open(text)
        passes.prefill([(table, text, len(text) - 1)])
        found += passes.logprobs([Span(table, text[-1:], len(text) - 1, range(1))], [list(range(VOCAB))])
        cache.close(table)
    return np.array(found)


@pytest.mark.parametrize("reference, weight", [("reference", 1.5), ("lm", 1.0), (None, 0.3)])
def test_guidance_passes_and_reward_say_one_thing(reference, weight):
    """The log-probabilities that TokenGuidance reports are those of the blend of what Passes.logprobs reads of each
    model; where the blend is the guide's own law, its ratio to the engine's model is the implicit reward."""
    names = {"lm": LM, "guide": POLICY, "reference": REFERENCE}
    engine = toy_engine(LM, stars.ImplicitReward(POLICY.decoder(), LM.decoder(), beta=BETA),
                        models={"guide": POLICY.decoder(), "reference": REFERENCE.decoder()})
    policy = stars.TokenGuidance(reference=reference, weight=weight, score=True)
    for output in engine.generate(PROMPTS[:2], ENDING, policy, use_tqdm=False):
        for one in output.outputs:
            read = {name: passes_logprobs(model, output.prompt_token_ids, one.token_ids)
                    for name, model in names.items()}
            blend = (0.7 * read["lm"] + 0.3 * read["guide"] if reference is None else
                     read["lm"] + weight * (read["guide"] - read[reference]))
            blend -= np.log(np.exp(blend).sum(1, keepdims=True))
            rows = range(len(one.token_ids))
            assert one.cumulative_logprob == pytest.approx(blend[rows, one.token_ids].sum(), abs=TOLERANCE)
            ratio = (read["guide"] - read["lm"])[rows, one.token_ids].sum()
            assert one.reward == pytest.approx(BETA * ratio, abs=TOLERANCE)
            if reference == "lm":
                own = read["lm"][rows, one.token_ids].sum()
                assert one.reward == pytest.approx(BETA * (one.cumulative_logprob - own), abs=TOLERANCE)


def test_a_sum_with_another_reward():
    """Weighted against a table: the two add up, segment by segment."""
    table = stars.FunctionReward(table_of, inputs="ids")
    reward = stars.WeightedReward([(implicit(), 0.5), (table, -1.25)])
    for output in generate(reward, params=ENDING):
        for one in output.outputs:
            content = one.token_ids[:-1] if one.token_ids[-1] == EOS else one.token_ids
            wanted = 0.5 * expected(output.prompt_token_ids, one.token_ids) - 1.25 * table_of([], [content])[0]
            assert one.reward == pytest.approx(wanted, abs=TOLERANCE)


def test_one_reward_in_halves_decodes_alike():
    alone = [facts(one) for one in generate(implicit())]
    assert [facts(one) for one in generate(stars.WeightedReward([(implicit(), 0.5), (implicit(), 0.5)]))] == alone


# -- probability 0 and faults -----------------------------------------------------------------------------------------


class Says(Reward):
    """A part that says what it is told to."""

    def __init__(self, reward: float, per_token=(-1.0,)):
        self.said = Scored(reward, 1, 1, None, per_token)

    def open(self, prompt, max_tokens):
        return object()

    def score(self, candidates):
        return [self.said for _ in candidates]


@pytest.mark.parametrize("policy, reference, wanted", [
    (-math.inf, -2.0, -math.inf), (-1.0, -3.0, 1.5),
    (-1.0, -math.inf, "the reference .* gives a response probability 0"),
    (math.nan, -1.0, "the policy of an ImplicitReward gave logits that are NaN"),
    (-1.0, math.nan, "the reference of an ImplicitReward gave logits that are NaN"),
    (stars.RewardError("no"), -1.0, "^policy of an ImplicitReward: no$"),
])
def test_what_probabilities_make(policy, reference, wanted):
    reward = implicit()
    reward.parts = (Says(policy), Says(reference))
    [scored] = reward.score([Candidate(reward.open(Prompt("x", [1], "x"), 4), [1], None)])
    if isinstance(wanted, str):
        with pytest.raises(stars.RewardError, match=wanted):
            raise scored.reward
    else:
        assert scored.reward == wanted


@pytest.mark.parametrize("given, options, problem", [
    ((1, "x"), {}, "ImplicitReward.policy is 1, it must be a model directory, a GGUF file or a Decoder"),
    (("x", None), {}, "ImplicitReward.reference is None, it must be a model directory, a GGUF file or a Decoder"),
    (("x", "y"), {"beta": 0}, "ImplicitReward.beta is 0, it must be a finite number above 0"),
    (("x", "y"), {"beta": math.inf}, "ImplicitReward.beta is inf, it must be a finite number above 0"),
    (("x", "y"), {"beta": "1"}, "ImplicitReward.beta is '1', it must be"),
    (("x", "y"), {"length_normalised": "no"}, "ImplicitReward.length_normalised is 'no'"),
])
def test_what_is_no_implicit_reward(given, options, problem):
    with pytest.raises(stars.RewardError) as caught:
        stars.ImplicitReward(*given, **options)
    assert str(caught.value).startswith(problem)


def test_models_that_do_not_go_with_the_engine(tiny_model, copied):
    """Of another vocabulary, with a reward head, in no directory, in another's hands, short of context or of pages."""
    lm, other = (tiny_model(tokenizer=True, chat_template=True, tokenizer_seed=seed) for seed in (0, 2))
    rm = tiny_model(tokenizer=True, chat_template=True, head="reward")
    for models, error, problem in (
            ((other, lm), stars.RewardError, "the policy of an ImplicitReward, '.*', has another vocabulary than"),
            ((lm, other), stars.RewardError, "the reference of an ImplicitReward, '.*', has another vocabulary"),
            ((rm, lm), stars.ModelError, "is a reward model .* and has no language model head"),
            ((lm, "no/such"), stars.ModelError, "no/such is not a directory here"),
            ((lm, tiny_model(vocab=31)), stars.RewardError, "reference of .* vocabulary of 31 and the model one of")):
        with pytest.raises(error, match=problem):
            stars.Engine(lm, stars.ImplicitReward(*models), max_num_lanes=8, max_num_seqs=4, cache_tokens=512)
    fewer = copied(lm)
    tokens = load_tokenizer(lm).vocab_size
    edit_config(fewer, vocab_size=tokens - 1)
    edit_tensors(fewer, lm_head__weight=lambda head: head[: tokens - 1].contiguous(),
                 model__embed_tokens__weight=lambda rows: rows[: tokens - 1].contiguous())
    with pytest.raises(stars.RewardError, match=f"policy of .*, has {tokens - 1} rows of logits and its tokenizer "
                       f"{tokens} tokens: save the model again with a row for each"):
        stars.Engine(lm, stars.ImplicitReward(fewer, lm), max_num_lanes=8, max_num_seqs=4, cache_tokens=512)
    with pytest.raises(stars.RewardError, match="policy of .* is a Decoder without a language model head"):
        toy_engine(LM, stars.ImplicitReward(ToyModel(VOCAB, 1, head="reward").decoder(), REFERENCE.decoder()))
    with pytest.raises(stars.RewardError, match="reference of .* has a vocabulary of 5 and the model one of 7"):
        toy_engine(LM, stars.ImplicitReward(POLICY.decoder(), ToyModel(5, 1).decoder()))
    reward = implicit()
    engine = toy_engine(LM, reward)
    with pytest.raises(stars.RewardError, match="belongs to another engine"):
        toy_engine(LM, stars.WeightedReward([(reward, 1.0)]))
    assert engine.reward is reward
    short = stars.ImplicitReward(POLICY.decoder(), ToyModel(VOCAB, 9, positions=20).decoder())
    with pytest.raises(stars.RequestError, match="reference of an ImplicitReward: prompt and max_tokens make 23 "):
        toy_engine(LM, short).generate(PROMPTS[0], stars.SamplingParams(max_tokens=14), STARS, use_tqdm=False)


def test_logits_that_are_no_numbers_end_their_request_alone(tiny_model, copied):
    """A policy whose head is NaN for one token: its responses end with one sentence, at their first score."""
    paths = [tiny_model(tokenizer=True, chat_template=True, seed=seed) for seed in (0, 5, 6)]
    broken: Path = copied(paths[1])
    edit_tensors(broken, lm_head__weight=lambda head: head * torch.nan)
    engine = stars.Engine(paths[0], stars.ImplicitReward(broken, paths[2]), max_num_lanes=8, max_num_seqs=4,
                          cache_tokens=512)
    [output] = engine.generate("The dog", stars.SamplingParams(max_tokens=8, seed=1),
                               stars.BlockwiseBestOfK(k=2, segment_size=4), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    assert output.outputs[0].error.startswith("the policy of an ImplicitReward gave logits that are NaN or infinite")
