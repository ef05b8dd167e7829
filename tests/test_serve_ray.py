"""`stars serve` over Ray Serve: two engines on a cluster of this machine, one of which is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import yaml

from ray_cluster import KEY, POLICY, ROUTER, Cluster, configuration, ray_cluster
from stars import STARS, Engine, SamplingParams
from stars.cli.options import shipped_pair

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

import httpx

HEADERS = {"Authorization": f"Bearer {KEY}"}
SECONDS = 240.0  # that anything may take, on a machine that is busy
LONG = 240  # tokens
LOAD = 24  # requests, of which EARLY run where an engine is killed
EARLY = 16


class Api(NamedTuple):
    url: str
    cluster: Cluster

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, headers=HEADERS, timeout=30, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **{"headers": HEADERS} | options)

    def replicas(self) -> set[str]:
        """The engines that tell of themselves."""
        text = self.get("/metrics").text
        return set(re.findall(r'^stars:num_requests_running\{replica="(.*?)"\}', text, re.MULTILINE))

    def gauge(self, name: str) -> float:
        """Summed over the engines."""
        return sum(map(float, re.findall(rf"^stars:{name}\{{.*?\}} (\S+)$", self.get("/metrics").text, re.MULTILINE)))


@contextlib.contextmanager
def running(cluster: Cluster, given: dict[str, Any], *command: str) -> Iterator[Api]:
    """The API of a configuration, which this command of `serve` deploys."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(given, file)
        file.flush()
        assert cluster.serve(*command, file.name) == ""
        found = Api(f"http://127.0.0.1:{given['http_options']['port']}", cluster)
        wait_until(lambda: found.get("/ready").status_code == 200 and len(found.replicas()) == 2)
        yield found


@pytest.fixture(scope="module")
def api():
    with ray_cluster(num_cpus=4) as cluster:
        with running(cluster, configuration(free_port()), "run", "--non-blocking") as found:
            yield found


@pytest.fixture(scope="module")
def engine():
    model, reward = shipped_pair()
    return Engine(str(model), str(reward), deterministic=True, max_num_seqs=16)


def free_port() -> int:
    """One of those that neither Ray's processes nor the system hand out by themselves."""
    for port in random.sample(range(20_000, 30_000), 50):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def wait_until(reached) -> None:
    until = time.monotonic() + SECONDS
    while True:
        try:
            if reached():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.1)


def streams(seed: int) -> bool:
    """Which requests are streamed: in pairs, as Serve gives every other one to the other engine."""
    return seed % 4 < 2


def asked(seed: int, **more: Any) -> dict[str, Any]:
    return {"model": "lm", "prompt": f"The {seed}th film", "max_tokens": LONG, "ignore_eos": True, "seed": seed} | more


def texts(engine: Engine, seeds: range | list[int]) -> dict[int, str]:
    """What the engine itself says."""
    params = [SamplingParams(max_tokens=LONG, ignore_eos=True, seed=seed) for seed in seeds]
    outputs = engine.generate([asked(seed)["prompt"] for seed in seeds], params, STARS(**POLICY), use_tqdm=False)
    return {seed: output.outputs[0].text for seed, output in zip(seeds, outputs, strict=True)}


def read(stream: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of a stream, and its errors; it ended as streams do."""
    events = [event.removeprefix("data: ") for event in stream.strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    found = [json.loads(event) for event in events]
    text = "".join(choice["text"] for event in found for choice in event.get("choices", ()))
    return text, [event["error"] for event in found if "error" in event]


# -- what is deployed ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_engine(api, engine):
    right = texts(engine, [1, 2])
    answer = api.post("/v1/completions", asked(1))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == right[1]
    answer = api.post("/v1/completions", asked(2, stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert read(answer.text) == (right[2], []) and answer.text.count("data: ") > 3


def test_one_api_stands_for_all_engines(api):
    assert [model["id"] for model in api.get("/v1/models").json()["data"]][0] == "lm"
    assert len(api.replicas()) == 2 == len(api.cluster.processes("ray::ServeReplica:stars:engine"))
    metrics = api.get("/metrics").text
    assert metrics.count("# TYPE stars:num_requests_running gauge\n") == 1
    assert "stars:http_requests_total{" in metrics


def test_errors_have_openais_shape(api):
    for path, body, options, status, param in (
            ("/v1/completions", asked(1, max_tokens=-1), {}, 400, "max_tokens"),
            ("/v1/completions", asked(1, stream=True, top_p=7), {}, 400, "top_p"),
            ("/v1/completions", asked(1, model="other"), {}, 404, "model"),
            ("/nowhere", {}, {}, 404, None),
            ("/v1/completions", asked(1, user="x" * 200_000), {}, 413, None),
            ("/v1/completions", asked(1), {"headers": {}}, 401, None)):
        answer = api.post(path, body, **options)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
        assert len(answer.headers.get_list("x-request-id")) == 1


def test_a_client_that_goes_away_frees_what_it_had(api):
    before = api.gauge("generation_tokens_total")
    with httpx.stream("POST", api.url + "/v1/completions", json=asked(3, stream=True, n=8, max_tokens=900),
                      headers=HEADERS, timeout=30) as stream:
        parts = stream.iter_text()  # which closes the stream once it is dropped
        assert next(parts).startswith("data: ")
        assert api.gauge("num_requests_running") == 1
    wait_until(lambda: api.gauge("num_requests_running") == 0)
    assert api.gauge("generation_tokens_total") - before < 8 * 900 / 2


# -- one of them is killed -------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    text: str
    errors: list[dict[str, Any]]
    begun: float | None  # when the first of a stream was there


async def answer(client: httpx.AsyncClient, seed: int, begun: asyncio.Event) -> Answer:
    async with client.stream("POST", "/v1/completions", json=asked(seed, stream=streams(seed))) as response:
        parts: list[str] = []
        when = None
        async for part in response.aiter_text():
            when = when or time.monotonic()
            begun.set()
            parts.append(part)
    if streams(seed) and response.status_code == 200:
        return Answer(200, *read("".join(parts)), when)
    found = json.loads("".join(parts))
    return Answer(response.status_code, *((found["choices"][0]["text"], []) if "choices" in found
                                          else ("", [found["error"]])), None)


async def loaded(api: Api, act: Callable[[], object]) -> tuple[list[Answer], float]:
    """Answers to plain and streamed requests, and when `act` was called: while the first streams ran, and before the
    last ones had begun."""
    async with httpx.AsyncClient(base_url=api.url, headers=HEADERS, timeout=90) as client:
        begun = [asyncio.Event() for _ in range(LOAD)]
        tasks = [asyncio.create_task(answer(client, seed, begun[seed])) for seed in range(EARLY)]
        await asyncio.gather(*(begun[seed].wait() for seed in range(EARLY) if streams(seed)))
        tasks += [asyncio.create_task(answer(client, seed, begun[seed])) for seed in range(EARLY, LOAD)]
        await asyncio.sleep(0.02)
        when = time.monotonic()
        await asyncio.to_thread(act)
        return list(await asyncio.gather(*tasks)), when


def check_kill(api: Api, right: dict[int, str] | None) -> None:
    """An engine that is killed under load loses no request that had not begun, and another one takes its place.

    right: the texts, where they do not depend on what was asked before.
    """
    wait_until(lambda: len(api.replicas()) == 2)
    victim, *_ = api.cluster.processes("ray::ServeReplica:stars:engine")
    answers, killed = asyncio.run(loaded(api, lambda: os.kill(victim, signal.SIGKILL)))
    broken = {seed for seed, one in enumerate(answers) if one.errors}
    for seed, one in enumerate(answers):
        assert one.status == 200, one
        if seed not in broken:
            assert one.text == right[seed] if right else len(one.text) > LONG
        else:  # it had begun: what came is right, and it ends with what happened
            assert streams(seed) and one.begun < killed + 1.0 and one.text
            assert not right or right[seed].startswith(one.text) and one.text != right[seed]
            assert [error["code"] for error in one.errors] == ["replica_lost"]
    assert broken, "no stream ran where it was killed"
    wait_until(lambda: len(api.replicas()) == 2 and victim not in api.cluster.processes())
    assert not right or api.post("/v1/completions", asked(1)).json()["choices"][0]["text"] == right[1]


def test_a_killed_engine_loses_no_request_that_had_not_begun(api, engine):
    check_kill(api, texts(engine, range(LOAD)))


@pytest.mark.slow
def test_deployed_over_http_with_routing_by_prefixes():
    """What the docs say besides: `serve deploy`, again with fewer engines, of which the one that goes finishes what it
    does; Serve's prefix-aware router; `serve run` with the flags as words."""
    given = configuration(free_port())
    [application] = given["applications"]
    application["deployments"][0]["request_router_config"] = ROUTER
    application["args"]["deterministic"] = False  # which remembers prompts alone
    model, reward = map(str, shipped_pair())
    with ray_cluster(num_cpus=4, dashboard=True) as cluster:
        address = f"http://{cluster.dashboard}"
        with running(cluster, given, "deploy", "--address", address) as api:
            for number in range(6):
                text, before = f"{number} of ten for this film, and here is why it is so. " * 3, 0
                for turn in range(4):
                    answer = api.post("/v1/completions", asked(turn, prompt=text, max_tokens=48)).json()
                    usage, [choice] = answer["usage"], answer["choices"]
                    if turn:  # the engine was asked that knows the turn before
                        assert usage["prompt_tokens_details"]["cached_tokens"] >= before - 2 * 16
                    before = usage["prompt_tokens"]
                    text += choice["text"] + " And yet,"
            check_kill(api, None)
            application["deployments"][0]["num_replicas"] = 1
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                yaml.safe_dump(given, file)
                file.flush()
                answers, _ = asyncio.run(loaded(api, lambda: cluster.serve("deploy", "--address", address, file.name)))
            assert all(one.status == 200 and not one.errors and len(one.text) > LONG for one in answers)
            wait_until(lambda: len(api.cluster.processes("ray::ServeReplica:stars:engine")) == 1)
            assert cluster.serve("run", "--non-blocking", "--name", "second", "--route-prefix", "/second",
                                 "stars.serve.ray:build", f"model={model}", f"reward={reward}", "replicas=1",
                                 "reward-threshold=1.0", "served_model_name=film") == ""
            answer = api.post("/second/v1/completions", asked(1, model="film"))
            assert answer.status_code == 200 and len(answer.json()["choices"][0]["text"]) > 100
            assert api.get("/second/health").json() == {"status": "ok"}
