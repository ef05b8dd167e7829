"""Two contexts of one response: what is read in them, pages in common, interrupts, pre-emption, ends, and bad input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import oracle
import stars
import stars.commit
import stars.filtered_ratio
from stars.cache import PagedCache
from stars.decision_check import problem
from stars.draft import Drafter
from stars.filtered_ratio import FilteredRatio
from stars.passes import Passes
from stars.plan import Fixed, Lanes, Plan, Prompted, Ratio, Sampled, Score
from stars.prompt import after, parse_prompt
from stars.rules import AcceptPrefix, Always, Decision, Draw, Judged, Keep, State, whole
from test_conservation import nothing_is_held, stepped_through_interrupts
from test_scheduler import preemptions, run, text
from toy import EOS, Digits, ToyModel, ids, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MODEL = ToyModel(vocab=9, seed=11, layers=2, sharpness=1.3, positions=160)
PERSONA = stars.PersonaJudge("81271", "54", gamma=3)
PARAMS = stars.SamplingParams(max_tokens=22, n=2, seed=3, ignore_eos=True)


class Chat(Digits):
    """Texts begin with BOS, 7; a message is 6 and its content, and 8 asks for the answer."""

    bos_token, bos_token_id, has_chat_template = "7", 7, True

    def encode(self, text, add_special_tokens=True):
        return [7] * add_special_tokens + super().encode(text)

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return "7" + "".join("6" + message["content"] for message in messages) + "8" * add_generation_prompt


@pytest.fixture(autouse=True)
def readings(monkeypatch):
    """Every reading of a test is what the model says without a cache, of the contexts whose turn it is; how many."""
    read, seen = FilteredRatio.read, []

    def checked(self, lanes):
        found = read(self, lanes)
        for lane, reading in zip(lanes, found, strict=True):
            hypothesis, params = lane.hypothesis, lane.hypothesis.request.params
            judge, draft = hypothesis.judging.prompt_ids, hypothesis.drafting.prompt_ids
            turned = len(hypothesis.segments) % 2 and hypothesis.request.plan.propose.alternate
            assert [draft, judge] == list(hypothesis.request.contexts)[:: -1 if turned else 1]
            for place, (token, ratio) in enumerate(zip(lane.token_ids, reading.per_token, strict=True)):
                p, q = (distribution(context + hypothesis.token_ids + lane.token_ids[:place], params)[token]
                        for context in (judge, draft))
                assert ratio == pytest.approx(p - q, abs=2e-4)
            seen.append(len(lane.token_ids))
        return found

    monkeypatch.setattr(FilteredRatio, "read", checked)
    return seen


def distribution(token_ids: list[int], params: stars.SamplingParams) -> np.ndarray:
    logits = MODEL.logits(token_ids)
    if not params.temperature:
        return np.where(np.arange(9) == logits.argmax(), 0.0, -np.inf)
    return oracle.log_softmax(oracle.proposal(logits, params))


def engine(**options) -> stars.Engine:
    return toy_engine(MODEL, **(dict(tokenizer=Digits()) | options))


# -- contexts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "text", "expected"), [
    ("123", "45", [7, 4, 5, 1, 2, 3]), ("7123", "45", [7, 7, 4, 5, 1, 2, 3]), ("123", "", [7, 1, 2, 3]),
    ({"prompt_token_ids": [7, 1, 2]}, "45", [7, 4, 5, 1, 2]), ({"prompt_token_ids": [1, 2]}, "45", [4, 5, 1, 2]),
    ({"messages": [{"role": "user", "content": "12"}]}, "45", [7, 6, 4, 5, 8, 6, 1, 2, 8]),
    ({"messages": [{"role": "user", "content": "12"}]}, "", [7, 6, 1, 2, 8]),
])
def test_a_preference_is_put_before_the_prompt(given, text, expected):
    """BOS stands once, or as often as it was given, and at the beginning."""
    prompt = parse_prompt(given, Chat(), 9)
    assert after(text, prompt, Chat(), 9) == expected


def test_outputs_have_the_prompt_as_it_was_given():
    [output] = engine(tokenizer=Chat()).generate("123", PARAMS, PERSONA, use_tqdm=False)
    assert output.prompt == "123" and output.prompt_token_ids == [7, 1, 2, 3]
    assert [len(completion.token_ids) for completion in output.outputs] == [22, 22]


def test_leading_pages_in_common_are_held_once():
    """Of pages of 4: 13 tokens in common fill 3, and the rest is each context's own, as is room for what comes."""
    made = engine()
    common = "1234567812345"
    made.add_request({"prompt_token_ids": [1, 2, 3]}, stars.SamplingParams(max_tokens=8, seed=1, ignore_eos=True),
                     stars.PersonaJudge(common + "1", common + "22", gamma=2))
    cache = made._cache
    made.step()
    [hypothesis] = made._scheduler.running[0].unfinished
    first, second = (context.table for context in hypothesis.contexts)
    assert first.pages[:3] == second.pages[:3] and not set(first.pages[3:]) & set(second.pages[3:])
    held = {*first.pages, *second.pages}
    assert cache.num_pages - cache.num_free_pages == len(held) == len(first.pages) + len(second.pages) - 3
    made.abort("0")
    made.step()
    nothing_is_held(made)


# -- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alternate", [False, True])
def test_at_temperature_0_a_round_is_the_most_probable_of_its_judge(alternate):
    [output] = engine().generate({"prompt_token_ids": [1, 2]}, stars.SamplingParams(temperature=0.0, max_tokens=15),
                                 stars.PersonaJudge("81", "5", 3, alternate), use_tqdm=False)
    [completion], response = output.outputs, []
    for number, segment in enumerate(completion.segments):
        judge = [8, 1] if alternate and number % 2 else [5]
        for token in segment.token_ids:
            assert token == MODEL.logits([*judge, 1, 2, *response]).argmax()
            response.append(token)
    assert len(response) == 15 or response[-1] == EOS


def test_a_stop_string_ends_the_response_wherever_it_stands():
    """In what was drafted, and with the token that was drawn after it."""
    made, places = engine(), set()
    for seed in range(30):
        params = stars.SamplingParams(max_tokens=30, seed=seed, stop=["32", "8"], ignore_eos=True)
        [output] = made.generate("12", params, PERSONA, use_tqdm=False)
        [completion] = output.outputs
        if completion.finish_reason == "stop":
            last = completion.segments[-1]
            assert completion.stop_reason in ("32", "8") and not {"32", "8"} & {completion.text[-2:]}
            assert "".join(map(str, completion.token_ids)).endswith(completion.stop_reason)
            places.add(last.accepted and last.token_ids == last.attempts[0].token_ids)
    assert places == {True, False}
    nothing_is_held(made)


def test_a_reward_of_the_finished_response():
    made = engine(reward=stars.FunctionReward(lambda prompt, responses: [float(len(ids)) for ids in responses],
                                              inputs="ids"))
    [output] = made.generate({"prompt_token_ids": [1, 2]}, PARAMS, stars.PersonaJudge("8", "5", score=True),
                             use_tqdm=False)
    assert [completion.reward for completion in output.outputs] == [22.0, 22.0]
    nothing_is_held(made)


# -- what stops or takes the place of a round ---------------------------------------------------------------------


def jobs() -> list[tuple]:
    return [({"prompt_token_ids": ids(5 + 3 * index, 9, seed=index)},
             stars.SamplingParams(max_tokens=17 + index, n=2, seed=index, ignore_eos=index % 2 == 0),
             stars.PersonaJudge("8127", "54", 1 + index, alternate=index != 1) if index < 3 else stars.Sample())
            for index in range(4)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_small_cache_gives_the_outputs_of_a_large_one(deterministic, readings):
    """Who gave way reads both contexts anew, and the roles are those of before; in deterministic mode to the bit."""
    large, small = (run(engine(cache_tokens=size, page_size=5, max_num_seqs=8, deterministic=deterministic,
                               max_num_batched_tokens=8), jobs()) for size in (2000, 85))
    assert preemptions(large) == 0 and preemptions(small) > 3 and len(readings) > 50
    for one, other in zip(map(text, small), map(text, large), strict=True):
        if not deterministic:
            one, other = ([(*part[:4], part[5]) for part in output] for output in (one, other))
        assert one == other


@pytest.mark.parametrize(("holder", "name"), [
    (Passes, "logits"), (PagedCache, "commit"), (Drafter, "draft_with_logits"), (stars.commit, "draw"),
    (PagedCache, "open"), (PagedCache, "publish"),
])
def test_a_round_that_was_stopped_is_drawn_again(monkeypatch, holder, name):
    """Every second call is interrupted: the output is that of an engine that was left alone."""
    [alone] = engine().generate({"prompt_token_ids": [1, 2]}, PARAMS, PERSONA, use_tqdm=False)
    made, function, calls = engine(), getattr(holder, name), []

    def interrupted(*args, **named):
        calls.append(name)
        if len(calls) % 2 and len(calls) < 12:
            raise KeyboardInterrupt
        return function(*args, **named)

    monkeypatch.setattr(holder, name, interrupted)
    made.add_request({"prompt_token_ids": [1, 2]}, PARAMS, PERSONA)
    stopped = stepped_through_interrupts(made)
    assert len(calls) > 3 and [(*part[:4], part[5]) for part in text(stopped)] == [
        (*part[:4], part[5]) for part in text(alone)]
    nothing_is_held(made)


def test_an_abort_gives_both_contexts_back():
    made = engine()
    name = made.add_request({"prompt_token_ids": ids(30, 9)}, PARAMS, PERSONA)
    for _ in range(3):
        made.step()
        made.check_integrity()
    assert made._cache.num_tables == 4 and made.abort(name)
    [output] = made.step()
    assert output.outputs[0].finish_reason == "abort" and len(output.outputs[0].token_ids) >= 3
    nothing_is_held(made)


@dataclass(frozen=True)
class Forks:
    """Keeps the first hypothesis twice, cut at other places, and drops the other."""

    def plan(self) -> Plan:
        def rule(judged, state):
            first, *others = judged
            if first.attempt == 0 or first.finished or first.tokens > 11:
                return Decision([whole(first)], [one.hypothesis for one in others])
            return Decision([Keep(first.hypothesis, 1, tokens, Draw(source))
                             for tokens, source in ((1, "residual"), (2, "judge"))], [one.hypothesis for one in others])

        rule.in_order, rule.uniforms = False, 0
        return Plan(Prompted("8127", "54", True), Fixed(3), Lanes(1, 1, 2), Score("never", reads=Ratio(True)), rule)


def test_a_fork_goes_on_in_both_contexts(readings):
    """What is read of a fork is checked as everything is; a user's rule may ask for draws."""
    made = engine()
    [output] = made.generate({"prompt_token_ids": ids(9, 9)}, PARAMS, Forks(), use_tqdm=False)
    assert [completion.error for completion in output.outputs] == [None, None] and len(readings) > 20
    nothing_is_held(made)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "params", "options", "words"), [
    (stars.PersonaJudge("1" * 60, "5"), {}, dict(max_model_len=64), "the prompt with the draft text before it of 62"),
    (stars.PersonaJudge("5", "1" * 60), {}, dict(max_model_len=64), "the prompt with the judge text before it of 62"),
    (PERSONA, {}, dict(tokenizer=None), "no tokenizer.json to read it with"),
    (stars.PersonaJudge("9", "5"), {}, {}, "prompt token id 9 is outside the model's vocabulary of 9"),
    (PERSONA, dict(repetition_penalty=1.2), {}, "without penalties"),
    (stars.PersonaJudge(gamma=16), {}, {}, "judges 17 tokens at a time"),
    (PERSONA, dict(max_tokens=40), dict(cache_tokens=64), "after two prompts, of 7 and 4 tokens, which do not fit"),
])
def test_what_cannot_be_is_one_sentence(policy, params, options, words):
    with pytest.raises(stars.RequestError) as error:
        engine(**options).generate({"prompt_token_ids": [1, 2]}, stars.SamplingParams(**{"max_tokens": 8} | params),
                                   policy, use_tqdm=False)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("settings", "words"), [
    (dict(draft=None), "PersonaJudge.draft is None"), (dict(judge=["a"]), "PersonaJudge.judge is"),
    (dict(gamma=0), "PersonaJudge.gamma"), (dict(gamma=1025), "PersonaJudge.gamma"),
    (dict(alternate=1), "PersonaJudge.alternate"),
])
def test_parameters_that_do_not_fit(settings, words):
    with pytest.raises(stars.RequestError, match=words):
        stars.PersonaJudge(**settings)


@pytest.mark.parametrize("plan", [
    Plan(Prompted("a", "b"), Fixed(2), Lanes(1), Score("never"), Always()),
    Plan(Sampled(), Fixed(2), Lanes(1), Score("never", reads=Ratio(True)), Always()),
    Plan(Sampled(), Fixed(2), Lanes(1), Score("never"), AcceptPrefix(2)),
    Plan(Prompted("a", "b"), Fixed(3), Lanes(1), Score("never", reads=Ratio(True)), AcceptPrefix(2)),
])
def test_plans_that_do_not_go_together(plan):
    @dataclass
    class Own:
        def plan(self):
            return plan

    with pytest.raises(stars.RequestError, match=r"Own\.plan\(\)"):
        engine().generate({"prompt_token_ids": [1]}, None, Own(), use_tqdm=False)


@pytest.mark.parametrize(("keep", "draws", "words"), [
    (Keep(0, 1, 1, Draw("residual")), True, None), (Keep(0, 1, 2, Draw("judge")), True, None),
    (Keep(0, 1, 1, Draw("residual")), False, "must read a filtered Ratio"),
    (Keep(0, 1, 2, Draw("residual")), True, "of which there is none"),
    (Keep(0, 1, 1, Draw("other")), True, "'other'"),
])
def test_a_rule_that_asks_for_a_draw(keep, draws, words):
    judged = [Judged(0, 1, 6, False, (), (-1.0, -1.0), (0.0, 0.0), None, None, ())]
    found = problem(Decision([keep]), judged, State(0, 0, 0, 0, 9, None, 0, (0,), (), None), 1, 9, (0,), False, draws)
    assert found is None if words is None else words in found


def test_a_response_has_no_room_for_a_draw():
    judged = [Judged(0, 1, 9, False, (), (-1.0, -1.0), (0.0, 0.0), None, None, ())]
    state = State(0, 0, 0, 0, 9, None, 0, (0,), (), None)
    decision = Decision([Keep(0, 1, 2, Draw("judge"))])
    assert "past max_tokens" in problem(decision, judged, state, 1, 9, (0,), False, True)
    assert AcceptPrefix(2)([judged[0]._replace(uniforms=(0.5, 0.5))], state).keep == [Keep(0, 1, 2)]


def test_a_draw_of_two_distributions_that_are_one(monkeypatch):
    """Nothing is rejected. Where rounding has left nothing of max(p - q, 0), the token is the judge's."""
    monkeypatch.setattr(AcceptPrefix, "__call__", lambda self, judged, state: Decision(
        [Keep(0, 1, 0, Draw("residual" if residual else "judge"))]))
    made, drawn = engine(), []
    params = stars.SamplingParams(max_tokens=12, seed=3)
    for residual in (False, True):
        [output] = made.generate({"prompt_token_ids": [1, 2]}, params, stars.PersonaJudge("8", "8", 3), use_tqdm=False)
        drawn.append(output.outputs[0].token_ids)
    monkeypatch.undo()
    assert drawn[0] == drawn[1] and len(drawn[0]) > 1
    [output] = made.generate({"prompt_token_ids": [1, 2]}, PARAMS, stars.PersonaJudge("8", "8", 3), use_tqdm=False)
    assert all(segment.accepted for completion in output.outputs for segment in completion.segments)
    assert stars.filtered_ratio._ratio(-np.inf, -np.inf) == -np.inf, "what the judge never draws is not accepted"
