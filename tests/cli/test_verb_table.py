"""The whole table of verbs: each leads to a function with help, and every command that we name exists."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from offbook.cli.main import VERBS
from offbook.systems import SYSTEMS

Cli = Callable[[list[str]], Any]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_of_the_table_has_a_function_with_help_and_examples(cli: Cli, verb: str) -> None:
    module, _, name = VERBS[verb][0].partition(":")
    function = getattr(importlib.import_module(module), name)
    assert "Examples:" in (function.__doc__ or "")
    code, out, _ = cli([*verb.split(), "--help"])
    assert code == 0
    assert f"offbook {verb} " in out


def test_every_command_that_a_system_names_exists(cli: Cli) -> None:
    for system in SYSTEMS.values():
        for command in system.commands:
            words = command.split()[1:]
            if words[-1] != "--help":
                words.append("--help")
            assert cli(words).exit_code == 0, command
