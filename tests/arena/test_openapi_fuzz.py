"""Whatever anybody sends to whatever is documented: an answer of the documented shape, never a failure of the arena."""

from __future__ import annotations

import json
from typing import Any

import pytest
from arena_world import DONE, lease, play, submit, submit_pair
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.service

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["reach", "remote", "anchor", "\0", "\ud800", "0" * 64, "arm", "arm-1", "9" * 40, "' OR 1=1"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _value(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Mostly what a field wants, sometimes anything."""
    kinds = {
        "string": st.text(max_size=12) | st.sampled_from(["reach", "remote", "0" * 64, "arm", "arm-1", "robot_fault"]),
        "integer": st.integers(-2, 5) | st.integers(-(2**70), 2**70),
        "number": st.floats(-2, 2) | st.floats(),
        "boolean": st.booleans(),
        "array": st.lists(st.text(max_size=5), max_size=2),
        "object": st.dictionaries(st.text(max_size=5), LEAVES, max_size=3),
    }
    return kinds.get(schema.get("type", ""), LEAVES) | VALUES


Operation = tuple[str, str, dict[str, Any], st.SearchStrategy[tuple[str, Any]]]


def _operations(described: dict[str, Any]) -> list[Operation]:
    """Every documented operation: method, path, its responses, and a strategy for address and body."""
    found = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            if path == "/v1/events":
                continue  # a stream without an end; it takes no input
            parts = {p["name"] for p in operation.get("parameters", [])}
            word = st.sampled_from(["1", "2", "reach", "arm-1", "0" * 64, "-1", "%00", "%F0", "..", "9" * 30, "é"])
            address = st.fixed_dictionaries(dict.fromkeys(sorted(parts), word)).map(
                lambda values, path=path: _address(path, values)
            )
            body: st.SearchStrategy[Any] = st.none()
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is not None:
                body = _body(content["schema"], described["components"]["schemas"])
            found.append((method.upper(), path, operation["responses"], st.tuples(address, body)))
    return found


def _body(schema: dict[str, Any], schemas: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Mostly an object of the documented form, also inside lists, and sometimes anything."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[1]]
        fields = {name: _body(field, schemas) for name, field in schema["properties"].items()}
        required = {name: fields[name] for name in schema.get("required", [])}
        optional = {name: value for name, value in fields.items() if name not in required}
        return st.fixed_dictionaries(required, optional=optional) | VALUES
    if schema.get("type") == "array" and "$ref" in schema.get("items", {}):
        return st.lists(_body(schema["items"], schemas), max_size=3) | VALUES
    return _value(schema)


def _address(path: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        if f"{{{name}}}" in path:
            path = path.replace(f"{{{name}}}", value)
        else:
            path += f"{'&' if '?' in path else '?'}{name}={value}"
    return path


def run(client: Any, examples: int) -> None:
    client.app.state.arena.turnstile.limit = 10**9
    with client.app.state.arena.database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=3)
        play(session, lease(session), DONE)
        lease(session)
        submit_pair(session, trials=1)
    operations = _operations(client.ask("GET", "/openapi.json").json())
    counts = [_try(client, examples, *operation) for operation in operations]
    assert len(counts) > 20
    # Where there is little to choose from, all of it was tried.
    assert min(counts) >= min(examples, 3)


def _try(client: Any, examples: int, method: str, path: str, known: dict[str, Any], requests: Any) -> int:
    """Asks one operation many times; returns how often."""
    count = 0

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(requests, st.sampled_from(["admin", "admin", "ada", "lab", None]))
    def every_answer_is_sound(asked: tuple[str, Any], role: str | None) -> None:
        nonlocal count
        count += 1
        address, body = asked
        content = None if body is None else json.dumps(body).encode()
        answer = client.ask(method, address, role, content=content, headers={"Content-Type": "application/json"})
        status = str(answer.status_code)
        # A failure of the arena itself, 500, is documented nowhere.
        assert status in known or (status[0] == "4" and "4XX" in known), (method, path, address, body, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()) >= {"ok", "error", "detail", "hint", "status"}
            assert "Traceback" not in answer.text

    every_answer_is_sound()
    return count


def test_no_request_makes_the_arena_fail(both_clients) -> None:
    run(both_clients, 10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_and_fifty_requests_of_every_operation_do_not_make_the_arena_fail(both_clients) -> None:
    run(both_clients, 150)
