"""Whatever anybody sends to whatever is documented: an answer of the documented shape, never a failure of the arena."""

from __future__ import annotations

from typing import Any

import pytest
from arena_world import DONE, lease, play, submit
from hypothesis import HealthCheck, given, settings
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


def _requests(described: dict[str, Any]) -> st.SearchStrategy[tuple[str, str, Any]]:
    """Method, address and body for every documented operation."""
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
                schema = described["components"]["schemas"][content["schema"]["$ref"].rsplit("/", 1)[1]]
                fields = {name: _value(field) for name, field in schema["properties"].items()}
                required = {name: fields[name] for name in schema.get("required", [])}
                optional = {name: value for name, value in fields.items() if name not in required}
                body = st.fixed_dictionaries(required, optional=optional) | VALUES
            found.append(st.tuples(st.just(method.upper()), address, body))
    return st.one_of(found)


def _address(path: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        if f"{{{name}}}" in path:
            path = path.replace(f"{{{name}}}", value)
        else:
            path += f"{'&' if '?' in path else '?'}{name}={value}"
    return path


def run(client: Any, examples: int) -> None:
    import json

    client.app.state.arena.turnstile.limit = 10**9
    with client.app.state.arena.database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=3)
        play(session, lease(session), DONE)
        lease(session)
    described = client.ask("GET", "/openapi.json").json()
    roles = st.sampled_from(["admin", "admin", "ada", "lab", None])

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(_requests(described), roles)
    def every_answer_is_sound(asked: tuple[str, str, Any], role: str | None) -> None:
        method, address, body = asked
        content = None if body is None else json.dumps(body).encode()
        answer = client.ask(method, address, role, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (method, address, body, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()) >= {"ok", "error", "detail", "hint", "status"}
            assert "Traceback" not in answer.text

    every_answer_is_sound()


def test_no_request_makes_the_arena_fail(both_clients) -> None:
    run(both_clients, 250)


@pytest.mark.slow
def test_thousands_of_requests_do_not_make_the_arena_fail(both_clients) -> None:
    run(both_clients, 5000)
