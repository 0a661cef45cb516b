"""What may stand in a request: fields that both databases take, and ids in addresses."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator

from offbook.service.refusal import unknown


def _storable(value: str) -> str:
    """Databases refuse NUL and half of a surrogate pair, in ways of their own."""
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("text with a NUL or half a character")
    return value


def _small(value: dict[str, Any]) -> dict[str, Any]:
    """JSON that both databases take, and not much of it."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("numbers that JSON does not know, or text that is none") from error
    if len(text) > 16_384 or "\\u0000" in text:
        raise ValueError("more than 16 KiB, or a NUL")
    return value


Text = Annotated[str, AfterValidator(_storable)]
SmallRecord = Annotated[dict[str, Any], AfterValidator(_small)]


def number(what: str, name: str) -> int:
    """An id from an address.

    Raises:
        RefusedError: 404, it is no number, so there is no such thing.
    """
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise unknown(what, name[:40], f"use the number of the {what}")
    return int(name)
