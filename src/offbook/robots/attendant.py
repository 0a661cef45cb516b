"""Who stands beside a real robot: arranges the scene of a trial, and says how well it went."""

import select
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from offbook.errors import ConfigError, NeedsHumanError
from offbook.robots.base import Score

PATIENCE_S = 600.0


@runtime_checkable
class Attendant(Protocol):
    """A person, or a machine that does the same: a scale, a classifier, a device that puts things back."""

    def arrange(self, prompt: str, scene: Mapping[str, Any] | None) -> None:
        """Puts the scene in order before a trial; raises NeedsHumanError where that cannot be done."""

    def judge(self, prompt: str) -> Score:
        """How well the trial went that has just ended."""


class Terminal:
    """A person at the terminal in which the robot's process runs.

    Args:
        patience_s: longest wait for an answer, seconds.
        source: where answers are read; standard input by default.
        sink: where questions are shown; standard error by default.
    """

    def __init__(
        self, patience_s: float = PATIENCE_S, *, source: TextIO | None = None, sink: TextIO | None = None
    ) -> None:
        self._patience_s, self._source, self._sink = patience_s, source or sys.stdin, sink or sys.stderr

    def arrange(self, prompt: str, scene: Mapping[str, Any] | None) -> None:
        """Shows the scene and waits until the person says that it stands."""
        wanted = ", ".join(f"{name}: {value}" for name, value in (scene or {}).items() if name != "prompt")
        scene_words = f"Arrange the scene ({wanted or 'as always'}) for: {prompt or 'the task'}."
        if self._ask(scene_words, "Enter when it stands, q to give up") == "q":
            raise self._missing("the word that it cannot be arranged")

    def judge(self, prompt: str) -> Score:
        """Asks for a number from 0 to 1; 1 is success."""
        question = f"How well did it go: {prompt or 'the task'}?"
        while True:
            answer = self._ask(question, "a number from 0, nothing, to 1, done")
            try:
                value = float(answer)
            except ValueError:
                continue
            if 0 <= value <= 1:
                return Score(value=value, success=value == 1)

    def _ask(self, question: str, hint: str) -> str:
        if not self._source.isatty():
            raise self._missing("no terminal")
        print(f"{question} [{hint}] ", file=self._sink, flush=True)
        if not select.select([self._source], [], [], self._patience_s)[0]:
            raise self._missing(f"no answer within {self._patience_s:g} s")
        line = self._source.readline()
        if not line:
            raise self._missing("the end of the terminal's input")
        return line.strip().lower()

    def _missing(self, got: str) -> NeedsHumanError:
        expected, fix = "a person at this terminal who arranges the scene", "see to the robot, then start it again"
        return NeedsHumanError("attendant", expected=expected, got=got, fix=fix)


def make_attendant(word: str) -> Attendant:
    """The attendant that a setting means: `terminal`, or `MODULE:NAME`, a class or function that makes one.

    Raises:
        ConfigError: it means nothing, or something that is no attendant.

    Example:
        >>> isinstance(make_attendant("terminal"), Attendant)
        True
    """
    if word == "terminal":
        return Terminal()
    module, _, name = word.partition(":")
    where, expected = f"attendant {word!r}", "terminal, or MODULE:NAME of something that makes one"
    # A console script does not look into the current folder by itself; there is where users keep their modules.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(import_module(module), name)()
    except Exception as error:  # the module is user code
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(where, expected=expected, got=got, fix="mend it, or choose terminal") from error
    if not isinstance(made, Attendant):
        got, fix = f"a {type(made).__name__}", "give it arrange(prompt, scene) and judge(prompt)"
        raise ConfigError(where, expected="an attendant", got=got, fix=fix)
    return made
