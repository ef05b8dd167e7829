"""/v1/completions: texts are the engine's own, whole and streamed; what is wrong is told by its name, and who goes away
leaves nothing behind."""

from __future__ import annotations

import asyncio
import io
import json
import math
import socket
import threading
import time
from typing import Any

import pytest

import stars
from in_process import Client, Server, run
from serving_http import running_server
from stars.cli.options import shipped_pair
from stars.sampling import RequestOutputKind
from stars.serve.http.protocol import CompletionRequest
from stars.serve.http.replies import Completion
from stars.trace.reader import read_trace
from test_conservation import nothing_is_held
from test_invariance import decided

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PATH = "/v1/completions"
PROMPTS = ["This film was", "The plot"]
GUIDED = {"policy": "stars", "reward_threshold": 1.0, "segment_size": 6, "beta": 0.5, "max_attempts": 4}
POLICY = stars.STARS(6, 4, beta=0.5, reward_threshold=1.0)
POLICIES = {"stars": (GUIDED, POLICY), "plain": ({"policy": "plain"}, stars.Sample()),
            "best-of-n": ({"policy": "best-of-n", "n": 3}, stars.BestOfN(3))}


@pytest.fixture(scope="module")
def server():
    lm, rm = shipped_pair()
    made = Server(stars.Engine(lm, rm, deterministic=True, max_num_seqs=8, max_num_lanes=32), policy="stars",
                  policy_parameters={"reward_threshold": 1.0})
    yield made
    made.close()
    nothing_is_held(made.engine.engine)


def expected(server: Server, prompts: Any, policy: stars.plan.Policy, **params: Any) -> list[stars.RequestOutput]:
    return server.engine.engine.generate(prompts, stars.SamplingParams(**params), policy, use_tqdm=False)


def texts_of(events: list[dict[str, Any]], count: int) -> list[str]:
    texts = [""] * count
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("n", [1, 3])
def test_texts_are_those_of_generate(server, name, n):
    given, policy = POLICIES[name]
    body = {"prompt": PROMPTS[0], "max_tokens": 20, "seed": 5, "n": n, "top_k": 50, "stop": ["zz"], "stars": given}
    [output] = expected(server, PROMPTS[0], policy, max_tokens=20, seed=5, n=n, top_k=50, stop=["zz"])
    texts = [completion.text for completion in output.outputs]
    whole = server.post(PATH, body).json
    assert [choice["text"] for choice in whole["choices"]] == texts
    assert [choice["index"] for choice in whole["choices"]] == list(range(n))
    for choice, completion in zip(whole["choices"], output.outputs, strict=True):
        assert choice["finish_reason"] == completion.finish_reason == choice["stars"]["finish_reason"]
        assert choice["stars"]["reward"] == completion.reward
        assert choice["stars"]["accept_rate"] == completion.metrics.accept_rate
    assert whole["usage"]["completion_tokens"] == sum(len(completion.token_ids) for completion in output.outputs)
    assert whole["usage"]["prompt_tokens"] == len(output.prompt_token_ids)
    assert whole["stars"]["seed"] == 5 and whole["stars"]["prompt_reward"] == output.prompt_reward
    assert whole["stars"]["policy"]["name"] == ("sample" if name == "plain" else name)

    events = server.post(PATH, {**body, "stream": True, "stream_options": {"include_usage": True}}).events
    assert texts_of(events, n) == texts
    last = events.pop()
    assert last["choices"] == [] and last["stars"] == whole["stars"]
    assert ({name: count for name, count in last["usage"].items() if "details" not in name}
            == {name: count for name, count in whole["usage"].items() if "details" not in name})
    assert all(event["usage"] is None and len(event["choices"]) == 1 for event in events)
    ends = {choice["index"]: choice for event in events for choice in event["choices"] if choice["finish_reason"]}
    assert [ends[index]["stars"] | {"width": 0} for index in range(n)] == [
        choice["stars"] | {"width": 0} for choice in whole["choices"]]
    assert len({event["id"] for event in events}) == 1 and events[0]["id"].startswith("cmpl-")
    if name == "stars":
        segments = sum(len(completion.segments) for completion in output.outputs)
        assert len(events) == segments > n  # one a segment and choice, the end in the last


def test_several_prompts_are_numbered_and_interleaved(server):
    """prompt * n + k; one seed for all; token ids as well as texts."""
    outputs = expected(server, PROMPTS, POLICY, max_tokens=18, seed=9, n=2)
    texts = [completion.text for output in outputs for completion in output.outputs]
    ids = [output.prompt_token_ids for output in outputs]
    for prompt in (PROMPTS, ids):
        body = {"prompt": prompt, "max_tokens": 18, "seed": 9, "n": 2, "stars": GUIDED}
        whole = server.post(PATH, body).json
        assert [choice["text"] for choice in whole["choices"]] == texts
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
        assert whole["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert whole["stars"]["seed"] == 9 and whole["stars"]["prompt_reward"] is None
        assert [choice["stars"]["prompt_reward"] for choice in whole["choices"][::2]] == [
            output.prompt_reward for output in outputs]
    events = server.post(PATH, {**body, "stream": True}).events
    assert texts_of(events, 4) == texts
    order = [choice["index"] // 2 for event in events for choice in event["choices"]]
    assert order != sorted(order), "one prompt was answered after the other"
    assert [event for event in events if "stars" in event] == events[-1:]


def test_prompts_without_a_seed_have_one_each(server):
    whole = server.post(PATH, {"prompt": [PROMPTS[0]] * 3, "max_tokens": 12, "model": "toy:plain"}).json
    seeds = [choice["stars"]["seed"] for choice in whole["choices"]]
    assert len(set(seeds)) == 3 and whole["stars"]["seed"] is None and max(seeds) < 2**53
    assert len({choice["text"] for choice in whole["choices"]}) > 1
    again = server.post(PATH, {"prompt": PROMPTS[0], "max_tokens": 12, "model": "toy:plain", "seed": seeds[1]}).json
    assert again["choices"][0]["text"] == whole["choices"][1]["text"]


def test_log_probabilities(server):
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "seed": 2, "logprobs": 2, "stars": GUIDED}
    [output] = expected(server, PROMPTS[0], POLICY, max_tokens=12, seed=2, logprobs=2)
    [completion] = output.outputs
    whole = server.post(PATH, body).json["choices"][0]
    found = whole["logprobs"]
    rows = list(zip(completion.token_ids, completion.logprobs, strict=True))
    assert found["token_logprobs"] == [row[token].logprob for token, row in rows]
    assert found["tokens"] == [row[token].decoded_token for token, row in rows]
    assert found["top_logprobs"] == [{one.decoded_token: one.logprob for one in row.values()} for _, row in rows]
    for token, place in zip(found["tokens"], found["text_offset"], strict=True):
        assert whole["text"].startswith(token, place), (token, place)
    parts = [choice["logprobs"] for event in server.post(PATH, {**body, "stream": True}).events
             for choice in event["choices"]]
    assert {name: [item for part in parts for item in part[name]] for name in found} == found
    zero = server.post(PATH, {**body, "logprobs": 0}).json["choices"][0]["logprobs"]
    assert [list(tops.values()) for tops in zero["top_logprobs"]] == [[value] for value in found["token_logprobs"]]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server, stream):
    """The prompt comes first, with its log-probabilities; max_tokens=0 asks for nothing else, as evaluations do."""
    [output] = expected(server, PROMPTS[0], POLICY, max_tokens=8, seed=2, logprobs=1, prompt_logprobs=1)
    body = {"prompt": PROMPTS[0], "max_tokens": 8, "seed": 2, "logprobs": 1, "echo": True, "stars": GUIDED,
            "stream": stream}

    def told(body: dict[str, Any]) -> tuple[str, dict[str, list]]:
        answer = server.post(PATH, body)
        choices = [choice for event in (answer.events if stream else [answer.json]) for choice in event["choices"]]
        assert choices[-1]["finish_reason"] == "length"
        parts = [choice["logprobs"] for choice in choices]
        return ("".join(choice["text"] for choice in choices),
                {name: [item for part in parts for item in part[name]] for name in parts[0]})

    text, found = told(body)
    assert text == PROMPTS[0] + output.outputs[0].text
    rows = [*zip(output.prompt_token_ids, output.prompt_logprobs, strict=True),
            *zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)]
    assert found["token_logprobs"] == [None if row is None else row[token].logprob for token, row in rows]
    assert all(text.startswith(token, place) for token, place in
               zip(found["tokens"][1:], found["text_offset"][1:], strict=True))
    only, of_prompt = told({**body, "max_tokens": 0})
    assert only == PROMPTS[0]
    assert of_prompt == {name: items[: len(output.prompt_token_ids)] for name, items in found.items()}
    if not stream:
        assert server.post(PATH, {**body, "max_tokens": 0}).json["usage"]["completion_tokens"] == 0
        by_ids = {**body, "prompt": output.prompt_token_ids, "logprobs": None}
        assert server.post(PATH, by_ids).json["choices"][0]["text"] == text


def test_token_ids_and_prompt_log_probabilities(server):
    [output] = expected(server, PROMPTS[0], POLICY, max_tokens=8, seed=2, prompt_logprobs=1)
    whole = server.post(PATH, {"prompt": PROMPTS[0], "max_tokens": 8, "seed": 2, "prompt_logprobs": 1, "stars": GUIDED,
                               "return_token_ids": True}).json["choices"][0]
    assert whole["token_ids"] == output.outputs[0].token_ids
    assert whole["prompt_token_ids"] == output.prompt_token_ids
    assert whole["prompt_logprobs"] == [None if row is None else {
        str(token): one._asdict() for token, one in row.items()} for row in output.prompt_logprobs]


def test_parameters_reach_the_engine(server, monkeypatch):
    """Every parameter under its own name, with its value."""
    seen = asked_of(server, monkeypatch)
    given = {"temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["x", "y"], "seed": 7, "presence_penalty": 0.5,
             "frequency_penalty": -0.5, "logit_bias": {"5": 2.0}, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5,
             "min_tokens": 3, "stop_token_ids": [9], "ignore_eos": True, "bad_words": ["bad"],
             "allowed_token_ids": [5, 6, 9], "skip_special_tokens": False, "include_stop_str_in_output": True,
             "truncate_prompt_tokens": 4, "prompt_logprobs": 1, "max_tokens": 9, "logprobs": 3}
    body = {**given, "prompt": PROMPTS[0], "priority": -2, "user": "ann", "special_tokens": "text",
            "add_special_tokens": False, "stars": {**GUIDED, "budget": {"seconds": 9, "attempts": 50}}}
    headers = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "tracestate": "a=b"}
    assert server.post(PATH, body, headers).status == 200
    [(prompt, params, policy, others)] = seen
    assert params == stars.SamplingParams(**given, output_kind=RequestOutputKind.FINAL_ONLY)
    assert policy == POLICY and prompt == {"prompt": PROMPTS[0], "special_tokens": "text",
                                            "add_special_tokens": False}
    assert others["budget"] == stars.Budget(seconds=9.0, attempts=50)
    assert (others["priority"], others["user"], others["trace_headers"]) == (-2, "ann", headers)

    seen.clear()
    nothing = dict.fromkeys((*given, "priority", "user", "special_tokens", "add_special_tokens", "stream", "echo",
                             "stars", "model", "suffix", "best_of", "response_format", "structured_outputs",
                             "stream_options"))
    assert server.post(PATH, {**nothing, "prompt": PROMPTS[0]}).status == 200, "null is absent"
    [(_, params, policy, _)] = seen
    assert params == stars.SamplingParams(max_tokens=16, seed=params.seed, output_kind=RequestOutputKind.FINAL_ONLY)
    assert policy == stars.STARS(reward_threshold=1.0)


def asked_of(server: Server, monkeypatch) -> list:
    """What the engine will be asked for."""
    seen: list = []
    add = server.engine.add_nowait

    async def noted(prompt, params, policy, **others):
        seen.append((prompt, params, policy, others))
        return await add(prompt, params, policy, **others)

    monkeypatch.setattr(server.engine, "add_nowait", noted)
    return seen


def test_what_is_cached_is_counted(server):
    prompt = " ".join(["This film was long, and the plot was thin."] * 8)
    body = {"prompt": prompt, "max_tokens": 4, "model": "toy:plain", "ignore_eos": True}
    server.post(PATH, body)
    usage = server.post(PATH, body).json["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4


def test_usage_so_far(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.post(PATH, {"prompt": PROMPTS[0], "max_tokens": 18, "stream": True, "stream_options": options,
                                "stars": GUIDED, "ignore_eos": True}).events
    written = [event["usage"]["completion_tokens"] for event in events]
    assert written == sorted(written) and written[-1] == written[-2] == 18 and written[0] < 18


def test_a_trace_is_one_for_the_command_line(server, tmp_path):
    """Of a stream too: what was said piece by piece is put together."""
    body = {"prompt": PROMPTS, "max_tokens": 18, "seed": 3, "n": 2, "stars": {**GUIDED, "return_trace": True}}
    outputs = expected(server, PROMPTS, POLICY, max_tokens=18, seed=3, n=2)
    traces = [server.post(PATH, body).json["stars"]["trace"],
              server.post(PATH, {**body, "stream": True}).events[-1]["stars"]["trace"]]
    for text in traces:
        found = read_trace(io.StringIO(text))
        assert [[completion.text for completion in request.completions] for request in found] == [
            [completion.text for completion in output.outputs] for output in outputs]
        assert [[completion.token_ids for completion in request.completions] for request in found] == [
            [completion.token_ids for completion in output.outputs] for output in outputs]
        assert [len(segment.attempts) for request in found for completion in request.completions
                for segment in completion.segments] == [
            len(segment.attempts) for output in outputs for completion in output.outputs
            for segment in completion.segments]


def as_described(model: Any, answer: dict[str, Any]) -> None:
    """An answer has the fields that its description has, and no others."""
    found = model.model_validate(answer, strict=True)
    assert found.model_dump(exclude_unset=True, mode="json") == answer


def test_answers_are_as_described(server):
    body = {"prompt": PROMPTS, "max_tokens": 12, "n": 2, "logprobs": 1, "prompt_logprobs": 0, "return_token_ids": True,
            "echo": True, "stars": {**GUIDED, "return_segments": True, "return_trace": True}}
    as_described(Completion, server.post(PATH, body).json)
    as_described(Completion, server.post(PATH, {"prompt": "x", "max_tokens": 2}).json)
    described = server.app.openapi()["paths"][PATH]["post"]
    assert {"200", "400", "404", "415", "429", "500", "503"} <= described["responses"].keys()
    assert described["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    taken = server.app.openapi()["components"]["schemas"]["CompletionRequest"]
    assert taken["properties"].keys() == CompletionRequest.model_fields.keys() and not taken["additionalProperties"]


# -- what is refused --------------------------------------------------------------------------------------------------


BAD: dict[str, list[Any]] = {
    "model": [1, ["toy"]],
    "prompt": ["", [], 1, {}, True, [1, "a"], [[]], ["a", 1], [[1], "a", None], [-1], [10**9], [10**30], [1.0], [True],
               ["a"] * 1025],
    "stars": ["stars", 1, []],
    "temperature": ["hot", -0.1, True, [1], 10**400, 1e39],
    "top_p": [0, 1.1, "1", -1],
    "n": [0, 1.5, "2", True, 4097, -1, 10**30],
    "stop": [1, [1], {"a": 1}, [""], "", ["a", None], ["a"] * 65, "a" * 1025],
    "seed": ["1", 1.5, 2**70, True],
    "presence_penalty": [2.1, -2.1, "a"],
    "frequency_penalty": [2.1, -2.1, "a"],
    "logit_bias": [[1], {"a": 1}, {"5": "x"}, {"5": 101}, {"-1": 1}, {"99999999": 1}, {"5": None}],
    "user": [1, "u" * 257],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, True],
    "max_tokens": [-1, "9", 1.5, 10**6, 0, 10**30],
    "response_format": ["json", {}, {"type": "yaml"}, {"type": "json_schema"}, {"type": "json_object", "schema": {}},
                        {"type": "json_schema", "json_schema": {"schema": {"type": 3}}},
                        {"type": "json_schema", "json_schema": {"schema": []}},
                        {"type": "text", "json_schema": {"schema": {}}}],
    "top_k": [-2, 1.5, "3"],
    "min_p": [-0.1, 1.1, "a"],
    "repetition_penalty": [0, -1, 101, "a"],
    "min_tokens": [-1, "a", 1.5, 10**6],
    "stop_token_ids": [1, ["a"], [-1], [10**9], [1.0], {"1": 1}],
    "ignore_eos": ["no", 1],
    "bad_words": ["bad", [1], [""], {"a": 1}],
    "allowed_token_ids": [[], 1, ["a"], [-1], [10**9]],
    "skip_special_tokens": ["no"],
    "include_stop_str_in_output": ["no"],
    "truncate_prompt_tokens": [-2, 0, "a", 10**6],
    "prompt_logprobs": [-1, 21, "a", True],
    "structured_outputs": ["json", {}, {"json": 3}, {"regex": "("}, {"choice": []}, {"regex": "a", "choice": ["b"]},
                           {"rgex": "a"}, {"grammar": ""}],
    "priority": ["high", 1.5, 2**40],
    "special_tokens": ["maybe", True],
    "return_token_ids": ["no"],
    "add_special_tokens": ["no", 1],
    "echo": ["no", 1],
    "logprobs": [-1, 21, "a", True, 1.5],
}
"""Values that no request may have, by parameter."""
GUIDED_BADLY: dict[str, list[Any]] = {
    "policy": [1, "strs", ["stars"], ""], "budget": [1, "x", []], "return_segments": ["yes", 1],
    "return_trace": ["yes", 0], "beta": ["hot", -1, [], {}], "reward_threshold": ["high", True, {}],
    "segment_size": [0, 1.5, "a", 10**6], "max_attempts": [0, "a", 10**9], "alpha": [2, "a"], "width": [0, "a", 1.5],
    "exhaust": ["never", 1, {}], "barrier": ["yes"], "bta": [1], "n": [3],
    "reward": ["http://127.0.0.1:1"], "Policy": ["stars"],
}
BUDGETS: dict[str, list[Any]] = {"seconds": [0, -1, "a", True], "attempts": [0, 1.5], "lm_tokens": ["a"],
                                 "rm_calls": [-1], "second": [1]}


def refused(server: Server, body: Any, param: str | None, path: str = PATH) -> dict[str, Any]:
    """The error of a body that is at fault in `param`."""
    answer = server.post(path, body)
    assert answer.status == 400, (body, answer.status, answer.body[:300])
    assert answer.error["type"] == "invalid_request_error"
    found = answer.error["param"]
    assert found == param or param in NESTED and str(found).startswith(f"{param}."), (body, answer.error)
    message = answer.error["message"]
    assert message and not message.endswith(".") and "\n" not in message and len(message) < 700
    assert "SamplingParams" not in message and "Input should" not in message and "StructuredOut" not in message, message
    assert answer.headers["x-request-id"]
    return answer.error


NESTED = ("response_format", "stars")


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_value_is_told_by_its_parameter(server, stream):
    assert BAD.keys() == CompletionRequest.model_fields.keys(), "a parameter is not tried"
    for name, values in BAD.items():
        for value in values:
            body = {"prompt": "This film", "stream": stream, "max_tokens": 4, name: value}
            if stream and name == "stream_options" and value is not True:
                continue
            refused(server, body, name)


def test_what_stars_has_wrong_is_told_by_its_name(server):
    for name, values in GUIDED_BADLY.items():
        for value in values:
            error = refused(server, {"prompt": "This film", "stars": {**GUIDED, name: value}}, f"stars.{name}")
            if name == "bta":
                assert "beta" in error["message"]
    for name, values in BUDGETS.items():
        for value in values:
            refused(server, {"prompt": "This film", "stars": {"budget": {name: value}}}, f"stars.budget.{name}")
    refused(server, {"prompt": "x", "stars": {"policy": "cards", "entropy_threshold": -1, "reward_threshold": 0}},
            "stars.entropy_threshold")
    refused(server, {"prompt": "x", "stars": {"policy": "cards"}}, "stars.reward_threshold")
    refused(server, {"prompt": "x", "stars": {"policy": "speculative-rejection", "n": 100}}, "stars.policy")
    refused(server, {"prompt": "x", "stars": {"policy": "rsd", "reward_threshold": 0}}, "stars.policy")


def test_what_contradicts_itself(server):
    for more, param in ((dict(min_tokens=9, max_tokens=4), "min_tokens"),
                        (dict(stream_options={}), "stream_options"),
                        (dict(stream=True, stream_options={"include": 1}), "stream_options.include"),
                        (dict(stream=True, prompt_logprobs=1), "prompt_logprobs"),
                        (dict(model="toy:stars", stars={"policy": "cards", "reward_threshold": 0}), "stars.policy"),
                        (dict(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}),
                         "response_format"),
                        (dict(ignore_eos=True, structured_outputs={"regex": "a"}), "structured_outputs"),
                        (dict(prompt=[1, 2], special_tokens="text"), "special_tokens"),
                        (dict(stop="a</s>"), "stop")):
        refused(server, {"prompt": "This film", "max_tokens": 4, **more}, param)
    same = {"prompt": "This film", "max_tokens": 4, "model": "toy:plain", "stars": {"policy": "sample"}}
    assert server.post(PATH, same).status == 200, "one policy named twice is no contradiction"


def test_what_others_have(server):
    """Unknown parameters by the closest name, those of OpenAI and vLLM that are not here with what to do, unless they
    ask for nothing."""
    for more, param, word in ((dict(temprature=1), "temprature", "temperature"),
                              (dict(topk=40), "topk", "did you mean top_k?"),  # though a policy has a topk
                              (dict(best_of=4), "best_of", "best-of-n"),
                              (dict(reward_threshold=1), "reward_threshold", '"stars"'),
                              (dict(suffix="x"), "suffix", "leave it out"),
                              (dict(guided_json={}), "guided_json", "structured_outputs"),
                              (dict(messages=[]), "messages", "/v1/chat/completions"),
                              (dict(max_new_tokens=3), "max_new_tokens", "max_tokens"),
                              (dict(use_beam_search=True), "use_beam_search", "segment-beam"),
                              (dict(store=True), "store", "leave it out"),
                              (dict(reward_url="http://127.0.0.1:1"), "reward_url", "there are"),
                              (dict(attempt_logprobs=True), "attempt_logprobs", "return_segments"),
                              (dict(cache_salt="x"), "cache_salt", "start a server for each"),
                              (dict(return_tokens_as_token_ids=True), "return_tokens_as_token_ids", "return_token_ids"),
                              ({"a" * 5000: 1}, "a" * 5000, "there are")):
        assert word in refused(server, {"prompt": "x", **more}, param)["message"]
    nothing = dict(metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="x", prompt_cache_key="y",
                   return_tokens_as_token_ids=False, best_of=1, suffix="", use_beam_search=False, logits_processors=[],
                   temprature=None)
    assert server.post(PATH, {"prompt": "x", "max_tokens": 2, **nothing}).status == 200


def test_special_tokens_around_a_prompt(server):
    """BOS, unless told otherwise; token ids are what they are."""
    tokenizer = server.engine.engine.tokenizer
    for special in (None, True, False):
        wanted = tokenizer.encode("This film", add_special_tokens=special is not False)
        answer = server.post(PATH, {"prompt": ["This film", wanted], "max_tokens": 1, "add_special_tokens": special,
                                    "return_token_ids": True}).json
        assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [wanted] * 2
    refused(server, {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens")


def test_models(server):
    for name in ("toy", "toy:plain", "toy:sample", "toy:stars", "toy:best-of-n"):
        answer = server.post(PATH, {"prompt": "x", "max_tokens": 2, "model": name}).json
        assert answer["model"] == name
    for name in ("gpt-4", "toy:strs", "", "toy:", "plain", "toy:toy"):
        answer = server.post(PATH, {"prompt": "x", "max_tokens": 2, "model": name, "stream": True})
        assert answer.status == 404 and answer.error["code"] == "model_not_found" and answer.error["param"] == "model"


def test_a_prompt_that_does_not_fit(server):
    error = refused(server, {"prompt": "This film " * 900, "max_tokens": 4}, "max_tokens")
    assert "is missing" in refused(server, {"prompt": None}, "prompt")["message"]
    assert error["code"] == "context_length_exceeded"
    error = refused(server, {"prompt": ["x", "This film " * 900], "max_tokens": 4}, "max_tokens")
    assert error["message"].startswith("prompt 1: ")
    assert server.post(PATH, {"prompt": "This film " * 900, "max_tokens": 4, "truncate_prompt_tokens": -1,
                              "model": "toy:plain"}).json["usage"]["prompt_tokens"] == 1020


def test_one_prompt_that_is_refused_ends_all(server):
    refused(server, {"prompt": ["This film", [10**8], "The plot"], "max_tokens": 900}, "prompt")
    wait_for(lambda: not server.engine.engine._requests)


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.005)


BODIES = {
    "nothing": b"", "space": b"  ", "cut": b'{"prompt": "a"', "no object": b"[1]", "text": b'"a"', "null": b"null",
    "NaN": b'{"prompt": "a", "temperature": NaN}', "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "twice": b'{"prompt": "a", "n": 1, "n": 2}', "surrogate": b'{"prompt": "a\\ud800b"}',
    "surrogate in a name": b'{"prompt": "a", "\\udc00": 1}', "deep": b"[" * 100_000,
    "deep inside": b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "deep and small": b'{"prompt": "a", "x": ' + b"[" * 150 + b"]" * 150 + b"}", "latin": b'{"prompt": "\xe9"}',
    "utf16": '{"prompt": "a"}'.encode("utf-16"), "bom": b'\xef\xbb\xbf{"prompt": "a"}',
    "digits": b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "large": b'{"prompt": "a", "temperature": 1e999}',
    "control": b'{"prompt": "a\x01"}', "comment": b'{"prompt": "a"} // b', "single": b"{'prompt': 'a'}",
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_json(server, name):
    refused(server, BODIES[name], None)


def test_unicode_that_is_whole(server):
    for text in ("\u0000", "naïve 東京 🙂", "\ufffd", "e\u0301", "\u202e"):
        body = json.dumps({"prompt": text, "max_tokens": 2, "echo": True, "model": "toy:plain"}).encode()
        answer = server.post(PATH, body)
        assert answer.status == 200 and answer.json["choices"][0]["text"].startswith(text)


def test_content_types(server):
    body = {"prompt": "x", "max_tokens": 2}
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON", "application/ld+json"):
        assert server.post(PATH, body, {"content-type": kind}).status == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "", "json"):
        answer = server.post(PATH, body, {"content-type": kind})
        assert answer.status == 415 and "application/json" in answer.error["message"]


def test_names_of_requests(server):
    body = {"prompt": "x", "max_tokens": 2}
    for given, kept in (("mine-1", True), ("a b", True), ("x" * 128, True), ("x" * 129, False), ("", False)):
        for path, sent in ((PATH, body), (PATH, {**body, "stream": True}), (PATH, {"prompt": 3})):
            found = server.post(path, sent, {"x-request-id": given}).headers["x-request-id"]
            assert (found == given) == kept and found
    assert server.post(PATH, body, {"x-request-id": "a"}).json["id"] != server.post(PATH, body).json["id"]


# -- what fails, who goes away ----------------------------------------------------------------------------------------


class Reward:
    """A reward that can be stopped, and fall over at the n-th call."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.calls, self.fails_at = 0, None

    def __call__(self, prompt, responses):
        assert self.open.wait(60)
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise RuntimeError("the reward fell over")
        return [-float(len(response) % 7) for response in responses]


@pytest.fixture(scope="module")
def judged():
    lm, _ = shipped_pair()
    reward = Reward()
    made = Server(stars.Engine(lm, reward, max_num_seqs=4, max_num_lanes=16), max_waiting=2, policy="stars",
                  policy_parameters={"reward_threshold": -9.0, "segment_size": 4, "width": 1, "alpha": 1.0})
    made.reward = reward
    yield made
    made.close()
    nothing_is_held(made.engine.engine)


@pytest.fixture
def server_with_reward(judged):
    judged.reward.calls, judged.reward.fails_at = 0, None
    yield judged
    judged.reward.open.set()
    wait_for(lambda: not judged.engine.engine._requests)


def test_an_error_before_anything_is_sent_has_a_status(server_with_reward):
    server_with_reward.reward.fails_at = 1
    for stream in (False, True):
        answer = server_with_reward.post(PATH, {"prompt": "x", "stream": stream})
        assert answer.status == 500 and "the reward fell over" in answer.error["message"]
        assert answer.error["type"] == "server_error"


def test_an_error_afterwards_is_an_event(server_with_reward):
    server_with_reward.reward.fails_at = 12
    events = server_with_reward.post(PATH, {"prompt": "x", "stream": True, "max_tokens": 90, "ignore_eos": True,
                                            "stars": {"return_segments": True}}).events
    assert sum(len(event["choices"][0]["stars"]["segments"]) for event in events[:-1]) == 11, "committed"
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-1])
    assert "the reward fell over" in events[-1]["error"]["message"] and "choices" not in events[-1]
    server_with_reward.reward.calls = 0
    whole = server_with_reward.post(PATH, {"prompt": "x", "max_tokens": 90, "ignore_eos": True})
    assert whole.status == 500


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", ["x", ["x", "y"]])
def test_who_goes_away_frees_the_pages_within_a_segment(server_with_reward, stream, prompts):
    """While a segment is judged: at most that one is finished."""
    server, reward, caches = server_with_reward, server_with_reward.reward, server_with_reward.engine.engine._cache
    free = caches.num_free_pages
    body = {"prompt": prompts, "max_tokens": 900, "ignore_eos": True, "stream": stream}

    async def leave() -> int:
        client = Client(server.app, PATH, body)
        running = asyncio.ensure_future(client.run())
        while reward.calls < 3 or not stream and reward.calls < 1:
            await asyncio.sleep(0.002)
        reward.open.clear()
        await asyncio.sleep(0.05)
        calls = reward.calls
        client.gone.set()
        await running  # the server answers nobody, and does not wait for the engine
        assert stream or client.answer.status == 499
        reward.open.set()
        return calls

    calls = run(leave())
    wait_for(lambda: not server.engine.engine._requests)
    assert reward.calls <= calls + 2 * len(prompts), "it went on"
    assert caches.num_free_pages == free


@pytest.mark.parametrize("stream", [False, True])
def test_a_socket_that_is_closed(server_with_reward, stream):
    """As a client dies: uvicorn tells the application, which ends the request."""
    held, engine = server_with_reward, server_with_reward.engine.engine
    body = json.dumps({"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": stream}).encode()
    head = (f"POST {PATH} HTTP/1.1\r\nHost: testserver\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode()
    with running_server(held.service) as running:
        address = running.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=30) as client:
            client.sendall(head + body)
            if stream:
                assert client.recv(1)
            else:
                wait_for(lambda: engine._cache.num_free_pages < engine._cache.num_pages)
        calls = held.reward.calls
        wait_for(lambda: not engine._requests)
        assert held.reward.calls < 200 > calls, "it was drawn to its end"
    assert engine._cache.num_free_pages == engine._cache.num_pages


def test_who_leaves_after_one_byte(server_with_reward):
    server = server_with_reward
    body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}

    async def leave() -> None:
        clients = [Client(server.app, PATH, body, leaves=lambda so_far: len(so_far) > 0) for _ in range(4)]
        await asyncio.gather(*(client.run() for client in clients))
        assert all(b"DONE" not in client.sent_body for client in clients)

    run(leave())
    wait_for(lambda: not server.engine.engine._requests)
    assert server.post(PATH, {"prompt": "x", "max_tokens": 4}).status == 200


def test_a_full_queue_is_429(server_with_reward):
    """Before a stream opens. Of several prompts that do not all fit none runs on; more than ever fit are refused."""
    server, reward = server_with_reward, server_with_reward.reward
    long = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}

    async def crowd() -> None:
        reward.open.clear()
        clients = [Client(server.app, PATH, long) for _ in range(6)]
        running = [asyncio.ensure_future(client.run()) for client in clients]
        while len(server.engine.engine._requests) < 4:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)
        for stream in (False, True):
            answer = await server.sent(PATH, {**long, "stream": stream})
            assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.error["code"] == "queue_full"
        for client in clients:
            client.gone.set()
        reward.open.set()
        await asyncio.gather(*running)

    run(crowd())
    wait_for(lambda: not server.engine.engine._requests)
    error = refused(server, {"prompt": ["x"] * 7}, "prompt")
    assert "6" in error["message"]
    assert server.post(PATH, {"prompt": ["x"] * 4, "max_tokens": 4}).status == 200


def test_what_a_budget_ends_is_told(server_with_reward):
    answer = server_with_reward.post(PATH, {"prompt": "x", "max_tokens": 40, "ignore_eos": True,
                                            "stars": {"budget": {"attempts": 3}}}).json
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["stars"]["finish_reason"], choice["stars"]["attempts"]) == (
        "length", "budget", 3)


def test_an_engine_that_ended(server_with_reward):
    lm, _ = shipped_pair()
    made = Server(stars.Engine(lm), policy="sample")
    assert made.post(PATH, {"prompt": "x", "stars": {"policy": "stars", "reward_threshold": 0}}).status == 400
    made.service.draining = True
    assert made.post(PATH, {"prompt": "x"}).status == 503
    made.service.draining = False
    made.close()
    answer = made.post(PATH, {"prompt": "x", "stream": True})
    assert answer.status == 503 and answer.error["code"] == "engine_dead"


def test_numbers_that_json_lacks_are_null():
    lm, _ = shipped_pair()
    made = Server(stars.Engine(lm, lambda prompt, responses: [-math.inf] * len(responses)), policy="stars",
                  policy_parameters={"reward_threshold": 0.0, "max_attempts": 2, "segment_size": 4, "alpha": 1})
    body = {"prompt": "x", "max_tokens": 8, "stars": {"return_segments": True, "return_trace": True}}
    for answer in (made.post(PATH, body).json, made.post(PATH, {**body, "stream": True}).events[0]):
        record = answer["choices"][0]["stars"]
        assert record["reward"] is None and record["segments"][0]["attempts"][0]["reward"] is None
    made.close()


def test_what_is_asked_at_once_is_what_is_asked_alone(server):
    """Thirty clients, whole and streamed."""
    bodies = [{"prompt": PROMPTS[index % 2], "max_tokens": 12, "seed": index, "stars": GUIDED,
               "stream": index % 3 == 0} for index in range(30)]

    async def all_of_them() -> list:
        return await asyncio.gather(*(server.sent(PATH, body) for body in bodies))

    def text(answer: Any, stream: bool) -> str:
        return texts_of(answer.events, 1)[0] if stream else answer.json["choices"][0]["text"]

    found = [text(answer, body["stream"]) for answer, body in zip(run(all_of_them()), bodies, strict=True)]
    outputs = [expected(server, body["prompt"], POLICY, max_tokens=12, seed=body["seed"])[0] for body in bodies]
    assert found == [output.outputs[0].text for output in outputs]
    assert decided(outputs[0])
