"""/score, /classify, /pooling and /v1/calibrate: vLLM's shapes around what the engine itself says, and a server as the
reward of another engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import struct
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import stars
from serving_http import running_server
from stars.plan import DRAFT_SIZE
from stars.serve.http.app import build_app
from stars.serve.http.reward_bodies import MAX_PROMPTS
from stars.serve.http.reward_replies import CalibrationReply, ClassifyReply, PoolingReply, ScoreReply
from stars.serve.http.rewards import _sigmoid
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings
from test_score import CHAT, LIMIT, PROMPTS, SMALL, TOLERANCE, of_text, prompt, toy_engine
from toy import toy_pair

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TEXTS = [" jumps over", " sleeps", " and the lazy dog lived near"]
LM, RM = toy_pair(11, (1, 3), layers=2)


def served(engine: stars.AsyncEngine, **settings: Any) -> Any:
    return build_app(Service(engine, ServerSettings(model="tiny", **settings)))


@contextlib.contextmanager
def client_of(engine: stars.Engine) -> Iterator[TestClient]:
    """A client, in process, of a server over `engine`, which is free again at the end."""
    shared = stars.AsyncEngine(engine)
    with TestClient(served(shared), raise_server_exceptions=False) as client:
        yield client
    asyncio.run(shared.shutdown())
    engine.check_integrity()


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(family="llama", tokenizer=True, chat_template=True)


@pytest.fixture(scope="module")
def judge(tiny_model):
    """Of another tokenizer."""
    return tiny_model(family="llama", head="reward", tokenizer=True, chat_template=True, tokenizer_seed=2, seed=7)


@pytest.fixture(scope="module")
def engine(model, judge) -> stars.Engine:
    return stars.Engine(model, stars.CausalReward(judge), **SMALL)


@pytest.fixture(scope="module")
def client(engine) -> Iterator[TestClient]:
    with client_of(engine) as client:
        yield client


@pytest.fixture(scope="module")
def words(model) -> Iterator[TestClient]:
    """Of a server whose reward is a function, which rejects some texts and cannot say of others."""
    def reward(prompt: Any, responses: list[str]) -> list[float]:
        return [{"no": -math.inf, "what": math.nan}.get(one, of_text(prompt, [one])[0]) for one in responses]

    with client_of(stars.Engine(model, stars.FunctionReward(reward), **SMALL)) as client:
        yield client


REPLIES = {"/score": ScoreReply, "/v1/score": ScoreReply, "/classify": ClassifyReply, "/pooling": PoolingReply,
           "/v1/calibrate": CalibrationReply}


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    """An answer, which is as the description says, and has nothing besides."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert REPLIES[path].model_validate(answer.json(), strict=True, extra="forbid")
    return answer.json()


def refused(client: TestClient, path: str, status: int, message: str, param: str | None, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and message in error["message"], answer.text
    assert not error["message"].endswith(".")
    return error


def raw(client: TestClient, path: str, **body: Any) -> list[float | None]:
    """The rewards of an answer, as they are."""
    return [item["score"] for item in post(client, path, use_activation=False, **body)["data"]]


def scored(client: TestClient, prompts: Any, responses: Any = None) -> list[float]:
    """What the engine says."""
    return asyncio.run(client.app.state.service.engine.score(prompts, responses))


# -- /score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_the_shape_of_an_answer(client, path):
    answer = post(client, path, model="tiny", text_1=PROMPTS[0], text_2=TEXTS)
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
    assert answer["object"] == "list" and answer["model"] == "tiny" and answer["id"].startswith("score-")
    assert [set(item) for item in answer["data"]] == [{"index", "object", "score"}] * 3
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert {item["object"] for item in answer["data"]} == {"score"}
    tokens = scored(client, PROMPTS[0], TEXTS).num_tokens
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == tokens > 0


def test_a_reward_or_its_probability(client):
    """vLLM gives the sigmoid of one logit unless it is told otherwise."""
    wanted = scored(client, PROMPTS[0], TEXTS)
    assert raw(client, "/score", text_1=PROMPTS[0], text_2=TEXTS) == pytest.approx(wanted, abs=TOLERANCE)
    for given in ({}, {"use_activation": True}, {"use_activation": None}):
        answer = post(client, "/score", text_1=PROMPTS[0], text_2=TEXTS, **given)
        assert [item["score"] for item in answer["data"]] == pytest.approx(
            [1 / (1 + math.exp(-one)) for one in wanted], abs=TOLERANCE)


@pytest.mark.parametrize("value, wanted", [(0.0, 0.5), (800.0, 1.0), (-800.0, 0.0), (-math.inf, 0.0),
                                           (2.0, 0.8807970779778823), (-2.0, 0.11920292202211755)])
def test_the_sigmoid_of_large_numbers(value, wanted):
    assert _sigmoid(value) == pytest.approx(wanted, abs=1e-15)


def test_one_for_all_or_one_for_each(client):
    own = client.app.state.service.engine.engine.tokenizer
    for first, second in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        assert raw(client, "/score", **{first: PROMPTS, second: TEXTS[:2]}) == pytest.approx(
            scored(client, PROMPTS, TEXTS[:2]), abs=TOLERANCE)
        assert raw(client, "/score", **{first: [PROMPTS[0]], second: TEXTS}) == pytest.approx(
            scored(client, PROMPTS[0], TEXTS), abs=TOLERANCE)
        assert raw(client, "/score", **{first: PROMPTS[0], second: TEXTS[0]}) == pytest.approx(
            scored(client, PROMPTS[0], TEXTS[0]), abs=TOLERANCE)
    ids = own.encode(PROMPTS[0])
    assert raw(client, "/score", text_1=ids, text_2=[[5, 6], [7]]) == pytest.approx(
        scored(client, {"prompt_token_ids": ids}, [[5, 6], [7]]), abs=TOLERANCE)


def test_conversations(client):
    """The last turn is what is scored."""
    messages = [*CHAT["messages"], {"role": "assistant", "content": TEXTS[0]}]
    other = [*CHAT["messages"], {"role": "assistant", "content": [{"type": "text", "text": TEXTS[1]}]}]
    wanted = scored(client, CHAT, TEXTS[:2])
    assert raw(client, "/score", messages=messages) == pytest.approx(wanted[:1], abs=TOLERANCE)
    assert raw(client, "/v1/score", messages=[messages, other]) == pytest.approx(wanted, abs=TOLERANCE)
    answer = post(client, "/classify", messages=other, use_activation=False)
    assert answer["data"][0]["probs"] == pytest.approx(wanted[1:], abs=TOLERANCE)
    turns = [[{"role": role, "content": "Be brief."}, *messages] for role in ("system", "developer")]
    named, theirs = raw(client, "/score", messages=turns)
    assert named == pytest.approx(theirs, abs=TOLERANCE) and named != pytest.approx(wanted[0], abs=TOLERANCE)
    image = [{"role": "user", "content": [{"type": "image_url"}]}, messages[-1]]
    refused(client, "/score", 400, "messages[0].content has a part of type 'image_url' that is no text", "messages",
            messages=image)


def test_a_reward_that_rejects_or_cannot_say(words):
    assert raw(words, "/score", text_1="x", text_2=["no", "a"]) == [None, of_text("x", ["a"])[0]]
    answer = post(words, "/score", text_1="x", text_2=["no", "a"])
    assert answer["data"][0]["score"] == 0.0
    refused(words, "/score", 400, "text_2[1]: the reward is NaN", "text_2", text_1="x", text_2=["a", "what"])
    assert answer["usage"]["prompt_tokens"] == 0  # a function has no tokens


@pytest.mark.parametrize("message, param, body", [
    ("the body has none of them: give text_1 and text_2, or messages", "text_1", {}),
    ("the body has text_1: give text_1 and text_2", "text_1", {"text_1": "a"}),
    ("the body has text_1 and documents: give text_1 and text_2", "text_1", {"text_1": "a", "documents": "b"}),
    ("text_2 is [], it must be a text", "text_2", {"text_1": "a", "text_2": []}),
    ("text_2[1] is 3, it must be a text or a list of token ids", "text_2", {"text_1": "a", "text_2": ["b", 3]}),
    ("text_2[0] is [True]", "text_2", {"text_1": "a", "text_2": [[True]]}),
    ("text_1 has 2 texts and text_2 3", "text_2", {"text_1": ["a"] * 2, "text_2": ["b"] * 3}),
    (f"text_2 has {MAX_PROMPTS + 1} texts, the most is {MAX_PROMPTS}", "text_2",
     {"text_1": "a", "text_2": ["b"] * (MAX_PROMPTS + 1)}),
    ("the prompt is empty", "text_2", {"text_1": "", "text_2": "b"}),
    ("token id 100000 of the response is outside", "text_2", {"text_1": "a", "text_2": [[5], [100000]]}),
    ("there is no parameter 'text1': did you mean text_1", "text1", {"text1": "a", "text_2": "b"}),
    ("truncate_prompt_tokens is 5, which is not implemented: send shorter texts", "truncate_prompt_tokens",
     {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 5}),
    ("the last of messages is of the role 'user'", "messages", {"messages": CHAT["messages"] * 2}),
    ("messages is ", "messages", {"messages": [{"role": "assistant", "content": "a"}]}),
    ("chat_template_kwargs belong to messages, and there is text_1", "chat_template_kwargs",
     {"text_1": "a", "text_2": "b", "chat_template_kwargs": {"x": 1}}),
    ("use_activation is 'no', it must be true or false", "use_activation",
     {"text_1": "a", "text_2": "b", "use_activation": "no"}),
])
def test_what_cannot_be_scored_is_said_by_name(client, message, param, body):
    refused(client, "/score", 400, message, param, **body)


def test_what_asks_for_nothing_is_taken(client):
    answer = post(client, "/score", text_1=PROMPTS[0], text_2=TEXTS[0], user="ann", request_id="7", priority=1,
                  truncate_prompt_tokens=None, mm_processor_kwargs={})
    assert len(answer["data"]) == 1


def test_models_by_name(client):
    assert post(client, "/score", model="tiny:plain", text_1="a", text_2="b")["model"] == "tiny:plain"
    error = refused(client, "/score", 404, "there is no model 'tiney' here", "model", model="tiney",
                    text_1="a", text_2="b")
    assert error["code"] == "model_not_found"


def test_a_text_that_is_too_long(client, engine):
    """In words that a RemoteReward knows."""
    limit = engine.reward.max_model_len
    error = refused(client, "/score", 400, f"more than the reward model's context length of {limit}", "text_2",
                    text_1=PROMPTS[0], text_2=[" a", " zq" * 2 * limit])
    assert error["code"] == "context_length_exceeded" and error["message"].startswith("text_2[1]: ")


def test_a_server_without_a_reward_says_what_to_do():
    with client_of(toy_engine(LM)) as plain:
        for path, body in (("/score", {"text_1": "a", "text_2": "b"}), ("/classify", {"input": "a"}),
                           ("/pooling", {"input": "a"}), ("/v1/calibrate", {"prompts": ["a"]})):
            error = refused(plain, path, 400, "no reward model: start one with --reward", None, **body)
            assert error["code"] == "no_reward"


def test_a_server_that_shuts_down_takes_nothing(engine, model):
    with client_of(toy_engine(LM, RM)) as closing:
        closing.app.state.service.draining = True
        for path, body in (("/v1/score", {"text_1": "a", "text_2": "b"}), ("/classify", {"input": "a"}),
                           ("/pooling", {"input": "a"}), ("/v1/calibrate", {"prompts": ["a"]})):
            assert closing.post(path, json=body).status_code == 503


def test_a_dead_engine_is_told_as_that(monkeypatch):
    engine = stars.AsyncEngine(toy_engine(LM, RM))
    monkeypatch.setattr(engine.engine, "_score_slice", lambda call: (_ for _ in ()).throw(SystemError("gone")))
    with TestClient(served(engine), raise_server_exceptions=False) as client:
        for _ in range(2):
            answer = client.post("/score", json={"text_1": [1, 2], "text_2": [[3]]})
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead"


def test_who_goes_away_has_nothing_scored_further():
    """Within a slice: the gate stops the third one, and there is no fourth."""
    gate, calls = threading.Event(), []

    def reward(prompt: Any, responses: list[Any]) -> list[float]:
        calls.append(len(responses))
        if len(calls) == 3:
            assert gate.wait(LIMIT)
        return [0.0] * len(responses)

    async def main() -> None:
        engine = stars.AsyncEngine(toy_engine(LM, stars.FunctionReward(reward, inputs="ids"), max_num_lanes=4))
        app = served(engine)
        body, sent, gone = json.dumps({"text_1": [1, 2], "text_2": [[3]] * 100}).encode(), [], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not sent:
                sent.append("body")
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/score", "raw_path": b"/score", "query_string": b"",
                 "headers": [(b"content-type", b"application/json")], "app": app, "http_version": "1.1",
                 "scheme": "http", "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2), "root_path": ""}
        task = asyncio.ensure_future(app(scope, receive, send))
        while len(calls) < 3:
            await asyncio.sleep(0.001)
        gone.set()
        await asyncio.wait_for(task, LIMIT)
        gate.set()
        assert sent[1]["status"] == 499
        assert await engine.score({"prompt_token_ids": [1]}, [[2]]) == [0.0]
        assert len(calls) == 4
        await engine.shutdown()
    asyncio.run(asyncio.wait_for(main(), LIMIT))


# -- /classify and /pooling -------------------------------------------------------------------------------------------


def test_texts_are_classified_whole(client):
    """By the reward model's own tokenizer, with its special tokens unless it is told otherwise."""
    texts = [PROMPTS[0] + text for text in TEXTS]
    wanted = scored(client, PROMPTS[0], TEXTS)
    answer = post(client, "/classify", model="tiny", input=texts, use_activation=False)
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"} and answer["object"] == "list"
    assert [item["probs"] for item in answer["data"]] == [pytest.approx([one], abs=TOLERANCE) for one in wanted]
    assert [(item["index"], item["label"], item["num_classes"]) for item in answer["data"]] == [
        (index, "LABEL_0", 1) for index in range(3)]
    [item] = post(client, "/classify", input=texts[0])["data"]
    assert item["probs"] == pytest.approx([1 / (1 + math.exp(-wanted[0]))], abs=TOLERANCE)
    [bare] = post(client, "/classify", input=texts[0], add_special_tokens=False, use_activation=False)["data"]
    assert abs(bare["probs"][0] - wanted[0]) > 1e-3  # no BOS
    with_bos = "<s>" + texts[0] if client.app.state.service.engine.engine.tokenizer.bos_token == "<s>" else None
    if with_bos is not None:
        [same] = post(client, "/classify", input=with_bos, add_special_tokens=False, use_activation=False)["data"]
        assert same["probs"] == pytest.approx(wanted[:1], abs=TOLERANCE)
    ids = client.app.state.service.engine.engine.tokenizer.encode(texts[0])
    [by_ids] = post(client, "/classify", input=ids, use_activation=False)["data"]
    assert by_ids["probs"] == pytest.approx(wanted[:1], abs=TOLERANCE)


def test_texts_are_pooled(client):
    texts = [PROMPTS[0] + text for text in TEXTS]
    wanted = scored(client, PROMPTS[0], TEXTS)

    def data(**more: Any) -> list[Any]:
        answer = post(client, "/pooling", input=texts, use_activation=False, **more)
        assert [(item["index"], item["object"]) for item in answer["data"]] == [(n, "pooling") for n in range(3)]
        return [item["data"] for item in answer["data"]]

    assert data() == data(task="classify") == [pytest.approx([one], abs=TOLERANCE) for one in wanted]
    assert [rows[-1] for rows in data(task="token_classify")] == data()
    packed = [struct.unpack("<f", base64.b64decode(one))[0] for one in data(encoding_format="base64")]
    assert packed == pytest.approx(wanted, abs=TOLERANCE)


def test_a_probability_is_not_made_one_again(model, tiny_model):
    """A head of two labels gives one already."""
    two = tiny_model(family="llama", head="reward", tokenizer=True, chat_template=True, labels=2)
    with client_of(stars.Engine(model, stars.CausalReward(two, head={"rows": [0, 1]}), **SMALL)) as client:
        wanted = scored(client, PROMPTS[0], TEXTS)
        assert all(0.0 < one < 1.0 for one in wanted)
        assert [item["score"] for item in post(client, "/score", text_1=PROMPTS[0], text_2=TEXTS)["data"]] == wanted


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
@pytest.mark.parametrize("message, param, body", [
    ("the body must have input or messages", "input", {}),
    ("the body must have input or messages", "input", {"input": "a", "messages": CHAT["messages"] * 2}),
    ("input is {}", "input", {"input": {}}),
    ("the prompt is empty", "input", {"input": ""}),
    ("input[1]: the prompt is empty", "input", {"input": ["a", ""]}),
    ("the last of messages is of the role 'user'", "messages", {"messages": CHAT["messages"] * 2}),
    ("add_special_tokens is true, and a chat template has them", "add_special_tokens",
     {"messages": [*CHAT["messages"], {"role": "assistant", "content": "a"}], "add_special_tokens": True}),
    ("add_generation_prompt is True, which is not implemented", "add_generation_prompt",
     {"input": "a", "add_generation_prompt": True}),
    ("there is no parameter 'inputs': did you mean input", "inputs", {"inputs": "a"}),
])
def test_what_cannot_be_classified_is_said_by_name(client, path, message, param, body):
    refused(client, path, 400, message, param, **body)


def test_dimensions_of_a_reward(client):
    refused(client, "/pooling", 400, "dimensions is 5, which is not implemented: there is one number", "dimensions",
            input="a", dimensions=5)
    refused(client, "/pooling", 400, "task is 'embed', it must be", "task", input="a", task="embed")


def test_who_reads_responses_alone_says_how_to_send_them(model, tiny_model):
    reward = stars.ImplicitReward(tiny_model(family="llama", tokenizer=True, chat_template=True, seed=5), model)
    with client_of(stars.Engine(model, reward, **SMALL)) as client:
        refused(client, "/classify", 400, "give prompts and responses apart, or messages", "input", input=["a", "b"])
        assert len(raw(client, "/score", text_1=PROMPTS[0], text_2=TEXTS)) == 3


# -- a server as the reward of another engine -------------------------------------------------------------------------


@contextlib.contextmanager
def listening(engine: stars.Engine) -> Iterator[str]:
    """The address of a server over `engine`, on a socket."""
    shared = stars.AsyncEngine(engine)
    with running_server(Service(shared, ServerSettings(model="tiny"))) as server:
        yield server.url
    asyncio.run(shared.shutdown())


def decided(engine: stars.Engine, asked: Any) -> list[Any]:
    """Tokens and the rewards of all attempts up to those that were accepted."""
    policy = stars.STARS(segment_size=6, max_attempts=4, beta=0.5, reward_threshold=1.0)
    params = [stars.SamplingParams(max_tokens=24, seed=seed) for seed in range(3)]
    outputs = engine.generate([asked] * 3, params, policy, use_tqdm=False)
    return [(completion.token_ids, completion.finish_reason,
             [attempt.reward for segment in completion.segments for attempt in segment.attempts[: segment.winner + 1]])
            for output in outputs for completion in output.outputs]


def same(got: list[Any], wanted: list[Any]) -> None:
    for (ids, reason, rewards), (own_ids, own_reason, own_rewards) in zip(got, wanted, strict=True):
        assert (ids, reason) == (own_ids, own_reason) and len(rewards) >= 4
        assert rewards == pytest.approx(own_rewards, abs=1e-3)


@pytest.mark.parametrize("api", ["classify", "pooling"])
@pytest.mark.parametrize("asked", [PROMPTS[0], CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("template", ["auto", "raw"])
def test_a_remote_reward_is_that_of_the_process(engine, model, judge, api, asked, template):
    """The same texts, the same rewards of every attempt, accepted or not: as one text, or as messages. What runs here
    reads the response's text as the server does."""
    local = engine if template == "auto" else stars.Engine(model, stars.CausalReward(judge, template="raw"), **SMALL)
    with listening(stars.Engine(model, stars.CausalReward(judge), **SMALL)) as address:
        remote = stars.RemoteReward(address, model="tiny", api=api, template=template)
        far = stars.Engine(model, remote, **SMALL)
        same(decided(far, asked), decided(local, asked))


def test_a_remote_callable_is_that_of_the_process(model):
    """As messages, which tell prompt and response apart."""
    def reward(prompt: Any, responses: list[str]) -> list[float]:
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return of_text(last, [response.rstrip("\ufffd") for response in responses])  # which no server is sent

    with listening(stars.Engine(model, stars.FunctionReward(reward), **SMALL)) as address:
        far = stars.Engine(model, stars.RemoteReward(address, template="chat"), **SMALL)
        same(decided(far, PROMPTS[0]), decided(stars.Engine(model, stars.FunctionReward(reward), **SMALL), PROMPTS[0]))


def test_one_bad_text_of_a_batch_fails_alone(model):
    """The server refuses the batch by a status after which each is asked for by itself."""
    def reward(prompt: Any, responses: list[str]) -> list[float]:
        return [math.nan if "q" in one else 1.0 for one in responses]

    with listening(stars.Engine(model, stars.FunctionReward(reward), **SMALL)) as address:
        far = stars.Engine(model, stars.RemoteReward(address, retries=0), **SMALL)
        assert far.score("x", [" a", " b"]) == [1.0, 1.0]
        with pytest.raises(stars.RewardError, match=r"responses\[1\]: .*status 400: .*the reward is NaN"):
            far.score("x", [" a", " q", " b"])


def test_a_text_that_outgrows_the_servers_context_ends_its_response(engine, model, judge):
    """With finish_reason "length", as with a reward in the process."""
    with listening(stars.Engine(model, stars.CausalReward(judge), **SMALL)) as address:
        limit = engine.reward.max_model_len
        start = {"prompt": " zq" * (limit // 4)}
        far = stars.Engine(model, stars.RemoteReward(address), **SMALL)
        tokens = 128 - len(far.tokenizer.encode(start["prompt"])) - 1
        params = stars.SamplingParams(max_tokens=tokens, seed=2, ignore_eos=True)
        policy = stars.STARS(segment_size=6, max_attempts=2, beta=1e6, reward_threshold=0.0)
        [output] = far.generate(start, params, policy, use_tqdm=False)
        completion = output.outputs[0]
        assert completion.finish_reason == "length" and completion.error is None


# -- /v1/calibrate ----------------------------------------------------------------------------------------------------


def test_a_calibration_is_what_the_engine_would_measure(client, engine, tmp_path):
    """By the same seed, and its record is a file that `--calibration` takes."""
    record = post(client, "/v1/calibrate", prompts=PROMPTS, quantile=0.75, num_samples=5, segment_size=4, max_tokens=12,
                  seed=3, temperature=0.9)
    params = stars.SamplingParams(max_tokens=12, seed=3, temperature=0.9)
    wanted = engine.calibrate(PROMPTS, params, quantile=0.75, num_samples=5, segment_size=4)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(record))
    found = stars.Calibration.load(str(path))
    assert float(found) == pytest.approx(float(wanted), abs=TOLERANCE) and found.quantile == 0.75
    assert (found.samples, found.prompts) == (10, 2) and found.spread == pytest.approx(wanted.spread, abs=TOLERANCE)
    assert found.correlations.keys() == wanted.correlations.keys() == {4, 8}
    ServerSettings(model="tiny", calibration=found)


def test_prompts_of_every_kind(client):
    own = client.app.state.service.engine.engine.tokenizer
    prompts = [PROMPTS[0], own.encode(PROMPTS[1]), CHAT]
    record = post(client, "/v1/calibrate", prompts=prompts, num_samples=2, max_tokens=4)
    assert record["prompts"] == 3 and record["samples"] == 6 and record["quantile"] == 0.9
    assert record["format"] == "stars-calibration" and "warning" in record


@pytest.mark.parametrize("message, param, body", [
    ("prompts is missing", "prompts", {}),
    ("prompts is []", "prompts", {"prompts": []}),
    ("prompts[1] is 3, it must be a text", "prompts", {"prompts": ["a", 3]}),
    ("prompts[1]: the prompt is empty", "prompts", {"prompts": ["a", ""]}),
    ("quantile is 2, it must be", "quantile", {"prompts": ["a"], "quantile": 2}),
    ("num_samples is 257", "num_samples", {"prompts": ["a"], "num_samples": 257}),
    ("256 samples of 17 prompts are 4352, the most is 4096", "num_samples",
     {"prompts": ["a"] * 17, "num_samples": 256}),
    ("a segment may have 999 tokens", "segment_size", {"prompts": ["a"], "segment_size": 999}),
    ("there is no parameter 'samples': did you mean num_samples", "samples", {"prompts": ["a"], "samples": 3}),
    ("max_tokens", "max_tokens", {"prompts": ["a"], "max_tokens": 100000}),
    ("min_tokens is 9", "min_tokens", {"prompts": ["a"], "min_tokens": 9, "max_tokens": 3}),
    ("temperature is -1", "temperature", {"prompts": ["a"], "temperature": -1}),
])
def test_what_cannot_be_calibrated_is_said_by_name(client, message, param, body):
    answer = client.post("/v1/calibrate", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"], answer.text
    assert param is None or error["param"] == param
    refused(client, "/v1/calibrate", 404, "there is no model 'x'", "model", prompts=["a"], model="x")


def test_calibrations_are_few_at_once_and_end_with_their_clients():
    """A third one is told to come back; those whose client goes away have their requests aborted, and make place."""
    gate = threading.Event()

    def reward(prompt: Any, responses: list[Any]) -> list[float]:
        assert gate.wait(LIMIT)
        return [float(len(one)) for one in responses]

    async def main() -> None:
        slow = stars.FunctionReward(reward, inputs="ids", blocking=True)
        engine = stars.AsyncEngine(toy_engine(LM, slow))
        app = served(engine)
        body = {"prompts": [prompt(9, seed)["prompt_token_ids"] for seed in range(6)], "num_samples": 2}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            tasks = [asyncio.ensure_future(client.post("/v1/calibrate", json=body)) for _ in range(2)]
            while len(engine.engine._requests) < 8:
                await asyncio.sleep(0.001)
            third = await client.post("/v1/calibrate", json=body)
            assert third.status_code == 429 and third.headers["Retry-After"] == "10"
            assert third.json()["error"]["code"] == "calibrating"
            tasks[0].cancel()
            await asyncio.wait([tasks[0]])
            while len(engine.engine._requests) > 4:
                await asyncio.sleep(0.001)
            gate.set()
            record = (await tasks[1]).json()
            assert record["samples"] == 12 and record["reward_threshold"] > 0
            assert (await client.post("/v1/calibrate", json=body)).status_code == 200
        assert not engine.engine._requests
        await engine.shutdown()
    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_a_calibration_stands_behind_nobody_it_need_not():
    """Its samples are a user's of their own: a chat beside it gets its rounds, and few of its prompts run at once."""
    async def main() -> None:
        engine = stars.AsyncEngine(toy_engine(LM, RM, max_num_seqs=64))
        app = served(engine)
        body = {"prompts": [prompt(9, seed)["prompt_token_ids"] for seed in range(40)], "num_samples": 16,
                "max_tokens": 40, "ignore_eos": True, "seed": 1}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            task = asyncio.ensure_future(client.post("/v1/calibrate", json=body))
            while not engine.engine._requests:
                await asyncio.sleep(0.001)
            chat = await engine.add(prompt(), stars.SamplingParams(max_tokens=20, ignore_eos=True), stars.Sample(),
                                    user="ann")
            users = [request.user for request in list(engine.engine._requests.values())]
            assert len(users) <= 5 and len(set(users)) == 2
            async for _ in chat:
                assert len(engine.engine._requests) <= 5
            assert not task.done()
            assert (await task).status_code == 200
        await engine.shutdown()
    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_samples_that_all_are_rejected_make_no_threshold(model):
    with client_of(stars.Engine(model, stars.FunctionReward(lambda p, r: [-math.inf] * len(r)), **SMALL)) as client:
        refused(client, "/v1/calibrate", 400, "too many samples have the reward -inf", "prompts", prompts=["a"],
                segment_size=DRAFT_SIZE)


def test_a_sample_without_a_reward_is_the_server_s_fault(words, model):
    with client_of(stars.Engine(model, stars.FunctionReward(lambda p, r: [math.nan] * len(r)), **SMALL)) as client:
        refused(client, "/v1/calibrate", 500, "a sample of prompts[0] has no reward: the reward is NaN", None,
                prompts=["a"])
