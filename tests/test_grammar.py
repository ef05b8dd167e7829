"""Structured outputs in the engine: every policy, any width, forks, take-backs, interrupts, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from safetensors.torch import save_file

import stars
import stars.grammar
from letters import Language, Letters
from stars.exhaustions import BackUp
from stars.grammar import Branches, Grammars, _Compiler
from stars.grammar_ends import rules_end, schema_ends
from stars.policies import POLICIES
from stars.structured import StructuredOutputsParams
from test_bad_input import refused
from test_conservation import nothing_is_held, stepped_through_interrupts
from test_edits import policies
from test_law_mara import HIDDEN, H, head_tensors
from toy import EOS, ToyModel, ids, table_reward, toy_engine

pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

LETTERS = Letters((*'{}[]":, ', *"abcdef", *"0123456789", *"trulsn", '{"', '":', '","', "true", "12", "ab"))
VOCAB = 37
LM, SMALL = (ToyModel(VOCAB, seed=seed, layers=1, positions=128) for seed in (2, 8))
TABLE = table_reward(seed=3)
START = ids(6, VOCAB, seed=4)
WORDS = [f"{''.join(word)}{end}" for count in range(2, 6) for word in itertools.product("ab", repeat=count)
         for end in ("", "12", "true,true")]
REGEX = "[ab]{2,5}(12|true,true)?"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["ab", True, 12]}},
          "required": ["a", "b"], "additionalProperties": False}


def engine(reward=TABLE, **options) -> stars.Engine:
    fn = stars.FunctionReward(lambda prompt, responses: [reward(one) for one in responses], inputs="ids")
    return toy_engine(LM, fn, **(dict(tokenizer=LETTERS) | options))


def run(made: stars.Engine, params: stars.SamplingParams | list, policy=None, prompts: int = 1) -> list:
    outputs = made.generate([{"prompt_token_ids": START}] * prompts, params, policy, use_tqdm=False)
    made.check_integrity()
    return [completion for output in outputs for completion in output.outputs]


def asked(max_tokens: int = 24, seed: int = 1, n: int = 1, **structured) -> stars.SamplingParams:
    return stars.SamplingParams(max_tokens=max_tokens, seed=seed, n=n, structured_outputs=structured)


def fits(completion, texts: Sequence[str]) -> bool:
    """Whether it is one of `texts`, or the beginning of one where max_tokens ended it."""
    text = LETTERS.decode([token for token in completion.token_ids if token != EOS])
    if completion.finish_reason == "length":
        return any(whole.startswith(text) for whole in texts)
    return completion.finish_reason == "stop" and text in texts


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[stars.Engine, dict]:
    """An engine for all methods, and one of each."""
    directory = tmp_path_factory.mktemp("heads")
    save_file(head_tensors(HIDDEN, H, seed=6, bias=-1.0), directory / "agent.safetensors")
    return (engine(heads={"agent": str(directory / "agent.safetensors")}, models={"small": SMALL.decoder()}),
            policies(directory))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_to_the_grammar_or_refuses_it(name, everything):
    made, methods = everything
    policy = methods[name]
    if name == "persona-judge":
        refused(stars.RequestError, "leave structured_outputs out", run, made, asked(regex=REGEX), policy)
        return
    for seed, max_tokens in ((1, 20), (2, 3)):
        for completion in run(made, asked(max_tokens, seed, 2, regex=REGEX), policy):
            assert completion.error is None and fits(completion, WORDS), (name, completion.token_ids)
        for completion in run(made, asked(60, seed, json=SCHEMA), policy):
            assert completion.error is None
            if completion.finish_reason == "stop":
                value = json.loads(completion.text)
                assert list(value) == ["a", "b"] and type(value["a"]) is int and value["b"] in ("ab", True, 12)


def test_ratios_refuse_it(everything):
    gsi = stars.RewardGuidedSpeculation(reward_threshold=0.9, beta=2.0, segment_size=4, variant="gsi", n=3)
    refused(stars.RequestError, "leave structured_outputs out", run, everything[0], asked(regex=REGEX), gsi)


def test_the_same_text_at_any_width_and_in_any_batch():
    """Constrained requests beside others, in few pages, so that some give way and come back."""
    kinds = [dict(regex=REGEX), dict(json=SCHEMA), None, dict(choice=["ab", "abab", "12,12", "true"]),
             dict(grammar='start: "[" (start | "1" | "a")* "]"')]
    params = [stars.SamplingParams(max_tokens=24, seed=80 + seed, structured_outputs=kinds[seed % 5])
              for seed in range(10)]
    alone = [[completion.token_ids for completion in run(
        engine(deterministic=True), one, stars.STARS(4, 6, 0.2, 0.5, 1.5, width=1))] for one in params]
    for width, options in ((8, {}), (3, dict(max_num_seqs=2, max_num_lanes=5)), (4, dict(cache_tokens=96))):
        made = engine(deterministic=True, **options)
        together = run(made, params, stars.STARS(4, 6, 0.2, 0.5, 1.5, width=width), len(params))
        assert [[completion.token_ids] for completion in together] == alone, (width, options)


TAKEN_BACK = stars.STARS(2, 2, 0.2, 0.3, 3.0, width=2, exhaust=BackUp(3))


def backed_up() -> list:
    return run(engine(), asked(16, 7, 40, regex=REGEX), TAKEN_BACK)


def test_segments_that_are_taken_back_take_their_state_along():
    completions = backed_up()
    assert sum(completion.metrics.attempts > 2 * len(completion.segments) for completion in completions) > 5
    assert all(fits(completion, WORDS) for completion in completions)


def test_a_state_that_is_not_taken_back_is_seen(monkeypatch):
    """A matcher that only follows what is new, and forgets nothing."""
    def forward_only(self, token_ids):
        rest = list(token_ids[len(self._taken) :])
        self._parser.consume_tokens(rest)
        self._taken += rest
        return self

    monkeypatch.setattr(stars.grammar.Matcher, "at", forward_only)
    assert not all(fits(completion, WORDS) for completion in backed_up())


def test_interrupts_change_nothing(monkeypatch):
    """Of the reward and in the middle of a matcher's move, where its parser has moved and it has not."""
    params, policy = asked(18, 5, regex=REGEX), stars.STARS(2, 6, 0.2, 0.5, 2.5, width=3)
    [undisturbed] = run(engine(), params, policy)
    calls = itertools.count()

    def interrupting(one):
        if next(calls) % 29 == 17:
            raise KeyboardInterrupt
        return TABLE(one)

    made = engine(interrupting)
    made.add_request({"prompt_token_ids": START}, params, policy)
    assert stepped_through_interrupts(made).outputs[0].token_ids == undisturbed.token_ids
    nothing_is_held(made)
    accept = stars.grammar.Matcher.accept

    def interrupted(self, token):
        if next(calls) % 29 == 17:
            self._parser.consume_token(token)
            raise KeyboardInterrupt
        accept(self, token)

    monkeypatch.setattr(stars.grammar.Matcher, "accept", interrupted)
    made = engine()
    made.add_request({"prompt_token_ids": START}, params, stars.STARS(2, 6, 0.2, 0.5, 2.5, width=1))
    assert stepped_through_interrupts(made).outputs[0].token_ids == undisturbed.token_ids
    nothing_is_held(made)


def test_two_winners_each_go_on_from_their_own(everything):
    """A beam forks a response where it keeps two attempts of it."""
    made, _ = everything
    for seed in range(6):
        [completion] = run(made, asked(20, seed, regex=REGEX), stars.SegmentBeam(4, 3, 2))
        assert fits(completion, WORDS)


def test_stop_strings_and_stop_ids_end_a_text_inside_a_value():
    params = dataclasses.replace(asked(30, 3, 30, json=SCHEMA), stop=['"b"'], stop_token_ids=[LETTERS.texts.index("}")])
    for completion in run(engine(), params, stars.STARS(3, 2, 0.5, 0.5, 1.0)):
        assert completion.error is None and '"b"' not in completion.text
        assert completion.finish_reason in ("stop", "length")


def test_min_tokens_and_ids_that_are_allowed_go_together_with_it():
    few = [EOS, *(LETTERS.texts.index(letter) for letter in ("a", "1", "2", "t", "r", "u", "d", "e", ","))]
    params = dataclasses.replace(asked(12, 4, 30, regex=REGEX), min_tokens=4, allowed_token_ids=few)
    for completion in run(engine(), params, stars.STARS(3, 2, 0.5, 0.5, 1.0)):
        assert fits(completion, WORDS) and set(completion.token_ids) <= set(few)
        content = LETTERS.decode([token for token in completion.token_ids if token != EOS])
        assert len(completion.token_ids) > 4 or len(content) == 5 or content.endswith("12")


# -- what the texts are -----------------------------------------------------------------------------------------------


def grammars(letters: Letters = LETTERS, vocab: int = VOCAB) -> Grammars:
    return Grammars(letters, vocab, (EOS,))


GRAMMARS = grammars()


def masks(grammar, token_ids: Sequence[int]) -> set[int]:
    """What a matcher that has followed `token_ids` allows next."""
    [matcher] = Branches(grammar, (EOS,)).at(list(token_ids), 1)
    return allowed(matcher)


def allowed(matcher) -> set[int]:
    row = np.full(-(-VOCAB // 32), -1, np.int32)
    matcher.fill(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


REGEXES = ["[ab]{2,5}(12|true,true)?", "(ab|a)*b?", "a|ab|abc", "(?:a{0,3}b){1,2}", "x*a?", "[^b]{1,2}", "(a|)(b|)",
           "ab?|1+", "^(12)+$", "(?i)AB", "a.b"]


@pytest.mark.parametrize("regex", REGEXES)
def test_the_masks_are_those_of_all_texts_listed(regex):
    """Of every beginning of the language, in every way to split it into tokens, with texts of up to five letters."""
    small = Letters(("a", "b", "1", "2", "ab", "12", "c"))
    language = Language(regex, 7, small)
    grammar = Grammars(small, 8, (EOS,)).of(StructuredOutputsParams(regex=regex))
    branches = Branches(grammar, (EOS,))
    waiting: list[tuple[int, ...]] = [()]
    seen = 0
    while waiting:
        response = waiting.pop()
        [matcher] = branches.at(response, 1)
        row = np.zeros(1, np.int32)
        matcher.fill(row)
        expected = language.allowed(response)
        if len(small.decode(response)) < 5:
            assert {token for token in range(8) if row[0] >> token & 1} == expected, small.decode(response)
            waiting += [(*response, token) for token in expected if token != EOS]
        seen += 1
    assert seen > 1


def test_a_state_is_a_function_of_the_tokens():
    """Matchers that are moved to and fro say what fresh ones say."""
    grammar, drawn = GRAMMARS.of(StructuredOutputsParams(json=SCHEMA)), random.Random(5)
    branches, histories = Branches(grammar, (EOS,)), [()]
    for _ in range(150):
        response = drawn.choice(histories)
        lanes = branches.at(response, 3)
        for lane in lanes:
            follows = list(response)
            for _ in range(drawn.randrange(4)):
                choices = allowed(lane) - {EOS}
                if not choices:
                    break
                follows.append(drawn.choice(sorted(choices)))
                lane.accept(follows[-1])
            assert allowed(lane) == masks(grammar, follows), LETTERS.decode(follows)
            histories.append(tuple(follows))


def test_every_stop_id_ends_a_text_where_it_may_end():
    """EOS ids that the request leaves out do not; a stop id that is text is that, too."""
    made = Grammars(LETTERS, VOCAB, (EOS, 36))
    grammar, b = made.of(StructuredOutputsParams(regex="a(b|1)?")), LETTERS.texts.index("b")
    a, one = LETTERS.texts.index("a"), LETTERS.texts.index("1")
    for stops in ((EOS, 36), (36,), (EOS, 5, b), (EOS,)):
        start, then = (allowed(Branches(grammar, stops).at(tokens, 1)[0]) for tokens in ([], [a]))
        assert start == {a} and then == {b, one, *stops}


def random_schema(drawn: random.Random, depth: int = 2) -> dict:
    """Of what the toy's letters can spell."""
    kind = drawn.choice(["integer", "boolean", "enum", "string", *(["object", "array", "anyOf"] if depth else [])])
    if kind == "enum":
        return {"enum": drawn.sample([1, 12, "a", "ab", "abc", True, None, ["a", 1]], 3)}
    if kind == "string":
        return {"type": "string", "pattern": f"^[a-c]{{1,{drawn.randint(1, 3)}}}$"}
    if kind == "integer":
        return {"type": "integer", "minimum": drawn.randint(0, 9), "maximum": drawn.randint(10, 99)}
    if kind == "array":
        return {"type": "array", "items": random_schema(drawn, depth - 1), "minItems": drawn.randint(0, 1),
                "maxItems": drawn.randint(1, 3)}
    if kind == "object":
        names = drawn.sample(["a", "b", "ab", "c1"], drawn.randint(1, 3))
        return {"type": "object", "properties": {name: random_schema(drawn, depth - 1) for name in names},
                "required": names[: drawn.randint(1, len(names))], "additionalProperties": False}
    if kind == "anyOf":
        return {"anyOf": [random_schema(drawn, depth - 1) for _ in range(2)]}
    return {"type": kind}


def valid(value, schema: dict) -> bool:
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "boolean":
        return type(value) is bool
    if kind == "string":
        return isinstance(value, str) and re.fullmatch(schema["pattern"].strip("^$"), value) is not None
    if kind == "array":
        return (isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(valid(one, schema["items"]) for one in value))
    return (isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(schema["properties"])
            and all(valid(one, schema["properties"][name]) for name, one in value.items()))


def test_what_ends_fits_its_schema():
    """Random schemas, requests of all of them in one batch."""
    drawn, made = random.Random(3), engine(max_num_seqs=40, cache_tokens=1 << 14)
    schemas = [random_schema(drawn) for _ in range(40)]
    done = 0
    params = [asked(90, seed, json=schema) for seed, schema in enumerate(schemas)]
    for schema, completion in zip(schemas, run(made, params, stars.STARS(7, 3, 0.2, 0.5, 1.5, width=3), 40),
                                  strict=True):
        assert completion.error is None
        if completion.finish_reason == "stop":
            assert valid(json.loads(completion.text), schema), (schema, completion.text)
            done += 1
    assert done > 25


@pytest.mark.parametrize("regex", REGEXES)
def test_what_ends_matches_its_expression(regex):
    for completion in run(engine(), asked(20, 2, 12, regex=regex), stars.STARS(3, 3, 0.2, 0.5, 1.5, width=3)):
        assert completion.error is None
        assert completion.finish_reason == "length" or re.fullmatch(regex, completion.text)


@pytest.mark.parametrize("structured, texts", [
    (dict(choice=["a", "ab", "abc", "12,"]), ["a", "ab", "abc", "12,"]),
    (dict(choice=['"', '":', "[a]", "a b"]), ['"', '":', "[a]", "a b"]),
    (dict(json={"enum": ["a", "ab", 1]}), ['"a"', '"ab"', "1"]),
    (dict(grammar='start: "a" ("b" | "c")?\n'), ["a", "ab", "ac"]),
    (dict(grammar='root ::= "a" ("b" | "c")?'), ["a", "ab", "ac"]),
    (dict(grammar="// a comment\nstart: X | Y\nX: /[ab]/\nY: \"1\" \"2\""), ["a", "b", "12"]),
])
def test_each_text_that_there_is_comes(structured, texts):
    completions = run(engine(), asked(20, 2, 60, **structured), stars.Sample())
    assert {completion.text for completion in completions} == set(texts)
    assert {completion.finish_reason for completion in completions} == {"stop"}


def test_objects_and_classes():
    class Model:
        @classmethod
        def model_json_schema(cls) -> dict:
            return {"const": "ab"}

    assert [one.text for one in run(engine(), asked(json=Model))] == ['"ab"']
    for completion in run(engine(), asked(60, n=20, json_object=True)):
        assert completion.text.startswith("{")
        assert completion.finish_reason == "length" or isinstance(json.loads(completion.text), dict)


def test_letters_of_all_kinds_in_choices():
    """By bytes, so that every text can be spelt."""
    class Bytes(Letters):
        def token_bytes(self, vocab_size):
            return [None, *(bytes([byte]) for byte in range(256))]

    made = Grammars(Bytes(), 257, (EOS,))
    texts = ["é", "a/b", "\\", "\\n", "\n", "\x00", "\x7f", '"', "'", "😀", "\u2028", "%json", "/x/", "<a>", "{}",
             "é\\"]
    branches = Branches(made.of(StructuredOutputsParams(choice=texts)), (EOS,))
    for text in texts:
        tokens = [1 + byte for byte in text.encode()]
        [matcher] = branches.at(tokens, 1)
        row = np.zeros(9, np.int32)
        matcher.fill(row)
        assert matcher.error is None and row[0] & 1, text
    refused(stars.RequestError, "no valid Unicode", made.of, StructuredOutputsParams(choice=["a\ud800"]))


# -- dead ends --------------------------------------------------------------------------------------------------------


def test_a_dead_end_fails_its_request_and_no_other():
    """The letter z is no token."""
    params = [asked(8, 1, regex="ab?z"), asked(8, 1, regex=REGEX), stars.SamplingParams(max_tokens=8, seed=1)]
    for policy in (stars.Sample(), stars.STARS(4, 3, 0.2, 0.5, 1.5, width=3), stars.BestOfN(2)):
        dead, constrained, free = run(engine(), params, policy, 3)
        assert dead.finish_reason == "error" and "the grammar allows no further token" in dead.error
        assert constrained.error is None and free.error is None and fits(constrained, WORDS)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_dead_end_after_the_winner_is_nobodys(width):
    """An attempt that cannot go on matters only where it is its turn: at any width the same comes of it."""
    made = engine(deterministic=True)
    found = []
    for seed in range(12):
        [completion] = run(made, asked(2, seed, regex="(a|b|c|1)(2|z)|[def]z"),
                           stars.STARS(2, 5, 1.0, 0.5, -1.0, width=width))
        found.append((completion.finish_reason, completion.token_ids))
    assert len({reason for reason, _ in found}) > 1 and ("error", []) in found
    if width == 1:
        test_a_dead_end_after_the_winner_is_nobodys.alone = found
    assert found == test_a_dead_end_after_the_winner_is_nobodys.alone


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_whole_response_with_a_dead_end_after_the_winner_is_nobodys(width):
    made = engine(deterministic=True)
    found = []
    for seed in range(12):
        [completion] = run(made, asked(6, seed, regex="(a|b|c|1)+(2|z)|[def]z"),
                           stars.RejectionSampling(2.0, 0.3, 4, width=width))
        found.append((completion.finish_reason, completion.token_ids, completion.error))
    nothing_is_held(made)
    assert len({reason for reason, _, _ in found}) > 1 and any(error for _, _, error in found)
    if width == 1:
        test_a_whole_response_with_a_dead_end_after_the_winner_is_nobodys.alone = found
    assert found == test_a_whole_response_with_a_dead_end_after_the_winner_is_nobodys.alone


@pytest.mark.parametrize("width", [1, 4])
def test_a_dead_end_leaves_the_other_completions(width):
    """What they are does not depend on when it is met, and so not on width or batch."""
    found = []
    for policy in (stars.Sample(), stars.STARS(2, 5, 1.0, 0.5, -1.0, width=width),
                   stars.RejectionSampling(2.0, 0.3, 4, width=width)):
        made = engine(deterministic=True)
        completions = run(made, asked(6, 1, 24, regex="(a|b|c|1)+(2|z)|[def]z"), policy)
        nothing_is_held(made)
        reasons = [completion.finish_reason for completion in completions]
        assert reasons.count("error") > 1 and reasons.count("stop") > 1, policy
        found.append([(completion.finish_reason, completion.token_ids) for completion in completions])
    if width == 1:
        test_a_dead_end_leaves_the_other_completions.alone = found
    assert found == test_a_dead_end_leaves_the_other_completions.alone


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured, message", [
    (dict(json="{"), "is no JSON schema that can be followed (it is no JSON"),
    (dict(json="[]"), "(schema must be an object or boolean)"),
    (dict(json={"type": "thing"}), "(Invalid type: thing)"),
    (dict(json={"not": {}}), 'Unimplemented keys: ["not"]'),
    (dict(json={"a": object()}), "object is nothing that JSON has"),
    (dict(json={"enum": []}), "Unsatisfiable schema"),
    (dict(json={"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}), "it never comes to an end"),
    (dict(regex="["), "is no regular expression that can be followed (unclosed character class)"),
    (dict(regex="ab\\"), "is no regular expression that can be followed (the backslash at its end escapes nothing)"),
    (dict(regex="a(?=b)"), "look-around"),
    (dict(regex="a[^\\s\\S]"), "no text matches it"),
    (dict(regex="z"), "no text matches it"),  # which no token spells
    (dict(grammar="start: foo"), 'line 1, column 8: unknown name: "foo"'),
    (dict(grammar='start: "a'), "lexer error"),
    (dict(grammar='start: "a" start'), "it never comes to an end"),
    (dict(grammar='a: "b"'), "no start rule found"),
    (dict(grammar="root ::= ("), "is no grammar that can be followed"),
    (dict(grammar="(" * (1 << 20) + '"'), "the most is 1048576"),
])
def test_what_is_no_grammar_is_refused_at_the_door(structured, message):
    made = engine()
    refused(stars.RequestError, message, run, made, asked(**structured))
    assert not made._requests


def test_what_the_request_or_the_model_lacks_is_named(monkeypatch):
    params = asked(regex=REGEX)
    refused(stars.RequestError, "ignore_eos leaves none", run, engine(),
            dataclasses.replace(params, ignore_eos=True))
    [stopped] = run(engine(), dataclasses.replace(params, ignore_eos=True, stop_token_ids=[9]))
    assert stopped.error is None and EOS not in stopped.token_ids
    refused(stars.RequestError, "needs a tokenizer", run, toy_engine(LM), params)
    endless = toy_engine(ToyModel(VOCAB, seed=2, layers=1, eos=()), tokenizer=LETTERS)
    refused(stars.RequestError, "needs an EOS token", run, endless, params)
    refused(stars.RequestError, "at the first token the constraints leave no token", run, engine(),
            dataclasses.replace(params, allowed_token_ids=[1, 2, EOS]))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    refused(stars.RequestError, 'pip install "stars-engine[structured]"', run, engine(), params)


@pytest.mark.parametrize("structured, message", [
    (dict(grammar="start: X\nX: " + " & ".join(f"/.*{i}.*/" for i in range(500))), "reading it takes more than 1 s"),
    (dict(json={"$defs": {f"d{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}},
                                    "required": ["x"]} for i in range(9000)} | {"d9000": {}}, "$ref": "#/$defs/d0"}),
     "or breaks llguidance"),
    (dict(json='{"allOf":[' * 3000 + "{}" + "]}" * 3000), "it is no JSON"),
    (dict(regex="(" * 100000 + "a" + ")" * 100000), "nested"),
])
def test_harmful_grammars_do_not_harm(structured, message, monkeypatch):
    """They would end this process, or keep it busy for hours; the next one is served as if nothing had been."""
    monkeypatch.setattr("stars.grammar_process.SECONDS", 1.0)
    made = grammars()
    refused(stars.RequestError, message, made.of, StructuredOutputsParams(**structured))
    monkeypatch.setattr("stars.grammar_process.SECONDS", 30.0)
    assert masks(made.of(StructuredOutputsParams(regex="a")), []) == {LETTERS.texts.index("a")}


def test_what_is_too_complex_later_fails_with_a_sentence():
    """Limits of llguidance that are reached in the middle of a response."""
    made = engine(cache_tokens=1 << 15)
    params = dataclasses.replace(asked(90, 1, regex="(((a{0,200}){0,200}){0,200})"), logit_bias={EOS: -100.0})
    [completion] = run(made, params, stars.Sample())
    assert completion.finish_reason == "error" and "the grammar" in completion.error
    assert "\n" not in completion.error and len(completion.error) < 300


@pytest.mark.parametrize("call", ["generate", "chat", "stream", "add_request"])
def test_nobody_waits_for_what_another_thread_compiles(call, monkeypatch, tiny_model):
    """Each door of an engine compiles without the turn; a deadline counts from the call."""
    compiler, gate, entered, ended = _Compiler.compile, threading.Event(), threading.Event(), []

    def slow(self, kind, text):
        entered.set()
        assert gate.wait(60)
        return compiler(self, kind, text)

    made = stars.Engine(tiny_model(tokenizer=True, chat_template=True), device="cpu", cache_tokens=1024)
    prompt = [{"role": "user", "content": "a"}] if call == "chat" else "a"
    params = stars.SamplingParams(max_tokens=4, structured_outputs={"regex": "[ab]{3}"})

    def ask():
        found = getattr(made, call)(prompt, params, budget=stars.Budget(seconds=0.02))
        while made.has_unfinished_requests():
            found = made.step() or found
        ended.extend(found)

    with monkeypatch.context() as patch:
        patch.setattr(_Compiler, "compile", slow)
        thread = threading.Thread(target=ask)
        thread.start()
        assert entered.wait(60)
        [other] = made.generate("b", stars.SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert len(other.outputs[0].token_ids) == 4 and not ended
        time.sleep(0.03)
        gate.set()
        thread.join(60)
    assert ended[-1].outputs[0].finish_reason == "deadline" and not ended[-1].outputs[0].token_ids


def test_compiled_grammars_are_kept_and_bounded(monkeypatch):
    made = grammars()
    first = made.of(StructuredOutputsParams(regex="a"))
    assert made.of(StructuredOutputsParams(regex="a")) is first
    monkeypatch.setattr(stars.grammar, "MAX_COMPILED", 3)
    for letter in "bcde":
        made.of(StructuredOutputsParams(regex=letter))
    assert made.of(StructuredOutputsParams(regex="a")) is not first and len(made._compiled) == 3


# -- whether a grammar ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar, ends", [
    ('start: "a" start', False), ('start: "a" | start "b"', True), ('start: a b\na: "x"\nb: "y" b', False),
    ("start: ", True), ('start: a\n  | b\na: "x" a\nb: /x/', True), ("start: a?\na: a", True),
    ("start: a?b\na: a\nb: /x/", True), ("start: a+\na: a", False), ("start: a~0..3\na: a", True),
    ("start: a~1..3\na: a", False), ("start: a{0,2}\na: a", True), ('start: a{2}\na: a "x"', False),
    ('start: (a | "|")\na: a', True), ("start: X a // c\n# more\nX: /a/\na: (a a | b [a])\nb: a", False),
    ('?start: sum\nsum: NUM | "(" sum ")"\nNUM: /[0-9]+/', True), ('start: %json {"a":"}"} s\ns: s', False),
    ("start: %json true", True), ('start: a\na[capture, lazy]: "x"', True), ('start: "a".."z" s\ns: s', False),
    ("start: <[1]> s\ns: s", False), ('start: "s" -> name\n', True), ("start: s::1\ns::_ : s", True),
])
def test_rules_that_lead_to_themselves_alone_never_end(grammar, ends):
    assert rules_end(grammar) is ends


NODE = {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["c"]}
ENDED = {**NODE, "properties": {"c": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}}}


@pytest.mark.parametrize("schema, ends", [
    ({"$defs": {"n": NODE}, "$ref": "#/$defs/n"}, False), ({"$defs": {"n": ENDED}, "$ref": "#/$defs/n"}, True),
    ({"$defs": {"n": NODE}, "type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}}, True),
    ({"type": "array", "items": {"$ref": "#"}}, True),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
    ({"type": "array", "prefixItems": [{}], "items": {"$ref": "#"}, "minItems": 1}, True),
    ({"allOf": [{"$ref": "#"}]}, False), ({"anyOf": [{"$ref": "#"}, {"const": 1}]}, True), ({}, True), (True, True),
    ({"$ref": "elsewhere"}, True), ({"$ref": "#/nowhere"}, True),
])
def test_schemas_that_need_themselves_never_end(schema, ends):
    assert schema_ends(schema) is ends


# -- compiled beside the turns ----------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch) -> tuple[threading.Event, threading.Event]:
    """(set where a grammar is being compiled, what that waits for)."""
    begun, go_on, compiled = threading.Event(), threading.Event(), stars.grammar._Compiler.compile

    def slowly(self, kind, text):
        begun.set()
        assert go_on.wait(8)
        return compiled(self, kind, text)

    monkeypatch.setattr(stars.grammar._Compiler, "compile", slowly)
    return begun, go_on


@pytest.mark.parametrize("ask", ["generate", "stream", "add_request"])
def test_nobody_waits_for_anothers_grammar(slow, ask):
    begun, go_on = slow
    made, found = engine(), []
    known = asked(24, 1, regex="[ab]{2}")
    go_on.set()
    run(made, known)
    go_on.clear()
    begun.clear()
    prompt = {"prompt_token_ids": START}

    def call() -> None:
        if ask == "generate":
            found.extend(run(made, asked(24, 1, regex=REGEX)))
        elif ask == "stream":
            found.extend([output.outputs[0] for output in made.stream(prompt, asked(24, 1, regex=REGEX))][-1:])
        else:
            made.add_request(prompt, asked(24, 1, regex=REGEX))
            while not found:
                found.extend([output.outputs[0] for output in made.step() if output.finished])

    other = threading.Thread(target=call, daemon=True)
    other.start()
    assert begun.wait(20)
    [free], [constrained] = run(made, stars.SamplingParams(max_tokens=8, seed=1)), run(made, known)
    assert free.token_ids and fits(constrained, ["aa", "ab", "ba", "bb"]) and not found
    go_on.set()
    other.join(20)
    assert found[0].error is None and fits(found[0], WORDS)
    nothing_is_held(made)


def test_no_task_waits_for_anothers_grammar(slow):
    """Nor is a stream that is closed meanwhile, or whose task is cancelled, ever asked for."""
    begun, go_on = slow

    async def last(stream):
        return [output async for output in stream][-1].outputs[0]

    async def all_of_it():
        async with stars.AsyncEngine(engine()) as made:
            prompt = {"prompt_token_ids": START}
            streams = [made.generate(prompt, asked(24, seed, regex=REGEX)) for seed in range(3)]
            tasks = [asyncio.create_task(last(stream)) for stream in streams]
            adding = asyncio.create_task(made.add(prompt, asked(24, 3, regex=REGEX)))
            await asyncio.to_thread(begun.wait, 8)
            free = await asyncio.wait_for(last(made.generate(prompt, stars.SamplingParams(max_tokens=8, seed=1))), 4)
            assert free.token_ids and not any(task.done() for task in (*tasks, adding))
            tasks[1].cancel()
            await streams[2].aclose()
            with pytest.raises(RuntimeError, match="another task"):
                await anext(streams[0])
            go_on.set()
            assert fits(await tasks[0], WORDS) and fits(await last(await adding), WORDS)
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]
            with pytest.raises(IndexError):  # no output
                await tasks[2]
            with pytest.raises(stars.RequestError, match="can be followed"):
                await last(made.generate(prompt, asked(24, 1, regex="(a")))
        return made

    nothing_is_held(asyncio.run(all_of_it()).engine)


def test_what_was_locked_when_a_process_was_forked_is_free_in_the_child():
    made = Grammars(LETTERS, VOCAB, (EOS,))
    wanted = StructuredOutputsParams(regex=REGEX)
    made.of(wanted)
    with made._lock, made._compiling:
        child = os.fork()
        if not child:
            os._exit(0 if made.known(wanted) is not None and made._compiling.acquire(timeout=1) else 1)
    assert os.waitpid(child, 0)[1] == 0
