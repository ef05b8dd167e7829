"""Clients that others have written, over sockets: the openai package, langchain-openai, curl and what `vllm bench
serve` sends get what the engine itself says, and whoever goes away takes nothing with it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import aiohttp
import openai
import pytest
from pydantic import BaseModel

import stars
from serving_http import SECONDS, Running, chat_pair, running_server, service_of_pair, wait_until
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = "This film was"
MESSAGES = [{"role": "user", "content": "Say what the film was like."}]
GUIDED = {"policy": "stars", "reward_threshold": 0.5, "beta": 0.5, "segment_size": 4, "max_attempts": 4}
POLICY = stars.STARS(segment_size=4, beta=0.5, reward_threshold=0.5, max_attempts=4)
PACE = 0.01
"""Seconds of a round, at least: a response of hundreds of tokens takes long beside what a client does."""
NOTICED = 0.4
"""Seconds in which a server has long noticed that a client is gone."""


class Gate:
    """A reward that slows rounds down, stops them while it is shut, and counts them."""

    def __init__(self) -> None:
        self.calls = 0
        self.inside, self._open = threading.Event(), threading.Event()
        self._open.set()
        self.error: Exception | None = None

    def __call__(self, prompt: Any, responses: list[str]) -> list[float]:
        self.calls += 1
        time.sleep(PACE)
        if not self._open.is_set():
            self.inside.set()
            assert self._open.wait(SECONDS), "nobody opened the gate"
        if self.error is not None:
            raise self.error
        return [0.0] * len(responses)

    def shut(self) -> None:
        """The next round stops, in which `inside` is set."""
        self.inside.clear()
        self._open.clear()

    def wait(self) -> int:
        """Until a round has stopped: the calls so far."""
        assert self.inside.wait(SECONDS), "no round comes to the gate"
        return self.calls

    def open(self) -> None:
        """Rounds go on."""
        self._open.set()


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory) -> dict[str, Any]:
    """The shipped pair, with a chat template."""
    return chat_pair(tmp_path_factory.mktemp("chat") / "lm")


@pytest.fixture(scope="module")
def server(chat_models) -> Iterator[Running]:
    settings = ServerSettings("tiny", policy_parameters={name: GUIDED[name] for name in GUIDED if name != "policy"})
    with service_of_pair(settings, **chat_models) as service, running_server(service) as running:
        yield running


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def gated_server(chat_models, gate) -> Iterator[Running]:
    """One whose rounds can be stopped, with room for one request and a line of one."""
    settings = ServerSettings("tiny", policy_parameters={"reward_threshold": 1.0, "segment_size": 4, "max_attempts": 2})
    with service_of_pair(settings, max_waiting=1, model=chat_models["model"], reward=gate, max_num_seqs=1) as service:
        with running_server(service) as running:
            yield running


@pytest.fixture
def gated(gated_server, gate) -> Iterator[Running]:
    """The same, of which a test leaves nothing for the next one."""
    yield gated_server
    gate.open()
    wait_until(lambda: not gated_server.held)


def client_of(running: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{running.url}/v1", "api_key": "none", "max_retries": 0, "timeout": SECONDS,
                            **options})


def async_client_of(running: Running, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(**{"base_url": f"{running.url}/v1", "api_key": "none", "max_retries": 0,
                                 "timeout": SECONDS, **options})


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def expected(running: Running, prompt: Any, policy: Any = POLICY, **params: Any) -> stars.RequestOutput:
    """What the engine itself says."""
    [output] = running.engine.generate(prompt, stars.SamplingParams(**params), policy, use_tqdm=False)
    return output


# -- openai: completions ----------------------------------------------------------------------------------------------


def test_completions_are_the_engines(client, server):
    output = expected(server, PROMPT, max_tokens=24, seed=7, n=2, logprobs=3)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=7, n=2, logprobs=3)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, completion in zip(answer.choices, output.outputs, strict=True):
        assert choice.text == completion.text and choice.finish_reason in ("stop", "length")
        logprobs = choice.logprobs
        assert logprobs.token_logprobs == pytest.approx(
            [found[token].logprob for token, found in zip(completion.token_ids, completion.logprobs, strict=True)])
        assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
        assert all(len(top) in (3, 4) for top in logprobs.top_logprobs)
        told = choice.model_extra["stars"]
        assert told["reward"] == pytest.approx(completion.reward, abs=1e-5)
        assert told["finish_reason"] == completion.finish_reason and 0 < told["accept_rate"] <= 1
        assert told["attempts"] >= len(completion.segments) and told["width"] >= 1
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)
    assert answer.usage.completion_tokens == sum(len(completion.token_ids) for completion in output.outputs)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    told = answer.model_extra["stars"]
    assert told["policy"] == {"name": "stars", **{name: getattr(POLICY, name) for name in GUIDED if name != "policy"},
                              **{name: told["policy"][name] for name in ("alpha", "width", "exhaust", "barrier")}}
    assert told["seed"] == 7 and isinstance(told["prompt_reward"], float)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_has_the_same_text_an_event_a_segment_and_usage_last(n, client, server):
    output = expected(server, PROMPT, max_tokens=24, seed=3, n=n)
    with client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=3, n=n, stream=True,
                                   stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last = chunks
    assert last.choices == [] and all(chunk.usage is None for chunk in parts)
    assert last.usage.completion_tokens == sum(len(completion.token_ids) for completion in output.outputs)
    assert last.model_extra["stars"]["seed"] == 3
    for index, completion in enumerate(output.outputs):
        own = [choice for chunk in parts for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == completion.text
        *running, final = own
        assert all(choice.finish_reason is None for choice in running) and final.finish_reason == "length"
        assert 2 <= len(own) <= len(completion.segments) + 1  # those that come while one is sent are one event
        assert final.model_extra["stars"]["reward"] == pytest.approx(completion.reward, abs=1e-5)


def test_a_stop_string_across_segments_is_never_shown(client, server):
    output = expected(server, PROMPT, max_tokens=32, seed=5)
    completion = output.outputs[0]
    texts = [server.engine.tokenizer.decode(list(segment.token_ids)) for segment in completion.segments]
    stop = texts[1][-3:] + texts[2][:3]
    where = completion.text.index(stop)
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=32, seed=5, stop=[stop, "@@@"])
    assert plain.choices[0].text == completion.text[:where] and plain.choices[0].finish_reason == "stop"
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=32, seed=5, stop=stop, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.text for choice in choices) == completion.text[:where]
    assert choices[-1].finish_reason == "stop" and len(choices) >= 2


def test_segments_with_their_rejected_candidates(client, server):
    extra = {"stars": {**GUIDED, "reward_threshold": 2.0, "beta": 0.0, "return_segments": True}}
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=1, extra_body=extra)
    policy = stars.STARS(segment_size=4, beta=0.0, reward_threshold=2.0, max_attempts=4)
    output = expected(server, PROMPT, policy, max_tokens=12, seed=1)
    segments = answer.choices[0].model_extra["stars"]["segments"]
    assert len(segments) == len(output.outputs[0].segments)
    assert "".join(segment["text"] for segment in segments) == output.outputs[0].text == answer.choices[0].text
    for segment, own in zip(segments, output.outputs[0].segments, strict=True):
        assert segment["reward"] == pytest.approx(own.reward, abs=1e-5) and segment["accepted"] == own.accepted
        assert len(segment["attempts"]) == len(own.attempts)
        assert segment["attempts"][segment["winner"]]["text"] == segment["text"]
    assert any(len(segment["attempts"]) > 1 for segment in segments)
    streamed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=1, extra_body=extra,
                                         stream=True)
    seen = [segment for chunk in streamed for segment in (chunk.choices[0].model_extra["stars"].get("segments") or [])]
    assert [segment["attempts"] for segment in seen] == [segment["attempts"] for segment in segments]


def test_plain_samples_by_name_and_prompts_of_all_four_kinds(client, server):
    tokens = expected(server, PROMPT, None, max_tokens=1, seed=1).prompt_token_ids
    plain = expected(server, PROMPT, None, max_tokens=12, seed=9).outputs[0].text
    for prompt in (PROMPT, [PROMPT], tokens, [tokens]):
        answer = client.completions.create(model="tiny:plain", prompt=prompt, max_tokens=12, seed=9)
        assert [choice.text for choice in answer.choices] == [plain]
        assert answer.model_extra["stars"]["policy"]["name"] == "sample"
    both = client.completions.create(model="tiny:plain", prompt=[PROMPT, "The plot"], max_tokens=12, seed=9, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == plain
    echoed = client.completions.create(model="tiny:plain", prompt=PROMPT, max_tokens=12, seed=9, echo=True)
    assert echoed.choices[0].text == PROMPT + plain


def test_clients_of_many_tasks_get_what_each_gets_alone(server):
    async def ask() -> list[str]:
        async with async_client_of(server) as client:
            async def one(seed: int) -> str:
                if seed % 2:
                    answer = await client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, seed=seed)
                    return answer.choices[0].text
                stream = await client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, seed=seed,
                                                         stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(8)))

    texts = asyncio.run(ask())
    assert texts == [expected(server, PROMPT, max_tokens=16, seed=seed).outputs[0].text for seed in range(8)]


# -- openai: chat -----------------------------------------------------------------------------------------------------


def test_chats_are_the_engines(client, server):
    output = expected(server, {"messages": MESSAGES}, max_tokens=16, seed=2, logprobs=2)
    completion = output.outputs[0]
    answer = client.chat.completions.create(model="tiny:stars", messages=MESSAGES, max_completion_tokens=16, seed=2,
                                            logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert (choice.message.role, choice.message.content) == ("assistant", completion.text)
    assert choice.message.tool_calls is None and choice.finish_reason == "length"
    content = choice.logprobs.content
    assert [item.logprob for item in content] == pytest.approx(
        [found[token].logprob for token, found in zip(completion.token_ids, completion.logprobs, strict=True)])
    assert all(len(item.top_logprobs) == 2 for item in content)
    assert b"".join(bytes(item.bytes) for item in content).decode(errors="replace") == completion.text
    assert choice.model_extra["stars"]["reward"] == pytest.approx(completion.reward, abs=1e-5)
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=16, seed=2, stream=True,
                                            stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == completion.text
    assert chunks[-1].choices[0].finish_reason == "length" and last.usage.completion_tokens == 16


class Verdict(BaseModel):
    verdict: Literal["good", "bad"]
    stars: Literal[1, 2, 3]


def test_structured_outputs_become_objects(client):
    answer = client.chat.completions.parse(model="tiny", messages=MESSAGES, max_tokens=200, seed=3,
                                           response_format=Verdict)
    assert isinstance(answer.choices[0].message.parsed, Verdict)
    answer = client.chat.completions.create(model="tiny:plain", messages=MESSAGES, max_tokens=200, seed=1,
                                            response_format={"type": "json_object"}, stop=["}"],
                                            extra_body={"include_stop_str_in_output": True})
    assert answer.choices[0].message.content.strip().startswith("{")
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, max_tokens=200, seed=3,
                                        response_format=Verdict) as stream:
        kinds = [event.type for event in stream]
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Verdict)
    assert "content.delta" in kinds and kinds[-1] == "content.done"


def test_models_are_listed(client):
    models = client.models.list()
    assert models.data[0].id == "tiny" and models.data[0].model_extra["max_model_len"] == 1024
    assert {"tiny", "tiny:stars", "tiny:plain", "tiny:best-of-n"} <= {model.id for model in models}
    assert client.models.retrieve("tiny:stars").model_extra["stars"]["parameters"]["segment_size"] == 4


# -- openai: errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked, param, word", [
    ({"temperature": -1}, "temperature", "temperature"),
    ({"max_tokens": 5000}, None, "1024"),
    ({"n": 0}, "n", "n"),
    ({"extra_body": {"stars": {"reward_treshold": 1.0}}}, "stars.reward_treshold", "reward_threshold"),
    ({"extra_body": {"stars": {"policy": "nothing"}}}, "stars.policy", "nothing"),
    ({"extra_body": {"stars": {"policy": "stars", "beta": "hot"}}}, "stars.beta", "beta"),
    ({"extra_body": {"no_such": 1}}, "no_such", "no_such"),
])
def test_bad_requests_are_refused_by_name_before_a_stream_opens(asked, param, word, stream, client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "stream": stream, **asked})
    assert caught.value.status_code == 400 and caught.value.type == "invalid_request_error"
    if param is not None:
        assert caught.value.param == param
    assert word in caught.value.body["message"]
    wait_until(lambda: not server.held)


def test_models_that_are_not_there(client):
    for call in (lambda: client.models.retrieve("gpt-4"),
                 lambda: client.completions.create(model="gpt-4", prompt=PROMPT),
                 lambda: client.chat.completions.create(model="gpt-4", messages=MESSAGES, stream=True)):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"


def test_keys(server):
    settings = ServerSettings("tiny", api_keys=("the-right-one", "another"))
    with running_server(Service(server.service.engine, settings)) as locked:
        for key in ("none", "the-right-on", "the-right-one-"):
            with client_of(locked, api_key=key) as client:
                for call in (client.models.list, lambda: endless(client, stream=True)):
                    with pytest.raises(openai.AuthenticationError) as caught:
                        call()
                    assert caught.value.code == "invalid_api_key" and key not in str(caught.value)
        for key in settings.api_keys:
            with client_of(locked, api_key=key) as client:
                assert client.completions.create(model="tiny:plain", prompt=PROMPT, max_tokens=2).choices[0].text


def endless(client: Any, **options: Any) -> Any:
    """A request that goes on for long."""
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 800, "seed": 1,
                                        "extra_body": {"ignore_eos": True}, **options})


def test_a_full_line_is_a_rate_limit_and_is_tried_again(gated, gate):
    """One runs, one waits: the third is told to come again, and does so by itself once there is room."""
    with client_of(gated) as client:
        running = endless(client, stream=True)
        next(running)
        waiting = threading.Thread(target=lambda: client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4))
        waiting.start()
        wait_until(lambda: "num_requests_waiting 1" in gated.service.engine.metrics.text())
        with pytest.raises(openai.RateLimitError) as caught:
            endless(client)
        assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) >= 1
        timer = threading.Timer(0.3, running.close)
        timer.start()
        begin = time.monotonic()
        patient = client.with_options(max_retries=4)
        answer = patient.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, seed=1)
        assert answer.choices[0].finish_reason == "length" and time.monotonic() - begin >= 0.9  # as Retry-After says
        timer.join()
        waiting.join()


def test_a_reward_that_raises_is_an_error_of_the_server(gated, gate):
    with client_of(gated) as client:
        gate.error = ValueError("no such luck")
        try:
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8)
            with pytest.raises(openai.APIError):
                list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, stream=True))
        finally:
            gate.error = None
        assert caught.value.status_code == 500
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8).choices[0].text


# -- who goes away ----------------------------------------------------------------------------------------------------


def goes_away(gated: Running, gate: Gate, leave: Callable[[], None]) -> None:
    """Nothing more is drawn for whoever leaves in the midst of a round, and what it held is free after that round."""
    gate.shut()
    calls = gate.wait()
    assert gated.held > 1
    leave()
    time.sleep(NOTICED)
    gate.open()
    wait_until(lambda: not gated.held, 5.0)
    assert gate.calls <= calls + 1
    gated.engine.check_integrity()


def test_a_stream_that_is_closed(gated, gate):
    with client_of(gated) as client:
        stream = endless(client, stream=True)
        next(stream)
        goes_away(gated, gate, stream.close)


@pytest.mark.parametrize("when", ["plain", "before the first event", "between events"])
def test_a_client_whose_time_is_over(when, gated, gate):
    with client_of(gated, timeout=0.3) as client:
        if when == "between events":
            stream = endless(client, stream=True)
            next(stream)

            def wait() -> None:
                with pytest.raises(openai.APITimeoutError):
                    list(stream)
        else:
            def wait() -> None:
                with pytest.raises(openai.APITimeoutError):
                    endless(client, stream=when != "plain")

        gate.shut()
        thread = threading.Thread(target=wait)
        thread.start()
        calls = gate.wait()
        thread.join()
        time.sleep(NOTICED)
        gate.open()
        wait_until(lambda: not gated.held, 5.0)
        assert gate.calls <= calls + 1


def test_a_task_that_is_cancelled(gated, gate):
    async def ask(stream: bool) -> None:
        async with async_client_of(gated) as client:
            async def read() -> None:
                answer = await endless(client, stream=stream)
                async for _ in answer:
                    pass

            task = asyncio.create_task(read())
            await asyncio.to_thread(wait_until, lambda: gated.held)
            gate.shut()
            calls = await asyncio.to_thread(gate.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(NOTICED)
            gate.open()
            await asyncio.to_thread(wait_until, lambda: not gated.held, 5.0)
            assert gate.calls <= calls + 1

    for stream in (True, False):
        asyncio.run(ask(stream))


# -- langchain --------------------------------------------------------------------------------------------------------


def test_langchain(server):
    from langchain_openai import ChatOpenAI, OpenAI

    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "tiny", "max_retries": 0}
    output = expected(server, {"messages": MESSAGES}, max_tokens=12, seed=4, temperature=0.9)
    chat = ChatOpenAI(**options, max_tokens=12, seed=4, temperature=0.9, extra_body={"stars": GUIDED})
    answer = chat.invoke([("user", MESSAGES[0]["content"])])
    assert answer.content == output.outputs[0].text
    assert answer.usage_metadata["output_tokens"] == 12 and answer.response_metadata["finish_reason"] == "length"
    chunks = list(chat.stream([("user", MESSAGES[0]["content"])], stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == output.outputs[0].text and len(chunks) > 3
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 12
    structured = ChatOpenAI(**options, max_tokens=200, seed=3).with_structured_output(Verdict, method="json_schema")
    assert isinstance(structured.invoke([("user", MESSAGES[0]["content"])]), Verdict)
    completion = OpenAI(**options, max_tokens=12, seed=4, temperature=0.9)
    assert completion.invoke(PROMPT) == expected(server, PROMPT, max_tokens=12, seed=4, temperature=0.9).outputs[0].text
    assert "".join(completion.stream(PROMPT)) == completion.invoke(PROMPT)


# -- curl -------------------------------------------------------------------------------------------------------------


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["curl", "-sS", "--max-time", "20", *arguments], capture_output=True, text=True, timeout=30)


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
AS_JSON = ("-H", "Content-Type: application/json")


@needs_curl
def test_curl(server):
    url = f"{server.url}/v1/completions"
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 6}
    text = expected(server, PROMPT, max_tokens=12, seed=6).outputs[0].text
    answer = json.loads(curl(url, *AS_JSON, "-d", json.dumps(asked)).stdout)
    assert answer["choices"][0]["text"] == text
    streamed = curl("-N", "-i", url, *AS_JSON, "-d", json.dumps({**asked, "stream": True})).stdout
    head, _, body = streamed.replace("\r\n", "\n").partition("\n\n")
    assert "200 OK" in head and "content-type: text/event-stream" in head.lower()
    *events, done, nothing = body.split("\n\n")
    assert done == "data: [DONE]" and nothing == "" and all(event.startswith("data: {") for event in events)
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events) == text
    for path in ("/health", "/ready", "/metrics", "/version", "/v1/models", "/openapi.json"):
        assert curl("-f", server.url + path).returncode == 0


@needs_curl
@pytest.mark.parametrize("flags, status, word", [
    ((*AS_JSON, "-d", '{"model": "tiny", "prompt": '), 400, "no JSON"),
    (("-d", '{"model": "tiny", "prompt": "a"}'), 415, "Content-Type"),  # curl's own is a form's
    ((*AS_JSON, "-d", ""), 400, "empty"),
    ((*AS_JSON, "-d", '{"model": "tiny", "prompt": "a", "max_tokens": NaN}'), 400, "NaN"),
    ((*AS_JSON, "-d", '[1]'), 400, "list"),
    ((*AS_JSON, "-X", "DELETE"), 405, "DELETE"),
])
def test_curl_with_what_is_no_request(flags, status, word, server):
    found = curl("-w", "\n%{http_code}", f"{server.url}/v1/completions", *flags).stdout
    body, _, code = found.rpartition("\n")
    error = json.loads(body)["error"]
    assert int(code) == status and word in error["message"] and error["type"]


@needs_curl
def test_curl_hangs_up_early(gated, gate):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 800, "ignore_eos": True}
    for stream in (True, False):
        process = subprocess.Popen(["curl", "-sN", f"{gated.url}/v1/completions", *AS_JSON, "-d",
                                    json.dumps({**asked, "stream": stream})], stdout=subprocess.PIPE)
        if stream:
            assert process.stdout is not None and process.stdout.read(6) == b"data: "
        else:
            wait_until(lambda: gated.held)

        def leave(process: subprocess.Popen[bytes] = process) -> None:
            process.kill()
            process.communicate()

        goes_away(gated, gate, leave)


# -- vllm bench serve -------------------------------------------------------------------------------------------------


async def timed(session: aiohttp.ClientSession, url: str, payload: dict[str, Any]) -> dict[str, Any]:
    """A request as `vllm bench serve` sends it, and what it makes of the answer: it reads raw pieces, as they come,
    takes an event with choices for text and one without for usage, and fails where no event has a choice."""
    found: dict[str, Any] = {"text": "", "tokens": None, "prompt_tokens": None, "times": []}
    headers = {"x-request-id": "bench-0", "Authorization": "Bearer x"}
    async with session.post(url, json=payload, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        rest = b""
        async for piece in answer.content.iter_any():
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                data = event.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    continue
                told = json.loads(data)
                if told.get("choices"):
                    choice = told["choices"][0]
                    found["text"] += (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
                    found["times"].append(time.perf_counter())
                elif told.get("usage"):
                    found["tokens"] = told["usage"]["completion_tokens"]
                    found["prompt_tokens"] = told["usage"]["prompt_tokens"]
    assert rest == b"" and found["times"]
    return found


def test_requests_of_vllm_bench_serve(server):
    common = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
              "temperature": 0.0, "seed": 1}
    params = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, "seed": 1}
    messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]

    async def ask() -> list[dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{server.url}/v1/models") as answer:  # for the model's name, where none was given
                first = (await answer.json())["data"][0]
                assert first["id"] == "tiny" and first["root"] == "tiny"
            plain = {**common, "prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": 20, "logprobs": None}
            chat = {**common, "messages": messages, "max_completion_tokens": 20}
            asked = [("completions", plain)] * 4 + [("chat/completions", chat)] * 4
            return await asyncio.gather(*(timed(session, f"{server.url}/v1/{path}", body) for path, body in asked))

    outputs = [expected(server, PROMPT, **params)] * 4 + [expected(server, {"messages": messages}, **params)] * 4
    for found, output in zip(asyncio.run(ask()), outputs, strict=True):
        assert found["text"] == output.outputs[0].text and found["tokens"] == 20
        assert found["prompt_tokens"] == len(output.prompt_token_ids) and len(found["times"]) >= 5
