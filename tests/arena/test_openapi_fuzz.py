"""Whatever anybody sends to whatever is documented: an answer of the documented shape, never a failure of the arena."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from arena_world import DONE, lease, play, submit, submit_pair
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.service

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
NAMES = ["0", "1", "2", "reach", "arm-1", "0" * 64, "-1", "%00", "..", "9" * 30]
"""What may stand in an address: some of it is there, some breaks things elsewhere."""

KNOWN = {
    "benchmark": "reach",
    "split": "seen",
    "kind": "anchor",
    "anchor": "random",
    "fence": 1,
    "robot": "arm",
    "worker": "arm-1",
    "reasons": ["clear"],
}
"""What leads further in than a refusal at the door."""


def run(client: Any, examples: int) -> None:
    client.app.state.arena.turnstile.limit = 10**9
    with client.app.state.arena.database.write() as session:
        submit(session, kind="anchor", anchor="expert", trials=3)
        play(session, lease(session), DONE)
        lease(session)
        submit_pair(session, trials=1)
    token, nonce = _rater(client)
    tokens, known = client.tokens | {"rater": token}, KNOWN | {"nonce": nonce}
    schema = schemathesis.openapi.from_dict(client.app.openapi())
    schema.app = _without_start(client.app)
    # The events are a stream without an end; they take no input.
    operations = [found.ok() for found in schema.exclude(path="/v1/events").get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        _try(tokens, known, examples, operation)


def _rater(client: Any) -> tuple[str, str]:
    """The token of somebody who has a pair before them, and its nonce; of two other studies one is open, one a draft.

    What the names in an address lead to may be closed by a request; the rater's study goes on.
    """

    def ask(method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        role = "admin" if headers is None else None
        answer = client.ask(method, f"/api/rating/v1/{path}", role, headers=headers or {}, **options)
        assert answer.is_success, answer.text
        return dict(answer.json())

    lines = [{"item": f"i{i}", "system": system, "text": f"{system} {i}"} for i in range(9) for system in ("a", "b")]
    for name in ("draft", "open", "judged"):
        design = {"name": name, "question": "Which?", "modality": "text", "reasons": ["clear"]}
        study = ask("POST", "studies", json=design)["id"]
        records = "".join(json.dumps(line) + "\n" for line in lines)
        ask("POST", f"studies/{study}/outputs", files={"records": records.encode()})
        if name != "draft":
            ask("POST", f"studies/{study}/open")
    assert str(study) not in NAMES
    (rater,) = ask("POST", f"studies/{study}/raters", json={"count": 1})["raters"]
    own = {"Authorization": f"Bearer {rater['token']}"}
    ask("POST", "consent", own)
    return rater["token"], ask("GET", "next", own)["nonce"]


def _for_raters(operation: Any) -> bool:
    return operation.path.removeprefix("/api/rating/v1/").partition("/")[0] in (
        "invitation", "consent", "next", "assignments"
    )  # fmt: skip


def _without_start(app: Any) -> Any:
    """The application without its clock, which would run to the end of the process."""

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)

    return answering


def _try(tokens: dict[str, str], known: dict[str, Any], examples: int, operation: Any) -> None:
    """Asks one operation many times."""
    strategies = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        st.one_of(strategies),
        st.sampled_from(["rater"] * 4 + [None] if _for_raters(operation) else ["admin", "admin", "ada", "lab", None]),
        st.none() | st.sampled_from(NAMES),
        st.booleans(),
    )
    def every_answer_is_sound(case: Any, role: str | None, name: str | None, inside: bool) -> None:
        if name is not None:
            case.path_parameters = dict.fromkeys(case.path_parameters, name)
        if inside and isinstance(case.body, dict):
            case.body |= {key: value for key, value in known.items() if key in case.body}
        headers = {} if role is None else {"Authorization": f"Bearer {tokens[role]}"}
        answer = case.call_and_validate(headers=headers, checks=CHECKS, timeout=300)  # that of the test decides
        if answer.status_code >= 400:
            assert set(answer.json()) >= {"ok", "error", "detail", "hint", "status"}
            # In two parts: Hypothesis also sends words that it finds in tests, and answers name what was sent.
            assert "Trace" + "back" not in answer.text

    every_answer_is_sound()


def test_no_request_makes_the_arena_fail(both_clients) -> None:
    run(both_clients, 10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_and_fifty_requests_of_every_operation_do_not_make_the_arena_fail(both_clients) -> None:
    run(both_clients, 150)
