"""/v1/chat/completions: conversations as the engine's chat answers them, in OpenAI's shapes."""

from __future__ import annotations

import io
import json
import shutil
from typing import Any

import pytest

import stars
from in_process import Server
from stars.cli.options import shipped_pair
from stars.serve.http.protocol import ChatCompletionRequest
from stars.serve.http.replies import ChatCompletion
from stars.trace.reader import read_trace
from test_conservation import nothing_is_held
from test_serve_completions import BAD, GUIDED, POLICY, as_described, asked_of, refused

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }}; {% endif %}{% if mood is defined %}Mood: {{ mood }}; {% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}; {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
USER = {"role": "user", "content": "How was the film?"}
TOOL = {"type": "function", "function": {"name": "rate", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    lm, rm = shipped_pair()
    directory = tmp_path_factory.mktemp("chat") / "lm"
    shutil.copytree(lm, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    reward = stars.CausalReward(rm, template="raw")
    made = Server(stars.Engine(directory, reward, deterministic=True, max_num_seqs=8, max_num_lanes=32), policy="stars",
                  policy_parameters={"reward_threshold": 1.0}, default_max_tokens=20)
    yield made
    made.close()
    nothing_is_held(made.engine.engine)


def expected(server: Server, messages: Any, more: Any = None, **params: Any) -> stars.RequestOutput:
    prompt = {"messages": messages, **(more or {})}
    [output] = server.engine.engine.generate(prompt, stars.SamplingParams(**params), POLICY, use_tqdm=False)
    return output


def joined(events: list[dict[str, Any]], count: int) -> list[str]:
    texts = [""] * count
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"]["content"]
    return texts


@pytest.mark.parametrize("n", [1, 3])
def test_texts_are_those_of_the_engine(server, n):
    messages = [{"role": "system", "content": "Be kind."}, USER]
    output = expected(server, messages, max_tokens=18, seed=4, n=n)
    texts = [completion.text for completion in output.outputs]
    body = {"messages": messages, "max_completion_tokens": 18, "seed": 4, "n": n, "stars": GUIDED}
    whole = server.post(PATH, body).json
    assert whole["object"] == "chat.completion" and whole["id"].startswith("chatcmpl-")
    assert [choice["message"]["content"] for choice in whole["choices"]] == texts
    assert all(choice["message"]["role"] == "assistant" for choice in whole["choices"])
    assert [choice["stars"]["reward"] for choice in whole["choices"]] == [one.reward for one in output.outputs]
    events = server.post(PATH, {**body, "stream": True, "stream_options": {"include_usage": True}}).events
    assert joined(events, n) == texts
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] and not events[-1]["choices"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for index in range(n):
        deltas = [choice["delta"] for event in events for choice in event["choices"] if choice["index"] == index]
        assert ["role" in delta for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert server.post(PATH, {**body, "max_completion_tokens": None, "max_tokens": 18}).json["choices"] == (
        whole["choices"])


def test_log_probabilities(server):
    output = expected(server, [USER], max_tokens=12, seed=2, logprobs=2)
    [completion] = output.outputs
    body = {"messages": [USER], "max_tokens": 12, "seed": 2, "logprobs": True, "top_logprobs": 2, "stars": GUIDED}
    content = server.post(PATH, body).json["choices"][0]["logprobs"]["content"]
    for found, token, row in zip(content, completion.token_ids, completion.logprobs, strict=True):
        assert (found["token"], found["logprob"]) == (row[token].decoded_token, row[token].logprob)
        assert bytes(found["bytes"]).decode() == found["token"]
        ranked = sorted(row.values(), key=lambda one: one.rank)[:2]
        assert [(top["token"], top["logprob"]) for top in found["top_logprobs"]] == [
            (one.decoded_token, one.logprob) for one in ranked]
    events = server.post(PATH, {**body, "stream": True}).events
    assert [found for event in events for found in event["choices"][0]["logprobs"]["content"]] == content
    alone = server.post(PATH, {**body, "top_logprobs": None}).json["choices"][0]["logprobs"]["content"]
    assert [{**found, "top_logprobs": []} for found in content] == alone


def prompt_of(server: Server, **body: Any) -> str:
    """What the language model reads of a body."""
    answer = server.post(PATH, {"max_tokens": 1, "return_token_ids": True, **body})
    assert answer.status == 200, answer.body
    return server.engine.engine.tokenizer.decode(answer.json["prompt_token_ids"])


def test_conversations_as_clients_send_them(server):
    assert prompt_of(server, messages=[USER]) == "user: How was the film?; assistant:"
    parts = [{"type": "text", "text": "How was"}, {"type": "text", "text": "the film?"}]
    assert prompt_of(server, messages=[{"role": "user", "content": parts}]) in (
        "user: How was\nthe film?; assistant:", "user: How wasthe film?; assistant:")  # where a vocabulary has no \n
    developer = {"role": "developer", "content": "Be brief.", "name": "me"}
    assert prompt_of(server, messages=[developer, USER]).startswith("system: Be brief.; ")
    call = {"id": "1", "type": "function", "function": {"name": "rate", "arguments": '{"stars": 5}'}}
    text = prompt_of(server, messages=[
        USER, {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "1", "content": "done"}])
    assert 'assistant: rate({"stars": 5}); tool: done; assistant:' in text
    assert prompt_of(server, messages=[USER, {"role": "assistant", "content": "Good", "tool_calls": None}, USER]).count(
        "assistant") == 2


def test_templates_take_what_is_for_them(server):
    tools = {"tools": [TOOL], "messages": [USER]}
    assert "rate" in prompt_of(server, **tools) and "rate" in prompt_of(server, **tools, tool_choice="auto")
    assert "rate" not in prompt_of(server, **tools, tool_choice="none")
    assert "Mood: good" in prompt_of(server, messages=[USER], chat_template_kwargs={"mood": "good"})
    assert prompt_of(server, messages=[USER], add_generation_prompt=False).endswith("film?; ")
    begun = [USER, {"role": "assistant", "content": "It was"}]
    assert prompt_of(server, messages=begun, continue_final_message=True).endswith("assistant: It was")
    for choice in ("required", {"type": "function", "function": {"name": "rate"}}, "sometimes"):
        error = refused(server, {**tools, "tool_choice": choice}, "tool_choice", PATH)
        assert "response_format" in error["message"]


def test_control_tokens_are_text_where_that_is_asked(server):
    message = [{"role": "user", "content": "a</s>b"}]
    body = {"messages": message, "max_tokens": 1, "return_token_ids": True}
    parsed, text = (server.post(PATH, {**body, "special_tokens": kind}).json["prompt_token_ids"]
                    for kind in ("parse", "text"))
    assert server.engine.engine.tokenizer.eos_token_id in parsed
    assert server.engine.engine.tokenizer.eos_token_id not in text


def test_how_long_an_answer_may_be(server):
    """The server's default, or what the context leaves; a number that does not fit is refused."""
    plain = {"model": "toy:plain", "ignore_eos": True}
    whole = server.post(PATH, {"messages": [USER], **plain}).json
    assert whole["usage"]["completion_tokens"] == 20 and whole["choices"][0]["finish_reason"] == "length"
    limit = server.engine.engine.config.max_model_len
    ids = len(server.engine.engine.tokenizer.encode("film " * 400))
    long = [{"role": "user", "content": "film " * (400 * (limit - 30) // ids)}]
    usage = server.post(PATH, {"messages": long, **plain}).json["usage"]
    if usage["prompt_tokens"] + 20 <= limit:
        long[0]["content"] += " film" * (limit - usage["prompt_tokens"] - 12)
        usage = server.post(PATH, {"messages": long, **plain}).json["usage"]
    assert usage["total_tokens"] == limit and 0 < usage["completion_tokens"] < 20
    error = refused(server, {"messages": long, **plain, "max_completion_tokens": 20}, "max_completion_tokens", PATH)
    assert error["code"] == "context_length_exceeded" and "max_completion_tokens" in error["message"]
    error = refused(server, {"messages": [{"role": "user", "content": "film " * 2000}]}, "messages", PATH)
    assert error["code"] == "context_length_exceeded"


SCHEMA = {"type": "object", "properties": {"stars": {"enum": [1, 2, 3]}}, "required": ["stars"],
          "additionalProperties": False}


@pytest.mark.parametrize("stream", [False, True])
def test_json_is_what_is_asked_for(server, stream):
    for given in ({"response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": SCHEMA}}},
                  {"structured_outputs": {"json": SCHEMA}}):
        answer = server.post(PATH, {"messages": [USER], "max_tokens": 80, "seed": 1, "stream": stream, **given,
                                    "stars": {"return_trace": True}})
        record = answer.events[-1]["stars"] if stream else answer.json["stars"]
        [traced] = read_trace(io.StringIO(record["trace"]))
        assert traced.params["structured_outputs"] == {"json": SCHEMA}
        text = joined(answer.events, 1)[0] if stream else answer.json["choices"][0]["message"]["content"]
        assert json.loads(text)["stars"] in (1, 2, 3)
    answer = server.post(PATH, {"messages": [USER], "max_tokens": 40, "seed": 1, "model": "toy:plain",
                                "response_format": {"type": "json_object"}}).json
    assert answer["choices"][0]["message"]["content"].lstrip().startswith("{")
    assert server.post(PATH, {"messages": [USER], "max_tokens": 2, "response_format": {"type": "text"}}).status == 200


def test_what_a_prompt_says(server):
    output = expected(server, [USER], max_tokens=4, seed=2, prompt_logprobs=0)
    whole = server.post(PATH, {"messages": [USER], "max_tokens": 4, "seed": 2, "prompt_logprobs": 0,
                               "return_token_ids": True, "stars": GUIDED}).json
    assert whole["prompt_token_ids"] == output.prompt_token_ids and len(whole["prompt_logprobs"]) == len(
        output.prompt_token_ids)
    assert whole["choices"][0]["token_ids"] == output.outputs[0].token_ids
    events = server.post(PATH, {"messages": [USER], "max_tokens": 4, "stream": True, "return_token_ids": True,
                                "stars": GUIDED}).events
    assert events[0]["choices"][0]["prompt_token_ids"] == output.prompt_token_ids


def test_answers_are_as_described(server):
    body = {"messages": [USER], "max_tokens": 8, "n": 2, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 0,
            "return_token_ids": True, "stars": {**GUIDED, "return_segments": True, "return_trace": True}}
    as_described(ChatCompletion, server.post(PATH, body).json)
    as_described(ChatCompletion, server.post(PATH, {"messages": [USER], "max_tokens": 2}).json)


MINE: dict[str, list[Any]] = {
    **{name: values for name, values in BAD.items()
       if name not in ("prompt", "add_special_tokens", "echo", "logprobs")},
    "messages": ["hi", [], [1], [{}], [{"role": "user"}], [{"role": 1, "content": "x"}], {"role": "user"},
                 [{"content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": ["x"]}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                 [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
                 [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": ["a"]}]}],
                 [USER, {"role": "assistant", "content": None, "tool_calls": [
                     {"function": {"name": "f", "arguments": "["}}]}],
                 [{"role": "", "content": "x"}]],
    "max_completion_tokens": [0, -1, "9", 1.5, 10**6],
    "max_tokens": [-1, "9", 1.5, 10**6, 0],
    "logprobs": [1, "yes"],
    "top_logprobs": [-1, 21, "a", 3],
    "tools": ["x", [1], {}],
    "tool_choice": ["required", 1, {"type": "function"}],
    "add_generation_prompt": ["no", 1],
    "continue_final_message": ["no", 1],
    "chat_template_kwargs": ["x", [1], {"messages": []}],
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_value_is_told_by_its_parameter(server, stream):
    assert MINE.keys() == ChatCompletionRequest.model_fields.keys(), "a parameter is not tried"
    for name, values in MINE.items():
        for value in values:
            if stream and name == "stream_options" and value is not True or name == "stream" and stream:
                continue
            refused(server, {"messages": [USER], "stream": stream, name: value}, name, PATH)


def test_what_contradicts_itself(server):
    for more, param in ((dict(max_tokens=4, max_completion_tokens=5), "max_completion_tokens"),
                        (dict(min_tokens=9, max_completion_tokens=4), "min_tokens"),
                        (dict(top_logprobs=1, logprobs=False), "top_logprobs"),
                        (dict(add_generation_prompt=True, continue_final_message=True), "continue_final_message"),
                        (dict(prompt="x"), "prompt"), (dict(echo=True), "echo"), (dict(functions=[TOOL]), "functions"),
                        (dict(modalities=["audio"]), "modalities"),
                        (dict(add_special_tokens=True), "add_special_tokens"),
                        (dict(reasoning_effort="high"), "reasoning_effort")):
        refused(server, {"messages": [USER], **more}, param, PATH)
    same = {"messages": [USER], "max_tokens": 4, "max_completion_tokens": 4, "modalities": ["text"],
            "parallel_tool_calls": True, "add_special_tokens": False, "verbosity": "medium"}
    assert server.post(PATH, same).status == 200


def test_images_are_refused_by_name(server):
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    message = refused(server, {"messages": [USER, {"role": "user", "content": [part]}]}, "messages", PATH)["message"]
    assert "messages[1]" in message and "image_url" in message


def test_a_model_without_a_template(server, monkeypatch):
    monkeypatch.setattr(server.engine.engine.tokenizer, "_templates", {})
    assert "chat template" in refused(server, {"messages": [USER]}, "messages", PATH)["message"]


def test_messages_reach_the_engine_as_they_are(server, monkeypatch):
    seen = asked_of(server, monkeypatch)
    message = {"role": "user", "content": "x", "name": "ann", "weather": {"sun": [1, None]}}
    assert server.post(PATH, {"messages": [message], "max_tokens": 1}).status == 200
    assert seen[0][0]["messages"] == [message]
