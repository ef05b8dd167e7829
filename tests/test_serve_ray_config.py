"""What an application of Ray Serve is told, and what it refuses: no cluster is needed."""

from __future__ import annotations

import asyncio
import os
import re
from types import SimpleNamespace

import pytest
import yaml

from ray_cluster import DOCS, ROUTER, configuration
from stars import EngineDeadError, RequestError

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

from stars.serve.forward import Ask
from stars.serve.ray import LOST, EngineReplica, build


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


def test_values_are_those_of_the_flags():
    def args(**config):
        return build(config)._bound_deployment.init_args[1]._bound_deployment.init_args

    parsed, settings = args(
        deterministic=False, max_num_seqs="8", cors_origin=["https://a.b", "https://c.d"], model="lm", reward="rm",
        reward_weight=[1, 2, 0.5], set={"beta": 0.5, "max_attempts": 3, "exhaust": "best_seen"}, reward_threshold=-1.5,
        reward_implicit=[["a", "b"], ["c", "d"]], **{"drain-seconds": 7})
    assert parsed.deterministic is None and parsed.max_num_seqs == 8 and parsed.reward == ["rm"]
    assert parsed.reward_implicit == [["a", "b"], ["c", "d"]] and parsed.reward_weight == [1.0, 2.0, 0.5]
    assert settings.cors_origins == ("https://a.b", "https://c.d") and settings.drain_seconds == 7
    assert settings.policy_parameters == {
        "beta": 0.5, "max_attempts": 3, "exhaust": "best_seen", "reward_threshold": -1.5}
    assert settings.allowed_hosts == () and args(deterministic="True")[0].deterministic is True


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
