"""The OpenAPI description, held against the server by schemathesis: whatever a request holds, the answer has a status
and a shape that are described, and none is an error of the server's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import stars
from serving_http import chat_pair, service_of_pair
from stars.serve.http.app import build_app
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
          response_schema_conformance, negative_data_rejection]
FEW, MANY = 10, 300
"""Examples of each address that takes a body, of bodies that fit and of those that do not."""
SETTINGS = ServerSettings("tiny", policy_parameters={"reward_threshold": 0.0, "segment_size": 4, "max_attempts": 2},
                          default_max_tokens=4)

APP = build_app(Service(None, SETTINGS))  # whose engine comes with the tests
DESCRIPTION = APP.openapi()
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
OPERATIONS = [(method.upper(), path) for path, operations in DESCRIPTION["paths"].items() for method in operations]
WITH_BODIES = [(method, path) for method, path in OPERATIONS if "requestBody" in
               DESCRIPTION["paths"][path][method.lower()]]
ALIASES = {"/v1/score"}  # of what is looked at under another name
SLOW_TO_MAKE = {"/score", "/classify", "/pooling"}  # bodies that fit none of several shapes take seconds to find


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    """Small enough that whatever is asked for ends soon."""
    models = chat_pair(tmp_path_factory.mktemp("chat") / "lm")
    with service_of_pair(SETTINGS, max_model_len=32, cache_tokens=2048, **models) as service:
        APP.state.service = service
        yield service


def hold(method: str, path: str, mode: GenerationMode, count: int) -> Counter[int]:
    """Sends `count` requests, the same in every run, whose answers are as described; how many had each status."""
    statuses: Counter[int] = Counter()
    operation = SCHEMA[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=count, derandomize=True, database=None, deadline=None, phases=(Phase.generate,),
              suppress_health_check=list(HealthCheck))
    def send(case: Any) -> None:
        answer = case.call()
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    send()
    return statuses


def test_all_addresses_are_described():
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/tokenize", "/detokenize",
            "/score", "/v1/score", "/classify", "/pooling", "/v1/calibrate", "/health", "/ready", "/metrics",
            "/version"} <= {path for _, path in OPERATIONS}
    for method, path in OPERATIONS:
        operation = DESCRIPTION["paths"][path][method.lower()]
        assert operation["description"].strip() and operation["tags"]
        assert {"400", "401", "500", "503"} <= operation["responses"].keys() and "422" not in operation["responses"]
        if (method, path) in WITH_BODIES:
            assert {"404", "408", "413", "415", "429"} <= operation["responses"].keys()
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


@pytest.mark.parametrize("method, path", [operation for operation in OPERATIONS if operation[1] not in ALIASES])
def test_answers_are_as_described(method, path, service):
    count = FEW if (method, path) in WITH_BODIES else 3
    statuses = hold(method, path, GenerationMode.POSITIVE, count)
    assert (404 if path == "/v1/models/{model}" else 200) in statuses, statuses  # else only errors were looked at


@pytest.mark.parametrize("method, path", [operation for operation in WITH_BODIES
                                          if operation[1] not in ALIASES | SLOW_TO_MAKE])
def test_what_does_not_fit_is_refused_as_described(method, path, service):
    statuses = hold(method, path, GenerationMode.NEGATIVE, FEW)
    assert statuses.keys() & {400, 415}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("method, path", WITH_BODIES)
def test_answers_to_many_requests_are_as_described(method, path, mode, service):
    hold(method, path, mode, MANY)


def test_nothing_is_held_in_the_end(service):
    async def right() -> str:
        async for output in service.engine.generate("This film", stars.SamplingParams(max_tokens=4, seed=1)):
            pass
        return output.outputs[0].finish_reason

    assert asyncio.run(right()) in ("stop", "length")
    assert not service.engine.engine._requests
    service.engine.engine.check_integrity()
