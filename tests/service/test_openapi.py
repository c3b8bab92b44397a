"""Requests made from the OpenAPI document: whatever it allows, and what it does not, no answer is a failure."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import headwater
from headwater.benchmarks.lib.serving import Server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_gpt2, tiny_text):
    root = tmp_path_factory.mktemp("described")
    headwater.extract(
        headwater.RunConfig(
            out=str(root / "run"),
            model=str(tiny_gpt2),
            text=(str(tiny_text),),
            preset="all",
            max_sequences=2,
        )
    )
    with Server(root) as server:
        yield server


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_as_described(server, mode):
    """Valid requests, and such as break the document; the stream of events, which never ends, is left out."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(path="/events")
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=6,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            nonlocal asked
            asked += 1
            if asked % 2 and "{name}" in case.path and case.path.startswith("/runs/"):
                case.path_parameters["name"] = "run"
            case.call_and_validate(checks=CHECKS)

        try:
            check()
        except hypothesis.errors.Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # nothing about this operation can be wrong
    assert asked > 40  # schemathesis 4.0 asks less than later ones


def test_the_document_names_every_route(server):
    paths = server.client.get("/openapi.json")["paths"]
    assert {
        "/runs",
        "/runs/{name}/about",
        "/runs/{name}/arrays/{site}",
        "/runs/{key}",
        "/jobs",
    } <= paths.keys()
    for methods in paths.values():
        for operation in methods.values():
            assert operation["description"] and "404" in operation["responses"]
