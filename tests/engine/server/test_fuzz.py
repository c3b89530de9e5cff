"""The server against requests made out of its own OpenAPI document: such as it allows, and such as it forbids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine, Running, running
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")
positive_data_acceptance = pytest.importorskip("schemathesis.specs.openapi.checks").positive_data_acceptance
ROUTES = (
    *(("GET", path) for path in ("/health", "/version", "/metrics", "/stats", "/v1/models", "/v1/models/{name}",
                                 "/tokenizer_info")),
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")),
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(), grace=0.5) as found:
        yield found


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_route_is_here(document: Any):
    found = {(method.upper(), path) for path, methods in document.raw_schema["paths"].items() for method in methods}
    assert found == set(ROUTES)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*route, "POSITIVE") for route in ROUTES] + [(*route, "NEGATIVE") for route in ROUTES if route[0] == "POST"],
)
def test_what_the_document_says_is_so(document: Any, method: str, path: str, mode: str):
    """No 5xx, only documented statuses, types and shapes, and what the document forbids is refused."""
    operation = document[path][method]
    kind = getattr(schemathesis.GenerationMode, mode)

    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.large_base_example],
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=kind))
    def answered(case: Any) -> None:
        # What no schema says is refused too: prompts longer than the context, unserved fields, 1.0 for an integer.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    answered()
