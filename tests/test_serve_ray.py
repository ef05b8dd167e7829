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
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml

from stars import STARS, Engine, EngineDeadError, RequestError, SamplingParams
from stars.cli.options import shipped_pair

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

import httpx

from ray_cluster import Cluster, ray_cluster
from stars.serve.forward import Ask
from stars.serve.ray import LOST, EngineReplica, build

DOCS = Path(__file__).resolve().parents[1] / "docs"
KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
POLICY = {"reward_threshold": 1.0, "segment_size": 8, "max_attempts": 3}
LONG = 160  # tokens
LOAD = 24


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


def configuration(port: int) -> dict[str, Any]:
    """The one of the docs, for the shipped pair and a small machine."""
    given = yaml.safe_load((DOCS / "serve-config.yaml").read_text(encoding="utf8"))
    model, reward = map(str, shipped_pair())
    [application] = given["applications"]
    assert {"model": "path/to/lm", "reward": "path/to/rm"}.items() <= application["args"].items()
    application["args"] |= {"model": model, "reward": reward, "set": POLICY, "deterministic": True, "api_key": [KEY],
                            "max_num_seqs": 8, "max_body_bytes": 100_000}
    given["http_options"]["port"] = port
    return given


@contextlib.contextmanager
def running(cluster: Cluster, given: dict[str, Any], *command: str) -> Iterator[Api]:
    """The API of a configuration, which this command of `serve` deploys."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(given, file)
        file.flush()
        assert cluster.serve(*command, file.name) == ""
        found = Api(f"http://127.0.0.1:{given['http_options']['port']}", cluster)
        wait_until(lambda: found.get("/ready").status_code == 200 and len(found.replicas()) == 2, 60)
        yield found


@pytest.fixture(scope="module")
def api():
    with ray_cluster(num_cpus=4) as cluster:
        with running(cluster, configuration(free_port()), "run", "--non-blocking") as found:
            yield found


@pytest.fixture(scope="module")
def engine():
    model, reward = shipped_pair()
    return Engine(str(model), str(reward), deterministic=True, max_num_seqs=8)


def free_port() -> int:
    """One of those that neither Ray's processes nor the system hand out by themselves."""
    for port in random.sample(range(20_000, 30_000), 50):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def wait_until(reached, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if reached():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.1)


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
    with httpx.stream("POST", api.url + "/v1/completions", json=asked(3, stream=True, n=8, max_tokens=900),
                      headers=HEADERS, timeout=30) as stream:
        parts = stream.iter_text()  # which closes the stream once it is dropped
        assert next(parts).startswith("data: ")
        assert api.gauge("num_requests_running") == 1
    begin = time.monotonic()
    wait_until(lambda: api.gauge("num_requests_running") == 0)
    assert time.monotonic() - begin < 3.0


# -- one of them is killed -------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    text: str
    errors: list[dict[str, Any]]
    begun: float | None  # when the first of a stream was there


async def answer(client: httpx.AsyncClient, seed: int, stream: bool) -> Answer:
    async with client.stream("POST", "/v1/completions", json=asked(seed, stream=stream)) as response:
        parts: list[str] = []
        begun = None
        async for part in response.aiter_text():
            begun = begun or time.monotonic()
            parts.append(part)
    body = "".join(parts)
    if stream and response.status_code == 200:
        return Answer(200, *read(body), begun)
    found = json.loads(body)
    return Answer(response.status_code, *((found["choices"][0]["text"], []) if "choices" in found
                                          else ("", [found["error"]])), None)


async def loaded(api: Api, victim: int) -> tuple[list[Answer], float]:
    """Answers to plain and streamed requests, and when the replica was killed: once a stream had begun."""
    async with httpx.AsyncClient(base_url=api.url, headers=HEADERS, timeout=60) as client:
        tasks = [asyncio.create_task(answer(client, seed, seed % 2 == 0)) for seed in range(LOAD)]
        await until_streams_run(api)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        return list(await asyncio.gather(*tasks)), killed


async def until_streams_run(api: Api) -> None:
    """Each engine has committed something."""
    async def committed() -> AsyncIterator[float]:
        while True:
            text = (await asyncio.to_thread(api.get, "/metrics")).text
            yield min(map(float, re.findall(r"^stars:generation_tokens_total\{.*?\} (\S+)$", text, re.MULTILINE)))

    first = None
    async for least in committed():
        first = least if first is None else first
        if least > first:
            return


def check_kill(api: Api, right: dict[int, str] | None) -> None:
    """An engine that is killed under load loses no request that had not begun, and another one takes its place.

    right: the texts, where they do not depend on what was asked before.
    """
    wait_until(lambda: len(api.replicas()) == 2)
    victim, *_ = api.cluster.processes("ray::ServeReplica:stars:engine")
    answers, killed = asyncio.run(loaded(api, victim))
    broken = {seed for seed, one in enumerate(answers) if one.errors}
    for seed, one in enumerate(answers):
        assert one.status == 200, one
        if seed not in broken:
            assert one.text == right[seed] if right else len(one.text) > LONG
        else:  # it had begun: what came is right, and it ends with what happened
            assert seed % 2 == 0 and one.begun < killed + 1.0 and one.text
            assert not right or right[seed].startswith(one.text) and one.text != right[seed]
            assert [error["code"] for error in one.errors] == ["replica_lost"]
    assert broken, "no stream ran where it was killed"
    wait_until(lambda: len(api.replicas()) == 2 and victim not in api.cluster.processes())
    assert not right or api.post("/v1/completions", asked(1)).json()["choices"][0]["text"] == right[1]


def test_a_killed_engine_loses_no_request_that_had_not_begun(api, engine):
    check_kill(api, texts(engine, range(LOAD)))


def test_an_engine_that_has_ended_is_tried_elsewhere_and_replaced(monkeypatch):
    """One whose loop breaks under a request raises what is tried again; from the next one on it is gone."""
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended

    async def app(scope, receive, send):
        replica.service.engine.is_running = False
        await send({"type": "http.response.start", "status": 503, "headers": []})

    async def items():
        return [item async for item in replica.answer(Ask("GET", "/", b"", (), None, b""))]

    kind = EngineReplica.func_or_class
    replica = object.__new__(type("Replica", (), {"answer": kind.answer, "check_health": kind.check_health}))
    replica.service, replica.app = SimpleNamespace(engine=SimpleNamespace(is_running=True)), app
    monkeypatch.setattr(os, "_exit", end)
    assert replica.check_health()
    with pytest.raises(LOST):
        asyncio.run(items())
    with pytest.raises(EngineDeadError):
        replica.check_health()
    with pytest.raises(Ended):
        asyncio.run(items())


ROUTER = {"request_router_class": "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router."
                                  "PrefixCacheAffinityRouter",
          "request_router_kwargs": {"imbalanced_threshold": 8, "do_eviction": True}}


@pytest.mark.slow
def test_deployed_over_http_with_routing_by_prefixes():
    """What the docs say besides: `serve deploy`, Serve's prefix-aware router, `serve run` with the flags as words."""
    given = configuration(free_port())
    [application] = given["applications"]
    application["deployments"][0]["request_router_config"] = ROUTER
    application["args"]["deterministic"] = False  # which remembers prompts alone
    model, reward = map(str, shipped_pair())
    with ray_cluster(num_cpus=4, dashboard=True) as cluster:
        with running(cluster, given, "deploy", "--address", f"http://{cluster.dashboard}") as api:
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
            assert cluster.serve("run", "--non-blocking", "--name", "second", "--route-prefix", "/second",
                                 "stars.serve.ray:build", f"model={model}", f"reward={reward}", "replicas=1",
                                 "reward-threshold=1.0", "served_model_name=film") == ""
            answer = api.post("/second/v1/completions", asked(1, model="film"))
            assert answer.status_code == 200 and len(answer.json()["choices"][0]["text"]) > 100
            assert api.get("/second/health").json() == {"status": "ok"}


# -- configurations --------------------------------------------------------------------------------------------------


def test_the_configuration_of_the_docs_is_one_of_serve():
    from ray.serve.schema import ServeDeploySchema

    [application] = ServeDeploySchema.model_validate(configuration(8000)).applications
    assert application.import_path == "stars.serve.ray:build"
    assert {one.name for one in application.deployments} == {"engine", "api"}
    build(application.args)


def test_the_examples_of_the_docs_are_ones_of_serve():
    from ray.serve.schema import ServeDeploySchema

    text = (DOCS / "scaling.md").read_text(encoding="utf8")
    whole, *parts, kubernetes = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert kubernetes["kind"] == "RayService" and len(parts) == 2
    given = [whole, yaml.safe_load(kubernetes["spec"]["serveConfigV2"]),
             *({"applications": [whole["applications"][0] | {"deployments": part}]} for part in parts)]
    for one in given:
        [application] = ServeDeploySchema.model_validate(one).applications
        build(application.args)
    image = {group["template"]["spec"]["containers"][0]["image"] for group in (
        kubernetes["spec"]["rayClusterConfig"]["headGroupSpec"],
        *kubernetes["spec"]["rayClusterConfig"]["workerGroupSpecs"])}
    assert len(image) == 1 and kubernetes["spec"]["rayClusterConfig"]["rayVersion"] in pinned("ray")


def pinned(name: str) -> list[str]:
    """The versions of a package in requirements.txt."""
    text = (DOCS.parent / "requirements.txt").read_text(encoding="utf8")
    return re.findall(rf"^{name}(?:\[\w+\])?==([\d.]+)", text, re.MULTILINE)


def test_the_router_of_the_docs_is_there():
    from ray.serve.config import RequestRouterConfig

    assert ROUTER["request_router_class"] in (DOCS / "scaling.md").read_text(encoding="utf8")
    assert RequestRouterConfig(**ROUTER).get_request_router_class().__name__ == "PrefixCacheAffinityRouter"


@pytest.mark.parametrize("config, message", [
    ({"modle": "lm"}, "there is no modle: did you mean model?"),
    ({"replica": 2}, "there is no replica: did you mean replicas?"),
    (["model"], "the application's args are ['model'], they must be names and values"),
    ({"port": 80}, "port is not the application's: that is said by http_options.port"),
    ({"reward_threshold": "high"}, "argument --reward-threshold: invalid number value: 'high'"),
    ({"policy": "star"}, "argument --policy: invalid choice"),
    ({"set": {"speed": 3}}, "--set speed: --policy stars has"),
    ({"deterministic": "perhaps"}, "deterministic is 'perhaps', it must be true or false"),
    ({"max_waiting": 0}, "max_waiting is 0, it must be an integer of at least 1"),
    ({"max_body_bytes": 0}, "max_body_bytes is 0, it must be an integer of at least 1"),
    ({"served_model_name": "a:b"}, "the served model's name is 'a:b'"),
    ({"calibration": "no.json"}, "no.json"),
    ({"replicas": 0}, "replicas: num_replicas"),
    ({"replicas": {"num_replica": 2}}, "replicas: "),
    ({"replicas": {"ray_actor_options": {"num_cpus": "many"}}}, "replicas: "),
    ({"replicas": {"max_ongoing_requests": -1}}, "replicas: "),
    ({"ingress": [1]}, "ingress is [1], it must be a number"),
])
def test_bad_configurations_are_refused_in_a_sentence(config, message):
    with pytest.raises((RequestError, OSError)) as raised:
        build(config)
    told = str(raised.value)
    assert message in told and "\n" not in told and len(told) < 600, told


def test_options_go_to_serve_as_they_are():
    scaling = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}
    app = build({"replicas": {"autoscaling_config": scaling, "ray_actor_options": {"num_gpus": 1}}, "ingress": "3",
                 "drain-seconds": "7"})
    api, engines = app._bound_deployment, app._bound_deployment.init_args[1]._bound_deployment
    assert (api.name, api.num_replicas) == ("api", 3)
    assert engines.ray_actor_options["num_gpus"] == 1 and engines._deployment_config.graceful_shutdown_timeout_s == 7
    assert engines._deployment_config.autoscaling_config.max_replicas == 4
