"""How verbs reach an arena and a robot: address, token, settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from offbook.errors import ConfigError

URL = "http://127.0.0.1:8000"
TOKEN = "OFFBOOK_TOKEN"
"""The environment variable with the token; on a command line other users of the machine would see it."""


def read_token(file: Path | None) -> str:
    """The token in a file, or without one that of the environment.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    text = os.environ.get(TOKEN, "")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            where, got = f"--token-file {file}", str(getattr(error, "strerror", "something else"))
            raise ConfigError(where, expected="a file with a token", got=got, fix="check the path") from error
    if not text.strip():
        expected = "a token in this environment variable, or --token-file"
        fix = f"ask the arena's operator for one ('offbook arena token' makes it), then: export {TOKEN}=ob_..."
        raise ConfigError(TOKEN, expected=expected, got="neither", fix=fix)
    return text.strip()


def read_settings(file: Path | None) -> dict[str, Any]:
    """The settings of a robot: one JSON object; none without a file.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    if file is None:
        return {}
    where, expected = f"--settings {file}", 'one JSON object, such as {"host": "172.16.0.2"}'
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        got = str(getattr(error, "strerror", None) or error)
        raise ConfigError(where, expected=expected, got=got, fix="correct the path or the file") from error
    if not isinstance(settings, dict):
        raise ConfigError(where, expected=expected, got=f"a {type(settings).__name__}", fix="correct the file")
    return settings
