"""`offbook VERB ...`: finds the verb, imports its module alone, runs it and prints what it reports.

Help for the top and for groups is printed from the table below without importing anything of a verb.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import offbook
from offbook.errors import ConfigError, MissingExtraError, OffbookError

if TYPE_CHECKING:
    from offbook.cli.report import Report

# Verb -> (module:function, one line for the help), in the order of the help.
VERBS: dict[str, tuple[str, str]] = {
    "demo": (
        "offbook.cli.demo:demo",
        "the whole way: record, train, serve, submit, trials, leaderboard",
    ),
    "systems": ("offbook.cli.systems:list_systems", "the ten systems and how far each one is"),
    "info": ("offbook.cli.systems:info", "one system: paper, commands, last result"),
    "data record": ("offbook.cli.data:record", "record episodes of a policy in a simulator"),
    "data import": ("offbook.cli.data:import_recordings", "bring recordings in from a format that others use"),
    "data generate": ("offbook.cli.datasets:generate", "make one of the project's own datasets"),
    "data reward": ("offbook.cli.datasets:reward", "give recordings the rewards of another task"),
    "data info": ("offbook.cli.data:info", "what a store holds"),
    "data check": ("offbook.cli.data:check", "whether a store is sound"),
    "data split": ("offbook.cli.datasets:split", "hold episodes out, and keep that with the store"),
    "data export": ("offbook.cli.data:export", "write a store in a format that others read"),
    "train bc": ("offbook.cli.train:bc", "learn a policy from recordings by behaviour cloning"),
    "train encoder": ("offbook.cli.encoder:train", "learn to see from recordings, for policies to stand on"),
    "train vinn": ("offbook.cli.train:vinn", "imitate by nearest neighbours, without training"),
    "train iql": ("offbook.cli.train:iql", "learn a policy from rewards by implicit Q-learning"),
    "train td3bc": ("offbook.cli.train:td3bc", "learn a policy from rewards by TD3 with behaviour cloning"),
    "train cql": ("offbook.cli.train:cql", "learn a policy from rewards by conservative Q-learning"),
    "train mtm": ("offbook.cli.mtm:train", "learn one model of masked trajectories for every role"),
    "train agentic_transformer": (
        "offbook.cli.hindsight:train",
        "learn a policy that keeps its earlier trials in view",
    ),
    "train dt": ("offbook.cli.hindsight:dt", "learn a policy that is told which return to aim at"),
    "train drqv2": ("offbook.cli.pixels:train", "let an agent learn a task from pictures, with or without exploration"),
    "reproduce": ("offbook.cli.reproduce:reproduce", "a system's claim beside its baselines, with a verdict"),
    "evaluate": ("offbook.cli.evaluate:evaluate", "test a policy in a simulator, with intervals and videos"),
    "arena init": ("offbook.cli.arena:init", "set up an arena in a folder"),
    "arena serve": ("offbook.cli.arena:serve", "run the arena's service and pages"),
    "arena worker": ("offbook.cli.arena:worker", "lend a robot, real or simulated, to an arena"),
    "arena token": ("offbook.cli.arena:token", "give out or withdraw access"),
    "arena submit": ("offbook.cli.arena:submit", "submit a policy for trials"),
    "arena status": ("offbook.cli.arena:status", "how far a submission is"),
    "arena requeue": (
        "offbook.cli.arena_upkeep:requeue",
        "put trials that wait for their operator back into the queue",
    ),
    "arena robot": ("offbook.cli.arena_upkeep:robot", "stop a robot, or let it go on"),
    "arena export": ("offbook.cli.arena_export:export", "keep the trials of a submission as recordings"),
    "arena verify-store": ("offbook.cli.arena_upkeep:verify_store", "whether database and files agree"),
    "arena backup": ("offbook.cli.arena_upkeep:backup", "copy an arena while it runs"),
    "arena restore": ("offbook.cli.arena_upkeep:restore", "make an arena from a copy"),
    "policy serve": ("offbook.cli.policy:serve", "let a policy dial out to an arena and play its trials"),
    "policy bridge": ("offbook.cli.bridge:bridge", "let a policy of openpi's, RoboArena's or LeRobot's server play"),
    "policy check": ("offbook.cli.policy:check", "dry run of a policy: shapes, ranges, speed"),
    "rating serve": ("offbook.cli.rating:serve", "run a service in which people compare pairs, blind"),
    "rating import": ("offbook.cli.rating:import_outputs", "make a study of outputs, of runs, or of given votes"),
    "rating export": ("offbook.cli.rating:export", "write the votes of a study"),
    "rating stats": ("offbook.cli.rating:stats", "rank systems from votes, with intervals"),
    "context plan": ("offbook.cli.context:plan", "which context fits a memory, before the run"),
    "context bench": ("offbook.cli.context:bench", "measure a training step beside the plan and the ordinary ways"),
    "context check": ("offbook.cli.context:check", "audit blockwise layers against the equations"),
    "explore check": ("offbook.cli.explore:check", "compare estimates of entropy with closed forms"),
    "explore bench": ("offbook.cli.explore:bench", "measure an exploration bonus beside other ways to compute it"),
    "explore record": ("offbook.cli.explore:record", "record what an exploring agent lives through"),
    "bench": ("offbook.cli.results:bench", "run a benchmark of benchmarks/"),
    "ledger render": ("offbook.cli.results:ledger_render", "write the tables of results from the ledger"),
    "ledger verify": ("offbook.cli.results:ledger_verify", "run the command of a ledger entry again and compare"),
    "ledger list": ("offbook.cli.results:ledger_list", "all entries of the ledger"),
}

_JSON_HELP = "Add --json to print the result as one JSON object."
_SECTIONS = ("Args:", "Returns:", "Raises:", "Example:", "Examples:", "Source:")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `offbook`; those of this process by default.

    Returns:
        0 when all went well, 1 when it failed, 2 for wrong use, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    as_json = "--json" in words[:end]
    words = [word for i, word in enumerate(words) if word != "--json" or i > end]
    try:
        code = _dispatch(words, as_json)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone; do not let the interpreter complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _dispatch(words: list[str], as_json: bool) -> int:
    verb = next((name for n in (2, 1) if (name := " ".join(words[:n])) in VERBS), None)
    try:
        if verb is not None:
            return _run(verb, words[len(verb.split()) :], as_json)
        return _without_verb(words)
    except OffbookError as error:
        return _fail(error, as_json)


def _fail(error: OffbookError, as_json: bool) -> int:
    print(f"offbook: {error}", file=sys.stderr)
    if as_json:
        _print_error(type(error).__name__, str(error), error.fix, error.exit_code)
    return error.exit_code


def _print_error(error: str, detail: str, hint: str, status: int) -> None:
    import json

    print(json.dumps({"ok": False, "error": error, "detail": detail, "hint": hint, "status": status}))


def _without_verb(words: list[str]) -> int:
    """Help, version, or the refusal of a verb that does not exist."""
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in VERBS) else ""
    rest = words[1:] if group else words
    if not rest:
        # Nothing to do is wrong use; yet the help is what the user needs now.
        print(_help(group), file=sys.stderr)
        return 2
    if rest[0] in ("-h", "--help"):
        print(_help(group))
        return 0
    if rest[0] == "--version" and not group:
        print(f"offbook {offbook.__version__}")
        return 0
    typed = f"{group} {rest[0]}".strip()
    close = get_close_matches(" ".join(words[:2]), VERBS, n=1) or get_close_matches(typed, VERBS, n=1)
    fix = f"did you mean 'offbook {close[0]}'?" if close else f"see: offbook {group + ' ' if group else ''}--help"
    raise ConfigError("command line", expected="a verb", got=repr(typed), fix=fix)


def _help(group: str) -> str:
    names = [name for name in VERBS if not group or name.startswith(f"{group} ")]
    width = max(map(len, names)) + 2
    lines = [f"usage: offbook {group + ' ' if group else ''}VERB [flags] [--json]", ""]
    if not group:
        lines = ["offbook: turn recordings into behaviour and find out whether it works.", "", *lines]
    groups = [name.split()[0] if " " in name else "" for name in names]
    for i, name in enumerate(names):
        if i and groups[i] != groups[i - 1]:
            lines.append("")
        lines.append(f"  {name:<{width}}{VERBS[name][1]}")
    lines += ["", "offbook VERB --help shows a verb's flags and examples. " + _JSON_HELP]
    lines += ["Exit codes: 0 fine, 1 failed, 2 wrong use. Progress goes to stderr, results to stdout."]
    return "\n".join(lines)


def _run(verb: str, args: list[str], as_json: bool) -> int:
    try:
        with _quiet(as_json), _plain_os_errors():
            report = call(verb, args)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if as_json and code:
            _print_error("usage", "the flags do not fit the verb", f"see: offbook {verb} --help", code)
        return code
    if as_json:
        from offbook.cli.report import as_json as to_text

        print(to_text({"ok": report.exit_code == 0, **report.data}))
    elif report.text:
        print(report.text)
    return report.exit_code


def call(verb: str, args: Sequence[str]) -> Report:
    """Runs one verb on the words after it and hands back what it reports, without printing it.

    Raises:
        OffbookError: the verb failed.
        SystemExit: the words were a call for help, or do not fit the verb.
    """
    function = _load(verb)
    # The import of tyro takes longer than all of the help above.
    import tyro

    from offbook.cli.report import Report
    from offbook.runs.config import apply_presets

    description = _description(function)
    function, rest = apply_presets(function, args)
    report: Report | None = tyro.cli(function, args=rest, prog=f"offbook {verb}", description=description)
    return report or Report(text="")


def _load(verb: str) -> Callable[..., Any]:
    import importlib

    module, _, name = VERBS[verb][0].partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("offbook"):
            raise
        got, fix = "an installation without it", "run: pip install 'offbook[all]'"
        raise MissingExtraError(f"offbook {verb}", expected=f"the module {error.name!r}", got=got, fix=fix) from None
    return function


def _description(function: Callable[..., Any]) -> str:
    """The docstring without what tyro shows at the flags: the opening paragraphs, the examples, a word on JSON."""
    import inspect

    parts: dict[str, list[str]] = {"": []}
    section = ""
    for line in inspect.cleandoc(function.__doc__ or "").splitlines():
        if line in _SECTIONS:
            section = line
            parts[section] = [line]
        else:
            parts[section].append(line)
    text = ["\n".join(parts[name]).strip() for name in ("", "Examples:", "Example:") if name in parts]
    if hasattr(function, "presets"):
        text.insert(1, f"--preset {'|'.join(function.presets)} or --config FILE sets what the flags then override.")
    return "\n\n".join([*text, _JSON_HELP])


@contextlib.contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """No progress bars for a machine; the variable reaches worker processes too."""
    before = os.environ.get("OFFBOOK_QUIET")
    if wanted:
        os.environ["OFFBOOK_QUIET"] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ["OFFBOOK_QUIET"]
        elif wanted and before is not None:
            os.environ["OFFBOOK_QUIET"] = before


@contextlib.contextmanager
def _plain_os_errors() -> Iterator[None]:
    """A path that is missing, forbidden or of the wrong kind, or a full disk, is the user's to mend, not a bug."""
    import errno

    known = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC)
    try:
        yield
    except OSError as error:
        if error.errno not in (*known, errno.EROFS) or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        where, expected, fix = str(error.filename or "disk"), "a path that can be used", "check the path and its rights"
        raise OffbookError(where, expected=expected, got=(error.strerror or "an error").lower(), fix=fix) from error


if __name__ == "__main__":
    sys.exit(main())
