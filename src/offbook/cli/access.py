"""How verbs reach an arena: its address and the token."""

from __future__ import annotations

import os
from pathlib import Path

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
