"""What the arena answers when it will not do something: one error, one JSON shape, on every route."""

from __future__ import annotations

from typing import Any

from offbook.errors import SubmissionError


class RefusedError(SubmissionError):
    """A request that cannot be granted, with the status and the word a program can act on.

    Args:
        status: the HTTP status, 4xx or 5xx.
        error: one stable word, such as `"stale_fence"`.
        where: the request, field or thing at fault.
        expected: what would have been right.
        got: what was there instead.
        fix: what the caller can do now.
        more: further keys of the JSON answer, such as the current fence.

    Example:
        >>> error = RefusedError(404, "not_found", "trial 7", expected="a trial", got="none", fix="list them")
        >>> error.body()["status"]
        404
    """

    def __init__(self, status: int, error: str, where: str, *, expected: str, got: str, fix: str, **more: Any) -> None:
        super().__init__(where, expected=expected, got=got, fix=fix)
        self.status, self.error, self.more = status, error, more

    def body(self) -> dict[str, Any]:
        """The JSON answer: `{ok, error, detail, hint, status}` and what more there is to say."""
        detail = f"{self.where}: expected {self.expected}, got {self.got}."
        return error_body(self.status, self.error, detail, f"{self.fix[:1].upper()}{self.fix[1:]}.") | self.more


def error_body(status: int, error: str, detail: str, hint: str) -> dict[str, Any]:
    """The one shape of every error that leaves the service."""
    return {"ok": False, "error": error, "detail": detail, "hint": hint, "status": status}


def unknown(what: str, name: object, hint: str) -> RefusedError:
    """The refusal for a thing that is not there."""
    return RefusedError(404, "not_found", f"{what} {name!r}", expected=f"a known {what}", got="no such one", fix=hint)
