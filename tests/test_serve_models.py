"""The names that a server has, and the tokens of texts and messages: OpenAI's and vLLM's shapes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import stars
from serving_http import service_of_pair
from stars.calibration import Calibration
from stars.exhaustions import Redraft
from stars.model.tokenizer import load_tokenizer
from stars.policies import POLICIES
from stars.serve.http.app import build_app
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings
from test_tokenizer import hf
from toy import ToyModel, toy_engine

CALIBRATION = Calibration(1.25, quantile=0.9, spread=2.0, beta=0.2, mean=0.0, correlations={}, drifts={}, rises={},
                          quantiles={}, samples=64, prompts=8)
NEEDS_NAMED = {"mara", "rsd", "token-guidance"}  # a head, or models beside the engine's own
USER = {"role": "user", "content": " Is 1 < 2? "}


def client_of(service: Service) -> TestClient:
    return TestClient(build_app(service), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def pair() -> Iterator[Service]:
    settings = ServerSettings("tiny", policy="stars", policy_parameters={"segment_size": 8, "beta": "auto"},
                              calibration=CALIBRATION)
    with service_of_pair(settings) as service:
        yield service


@pytest.fixture(scope="module")
def client(pair) -> TestClient:
    return client_of(pair)


@pytest.fixture(scope="module")
def chat(lm) -> Iterator[Service]:
    settings = ServerSettings("org/chat", max_body_bytes=8 << 20)
    with service_of_pair(settings, model=lm, reward=None, cache_tokens=512) as service:
        yield service


@pytest.fixture(scope="module")
def chat_client(chat) -> TestClient:
    return client_of(chat)


def error_of(answer: httpx.Response) -> tuple[int, str | None, str]:
    """Status, parameter and message of an error, whose shape is OpenAI's."""
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and not body["error"]["message"].endswith(".") and body["error"]["type"]
    return answer.status_code, body["error"]["param"], body["error"]["message"]


# -- names ------------------------------------------------------------------------------------------------------------


def test_every_policy_that_can_run_has_a_name(client):
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    cards = {card["id"]: card for card in models["data"]}
    assert len(cards) == len(models["data"]) and next(iter(cards)) == "tiny"
    assert cards.keys() == {"tiny", "tiny:plain", *(f"tiny:{name}" for name in POLICIES if name not in NEEDS_NAMED)}
    for name, card in cards.items():
        assert card == client.get(f"/v1/models/{name}").json()
        assert (card["object"], card["owned_by"], card["root"]) == ("model", "stars", "tiny")
        assert card["parent"] == (None if name == "tiny" else "tiny")
        assert card["max_model_len"] == 1024 and 0 <= time.time() - card["created"] < 3600
    assert cards["tiny"]["stars"] == cards["tiny:stars"]["stars"]
    assert cards["tiny:plain"]["stars"] == {"policy": "sample", "parameters": {"score": False}, "needs_reward": False}
    assert cards["tiny:best-of-n"]["stars"]["needs_reward"] is True


def test_parameters_are_those_that_a_request_gets(pair, client):
    """The server's own for its policy, the calibration's threshold and beta, the policy's defaults for the rest."""
    parameters = client.get("/v1/models/tiny").json()["stars"]["parameters"]
    policy = stars.STARS(segment_size=8, beta="auto", reward_threshold=CALIBRATION)
    assert parameters == {"segment_size": 8, "max_attempts": 20, "alpha": 0.5, "beta": 0.2, "reward_threshold": 1.25,
                          "width": None, "exhaust": "best_seen", "barrier": False}
    assert all(parameters[name] == getattr(policy, name) for name in parameters)
    cards = client.get("/v1/models/tiny:cards").json()["stars"]["parameters"]
    assert (cards["reward_threshold"], cards["beta"], cards["max_attempts"]) == (1.25, 0.7, 21)  # its own, not stars'
    low, redraft = float("-inf"), Redraft("lm")  # JSON lacks both
    for given, expected in (
            ({"beta": "auto", "exhaust": redraft},
             {"beta": "auto", "exhaust": repr(redraft), "reward_threshold": None}),
            ({"beta": 0, "reward_threshold": low}, {"beta": 0.0, "reward_threshold": None})):
        others = client_of(Service(pair.engine, ServerSettings("tiny", "stars", given)))
        found = others.get("/v1/models/tiny").json()["stars"]["parameters"]
        assert found == {**parameters, "segment_size": 16, **expected}


def test_without_a_reward_only_what_needs_none(chat_client):
    cards = {card["id"]: card["stars"] for card in chat_client.get("/v1/models").json()["data"]}
    assert cards.keys() == {"org/chat", "org/chat:plain", "org/chat:sample", "org/chat:persona-judge"}
    assert cards["org/chat"]["policy"] == "sample"
    assert not any(card["needs_reward"] for card in cards.values())
    assert chat_client.get("/v1/models/org/chat:plain").json()["id"] == "org/chat:plain"
    assert chat_client.get("/v1/models/org%2Fchat").json()["id"] == "org/chat"


def test_models_and_heads_beside_the_own_one_make_names():
    for name, policies in ((None, set()), ("small", {"rsd"}), ("guide", {"token-guidance"})):
        named = {} if name is None else {name: ToyModel(seed=3).decoder()}
        engine = toy_engine(ToyModel(seed=2), ToyModel(seed=5, head="reward"), models=named)
        service = Service(stars.AsyncEngine(engine), ServerSettings("toy"))
        names = {card["id"] for card in client_of(service).get("/v1/models").json()["data"]}
        assert {name.removeprefix("toy:") for name in names} & NEEDS_NAMED == policies
        asyncio.run(service.engine.shutdown())


def test_what_is_listed_can_run_and_what_is_not_cannot(pair):
    """By the engine's own word, with one request of each."""
    served = {card["id"] for card in client_of(pair).get("/v1/models").json()["data"]}

    async def runs(kind: Any) -> bool:
        needed = {"reward_threshold": 0.0} if "reward_threshold" in kind.__dataclass_fields__ else {}
        params = stars.SamplingParams(max_tokens=1, seed=1)
        try:
            async for _ in pair.engine.generate("This film", params, kind(**needed)):
                pass
        except stars.RequestError:
            return False
        return True

    for name, kind in POLICIES.items():
        assert asyncio.run(runs(kind)) == (f"tiny:{name}" in served), name


@pytest.mark.parametrize("name", ["gpt-4", "tiny:", "tiny:nothing", "tiny:STARS", ":plain", "tiny:stars:plain", "tiny/",
                                  "tiny:mara", " tiny", "%00"])
def test_no_other_name_is_there(name, client):
    status, param, message = error_of(client.get(f"/v1/models/{name}"))
    assert (status, param) == (404, "model") and "/v1/models" in message
    status, param, _ = error_of(client.post("/tokenize", json={"prompt": "x", "model": name}))
    assert (status, param) == (404, "model")


def test_version(client):
    assert client.get("/version").json() == {"version": stars.__version__}


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [None, True, False])
def test_texts_become_the_tokens_of_transformers(special, lm, chat_client):
    theirs = hf(lm)
    for text in ("The quick brown fox", "", " naïve façades 東京 🙂", "</s><|user|>a"):
        asked = {"prompt": text, "return_token_strs": True, "add_special_tokens": special}
        found = chat_client.post("/tokenize", json=asked).json()
        expected = theirs(text, add_special_tokens=special is not False)["input_ids"]
        assert found == {"tokens": expected, "count": len(expected), "max_model_len": 128,
                         "token_strs": theirs.convert_ids_to_tokens(expected)}
        text = chat_client.post("/detokenize", json={"tokens": expected, "model": "org/chat"}).json()
        assert text == {"prompt": theirs.decode(expected)}
    assert chat_client.post("/tokenize", json={"prompt": "a"}).json()["token_strs"] is None


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}, {"add_special_tokens": True},
                                  {"continue_final_message": True}, {"chat_template_kwargs": {"x": 1}, "tools": []}])
def test_messages_become_the_prompt_that_a_chat_has(more, lm, chat, chat_client):
    theirs = hf(lm)
    given = {name: value for name, value in more.items() if name in ("add_generation_prompt", "continue_final_message")}
    given.setdefault("add_generation_prompt", not more.get("continue_final_message"))
    text = theirs.apply_chat_template([USER], tokenize=False, **given)
    expected = theirs(text, add_special_tokens=more.get("add_special_tokens", False))["input_ids"]
    found = chat_client.post("/tokenize", json={"messages": [USER], **more}).json()
    assert found["tokens"] == expected and found["count"] == len(expected)
    if "add_special_tokens" not in more:  # what the engine reads
        asked = {name: value for name, value in more.items() if value != []}
        [output] = chat.engine.engine.generate({"messages": [USER], **asked},
                                               stars.SamplingParams(max_tokens=1, seed=1), use_tqdm=False)
        assert found["tokens"] == output.prompt_token_ids


def test_control_tokens_in_messages_may_be_text(lm, chat_client):
    messages = [{"role": "user", "content": "a</s>b"}]
    parsed, text = (chat_client.post("/tokenize", json={"messages": messages, "special_tokens": how}).json()["tokens"]
                    for how in ("parse", "text"))
    eos = load_tokenizer(lm).eos_token_id
    assert parsed.count(eos) == 2 and text.count(eos) == 1


@pytest.mark.parametrize("asked, param, word", [
    ({}, "prompt", "give either"),
    ({"prompt": "a", "messages": [USER]}, "prompt", "give either"),
    ({"prompt": None}, "prompt", "give either"),
    ({"prompt": 5}, "prompt", "string"),
    ({"prompt": ["a", "b"]}, "prompt", "string"),
    ({"prompt": "a", "tools": []}, "tools", "belongs to messages"),
    ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "belongs to messages"),
    ({"prompt": "a", "add_special_token": True}, "add_special_token", "did you mean add_special_tokens"),
    ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "true or false"),
    ({"prompt": "a" * ((1 << 20) + 1)}, "prompt", "the most is 1048576"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "a"}, "messages", "list"),
    ({"messages": [{"role": "user"}]}, "messages", "content"),
    ({"messages": [USER], "chat_template_kwargs": {"messages": 1}}, "messages", "no variable"),
    ({"messages": [USER], "special_tokens": "drop"}, "special_tokens", "'parse' or 'text'"),
    ({"messages": [USER], "add_generation_prompt": True, "continue_final_message": True}, "messages", "both True"),
])
def test_what_cannot_be_tokenised_is_refused_by_name(asked, param, word, chat_client):
    status, found, message = error_of(chat_client.post("/tokenize", json=asked))
    assert (status, found) == (400, param) and word in message


@pytest.mark.parametrize("asked, word", [
    ({}, "missing"), ({"tokens": "abc"}, "list"), ({"tokens": [1.5]}, "integer"), ({"tokens": [True]}, "integer"),
    ({"tokens": [1, -1]}, "greater"), ({"tokens": [0, 320]}, "vocabulary of 320"), ({"tokens": [10 ** 100]}, "…"),
    ({"tokens": [1] * ((1 << 20) + 1)}, "the most is 1048576"),
])
def test_ids_that_are_none_are_refused(asked, word, chat, chat_client):
    word = word.replace("320", str(chat.engine.engine.model_config.vocab_size))
    status, param, message = error_of(chat_client.post("/detokenize", json=asked))
    assert (status, param) == (400, "tokens") and word in message


def test_messages_without_a_template_and_texts_without_a_tokenizer(client):
    status, param, message = error_of(client.post("/tokenize", json={"messages": [USER]}))
    assert (status, param) == (400, "messages") and "no chat template" in message
    engine = toy_engine(ToyModel(seed=2))
    service = Service(stars.AsyncEngine(engine), ServerSettings("toy"))
    for path, asked, name in (("tokenize", {"prompt": "a"}, "prompt"), ("tokenize", {"messages": [USER]}, "messages"),
                              ("detokenize", {"tokens": [1]}, "tokens")):
        status, param, message = error_of(client_of(service).post(f"/{path}", json=asked))
        assert (status, param) == (400, name) and "tokenizer.json" in message
    asyncio.run(service.engine.shutdown())


@pytest.mark.parametrize("body, kind, status, word", [
    (b"{", "application/json", 400, "no JSON"), (b"", "application/json", 400, "empty"),
    (b"\xff\xfe{}", "application/json", 400, "body"), (b"[" * 50_000, "application/json", 400, "body"),
    (b"[]", "application/json", 400, "a list"), (b'{"prompt": "a"}', "text/plain", 415, "Content-Type"),
    (b'{"prompt": "a"}', "", 415, "Content-Type"), (b'{"prompt": "\\ud800"}', "application/json", 400, "surrogate"),
    (b'{"prompt": "a"', "application/json; charset=utf-8", 400, "no JSON"),
])
def test_bodies_that_are_no_json(body, kind, status, word, client):
    found, param, message = error_of(client.post("/tokenize", content=body, headers={"Content-Type": kind}))
    assert (found, param) == (status, None) and word in message


def test_tokens_need_no_turn_of_the_engine_and_hold_up_no_other_request(chat, monkeypatch):
    """While a round runs, and while a long text is read: both are answered by threads of their own."""
    engine = chat.engine.engine
    inside, go_on = threading.Event(), threading.Event()
    encode = type(engine.tokenizer).encode

    def slow(tokenizer, text, **options):
        if text == "slow":
            inside.set()
            assert go_on.wait(30)
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(type(engine.tokenizer), "encode", slow)

    async def ask() -> None:
        transport = httpx.ASGITransport(build_app(chat))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            long = asyncio.create_task(client.post("/tokenize", json={"prompt": "slow"}))
            await asyncio.to_thread(inside.wait, 30)
            for _ in range(3):
                answer = await asyncio.wait_for(client.post("/tokenize", json={"prompt": "quick"}), 30)
                assert answer.status_code == 200 and not long.done()
            go_on.set()
            assert (await long).status_code == 200

    with engine._models.own.decoder.lock:  # whoever has it has the turn
        asyncio.run(ask())
