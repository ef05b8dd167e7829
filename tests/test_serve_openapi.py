"""The OpenAPI description, held against the server by schemathesis: whatever a request holds, the answer has a status
and a shape that are described, and none is an error of the server's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

import stars
from serving_http import service_of_pair
from stars.serve.http.app import build_app
from stars.serve.http.service import Service
from stars.serve.http.settings import ServerSettings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
          response_schema_conformance, negative_data_rejection, unsupported_method]
FEW, MANY = 20, 400
"""Examples of each address."""
SETTINGS = ServerSettings("tiny", policy_parameters={"reward_threshold": 0.0, "segment_size": 4, "max_attempts": 2},
                          default_max_tokens=4)

APP = build_app(Service(None, SETTINGS))  # whose engine comes with the tests
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Small enough that whatever is asked for ends soon."""
    with service_of_pair(SETTINGS, max_model_len=32, cache_tokens=2048) as service:
        APP.state.service = service
        yield service


def hold(case: Any, service: Service) -> None:
    """One request, whose answer is as described, and which leaves nothing behind."""
    case.call_and_validate(checks=CHECKS)
    assert service.engine.is_running


def examples(count: int) -> Any:
    """The same ones in every run."""
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@schema.parametrize()
@examples(FEW)
def test_answers_are_as_described(case, service):
    hold(case, service)


@pytest.mark.slow
@schema.parametrize()
@examples(MANY)
def test_answers_to_many_requests_are_as_described(case, service):
    hold(case, service)


def test_nothing_is_held_in_the_end(service):
    async def right() -> str:
        async for output in service.engine.generate("This film", stars.SamplingParams(max_tokens=4, seed=1)):
            pass
        return output.outputs[0].finish_reason

    assert asyncio.run(right()) in ("stop", "length")
    assert not service.engine.engine._requests
    service.engine.engine.check_integrity()
